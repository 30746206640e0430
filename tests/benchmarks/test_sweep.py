"""benchmarks.sweep finds the fastest cell that fits, leaves out what cannot, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sweep, throughput
from tests.small_run import ROOT
from tests.toys import refused

# In place of benchmarks.throughput: larger micro-batches are faster, until with fewer than two the memory is full;
# checkpointing fits one more and is slower; ZeRO-3 fails by itself.
CELL = """
import json, os, sys
words = sys.argv[1:]
sets = dict(words[n + 1].split("=") for n, word in enumerate(words) if word == "--set")
count, kept = int(sets["batch.accumulation"]), int(sets["activation_checkpointing"])
with open(os.environ["RUNS"], "a") as runs:
    runs.write(f"{count}/{kept}/{sets.get('loading.workers', '-')} ")
if "zero3" in words[words.index("--ds") + 1]:
    sys.exit("error: another one")
if count < 2 - kept:
    sys.exit("error: the GPU's memory is full (tried 2 GiB)")
speed = 100 / (count + 2 * kept) + 5 * int(sets.get("loading.workers", 0))
json.dump({"samples_per_s": speed}, open(words[words.index("--out") + 1], "w"))
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "toy_throughput.py").write_text(CELL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sweep, "MODULE", "toy_throughput")
    (tmp_path / "runs").write_text("")
    return tmp_path


LINE = ["--recipe", "tiny", "--stage", "fusion", "--accumulation", "1", "4", "2", "--checkpointing", "0", "1"]


def test_the_fastest_that_fits_is_found_and_what_is_done_is_not_run_again(place, capsys):
    line = [*LINE, "--workers", "0", "3", "--out", str(place / "out")]
    assert sweep.main(line) == 0
    # Small micro-batches first; the fastest, two micro-batches without checkpointing, with other workers.
    ran = "4/0/- 2/0/- 1/0/- 4/1/- 2/1/- 1/1/- 2/0/0 2/0/3 "
    assert (place / "runs").read_text() == ran
    told = capsys.readouterr().out
    best = (
        "65.00 samples/s  --ds ds_configs/zero1_bf16.json --set batch.accumulation=2 --set activation_checkpointing=0"
    )
    assert f"{best} --set compile=true --set loading.workers=3" in told
    assert "memory is full" in told
    assert sweep.main(line) == 0 and (place / "runs").read_text() == ran
    plot = (place / "out" / "sweep.svg").read_text()
    assert "zero1_bf16, accumulation 1, compiled" in plot and "no figure" in plot


def test_a_larger_micro_batch_is_left_out_behind_one_that_did_not_fit(place, monkeypatch):
    monkeypatch.setattr(sweep, "FULL", "another one")  # what ZeRO-3's cells say
    out = place / "out"
    assert sweep.main([*LINE, "--ds", "ds_configs/zero3_bf16.json", "--out", str(out)]) == 1
    assert (place / "runs").read_text() == "4/0/- 4/1/- "
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert [cell["ended"] for cell in cells.values()].count(sweep.LEFT_OUT) == 4


def test_a_cell_that_failed_for_another_reason_comes_again(place):
    for tries in (1, 2):
        line = ["--accumulation", "2", "--ds", "ds_configs/zero3_bf16.json", "--out", str(place / "out")]
        assert sweep.main(line) == 1
        assert (place / "runs").read_text() == "2/0/- " * tries


def test_when_the_time_is_over_the_sweep_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "LEAST_S", 10**6)
    assert sweep.main([*LINE, "--out", str(place / "out")]) == 1
    assert "run the same line again to go on" in capsys.readouterr().out and not (place / "runs").read_text()


@pytest.mark.parametrize(
    ("words", "says"), [(["--accumulation", "0"], "--accumulation=0 is below 1"), (["--seconds", "0"], "is no time")]
)
def test_what_is_wrong_is_one_sentence(place, capsys, words, says):
    assert says in refused(capsys, sweep.main, *words, "--out", place / "out")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_cell_is_a_line_that_throughput_understands(ranks):
    args = sweep.parse_args(["--ranks", str(ranks), "--", "--stored-codes", "--set", "batch.images=8"])
    words = next(sweep.groups(args))[0].cell(args).words(False)
    assert words[0] == ("benchmarks.throughput" if ranks == 1 else "torch.distributed.run")
    read = throughput.parse_args(words[words.index("benchmarks.throughput") + 1 :])
    assert read.stored_codes and read.set[-1] == "batch.images=8" and "batch.accumulation=8" in read.set
