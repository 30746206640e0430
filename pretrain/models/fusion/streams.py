"""What the encoders of this room share: how a batch's pictures and words become rows, how weights of other sizes are
made to fit, their FLOPs, and why a stage cannot train one."""

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
    """A batch's pictures through a vision encoder -> [images + pairs, image_len, dim]. `known` [n, image_len, dim]: the
    rows of the first n pairs' pictures from an earlier pass, which are not encoded again."""
    layout, first = batch.layout, 0 if known is None else len(known)
    assert not (first and layout.images), layout
    only = Layout(images=layout.images + layout.pairs - first, patches=encoder.cfg.patches)
    if only.images:
        rows = encoder(pictures_alone(only, batch, first)).images
    else:  # an evaluation of texts alone, or all pictures are known
        rows = encoder.blocks[0].norm["shared"].weight.new_zeros(0, only.image_len, encoder.cfg.dim)
    return rows if known is None else torch.cat([known, rows])


def pictures_alone(only: Layout, batch: Batch, first: int = 0) -> Batch:
    """A batch's pictures from number `first` on, as images of the layout `only`. The index is made on the host, so that
    nothing waits for the device."""
    own, host = (
        make_batch(only, images=each.images[first:], image_masks=each.image_masks[first:])
        for each in (batch, batch.on_host)
    )
    index = host.indexed().index
    assert index is not None
    return own.with_index(index.map(partial(sent, device=batch.images.device)), None)


def words(embed: TextEmbedding, batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch's texts, those of pairs first, padded to one length L -> their rows [pairs + texts, L, dim], and a mask
    for attention, bool [pairs + texts, 1, 1, L], False at padding."""
    length = max(batch.layout.pair_len, batch.layout.text_len, 1)
    rows = torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in embed(batch)])
    seen = torch.cat([F.pad(part, (0, length - part.shape[1])) for part in batch.keys_seen])
    return rows, seen[:, None, None]


def run(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`block(*inputs)`; with `recompute` the backward pass computes it again from its inputs and keeps nothing else."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def vit_shape(model: Any, *, dim: int, depth: int, heads: int, ffn_dim: int) -> MultiwayShape:
    """The shape of a model's vision encoder; what is not given comes from the model's fields of the same names."""
    names = ("image_size", "patch_size", "vocab_size", "max_text_len", "init_std")
    own: dict[str, Any] = {name: getattr(model, name) for name in names}
    return MultiwayShape(dim=dim, depth=depth, heads=heads, ffn_dim=ffn_dim, norm_eps=model.image_norm_eps, **own)


def problems(stage: Any, name: str) -> list[str]:
    """Model.problems of a model called `name` that has no drop path and no causal pass."""
    problems = []
    if stage.drop_path:
        problems.append(f"drop_path={stage.drop_path}: {name} has none; set it to 0")
    for objective in stage.objectives:
        if any(further.layout.causal for further in objective.passes(_SOME)):
            problems.append(
                f"the objective {objective.name} predicts words from those before them, and in {name} each word sees "
                "the whole text; take the objective out, or use a Multiway model or EncoderDecoder"
            )
    return problems


def patch_problems(stage: Any, name: str) -> list[str]:
    """Model.problems of a model called `name` whose pairs have no rows of patches."""
    return [
        f"the objective {objective.name} reads the patches of fused pairs, which {name} does not fuse; take it out "
        "(matching: set alignment=0), or use CoAttention, SingleStream or a Multiway model"
        for objective in stage.objectives
        if objective.reads_patches
    ]


def flops(layout: Layout, image: MultiwayShape, text: MultiwayShape) -> int:
    """The part of Model.flops in the pictures' and the words' own blocks."""
    pictures = Layout(images=layout.images + layout.pairs, patches=layout.patches)
    sizes = {"dim": image.dim, "depth": image.depth, "ffn_dim": image.ffn_dim}
    total = encoder_flops(pictures, patch_inputs=3 * image.patch_size**2, **sizes)
    sizes = {"dim": text.dim, "depth": text.depth, "ffn_dim": text.ffn_dim}
    for count, length in ((layout.texts, layout.text_len), (layout.pairs, layout.pair_len)):
        total += int(count * flops_per_sequence(length, **sizes))
    return total


def cross_attention_flops(layout: Layout, dim: int) -> int:
    """The FLOPs of one attention of the words of pairs to their pictures' rows, both `dim` wide."""
    words, rows = layout.pairs * layout.pair_len, layout.pairs * layout.image_len
    products = product_flops([Product(round(2 * words), dim, dim), Product(2 * rows, dim, dim)])
    return products + round(3 * 2 * 2 * words * layout.image_len * dim)


def fitted(
    state: State, old: MultiwayShape, new: MultiwayShape, wanted: Mapping[str, tuple[int, ...]], *, last: int = 0
) -> State:
    """Model.adapt for positions of another grid, for fewer text positions, and for a larger vocabulary, whose `last`
    ids stay its last."""
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
