"""A Multiway encoder (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358) for transformers: pictures, texts, or both fused.

Written by Imglish (pretrain.export to-hf), which trained the weights; it computes the same, one kind at a time.
Shapes: N sequences, I rows of a picture (its class row and its patches), L words, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_multiway import MultiwayConfig


@dataclass
class MultiwayOutput(ModelOutput):
    """`image_rows` [N, I, D] and `text_rows` [N, L, D] after the final norm; of padding anything."""

    image_rows: torch.Tensor | None = None
    text_rows: torch.Tensor | None = None


class VisionEmbedding(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.grid, self.patch = cfg.image_size // cfg.patch_size, cfg.patch_size
        self.proj = nn.Linear(3 * cfg.patch_size**2, cfg.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.positions = None if cfg.relative_position else nn.Parameter(torch.zeros(self.grid**2 + 1, cfg.dim))

    def forward(self, pixels):
        n, g, p = len(pixels), self.grid, self.patch
        patches = pixels.view(n, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, 3 * p * p)
        x = torch.cat([self.cls_token.expand(n, -1, -1), self.proj(patches.to(self.proj.weight.dtype))], 1)
        return x if self.positions is None else x + self.positions


class TextEmbedding(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.positions = None if cfg.relative_position else nn.Parameter(torch.zeros(cfg.max_text_len, cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.text_norm else None

    def forward(self, ids, seen):
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions[: ids.shape[1]]
        x = x if self.norm is None else self.norm(x)
        return x.masked_fill(~seen[..., None], 0)


class RelativePosition(nn.Module):
    """VLMo's bias: a number for each offset, head and layer; see Imglish's models/multiway/embeddings.py."""

    def __init__(self, cfg):
        super().__init__()
        self.grid, self.longest, self.depth = cfg.image_size // cfg.patch_size, cfg.max_text_len, cfg.depth
        self.image_rows = (2 * self.grid - 1) ** 2 + 3
        self.table = nn.Parameter(torch.zeros(self.image_rows + 2 + 2 * cfg.max_text_len, cfg.depth * cfg.heads))

    def forward(self, pictures, words):
        """-> [heads, rows, rows] for each layer, of `pictures` (whether there are any) and texts of `words`."""
        parts = ([self._image()] if pictures else []) + ([self._text(words)] if words else [])
        index = parts[0]
        if len(parts) == 2:
            across = index.new_full((words, len(index)), self.image_rows)
            index = torch.cat([torch.cat([index, across.T + 1], 1), torch.cat([across, parts[1]], 1)])
        return F.embedding(index, self.table).permute(2, 0, 1).chunk(self.depth)

    def _image(self):
        place = torch.arange(self.grid**2, device=self.table.device)
        down, right, side = place // self.grid, place % self.grid, 2 * self.grid - 1
        offset = (down[:, None] - down + self.grid - 1) * side + right[:, None] - right + self.grid - 1
        return self._framed(offset, self.image_rows)

    def _text(self, length):
        place = torch.arange(length - 1, device=self.table.device)
        return self._framed(place - place[:, None] + self.longest - 2 + self.image_rows + 2, len(self.table))

    @staticmethod
    def _framed(offset, end):
        index = F.pad(offset, (1, 0, 1, 0), value=end - 3)
        index[1:, 0], index[0, 0] = end - 2, end - 1
        return index


def each(names, make):
    return nn.ModuleDict({name: make() for name in names})


def of(modules, kind):
    """The module for rows of a kind, or the one for all."""
    return modules["shared"] if "shared" in modules else modules[kind]


class Expert(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.up, self.down = nn.Linear(cfg.dim, cfg.ffn_dim), nn.Linear(cfg.ffn_dim, cfg.dim)
        self.inner_norm = nn.LayerNorm(cfg.ffn_dim, eps=cfg.norm_eps) if cfg.sub_norm else None

    def forward(self, x):
        x = F.gelu(self.up(self.norm(x)))
        return self.down(x if self.inner_norm is None else self.inner_norm(x))


class Attention(nn.Module):
    def __init__(self, cfg, names):
        super().__init__()
        self.heads, d = cfg.heads, cfg.dim
        inner = cfg.heads * (cfg.head_dim or d // cfg.heads)  # less than d where heads were pruned
        self.q, self.v = (each(names, lambda: nn.Linear(d, inner)) for _ in range(2))
        self.k = each(names, lambda: nn.Linear(d, inner, bias=cfg.key_bias))
        self.out = each(names, lambda: nn.Linear(inner, d))
        self.inner_norm = each(names, lambda: nn.LayerNorm(inner, eps=cfg.norm_eps)) if cfg.sub_norm else None

    def forward(self, parts, mask):
        def project(layer):
            rows = torch.cat([of(layer, kind)(x) for kind, x in parts.items()], 1)
            return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = project(self.q), project(self.k), project(self.v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
        split = dict(zip(parts, y.split([x.shape[1] for x in parts.values()], 1), strict=True))
        if self.inner_norm is not None:
            split = {kind: of(self.inner_norm, kind)(x) for kind, x in split.items()}
        return {kind: of(self.out, kind)(x) for kind, x in split.items()}


class Block(nn.Module):
    def __init__(self, cfg, names, fusion):
        super().__init__()
        self.norm = each(names, lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps))
        self.attention = Attention(cfg, names)
        order = ["vision", "fusion", "language"] if fusion else ["vision", "language"]
        order = ["shared"] if cfg.ffn == "shared" else [name for name in order if name in cfg.experts]
        self.experts = each(order, lambda: Expert(cfg))
        scaled = cfg.layer_scale is not None
        self.attention_scale = nn.Parameter(torch.ones(cfg.dim)) if scaled else None
        self.expert_scale = nn.Parameter(torch.ones(cfg.dim)) if scaled else None

    def forward(self, parts, mask):
        attended = self.attention({kind: of(self.norm, kind)(x) for kind, x in parts.items()}, mask)
        fused = len(parts) == 2 and "fusion" in self.experts
        out = {}
        for kind, x in parts.items():
            branch = attended[kind]
            x = x + (branch if self.attention_scale is None else branch * self.attention_scale)
            branch = of(self.experts, "fusion" if fused else kind)(x)
            out[kind] = x + (branch if self.expert_scale is None else branch * self.expert_scale)
        return out


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.vision_embed: Any = VisionEmbedding(cfg) if "vision" in cfg.experts else None
        self.text_embed: Any = TextEmbedding(cfg) if "language" in cfg.experts else None
        self.relative_position = RelativePosition(cfg) if cfg.relative_position else None
        names = ["shared"] if cfg.attention == "shared" else [n for n in ("vision", "language") if n in cfg.experts]
        first = cfg.depth - cfg.fusion_layers
        self.blocks = nn.ModuleList(Block(cfg, names, number >= first) for number in range(cfg.depth))
        self.norm = each(names, lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.final_norm else nn.Identity())

    def forward(self, pixels, ids, seen):
        parts = {}
        if pixels is not None:
            parts["vision"] = self.vision_embed(pixels)
        if ids is not None:
            seen = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen.bool()
            parts["language"] = self.text_embed(ids, seen)
        mask = None
        if ids is not None and not seen.all():
            keys = F.pad(seen, (parts["vision"].shape[1], 0), value=True) if pixels is not None else seen
            mask = keys[:, None, None, :]
        biases = [None] * len(self.blocks)
        if self.relative_position is not None:
            biases = self.relative_position(pixels is not None, 0 if ids is None else ids.shape[1])
        for block, bias in zip(self.blocks, biases, strict=True):
            own = mask
            if bias is not None:
                own = bias[None] if mask is None else torch.where(mask, bias, -torch.inf)
            parts = block(parts, own)
        return {kind: of(self.norm, kind)(x) for kind, x in parts.items()}


class MultiwayModel(PreTrainedModel):
    config_class = MultiwayConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Encoder(config)
        width = config.embed_dim
        self.vision_head = None if width is None else nn.Linear(config.dim, width, bias=config.head_bias)
        self.language_head = None if width is None else nn.Linear(config.dim, width, bias=config.head_bias)
        self.logit_scale = None if width is None else nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1)) if config.sigmoid else None
        self.word_head = nn.Linear(config.dim, config.vocab_size) if config.words else None
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the weights are those of the file."""

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, return_dict=True):
        """Pictures float [N, 3, S, S] in [-1, 1], texts int64 [N, L], or both, fused. `attention_mask`: 1 at words."""
        if pixel_values is None and input_ids is None:
            raise ValueError("the model got neither pixel_values nor input_ids; give one of them, or both")
        rows = self.encoder(pixel_values, input_ids, attention_mask)
        out = MultiwayOutput(image_rows=rows.get("vision"), text_rows=rows.get("language"))
        return out if return_dict else out.to_tuple()

    def get_image_features(self, pixel_values):
        """-> unit vectors [N, E] of the dual encoder."""
        return F.normalize(self._head(self.vision_head)(self(pixel_values).image_rows[:, 0]).float(), dim=-1)

    def get_text_features(self, input_ids, attention_mask=None):
        """-> unit vectors [N, E] of the dual encoder."""
        rows = self(input_ids=input_ids, attention_mask=attention_mask).text_rows
        return F.normalize(self._head(self.language_head)(rows[:, 0]).float(), dim=-1)

    def word_logits(self, text_rows):
        """[N, L, D] -> [N, L, vocab_size]: what a <mask> in its place stands for."""
        return self._head(self.word_head)(text_rows)

    @staticmethod
    def _head(head: Any) -> Any:
        if head is None:
            raise ValueError("these weights have no such head; see config.json: embed_dim and words")
        return head
