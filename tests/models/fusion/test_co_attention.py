"""Two streams that ask each other: against LXMERT's layers of transformers in ViLBERT's order, and what comes out for
each kind of sequence."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from pretrain.batch import Layout, make_batch
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.co_attention import CoAttention
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.kinds import check_alone
from tests.models.fusion.two_ranks import check_equal
from tests.models.towers.others import LENGTH, moved
from tests.toy_models import random_batch

MODEL = CoAttention(
    dim=16, heads=2, ffn_dim=32, text_depth=4, image_dim=24, image_heads=3, image_ffn_dim=40, vit_depth=1,
    image_depth=3, text_at=(1, 3), image_at=(0, 2), co_dim=32, co_heads=4, image_size=16, patch_size=4,
    vocab_size=32, max_text_len=10, init_std=0.1,
)  # fmt: skip
ALIKE = replace(MODEL, image_dim=16, image_heads=2, image_ffn_dim=32, co_dim=0, co_heads=2)
LAYOUT = Layout(images=2, pairs=3, texts=2, patches=16, pair_len=7, text_len=10, dual=2)
NEAR = {"atol": 1e-5, "rtol": 1e-5}
# transformers' names of a layer of LXMERT -> ours.
OWN = {
    "attention.self.query": "own.q", "attention.self.key": "own.k", "attention.self.value": "own.v",
    "attention.output.dense": "own.out", "attention.output.LayerNorm": "own_norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip
ASKING = {
    "cross.att.query": "cross.q", "cross.att.key": "cross.k", "cross.att.value": "cross.v",
    "cross.output.dense": "cross.out", "cross.output.LayerNorm": "cross_norm",
    "inter.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip


def batch_of(layout: Layout = LAYOUT):
    return random_batch(layout, cfg=ALIKE.shape)


class Reference(torch.nn.Module):
    """LXMERT's layers in the order of ViLBERT's code. LXMERT has one attention for both ways and self-attention behind
    it; ViLBERT one for each way, and a feed-forward network behind it."""

    def __init__(self):
        import transformers
        from transformers.models.lxmert import modeling_lxmert as lxmert

        super().__init__()
        config = transformers.LxmertConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip

        def half():
            parts = (lxmert.LxmertCrossAttentionLayer, lxmert.LxmertIntermediate, lxmert.LxmertOutput)
            return torch.nn.ModuleDict(zip(("cross", "inter", "output"), (part(config) for part in parts), strict=True))

        self.text = torch.nn.ModuleList(lxmert.LxmertLayer(config) for _ in range(4))
        self.image = torch.nn.ModuleList(lxmert.LxmertLayer(config) for _ in range(3))
        self.co = torch.nn.ModuleList(torch.nn.ModuleDict({"text": half(), "image": half()}) for _ in range(2))

    def forward(self, words, real, picture):
        mask = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None]

        def both(co, words, picture):
            asked = co["text"]["cross"](words, picture)[0]
            answered = co["image"]["cross"](picture, words, ctx_att_mask=mask)[0]
            return tuple(
                half["output"](half["inter"](x), x) for half, x in ((co["text"], asked), (co["image"], answered))
            )

        words = self.text[0](words, mask)[0]
        words, picture = both(self.co[0], words, picture)
        words = self.text[2](self.text[1](words, mask)[0], mask)[0]
        picture = self.image[1](self.image[0](picture)[0])[0]
        words, picture = both(self.co[1], words, picture)
        return self.text[3](words, mask)[0], self.image[2](picture)[0]


def weights_of(ours, theirs):
    """(ours, theirs) of every weight of both streams and the co-attentions."""
    blocks = [(getattr(ours, side), getattr(theirs, side), OWN) for side in ("text", "image")]
    blocks += [
        ([getattr(co, side) for co in ours.co], [co[side] for co in theirs.co], ASKING) for side in ("text", "image")
    ]
    for own_blocks, their_blocks, names in blocks:
        for own, their in zip(own_blocks, their_blocks, strict=True):
            for name, short in names.items():
                for part in ("weight", "bias"):
                    yield own.get_parameter(f"{short}.{part}"), their.get_parameter(f"{name}.{part}")


def test_both_streams_equal_the_reference_and_their_gradients_too():
    torch.manual_seed(0)
    theirs, ours = moved(Reference()), moved(ALIKE.build(()))
    with torch.no_grad():
        for own, their in weights_of(ours, theirs):
            own.copy_(their)
    batch = batch_of(Layout(pairs=3, patches=16, pair_len=7))
    picture, (words, seen) = streams.pictures(ours.vit, batch), streams.words(ours.text_embed, batch)
    real = seen[:, 0, 0]
    wanted = theirs(words.detach(), real, picture.detach())
    got = ours(batch)
    torch.testing.assert_close(got.pair_texts[real], wanted[0][real], **NEAR)
    torch.testing.assert_close(got.pair_images[:, 1:], wanted[1][:, 1:], **NEAR)
    fused = (ours.pair.image(wanted[1][:, 0]).relu() * ours.pair.text(wanted[0][:, 0]).relu()).detach()
    torch.testing.assert_close(got.pair_images[:, 0], fused, **NEAR)
    (wanted[0][real].square().sum() + wanted[1][:, 1:].square().sum()).backward()
    (got.pair_texts[real].square().sum() + got.pair_images[:, 1:].square().sum()).backward()
    for own, their in weights_of(ours, theirs):
        torch.testing.assert_close(own.grad, their.grad, atol=1e-5 * float(their.grad.abs().max() + 1), rtol=1e-5)


def test_each_kind_comes_out_as_it_does_alone():
    encoder = MODEL.build(()).eval()
    rows, pairs = check_alone(encoder, batch_of())
    assert [tuple(kind.shape) for kind in rows] == [(2, 17, 24), (3, 17, 24), (3, 7, 16), (2, 10, 16)]
    other = encoder(make_batch(pairs.layout, images=255 - pairs.images, pair_tokens=pairs.pair_tokens))
    assert not torch.allclose(other.pair_texts[:, 1], rows.pair_texts[:, 1], atol=1e-4), "words see no picture"
    said = encoder(make_batch(pairs.layout, images=pairs.images, pair_tokens=pairs.pair_tokens.roll(1, 0)))
    plain = encoder(make_batch(pairs.layout, images=pairs.images, pair_tokens=pairs.pair_tokens))
    assert not torch.allclose(said.pair_images[:, 1:], plain.pair_images[:, 1:], atol=1e-4), "patches see no words"


OBJECTIVES = (Contrastive(embed_dim=8), Matching(), MaskedData(image_codes=24, dual=False, tied_text_head=True))


def test_every_weight_learns_from_contrast_matching_and_hidden_words_and_patches():
    torch.manual_seed(0)
    batch = batch_of()
    count = len(batch.images) + len(batch.text_tokens)
    batch = replace(
        batch,
        draws={"matching": torch.rand(count, 1)},
        image_codes=torch.randint(20, (len(batch.images), 16)),
        image_masks=torch.rand(len(batch.images), 16) < 0.4,
        pair_masked=torch.arange(7).expand(3, 7) == 1,
    )
    task = PretrainTask(MODEL, ("vision", "language"), OBJECTIVES)
    report = task(batch)
    assert {"loss/contrastive", "loss/matching", "accuracy/pair_text", "accuracy/pair_image"} <= report.keys()
    report["loss"].backward()
    assert not {name for name, value in task.named_parameters() if value.grad is None}
    again = PretrainTask(MODEL, ("vision", "language"), OBJECTIVES, checkpointing=1)
    again.load_state_dict(task.state_dict())
    again(batch)["loss"].backward()
    for own, other in zip(task.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, (), (Contrastive(temperature=0.5, embed_dim=16), Matching()), layers)


@pytest.mark.parametrize("ds", ["zero1.json", "zero3.json"])
def test_two_ranks_give_the_losses_of_one_process(ds):
    """Its first pass fuses no pair, its second one has no picture and no text alone."""
    check_equal(build, ds, ("loss", "loss/matching", "loss/contrastive"))


PAIRS = PairShards("x", text_len=LENGTH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop_path": 0.1}, r"drop_path=0\.1: CoAttention has none; set it to 0"),
        (
            {"objectives": (Captioning(),)},
            r"captioning predicts .* in CoAttention each word sees the whole text; take",
        ),
    ],
)
def test_stages_that_it_refuses(changes, said):
    options = {"mix": {"pairs": PAIRS}, "batch": BatchSize(pairs=4), "optim": Optim(), "steps": 1,
               "objectives": (MaskedData(pair_image_ratio=0),)}  # fmt: skip
    Recipe(name="x", model=MODEL, stages={"x": Stage(**options)})
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": Stage(**(options | changes))})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"co_dim": 0},
            r"model\.dim=16 and model\.image_dim=24 differ, and model\.co_dim=0 projects neither",
        ),
        ({"text_at": (1, 4)}, r"model\.text_at=\(1, 4\) does not name blocks of model\.text_depth=4 .* from 0 to 3"),
        ({"image_at": (1, 1)}, r"model\.image_at=\(1, 1\) does not name blocks .* use rising numbers from 0 to 2"),
        ({"image_at": ()}, r"model\.image_at=\(\) does not name blocks"),
        ({"image_at": (1,)}, r"text_at=\(1, 3\) and model\.image_at=\(1,\) are not of one length"),
        ({"co_heads": 5}, r"model\.co_heads=5 does not divide the co-attention's width 32; use 1"),
        ({"fusion": "sum"}, r"model\.fusion='sum' is unknown; use mlp, gated, bilinear"),
        ({"heads": 3}, r"model\.dim=16 is not a multiple of model\.heads=3"),
    ],
)
def test_shapes_that_it_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(MODEL, **changes)


def test_it_is_the_same_from_a_file_and_counts_the_products_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    assert CoAttention(**json.loads(json.dumps(asdict(MODEL)))) == MODEL
    batch = batch_of()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        MODEL.build(())(batch)
    # Torch counts the row of a pair, which is left out here, and texts at the pairs' and texts' common length.
    alike = Layout(images=2, pairs=3, texts=2, patches=16, pair_len=10, text_len=10)
    assert MODEL.flops(alike) / 3 == pytest.approx(counted.get_total_flops(), rel=0.02)
