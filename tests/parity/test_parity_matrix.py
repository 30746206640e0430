"""Every layout of ranks gives the numbers of one dense process, and every other is refused with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch.distributed as dist

from pretrain.parallel.sizes import Parallel
from pretrain.run.build import stage_ds_config
from tests.parity.cells import (
    LEGAL,
    PRECISIONS,
    TOPOLOGIES,
    TRAINABLE,
    Topology,
    cells_of,
    legal_cells,
    why_illegal,
)
from tests.parity.passes import pass_cells
from tests.parity.runs import ROWS, AnyCell, compare, failures
from tests.small_run import RECIPE, train_stage
from tests.step_batches import MODELS

NAMES = ("model", "layout", "frozen", "accumulation", "every", "buckets", "tied")


def sample(number: int, cells: list[AnyCell]) -> list[AnyCell]:
    """What the suite runs of a row: of a long one every second cell, and of one with further passes, whose cells are
    all alike, every fifth. benchmarks/parity.py runs all, and every step of all."""
    if cells[0].passes > 1:
        return cells[::5]
    return cells[number % 2 :: 2] if len(cells) == 16 else cells


SAMPLE = {row: sample(number, cells) for number, (row, cells) in enumerate(ROWS.items())}


@pytest.mark.slow
@pytest.mark.parametrize("row", SAMPLE)
def test_losses_norms_and_weights_are_those_of_one_dense_process(row, tmp_path):
    cells = SAMPLE[row]
    said = failures(compare(cells, tmp_path, sooner=True))
    assert not said, "\n".join([f"{len(said)} of {len(cells)} cells are too far off:", *said])


@pytest.mark.parametrize("zero", range(4))
def test_the_suite_meets_everything_under_each_stage_of_zero(zero):
    def met(cells):
        return {(cell.precision, name, getattr(cell, name)) for cell in cells for name in NAMES}

    rows = [str(topology) for topology in LEGAL if topology.zero == zero]
    assert met(cell for row in rows for cell in SAMPLE[row]) == met(cell for row in rows for cell in ROWS[row])


TP_DP = Topology(zero=1, tensor=2, pipe=1, data=2)


@pytest.mark.parametrize("sabotage", ["no mpu", "one rank's gradients", "no clipping"])
def test_the_matrix_would_see(sabotage, tmp_path):
    """Gradients that are averaged over tensor ranks too; a thousandth too much on half of the ranks; norms that are
    measured and not used."""
    cell = next(cell for cell in legal_cells(TP_DP) if cell.precision == "fp32" and cell.layout == "all")
    assert failures(compare([cell], tmp_path, sabotage, sooner=True))


def test_the_matrix_would_see_a_pass_without_gradient(tmp_path):
    cells = pass_cells(zero=2, passes=2)
    run = compare([cells[0], cells[-1]], tmp_path, "a pass without gradient", sooner=True)
    assert len(failures(run)) == 2


@pytest.mark.parametrize("topology", LEGAL, ids=str)
def test_each_topology_meets_everything_in_each_precision(topology):
    for precision in PRECISIONS[: 1 if topology.zero == 0 else 2]:
        cells = [cell for cell in legal_cells(topology) if cell.precision == precision]
        assert {cell.model for cell in cells} == set(MODELS)
        assert {cell.frozen for cell in cells} == set(TRAINABLE)
        assert {cell.accumulation for cell in cells} == {1, 4}
        assert {cell.every for cell in cells} == {0, 1, 2}
        assert {cell.buckets for cell in cells} == {"shipped", "small"}
        # Where the table has both gradients: of words that are read and of words that are to be guessed.
        assert {cell.model for cell in cells if cell.tied} == {"paper", "vlmo"}
        assert any(cell.tied and cell.layout != "images" and cell.frozen != "bottom" for cell in cells)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_what_is_not_in_the_matrix_is_refused_before_any_process_group(topology, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(topology.world))
    for cell in cells_of(topology):
        ds, why = str(cell.write_json(tmp_path)), why_illegal(cell)
        if why is None:
            assert stage_ds_config(ds, *cell.recipe())["train_batch_size"] == cell.recipe()[1].batch.total
            continue
        with pytest.raises(ValueError) as refused:
            stage_ds_config(ds, *cell.recipe())
        assert why in str(refused.value) and "\n" not in str(refused.value), str(cell)
        assert "use " in str(refused.value) or "set " in str(refused.value), "the way out"
    assert not dist.is_initialized()


def test_a_pipeline_runs_one_pass():
    recipe, stage = pass_cells(zero=1, passes=2)[0].recipe()
    piped = replace(stage, parallel=Parallel(pipe=2))
    with pytest.raises(ValueError, match=r"parallel\.pipe=2 does not go .*passes.*set parallel\.pipe=1"):
        replace(recipe, stages={"stage": piped})


REFUSED = {
    "ZeRO-0 x PP": (0, False, "parallel.pipe=2 with zero_optimization.stage=0 clips by a wrong gradient norm"),
    "ZeRO-2 x PP": (2, True, "parallel.pipe=2 does not go with zero_optimization.stage=2"),
    "ZeRO-3 x PP": (3, False, "parallel.pipe=2 does not go with zero_optimization.stage=3"),
    "ZeRO-0 in bf16": (0, True, "bf16 with zero_optimization.stage=0 keeps no fp32 master weights"),
}


@pytest.mark.slow
def test_a_user_meets_one_sentence(tmp_path):
    """There is no data and no first rank at the address: nothing is read and no group is made before it is said."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    for name, (stage, bf16, why) in REFUSED.items():
        ds = tmp_path / "ds.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}))
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        done = train_stage(tmp_path, tmp_path / "run", "fusion", "parallel.pipe=2", ds=ds, **launcher)
        assert done.returncode == 2, (name, done.stderr)
        assert done.stderr.count("\n") == 1 and f"error: {why}" in done.stderr.replace(f"{ds}: ", ""), (
            name,
            done.stderr,
        )
