"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651, 3.2; over all ranks as in VLMo, arXiv 2111.02358):
do a picture and a text belong together? Wrong partners are drawn among those that the contrast finds similar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import BOS, DROP_PATH, EOS, PAD, Batch, Kinds, Layout, make_batch
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head, Layers
from pretrain.objectives import alignment

NEGATIVES = ("global", "local", "random")


@dataclass(frozen=True)
class Matching(Objective):
    """Fuses each dual pair, its picture with a wrong text, and its text with a wrong picture, and predicts which of
    these pairs are true. `negatives`: "global" draws the wrong partners among all data ranks' pairs in proportion to
    the contrast's softmax (VLMo); "local" among this rank's (ALBEF), so that the numbers depend on how many ranks there
    are; "random" among all ranks' pairs with equal chances, which needs no contrast (ViLT). `alignment`: the weight of
    the transport distance between words and patches in true pairs minus that in wrong ones (0.1 in UNITER and ViLT; see
    alignment.py). `random_steps`: in this many first steps all partners have equal chances. From fresh weights matching
    hardly begins with hard negatives (benchmarks.claims); ALBEF and VLMo begin with pretrained weights."""

    negatives: str = "global"
    alignment: float = 0.0
    random_steps: int = 0
    name = "matching"

    def __post_init__(self) -> None:
        if self.negatives not in NEGATIVES:
            raise ValueError(f"matching.negatives={self.negatives!r} is unknown; use {', '.join(NEGATIVES)}")
        if not 0 <= self.alignment < math.inf:
            raise ValueError(f"matching.alignment={self.alignment} is no weight; use 0 for none, or UNITER's 0.1")
        if self.random_steps < 0:
            raise ValueError(f"matching.random_steps={self.random_steps} is below 0; use 0 for hard partners at once")

    @property
    def draws(self) -> int:
        return 1  # a picture's wrong text, a text's wrong picture

    @property
    def reads_patches(self) -> bool:
        return self.alignment > 0

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> MatchingHead:
        width = model.width("pair_images")
        if self.alignment and width != model.width("pair_texts"):
            raise ValueError(
                f"matching.alignment compares words with patches, and their rows have widths of "
                f"{model.width('pair_texts')} and {width}; set alignment=0, or give both streams one width"
            )
        return MatchingHead(width, self.negatives, layers, alignment=self.alignment, random_steps=self.random_steps)

    def join(self, head: Any, heads: Mapping[str, nn.Module]) -> None:
        head.contrast = (heads["contrastive"],) if self.negatives != "random" else ()

    def begin(self, head: Any) -> None:
        if self.random_steps:
            head.steps.zero_()  # those of the stage before came with its weights

    def problems(self, stage: Any) -> list[str]:
        problems, names = [], [objective.name for objective in stage.objectives]
        if self.negatives != "random" and "contrastive" not in names:
            problems.append(
                f"matching draws its wrong partners by the objective contrastive, and this stage has {', '.join(names)}"
                "; add Contrastive() to its objectives, or set negatives='random'"
            )
        if "dual" not in stage.mix:
            problems.append(f"matching reads dual pairs, and the mix has {', '.join(sorted(stage.mix))}; add mix.dual")
        if stage.batch.dual < 2:
            problems.append(f"matching needs wrong partners and batch.dual={stage.batch.dual} has none; use 2 or more")
        if missing := [name for name in ("vision", "language") if name not in stage.experts]:
            problems.append(
                f"matching reads pictures and texts, and experts={list(stage.experts)} lacks {' and '.join(missing)}; "
                "add what is missing"
            )
        return problems

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(fused(layout), again=(3 if self.negatives == "local" else 2) * layout.dual)]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return [Product(3 * layout.dual, model.width("pair_images"), 2, classes=True)]


def fused(layout: Layout) -> Layout:
    """The layout of one pass over all three kinds of pairs. ALBEF and VLMo make two or three passes, which compute the
    same."""
    return Layout(pairs=3 * layout.dual, patches=layout.patches, pair_len=layout.text_len)


class MatchingHead(nn.Module):
    """A linear head with two classes, wrong and true, on the class row of a fused pair. `contrast` holds the
    contrastive head, in a tuple, so that it is not a submodule."""

    contrast: tuple[Any, ...] = ()
    steps: Tensor  # int64 []: steps so far; exists only if random_steps > 0

    def __init__(
        self,
        width: int,
        negatives: str = "global",
        layers: Layers = PLAIN,
        *,
        alignment: float = 0.0,
        random_steps: int = 0,
    ):
        super().__init__()
        self.alignment, self.random_steps = alignment, random_steps
        if random_steps:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.match = Head(width, 2)
        self.negatives, self.gather, self.visit = negatives, layers.gather, layers.visit

    def needed_rows(self, batch: Batch) -> Kinds:
        """The rows that the contrast reads; none if partners are random."""
        if self.negatives == "random":
            return Kinds.rows_of(batch.layout, batch.images.device)
        return self.contrast[0].needed_rows(batch)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> loss and accuracy over the three fused pairs of each dual pair. On a GPU it waits once for the device,
        since the lengths of the wrong texts are not known earlier."""
        layout, count = batch.layout, batch.layout.dual
        pictures, texts = slice(layout.images - count, layout.images), slice(0, count)
        images, tokens = batch.images[pictures], batch.text_tokens[texts]
        wrong_text, wrong_image = self.draw(encoded, batch)
        pairs = make_batch(
            fused(layout),
            images=torch.cat([images, images, self._fetch(images, wrong_image)]),
            pair_tokens=torch.cat([tokens, self._fetch(tokens, wrong_text), tokens]),
            again=self._again(batch, wrong_image),
            draws={DROP_PATH: torch.cat(_own(batch, DROP_PATH, (0, 0, 1)))} if DROP_PATH in batch.draws else {},
        ).indexed()
        host = pairs.on_host  # where the encoder asks which rows are needed
        first = Kinds.rows_of(pairs.layout, host.images.device, first=True)
        needed = first._replace(pair_texts=torch.zeros_like(first.pair_texts))
        if self.alignment:
            needed = needed._replace(pair_images=torch.ones_like(first.pair_images), pair_texts=words(host))
        fused_rows = encode(pairs, needed=needed)
        logits = self.match(fused_rows.first.pair_images).float()
        label = (torch.arange(3 * count, device=images.device) < count).long()
        accuracy = (logits.detach().argmax(-1) == label).float().mean()
        report = {"loss": F.cross_entropy(logits, label), "accuracy/matching": accuracy}
        return self._aligned(report, fused_rows, pairs, label) if self.alignment else report

    def _aligned(self, report: dict[str, Tensor], rows: Kinds, pairs: Batch, label: Tensor) -> dict[str, Tensor]:
        """Adds to the loss `alignment` times the mean over all pairs of the transport distance, positive for true and
        negative for wrong pairs (ChenRocks/UNITER pretrain.py), and reports the means `distance/true` and
        `distance/wrong`."""
        counts = words(pairs)
        texts = rows.pair_texts.where(counts.unsqueeze(-1), 0)  # other rows may hold anything, also NaN
        apart = alignment.distance(texts, rows.pair_images[:, 1:], counts)
        loss = report["loss"] + self.alignment * (apart * (2 * label - 1)).mean()
        true, wrong = apart.detach().tensor_split([len(label) // 3])
        return report | {"loss": loss, "distance/true": true.mean(), "distance/wrong": wrong.mean()}

    @torch.no_grad()
    def draw(self, encoded: Kinds, batch: Batch) -> tuple[Tensor, Tensor]:
        """A wrong text for each picture of a dual pair, and a wrong picture for each text: int64 [N] each, their places
        in the order of all ranks' pairs, counted from this rank's first pair. ValueError if there is none."""
        picture_draws, text_draws = _own(batch, Matching.name, (0, 1))
        if self.negatives == "random":
            everyone, first = self.gather(picture_draws)
            alike = torch.zeros(len(picture_draws), len(everyone), device=picture_draws.device)
            return _pick(alike, first, picture_draws[:, 0]) - first, _pick(alike, first, text_draws[:, 0]) - first
        contrast = self.contrast[0]
        vectors = contrast.embed(encoded, batch.layout)
        (all_images, first), (all_texts, _) = (
            ((own, 0) if self.negatives == "local" else self.gather(own)) for own in vectors
        )
        if len(all_texts) < 2:
            raise ValueError(
                "matching.negatives='local' finds no wrong partner for a rank's only dual pair; use 'global' or a "
                "larger batch.dual"
            )
        scale = contrast.scale()
        if self.random_steps:
            scale = scale * (self.steps >= self.random_steps)
        images, texts = vectors
        wrong_text = _pick(scale * images @ all_texts.T, first, picture_draws[:, 0])
        wrong_image = _pick(scale * texts @ all_images.T, first, text_draws[:, 0])
        return wrong_text - first, wrong_image - first

    def _again(self, batch: Batch, wrong_image: Tensor) -> Tensor:
        """See Batch.again. Pictures that may be another rank's are left out, since how many are own ones would depend
        on the number of ranks."""
        layout = batch.layout
        own = torch.arange(layout.images - layout.dual, layout.images, device=batch.images.device)
        return torch.cat([own, own, *([own[wrong_image]] if self.negatives == "local" else [])])

    def _fetch(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """All ranks' rows [N, ...] at the places `wanted` int64 [N], counted from this rank's first one. Never are more
        than one rank's rows held."""
        if self.negatives == "local":
            return rows[wanted]
        fetched = rows.clone()

        def see(shown: Tensor, distance: int) -> None:
            place = wanted - distance
            inside = (place >= 0) & (place < len(shown))
            theirs = shown[place.clamp(0, len(shown) - 1)]
            fetched.copy_(torch.where(inside.view(-1, *[1] * (rows.dim() - 1)), theirs, fetched))

        self.visit(rows, see)
        return fetched

    def after_step(self) -> None:
        """Counts the steps, if the first ones draw random partners."""
        if self.random_steps:
            self.steps += 1


def words(pairs: Batch) -> Tensor:
    """bool [pairs, pair_len]: the rows of words, without padding, BOS and EOS."""
    return (pairs.pair_tokens != PAD) & (pairs.pair_tokens != BOS) & (pairs.pair_tokens != EOS)


def _own(batch: Batch, name: str, which: Sequence[int]) -> list[Tensor]:
    """The draws called `name` of the dual pairs' pictures (0) or texts (1), as `which` lists them: [N, n] each."""
    layout, drawn = batch.layout, batch.draws[name]
    images, _, texts = drawn.split([layout.images, layout.pairs, layout.texts])
    both = images[layout.images - layout.dual :], texts[: layout.dual]
    return [both[number] for number in which]


def _pick(scores: Tensor, first: int, uniform: Tensor) -> Tensor:
    """int64 [n]: for each row of `scores` [n, N] a column drawn in proportion to exp(score), but never the row's own
    column, `first` + its number: the one at which the cumulative probability passes the row's number `uniform` in
    [0, 1). In fp64: with another number of ranks the scores' last bits differ, which must not change the draw."""
    own = torch.arange(first, first + len(scores), device=scores.device)
    shares = scores.double().scatter(1, own.unsqueeze(1), -torch.inf).softmax(-1).cumsum(-1)
    # `<=`, so that a column of probability 0 is never chosen, even if `uniform` is 0.
    return (shares <= uniform.double().unsqueeze(1) * shares[:, -1:]).sum(-1).clamp(max=scores.shape[1] - 1)
