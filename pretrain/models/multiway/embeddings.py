"""From pictures and token ids to rows: the layers before the first block, and VLMo's relative positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import PAD, Batch, Layout
from pretrain.layers import PLAIN, Layers, Linear, normal
from pretrain.models.attention import Bias
from pretrain.models.multiway.shape import MultiwayShape


class VisionEmbedding(nn.Module):
    """Patches, the class row and their learned positions. Reference: torchscale 0.3.0, VisionEmbedding. Its patch
    convolution is a linear layer here, with the same weights in the same order."""

    def __init__(self, cfg: MultiwayShape):
        super().__init__()
        self.grid, self.patch_size = cfg.grid, cfg.patch_size
        self.proj = Linear(3 * cfg.patch_size**2, cfg.dim, std=cfg.init_std)
        self.cls_token = normal(1, 1, cfg.dim, std=cfg.init_std)
        self.mask_token = normal(1, 1, cfg.dim, std=cfg.init_std)
        self.positions = None if cfg.relative_position else normal(cfg.patches + 1, cfg.dim, std=cfg.init_std)

    def forward(self, batch: Batch) -> Tensor:
        """-> [images + pairs, image_len, dim]."""
        x = self.proj(self._cut(batch.images))
        x = torch.where(batch.image_masks.view(*x.shape[:2], 1), self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x if self.positions is None else x + self.positions

    def _cut(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> normalised patches [N, P, 3 * patch_size**2]; bytes are cut before they become floats."""
        n, g, p = len(images), self.grid, self.patch_size
        if n == 0:
            return self.mask_token.new_zeros(0, g * g, 3 * p * p)
        if images.shape[1:] != (3, g * p, g * p):
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])} do not fit image_size={g * p}; "
                f"resize them or set model.image_size={images.shape[-1]}"
            )
        x = images.view(n, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, 3 * p * p)
        x_float = x.to(self.mask_token.dtype)
        return x_float.div_(127.5).sub_(1) if x.dtype == torch.uint8 else x_float


class TextEmbedding(nn.Module):
    """Token embeddings and their learned positions. Reference: torchscale 0.3.0, TextEmbedding."""

    def __init__(self, cfg: MultiwayShape, layers: Layers = PLAIN):
        super().__init__()
        self.max_text_len = cfg.max_text_len
        self.tokens = layers.vocabulary(cfg.vocab_size, cfg.dim, std=cfg.init_std)
        self.positions = None if cfg.relative_position else normal(cfg.max_text_len, cfg.dim, std=cfg.init_std)
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.text_norm else None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> [pairs, pair_len, dim], [texts, text_len, dim]; rows of padding are zero. ValueError for a text longer
        than `max_text_len`."""
        ids = (batch.pair_inputs, batch.text_inputs)
        longest = max(i.shape[1] for i in ids)
        if longest > self.max_text_len:
            raise ValueError(
                f"a text of {longest} tokens is longer than model.max_text_len={self.max_text_len}; "
                f"set it to {longest} or shorten the source's text_len"
            )
        # One look-up for both kinds: the gradient of a large table is made once.
        both = self.tokens(torch.cat([i.flatten() for i in ids]))
        pairs, texts = both.split([i.numel() for i in ids])
        pairs, texts = (self._place(x.view(*i.shape, x.shape[-1])) for x, i in zip((pairs, texts), ids, strict=True))
        return pairs.masked_fill(ids[0][..., None] == PAD, 0), texts.masked_fill(ids[1][..., None] == PAD, 0)

    def at(self, ids: Tensor, first: int) -> Tensor:
        """Words int64 [N, L] without padding, at the positions from `first` on -> [N, L, dim]."""
        return self._place(self.tokens(ids), first)

    def _place(self, x_NLD: Tensor, first: int = 0) -> Tensor:
        if self.positions is not None:
            x_NLD = x_NLD + self.positions[first : first + x_NLD.shape[1]]
        return x_NLD if self.norm is None else self.norm(x_NLD)


class RelativePosition(nn.Module):
    """Relative position bias: a learned number per head, layer and offset is added to the attention scores, instead of
    positions in the embedding. As in VLMo (unilm vlmo/modules/vlmo_module.py, build_relative_position_embed) there is
    one table for all layers, its rows in the order

        (2 g - 1)^2 offsets of two patches | 3 from, to and within the class row | 2 text to image, image to text
        | 2 L - 3 offsets of two words | 3 from, to and within BOS            (g patches a side, L max_text_len)

    so that its first rows can be taken from a BEiT checkpoint. "A to B" is a query of A with a key of B."""

    def __init__(self, cfg: MultiwayShape, layers: Layers = PLAIN):
        super().__init__()
        self.grid, self.longest, self.depth = cfg.grid, cfg.max_text_len, cfg.depth
        self.own_heads = layers.own_heads
        self.image_rows = offsets_of(cfg.grid) + 3
        self.table = nn.Parameter(torch.zeros(self.image_rows + 2 + 2 * cfg.max_text_len, cfg.depth * cfg.heads))

    def forward(self, layout: Layout) -> list[Bias]:
        """The bias of every block, for this rank's heads and for the kinds of sequences that `layout` has."""
        table = self.own_heads(self.table.unflatten(1, (self.depth, -1))).flatten(1)
        image, text = image_index(self.grid, self.table.device), self._text_index(layout.text_len)
        pairs = texts = None
        if layout.pairs:
            pairs = self._look_up(table, pair_index(image, self._text_index(layout.pair_len), self.image_rows))
        if layout.texts:
            texts = self._look_up(table, text)
        images: tuple[Tensor, ...] | None
        if pairs is not None:
            images = tuple(bias[:, : layout.image_len, : layout.image_len] for bias in pairs)
        else:
            images = self._look_up(table, image) if layout.images else None
        kinds = [kind or (None,) * self.depth for kind in (images, pairs, texts)]
        return [Bias(*each) for each in zip(*kinds, strict=True)]

    def _look_up(self, table: Tensor, index_LL: Tensor) -> tuple[Tensor, ...]:
        """int64 [L, L] -> float [heads, L, L] per layer."""
        return F.embedding(index_LL, table).permute(2, 0, 1).contiguous().chunk(self.depth)

    def _text_index(self, length: int) -> Tensor:
        return text_index(length, self.longest, self.image_rows, self.table.device)


def offsets_of(grid: int) -> int:
    """How many offsets two patches of a grid can have."""
    return (2 * grid - 1) ** 2


def image_index(grid: int, device: torch.device) -> Tensor:
    """int64 [L, L]: the row of RelativePosition's table for each query and key of a picture, L = grid * grid + 1."""
    # By rows and columns: ONNX has no remainder by a number that is only known when the graph runs.
    side = torch.arange(grid, device=device)
    down, right = side[:, None].expand(grid, grid).flatten(), side.expand(grid, grid).flatten()
    offset = (down[:, None] - down + grid - 1) * (2 * grid - 1) + right[:, None] - right + grid - 1
    return _with_first_row(offset, offsets_of(grid) + 3)


def text_index(length: int, longest: int, image_rows: int, device: torch.device) -> Tensor:
    """int64 [length, length]: the same for a text of `length` words, in a table for `longest` words. `image_rows`: the
    number of its rows for pictures."""
    place = torch.arange(max(length - 1, 0), device=device)
    offset = place - place[:, None] + longest - 2 + image_rows + 2
    return _with_first_row(offset, image_rows + 2 + 2 * longest)


def pair_index(image: Tensor, text: Tensor, image_rows: int) -> Tensor:
    """int64 [query, key]: the same for a pair, from its `image_index` and its `text_index`. VLMo puts the text first
    and we the image: the same four blocks in another order."""
    to_image = image.new_full((text.shape[0], image.shape[0]), image_rows)
    above, below = torch.cat([image, to_image.T + 1], 1), torch.cat([to_image, text], 1)
    return torch.cat([above, below])


def _with_first_row(offset: Tensor, end: int) -> Tensor:
    """An index of offsets [n, n] -> [n + 1, n + 1], with a class row or BOS before it, which has no offset: it uses the
    three rows of the table before `end`, for from, to and within it."""
    n = offset.shape[0]  # len() would be a constant to torch.export
    first = torch.cat([offset.new_full((1, 1), end - 1), offset.new_full((1, n), end - 3)], 1)
    return torch.cat([first, torch.cat([offset.new_full((n, 1), end - 2), offset], 1)])
