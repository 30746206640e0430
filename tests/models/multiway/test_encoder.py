"""The packed pass: routes, equality with separate passes, true zero gradients, masks, drop path."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain.batch import BOS, EOS, PAD, Batch, Layout, make_batch
from pretrain.models.multiway.block import keep_rows
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder

SHARED = MultiwayConfig(
    dim=32,
    depth=3,
    heads=4,
    ffn_dim=64,
    image_size=32,
    patch_size=8,
    vocab_size=50,
    max_text_len=12,
    fusion_layers=2,
)
RELEASED = dataclasses.replace(SHARED, attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm")
VLMO = dataclasses.replace(SHARED, layer_scale=0.1, relative_position=True, key_bias=False, text_norm=True)
CONFIGS = {"paper": SHARED, "released": RELEASED, "vlmo": VLMO}
PATCHES, PAIR_LEN, TEXT_LEN = SHARED.patches, 7, 9
ROUTES = {
    "vision": Layout(3, 0, 0, PATCHES),
    "language": Layout(0, 0, 4, 0, 0, TEXT_LEN),
    "fusion": Layout(0, 2, 0, PATCHES, PAIR_LEN),
    "dual": Layout(3, 0, 3, PATCHES, 0, TEXT_LEN),
    "captioning": Layout(0, 2, 0, PATCHES, PAIR_LEN, causal=True),
    "masked data": Layout(3, 2, 4, PATCHES, PAIR_LEN, TEXT_LEN),
}


def texts(count: int, length: int, generator: torch.Generator, *, padded: bool = True) -> torch.Tensor:
    ids = torch.randint(4, SHARED.vocab_size, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = BOS, EOS
    for row in range(count if padded else 0):
        end = 2 + row % (length - 2)
        ids[row, end], ids[row, end + 1 :] = EOS, PAD
    return ids


def batch_of(layout: Layout, seed: int = 0, *, padded: bool = True) -> Batch:
    g = torch.Generator().manual_seed(seed)
    count = layout.images + layout.pairs
    side = SHARED.image_size
    return make_batch(
        layout,
        images=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=g) if count else None,
        image_masks=torch.rand(count, layout.patches - 1, generator=g) < 0.4 if count else None,
        pair_tokens=texts(layout.pairs, layout.pair_len, g, padded=padded) if layout.pairs else None,
        text_tokens=texts(layout.texts, layout.text_len, g, padded=padded) if layout.texts else None,
    )


def part(batch: Batch, **counts: int) -> Batch:
    """The image-only, pair or text-only part of a batch, as a batch of its own."""
    layout = dataclasses.replace(batch.layout, images=0, pairs=0, texts=0)
    layout = dataclasses.replace(layout, **counts)
    images = (
        slice(0, layout.images) if layout.images else slice(batch.layout.images, batch.layout.images + layout.pairs)
    )
    return dataclasses.replace(
        batch,
        layout=layout,
        images=batch.images[images],
        image_masks=batch.image_masks[images],
        pair_inputs=batch.pair_inputs[: layout.pairs],
        text_inputs=batch.text_inputs[: layout.texts],
    )


def encoder(cfg: MultiwayConfig, experts=("vision", "language", "fusion"), seed: int = 0) -> MultiwayEncoder:
    torch.manual_seed(seed)
    model = MultiwayEncoder(cfg, experts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_route_gives_rows_and_every_parameter_a_gradient(name, route):
    model = encoder(CONFIGS[name])
    batch = batch_of(ROUTES[route])
    rows = model(batch)
    assert rows.shape == (batch.layout.rows, SHARED.dim)
    assert rows.isfinite().all()
    rows.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    used = {"vision": batch.layout.vision_rows, "language": batch.layout.language_rows, "fusion": batch.layout.pairs}
    for key, p in model.named_parameters():
        for expert, count in used.items():
            if f".{expert}." in key and not count:
                assert not p.grad.any(), f"{key} has no rows but a gradient"


@pytest.mark.parametrize("name", CONFIGS)
def test_one_packed_pass_equals_three_separate_passes_exactly(name):
    model = encoder(CONFIGS[name])
    batch = batch_of(ROUTES["masked data"])
    layout = batch.layout
    separate = [
        model(part(batch, images=layout.images)),
        model(part(batch, pairs=layout.pairs)),
        model(part(batch, texts=layout.texts)),
    ]
    assert (model(batch) - torch.cat(separate)).abs().max() == 0.0


def test_the_fusion_expert_changes_pairs_and_only_pairs():
    model = encoder(SHARED)
    batch = batch_of(ROUTES["masked data"])
    before = model(batch)
    with torch.no_grad():
        model.blocks[-1].experts["fusion"].down.bias.add_(1)
    changed = (model(batch) != before).any(-1)
    layout = batch.layout
    pairs = torch.zeros(layout.rows, dtype=torch.bool)
    pairs[layout.image_rows : layout.rows - layout.text_rows] = True
    assert torch.equal(changed, pairs)
    assert len(model.blocks[0].experts) == 2 and len(model.blocks[1].experts) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_seen(name):
    model = encoder(CONFIGS[name])
    long = batch_of(Layout(0, 2, 3, PATCHES, PAIR_LEN, TEXT_LEN), padded=False)
    pair_ids = torch.cat([long.pair_inputs, torch.full((2, 2), PAD)], 1)
    text_ids = torch.cat([long.text_inputs, torch.full((3, 3), PAD)], 1)
    layout = dataclasses.replace(long.layout, pair_len=PAIR_LEN + 2, text_len=TEXT_LEN + 3)
    padded = dataclasses.replace(long, layout=layout, pair_inputs=pair_ids, text_inputs=text_ids)
    a, b = model(long), model(padded)
    images = long.layout.pair_image_rows
    end = layout.rows - layout.text_rows
    pairs_a = a[images : images + 2 * PAIR_LEN].unflatten(0, (2, -1))
    pairs_b = b[images:end].unflatten(0, (2, -1))
    texts_a = a[images + 2 * PAIR_LEN :].unflatten(0, (3, -1))
    texts_b = b[end:].unflatten(0, (3, -1))
    torch.testing.assert_close(a[:images], b[:images], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pairs_a, pairs_b[:, :PAIR_LEN], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(texts_a, texts_b[:, :TEXT_LEN], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_of_nothing_but_padding_give_numbers(name):
    model = encoder(CONFIGS[name])
    batch = batch_of(ROUTES["masked data"])
    batch.text_inputs[1] = PAD
    batch.pair_inputs[0] = PAD
    rows = model(batch)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_text_sees_the_image_and_the_past_only(name):
    model = encoder(CONFIGS[name])
    batch = batch_of(ROUTES["captioning"], padded=False)
    before = model(batch)
    changed_at = 4
    batch.pair_inputs[:, changed_at] = (batch.pair_inputs[:, changed_at] + 1) % 40 + 4
    images, text = ((model(batch) != before).any(-1)).split([2 * PATCHES, 2 * PAIR_LEN])
    assert not images.any()
    assert torch.equal(text.view(2, -1).any(0), torch.arange(PAIR_LEN) >= changed_at)
    batch.images[:, :, :8, :8] ^= 255
    batch.image_masks[:] = False
    assert (model(batch) != before).any(-1)[2 * PATCHES :].all()


def test_a_mask_hides_the_patch():
    model = encoder(SHARED)
    batch = batch_of(ROUTES["vision"])
    batch.image_masks[:] = False
    batch.image_masks[0, 0] = True
    before = model(batch)
    batch.images[0, :, :8, :8] ^= 255
    assert torch.equal(model(batch), before)
    batch.images[1, :, :8, :8] ^= 255
    assert not torch.equal(model(batch), before)


def test_bytes_are_normalised_as_the_reference_does():
    model = encoder(SHARED)
    batch = batch_of(ROUTES["vision"])
    floats = dataclasses.replace(batch, images=(batch.images / 255 - 0.5) / 0.5)
    torch.testing.assert_close(model(batch), model(floats), atol=2e-6, rtol=1e-5)


def test_drop_path_drops_whole_sequences_and_keeps_the_mean():
    torch.manual_seed(0)
    layout = Layout(200, 200, 200, 5, 3, 4)
    factor = keep_rows(layout, 0.25, torch.rand(layout.sequences))
    assert factor.shape == (layout.rows, 1)
    assert factor.unique().tolist() == pytest.approx([0, 1 / 0.75])
    images, pair_images, pair_texts, some = factor.split(
        [layout.image_rows, layout.pair_image_rows, layout.pair_text_rows, layout.text_rows]
    )
    for rows, length in ((images, 5), (pair_images, 5), (pair_texts, 3), (some, 4)):
        assert (rows.view(200, length) == rows.view(200, length)[:, :1]).all()
    # A pair's image and its text share their fate.
    assert torch.equal(pair_images.view(200, 5)[:, 0], pair_texts.view(200, 3)[:, 0])
    assert factor.mean() == pytest.approx(1, abs=0.1)


def test_drop_path_rises_with_depth_and_rests_in_evaluation():
    cfg = dataclasses.replace(SHARED, drop_path=0.4)
    model = encoder(cfg)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    batch = batch_of(ROUTES["masked data"])
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(
    ("experts", "route", "absent"),
    [
        (("vision",), "vision", "language"),
        (("language",), "language", "vision"),
        (("vision", "language"), "fusion", "-"),
    ],
)
def test_a_stage_builds_only_its_experts(experts, route, absent):
    for cfg in CONFIGS.values():
        model = encoder(cfg, experts)
        batch = batch_of(ROUTES[route])
        model(batch).sum().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []
        assert not [key for key in model.state_dict() if f".{absent}." in key or ".fusion." in key]
    assert ("vision" in experts) == any(key.startswith("vision_embed") for key in model.state_dict())
    assert ("language" in experts) == any(key.startswith("text_embed") for key in model.state_dict())


@pytest.mark.parametrize(
    ("experts", "route", "says"),
    [
        (("vision",), "dual", "language rows"),
        (("language",), "fusion", "vision rows"),
        (("vision", "fusion"), "vision", "add both"),
        (("fusion",), "fusion", "vision, language or both"),
        (("vision", "audio"), "vision", "'audio'"),
    ],
)
def test_experts_that_do_not_fit_are_refused(experts, route, says):
    with pytest.raises(ValueError, match=says):
        MultiwayEncoder(SHARED, experts)(batch_of(ROUTES[route]))


def test_batches_that_do_not_fit_are_refused():
    model = encoder(SHARED)
    with pytest.raises(ValueError, match="max_text_len=12"):
        model(batch_of(Layout(texts=1, text_len=13)))
    with pytest.raises(ValueError, match=r"layout\.patches=10"):
        model(make_batch(Layout(1, patches=10), images=torch.zeros(1, 3, 24, 24, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="image_size=32"):
        model(make_batch(Layout(1, patches=PATCHES), images=torch.zeros(1, 3, 24, 24, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="empty"):
        model(make_batch(Layout()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 5}, r"model\.dim=32.*use 35"),
        ({"patch_size": 7}, r"model\.image_size=32.*use 28"),
        ({"fusion_layers": 4}, r"model\.fusion_layers=4"),
        ({"depth": 0}, r"model\.depth=0"),
        ({"drop_path": 1.0}, r"model\.drop_path=1"),
        ({"activation_checkpointing": -1}, r"model\.activation_checkpointing=-1"),
        ({"attention": "split"}, r"model\.attention='split'"),
        ({"init": "zeros"}, r"model\.init='zeros'"),
    ],
)
def test_wrong_configurations_are_refused_in_a_sentence(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SHARED, **change)


def test_the_seed_decides_the_weights_and_depth_their_scale():
    def build(cfg=SHARED):
        torch.manual_seed(3)
        return MultiwayEncoder(cfg)

    assert all(torch.equal(a, b) for a, b in zip(build().parameters(), build().parameters(), strict=True))
    cfg = dataclasses.replace(SHARED, dim=128, ffn_dim=512)
    first, *_, last = build(cfg).blocks
    ratio = last.experts["vision"].down.weight.std() / first.experts["vision"].down.weight.std()
    assert ratio.item() == pytest.approx((1 / 3) ** 0.5, rel=0.05)  # layers 3 and 1: sqrt(2) / sqrt(6)
    ratio = last.attention.out["shared"].weight.std() / first.attention.q["shared"].weight.std()
    assert ratio.item() == pytest.approx(6**-0.5, rel=0.05)
    assert first.attention.q["shared"].weight.abs().max() <= cfg.init_std


def test_relative_positions_know_direction_kind_and_modality():
    """A bias is the same for equal offsets, differs between them, and tells text-to-image from image-to-text."""
    model = encoder(VLMO)
    bias = model.relative_position(ROUTES["masked data"])[0]
    grid, h = VLMO.grid, bias.images[0]
    assert h[1, 2] == h[5, 6] == h[1 + grid, 2 + grid]  # one patch to the right
    assert len({h[1, 2].item(), h[2, 1].item(), h[1, 1].item(), h[1, 1 + grid].item(), h[0, 0].item()}) == 5
    text = bias.texts[0]
    assert text[1, 3] == text[4, 6] and text[1, 3] != text[3, 1]
    pair = bias.pairs[0]
    assert torch.equal(pair[:PATCHES, :PATCHES], h)
    assert torch.equal(pair[PATCHES:, PATCHES:], text[:PAIR_LEN, :PAIR_LEN])
    across, back = pair[:PATCHES, PATCHES:], pair[PATCHES:, :PATCHES]
    assert (across == across[0, 0]).all() and (back == back[0, 0]).all() and across[0, 0] != back[0, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_nobody_reads_need_not_be_computed(name, share):
    """Needed rows, and all gradients of what reads only them, are those of the whole pass."""
    model = encoder(CONFIGS[name])
    batch = batch_of(ROUTES["masked data"])
    needed = torch.rand(batch.layout.rows, generator=torch.Generator().manual_seed(4)) < share
    weight = torch.randn(batch.layout.rows, SHARED.dim) * needed[:, None]
    results = []
    for some in (None, needed):
        model.zero_grad()
        rows = model(batch, some)
        (rows * weight).sum().backward()
        results.append((rows, [p.grad.clone() for p in model.parameters()]))
    (whole, expected), (rows, grads) = results
    torch.testing.assert_close(rows[needed], whole[needed], atol=1e-6, rtol=1e-5)
    assert not rows[~needed].any()
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_drop_path_treats_needed_rows_as_the_whole_pass_does():
    cfg = dataclasses.replace(SHARED, drop_path=0.5)
    model, batch = encoder(cfg), batch_of(ROUTES["masked data"])
    needed = torch.arange(batch.layout.rows) % 3 == 0
    rows = []
    for some in (None, needed):
        torch.manual_seed(5)
        rows.append(model(batch, some)[needed])
    torch.testing.assert_close(*rows, atol=1e-6, rtol=1e-5)
