"""Self-distillation of pictures: crops learn to predict a momentum teacher's output for the whole picture, and hidden
patches its output there. These are SILC's local-to-global loss (arXiv 2310.13355) and SigLIP 2's masked prediction
(arXiv 2502.14786, 2.3), with DINO's head and centred targets (arXiv 2104.14294).

Shapes: N pictures of a micro-batch, V local views of each, P patches, m of them hidden, D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import DROP_PATH, Batch, Kinds, Layout, derived, make_batch
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head, Layers
from pretrain.objectives.teacher import NO_ADAPTERS, KeepsTypes, Teacher
from pretrain.rows import sent

ASPECT = (3 / 4, 4 / 3)  # of a local view, as RandomResizedCrop's
DRAWS_PER_VIEW = 4  # for its area, its aspect ratio, and its place in both directions


@dataclass(frozen=True)
class SelfDistillation(Objective):
    """For pictures that stand alone: images, and those of dual pairs. The teacher sees them whole. The student sees
    `views` local views of each, which are crops of `area` of the picture resized to its full size, and the picture with
    the share `masked_ratio` of its patches hidden.

    From SigLIP 2: 8 views, half of the patches, weights of 1 and `masked_weight`; there in the last fifth of training,
    which is a stage of its own here. From SILC: views of 5 to 40 % of the picture, a momentum that does not rise. From
    DINO: the head's sizes and the temperatures.

    The student's pass has V + 1 times the pictures' rows, and (V + m) N rows of K logits are held."""

    views: int = 8
    area: tuple[float, float] = (0.05, 0.4)
    masked_ratio: float = 0.5
    masked_weight: float = 0.25  # 0: local views alone, for towers that return one row for each picture
    momentum: float = 0.996  # of the teacher's weights, as MomentumContrast's: the value with which DINO begins
    prototypes: int = 65_536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    temperature: float = 0.1  # of the student
    teacher_temperature: float = 0.04
    center_momentum: float = 0.9
    name = "self_distillation"
    first_pass = False

    def __post_init__(self) -> None:
        for name in ("views", "prototypes", "hidden_dim", "bottleneck_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"self_distillation.{name}={getattr(self, name)} is below 1; use 1 or more")
        for name in ("momentum", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"self_distillation.{name}={getattr(self, name)} is no share; use 0 to 1")
        for name in ("temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"self_distillation.{name}={getattr(self, name)} must be above 0; use 0.04 to 0.1")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"self_distillation.area={self.area} are no two rising shares; use (0.05, 0.4)")
        if not 0 < self.masked_ratio < 1 or self.masked_weight < 0:
            raise ValueError(
                f"self_distillation.masked_ratio={self.masked_ratio}, masked_weight={self.masked_weight}: use a share "
                "between 0 and 1 and a weight of 0 or more"
            )

    @property
    def draws(self) -> int:
        return DRAWS_PER_VIEW * self.views + 1  # the last one chooses the hidden patches

    def hidden(self, patches: int) -> int:
        """How many of a picture's patches are hidden."""
        return min(max(round(self.masked_ratio * patches), 1), patches) if self.masked_weight else 0

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> SelfDistillationHead:
        return SelfDistillationHead(self, model, experts, layers)

    def join(self, head: Any, heads: Mapping[str, nn.Module]) -> None:
        head.student = (heads["encoder"],)

    def begin(self, head: Any) -> None:
        head.follow(1.0)

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if not {"images", "dual"} & set(stage.mix) or "vision" not in stage.experts:
            problems.append(
                f"self_distillation reads pictures that stand alone (mix={sorted(stage.mix)}, experts="
                f"{list(stage.experts)}); add mix.images or mix.dual, and the vision expert"
            )
        if stage.parallel.model > 1:
            problems.append(
                f"{stage.parallel} does not go with self_distillation, whose teacher every rank holds whole; set "
                "parallel.tensor, parallel.sequence and parallel.pipe to 1"
            )
        if stage.lora is not None:
            problems.append(NO_ADAPTERS.format(self.name))
        return problems

    def seen(self, layout: Layout) -> Layout:
        """The layout of the student's pass: the local views, view by view, then the pictures with hidden patches."""
        return Layout(images=layout.images * (self.views + bool(self.masked_weight)), patches=layout.patches)

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(self.seen(layout)), Pass(_whole(layout), backward=False)]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        rows = layout.images * (self.views + self.hidden(layout.patches))
        sizes = (model.width("images"), self.hidden_dim, self.hidden_dim, self.bottleneck_dim, self.prototypes)
        return [Product(rows, *pair) for pair in pairwise(sizes)]

    def saves(self, layout: Layout, model: Any, width: int) -> float:
        """The student's log-probabilities and the teacher's targets in fp32, the prototypes at length 1, and what the
        two GELU and the last layer's norm read."""
        hidden = self.hidden(layout.patches)
        said, targets = layout.images * (self.views + hidden), layout.images * (1 + hidden)
        inner = said * (2 * self.hidden_dim + self.bottleneck_dim) + self.prototypes * self.bottleneck_dim
        return 4.0 * (said + targets) * self.prototypes + inner * width


def _whole(layout: Layout) -> Layout:
    return Layout(images=layout.images, patches=layout.patches)


class Prototypes(nn.Linear):
    """Cosines with K learned directions. The layer reads its own weight, because ZeRO-3 gathers a weight only when the
    layer that owns it is called."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(F.normalize(rows, dim=-1), F.normalize(self.weight, dim=-1))


def _projector(width: int, cfg: SelfDistillation) -> nn.Sequential:
    """DINO's head; the weights of its last layer are normalised to length 1."""
    first, second = Head(width, cfg.hidden_dim), Head(cfg.hidden_dim, cfg.hidden_dim)
    last = Head(cfg.hidden_dim, cfg.bottleneck_dim)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last, Prototypes(cfg.bottleneck_dim, cfg.prototypes))


class Centers(KeepsTypes):
    """The running means of the teacher's logits, fp32 [2, K]: of pictures and of patches. They are subtracted from its
    logits; otherwise its output would collapse to one for all pictures. They are the same on every rank."""

    mean: Tensor

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, prototypes))

    @torch.no_grad()
    def follow(self, means: Tensor, share: float) -> None:
        """Moves by `share` of the way to a step's `means`. Means that are not finite, from a step that will be skipped,
        are left out, and judged on the device: the step does not wait for them."""
        self.mean.copy_(torch.where(means.isfinite().all(), self.mean.lerp(means, share), self.mean))


class Views(NamedTuple):
    """The crops and the hidden patches of a micro-batch, on the host."""

    boxes: Tensor  # fp32 [V * N, 4], view by view: width, height, left and upper edge, as shares of the picture
    hidden: Tensor  # int64 [N, m], rising: numbers of patches


class SelfDistillationHead(nn.Module):
    """The student's projector, the teacher and the centers. `student` holds the encoder, in a tuple, so that it is not
    a submodule."""

    student: tuple[Any, ...] = ()

    def __init__(self, cfg: SelfDistillation, model: Any, experts: Sequence[str], layers: Layers = PLAIN):
        super().__init__()
        self.cfg, self.gather = cfg, layers.gather
        self.project = _projector(model.width("images"), cfg)
        with layers.whole():
            parts = {"encoder": model.build(experts, layers), "project": _projector(model.width("images"), cfg)}
            self.teacher = Teacher(layers.gathered, **parts)
        self.centers = Centers(cfg.prototypes)
        self._pending: list[Tensor] = []

    def needed_rows(self, batch: Batch) -> Kinds:
        """No row of the first pass."""
        return Kinds.rows_of(batch.layout, batch.images.device)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> loss, its two parts, and the mean entropy of the teacher's targets for whole pictures: if that is near 0
        or log K, the teacher has collapsed."""
        cfg, count, device = self.cfg, batch.layout.images, batch.images.device
        views = draw_views(cfg, batch.on_host.draws[cfg.name][:count], batch.layout.patches)
        pictures = batch.images[:count]
        pictures = pictures.float().div(127.5).sub(1) if pictures.dtype == torch.uint8 else pictures
        hidden = sent(views.hidden, device)
        said = self._student(batch, pictures, views, hidden, encode)
        targets, entropy = self._targets(batch, pictures, hidden)
        local, masked = said.split([cfg.views * count, hidden.numel()])
        whole, patches = targets.split([count, hidden.numel()])
        # The rows are in the order of views, so that the pictures' targets repeat for each view.
        losses = [_cross_entropy(local.unflatten(0, (cfg.views, count)), whole)]
        losses += [_cross_entropy(masked, patches)] if cfg.masked_weight else []
        report = {"self_distillation/local": losses[0].detach(), "self_distillation/entropy": entropy}
        if cfg.masked_weight:
            report["self_distillation/masked"] = losses[1].detach()
        return {"loss": losses[0] + cfg.masked_weight * losses[-1], **report}

    def _student(self, batch: Batch, pictures: Tensor, views: Views, hidden: Tensor, encode: Encoder) -> Tensor:
        """-> log-probabilities fp32 [V * N + N * m, K], of local views and of hidden patches."""
        cfg, count, seen = self.cfg, len(pictures), self.cfg.seen(batch.layout)
        local = cfg.views * count
        shown = torch.cat([crop(pictures.repeat(cfg.views, 1, 1, 1), sent(views.boxes, pictures.device)), pictures])
        masks = torch.zeros(seen.images, seen.patches, dtype=torch.bool)
        if cfg.masked_weight:
            masks[local:].scatter_(1, views.hidden, True)

        def make(of: Batch) -> Batch:
            place = of.images.device
            dropped = {DROP_PATH: of.draws[DROP_PATH][:count]} if DROP_PATH in of.draws else {}
            return make_batch(
                seen,
                images=shown[: seen.images] if of is batch else None,
                image_masks=sent(masks, place),
                draws={name: own.repeat(seen.images // max(count, 1), 1) for name, own in dropped.items()},
            )

        further = derived(batch, make)
        needed = further.on_host.hidden
        needed.images[:local, :1] = True
        rows = encode(further, needed=needed).images
        if cfg.masked_weight and rows.shape[1] == 1:
            raise ValueError(
                f"self_distillation.masked_weight={cfg.masked_weight} reads patches, and this model gives one row for "
                "each picture; set masked_weight=0"
            )
        asked = torch.cat([rows[:local, 0], _patches(rows[local:], hidden)])
        return (self.project(asked).float() / cfg.temperature).log_softmax(-1)

    @torch.no_grad()
    def _targets(self, batch: Batch, pictures: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """-> the teacher's probabilities fp32 [N + N * m, K], of whole pictures and of the hidden patches, and the mean
        entropy of the former."""
        parts: Any = self.teacher.parts
        layout, count = _whole(batch.layout), len(pictures)
        low = self.project[0].weight.dtype == torch.bfloat16
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=low):
            whole = derived(batch, lambda of: make_batch(layout, images=pictures if of is batch else None))
            needed = Kinds.rows_of(layout, torch.device("cpu"), first=True)
            if self.cfg.masked_weight:
                needed.images[:] = True
            rows = parts.encoder(whole, needed=needed).images
            logits = parts.project(torch.cat([rows[:, 0], _patches(rows, hidden)])).float()
        both = logits.split([count, hidden.numel()])
        if self.training and count:
            means = torch.stack(
                [each.mean(0) if len(each) else torch.zeros_like(self.centers.mean[0]) for each in both]
            )
            self._pending.append(self.gather(means.unsqueeze(0))[0].mean(0))
        soft = [((own - center) / self.cfg.teacher_temperature).softmax(-1)
                for own, center in zip(both, self.centers.mean, strict=True)]  # fmt: skip
        return torch.cat(soft), torch.special.entr(soft[0]).sum(-1).mean()

    def follow(self, share: float) -> None:
        """See Teacher.follow."""
        self.teacher.follow({"encoder": self.student[0], "project": self.project}, share)

    def after_step(self) -> None:
        """The teacher follows the student, and the centers follow the teacher's logits of the step's micro-batches."""
        self.follow(1 - self.cfg.momentum)
        if self._pending:
            self.centers.follow(torch.stack(self._pending).mean(0), 1 - self.cfg.center_momentum)
        self._pending = []


def _cross_entropy(said: Tensor, wanted: Tensor) -> Tensor:
    """The mean cross-entropy over all rows of log-probabilities `said` and probabilities `wanted`, [..., K] each."""
    return -(wanted * said).sum(-1).mean()


def _patches(rows: Tensor, hidden: Tensor) -> Tensor:
    """The rows of the hidden patches: [N, 1 + P, D], int64 [N, m] -> [N * m, D]."""
    return rows.take_along_dim(1 + hidden.unsqueeze(-1), 1).flatten(0, 1) if hidden.numel() else rows[:0, 0]


def draw_views(cfg: SelfDistillation, drawn: Tensor, patches: int) -> Views:
    """The Views of a micro-batch from its uniform numbers `drawn` [N, cfg.draws], on the host."""
    each = drawn[:, :-1].unflatten(1, (cfg.views, DRAWS_PER_VIEW)).transpose(0, 1).flatten(0, 1).double()
    area = cfg.area[0] + each[:, 0] * (cfg.area[1] - cfg.area[0])
    low, high = (math.log(side) for side in ASPECT)
    aspect = (low + each[:, 1] * (high - low)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    boxes = torch.stack([width, height, each[:, 2] * (1 - width), each[:, 3] * (1 - height)], 1).float()
    count = cfg.hidden(patches)
    # A generator for each picture, so that its patches do not depend on the number of ranks.
    chosen = [torch.randperm(patches, generator=_seeded(own))[:count].sort().values for own in drawn[:, -1].tolist()]
    return Views(boxes, torch.stack(chosen) if chosen else torch.zeros(0, count, dtype=torch.long))


def _seeded(uniform: float) -> torch.Generator:
    return torch.Generator().manual_seed(int(uniform * 2**24))  # float32 has 24 bits below 1


def crop(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Pictures float [n, 3, S, S] and `boxes` [n, 4] as in Views -> each picture's box, resized bilinearly to S."""
    width, height, left, top = boxes.unbind(1)
    zero = torch.zeros_like(width)
    # In affine_grid's coordinates a picture extends from -1 to 1.
    theta = torch.stack([width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], 1).unflatten(1, (2, 3))
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    sample = partial(F.grid_sample, mode="bilinear", padding_mode="border", align_corners=False)
    return sample(pictures, grid)
