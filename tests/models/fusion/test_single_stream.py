"""Words and features in a single stream: against transformers' VisualBERT, and what comes out for each kind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from pretrain.batch import PAD, Layout
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.single_stream import SingleStream
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.kinds import check_alone
from tests.models.fusion.two_ranks import check_equal
from tests.models.towers.others import moved
from tests.toy_models import random_batch

MODEL = SingleStream(
    dim=16, heads=2, ffn_dim=32, depth=2, vit_dim=24, vit_heads=3, vit_depth=1, image_size=16, patch_size=4,
    vocab_size=32, max_text_len=10, init_std=0.1,
)  # fmt: skip
LAYOUT = Layout(images=2, pairs=3, texts=2, patches=16, pair_len=7, text_len=10, dual=2)
NEAR = {"atol": 1e-5, "rtol": 1e-5}
# transformers' names of a layer of BERT -> ours.
OWN = {
    "attention.self.query": "own.q", "attention.self.key": "own.k", "attention.self.value": "own.v",
    "attention.output.dense": "own.out", "attention.output.LayerNorm": "own_norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip


def batch_of(layout: Layout = LAYOUT):
    return random_batch(layout, cfg=MODEL.shape)


def reference():
    import transformers

    config = transformers.VisualBertConfig(
        vocab_size=32, hidden_size=16, visual_embedding_dim=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.VisualBertModel(config, add_pooling_layer=False)


def weights_of(ours, theirs):
    """(ours, theirs) of every weight of both streams' blocks."""
    for own, their in zip(ours.stream, theirs.encoder.layer, strict=True):
        for name, short in OWN.items():
            for part in ("weight", "bias"):
                yield own.get_parameter(f"{short}.{part}"), their.get_parameter(f"{name}.{part}")


@torch.no_grad()
def take_embeddings(ours, theirs) -> None:
    """Theirs adds a row for the kind and one for the first place to every feature, and to every word one for its kind:
    a part of our bias and our positions. One norm serves both."""
    table = theirs.embeddings
    ours.text_embed.tokens.weight.copy_(table.word_embeddings.weight)
    ours.text_embed.positions.copy_(table.position_embeddings.weight + table.token_type_embeddings.weight[0])
    ours.feature.weight.copy_(table.visual_projection.weight)
    row = table.visual_token_type_embeddings.weight[1] + table.visual_position_embeddings.weight[0]
    ours.feature.bias.copy_(table.visual_projection.bias + row)
    for norm in (ours.text_embed.norm, ours.feature_norm):
        norm.weight.copy_(table.LayerNorm.weight)
        norm.bias.copy_(table.LayerNorm.bias)


def test_pairs_equal_visual_bert_and_their_gradients_too():
    torch.manual_seed(0)
    theirs, ours = moved(reference()), moved(MODEL.build(()))
    take_embeddings(ours, theirs)
    with torch.no_grad():
        for own, their in weights_of(ours, theirs):
            own.copy_(their)
    batch = batch_of(Layout(pairs=3, patches=16, pair_len=7))
    real = batch.pair_inputs != PAD
    wanted = theirs(
        input_ids=batch.pair_inputs, attention_mask=real.long(),
        visual_embeds=streams.pictures(ours.vit, batch).detach(), visual_attention_mask=torch.ones(3, 17),
    ).last_hidden_state.split([7, 17], 1)  # fmt: skip
    got = ours(batch)
    torch.testing.assert_close(got.pair_texts[real], wanted[0][real], **NEAR)
    torch.testing.assert_close(got.pair_images, wanted[1], **NEAR)
    for text, image in ((got.pair_texts, got.pair_images), wanted):
        (text[real].square().sum() + image.square().sum()).backward()
    for own, their in weights_of(ours, theirs):
        torch.testing.assert_close(own.grad, their.grad, atol=1e-5 * float(their.grad.abs().max() + 1), rtol=1e-5)


def test_each_kind_comes_out_as_it_does_alone():
    rows, _ = check_alone(MODEL.build(()).eval(), batch_of())
    assert [tuple(kind.shape) for kind in rows] == [(2, 17, 16), (3, 17, 16), (3, 7, 16), (2, 10, 16)]


OBJECTIVES = (
    Contrastive(embed_dim=8), Matching(alignment=0.1), MaskedData(image_codes=24, dual=False, tied_text_head=True),
)  # fmt: skip


def test_every_weight_learns():
    torch.manual_seed(0)
    batch = batch_of()
    batch = replace(
        batch,
        draws={"matching": torch.rand(len(batch.images) + len(batch.text_tokens), 1)},
        image_codes=torch.randint(20, (len(batch.images), 16)),
        image_masks=torch.rand(len(batch.images), 16) < 0.4,
        pair_masked=torch.arange(7).expand(3, 7) == 1,
    )
    task = PretrainTask(MODEL, ("vision", "language"), OBJECTIVES)
    task(batch)["loss"].backward()
    assert not {name for name, value in task.named_parameters() if value.grad is None or not value.grad.any()} - {
        name for name, _ in task.named_parameters() if ".own.k.bias" in name or name.endswith("attention.k.shared.bias")
    }
    again = PretrainTask(MODEL, ("vision", "language"), OBJECTIVES, checkpointing=1)
    again.load_state_dict(task.state_dict())
    again(batch)["loss"].backward()
    for own, other in zip(task.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, (), (Contrastive(temperature=0.5, embed_dim=16), Matching(alignment=0.1)), layers)


def test_two_ranks_under_zero3_give_the_losses_of_one_process():
    check_equal(build, "zero3.json", ("loss", "loss/matching", "loss/contrastive"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop_path": 0.1}, r"drop_path=0\.1: SingleStream has none; set it to 0"),
        (
            {"objectives": (Captioning(),)},
            r"captioning predicts .* in SingleStream each word sees the whole text; take",
        ),
    ],
)
def test_stages_that_it_refuses(changes, said):
    options = {"mix": {"pairs": PairShards("x", text_len=9)}, "batch": BatchSize(pairs=4), "optim": Optim(), "steps": 1,
               "objectives": (MaskedData(),)}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": Stage(**(options | changes))})


def test_it_is_the_same_from_a_file_and_counts_the_products_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    assert SingleStream(**json.loads(json.dumps(asdict(MODEL)))) == MODEL
    with pytest.raises(ValueError, match=r"model\.depth=0 is below 1; use 1 or more"):
        replace(MODEL, depth=0)
    alike = replace(LAYOUT, pair_len=10)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        MODEL.build(())(batch_of(alike))
    assert MODEL.flops(alike) / 3 == pytest.approx(counted.get_total_flops(), rel=0.02)
