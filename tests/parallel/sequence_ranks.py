"""What the tests of sequence parallelism run on each rank: tasks that share the rows of a pass, beside one device's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch, Layout, make_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.parallel.mesh import Axis
from pretrain.parallel.sequence import Cut, attend_by_heads, share_pass
from pretrain.parallel.sizes import Parallel
from tests.parallel.tensor_ranks import Case, check_gradients, check_reports, mean, tasks_of
from tests.step_batches import EXPERTS, MASKED, step_batch

# Images, pairs and texts of one data rank: 17, 8 and 10 rows each, so that shares differ by a row here and there; where
# a kind is missing its expert has no rows on any rank.
MIXES = ((1, 1, 1), (3, 0, 0), (0, 1, 0), (0, 0, 2), (2, 0, 3))


def passes(cases: list[Case], parallel: Parallel) -> None:
    """Every mix of kinds, and causal pairs: the reports, the gradients, and the rows that come out."""
    for case in cases:
        dense, shared, mesh = tasks_of(case, parallel)
        for step, mix in enumerate((*MIXES, "causal")):
            batches = [_batch(mix, step, part, mesh.data.size) for part in (None, mesh.data.rank)]
            got, wanted = shared(batches[1]), dense(batches[0])
            if mesh.data.size == 1:
                check_reports(got, wanted)
            check_reports({"loss": mean(got["loss"], mesh)}, {"loss": wanted["loss"].detach()})
            got["loss"].backward()
            wanted["loss"].backward()
            for parameter in shared.parameters():
                parameter.grad = mean(parameter.grad, mesh)
            moved = check_gradients(dense, shared, mesh)
            assert moved >= 0.25 * len(list(shared.parameters())), (case, mix, moved)
            dense.zero_grad()
            shared.zero_grad()
            with torch.no_grad():
                rows = (task.encoder.rows(batches[1]) for task in (shared, dense))
                torch.testing.assert_close(*rows, atol=3e-6, rtol=1e-5)


def _batch(mix: Any, step: int, part: int | None, parts: int) -> Batch:
    """A data rank's part of the global batch; None: all of it."""
    images, pairs, texts = (0, 1, 0) if mix == "causal" else mix
    whole = (images * parts, pairs * parts, texts * parts)
    batch = step_batch(whole, step + 1, part or 0, 1 if part is None else parts)
    return dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, causal=mix == "causal"))


def both_sides_of_an_exchange() -> None:
    """What attention sees, and <exchange(x), y> = <x, backward(y)> summed over the ranks; one rank has no rows."""
    mesh_axis = Axis(None, dist.get_rank(), dist.get_world_size())
    layout = Layout(texts=1, text_len=2)
    cut = Cut.of(layout, mesh_axis, torch.device("cpu"))
    assert cut.sizes == [0, 1, 1]
    made = torch.Generator().manual_seed(1)
    whole = [torch.randn(2, 6, 5, generator=made) for _ in range(4)]  # [rows, heads, C]
    mine = slice(2 * mesh_axis.rank, 2 * mesh_axis.rank + 2)
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, of: Layout) -> Tensor:
        assert of is layout
        seen.extend([q, k, v])
        return q + 2 * k + 3 * v

    own = [x[cut.own.places].requires_grad_() for x in whole[:3]]
    out = attend_by_heads(attend, *own, layout, sequence=mesh_axis)
    for got, x in zip(seen, whole, strict=False):
        assert torch.equal(got, x[:, mine])
    torch.testing.assert_close(out, (whole[0] + 2 * whole[1] + 3 * whole[2])[cut.own.places])
    out.backward(whole[3][cut.own.places])
    for factor, x in enumerate(own, 1):
        torch.testing.assert_close(x.grad, factor * whole[3][cut.own.places])
    # Rows that two heads read: what each rank's loss says adds up.
    needed = torch.tensor([False, True])
    batch = make_batch(layout, text_tokens=torch.full((1, 2), 7))
    share = share_pass(batch.indexed(), needed, sequence=mesh_axis)
    assert share.own is not None and share.read is not None
    ends = whole[0][:, 0][cut.own.places][share.read.places].requires_grad_()
    joined = share.join(ends)
    assert torch.equal(joined, whole[0][:, 0] * needed[:, None])
    joined.backward(torch.full((2, 5), 1.0 + mesh_axis.rank))
    assert torch.equal(ends.grad, torch.full_like(ends, 6.0))


def kept_for_backward(sequence: int, model: MultiwayConfig, batch: Batch) -> tuple[int, int]:
    """Bytes of activations that autograd keeps for the blocks, and for what stands before and behind them."""
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.tensor import parallel_layers
    from pretrain.tasks.pretrain import PretrainTask

    mesh = create_mesh(Parallel(sequence=sequence))
    task = PretrainTask(model, EXPERTS, (MASKED,), parallel_layers(mesh))
    weights = {value.untyped_storage().data_ptr() for value in task.parameters()}
    saved: dict[str, dict[int, int]] = {"blocks": {}, "besides": {}}
    where = ["besides"]

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights and not any(storage.data_ptr() in known for known in saved.values()):
            saved[where[0]][storage.data_ptr()] = storage.nbytes()
        return value

    for block in task.encoder.blocks:
        block.register_forward_pre_hook(lambda *_: where.__setitem__(0, "blocks"))
        block.register_forward_hook(lambda *_: where.__setitem__(0, "besides"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = task(batch)["loss"]  # holds what is saved, so that no address comes twice
    assert loss.requires_grad
    return sum(saved["blocks"].values()), sum(saved["besides"].values())
