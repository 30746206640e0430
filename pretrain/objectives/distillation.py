"""A student learns from a frozen teacher: the teacher's similarities of each picture with every text and the reverse,
and its vectors (CLIP-KD, arXiv 2307.12732: contrastive relational and feature distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout, derived
from pretrain.contracts import Encoder, Objective
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.contrastive import Contrastive, ContrastiveHead, dual_pairs, paired

HEAD = "objectives.contrastive."  # the names of a teacher's head of contrast begin so


@dataclass(frozen=True)
class Distillation(Objective):
    """Stands beside Contrastive and moves its vectors towards the teacher's. `teacher`: a stage of this run directory,
    or weights, with a contrastive head, for pictures of the same size and the same tokenizer. The loss is `relations`
    times the mean KL divergence of the student's similarities from the teacher's, both at the teacher's temperature,
    plus `features` times the squared distance of their vectors, which must then be of one width. The step's FLOPs do
    not count the teacher's pass; `pretrain.plan` counts its time."""

    teacher: str = "retrieval"
    relations: float = 1.0
    features: float = 1.0
    name = "distillation"

    def __post_init__(self) -> None:
        for name in ("relations", "features"):
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name}={getattr(self, name)} is negative; use 0 or more")
        if not (self.relations or self.features):
            raise ValueError("distillation.relations and distillation.features are both 0; give one of them 1")

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return DistillationHead(self, model, layers)

    def join(self, head: Any, heads: Mapping[str, nn.Module]) -> None:
        head.student = (heads[Contrastive.name],)

    def read(self, head: Any, read: Any) -> None:
        state, model = read(self.teacher, "distillation.teacher")
        head.teacher = (_teacher(self, state, model, head),)

    def reads(self) -> dict[str, str]:
        return {"distillation.teacher": self.teacher}

    def lessons(self, layout: Layout) -> dict[str, Layout]:
        return {"distillation.teacher": paired(layout)}

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if not any(objective.name == Contrastive.name for objective in stage.objectives):
            problems.append("distillation moves the vectors of Contrastive(); give the stage that objective too")
        if stage.parallel.model > 1:
            problems.append(
                f"{stage.parallel} does not go with distillation, whose teacher every rank holds whole; set "
                "parallel.tensor, parallel.sequence and parallel.pipe to 1"
            )
        return problems


def _teacher(cfg: Distillation, state: Mapping[str, Tensor], model: Any, head: DistillationHead) -> nn.Module:
    """The teacher with its weights, on the host. ValueError for one that does not go with the student."""
    knob = f"distillation.teacher={cfg.teacher}"
    if f"{HEAD}logit_scale" not in state:
        raise ValueError(f"{knob} has no {HEAD}logit_scale; name a stage that was trained by Contrastive()")
    for name in ("image_size", "vocab_size"):
        own, theirs = getattr(head.model, name), getattr(model, name)
        if own != theirs:
            raise ValueError(f"{knob} has model.{name}={theirs} and the student {own}; use one number")
    weight = state.get(f"{HEAD}vision.weight")  # of its projection, which not every contrast has
    widths, embed_dim = (model.width("images"), model.width("texts")), None if weight is None else len(weight)
    options: Any = {"project": weight is not None, "projection_bias": f"{HEAD}vision.bias" in state}
    options |= {"bias": 0.0} if f"{HEAD}logit_bias" in state else {}  # the sigmoid's, whose scale has no bound
    with head.layers.whole():
        teacher = nn.Module()
        teacher.encoder = model.build(("vision", "language"))
        teacher.head = ContrastiveHead(widths, embed_dim, 1.0, **options)
        own = {key: state.get(_stored(key)) for key in teacher.state_dict()}
        if lacking := sorted(key for key, value in own.items() if value is None):
            raise ValueError(f"{knob} lacks {_stored(lacking[0])}; it is incomplete")
        teacher.load_state_dict(own)
    return teacher.eval().requires_grad_(False)


def _stored(key: str) -> str:
    """The name, in a stage's weights, of a tensor of the teacher module."""
    return key.replace("head.", HEAD, 1) if key.startswith("head.") else key


class DistillationHead(nn.Module):
    """It has no parameters. `student` holds the stage's contrastive head and `teacher` the teacher, each in a tuple, so
    that they are not submodules: the teacher is neither trained nor saved, and whole on every rank under ZeRO."""

    student: tuple[Any, ...] = ()
    teacher: tuple[Any, ...] = ()

    def __init__(self, cfg: Distillation, model: Any, layers: Layers):
        super().__init__()
        self.cfg, self.model, self.layers = cfg, model, layers

    def needed_rows(self, batch: Batch) -> Kinds:
        return self.student[0].needed_rows(batch)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss` and its two parts. ValueError if `features` compares vectors of two widths."""
        own = self.student[0].embed(encoded, batch.layout)
        taught = self._teach(batch)
        if self.cfg.features and own[0].shape != taught[0].shape:
            raise ValueError(
                f"distillation.features={self.cfg.features}: the teacher's vectors are {taught[0].shape[1]} wide and "
                f"the student's {own[0].shape[1]}; set embed_dim={taught[0].shape[1]} of Contrastive, or features=0"
            )
        relations = self._relations(own, taught)
        features = relations.new_zeros(())
        if self.cfg.features:
            apart = [(a - b).square().sum(-1).mean() for a, b in zip(own, taught, strict=True)]
            features = (apart[0] + apart[1]) / 2
        loss = self.cfg.relations * relations + self.cfg.features * features
        return {"loss": loss, "distillation/relations": relations.detach(), "distillation/features": features.detach()}

    def _relations(self, own: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor]) -> Tensor:
        """The mean KL divergence for this rank's pictures and texts, each against all ranks' texts or pictures."""
        scale = self.teacher[0].head.scale()
        everyone = [self.layers.gather(each)[0] for each in (*own, *taught)]
        both = []
        for asking, asked in ((0, 1), (1, 0)):
            said = (scale * own[asking] @ everyone[asked].T).log_softmax(-1)
            wanted = (scale * taught[asking] @ everyone[2 + asked].T).log_softmax(-1)
            both.append(F.kl_div(said, wanted, reduction="batchmean", log_target=True))
        return (both[0] + both[1]) / 2

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's unit vectors of the dual pairs, with no patch or word hidden: fp32 [N, E] each."""
        teacher: Any = self.teacher[0].to(batch.images.device)
        dual = derived(batch, dual_pairs)
        low = self.student[0].logit_scale.dtype == torch.bfloat16
        with torch.autocast(dual.images.device.type, torch.bfloat16, enabled=low):
            needed = teacher.head.needed_rows(dual.on_host)
            return teacher.head.embed(teacher.encoder(dual, needed=needed), dual.layout)

    def after_step(self) -> None:
        """Nothing moves between steps."""
