"""The task of a stage that trains an encoder by its objectives: a batch goes in, named losses come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, Objective, Pass, Task
from pretrain.flops import Product, executed_product, product_flops
from pretrain.layers import PLAIN, Layers
from pretrain.models.lora import add_adapters
from pretrain.tasks.balance import GRADIENT, LossWeights, Weights, watched, weight_problems


@dataclass(frozen=True)
class Pretrain(Task):
    """Train one encoder on the weighted sum of the stage's objectives. `weights`: the weight of a loss, a number or a
    Ramp, by its objective's name; 1 for objectives that it does not name. `learned`: each is also multiplied by a
    learned factor, from the loss's uncertainty (see balance.py)."""

    weights: dict[str, Any] = field(default_factory=dict)
    learned: bool = False

    def problems(self, model: Model, stage: Any) -> list[str]:
        problems = [] if stage.objectives else ["the stage has no objectives; give at least one"]
        if not model.encodes:
            problems.append(f"task=Pretrain does not go with a {type(model).__name__}; give the stage its own task")
        problems += model.problems(stage)
        names = [objective.name for objective in stage.objectives]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"objectives: {twice[0]} stands there twice; keep one, or give one of them another name")
        problems += weight_problems(self.weights, names)
        if stage.parallel.pipe > 1 and (self.weights or self.learned):
            problems.append(f"parallel.pipe={stage.parallel.pipe} does not go with task.weights; set parallel.pipe=1")
        if stage.parallel.pipe > 1 and any(objective.passes(Layout()) for objective in stage.objectives):
            problems.append(
                f"parallel.pipe={stage.parallel.pipe} does not go with an objective that asks for further passes "
                "through the encoder; set parallel.pipe=1"
            )
        return problems

    def build(self, model: Model, stage: Any, layers: Layers, read: Any) -> PretrainTask:
        options: dict[str, Any] = {"drop_path": stage.drop_path, "checkpointing": int(stage.activation_checkpointing)}
        options |= {"weights": self.weights, "learned": self.learned}
        task = PretrainTask(model, stage.experts, stage.objectives, layers, **options)
        if stage.lora is not None:
            add_adapters(task.encoder, stage.lora)
        for objective in stage.objectives if read is not None else ():
            objective.read(task.objectives[objective.name], read)
        return task

    def flops(self, model: Model, stage: Any, layout: Layout) -> float:
        total = float(product_flops(head_products(stage.objectives, layout, model)))
        shared = shares_pictures(model, stage.objectives)
        for each in all_passes(stage.objectives, layout):
            own = sum(sign * model.flops(part) for sign, part in pass_layouts(each, shared=shared))
            total += own * (1 if each.backward else 1 / 3)
        return total

    def executed_flops(self, model: Model, stage: Any, layout: Layout, trained: frozenset[str]) -> float:
        prefix = "encoder."
        encoder = frozenset(name.removeprefix(prefix) for name in trained if name.startswith(prefix))
        total, read = 0.0, 0.0
        shared = shares_pictures(model, stage.objectives)
        for objective in stage.objectives:
            own = any(name.startswith(f"objectives.{objective.name}.") for name in trained)
            for product in objective.products(layout, model):
                total += executed_product(product, weight=own, inputs=bool(encoder))
                read += product.rows
            for further in objective.passes(layout):
                names = encoder if further.backward else frozenset()
                for sign, part in pass_layouts(further, shared=shared):
                    total += sign * model.executed_flops(part, stage.experts, part.rows, names)
        first = any(objective.first_pass for objective in stage.objectives)
        return total + (model.executed_flops(layout, stage.experts, read, encoder) if first else 0)

    def reads(self) -> dict[str, str]:
        return {}


def all_passes(objectives: Sequence[Objective], layout: Layout) -> list[Pass]:
    """All passes through the encoder for a micro-batch of this layout: over the batch itself, if an objective reads
    that, and the further ones that objectives ask for."""
    first = [Pass(layout)] if any(objective.first_pass for objective in objectives) else []
    return first + [further for objective in objectives for further in objective.passes(layout)]


def shares_pictures(model: Model, objectives: Sequence[Objective]) -> bool:
    """Whether further passes reuse the rows of dual pairs' pictures from the first pass, which is right if no patch of
    them was hidden. Losses and gradients equal, to rounding, those of encoding the pictures again."""
    first = any(objective.first_pass for objective in objectives)
    hidden = any(each.masking is not None and each.masking.ratios("dual")[0] for each in objectives)
    return first and not hidden and model.shares_pictures


def pass_layouts(each: Pass, *, shared: bool) -> list[tuple[int, Layout]]:
    """What a pass computes, as a sum of (sign, layout): its own layout minus, if `shared`, the pictures that were
    encoded before."""
    known = [(-1, Layout(images=each.again, patches=each.layout.patches))] if shared and each.again else []
    return [(1, each.layout), *known]


def head_products(objectives: Sequence[Objective], layout: Layout, model: Model) -> list[Product]:
    """The matrix products of all heads, for FLOPs and the plan."""
    return [product for objective in objectives for product in objective.products(layout, model)]


def layer_of(model: Model) -> Callable[[str], int]:
    """For layer decay: a function from the name of a PretrainTask's parameter to its layer; heads are at the top."""
    prefix = "encoder."
    return lambda name: model.layer_of(name.removeprefix(prefix)) if name.startswith(prefix) else model.layers


class PretrainTask(nn.Module):
    """The encoder and the heads of a stage's objectives. `drop_path` and `checkpointing` are the encoder's, `weights`
    and `learned` as Pretrain's."""

    watches = True  # measures each objective's gradient, where there are several

    def __init__(
        self,
        model: Model,
        experts: Sequence[str],
        objectives: Sequence[Objective],
        layers: Layers = PLAIN,
        *,
        drop_path: float = 0.0,
        checkpointing: int = 0,
        weights: Weights = MappingProxyType({}),
        learned: bool = False,
    ):
        super().__init__()
        names = [objective.name for objective in objectives]
        self.loss_weights = LossWeights(names, weights, learned=learned) if weights or learned else None
        self.encoder: Any = model.build(experts, layers, drop_path=drop_path, checkpointing=checkpointing)
        tokens = getattr(self.encoder, "token_table", None)
        self.objectives = nn.ModuleDict(
            {objective.name: objective.build(model, experts, layers, tokens) for objective in objectives}
        )
        self._configs, self._shares = tuple(objectives), shares_pictures(model, objectives)
        heads: dict[str, nn.Module] = {"encoder": self.encoder, **dict(self.objectives.items())}
        for objective in objectives:
            objective.join(heads[objective.name], heads)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> `loss` (the weighted sum of the objectives'), and what each objective reports, all scalars. The backward
        pass fills in `gradient/NAME`, the squared norm of an objective's gradient at the encoder's outputs."""
        batch = batch.indexed()
        if not any(objective.first_pass for objective in self._configs):
            return self.score(Kinds.rows_of(batch.layout, batch.images.device), batch)  # a stand-in that no head reads
        # On the host: counting the rows that are read would wait for the device.
        return self.score(self.encoder(batch, needed=self.needed_rows(batch.on_host)), batch)

    def score(self, encoded: Kinds, batch: Batch) -> dict[str, Tensor]:
        """The result of `forward`, from the rows of the first pass."""
        losses: dict[str, Tensor] = {}
        report: dict[str, Tensor] = {}
        several = len(self.objectives) > 1
        for name, head in self.objectives.items():
            rows, encode = encoded, partial(self._encode, first=encoded)
            if several and self.watches and self.training and torch.is_grad_enabled():
                square = report[f"{GRADIENT}{name}"] = torch.zeros((), device=batch.images.device)
                rows, encode = watched(encoded, square), partial(self._encode, first=encoded, square=square)
            own = head(rows, batch, encode)
            losses[name] = own.pop("loss")
            report |= own
        if several:  # a single objective's loss is `loss` already
            report |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        if self.loss_weights is not None:
            losses, weights = self.loss_weights(losses)
            report |= weights
        return {"loss": torch.stack(list(losses.values())).sum(), **report}

    def _encode(
        self, batch: Batch, needed: Kinds | None = None, *, first: Kinds, square: Tensor | None = None
    ) -> Kinds:
        """A further pass, which reuses pictures' rows of the `first` one where it may; with `square`, see `watched`."""
        known = batch.again is not None and self._shares
        own = {"pictures": first.images.index_select(0, batch.again)} if known else {}
        rows = self.encoder(batch, needed=needed, **own)
        return rows if square is None else watched(rows, square)

    def needed_rows(self, batch: Batch) -> Kinds:
        """bool [n, length] per kind: the rows that any of the objectives reads."""
        needed: list[Any] = [head.needed_rows(batch) for head in self._heads()]
        return Kinds(*(torch.stack(kind).any(0) for kind in zip(*needed, strict=True)))

    def before_training(self, batches: list[Batch]) -> None:
        """See Objective.begin."""
        if self.loss_weights is not None:
            self.loss_weights.begin()
        for objective in self._configs:
            objective.begin(self.objectives[objective.name])

    def after_step(self) -> None:
        for head in self._heads():
            head.after_step()
        if self.loss_weights is not None:
            self.loss_weights.after_step()

    def _heads(self) -> list[Any]:
        return list(self.objectives.values())
