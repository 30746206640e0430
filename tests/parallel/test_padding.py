"""A vocabulary that is padded in memory: the same numbers as one that is not, and nothing of it in files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain import cross_entropy, layers
from pretrain.checkpoint.weights import load_handover, write_weights
from pretrain.layers import Classifier, Vocabulary, padded
from pretrain.optim import build_optimizer, schedule
from pretrain.parallel.mesh import create_mesh, mpu_of
from pretrain.parallel.sizes import Parallel
from pretrain.parallel.state import full_state
from pretrain.parallel.tensor import parallel_layers
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, EXPERTS, MASKED, PAPER, TIED
from tests.test_parity import OPTIM, micro_batch

NEVER, ALWAYS = 4096, 1  # layers.SMALL
Run = tuple[str, Parallel, int]  # DeepSpeed JSON, sizes, layers.SMALL


def test_a_large_vocabulary_has_a_multiple_of_128_rows_and_a_small_one_its_own():
    assert [padded(size) for size in (16, 4095, 4096, 4097, 64010)] == [16, 4095, 4096, 4224, 64128]


@pytest.mark.parametrize("kind", [Vocabulary, lambda size, dim: Classifier(dim, size)], ids=["embedding", "head"])
def test_the_first_rows_are_those_of_a_vocabulary_without_padding(monkeypatch, kind):
    modules, after = [], []
    for small in (NEVER, ALWAYS):
        monkeypatch.setattr(layers, "SMALL", small)
        torch.manual_seed(0)
        modules.append(kind(50, 8))
        after.append(torch.rand(1))
    plain, more = (module.weight.detach() for module in modules)
    assert more.shape == (128, 8) and torch.equal(more[:50], plain) and not more[50:].any()
    assert torch.equal(*after), "another number of draws"


def test_padding_has_no_probability_no_gradient_and_is_never_predicted(monkeypatch):
    made, results = torch.Generator().manual_seed(0), []
    x, targets, weights = torch.randn(9, 8, generator=made), torch.arange(9), torch.rand(9, generator=made)
    monkeypatch.setattr(cross_entropy, "CHUNK", 300)
    for small in (NEVER, ALWAYS):
        monkeypatch.setattr(layers, "SMALL", small)
        torch.manual_seed(0)
        head = Classifier(8, 50)
        with torch.no_grad():
            head.bias[50:] = 1e3
        scored = head(x, targets, weights)
        scored.total.backward()
        assert head.logits(x).shape == (9, 50) and head.predict(x).max() < 50
        assert not head.weight.grad[50:].any() and not head.bias.grad[50:].any()
        results.append((*(value.detach() for value in scored), head.weight.grad[:50], head.bias.grad[:50]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


def test_files_hold_the_real_rows_and_those_without_padding_are_read(monkeypatch, tmp_path):
    """As evaluation reads the released weights, and those of runs from before there was padding."""
    tasks = []
    for small in (NEVER, ALWAYS):
        monkeypatch.setattr(layers, "SMALL", small)
        torch.manual_seed(small)
        tasks.append(PretrainTask(PAPER, EXPERTS, (MASKED,)))
    plain, more = tasks
    write_weights(plain.state_dict(), tmp_path / "plain.safetensors", {})
    assert not load_handover(more, tmp_path / "plain.safetensors").adapted
    state = full_state(SimpleNamespace(module=more.requires_grad_(False)))
    torch.testing.assert_close(state, dict(plain.state_dict()), atol=0, rtol=0)
    batch = micro_batch(1, 0, 1)
    torch.testing.assert_close(more(batch), plain(batch), atol=1e-6, rtol=1e-6)


def _engine(ds: str, parallel: Parallel, small: int, tied: bool):
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, init_distributed, partitioned_init

    layers.SMALL = small
    init_distributed()
    mesh = create_mesh(parallel)
    config = load_ds_config(CONFIGS / ds, micro=6, accumulation=1, world=mesh.copies.size, clip=OPTIM.clip)
    torch.manual_seed(0)
    with partitioned_init(config, mpu_of(mesh)):
        task = PretrainTask(PAPER, EXPERTS, (TIED if tied else MASKED,), parallel_layers(mesh))
    return (
        task,
        mesh,
        lambda: build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, 4), config, mpu=mpu_of(mesh)),
    )


def _train(engine, mesh, steps: range) -> None:
    for step in steps:
        engine.backward(engine(micro_batch(step, mesh.data.rank, mesh.data.size))["loss"])
        engine.step()


def saved(place: Path, run: Run, tied: bool) -> None:
    """Two steps, and what a checkpoint holds of them."""
    from pretrain.distributed import rank
    from pretrain.parallel.moments import own_moments, write_moments

    _, mesh, build = _engine(*run, tied)
    engine = build()
    _train(engine, mesh, range(1, 3))
    with open(place / f"{rank()}.safetensors", "wb") as file:
        write_moments(own_moments(engine, mesh), file)
    if state := full_state(engine, mesh):
        torch.save(state, place / "state")


def resumed(place: Path, run: Run, tied: bool) -> dict:
    """Two more steps from there -> the weights, on rank 0."""
    from pretrain.parallel.engine import set_progress
    from pretrain.parallel.moments import read_moments
    from pretrain.parallel.state import fill, named_state

    task, mesh, build = _engine(*run, tied)
    state = torch.load(place / "state")
    for name, value in named_state(task).items():
        fill(value, state[name], mesh)
    engine = build()
    set_progress(engine, 2)
    read_moments(engine, mesh, sorted(place.glob("*.safetensors")))
    _train(engine, mesh, range(3, 5))
    return full_state(engine, mesh)


DATA, TENSOR = Parallel(), Parallel(tensor=2)
RUNS: list[list[Run]] = [
    [("zero1.json", DATA, NEVER), ("zero1.json", DATA, ALWAYS), ("zero0.json", TENSOR, ALWAYS)],
    [("zero1.json", TENSOR, NEVER), ("zero2.json", TENSOR, ALWAYS), ("zero3.json", DATA, ALWAYS)],
    [("zero3.json", DATA, ALWAYS), ("zero3.json", DATA, NEVER), ("zero1.json", TENSOR, ALWAYS)],
    [("zero1.json", TENSOR, ALWAYS), ("zero1.json", DATA, ALWAYS), ("zero0.json", TENSOR, NEVER)],
]


@pytest.mark.parametrize(("runs", "tied"), [*zip(RUNS, (True, False, True, False), strict=True)])
def test_a_run_goes_on_with_padding_and_without_under_any_layout(tmp_path, runs, tied):
    run_ranks(saved, 2, tmp_path, runs[0], tied)
    first, *others = (run_ranks(resumed, 2, tmp_path, run, tied)[0] for run in runs)
    assert first["encoder.text_embed.tokens.weight"].shape == (32, 32)
    for other in others:
        assert set(other) == set(first)
        torch.testing.assert_close(other, first, atol=2e-6, rtol=0)
