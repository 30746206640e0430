"""Contrast against a momentum teacher's vectors, of this batch and of earlier ones in a queue: MoCo (arXiv 1911.05722),
BriVL (2103.06561), and with soft targets ALBEF (2107.07651, 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout, derived
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.contrastive import Contrastive, ContrastiveHead, dual_pairs, paired
from pretrain.objectives.teacher import NO_ADAPTERS, KeepsTypes, Teacher
from pretrain.settings import near


@dataclass(frozen=True)
class MomentumContrast(Objective):
    """Contrasts each picture with the teacher's vectors of all data ranks' texts and of the queue's, and each text with
    those of pictures. The target is the true partner with the share 1 - `alpha`, and the teacher's own softmax with the
    share `alpha`, which rises linearly over the first `ramp_steps` steps. alpha=0 is MoCo's and BriVL's contrast. It
    replaces the objective contrastive and has its name, also for matching and retrieval."""

    embed_dim: int | None = None
    temperature: float = 0.07  # the initial one; it is learned
    momentum: float = 0.995  # in each step the teacher's weights are momentum * theirs + (1 - momentum) * the student's
    queue: int = 65_536  # vectors of pictures, and as many of texts
    alpha: float = 0.4
    ramp_steps: int = 0
    projection_bias: bool = False  # as Contrastive's
    name = "contrastive"
    renewed = ("queue.images", "queue.texts")

    def __post_init__(self) -> None:
        for name in ("momentum", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"contrastive.{name}={getattr(self, name)} is no share; use 0 to 1")
        for name in ("queue", "ramp_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"contrastive.{name}={getattr(self, name)} is negative; use 0 for none")
        assert self._plain  # it refuses a temperature

    @property
    def _plain(self) -> Contrastive:
        return Contrastive(self.embed_dim, self.temperature, projection_bias=self.projection_bias)

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> MomentumHead:
        return MomentumHead(self, model, experts, layers)

    def join(self, head: Any, heads: Mapping[str, nn.Module]) -> None:
        head.student = (heads["encoder"],)

    def begin(self, head: Any) -> None:
        head.follow(1.0)
        head.queue.steps.zero_()  # those of the stage before came with its weights

    def problems(self, stage: Any) -> list[str]:
        problems = self._plain.problems(stage)
        if stage.batch.dual and self.queue % stage.batch.dual:
            problems.append(
                f"contrastive.queue={self.queue} is no multiple of batch.dual={stage.batch.dual}, which it takes at "
                f"once; use {near(self.queue, stage.batch.dual)}"
            )
        if stage.parallel.tensor > 1 or stage.parallel.sequence > 1:
            problems.append(
                f"{stage.parallel} does not go with a momentum teacher, which every rank holds whole; set "
                "parallel.tensor=1 and parallel.sequence=1"
            )
        if stage.lora is not None:
            problems.append(NO_ADAPTERS.format("the objective contrastive"))
        return problems

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(paired(layout), backward=False)]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return self._plain.products(layout, model)

    def saves(self, layout: Layout, model: Any, width: int) -> float:
        """In fp32 and both ways: the vectors of batch and queue, each row's logits twice and the teacher's shares."""
        known = layout.dual + self.queue
        return 2 * 4.0 * known * ((self.embed_dim or model.width("images")) + 3 * layout.dual)


class MomentumHead(ContrastiveHead):
    """The contrastive head with a teacher and a queue. `student` holds the encoder, in a tuple, so that it is not a
    submodule."""

    student: tuple[Any, ...] = ()

    def __init__(self, cfg: MomentumContrast, model: Any, experts: Sequence[str], layers: Layers = PLAIN):
        widths = model.width("images"), model.width("texts")
        super().__init__(widths, cfg.embed_dim, cfg.temperature, layers, projection_bias=cfg.projection_bias)
        self.cfg = cfg
        with layers.whole():
            heads = ContrastiveHead(widths, cfg.embed_dim, cfg.temperature, projection_bias=cfg.projection_bias)
            parts = {"encoder": model.build(experts, layers), "vision": heads.vision, "language": heads.language}
            self.teacher = Teacher(layers.gathered, **parts)
            # Random directions at first, as in ALBEF. A generator of its own: every rank begins with the same ones.
            made = torch.Generator().manual_seed(0)
            start = [torch.randn(cfg.queue, self.width, generator=made, device="cpu") for _ in range(2)]
            self.queue = Queue(*(F.normalize(each, dim=-1) for each in start))
        self._pending: tuple[Tensor, Tensor] | None = None

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> loss, in-batch accuracy and logit scale as ContrastiveHead's, and the current `alpha`."""
        images, texts = self.embed(encoded, batch.layout)
        taught_images, taught_texts = self._teach(batch, images.dtype)
        scale = self.scale()
        (all_images, first), (all_texts, _) = self.gather(taught_images), self.gather(taught_texts)
        if self.training and torch.is_grad_enabled():
            self._pending = all_images, all_texts
        count, own = len(all_images), torch.arange(first, first + len(images), device=images.device)
        known_images, known_texts = torch.cat([all_images, self.queue.images]), torch.cat([all_texts, self.queue.texts])
        alpha = self.queue.alpha(self.cfg)
        losses, report = [], {}
        for name, asking, taught, known in (
            ("image_to_text", images, taught_images, known_texts),
            ("text_to_image", texts, taught_texts, known_images),
        ):
            logits = scale * asking @ known.T
            soft = (scale.detach() * taught @ known.T).softmax(-1)
            distilled = -(soft * logits.log_softmax(-1)).sum(-1).mean()
            losses.append((1 - alpha) * F.cross_entropy(logits, own) + alpha * distilled)
            report[f"accuracy/{name}"] = (logits.detach()[:, :count].argmax(-1) == own).float().mean()
        return {"loss": torch.stack(losses).mean(), **report, "logit_scale": scale.detach().squeeze(), "alpha": alpha}

    @torch.no_grad()
    def _teach(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The teacher's unit vectors of the dual pairs, with no patch or word hidden: fp32 [N, E] each."""
        dual, parts = derived(batch, dual_pairs), cast(Any, self.teacher.parts)
        low = self.vision.weight.dtype == torch.bfloat16
        with torch.autocast(dual.images.device.type, torch.bfloat16, enabled=low):
            first = parts.encoder(dual, needed=super().needed_rows(dual.on_host)).first
            rows = parts.vision(first.images), parts.language(first.texts)
        taught_images, taught_texts = (F.normalize(each.float(), dim=-1) for each in rows)
        return taught_images, taught_texts

    def follow(self, share: float) -> None:
        """See Teacher.follow."""
        students = {"encoder": self.student[0], "vision": self.vision, "language": self.language}
        self.teacher.follow(students, share)

    def after_step(self) -> None:
        """The teacher follows, and the batch's vectors take the place of the oldest in the queue."""
        self.follow(1 - self.cfg.momentum)
        if self._pending is not None:
            self.queue.take(*self._pending)
        self._pending = None


class Queue(KeepsTypes):
    """The teacher's vectors of earlier steps, fp32 [Q, E] of pictures and of texts, the same on every rank."""

    images: Tensor
    texts: Tensor
    steps: Tensor

    def __init__(self, images: Tensor, texts: Tensor):
        super().__init__()
        self.register_buffer("images", images)
        self.register_buffer("texts", texts)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def alpha(self, cfg: MomentumContrast) -> Tensor:
        """fp32 []: the share of the teacher's softmax in this step's targets."""
        risen = self.steps.float() / max(cfg.ramp_steps, 1)
        return cfg.alpha * (risen.clamp(max=1) if cfg.ramp_steps else torch.ones_like(risen))

    @torch.no_grad()
    def take(self, images: Tensor, texts: Tensor) -> None:
        """Puts all ranks' vectors of a step, [N, E] each with N a divisor of Q, in the place of the oldest. Vectors
        that are not finite, from a step that will be skipped, are left out: they would spoil every loss until they
        are overwritten."""
        if len(self.images):
            places = (self.steps * len(images) + torch.arange(len(images), device=images.device)) % len(self.images)
            for queue, new in ((self.images, images), (self.texts, texts)):
                finite = new.isfinite().all(-1, keepdim=True)
                queue.index_copy_(0, places, torch.where(finite, new, queue[places]))
        self.steps += 1
