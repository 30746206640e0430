"""A trained task as modules that can be exported, one for each route through it: pictures, texts, or both fused.

They use the modules of the task and compute what its packed pass computes, but with every sequence padded and without
gathering rows by their place, so that every size may differ from call to call. Shapes: N sequences, S pixels a side, I
rows of a picture (its class row and its patches), L ids of a text, D width, H heads, E width of the dual encoder's
vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import PAD, Kinds
from pretrain.models.multiway.embeddings import image_index, offsets_of, pair_index, text_index
from pretrain.models.multiway.resize import resize_patch_positions, resize_relative_positions


class Part(NamedTuple):
    """The rows [N, length, D] of one modality in N sequences; `modality` is also the name of its expert."""

    modality: str
    rows: Tensor


class Route(nn.Module):
    """One route through a PretrainTask; `outputs` names what its forward returns, in this order. Probabilities and
    vectors come from the heads that the task has."""

    inputs: tuple[str, ...]

    def __init__(self, task: Any):
        super().__init__()
        self.task = task
        self.outputs: tuple[str, ...] = ()

    def _head(self, name: str) -> Any:
        return self.task.objectives[name] if name in self.task.objectives else None  # noqa: SIM401


class VisionRoute(Route):
    """uint8 [N, 3, S, S] -> `rows` [N, I, D] after the final norm; with a head of contrast `vector` [N, E], of length
    1; with one of classes `classes` [N, classes], their probabilities."""

    inputs = ("pixels",)

    def __init__(self, task: Any):
        super().__init__(task)
        heads = {"contrastive": "vector", "classification": "classes"}
        self.outputs = ("rows", *(output for head, output in heads.items() if self._head(head) is not None))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        encoder = self.task.encoder
        grid = pixels.shape[-1] // encoder.cfg.patch_size
        (rows,) = encode(encoder, [Part("vision", picture_rows(encoder, pixels, grid))], None, grid)
        encoded, answers = _kinds(images=rows), [rows]
        if (head := self._head("contrastive")) is not None:
            answers.append(head.embed_images(encoded))
        if (head := self._head("classification")) is not None:
            answers.append(head.logits(encoded).softmax(-1))
        return tuple(answers)


class TextRoute(Route):
    """int64 [N, L], PAD behind EOS -> `rows` [N, L, D], of padding anything; with a head of contrast `vector` [N, E],
    of length 1."""

    inputs = ("ids",)

    def __init__(self, task: Any):
        super().__init__(task)
        self.outputs = ("rows",) if self._head("contrastive") is None else ("rows", "vector")

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        seen = ids != PAD
        # A text that is all padding sees itself, since a softmax over nothing would be NaN.
        seen = seen | ~seen.any(-1, keepdim=True)
        (rows,) = encode(self.task.encoder, [Part("language", text_rows(self.task.encoder, ids))], seen)
        head = self._head("contrastive")
        return (rows,) if head is None else (rows, head.embed_texts(_kinds(texts=rows)))


class FusionRoute(Route):
    """Pictures, each with its own text -> `image_rows` [N, I, D], `text_rows` [N, L, D]; with a head of matching
    `match` [N], the probability that they belong together; with one of answers `answers` [N, answers], each by
    itself."""

    inputs = ("pixels", "ids")

    def __init__(self, task: Any):
        super().__init__(task)
        heads = {"matching": "match", "answering": "answers"}
        own = tuple(output for head, output in heads.items() if self._head(head) is not None)
        self.outputs = ("image_rows", "text_rows", *own)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        encoder = self.task.encoder
        grid = pixels.shape[-1] // encoder.cfg.patch_size
        parts = [Part("vision", picture_rows(encoder, pixels, grid)), Part("language", text_rows(encoder, ids))]
        images, texts = encode(encoder, parts, ids != PAD, grid)
        encoded, answers = _kinds(pair_images=images, pair_texts=texts), [images, texts]
        if (head := self._head("matching")) is not None:
            answers.append(head.match(encoded.first.pair_images).softmax(-1)[:, 1])
        if (head := self._head("answering")) is not None:
            answers.append(head.logits(encoded).sigmoid())
        return tuple(answers)


class TowerVisionRoute(VisionRoute):
    """A tower of DualTowers: uint8 [N, 3, S, S] of the model's own size -> `rows` [N, 1, width], `vector` [N, E]."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        encoded = _kinds(images=self.task.encoder.vision.images(pixels).unsqueeze(1))
        head = self._head("contrastive")
        return (encoded.images,) if head is None else (encoded.images, head.embed_images(encoded))


class TowerTextRoute(TextRoute):
    """A tower of DualTowers: int64 [N, L], PAD behind EOS -> `rows` [N, 1, width], `vector` [N, E]."""

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        encoded = _kinds(texts=self.task.encoder.text.texts(ids).unsqueeze(1))
        head = self._head("contrastive")
        return (encoded.texts,) if head is None else (encoded.texts, head.embed_texts(encoded))


def routes_of(task: Any) -> dict[str, Route]:
    """The routes that the task has parts for, by the names of their files."""
    if not hasattr(task.encoder, "expert_names"):
        return {"vision": TowerVisionRoute(task), "text": TowerTextRoute(task)}
    routes: dict[str, Route] = {}
    experts = task.encoder.expert_names
    if "vision" in experts:
        routes["vision"] = VisionRoute(task)
    if "language" in experts:
        routes["text"] = TextRoute(task)
    if {"vision", "language"} <= set(experts):
        routes["fusion"] = FusionRoute(task)
    return routes


def _kinds(**rows: Tensor) -> Kinds:
    """Kinds with these rows, and with no sequences of the other kinds."""
    none = next(iter(rows.values()))[:0]
    return Kinds(*(rows.get(name, none) for name in Kinds._fields))


def picture_rows(encoder: Any, pixels: Tensor, grid: int) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, I, D], as VisionEmbedding; `grid`: patches a side. Where the model has another grid,
    its positions are interpolated as by MultiwayConfig.adapt."""
    embed, n, p = encoder.vision_embed, pixels.shape[0], encoder.cfg.patch_size
    patches = pixels.reshape(n, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, 3 * p * p)
    x = embed.proj(patches.float() / 127.5 - 1)
    x = torch.cat([embed.cls_token.expand(n, -1, -1), x], 1)
    return x if embed.positions is None else x + resize_patch_positions(embed.positions, encoder.cfg.grid, grid)


def text_rows(encoder: Any, ids: Tensor) -> Tensor:
    """int64 [N, L] -> [N, L, D], as TextEmbedding."""
    return encoder.text_embed.at(ids, 0).masked_fill((ids == PAD).unsqueeze(-1), 0)


def encode(encoder: Any, parts: Sequence[Part], seen: Tensor | None, grid: int = 0) -> list[Tensor]:
    """The rows of each part after all blocks and the final norm. `parts`: the rows of the same sequences, a picture's
    before a text's; `seen`: bool [N, L], the words that attention may see, None where there are no texts; `grid`:
    patches a side of a picture."""
    biases = _biases(encoder, parts, grid)
    if seen is not None and len(parts) == 2:
        seen = F.pad(seen, (parts[0].rows.shape[1], 0), value=True)
    for number, block in enumerate(encoder.blocks):
        parts = _through(block, parts, _mask(None if biases is None else biases[number], seen))
    return _each(encoder.norm, [part.modality for part in parts], [part.rows for part in parts])


def _through(block: Any, parts: Sequence[Part], mask: Tensor | None) -> list[Part]:
    """[N, length, D] of each part through a block, in which every row sees those of all parts that `mask` allows."""
    attention, names, rows = block.attention, [part.modality for part in parts], [part.rows for part in parts]
    normed = _each(block.norm, names, rows)

    def projected(projection: Any) -> Tensor:
        own = torch.cat(_each(projection, names, normed), 1)
        return own.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q, k, v = (projected(each) for each in (attention.q, attention.k, attention.v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    ys = list(attended.split([part.shape[1] for part in rows], 1))
    if attention.inner_norm is not None:
        ys = _each(attention.inner_norm, names, ys)
    rows = _added(rows, _each(attention.out, names, ys), block.attention_scale)
    fused = len(parts) == 2 and "fusion" in block.experts
    rows = _added(rows, _each(block.experts, ["fusion"] * 2 if fused else names, rows), block.expert_scale)
    return [Part(name, own) for name, own in zip(names, rows, strict=True)]


def _each(modules: Any, names: Sequence[str], rows: Sequence[Tensor]) -> list[Tensor]:
    """Each part's rows through the module of a block.Multiway that has the part's name. Parts that share a module go
    through it together, so that its weights are read once, and are in the file only once as int8 too."""
    chosen = ["shared"] * len(rows) if "shared" in modules else names
    if len(rows) == 2 and chosen[0] == chosen[1]:
        return list(modules[chosen[0]](torch.cat(list(rows), 1)).split([part.shape[1] for part in rows], 1))
    return [modules[name](part) for name, part in zip(chosen, rows, strict=True)]


def _added(rows: Sequence[Tensor], branches: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The residual sums, with LayerScale's factor `scale` where there is one."""
    return [x + (y if scale is None else y * scale) for x, y in zip(rows, branches, strict=True)]


def _mask(bias: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """The mask of attention, [N or 1, H or 1, rows or 1, rows]: added to its scores if it is float, or, if it is bool,
    True where they count; None for no mask. `bias`: [H, rows, rows]; `seen`: bool [N, rows]."""
    if seen is not None:
        seen = seen[:, None, None, :]
    if bias is None:
        return seen
    return bias.unsqueeze(0) if seen is None else bias.unsqueeze(0).masked_fill(~seen, float("-inf"))


def _biases(encoder: Any, parts: Sequence[Part], grid: int) -> Sequence[Tensor] | None:
    """RelativePosition's bias [H, rows, rows] of each block, for any grid; None where the encoder has none."""
    relative = encoder.relative_position
    if relative is None:
        return None
    lengths = {modality: rows.shape[1] for modality, rows in parts}
    table, image_rows, index = relative.table, relative.image_rows, []
    if "vision" in lengths:
        table = resize_relative_positions(table, relative.grid, grid)
        image_rows = offsets_of(grid) + 3
        index.append(image_index(grid, table.device))
    if "language" in lengths:
        index.append(text_index(lengths["language"], relative.longest, image_rows, table.device))
    whole = index[0] if len(index) == 1 else pair_index(index[0], index[1], image_rows)
    return F.embedding(whole, table).permute(2, 0, 1).chunk(relative.depth)
