"""The packed pass: routes, equality with separate passes, true zero gradients, masks, drop path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.calls import Calls
from pretrain.batch import PAD, Kinds, Layout, make_batch
from pretrain.layers import Linear
from pretrain.models.multiway import block
from pretrain.models.multiway.block import drop_path_factor, sequence_of_row
from pretrain.models.multiway.embeddings import RelativePosition
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.sizes import VLMO_BASE
from tests.toy_models import (
    ALL,
    CONFIGS,
    PAIR_LEN,
    PAPER,
    PATCHES,
    ROUTES,
    VLMO,
    encoder,
    part_of,
    pictures,
    random_batch,
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_route_gives_rows_and_every_parameter_a_gradient(name, route):
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES[route])
    encoded = model(batch)
    assert [kind.shape for kind in encoded] == [(*shape, PAPER.dim) for shape in batch.layout.shapes]
    assert encoded.pack().isfinite().all()
    encoded.pack().square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    used = {"vision": batch.layout.vision_rows, "language": batch.layout.language_rows, "fusion": batch.layout.pairs}
    for key, p in model.named_parameters():
        for expert, count in used.items():
            if f".{expert}." in key and not count:
                assert not p.grad.any(), f"{key} has no rows but a gradient"


@pytest.mark.parametrize("name", CONFIGS)
def test_one_packed_pass_equals_three_separate_passes_exactly(name):
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["masked data"])
    whole = model(batch)
    for kind in ("images", "pairs", "texts"):
        own = model(part_of(batch, **{kind: ALL}))
        for part in Kinds._fields:
            if part.startswith(kind.removesuffix("s")):
                assert torch.equal(getattr(own, part), getattr(whole, part)), part


def test_the_fusion_expert_changes_pairs_and_only_pairs():
    model, batch = encoder(), random_batch(ROUTES["masked data"])
    before = model(batch)
    with torch.no_grad():
        model.blocks[-1].experts["fusion"].down.bias.add_(1)
    changed = Kinds(*((a != b).any(-1) for a, b in zip(model(batch), before, strict=True)))
    assert changed.pair_images.all() and changed.pair_texts[batch.pair_inputs != PAD].all()
    assert not changed.images.any() and not changed.texts.any()
    assert len(model.blocks[0].experts) == 2 and len(model.blocks[1].experts) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_seen(name):
    model, batch = encoder(CONFIGS[name]), random_batch(Layout(0, 2, 3, PATCHES, PAIR_LEN, 9), padded=False)
    padded = replace(
        batch,
        layout=replace(batch.layout, pair_len=PAIR_LEN + 2, text_len=9 + 3),
        pair_inputs=F.pad(batch.pair_inputs, (0, 2), value=PAD),
        text_inputs=F.pad(batch.text_inputs, (0, 3), value=PAD),
    )
    for short, long in zip(model(batch), model(padded), strict=True):
        torch.testing.assert_close(long[:, : short.shape[1]], short, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_of_nothing_but_padding_give_numbers(name):
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["masked data"])
    batch.text_inputs[1] = PAD
    batch.pair_inputs[0] = PAD
    rows = model.rows(batch)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_text_sees_the_image_and_the_past_only(name):
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["captioning"], padded=False)
    before = model(batch)
    changed_at = 4
    batch.pair_inputs[:, changed_at] = (batch.pair_inputs[:, changed_at] + 1) % 40 + 4
    after = model(batch)
    assert torch.equal(after.pair_images, before.pair_images)
    changed = (after.pair_texts != before.pair_texts).any(-1)
    assert torch.equal(changed.any(0), torch.arange(PAIR_LEN) >= changed_at)
    batch.images[:, :, :8, :8] ^= 255
    batch.image_masks[:] = False
    assert (model(batch).pair_texts != before.pair_texts).any(-1).all()


def test_a_mask_hides_the_patch():
    model, batch = encoder(), random_batch(ROUTES["vision"])
    batch.image_masks[:] = False
    batch.image_masks[0, 0] = True
    before = model.rows(batch)
    batch.images[0, :, :8, :8] ^= 255
    assert torch.equal(model.rows(batch), before)
    batch.images[1, :, :8, :8] ^= 255
    assert not torch.equal(model.rows(batch), before)


def test_bytes_are_normalised_as_the_reference_does():
    model, batch = encoder(), random_batch(ROUTES["vision"])
    floats = replace(batch, images=(batch.images / 255 - 0.5) / 0.5)
    torch.testing.assert_close(model.rows(batch), model.rows(floats), atol=2e-6, rtol=1e-5)


def test_drop_path_drops_whole_sequences_and_keeps_the_mean():
    torch.manual_seed(0)
    layout = Layout(200, 200, 200, 4, 3, 4)
    of_sequence = drop_path_factor(0.25, torch.rand(layout.sequences, 1))
    assert of_sequence.unique().tolist() == pytest.approx([0, 1 / 0.75])
    factor = of_sequence[sequence_of_row(layout, torch.device("cpu"))]
    assert factor.shape == (layout.rows, 1)
    kinds = Kinds.split(factor, layout)
    assert all((kind == kind[:, :1]).all() for kind in kinds)
    # A pair's image and its text share their fate.
    assert torch.equal(kinds.first.pair_images, kinds.first.pair_texts)
    assert factor.mean() == pytest.approx(1, abs=0.1)


def test_drop_path_rises_with_depth_and_rests_in_evaluation():
    model, batch = encoder(drop_path=0.4), random_batch(ROUTES["masked data"])
    assert [model.drop_rate(number) for number in range(3)] == pytest.approx([0, 0.2, 0.4])
    assert not torch.equal(model.rows(batch), model.rows(batch))
    with_draws = random_batch(ROUTES["masked data"], drop_path=True)
    assert torch.equal(model.rows(with_draws), model.rows(with_draws)), "the batch's own draws count"
    model.eval()
    assert torch.equal(model.rows(batch), model.rows(batch))


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
        batch = random_batch(ROUTES[route])
        model.rows(batch).sum().backward()
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
        MultiwayEncoder(PAPER, experts)(random_batch(ROUTES[route]))


def test_batches_that_do_not_fit_are_refused():
    model = encoder()
    with pytest.raises(ValueError, match="max_text_len=12"):
        model(random_batch(Layout(texts=1, text_len=13)))
    with pytest.raises(ValueError, match=r"layout\.patches=10"):
        model(make_batch(Layout(1, patches=10), images=pictures(1, 24)))
    with pytest.raises(ValueError, match="image_size=32"):
        model(make_batch(Layout(1, patches=PATCHES), images=pictures(1, 24)))
    with pytest.raises(ValueError, match="empty"):
        model(make_batch(Layout()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 5}, r"model\.dim=32.*use 35"),
        ({"patch_size": 7}, r"model\.image_size=32.*use 28"),
        ({"fusion_layers": 4}, r"model\.fusion_layers=4"),
        ({"depth": 0}, r"model\.depth=0"),
        ({"attention": "split"}, r"model\.attention='split'"),
        ({"init": "zeros"}, r"model\.init='zeros'"),
    ],
)
def test_wrong_configurations_are_refused_in_a_sentence(change, says):
    with pytest.raises(ValueError, match=says):
        replace(PAPER, **change)


def test_the_seed_decides_the_weights_and_depth_their_scale():
    def build(cfg=PAPER):
        torch.manual_seed(3)
        return MultiwayEncoder(cfg)

    assert all(torch.equal(a, b) for a, b in zip(build().parameters(), build().parameters(), strict=True))
    cfg = replace(PAPER, dim=128, ffn_dim=512)
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
    pair, image_len = bias.pairs[0], PATCHES + 1
    assert torch.equal(pair[:image_len, :image_len], h)
    assert torch.equal(pair[image_len:, image_len:], text[:PAIR_LEN, :PAIR_LEN])
    across, back = pair[:image_len, image_len:], pair[image_len:, :image_len]
    assert (across == across[0, 0]).all() and (back == back[0, 0]).all() and across[0, 0] != back[0, 0]


def test_relative_positions_index_the_table_as_vlmo_does():
    """Rows of a table that holds its own row numbers, against those that unilm's vlmo_module.py
    (build_relative_position_embed) computes for its base: 14 x 14 patches, 196 words, hence 732 + 392 + 2 rows."""
    table = RelativePosition(replace(VLMO_BASE, dim=1, heads=1, depth=1, fusion_layers=0))
    assert len(table.table) == 1126
    with torch.no_grad():
        table.table.copy_(torch.arange(1126.0)[:, None])
    bias = table(Layout(pairs=1, texts=1, patches=196, pair_len=40, text_len=196))[0]
    pair, text = bias.pairs[0].long(), bias.texts[0].long()
    image = slice(197)
    words = slice(197, None)
    assert set(pair[words, image].flatten().tolist()) == {732}, "text query, image key"
    assert set(pair[image, words].flatten().tolist()) == {733}, "image query, text key"
    # Class row to a patch, patch to class row, class row to itself; the same of BOS.
    assert (pair[0, 5], pair[5, 0], pair[0, 0]) == (729, 730, 731)
    assert (text[0, 5], text[5, 0], text[0, 0]) == (1123, 1124, 1125)
    # Patches: row 13 * 27 + 13 is no offset; a key to the right is one less, a key below a line of 27 less.
    assert (pair[1, 1], pair[1, 2], pair[2, 1], pair[1, 15], pair[196, 1]) == (364, 363, 365, 337, 728)
    # Words: no offset is 194 rows behind the cross-modal ones; a key to the right is one more.
    assert (text[1, 1], text[1, 2], text[2, 1], text[1, 195], text[195, 1]) == (928, 929, 927, 1122, 734)
    assert torch.equal(pair[words, words], text[:40, :40])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_nobody_reads_need_not_be_computed(name, share):
    """Needed rows, and all gradients of what reads only them, are those of the whole pass."""
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["masked data"])
    needed = torch.rand(batch.layout.rows, generator=torch.Generator().manual_seed(4)) < share
    weight = torch.randn(batch.layout.rows, PAPER.dim) * needed[:, None]
    results = []
    for some in (None, Kinds.split(needed, batch.layout)):
        model.zero_grad()
        rows = model(batch, some).pack()
        (rows * weight).sum().backward()
        results.append((rows, [p.grad.clone() for p in model.parameters()]))
    (whole, expected), (rows, grads) = results
    torch.testing.assert_close(rows[needed], whole[needed], atol=1e-6, rtol=1e-5)
    assert not rows[~needed].any()
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_drop_path_treats_needed_rows_as_the_whole_pass_does():
    model, batch = encoder(drop_path=0.5), random_batch(ROUTES["masked data"], drop_path=True)
    needed = torch.arange(batch.layout.rows) % 3 == 0
    rows = [model.rows(batch, some)[needed] for some in (None, needed)]
    torch.testing.assert_close(*rows, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_keys_and_values_by_one_product_are_those_by_three(name, monkeypatch):
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["masked data"])
    results, products = [], []
    for fused in (True, False):
        monkeypatch.setattr(block, "gains_by_fusing", lambda rows, fused=fused: fused)
        model.zero_grad()
        with Calls([]) as calls:
            rows = model.rows(batch)
        rows.square().sum().backward()
        results.append((rows, [p.grad.clone() for p in model.parameters()]))
        products.append(calls.names["addmm"] + calls.names["mm"])
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)
    sets = 2 if name == "released" else 1
    assert products[1] - products[0] == 2 * sets * model.cfg.depth


def test_weights_that_are_split_or_trained_apart_are_not_joined():
    linears = [Linear(4, 4) for _ in range(3)]
    assert block.can_fuse(linears)
    linears[1].requires_grad_(False)
    assert not block.can_fuse(linears)
    linears[1].requires_grad_(True)
    linears[2].weight.ds_id = 7  # ZeRO-3 holds a part of it here
    assert not block.can_fuse(linears)
    assert not block.can_fuse([*linears[:2], torch.nn.Linear(4, 4)])
