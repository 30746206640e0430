"""A run that meets bad data goes back and past them: on two ranks, with the samples of every step checked."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import complete, drop_beyond
from pretrain.lives import read_lives
from pretrain.metrics import MEASURED, read_metrics
from pretrain.parallel.mesh import Place
from pretrain.recipes import load_recipe
from pretrain.report.rows import load_run
from pretrain.run.inputs import open_data
from pretrain.status import lines_of, status_of
from tests.small_run import Ranks, check_weights, command
from tests.toys import wait_for

SETTINGS = ("init_from=null", "steps=8", "save_every=2", "keep=9", "rollback.most=1", "rollback.before=1")
SETTINGS += ("rollback.after=1", "rollback.window=3", "rollback.spike=50", "rollback.spikes=1")
BAD = 6  # the bad batch
# It is met in step 6; the run goes back to step 4 and passes over the batches 5 to 7.
BATCHES = [1, 2, 3, 4, 8, 9, 10, 11]


def keys_of(data: Path, numbers: list[int]) -> list[list[str]]:
    """The samples of the batches with these numbers, as one rank sees them."""
    recipe, stage = load_recipe(str(data / "recipe.py"), "language", ["init_from=null"])
    loader = open_data(recipe, stage, None, Place(0, 0, 0, 0, 1))
    return [[key for batch in next(loader.batches(n - 1, n)) for key in batch.keys] for n in numbers]


def spoil(keys: frozenset[str], factor: float, rank: int) -> None:
    """The loss of a micro-batch of these samples is `factor` times too large. (One sample comes in every epoch.)"""
    from pretrain.objectives.masked import MaskedDataHeads

    forward = MaskedDataHeads.forward

    def spoilt(self, encoded, batch, *rest):
        by = factor if keys.issuperset(batch.keys) else 1.0
        return {name: value * by for name, value in forward(self, encoded, batch, *rest).items()}

    MaskedDataHeads.forward = spoilt


def trace(stage: Path) -> dict[int, list[str]]:
    """{step: the samples of all ranks}."""
    seen: dict[int, list[str]] = {}
    for path in sorted(stage.glob("samples.rank*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(line["step"], []).extend(line["keys"])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("ds", "factor"), [("zero1_bf16.json", float("nan")), ("zero3.json", 1e5)])
def test_it_ends_with_the_bits_of_a_run_that_passes_over_them(data, tmp_path, monkeypatch, ds, factor):
    monkeypatch.setenv("DATA", str(data))
    (bad,) = keys_of(data, [BAD])
    run, twin, log = tmp_path / "run", tmp_path / "twin", tmp_path / "log"

    prepare = partial(spoil, frozenset(bad), factor)

    def live(place: Path) -> tuple[list, str]:
        log.unlink(missing_ok=True)
        ranks = Ranks(command(data, place, "language", *SETTINGS, ds=ds), data, 2, log, prepare)
        codes = ranks.wait(90)
        ranks.kill()
        return codes, log.read_text()

    codes, said = live(run)
    assert codes == [69, 69] and "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if "to step 4 and from there past the batches 5 to 7" in line)
    assert "step 6: the gradient norm is" in line and "(rollback 1 of 1)" in line

    # The twin begins at that checkpoint, and somebody has written down by hand what it passes over.
    shutil.copytree(run, twin)
    drop_beyond(twin / "language" / "checkpoints", 4)
    entry = {"step": 6, "to": 4, "first": 5, "last": 7, "why": "", "time": 0.0, "done": True}
    (twin / "language" / "rollbacks.json").write_text(json.dumps({"rollbacks": [entry]}))

    ranks = Ranks(command(data, run, "language", *SETTINGS, ds=ds), data, 2, log, prepare)  # is killed once more
    wait_for(lambda: (run / "language/checkpoints/step_00000006").is_dir() or ranks.wait(0.05) == [0, 0])
    ranks.kill()
    for place in (run, twin):
        codes, said = live(place)
        assert codes == [0, 0], said
    check_weights(run / "language", twin / "language")
    first, second = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(p / "language/metrics.jsonl")]
        for p in (run, twin)
    )
    assert first == second and [line.get("passed_batches") for line in first] == [None] * 4 + [3] * 4
    saved = {manifest["step"]: manifest["extra"] for _, manifest in complete(run / "language/checkpoints")}
    assert list(saved) == [8, 6, 4, 2]
    assert saved[4] == {"norms": [line["grad_norm"] for line in first[1:4]]}, (
        "by which a spike of step 5 would be judged"
    )
    assert [sorted(keys) for keys in trace(run / "language").values()] == [sorted(k) for k in keys_of(data, BATCHES)]
    assert read_lives(run / "language")[0].reason.startswith("RolledBack: step 6: the gradient norm is")
    shown = "\n".join(lines_of(status_of(load_run(run)[0], 0.0)))
    assert "went back once, past 3 batches" in shown
