"""What the tests of tensor parallelism run on each rank: a task on one device beside the same task on a mesh."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.layers import Layers
from pretrain.parallel.mesh import Mesh, create_mesh
from pretrain.parallel.sizes import Parallel
from pretrain.parallel.tensor import parallel_layers
from pretrain.tasks.pretrain import PretrainTask
from tests.step_batches import DROP, EXPERTS, MASKED, MODELS, TIED

ONE_DEVICE = Layers(gather=lambda rows: (rows, 0))  # the default would gather from the ranks of the test
# (model, tied text head, checkpointing)
Case = tuple[str, bool, int]


def tasks_of(case: Case, parallel: Parallel) -> tuple[PretrainTask, PretrainTask, Mesh]:
    """`two_tasks` of a case, with as many heads as four ranks divide."""
    name, tied, checkpointing = case
    model = replace(MODELS[name], heads=4)
    return two_tasks(model, (TIED if tied else MASKED,), parallel, drop_path=DROP, checkpointing=checkpointing)


def two_tasks(
    model, objectives, parallel: Parallel, experts=EXPERTS, **options
) -> tuple[PretrainTask, PretrainTask, Mesh]:
    """The task on one device and on the mesh, from one seed. Asserts that they begin with the same numbers; then moves
    both away from where biases are zero and norms one."""
    mesh = create_mesh(parallel)
    torch.manual_seed(3)
    dense = PretrainTask(model, experts, objectives, ONE_DEVICE, **options)
    torch.manual_seed(3)
    split = PretrainTask(model, experts, objectives, parallel_layers(mesh), **options)
    assert set(split.state_dict()) == set(dense.state_dict()), set(split.state_dict()) ^ set(dense.state_dict())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    PretrainTask(model, experts, objectives)
    assert torch.equal(drawn, torch.rand(1)), "another number of draws"
    torch.manual_seed(4)
    wholes = dict(dense.named_parameters())
    for name, parameter in split.named_parameters():
        assert torch.equal(own_part(parameter, wholes[name], mesh), parameter), f"{name} begins elsewhere"
        with torch.no_grad():
            wholes[name].add_(0.1 * torch.randn_like(wholes[name]))
            parameter.copy_(own_part(parameter, wholes[name], mesh))
    return dense, split, mesh


def own_part(parameter: nn.Parameter, whole: Tensor, mesh: Mesh) -> Tensor:
    """Of a whole tensor, what this rank holds of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        assert parameter.shape == whole.shape, (parameter.shape, whole.shape)
        return whole
    return whole.chunk(mesh.tensor.size, parameter.partition_dim)[mesh.tensor.rank]


def check_gradients(dense: nn.Module, split: nn.Module, mesh: Mesh, atol: float = 1e-6) -> int:
    """Asserts that each gradient is its part of the one on one device, and what is not split has the very same bits on
    all tensor ranks. Returns the number of gradients that are not zero."""
    wholes, moved = {name: p.grad for name, p in dense.named_parameters()}, 0
    for name, parameter in split.named_parameters():
        whole, grad = wholes[name], parameter.grad
        assert whole is not None and grad is not None, name
        torch.testing.assert_close(
            grad, own_part(parameter, whole, mesh), atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        if not getattr(parameter, "tensor_model_parallel", False):
            first = grad.clone()
            dist.broadcast(first, dist.get_global_rank(mesh.tensor.group, 0), group=mesh.tensor.group)
            assert torch.equal(first, grad), f"{name}: other bits than on the first tensor rank"
        moved += int(grad.abs().max() > 1e-5)
    return moved


def check_reports(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert list(got) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def mean(value: Tensor, mesh: Mesh) -> Tensor:
    """Over the ranks that hold the same weights, as DeepSpeed takes it of gradients."""
    value = value.detach().clone()
    dist.all_reduce(value, group=mesh.copies.group)
    return value / mesh.copies.size
