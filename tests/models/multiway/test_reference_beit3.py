"""Outputs and gradients against torchscale 0.3.0's BEiT3, the reference of the released architecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compare.others import torchscale_model
from pretrain.batch import PAD, Layout, make_batch
from pretrain.released_weights import to_released
from tests.toy_models import PATCHES, RELEASED, encoder

COUNT, LENGTH = 3, 9
IMAGE_LEN = PATCHES + 1


@pytest.fixture(scope="module")
def models():
    ours = encoder(RELEASED, ("vision", "language"))
    state = {f"encoder.{key}": value for key, value in ours.state_dict().items()}
    return ours, torchscale_model(RELEASED, to_released(state, RELEASED))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["image", "text", "pair", "all"])
def test_outputs_and_gradients_equal_the_reference(models, kind, masked, padded):
    ours, reference = models
    torch.manual_seed(1)
    pixels = torch.randn(2 * COUNT, 3, RELEASED.image_size, RELEASED.image_size)
    masks = torch.rand(2 * COUNT, PATCHES) < (0.4 if masked else 0)
    ids = torch.randint(4, RELEASED.vocab_size, (2 * COUNT, LENGTH))
    if padded:
        for row, length in enumerate((LENGTH, 4, 1, 2, LENGTH, 5)):
            ids[row, length:] = PAD
    images, pairs, texts = (COUNT if kind in (own, "all") else 0 for own in ("image", "pair", "text"))
    own, other = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    pictures, pair_ids, text_ids = images + pairs, ids[:pairs], ids[COUNT : COUNT + texts]
    layout = Layout(images, pairs, texts, PATCHES, LENGTH, LENGTH)
    batch = make_batch(
        layout,
        images=own[:pictures],
        image_masks=masks[:pictures],
        pair_tokens=pair_ids,
        text_tokens=text_ids,
    )
    encoded = ours(batch)

    # The reference takes the same sequences in up to three passes.
    expected: dict[str, torch.Tensor] = {}
    if images:
        expected["images"] = reference(visual_tokens=other[:images], vision_masked_position=masks[:images])[
            "encoder_out"
        ]
    if pairs:
        out = reference(
            textual_tokens=pair_ids,
            visual_tokens=other[images:pictures],
            text_padding_position=pair_ids == PAD,
            vision_masked_position=masks[images:pictures],
        )["encoder_out"]
        expected |= {"pair_images": out[:, :IMAGE_LEN], "pair_texts": out[:, IMAGE_LEN:]}
    if texts:
        expected["texts"] = reference(textual_tokens=text_ids, text_padding_position=text_ids == PAD)["encoder_out"]
    # Nothing reads what comes out for padding.
    seen = {"pair_texts": pair_ids != PAD, "texts": text_ids != PAD}
    parts = [(getattr(encoded, name)[seen.get(name, ...)], out[seen.get(name, ...)]) for name, out in expected.items()]
    for a, b in parts:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    # The largest gradients are about one.
    weights = [torch.randn_like(a) / 10 / layout.rows**0.5 for a, _ in parts]
    for number, model in enumerate(models):
        model.zero_grad()
        sum((part[number] * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-5)
    state = {f"encoder.{name}": grad for name, grad in gradients(ours).items()}
    theirs = gradients(reference)
    for name, grad in to_released(state, RELEASED).items():
        torch.testing.assert_close(grad, theirs[name.removeprefix("beit3.")], atol=1e-5, rtol=1e-5, msg=name)


def test_captioning_attention_equals_the_reference(models):
    """unilm beit3/modeling_finetune.py, BEiT3ForCaptioning: the text sees the image and the text before it."""
    ours, reference = models
    torch.manual_seed(2)
    pictures = torch.randn(COUNT, 3, RELEASED.image_size, RELEASED.image_size)
    ids = torch.randint(4, RELEASED.vocab_size, (COUNT, LENGTH))
    ids[1, 5:] = PAD
    layout = Layout(pairs=COUNT, patches=PATCHES, pair_len=LENGTH, causal=True)
    encoded = ours(make_batch(layout, images=pictures, pair_tokens=ids))
    hidden = torch.ones(IMAGE_LEN + LENGTH, IMAGE_LEN + LENGTH)
    hidden[:, :IMAGE_LEN] = 0
    hidden[IMAGE_LEN:, IMAGE_LEN:] = torch.ones(LENGTH, LENGTH).triu(1)
    out = reference(textual_tokens=ids, visual_tokens=pictures, text_padding_position=ids == PAD, attn_mask=hidden)
    rows = torch.cat([encoded.pair_images, encoded.pair_texts], 1)
    seen = F.pad(ids != PAD, (IMAGE_LEN, 0), value=True)
    torch.testing.assert_close(rows[seen], out["encoder_out"][seen], atol=1e-5, rtol=1e-5)
