"""Outputs and gradients against torchscale 0.3.0's BEiT3, the reference of the released architecture."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from pretrain.batch import PAD, Layout, make_batch
from pretrain.export import to_released
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder

CONFIG = MultiwayConfig(
    dim=48,
    depth=3,
    heads=4,
    ffn_dim=96,
    image_size=32,
    patch_size=8,
    vocab_size=60,
    max_text_len=20,
    attention="per_modality",
    sub_norm=True,
    init="sub_norm",
)
IMAGES, TEXTS, LENGTH = 3, 3, 9


def build_reference(cfg: MultiwayConfig) -> torch.nn.Module:
    """torchscale's model; timm (drop path) and fairscale (checkpointing) are imported by it but not used here."""
    stubs = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": lambda x, *_: x},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
    }
    for name, content in stubs.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        for attribute, value in content.items():
            setattr(module, attribute, getattr(module, attribute, value))
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    return BEiT3(
        EncoderConfig(
            img_size=cfg.image_size,
            patch_size=cfg.patch_size,
            vocab_size=cfg.vocab_size,
            multiway=True,
            no_output_layer=True,
            encoder_embed_dim=cfg.dim,
            encoder_attention_heads=cfg.heads,
            encoder_ffn_embed_dim=cfg.ffn_dim,
            encoder_layers=cfg.depth,
            max_source_positions=cfg.max_text_len + 2,
            layernorm_eps=cfg.norm_eps,
        )
    )


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms away from 0 and 1, so that a swapped one shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def models() -> tuple[MultiwayEncoder, torch.nn.Module]:
    torch.manual_seed(0)
    ours = perturbed(MultiwayEncoder(CONFIG, ("vision", "language")))
    state = {f"encoder.{key}": value for key, value in ours.state_dict().items()}
    reference = build_reference(CONFIG)
    released = {key.removeprefix("beit3."): value for key, value in to_released(state, CONFIG).items()}
    reference.load_state_dict(released, strict=True)
    return ours, reference


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["image", "text", "pair", "all"])
def test_outputs_and_gradients_equal_the_reference(models, kind, masked, padded):
    ours, reference = models
    torch.manual_seed(1)
    pictures = torch.randn(2 * IMAGES, 3, CONFIG.image_size, CONFIG.image_size)
    masks = torch.rand(2 * IMAGES, CONFIG.grid**2) < (0.4 if masked else 0)
    ids = torch.randint(4, CONFIG.vocab_size, (2 * TEXTS, LENGTH))
    if padded:
        for row, kept in enumerate((LENGTH, 4, 1, 2, LENGTH, 5)):
            ids[row, kept:] = PAD
    counts = {"image": (IMAGES, 0, 0), "text": (0, 0, TEXTS), "pair": (0, IMAGES, 0), "all": (IMAGES, IMAGES, TEXTS)}
    images, pairs, texts = counts[kind]
    own, other = pictures.clone().requires_grad_(), pictures.clone().requires_grad_()
    layout = Layout(images, pairs, texts, CONFIG.patches, LENGTH, LENGTH)
    batch = make_batch(
        layout,
        images=own[: images + pairs],
        image_masks=masks[: images + pairs],
        pair_tokens=ids[:pairs],
        text_tokens=ids[TEXTS : TEXTS + texts],
    )
    rows = ours(batch)

    # The reference takes the same sequences in up to three passes.
    parts = []
    if images:
        parts.append(reference(visual_tokens=other[:images], vision_masked_position=masks[:images])["encoder_out"])
    if pairs:
        out = reference(
            textual_tokens=ids[:pairs],
            visual_tokens=other[images : images + pairs],
            text_padding_position=ids[:pairs] == PAD,
            vision_masked_position=masks[images : images + pairs],
        )["encoder_out"]
        parts += [out[:, : CONFIG.patches], out[:, CONFIG.patches :]]
    if texts:
        some = ids[TEXTS : TEXTS + texts]
        parts.append(reference(textual_tokens=some, text_padding_position=some == PAD)["encoder_out"])
    expected = torch.cat([part.reshape(-1, CONFIG.dim) for part in parts])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn_like(rows) / 10 / len(rows) ** 0.5  # the largest gradients are about one
    for model in models:
        model.zero_grad()
    (rows * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-5)
    state = {f"encoder.{name}": grad for name, grad in gradients(ours).items()}
    theirs = gradients(reference)
    for name, grad in to_released(state, CONFIG).items():
        torch.testing.assert_close(grad, theirs[name.removeprefix("beit3.")], atol=1e-5, rtol=1e-5, msg=name)


def test_captioning_attention_equals_the_reference(models):
    """unilm beit3/modeling_finetune.py, BEiT3ForCaptioning: the text sees the image and the text before it."""
    ours, reference = models
    torch.manual_seed(2)
    pictures = torch.randn(IMAGES, 3, CONFIG.image_size, CONFIG.image_size)
    ids = torch.randint(4, CONFIG.vocab_size, (IMAGES, LENGTH))
    ids[1, 5:] = PAD
    layout = Layout(pairs=IMAGES, patches=CONFIG.patches, pair_len=LENGTH, causal=True)
    rows = ours(make_batch(layout, images=pictures, pair_tokens=ids))
    total = CONFIG.patches + LENGTH
    hidden = torch.ones(total, total)
    hidden[:, : CONFIG.patches] = 0
    hidden[CONFIG.patches :, CONFIG.patches :] = torch.ones(LENGTH, LENGTH).triu(1)
    out = reference(textual_tokens=ids, visual_tokens=pictures, text_padding_position=ids == PAD, attn_mask=hidden)[
        "encoder_out"
    ]
    expected = torch.cat([part.reshape(-1, CONFIG.dim) for part in out.split([CONFIG.patches, LENGTH], 1)])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
