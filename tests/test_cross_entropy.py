"""The loss of a head in chunks, against the one over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import cross_entropy
from pretrain.cross_entropy import linear_cross_entropy
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.parallel.test_skipping import Calls
from tests.step_batches import CONFIGS, EXPERTS, MASKED, PAPER
from tests.test_parity import OPTIM, micro_batch

ROWS, WIDTH, CLASSES = 23, 16, 50


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[torch.Tensor]:
    """rows, weight, bias, targets, weights; the third row has equal best classes."""
    made = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=made).to(dtype).requires_grad_()
        for shape in ((rows, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    with torch.no_grad():
        weight[9], bias[9] = weight[4], bias[4]
        x[2:3] = weight[4] * 3
    targets = torch.randint(CLASSES, (rows,), generator=made)
    targets[2:3] = 4
    return [x, weight, bias, targets, torch.rand(rows, generator=made) / 7]


def plain(x, weight, bias, targets, weights):
    logits = F.linear(x, weight, bias)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum(), losses, logits.argmax(-1)


def gradients(total: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a part of a loss, as an accumulation of four makes it."""
    return torch.autograd.grad(total / 4, [each for each in of if each.requires_grad])


@pytest.mark.parametrize("rows_of_a_chunk", [1, 5, ROWS, 1000])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (1, 2)], ids=str)
def test_losses_gradients_and_best_classes_are_those_of_whole_logits(monkeypatch, rows_of_a_chunk, dtype, near, frozen):
    monkeypatch.setattr(cross_entropy, "CHUNK", rows_of_a_chunk * CLASSES)
    given = inputs(dtype)
    for number in frozen:
        given[number].requires_grad_(False)
    got, want = linear_cross_entropy(*given, classes=CLASSES), plain(*given)
    torch.testing.assert_close(tuple(got), want, atol=1e-6, rtol=1e-6)
    assert got.best[2] == 4, "of equals the first"
    for mine, right in zip(gradients(got.total, *given[:3]), gradients(want[0], *given[:3]), strict=True):
        assert mine.dtype == dtype
        scale = float(right.abs().max())
        torch.testing.assert_close(mine / scale, right / scale, atol=near, rtol=0)


SMOOTHING, REAL = 0.3, CLASSES - 7  # the last classes are padding


def smooth(group=None) -> list[torch.Tensor]:
    """Total, losses and gradients of smoothed targets; with a group from this rank's half of the classes."""
    x, weight, bias, targets, weights = inputs()
    parts = 1 if group is None else 2
    mine = slice(0, CLASSES) if group is None else slice(dist.get_rank() * 25, dist.get_rank() * 25 + 25)
    given = [x, weight[mine].detach().requires_grad_(), bias[mine].detach().requires_grad_(), targets % REAL, weights]
    got = linear_cross_entropy(*given, classes=REAL, group=group, smoothing=SMOOTHING)
    assert parts * len(given[1]) == CLASSES
    return [got.total.detach(), got.losses, *torch.autograd.grad(got.total, given[:3])]


def smooth_on_ranks() -> list[torch.Tensor]:
    return smooth(dist.group.WORLD)


@pytest.mark.parametrize("rows_of_a_chunk", [5, 1000])
def test_smoothed_targets_are_those_of_torch_without_the_padding(monkeypatch, rows_of_a_chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK", rows_of_a_chunk * CLASSES)
    x, weight, bias, targets, weights = inputs()
    logits = F.linear(x, weight, bias)[:, :REAL]
    losses = F.cross_entropy(logits, targets % REAL, reduction="none", label_smoothing=SMOOTHING)
    total = (losses * weights).sum()
    want = [total, losses, *torch.autograd.grad(total, [x, weight, bias])]
    for mine, right in zip(smooth(), want, strict=True):
        torch.testing.assert_close(mine, right.detach(), atol=2e-6, rtol=2e-6)


def test_smoothed_targets_of_split_classes_are_those_of_whole_ones():
    (total, losses, rows, *first), (*_, weight, bias) = run_ranks(smooth_on_ranks, 2)
    parts = torch.cat([first[0], weight]), torch.cat([first[1], bias])
    for mine, right in zip([total, losses, rows, *parts], smooth(), strict=True):
        torch.testing.assert_close(mine, right, atol=2e-6, rtol=2e-6)


def test_no_rows_give_zero_gradients():
    given = inputs(rows=0)
    total = linear_cross_entropy(*given, classes=CLASSES).total
    assert total == 0 and all(not grad.any() for grad in gradients(total, *given[:3]))


def test_without_gradients_none_are_made():
    given = inputs()
    with torch.no_grad(), Largest() as seen:
        got = linear_cross_entropy(*given, classes=CLASSES)
    assert not got.total.requires_grad
    torch.testing.assert_close(got.total, plain(*given)[0].detach())
    assert seen.products == 1


@pytest.mark.parametrize("rows_of_a_chunk", [5, 1000])
def test_the_backward_pass_copies_no_gradient(monkeypatch, rows_of_a_chunk):
    """The weight's is as large as the weight."""
    monkeypatch.setattr(cross_entropy, "CHUNK", rows_of_a_chunk * CLASSES)
    given = inputs()
    total = linear_cross_entropy(*given, classes=CLASSES).total
    with New() as seen:
        (total / 4).backward(inputs=given[:3])
    assert seen.numbers < CLASSES, "less than the smallest gradient, the bias"


def test_a_second_backward_pass_is_refused():
    """The gradients of the first were changed in place."""
    given = inputs()
    total = linear_cross_entropy(*given, classes=CLASSES).total
    torch.autograd.grad(total, given[:3], retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(total, given[:3])


class New(TorchDispatchMode):
    """The most numbers in a tensor that was made, and is not its inputs' memory."""

    numbers = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = call(*args, **(kwargs or {}))
        new = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.data_ptr() not in given]
        self.numbers = max(self.numbers, *new, 0)
        return out


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        self.products += call.overloadpacket.__name__ in ("mm", "addmm")
        return out


def test_the_whole_logits_are_never_there_and_no_product_is_made_twice(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 4 * CLASSES)
    given = inputs(rows=400)
    with Largest() as seen:
        linear_cross_entropy(*given, classes=CLASSES).total.backward()
    assert seen.numbers == 400 * WIDTH, "the rows' own gradient; whole logits have 400 * 50"
    assert seen.products == 3 * 100


def gatherings(chunks: list[int]) -> list[int]:
    """Collectives by which ZeRO-3 fetches parameters in one micro-step, with so many logits at once."""
    from pretrain.optim import build_optimizer, schedule
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init

    config = load_ds_config(CONFIGS / "zero3.json", micro=6, accumulation=1, world=2, clip=1.0)
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    with partitioned_init(config):
        task = PretrainTask(PAPER, EXPERTS, (MASKED,))
    engine, counts = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, 9), config), []
    for chunk in chunks:
        cross_entropy.CHUNK = chunk
        for _ in range(2):  # the first traces
            with Calls() as calls:
                engine.backward(engine(micro_batch(1, dist.get_rank(), 2))["loss"])
            engine.step()
        counts.append(sum(count for name, count in calls.counts.items() if "gather" in name and name != "gather"))
    return counts


def test_zero_3_fetches_a_head_no_oftener_for_many_chunks_than_for_one():
    whole, chunks = run_ranks(gatherings, 2, [10**9, 64])[0]
    assert whole == chunks > 20
