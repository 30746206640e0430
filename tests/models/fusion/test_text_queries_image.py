"""Words that ask a picture: the blocks against transformers' BERT with cross-attention, and what comes out for each
kind of sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.batch import PAD, Layout, make_batch
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.two_ranks import check_equal
from tests.models.towers.others import LENGTH, SIZES, dual_batch, moved
from tests.toy_models import random_batch

MODEL = TextQueriesImage(
    dim=16, heads=2, ffn_dim=32, image_depth=1, text_depth=2, fusion_depth=2, image_size=32, patch_size=8,
    vocab_size=40, max_text_len=LENGTH, init_std=0.1,
)  # fmt: skip
# transformers' names -> ours, of a block; the last two where it asks the picture.
BLOCK = {
    "attention.self.query": "own.q", "attention.self.key": "own.k", "attention.self.value": "own.v",
    "attention.output.dense": "own.out", "attention.output.LayerNorm": "own_norm", "intermediate.dense": "up",
    "output.dense": "down", "output.LayerNorm": "norm", "crossattention.self.query": "cross.q",
    "crossattention.self.key": "cross.k", "crossattention.self.value": "cross.v",
    "crossattention.output.dense": "cross.out", "crossattention.output.LayerNorm": "cross_norm",
}  # fmt: skip
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def reference(cross: bool):
    import transformers

    settings = SIZES | {"vocab_size": 40, "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.0,
                        "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 16, "pad_token_id": PAD,
                        "bos_token_id": 0, "sep_token_id": 2, "eos_token_id": 2, "is_decoder": cross}  # fmt: skip
    torch.manual_seed(0)
    return moved(transformers.models.blip.modeling_blip_text.BlipTextModel(
        transformers.BlipTextConfig(**settings), add_pooling_layer=False
    ))  # fmt: skip


@pytest.mark.parametrize("cross", [False, True])
def test_blocks_equal_the_reference(cross):
    theirs, encoder = reference(cross), moved(MODEL.build(()))
    blocks = encoder.fusion if cross else encoder.text
    own = dict(blocks.named_parameters())
    for number in range(2):
        for name, ours in BLOCK.items():
            for part in ("weight", "bias"):
                if (key := f"{number}.{ours}.{part}") in own:
                    value = theirs.get_parameter(f"encoder.layer.{number}.{name}.{part}")
                    with torch.no_grad():
                        own[key].copy_(value)
    batch = dual_batch(39)
    real = batch.text_tokens != PAD
    picture = torch.randn(len(real), 5, 16)
    words = theirs.embeddings(input_ids=batch.text_tokens).detach()
    more = {"encoder_hidden_states": picture} if cross else {}
    wanted = theirs(encoder_embeds=words, attention_mask=real.long(), **more).last_hidden_state
    got = words
    for block in blocks:
        got = block(got, real[:, None, None], picture if cross else None)
    torch.testing.assert_close(got[real], wanted[real], **NEAR)
    for rows in (got, wanted):
        (rows[real] ** 2).mean().backward()
    for number in range(2):
        for name, ours in BLOCK.items():
            if (key := f"{number}.{ours}.weight") in own:
                wanted_grad = theirs.get_parameter(f"encoder.layer.{number}.{name}.weight").grad
                torch.testing.assert_close(own[key].grad, wanted_grad, **NEAR)


def test_each_kind_comes_out_as_it_does_alone():
    layout = Layout(images=2, pairs=3, texts=2, patches=16, pair_len=7, text_len=LENGTH, dual=2)
    batch = random_batch(layout, cfg=replace(MODEL.shape, vocab_size=40))
    encoder = MODEL.build(()).eval()
    rows = encoder(batch)
    assert [tuple(kind.shape) for kind in rows] == [(2, 17, 16), (3, 1, 16), (3, 7, 16), (2, LENGTH, 16)]
    pairs = make_batch(
        Layout(pairs=3, patches=16, pair_len=7), images=batch.images[2:], image_masks=batch.image_masks[2:],
        pair_tokens=batch.pair_tokens, pair_inputs=batch.pair_inputs,
    )  # fmt: skip
    texts = make_batch(Layout(texts=2, text_len=LENGTH), text_tokens=batch.text_tokens, text_inputs=batch.text_inputs)
    real = batch.pair_inputs != PAD
    torch.testing.assert_close(encoder(pairs).pair_texts[real], rows.pair_texts[real])
    torch.testing.assert_close(encoder(texts).texts[:, 0], rows.texts[:, 0])
    torch.testing.assert_close(rows.pair_images[:, 0], rows.pair_texts[:, 0])
    other = make_batch(pairs.layout, images=255 - pairs.images, pair_tokens=pairs.pair_tokens)
    assert not torch.allclose(encoder(other).pair_texts[:, 0], rows.pair_texts[:, 0], atol=1e-4), "words see no picture"


def test_every_weight_learns_without_pairs_in_the_first_pass():
    task = PretrainTask(MODEL, (), (Contrastive(embed_dim=8), Matching()))
    batch = dual_batch(39)
    batch = replace(batch, draws={"matching": torch.rand(2 * len(batch.images), 1)})
    task(batch)["loss"].backward()
    still = {name for name, value in task.named_parameters() if value.grad is None}
    assert not still
    torch.manual_seed(0)
    rows = PretrainTask(MODEL, (), (Contrastive(embed_dim=8), Matching()), checkpointing=1)
    rows.load_state_dict(task.state_dict())
    rows(batch)["loss"].backward()
    for own, other in zip(task.parameters(), rows.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


SMALL = replace(MODEL, image_size=16, patch_size=4, vocab_size=32, max_text_len=10)


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(SMALL, (), (Contrastive(temperature=0.5), Matching()), layers)


def test_two_ranks_under_zero3_give_the_losses_of_one_process():
    """Its first pass fuses no pair, its second one has no text alone."""
    check_equal(build, "zero3.json", ("loss", "loss/matching", "loss/contrastive"))


PAIRS = PairShards("x", text_len=LENGTH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop_path": 0.1}, r"drop_path=0\.1: TextQueriesImage has none; set it to 0"),
        (
            {"objectives": (MaskedData(text_ratio=0.1),)},
            r"no patches, so a pair's hidden patches .*; set it to 0",
        ),
        (
            {"objectives": (Captioning(),)},
            r"captioning predicts .* in TextQueriesImage each word sees the whole text; take",
        ),
    ],
)
def test_stages_that_it_refuses(changes, said):
    options = {"mix": {"pairs": PAIRS}, "batch": BatchSize(pairs=4), "optim": Optim(), "steps": 1,
               "objectives": (MaskedData(pair_image_ratio=0),)}  # fmt: skip
    Recipe(name="x", model=MODEL, stages={"x": Stage(**options)})
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": Stage(**(options | changes))})


def test_a_model_without_fusion_is_refused():
    with pytest.raises(ValueError, match=r"model\.fusion_depth=0 is below 1; use 1 or more"):
        replace(MODEL, fusion_depth=0)
