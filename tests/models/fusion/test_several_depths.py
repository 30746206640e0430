"""Words that ask a picture at several depths: against blocks called one after another, and the plain model of one."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from pretrain.batch import PAD, Layout
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.several_depths import SeveralDepths
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.two_ranks import check_equal
from tests.models.towers.others import moved
from tests.toy_models import random_batch

MODEL = SeveralDepths(
    dim=16, heads=2, ffn_dim=32, image_depth=3, text_depth=1, fusion_depth=2, image_size=16, patch_size=4,
    vocab_size=32, max_text_len=10, init_std=0.1, image_at=(1, 3),
)  # fmt: skip
LAYOUT = Layout(images=2, pairs=3, texts=2, patches=16, pair_len=7, text_len=10, dual=2)


def batch_of(layout: Layout = LAYOUT):
    return random_batch(layout, cfg=MODEL.shape)


def test_each_fusion_block_asks_the_rows_of_its_depth():
    torch.manual_seed(0)
    batch, encoder = batch_of(), moved(MODEL.build(())).eval()
    rows = encoder(batch)
    # A ViT that ends behind the first block, with that depth's norm.
    low = MultiwayEncoder(replace(MODEL.shape, depth=1), ("vision",)).eval()
    state = {
        key: value for key, value in encoder.image.state_dict().items() if not key.startswith(("blocks.1", "blocks.2"))
    }
    norm = {f"norm.shared.{key}": value for key, value in encoder.depth_norms[0].state_dict().items()}
    low.load_state_dict(state | norm)
    pictures = streams.pictures(low, batch), streams.pictures(encoder.image, batch)
    words, seen = streams.words(encoder.text_embed, batch)
    fused = encoder.text[0](words, seen)[:3]
    for block, picture in zip(encoder.fusion, pictures, strict=True):
        fused = block(fused, seen[:3], picture[2:])
    real = batch.pair_inputs != PAD
    torch.testing.assert_close(rows.pair_texts[real], fused[:, :7][real])
    torch.testing.assert_close(rows.images, pictures[1][:2])
    torch.testing.assert_close(rows.pair_images, fused[:, :1])


def test_at_one_depth_it_is_the_plain_model():
    one = replace(MODEL, fusion_depth=1, image_at=(3,))
    plain = TextQueriesImage(**{f.name: getattr(one, f.name) for f in fields(TextQueriesImage)})
    encoder, other = one.build(()).eval(), plain.build(()).eval()
    other.load_state_dict(encoder.state_dict())
    for own, same in zip(encoder(batch_of()), other(batch_of()), strict=True):
        torch.testing.assert_close(own, same)
    assert MODEL.flops(LAYOUT) == replace(plain, fusion_depth=2).flops(LAYOUT)


def test_every_weight_learns_and_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (0, 1):
        torch.manual_seed(0)
        task = PretrainTask(MODEL, (), (Contrastive(8), Matching()), checkpointing=checkpointing)
        batch = batch_of()
        drawn = torch.rand(7, 1, generator=torch.Generator().manual_seed(1))
        task(replace(batch, draws={"matching": drawn}))["loss"].backward()
        grads.append({name: value.grad for name, value in task.named_parameters()})
    assert all(value is not None for value in grads[0].values()) and grads[0]["encoder.depth_norms.0.weight"].any()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, (), (Contrastive(temperature=0.5, embed_dim=16), Matching()), layers)


def test_two_ranks_under_zero3_give_the_losses_of_one_process():
    check_equal(build, "zero3.json", ("loss", "loss/matching", "loss/contrastive"))


@pytest.mark.parametrize("at", [(), (1,), (3, 3), (0, 3), (1, 2), (1, 2, 3)])
def test_depths_that_it_refuses(at):
    with pytest.raises(ValueError, match=r"does not name one of the 3 blocks .* such as \(2, 3\)"):
        replace(MODEL, image_at=at)


def test_it_is_the_same_from_a_file():
    assert SeveralDepths(**json.loads(json.dumps(asdict(MODEL)))) == MODEL
