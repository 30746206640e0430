"""Which runs may go on where another one stopped, and under what identity."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import publish
from pretrain.checkpoint.save import newest
from pretrain.config import BatchSize, Stage
from pretrain.optim import Optim
from pretrain.rollbacks import Rollback, read_rollbacks, write_rollbacks
from pretrain.run.continuation import (
    begins_at,
    inputs_dir,
    parent_checkpoint,
    parents,
    start_identity,
)
from pretrain.run.directory import note_recipe
from pretrain.run.identity import hash_of, identity_of
from pretrain.run.resuming import find_start
from tests.run.test_identity import OLD, RECIPE, VISION

LONGER = replace(VISION, steps=9, optim=Optim(schedule="wsd", decay_steps=2))


def run_of(directory: Path, identity: dict, *steps: int) -> Path:
    """A stage's directory with checkpoints of these steps."""
    note_recipe(directory, RECIPE, identity, {})
    for step in steps:
        final = directory / "checkpoints" / f"step_{step:08d}"
        beside = directory / "checkpoints" / "new"
        beside.mkdir(parents=True)
        body = {"version": 3, "step": step, "world": 1, "layout": {}, "extra": {}, "files": {}, "precision": "fp32"}
        publish(body | {"recipe_hash": hash_of(identity), "data_digest": "d"}, [], beside, final)
    return directory


@pytest.fixture
def parent(tmp_path) -> Path:
    return run_of(tmp_path / "base" / "vision", identity_of(RECIPE, VISION), 2, 3)


def test_the_newest_checkpoint_or_the_one_that_is_named(parent, tmp_path):
    chosen = parent / "checkpoints" / "step_00000002"
    for given, step in ((parent, 3), (chosen, 2)):
        identity = start_identity(tmp_path / "new", RECIPE, LONGER, given)
        parents = {"from": str(parent), "run": hash_of(identity_of(RECIPE, VISION)), "step": step}
        assert identity == identity_of(RECIPE, LONGER) | {"continues": parents}
        assert parent_checkpoint(identity, partial(newest, precision="fp32", data_digest="d")).step == step
        assert inputs_dir(tmp_path, identity) == tmp_path / "base"
    (chosen / "MANIFEST.json").write_text("{")
    with pytest.raises(ValueError, match=r"step 2 .* is damaged or missing; give another, such"):
        parent_checkpoint(identity, partial(newest, precision="fp32", data_digest="d"))
    with pytest.raises(ValueError, match="data_digest=d and this run has other"):
        parent_checkpoint(
            start_identity(tmp_path, RECIPE, LONGER, parent), partial(newest, precision="fp32", data_digest="other")
        )


def test_a_run_that_has_begun_needs_its_parent_no_more(parent, tmp_path):
    identity = start_identity(tmp_path / "new", RECIPE, LONGER, parent)
    run_of(tmp_path / "new", identity, 5)
    parent.rename(tmp_path / "gone")
    for given in (parent, None):
        assert start_identity(tmp_path / "new", RECIPE, LONGER, given) == identity
    with pytest.raises(ValueError, match="holds another run; take another --run-dir"):
        start_identity(tmp_path / "new", RECIPE, LONGER, tmp_path / "gone")
    # A run that goes on from it in turn finds the stages that the first one's settings name.
    again = start_identity(tmp_path / "third", RECIPE, replace(LONGER, steps=20), tmp_path / "new")
    note_recipe(tmp_path / "third", RECIPE, again, {})
    assert list(parents(tmp_path / "third")) == [tmp_path / "new", parent]
    assert again["continues"]["step"] == 5 and inputs_dir(tmp_path / "x", again) == tmp_path / "base"


def test_it_passes_over_what_its_parent_passes_over(parent, tmp_path):
    done = Rollback(3, 1, 2, 4, "nan", 1.0, done=True)
    write_rollbacks(parent, (done, Rollback(9, 3, 7, 9, "nan", 2.0)))  # of the second the parent never made use
    (parent / "metrics.jsonl").write_text('{"step": 1}\n')
    (parent / "evals.jsonl").write_text('{"step": 1, "x": 2.0}\n')
    identity, child = start_identity(tmp_path / "new", RECIPE, LONGER, parent), tmp_path / "new"
    child.mkdir()
    digests = {"recipe_hash": hash_of(identity), "data_digest": "d", "names_digest": "d"}
    start = find_start(child, identity, "fp32", copied=False, **digests)
    assert start.checkpoint.step == 3 and start.rollbacks == (done,), "already its first start reads on behind them"
    assert read_rollbacks(child) == (done,) and (child / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (child / "evals.jsonl").read_bytes() == (parent / "evals.jsonl").read_bytes()
    assert begins_at(identity) == 3 and begins_at(identity_of(RECIPE, VISION)) == 0
    own = (done, Rollback(8, 3, 6, 8, "inf", 3.0, done=True))
    write_rollbacks(child, own)  # it went back before it had saved anything
    assert find_start(child, identity, "fp32", copied=False, **digests).rollbacks == own
    (child / "rollbacks.json").unlink()
    run_of(child, identity, 5)  # it began before its parent went back
    assert find_start(child, identity, "fp32", copied=False, **digests).rollbacks == ()
    (parent / "rollbacks.json").write_text("{")
    with pytest.raises(ValueError, match="the order of this run's data depends on it"):
        start_identity(tmp_path / "other", RECIPE, LONGER, parent)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (VISION, r"steps=3: .* has done 3 already"),
        (
            replace(LONGER, batch=BatchSize(images=16)),
            r"only steps and optim may change, and batch.images=8 \(now 16\)",
        ),
        (replace(LONGER, drop_path=0.0), r"drop_path=0.2 \(now 0.0\) would; .* init_from="),
    ],
)
def test_what_does_not_go_on_is_refused(parent, tmp_path, stage: Stage, says):
    with pytest.raises(ValueError, match=says):
        start_identity(tmp_path / "new", RECIPE, stage, parent)


def test_what_is_no_run_to_go_on_from_is_refused(parent, tmp_path):
    nowhere, empty = tmp_path / "nowhere", run_of(tmp_path / "empty", identity_of(RECIPE, VISION))
    run_of(tmp_path / "own", identity_of(RECIPE, VISION), 1)
    for place, given, says in (
        ("new", nowhere, "is no stage's directory of a run"),
        ("new", empty, "holds no complete checkpoint; of its weights alone a new run begins"),
        ("new", parent / "checkpoints" / "step_00000007", "no complete checkpoint step_00000007"),
        ("own", parent, "holds another run"),
        ("empty", empty, "is this run itself"),
    ):
        with pytest.raises(ValueError, match=says):
            start_identity(tmp_path / place, RECIPE, LONGER, given)


def test_an_old_run_goes_on_with_the_pixels_it_began_with(tmp_path):
    old = run_of(tmp_path / "old", OLD["vision"], 3)
    identity = start_identity(tmp_path / "new", RECIPE, LONGER, old)
    assert "antialias" not in identity["transform"] and identity["continues"]["run"] == hash_of(OLD["vision"])
    run_of(tmp_path / "new", identity, 5)
    assert start_identity(tmp_path / "new", RECIPE, LONGER, old) == json.loads(json.dumps(identity))
