"""What encoders with a stream for pictures and one for words share: how a batch's rows come into each, how weights of
other sizes are made to fit, and what no such encoder can be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import Batch, Layout, make_batch
from pretrain.contracts import State
from pretrain.flops import Product, encoder_flops, flops_per_sequence, product_flops
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.resize import grow_vocabulary, resize_patch_positions
from pretrain.models.multiway.shape import MultiwayShape
from pretrain.rows import sent

_SOME = Layout(images=2, pairs=2, texts=2, patches=1, pair_len=3, text_len=3, dual=2)


def pictures(encoder: MultiwayEncoder, batch: Batch, known: Tensor | None = None) -> Tensor:
    """A batch's pictures through a vision encoder: [images + pairs, image_len, dim]. `known` [n, image_len, dim]: what
    it made of the first n pairs' pictures before, which are not encoded again."""
    layout, first = batch.layout, 0 if known is None else len(known)
    assert not (first and layout.images), layout
    only = Layout(images=layout.images + layout.pairs - first, patches=encoder.cfg.patches)
    if only.images:
        rows = encoder(pictures_alone(only, batch, first)).images
    else:  # an evaluation of texts, or of pictures that are known
        rows = encoder.blocks[0].norm["shared"].weight.new_zeros(0, only.image_len, encoder.cfg.dim)
    return rows if known is None else torch.cat([known, rows])


def pictures_alone(only: Layout, batch: Batch, first: int = 0) -> Batch:
    """A batch's pictures from the one with number `first` on, as images of the layout `only`. Its index is made on the
    host, where nothing waits for the device."""
    own, host = (
        make_batch(only, images=each.images[first:], image_masks=each.image_masks[first:])
        for each in (batch, batch.on_host)
    )
    index = host.indexed().index
    assert index is not None
    return own.with_index(index.map(partial(sent, device=batch.images.device)), None)


def words(embed: TextEmbedding, batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch's texts, those of pairs first, padded to one length L: [pairs + texts, L, dim], and which of their words
    are no padding, bool [pairs + texts, 1, 1, L]."""
    length = max(batch.layout.pair_len, batch.layout.text_len, 1)
    rows = torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in embed(batch)])
    seen = torch.cat([F.pad(part, (0, length - part.shape[1])) for part in batch.keys_seen])
    return rows, seen[:, None, None]


def run(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`block(*inputs)`; with `recompute` the backward pass computes it again from its inputs and keeps nothing else."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def vit_shape(model: Any, *, dim: int, depth: int, heads: int, ffn_dim: int) -> MultiwayShape:
    """Of a model's vision encoder."""
    names = ("image_size", "patch_size", "vocab_size", "max_text_len", "init_std")
    own: dict[str, Any] = {name: getattr(model, name) for name in names}
    return MultiwayShape(dim=dim, depth=depth, heads=heads, ffn_dim=ffn_dim, norm_eps=model.image_norm_eps, **own)


def problems(stage: Any, name: str) -> list[str]:
    """As Model.problems, of a model called `name`."""
    found = []
    if stage.drop_path:
        found.append(f"drop_path={stage.drop_path}: {name} has none; set it to 0")
    if any(further.layout.causal for objective in stage.objectives for further in objective.passes(_SOME)):
        found.append(f"captioning: {name} sees whole texts; take the objective out")
    return found


def patch_problems(stage: Any, name: str) -> list[str]:
    """As Model.problems, of a model called `name` whose pairs have one row beside their words'."""
    return [
        f"the objective {objective.name} reads the patches of fused pairs, of which {name} gives none; take that out "
        "(matching: set alignment=0), or use CoAttention, SingleStream or a Multiway model"
        for objective in stage.objectives
        if objective.reads_patches
    ]


def flops(layout: Layout, image: MultiwayShape, text: MultiwayShape) -> int:
    """Of the pictures' and the words' own blocks, as Model.flops."""
    pictures = Layout(images=layout.images + layout.pairs, patches=layout.patches)
    sizes = {"dim": image.dim, "depth": image.depth, "ffn_dim": image.ffn_dim}
    total = encoder_flops(pictures, patch_inputs=3 * image.patch_size**2, **sizes)
    sizes = {"dim": text.dim, "depth": text.depth, "ffn_dim": text.ffn_dim}
    for count, length in ((layout.texts, layout.text_len), (layout.pairs, layout.pair_len)):
        total += int(count * flops_per_sequence(length, **sizes))
    return total


def asking_flops(layout: Layout, dim: int) -> int:
    """Of one attention in which the words of pairs ask their pictures' rows, both `dim` wide."""
    words, rows = layout.pairs * layout.pair_len, layout.pairs * layout.image_len
    products = product_flops([Product(round(2 * words), dim, dim), Product(2 * rows, dim, dim)])
    return products + round(3 * 2 * 2 * words * layout.image_len * dim)


def fitted(
    state: State, old: MultiwayShape, new: MultiwayShape, wanted: Mapping[str, tuple[int, ...]], *, last: int = 0
) -> State:
    """As Model.adapt: positions of another grid, fewer words, more words in the vocabulary, whose `last` ids stay the
    last."""
    adapted = {}
    for name, value in state.items():
        if name.endswith("vision_embed.positions"):
            value = resize_patch_positions(value, old.grid, new.grid)
        elif name.endswith("text_embed.positions"):
            value = value[: new.max_text_len]
        elif len(value) == old.vocab_size < wanted[name][0] == new.vocab_size:
            words, own = value.split([len(value) - last, last])
            value = torch.cat([grow_vocabulary(words, new.vocab_size - last), own])
        adapted[name] = value
    return adapted
