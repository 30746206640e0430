"""Family B: a pipe stage's part of the task inside DeepSpeed's PipelineModule, and the step of all stages (1F1B).

By itself DeepSpeed would number layers and rename their parameters. Here each rank gives it one part, whose names are
those of the model on one device. The loss is computed inside the part's `forward` and not by a loss_fn: DeepSpeed
prepares its bf16 optimizer for a backward pass when the gradient reaches the output of `forward`, so that gradients
from behind it would be lost.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cache
from itertools import product
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.distributed import device, world_size
from pretrain.parallel.engine import build_engine, init_distributed
from pretrain.parallel.sizes import Parallel


class Part(Protocol):
    """What a stage runs: a module whose children and parameters have the names of the whole model."""

    stage: int
    stages: int
    # {name of a weight that several stages hold: these stages, in rising order}; the same on every rank.
    shared: dict[str, tuple[int, ...]]

    def __call__(self, arrived: Tensor | None, batch: Batch | None) -> Tensor | dict[str, Tensor]:
        """`arrived`: the output of the stage before, None on the first stage; `batch`: None except on the first and the
        last stage. -> one tensor, of the same shape in every micro-step; on the last stage named losses with `loss`."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def after_step(self) -> None:
        """Called after each step of the optimizer."""


def build_pipeline_engine(
    part: Part,
    parallel: Parallel,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    factor: Callable[[int], float],
    config: dict[str, Any],
):
    """`build_engine` for the `Part` of this rank's stage; a collective of every rank. Weights must be loaded into
    `part`, and frozen, before. `make_optimizer` gets DeepSpeed's module around the part, with the same parameter names.
    """
    init_distributed()
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    data = world_size() // parallel.model
    topology = PipeModelDataParallelTopology(num_pp=parallel.pipe, num_mp=parallel.tensor, num_dp=data)
    with redirect_stdout(io.StringIO()):  # it prints seeds and topology
        module = _stage_module()(part, topology)
    optimizer = make_optimizer(module)
    # DeepSpeed sums the norms over the stages for each parameter group: if one stage had more groups than another, all
    # would wait for ever.
    groups = torch.tensor(len(optimizer.param_groups), device=device())
    dist.all_reduce(groups, op=dist.ReduceOp.MAX)
    for _ in range(int(groups) - len(optimizer.param_groups)):
        optimizer.add_param_group({"params": [module.add_idle()], "weight_decay": 0.0})
    return build_engine(module, optimizer, factor, config)


def pipeline_step(
    engine, micro_batches: Sequence[Batch], add_targets: Callable[[Batch], Batch] = lambda batch: batch
) -> dict[str, Tensor]:
    """One optimizer step -> the means over the micro-steps of the task's report, the same on every stage.

    The first and the last stage need the same `micro_batches`, `gradient_accumulation_steps` of them; other stages may
    pass none. `add_targets` is called on the last stage only.
    """
    module = engine.module
    if module.ends:
        assert len(micro_batches) == engine.micro_batches, (len(micro_batches), engine.micro_batches)
    engine.train_batch(module.feed(micro_batches, add_targets))
    module.forward_funcs[0].after_step()
    return _mean_report(module)


@cache
def _stage_module() -> Callable[[Part, Any], Any]:
    """The class of a stage's module, made at first use so that deepspeed is imported only where it is needed."""
    from deepspeed.runtime.pipe.module import PipelineModule

    class StageModule(PipelineModule):
        """One stage. Its parameters have the names of the whole model. loss_fn is None, so that the output of `forward`
        on the last stage is the loss."""

        def __init__(self, part: Part, topology: Any):
            super().__init__([part] * part.stages, topology=topology)
            assert self.stage_id == part.stage, (self.stage_id, part.stage)
            self.forward_funcs = [part]  # DeepSpeed's name for a stage's layers
            self.ends = part.stage in (0, part.stages - 1)  # the stages that need batches
            self._batches: deque[Batch] = deque()
            self.reports: list[dict[str, Tensor]] = []  # on the last stage: one for each micro-step of this step
            self.report_names: list[str] = []  # known on every stage after the first step
            for name, child in part.named_children():
                self.add_module(name, child)
            self._shared = _shared_weights(self, part, self._grid)
            self.idle = nn.ParameterList()  # zeros that stay zero, where DeepSpeed needs a trainable parameter
            self.frozen = not any(value.requires_grad for value in self.parameters())
            if self.frozen:
                self.add_idle()
            self.register_state_dict_post_hook(_without_idle)

        def add_idle(self) -> nn.Parameter:
            self.idle.append(nn.Parameter(torch.zeros(1)))
            return self.idle[-1]

        def _partition_layers(self, method: str = "") -> None:
            self.parts = list(range(self.num_stages + 1))
            self._set_bounds(self.stage_id, self.stage_id + 1)

        def _build(self) -> None:
            """The part is built already."""

        def forward(self, arrived: Tensor) -> Tensor:
            (part,) = self.forward_funcs
            # On the first and the last stage DeepSpeed calls `feed`'s iterator right before each forward pass.
            batch = self._batches.popleft() if self.ends else None
            out = part(None if part.stage == 0 else arrived, batch)
            if isinstance(out, dict):
                self.reports.append({name: value.detach() for name, value in out.items()})
                out = out["loss"]
            # DeepSpeed starts a backward pass in any case, which an output without trainable parameters would not have.
            return out + 0 * self.idle[0].to(out.dtype).squeeze() if self.frozen else out

        def feed(self, batches: Sequence[Batch], add_targets: Callable[[Batch], Batch]) -> Iterator:
            """The iterator for DeepSpeed, which expects pairs of tensors; `forward` takes the batches from a queue."""
            for batch in batches if self.ends else ():
                self._batches.append(add_targets(batch) if self.stage_id == self.num_stages - 1 else batch)
                yield torch.zeros(1), torch.zeros(1)

        def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
            """The weights whose gradients DeepSpeed sums over stages before it averages them over the data ranks."""
            return self._shared

    return StageModule


def _mean_report(module: Any) -> dict[str, Tensor]:
    """The mean of the last stage's reports, which it sends to all stages of its pipeline."""
    grid = module.mpu()
    group, source = grid.get_pipe_parallel_group(), grid.stage_to_global(module.num_stages - 1)
    reports, module.reports = module.reports, []
    if not module.report_names:
        names: list[Any] = [list(reports[0]) if reports else None]
        dist.broadcast_object_list(names, source, group=group)
        (module.report_names,) = names
    values = torch.zeros(len(module.report_names), device=device())
    for report in reports:
        values += torch.stack([report[name].float().reshape(()) for name in module.report_names]) / len(reports)
    dist.broadcast(values, source, group=group)
    return dict(zip(module.report_names, values, strict=True))


def _without_idle(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A hook that leaves `idle` out of the state_dict."""
    for name in [name for name in state if name.startswith(f"{prefix}idle.")]:
        del state[name]


def _shared_weights(module: nn.Module, part: Part, grid: Any) -> list[tuple[nn.Parameter, Any]]:
    """This stage's trainable weights that other stages hold too, each with the process group of the ranks that hold
    it."""
    weights: dict[str, nn.Parameter] = dict(module.named_parameters())
    shared: list[tuple[nn.Parameter, Any]] = []
    for name, stages in sorted(part.shared.items()):
        for data, model in product(range(grid.data_parallel_size), range(grid.model_parallel_size)):
            ranks = [grid.stage_to_global(stage, data=data, model=model) for stage in stages]
            group = dist.new_group(ranks)  # a collective of every rank
            if dist.get_rank() in ranks:
                # Only the first of these stages counts it in the gradient norm.
                weights[name].ds_pipe_replicated = part.stage != stages[0]
                if weights[name].requires_grad:
                    shared.append((weights[name], group))
    return shared
