"""When a run goes back and where to, and what a kill in the middle of that leaves."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import replace

import pytest
import torch

from pretrain import status
from pretrain.checkpoint import directory as checkpoints
from pretrain.config import Recipe
from pretrain.data.order import batch_number
from pretrain.report.page import page
from pretrain.report.rows import load_run
from pretrain.rollbacks import ROLLBACKS, Rollback, RollbackRule, passed_batches, read_rollbacks, write_rollbacks
from pretrain.run.directory import noted_identity
from pretrain.run.rollback import RolledBack, finish_rollback, roll_back, target
from pretrain.run.step import Diverged, Judge

RULE = RollbackRule(most=2, before=3, after=2, spike=5.0, spikes=2, window=4)


def judged(norms, rule=RULE, allowed=0, known=None) -> tuple[Judge, list[int]]:
    """Judges steps with these norms, numbered from 1; -> the judge, and the steps after which it was not calm."""
    judge, wild = Judge(allowed, rule, "do this", known), []
    for step, norm in enumerate(norms, start=1):
        judge.note(step, norm, {"loss": torch.tensor(1.0)})
        judge.settle()
        wild += [] if judge.calm else [step]
    return judge, wild


def test_spikes_in_a_row_are_a_divergence(caplog):
    with pytest.raises(Diverged) as raised:
        judged([0.9, 1.2, 0.8, 1.0, 6.0, 1.0, 9.0, 8.0])
    assert (raised.value.first, raised.value.step) == (7, 8)
    assert "step 8: the gradient norm is 8, 8.0 times the median of 4 steps, 2 steps in a row" in str(raised.value)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "step 5: the gradient norm is 6, 6.3 times the median of 4 steps (spike 1 of 2 in a row)",
        "step 7: the gradient norm is 9, 9.0 times the median of 4 steps (spike 1 of 2 in a row)",
    ]


@pytest.mark.parametrize(
    ("norms", "rule", "wild"),
    [
        ([1.0, 1.0, 99.0, 99.0, 99.0], RULE, []),  # there is no full window to compare the first four with
        ([1.0] * 4 + [6.0, 1.0, 6.0, 1.0], RULE, [5, 7]),
        ([1.0] * 4 + [1e9] * 9, replace(RULE, spike=0.0), []),
        ([0.0] * 5 + [1.0], RULE, []),  # nothing is trained yet
        ([1.0] * 4 + [5.0, 5.0, 5.0], RULE, []),  # not above
    ],
)
def test_what_is_no_row_of_spikes(norms, rule, wild):
    assert judged(norms, rule)[1] == wild


def test_a_judge_goes_on_with_the_norms_of_the_checkpoint():
    norms = [1.0, 1.0, 1.1, 0.9, 1.0, 7.0, 7.0]
    with pytest.raises(Diverged) as alone:
        judged(norms)
    before, _ = judged(norms[:5])
    with pytest.raises(Diverged) as resumed:
        judged(norms[5:], known=deque(json.loads(json.dumps(list(before.norms))), maxlen=4))
    assert (resumed.value.first + 5, resumed.value.step + 5) == (alone.value.first, alone.value.step)
    assert resumed.value.what == alone.value.what


def test_the_first_of_the_bad_steps_is_told():
    with pytest.raises(Diverged) as raised:
        judged([1.0, float("nan"), float("inf"), float("nan")], allowed=2)
    assert (raised.value.first, raised.value.step) == (2, 4)


@pytest.mark.parametrize(
    ("saved", "good", "before", "to"),
    [
        ([100, 200, 300], 310, 100, 200),  # PaLM: the newest that is a hundred steps older
        ([100, 200, 300], 299, 100, 100),
        ([300, 400], 420, 200, 300),  # older ones are gone: the oldest
        ([300, 400], 300, 50, 300),
        ([300, 400], 299, 50, 7),  # none was saved before it went wrong
        ([], 50, 10, 7),
    ],
)
def test_where_it_goes_back_to(saved, good, before, to):
    assert target(saved, 7, good, before) == to


@pytest.mark.parametrize(
    ("passed", "numbers"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        ([(1, 2)], [3, 4, 5, 6, 7, 8]),
        ([(3, 3), (5, 7)], [1, 2, 4, 8, 9, 10]),
        ([(5, 7), (2, 4), (6, 8)], [1, 9, 10, 11, 12, 13]),  # they overlap and touch
    ],
)
def test_every_other_batch_is_seen_exactly_once(passed, numbers):
    rollbacks = tuple(Rollback(9, 0, first, last, "", 0.0) for first, last in passed)
    assert [batch_number(step, passed_batches(rollbacks)) for step in range(1, 7)] == numbers


def save_steps(directory, *steps: int) -> None:
    for step in steps:
        place = directory / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        body = {"step": step, "world": 1, "layout": {}, "files": {}, "extra": {}}
        (place / checkpoints.MANIFEST).write_text(json.dumps(body | {"sha256": checkpoints._hash_json(body)}))


def left(directory) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in directory.glob("checkpoints/step_*"))


WHY = Diverged(8, 9, "the gradient norm is nan", "do this")


def test_it_goes_back_in_two_lives_and_a_kill_between_changes_nothing(tmp_path, monkeypatch):
    save_steps(tmp_path, 2, 4, 6)
    (tmp_path / "recipe.json").write_text('{"identity": {"a": 1}}')
    with pytest.raises(RolledBack, match=r"step 9: .* is nan; going back to step 4 and from there past .* 5 to 11 "):
        roll_back(tmp_path, 0, RULE, (), WHY)
    assert left(tmp_path) == [2, 4, 6] and not read_rollbacks(tmp_path)[0].done
    remove, removed = checkpoints._remove, []

    def killed(path) -> None:
        removed.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_remove", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_rollback(tmp_path)
    monkeypatch.setattr(checkpoints, "_remove", remove)
    assert removed and not read_rollbacks(tmp_path)[0].done
    finish_rollback(tmp_path)
    assert left(tmp_path) == [2, 4] and read_rollbacks(tmp_path)[0].done
    save_steps(tmp_path, 6)
    finish_rollback(tmp_path)
    assert left(tmp_path) == [2, 4, 6], "that one was saved after the rollback"
    # A second time at the same place: what is passed over grows.
    with pytest.raises(RolledBack, match=r"going back to step 4 and .* the batches 12 to 18 \(rollback 2 of 2\)"):
        roll_back(tmp_path, 0, RULE, read_rollbacks(tmp_path), WHY)
    finish_rollback(tmp_path)
    assert passed_batches(read_rollbacks(tmp_path)) == ((5, 18),)
    with pytest.raises(Diverged, match="also after 2 of 2 rollbacks; the run has diverged: do this"):
        roll_back(tmp_path, 0, RULE, read_rollbacks(tmp_path), WHY)


def test_without_a_rule_it_ends_as_before(tmp_path):
    with pytest.raises(Diverged) as raised:
        roll_back(tmp_path, 0, RollbackRule(), (), WHY)
    assert raised.value is WHY and not list(tmp_path.iterdir())


def test_a_run_that_went_back_to_its_beginning_is_still_that_run(tmp_path):
    (tmp_path / "recipe.json").write_text('{"identity": {"a": 1}}')
    assert noted_identity(tmp_path) is None
    with pytest.raises(RolledBack, match="going back to step 0 and from there past the batches 5 to 11"):
        roll_back(tmp_path, 0, RULE, (), WHY)
    assert noted_identity(tmp_path) == {"a": 1}


GOOD = {"step": 9, "to": 4, "first": 5, "last": 11, "why": "", "time": 1.5, "done": True}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"rollbacks": 3}', '{"rollbacks": [7]}', "[" * 10_000),
        *(json.dumps({"rollbacks": [GOOD | {name: value}]}) for name, value in [("to", 9), ("first", 0), ("last", 4)]),
        *(json.dumps({"rollbacks": [GOOD | {name: value}]}) for name, value in [("last", 2**60), ("done", 1)]),
    ],
)
def test_a_damaged_list_is_one_sentence(tmp_path, content):
    (tmp_path / ROLLBACKS).write_text(content)
    with pytest.raises(
        ValueError, match=r"rollbacks.json is damaged .* depends on it; restore it, or start again"
    ) as e:
        read_rollbacks(tmp_path)
    assert "\n" not in str(e.value)


def test_a_list_reads_back(tmp_path):
    assert read_rollbacks(tmp_path) == ()
    write_rollbacks(tmp_path, (Rollback(**GOOD),))
    assert read_rollbacks(tmp_path) == (Rollback(**GOOD),)


def test_status_and_report_say_that_it_went_back(tmp_path, capsys):
    stage = tmp_path / "run" / "vision"
    stage.mkdir(parents=True)
    spread = {"pass_spread": 0.25, "wait_spread": 0.5, "slow_rank": 1}
    lines = [json.dumps({"step": step, "loss": 1.0} | spread) + "\n" for step in (50, 100)]
    (stage / "metrics.jsonl").write_text("".join(lines))
    write_rollbacks(stage, (Rollback(**GOOD), Rollback(**GOOD | {"first": 20, "last": 23, "to": 6})))
    assert status.main([str(tmp_path / "run")]) == 0
    assert "went back 2 times, past 11 batches" in capsys.readouterr().out
    shown = page(tmp_path / "run", load_run(tmp_path / "run"))
    assert "went back 2 times, past 11 batches" in shown and "Slowest rank, above the median" in shown
    (stage / ROLLBACKS).write_text("{")
    assert "rollbacks.json is damaged" in page(tmp_path / "run", load_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("field", "value"), [("most", -1), ("before", -1), ("spikes", 0), ("window", 0), ("spike", 1.0), ("spike", -3.0)]
)
def test_a_rule_that_means_nothing_is_refused(field, value):
    with pytest.raises(ValueError, match=f"rollback.{field}={value} is"):
        RollbackRule(**{field: value})
    assert Recipe.__dataclass_fields__["rollback"].default_factory().most == 0  # type: ignore[misc]
