"""The task over tensor ranks against the same task on one device: losses, gradients, and training under DeepSpeed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from pretrain import cross_entropy
from pretrain.batch import Layout, make_batch
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import build_optimizer, schedule
from pretrain.parallel.mesh import create_mesh, mpu_of
from pretrain.parallel.sizes import Parallel
from pretrain.parallel.tensor import parallel_layers
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.parallel.tensor_ranks import Case, check_gradients, check_reports, mean, tasks_of, two_tasks
from tests.step_batches import (
    CONFIGS,
    DROP,
    EXPERTS,
    MODELS,
    PAPER,
    TIED,
    Trained,
    mean_reports,
    train_alone,
    train_on_ranks,
)
from tests.test_parity import OPTIM, STEPS, micro_batch


def both_passes(cases: list[Case], tensor: int) -> None:
    """Every mix of kinds, with drop path, forward and backward; the heads' logits in chunks."""
    cross_entropy.CHUNK = 16 * MODELS["paper"].vocab_size // tensor
    for case in cases:
        dense, split, mesh = tasks_of(case, Parallel(tensor=tensor))
        # Steps 1 to 4 are all kinds, images, pairs and texts: the others' experts run on zero rows.
        for step, least in ((1, 0.9), (2, 0.3), (3, 0.5), (4, 0.3)):
            batch = micro_batch(step, 0, 1)
            got, wanted = split(batch), dense(batch)
            check_reports(got, wanted)
            got["loss"].backward()
            wanted["loss"].backward()
            moved = check_gradients(dense, split, mesh)
            assert moved >= least * len(list(split.parameters())), (case, step, moved)
            dense.zero_grad()
            split.zero_grad()


CASES: list[Case] = [
    ("paper", False, 0),
    ("paper", True, 2),
    ("released", False, 1),
    ("released", True, 0),
    ("vlmo", False, 2),
]


@pytest.mark.parametrize(("cases", "tensor"), [(CASES, 2), (CASES[-2:], 4)], ids=["two ranks", "four ranks"])
def test_every_model_gives_the_losses_and_gradients_of_one_device(cases, tensor):
    run_ranks(both_passes, tensor, cases, tensor)


def details() -> None:
    """What the models do not reach: rows far from zero, bf16, no rows at all, a frozen weight with a trainable bias."""
    mesh = create_mesh(Parallel(tensor=2))
    layers, made = parallel_layers(mesh), torch.Generator().manual_seed(0)
    mine = slice(12 * mesh.tensor.rank, 12 * mesh.tensor.rank + 12)
    # A sum of squares would be off by 0.1 at a thousand, where fp32 has steps of 6e-5.
    for shift, dtype, tolerance in ((1000.0, torch.float32, 2e-4), (3.0, torch.bfloat16, 8e-3)):
        x = (torch.randn(5, 24, generator=made) + shift).to(dtype)
        split, dense = layers.inner_norm(24, eps=1e-5).to(dtype), torch.nn.LayerNorm(24).to(dtype)
        torch.testing.assert_close(split(x[:, mine]), dense(x)[:, mine], atol=tolerance, rtol=tolerance)
    norm, column, row = layers.inner_norm(24), layers.column(8, 24), layers.row(24, 8)
    for parameter in (column.weight, row.weight):
        parameter.requires_grad_(False)
    x = torch.randn(5, 8, generator=made)
    row(norm(column(x))).sum().backward()
    assert column.weight.grad is None and row.weight.grad is None
    assert column.bias.grad.any() and torch.equal(row.bias.grad, torch.full((8,), 5.0))
    classifier = layers.classifier(8, 10)
    total, losses, best = classifier(row(norm(column(x[:0]))), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert losses.shape == best.shape == classifier.predict(x[:0]).shape == (0,)
    total.backward()
    assert all(not parameter.grad.any() for parameter in classifier.parameters())
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.zero_()
    assert not classifier.predict(x).any(), "of equals the first, as on one device"
    names = {"weight", "bias"}
    for layer in (norm, column, row, classifier):
        assert set(layer.state_dict()) == names
        layer.load_state_dict(layer.state_dict())


def test_layers_in_their_corners():
    run_ranks(details, 2)


DUAL = replace(PAPER, heads=4, fusion_layers=0)


def contrast(parallel: Parallel) -> None:
    """Each data rank scores its part of the pairs against all ranks' pairs."""
    dense, split, mesh = two_tasks(DUAL, (Contrastive(embed_dim=24),), parallel, ("vision", "language"))
    made = torch.Generator().manual_seed(6)
    images = torch.randint(256, (8, 3, 16, 16), generator=made, dtype=torch.uint8)
    texts = torch.randint(4, DUAL.vocab_size, (8, 10), generator=made)

    def pairs(part: int, parts: int):
        layout = Layout(images=8 // parts, texts=8 // parts, dual=8 // parts, patches=16, text_len=10)
        return make_batch(layout, images=images.chunk(parts)[part], text_tokens=texts.chunk(parts)[part])

    wanted, got = dense(pairs(0, 1)), split(pairs(mesh.data.rank, mesh.data.size))
    wanted["loss"].backward()
    got["loss"].backward()
    check_reports({name: mean(value, mesh) for name, value in got.items()}, wanted)
    for parameter in split.parameters():
        parameter.grad = mean(parameter.grad, mesh)
    assert check_gradients(dense, split, mesh) > 40


def test_contrast_is_over_data_ranks_and_not_over_tensor_ranks():
    run_ranks(contrast, 4, Parallel(tensor=2))


# Every part that a split touches, in one model.
ALL = replace(MODELS["vlmo"], sub_norm=True, layer_scale=0.5)
# AdamW multiplies the rounding of gradients that are almost zero; a small rate keeps it below the tolerance.
SLOW = replace(OPTIM, lr=5e-4)


def tied_task(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(ALL, EXPERTS, (TIED,), layers, drop_path=DROP)


def under_deepspeed(names: list[str], partitioned: bool, parallel: Parallel) -> list[Trained]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, init_distributed, partitioned_init

    init_distributed()
    mesh, runs = create_mesh(parallel), []
    for name in names:
        config = load_ds_config(CONFIGS / name, micro=6, accumulation=1, world=mesh.copies.size, clip=SLOW.clip)
        with partitioned_init(config, mpu_of(mesh)) if partitioned else nullcontext():
            task = tied_task(parallel_layers(mesh))
        engine = build_engine(task, build_optimizer(task, SLOW), schedule(SLOW, STEPS), config, mpu=mpu_of(mesh))
        runs.append(train_on_ranks(engine, mesh, micro_batch, STEPS))
    return runs


def check_training(names: list[str], partitioned: bool, parallel: Parallel) -> None:
    """Four ranks against one device: losses, clipped norms, weights."""
    reports, norms, state = train_alone(tied_task(), SLOW, [micro_batch(step, 0, 1) for step in range(1, STEPS + 1)])
    assert sum(norm > SLOW.clip for norm in norms) >= 3, "clipping must have been active"
    runs = run_ranks(under_deepspeed, 4, names, partitioned, parallel, timeout=200)
    for name, *ranks in zip(names, *runs, strict=True):
        loose = 3000 if "bf16" in name else 1
        assert all(run.norms == ranks[0].norms for run in ranks), "the ranks disagree about the norm"
        losses = [report["loss"] for report in mean_reports(ranks)]
        assert losses == pytest.approx([report["loss"] for report in reports], abs=1e-6 * loose), name
        assert ranks[0].norms == pytest.approx(norms, rel=3e-6 * loose), name
        weights = ranks[0].weights
        assert set(weights) == set(state)
        for key, value in weights.items():
            assert (value - state[key]).abs().max() <= 1e-6 * loose, (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "partitioned"), [((0, 1, 2, 3), False), ((3,), True)], ids=["built whole", "built in parts"]
)
def test_zero_over_tensor_and_data_ranks_trains_as_one_device_does(stages, partitioned):
    fp32, bf16 = [f"zero{stage}.json" for stage in stages], [f"zero{stage}_bf16.json" for stage in stages if stage]
    check_training(fp32 + bf16, partitioned, Parallel(tensor=2))
