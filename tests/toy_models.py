"""Toy models and random batches for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pretrain.batch import BOS, DROP_PATH, EOS, PAD, Batch, Layout, make_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig

EXPERTS = ("vision", "language", "fusion")
PAPER = MultiwayConfig(
    dim=32, depth=3, heads=4, ffn_dim=64, image_size=32, patch_size=8, vocab_size=50, max_text_len=12, fusion_layers=2
)
RELEASED = replace(PAPER, attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm")
VLMO = replace(PAPER, layer_scale=0.1, relative_position=True, key_bias=False, text_norm=True)
CONFIGS = {"paper": PAPER, "released": RELEASED, "vlmo": VLMO}
CODES = 12  # classes of image heads
VQ = VQKDConfig(
    dim=32, depth=1, heads=2, decoder_depth=1, image_size=16, patch_size=4, codes=16, code_dim=8, target_dim=12,
    distill="mse",
)  # fmt: skip

PATCHES, PAIR_LEN, TEXT_LEN = PAPER.patches, 7, 9
ROUTES = {
    "vision": Layout(3, 0, 0, PATCHES),
    "language": Layout(0, 0, 4, 0, 0, TEXT_LEN),
    "fusion": Layout(0, 2, 0, PATCHES, PAIR_LEN),
    "dual": Layout(3, 0, 3, PATCHES, 0, TEXT_LEN, dual=3),
    "captioning": Layout(0, 2, 0, PATCHES, PAIR_LEN, causal=True),
    "masked data": Layout(3, 2, 4, PATCHES, PAIR_LEN, TEXT_LEN),
}


def pictures(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def random_batch(
    layout: Layout, seed: int = 0, *, cfg: MultiwayConfig = PAPER, padded: bool = True, drop_path: bool = False
) -> Batch:
    """With hidden patches and words and their targets; `padded`: texts of many lengths; `drop_path`: with its draws."""
    generator = torch.Generator().manual_seed(seed)
    count = layout.images + layout.pairs

    def text(kind: str, count: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(4, cfg.vocab_size - 1, (count, length), generator=generator)
        ids[:, :1], ids[:, length - 1 :] = BOS, EOS
        for row in range(count if padded else 0):
            end = 2 + row % (length - 2)
            ids[row, end], ids[row, end + 1 :] = EOS, PAD
        masked = (torch.rand(ids.shape, generator=generator) < 0.4) & (ids > EOS)
        inputs = ids.masked_fill(masked, cfg.vocab_size - 1)
        return {f"{kind}_tokens": ids, f"{kind}_inputs": inputs, f"{kind}_masked": masked}

    draws = torch.rand(layout.sequences, 2 * cfg.depth, generator=generator)
    return make_batch(
        layout,
        images=pictures(count, cfg.image_size, seed),
        image_masks=torch.rand(count, layout.patches, generator=generator) < 0.4,
        image_codes=torch.randint(CODES, (count, layout.patches), generator=generator),
        **text("pair", layout.pairs, layout.pair_len),
        **text("text", layout.texts, layout.text_len),
        draws={DROP_PATH: draws} if drop_path else {},
    )


NONE, ALL = slice(0), slice(None)


def part_of(batch: Batch, images: slice = NONE, pairs: slice = NONE, texts: slice = NONE, dual: int = 0) -> Batch:
    """Some of the sequences of a batch, as a batch of their own."""
    layout = batch.layout
    alone, paired = range(layout.images)[images], range(layout.pairs)[pairs]
    pictures = [*alone, *(layout.images + pair for pair in paired)]
    parts = {name: getattr(batch, name)[pictures] for name in ("images", "image_masks", "image_codes")}
    for kind, own in (("pair", pairs), ("text", texts)):
        parts |= {name: getattr(batch, name)[own] for name in (f"{kind}_tokens", f"{kind}_inputs", f"{kind}_masked")}
    counts = {"images": len(alone), "pairs": len(paired), "texts": len(parts["text_tokens"]), "dual": dual}
    return make_batch(replace(layout, **counts), **parts)


def encoder(
    cfg: MultiwayConfig = PAPER, experts: tuple[str, ...] = EXPERTS, seed: int = 0, **options: float
) -> MultiwayEncoder:
    """Its biases and norms are away from 0 and 1, so that a swapped one shows."""
    torch.manual_seed(seed)
    model = MultiwayEncoder(cfg, experts, **options)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def encoder_of(state: dict[str, Tensor], cfg: MultiwayConfig) -> MultiwayEncoder:
    """The encoder for images and texts in a stage's tensors."""
    model = MultiwayEncoder(cfg, ("vision", "language"))
    model.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    return model
