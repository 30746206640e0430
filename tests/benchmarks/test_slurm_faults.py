"""The model of effective training time, and what is made of measured faults."""

from __future__ import annotations

import json

import pytest

from benchmarks.slurm_faults import costs, kept_runs
from benchmarks.slurm_runs.job import Measured, sum_by_kind
from benchmarks.slurm_runs.predict import RATES, best_interval, effective, predict, simulate


@pytest.mark.parametrize("cost", [10.0, 300.0])
def test_the_formula_is_what_playing_it_out_gives(cost):
    rate, stall = 1 / 3600, 5.0
    interval = best_interval(rate, stall)
    played = sum(simulate(rate, cost, interval, stall, 1_000_000, seed) for seed in range(9)) / 9
    assert effective(rate, cost, interval, stall) == pytest.approx(played, abs=0.01)


def test_the_best_interval_is_the_best():
    rate, stall = RATES["Llama 3"].per_gpu_s * 512, 25.0
    best = best_interval(rate, stall)
    at = [effective(rate, 30, interval, stall) for interval in (best / 2, best, best * 2)]
    assert max(at) == at[1]


def test_more_faults_and_dearer_ones_leave_less():
    table = predict(10.0, 30.0)
    stall = "a save stops all ranks for 25 s"
    llama, opt = (table[name][stall]["start costs 60 s more"] for name in ("Llama 3", "OPT-175B"))
    assert 0.9 < opt["requeue"] < opt["in place"] < llama["in place"] < 1
    assert table["ByteRobust"]["faults_per_day"] == pytest.approx(1.384)  # of 49,212 in 91 days on 200,000 GPUs
    assert set(RATES) <= set(table)


def test_runs_of_other_kinds_stay_in_the_result(tmp_path):
    out = tmp_path / "out.json"
    assert kept_runs(out, set()) == []
    runs = [{"ds": "zero1.json", "kind": kind} for kind in ("USR1", "requeue")]
    out.write_text(json.dumps({"runs": runs}))
    assert kept_runs(out, {("zero1.json", "USR1"), ("zero3.json", "requeue")}) == runs[1:]


def test_faults_are_summed_by_kind():
    faults = [
        Measured("USR1", 5, seconds, by, 0) for seconds, by in ((3.0, "requeue"), (9.0, "in place"), (4.0, "requeue"))
    ]
    assert sum_by_kind(faults) == {
        "USR1": {"faults": 3, "median_s": 4.0, "longest_s": 9.0, "requeue": 2, "in place": 1}
    }


def test_costs_are_predicted_from_when_both_ways_were_measured():
    assert costs([("in place", 4.0), ("in place", 6.0)]) == {"by": {"in place": {"faults": 2, "mean_s": 5.0}}}
    told = costs([("in place", 4.0), ("requeue", 60.0)])
    assert told["predicted_effective_training_time"] == predict(4.0, 60.0)
