"""The visual tokenizer: vector-quantised knowledge distillation (VQ-KD, BEiT v2, arXiv 2208.06366, section 2.1).

A small ViT encodes an image, each patch is replaced by the nearest of `codes` unit vectors, and a decoder must predict
from those vectors alone a teacher's features of the image. The codes are then the targets of masked image modeling.

N images, P patches of one image (without its class row), D width, K codes, C width of a code.

One optimizer step of a training loop, whatever the number of ranks and of accumulated micro-batches:

    model.start_codebook(images of this rank's micro-batches of the first step)    # does nothing after a resume
    for each micro-batch: engine.backward(engine(images, teacher(images))["loss"])
    engine.step(); model.after_step()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import layers
from pretrain.batch import Layout
from pretrain.contracts import Model
from pretrain.flops import encoder_flops
from pretrain.layers import normal
from pretrain.models.visual_tokenizer.codebook import Codebook, nearest

IMAGES_AT_ONCE = 256  # that `encode` holds activations of


@dataclass(frozen=True)
class VQKDConfig(Model):
    """Sizes of the tokenizer; the defaults are BEiT v2's base. Take `target_dim` and `distill` from the teacher."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_depth: int = 3
    image_size: int = 224
    patch_size: int = 16
    codes: int = 8192
    code_dim: int = 32
    target_dim: int = 512  # width of the teacher's target for one patch; CLIP ViT-B/16: 512
    distill: str = "cosine"  # "cosine": 1 - cosine similarity (features); "mse": squared error (pixels)
    decay: float = 0.99  # of the codebook's moving average, per optimizer step
    beta: float = 1.0  # weight of the commitment loss
    restart_after: int | None = None  # steps without use after which a code starts anew; None: never, as BEiT v2
    norm_eps: float = 1e-6
    # Where the normal distributions of the initial weights end. "cut": matrices at two standard deviations, positions
    # and class rows at one, so that they start with 0.88 and 0.54 of the std given. "normal": nowhere, as BEiT v2.
    init: str = "cut"
    vocab_size: ClassVar[int] = 0  # type: ignore[misc]  # it reads no text
    encodes = False  # see tasks/tokenizer.py

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "image_size", "patch_size", "codes", "code_dim", "target_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer {name}={getattr(self, name)} is wrong because it must be at least 1")
        if self.decoder_depth < 0:
            raise ValueError(f"tokenizer decoder_depth={self.decoder_depth} is negative; use 0 for no decoder block")
        if self.dim % self.heads:
            raise ValueError(
                f"tokenizer dim={self.dim} is not a multiple of heads={self.heads}; "
                f"use dim={self.heads * math.ceil(self.dim / self.heads)} or other heads"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"tokenizer image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"use image_size={self.patch_size * math.ceil(self.image_size / self.patch_size)}"
            )
        if self.distill not in ("cosine", "mse"):
            raise ValueError(
                f"tokenizer distill={self.distill!r} is unknown; use 'cosine' (features) or 'mse' (pixels)"
            )
        if self.init not in ("cut", "normal"):
            raise ValueError(f"tokenizer init={self.init!r} is unknown; use 'normal' (BEiT v2's) or 'cut'")
        if not 0 <= self.decay < 1:
            raise ValueError(f"tokenizer decay={self.decay} must lie in [0, 1); BEiT v2 uses 0.99")
        if self.beta < 0:
            raise ValueError(f"tokenizer beta={self.beta} must not be negative; BEiT v2 uses 1.0")
        if self.restart_after is not None and self.restart_after < 1:
            raise ValueError(
                f"tokenizer restart_after={self.restart_after} must be at least 1 step; use None for never"
            )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def init_std(self) -> float:
        """The standard deviation of every matrix behind the embeddings: BEiT v2's 0.02 at its width, and scaled to give
        as strong a signal at any other. With 0.02 at width 32 a tokenizer of coloured blocks needed 250 steps for what
        takes 50 with this."""
        return 0.02 * math.sqrt(768 / self.dim)

    def build(self, experts: Sequence[str] = (), *_: Any, **__: Any) -> VQKD:
        """The whole tokenizer, whatever the stage's experts: it is trained by tasks/tokenizer.py."""
        return VQKD(self)

    def width(self, kind: str) -> int:
        return self.dim

    def flops(self, layout: Layout) -> int:
        return self.encoder_flops(layout.images, self.depth + self.decoder_depth)

    def encoder_flops(self, images: int, depth: int | None = None) -> int:
        """The FLOPs of a forward and backward pass of `images` through `depth` blocks; None: the encoder's."""
        pictures, depth = Layout(images=images, patches=self.patches), self.depth if depth is None else depth
        inputs = 3 * self.patch_size**2
        return encoder_flops(pictures, dim=self.dim, depth=depth, ffn_dim=4 * self.dim, patch_inputs=inputs)


def centred(images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as floats in [-1, 1]: uint8 ones are scaled, float ones must be in that range already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_patches(images: Tensor, size: int) -> Tensor:
    """[N, 3, g * size, g * size] -> [N, g * g, 3 * size * size], in raster order, as a convolution of that stride."""
    N, _, height, width = images.shape
    cut = images.reshape(N, 3, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(N, -1, 3 * size * size)


class Linear(layers.Linear):
    """A linear layer that computes in its input's type; drawn as `cfg.init` says."""

    def __init__(self, cfg: VQKDConfig, inputs: int, outputs: int, *, std: float):
        super().__init__(inputs, outputs, std=std, cut=2.0 if cfg.init == "cut" else math.inf)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each behind its norm."""

    def __init__(self, cfg: VQKDConfig, block: int):
        super().__init__()
        self.heads = cfg.heads
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) for _ in range(2))
        std, branch_std = cfg.init_std, cfg.init_std / math.sqrt(2 * block)  # BEiT's fix_init_weight
        self.qkv, self.out = Linear(cfg, cfg.dim, 3 * cfg.dim, std=std), Linear(cfg, cfg.dim, cfg.dim, std=branch_std)
        self.up, self.down = (
            Linear(cfg, cfg.dim, 4 * cfg.dim, std=std),
            Linear(cfg, 4 * cfg.dim, cfg.dim, std=branch_std),
        )

    def forward(self, x_NPD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_NPD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_NPD = x_NPD + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_NPD + self.down(F.gelu(self.up(self.norm2(x_NPD))))


class Transformer(nn.Module):
    """A plain ViT over patch rows [N, P, inputs] -> [N, P, D], with a class row inside (as BEiT v2's encoder and
    decoder both have) and learned positions."""

    def __init__(self, cfg: VQKDConfig, *, inputs: int, depth: int):
        super().__init__()
        # With torch's initial weights, which are larger: a code's 32 numbers must not drown in the positions.
        self.embed = nn.Linear(inputs, cfg.dim)
        cut = 1.0 if cfg.init == "cut" else math.inf
        self.class_row = normal(1, 1, cfg.dim, std=0.02, cut=cut)
        self.positions = normal(1, cfg.patches, cfg.dim, std=0.02, cut=cut)
        self.blocks = nn.ModuleList(Block(cfg, block) for block in range(1, depth + 1))
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)

    def forward(self, rows: Tensor) -> Tensor:
        x_NPD = self.embed(rows.to(self.embed.weight.dtype)) + self.positions
        x_NPD = torch.cat([self.class_row.expand(len(x_NPD), -1, -1), x_NPD], dim=1)
        for block in self.blocks:
            x_NPD = block(x_NPD)
        return self.norm(x_NPD[:, 1:])


def task_head(cfg: VQKDConfig, outputs: int) -> nn.Sequential:
    """BEiT v2's head behind the encoder and behind the decoder."""
    std = cfg.init_std
    return nn.Sequential(Linear(cfg, cfg.dim, cfg.dim, std=std), nn.Tanh(), Linear(cfg, cfg.dim, outputs, std=std))


class VQKD(nn.Module):
    """The visual tokenizer: images to codes, and codes to a teacher's targets. The teacher is no part of it."""

    def __init__(self, cfg: VQKDConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Transformer(cfg, inputs=3 * cfg.patch_size**2, depth=cfg.depth)
        self.encoder_head = task_head(cfg, cfg.code_dim)
        self.codebook = Codebook(cfg.codes, cfg.code_dim, decay=cfg.decay, restart_after=cfg.restart_after)
        self.decoder = Transformer(cfg, inputs=cfg.code_dim, depth=cfg.decoder_depth)
        self.decoder_head = task_head(cfg, cfg.target_dim)

    @property
    def started(self) -> bool:
        """Whether `start_codebook` has run, here or before the checkpoint that was loaded."""
        return bool(self.codebook.started)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Images (uint8, or float in [-1, 1]) [N, 3, H, W] and the teacher's targets [N, P, target_dim] -> scalars:
        `loss` = `distill` + beta * `commit`, and `codebook_use` as of the last `after_step`."""
        z = self.features(images)
        quantised, _ = self.codebook(z)
        # Straight-through estimator: the decoder reads the code's vector, and its gradient goes to the encoder's.
        prediction = self._decode(z + (quantised - z).detach())
        targets = targets.float()
        if self.cfg.distill == "cosine":
            distill = (1 - F.cosine_similarity(prediction, targets, dim=-1)).mean()
        else:
            distill = F.mse_loss(prediction, targets)
        commit = F.mse_loss(z, quantised)
        loss = distill + self.cfg.beta * commit
        return {"loss": loss, "distill": distill, "commit": commit, "codebook_use": self.codebook.use}

    def features(self, images: Tensor) -> Tensor:
        """The encoder's unit vectors fp32 [N, P, C], before they are quantised. ValueError for pictures of another
        size."""
        size = self.cfg.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"the tokenizer reads pictures [N, 3, {size}, {size}] (its image_size), not {list(images.shape)}; "
                f"give the data and the tokenizer one image_size"
            )
        rows = self.encoder(to_patches(centred(images), self.cfg.patch_size))
        with torch.autocast(rows.device.type, enabled=False):
            return F.normalize(self.encoder_head(rows.float()), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images as `forward` takes them -> codes int64 [N, P]. There is no dropout, so training and evaluation mode
        give the same codes, and nothing is tallied for `after_step`."""
        vectors = self.codebook.vectors
        codes = [nearest(self.features(part).flatten(0, 1), vectors)[0] for part in images.split(IMAGES_AT_ONCE)]
        return torch.cat(codes).view(len(images), self.cfg.patches)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes int64 [N, P] -> the decoder's predictions, fp32 [N, P, target_dim], which `PixelTeacher.picture` draws
        if it was the teacher."""
        return self._decode(F.embedding(codes, self.codebook.vectors))

    @torch.no_grad()
    def start_codebook(self, batches: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Starts the codes by k-means over all ranks' images of one global batch; does nothing if they have started.
        `batches` are this rank's micro-batches in order. The ranks' pictures in rank order are the global batch, so
        that every number of ranks gives the same codes. Each rank holds all vectors: N * P * C * 4 bytes."""
        if self.started:
            return
        self.codebook.start(torch.cat([self.features(images).flatten(0, 1) for images in batches]), group)

    def after_step(self, group: dist.ProcessGroup | None = None) -> None:
        """Updates the codebook after an optimizer step, over the data ranks in `group` (None: all)."""
        self.codebook.after_step(group)

    def _decode(self, quantised: Tensor) -> Tensor:
        return self.decoder_head(self.decoder(quantised)).float()
