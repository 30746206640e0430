"""BLIP's encoder and decoder: what comes out for each kind of sequence, that every weight learns, ZeRO-3, and what it
refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pretrain import export
from pretrain.batch import PAD, Layout, make_batch
from pretrain.checkpoint.weights import WEIGHTS, write_weights
from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.contracts import Pass
from pretrain.data.sources import PairShards
from pretrain.layers import PLAIN, Layers
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.run.inputs import text_tokenizer
from pretrain.tasks.pretrain import PretrainTask, shares_pictures
from tests.distributed import run_ranks
from tests.models.decoder.blips import CAPTIONER, write_blip
from tests.models.towers.others import LENGTH, dual_batch, write_tokenizer
from tests.step_batches import CONFIGS, DUAL, Trained, mean_reports, train_alone, train_on_ranks
from tests.step_batches import dual_batch as step_dual_batch
from tests.toy_models import random_batch
from tests.toys import refused

MODEL = EncoderDecoder(
    dim=16, heads=2, ffn_dim=32, image_depth=1, text_depth=2, image_size=32, patch_size=8, vocab_size=40,
    max_text_len=LENGTH, init_std=0.1,
)  # fmt: skip
QUERIES = TextQueriesImage(
    dim=16, heads=2, ffn_dim=32, image_depth=1, text_depth=1, fusion_depth=1, image_size=32, patch_size=8,
    vocab_size=40, max_text_len=LENGTH, init_std=0.1,
)  # fmt: skip
WORDS = Captioning(smoothing=0.1, tied_text_head=True, transform=True)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_each_kind_comes_out_as_it_does_alone(causal):
    layout = Layout(2, 3, 2, patches=16, pair_len=7, text_len=LENGTH, dual=2, causal=causal)
    batch = random_batch(layout, cfg=replace(MODEL.shape, vocab_size=38))
    encoder = MODEL.build(()).eval()
    rows = encoder(batch)
    assert [tuple(kind.shape) for kind in rows] == [(2, 17, 16), (3, 1, 16), (3, 7, 16), (2, LENGTH, 16)]
    parts = {"images": batch.images[2:], "image_masks": batch.image_masks[2:], "pair_tokens": batch.pair_tokens}
    pairs = make_batch(Layout(pairs=3, patches=16, pair_len=7, causal=causal), **parts, pair_inputs=batch.pair_inputs)
    texts = make_batch(Layout(texts=2, text_len=LENGTH), text_tokens=batch.text_tokens, text_inputs=batch.text_inputs)
    real = batch.pair_inputs != PAD
    torch.testing.assert_close(encoder(pairs).pair_texts[real], rows.pair_texts[real])
    torch.testing.assert_close(encoder(texts).texts[:, 0], rows.texts[:, 0])
    torch.testing.assert_close(rows.pair_images[:, 0], rows.pair_texts[:, 0])
    last = batch.pair_inputs.clone()
    last[:, 2] = 20 + last[:, 2] % 7
    changed = encoder(make_batch(pairs.layout, **parts, pair_inputs=last)).pair_texts
    same = torch.allclose(changed[:, :2], rows.pair_texts[:, :2], atol=1e-6)
    assert same == causal, "a word that is written sees none behind it, one that is read sees all"


def test_every_weight_learns_and_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (0, 1):
        torch.manual_seed(0)
        task = PretrainTask(MODEL, (), (Contrastive(8, projection_bias=True), Matching(), WORDS),
                            checkpointing=checkpointing)  # fmt: skip
        batch = dual_batch(38)
        batch = replace(batch, draws={"matching": torch.rand(2 * len(batch.images), 1)})
        task(batch)["loss"].backward()
        assert not {name for name, value in task.named_parameters() if value.grad is None}
        grads.append({name: value.grad for name, value in task.named_parameters()})
    causal = {name for name, value in grads[0].items() if ".causal" in name and value.any()}
    assert len(causal) > 10 and "objectives.captioning.words.weight" not in grads[0]  # it is the word table
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


@pytest.mark.parametrize("model", [MODEL, QUERIES], ids=["BLIP", "ALBEF"])
@pytest.mark.parametrize("negatives", ["global", "local"])
def test_pictures_that_were_encoded_once_give_the_same_gradients(model, negatives, monkeypatch):
    """As encoding them in each pass, and the encoder sees so many fewer as `Pass.again` says."""
    seen, results = [], []
    batch = dual_batch(38)
    count = len(batch.images)
    batch = replace(batch, draws={"matching": torch.rand(2 * count, 1, generator=torch.Generator().manual_seed(3))})
    objectives = (Contrastive(8), Matching(negatives), *([WORDS] if model is MODEL else []))
    for shares in (True, False):
        monkeypatch.setattr(type(model), "shares_pictures", shares)
        torch.manual_seed(0)
        task = PretrainTask(model, (), objectives)
        task.encoder.image.register_forward_hook(lambda module, inputs, rows: seen.append(len(rows.images)))
        report = task(batch)
        report["loss"].backward()
        grads = {name: value.grad for name, value in task.named_parameters()}
        results.append((report, grads))
        passes = [Pass(batch.layout), *(each for own in objectives for each in own.passes(batch.layout))]
        pictures = [each.layout.images + each.layout.pairs - shares * each.again for each in passes]
        assert seen == [each for each in pictures if each]
        once = 1 if negatives == "local" else 2  # another rank's pictures are not shared
        assert sum(seen) == count * (once if shares else len(passes) + 2)
        seen.clear()
    (fast, fast_grads), (plain, plain_grads) = results
    assert fast.keys() == plain.keys() and fast_grads.keys() == plain_grads.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-6, atol=1e-6)
    for name, value in plain_grads.items():
        torch.testing.assert_close(fast_grads[name], value, rtol=1e-5, atol=1e-6)
    own = [float(value.abs().max()) for name, value in plain_grads.items() if name.startswith("encoder.image")]
    assert max(own) > 0.01, "a gradient that lacks a pass would be seen"


def test_hidden_pictures_are_encoded_again():
    hides = MaskedData(image_ratio=0.4, text_ratio=0, pair_text_ratio=0, pair_image_ratio=0, image_codes=8)
    assert shares_pictures(MODEL, (Contrastive(8), Matching()))
    assert not shares_pictures(MODEL, (Contrastive(8), Matching(), hides))
    assert not shares_pictures(MODEL, (WORDS,)), "there is no first pass"


OPTIM, STEPS = Optim(lr=1e-3, warmup_steps=1, clip=1.0), 3
SMALL = replace(MODEL, image_size=16, patch_size=4, vocab_size=34, max_text_len=10)


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    contrast = Contrastive(8, temperature=0.5, projection_bias=True)
    return PretrainTask(SMALL, (), (contrast, Matching(), WORDS), layers)


def train_zero3() -> Trained:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.sizes import Parallel
    from pretrain.parallel.tensor import parallel_layers

    config = load_ds_config(CONFIGS / "zero3.json", micro=4 * DUAL // 2, accumulation=1, world=2, clip=OPTIM.clip)
    config.pop("bf16", None)
    mesh = create_mesh(Parallel())
    with partitioned_init(config):
        task = build(parallel_layers(mesh))
    engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
    return train_on_ranks(engine, mesh, step_dual_batch, STEPS)


def test_two_ranks_under_zero3_give_the_losses_of_one_process():
    """All three losses; the words' matrix is the embedding's, which ZeRO-3 splits once."""
    alone = train_alone(build(), OPTIM, [step_dual_batch(step) for step in range(1, STEPS + 1)])
    reports = mean_reports(run_ranks(train_zero3, 2))
    for name in ("loss", "loss/matching", "loss/contrastive", "loss/captioning"):
        off = [abs(own[name] - want[name]) for own, want in zip(reports, alone.reports, strict=True)]
        assert max(off) <= 1e-6, (name, off)
    assert alone.reports[0]["loss"] != alone.reports[1]["loss"]


def test_a_larger_vocabulary_keeps_its_own_ids_last():
    table = torch.arange(40.0).unsqueeze(1).expand(40, 16)
    larger = replace(MODEL, vocab_size=48)
    new = larger.adapt({"x": table}, MODEL, {"x": (48, 16)})["x"]
    assert new[:38, 0].tolist() == table[:38, 0].tolist() and new[-2:, 0].tolist() == [38, 39]
    assert (new[38:46, 0] == table[:38, 0].mean()).all()


PAIRS = PairShards("x", text_len=LENGTH)
STAGE = Stage(mix={"pairs": PAIRS}, batch=BatchSize(pairs=4), optim=Optim(), steps=1, objectives=(Captioning(),))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop_path": 0.1}, r"drop_path=0\.1: EncoderDecoder has none; set it to 0"),
        (
            {"objectives": (MaskedData(text_ratio=0.1),)},
            r"no patches, so a pair's hidden patches .*; set it to 0",
        ),
    ],
)
def test_stages_that_it_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": replace(STAGE, **changes)})


def test_a_tokenizer_that_leaves_no_room_for_its_own_ids(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", "bert")  # 25 ids
    recipe = Recipe(name="x", model=MODEL, stages={"x": STAGE}, text_tokenizer=str(path))
    assert text_tokenizer(recipe, STAGE) is not None
    small = replace(recipe, model=replace(MODEL, vocab_size=26))
    with pytest.raises(ValueError, match=r"25 ids of .* and 2 of the model's own; use model.vocab_size=64"):
        text_tokenizer(small, STAGE)


@pytest.mark.parametrize(
    ("config", "vision", "said"),
    [
        (
            {"architectures": ["BlipForQuestionAnswering"]},
            {},
            "holds a BlipForQuestionAnswering of the kind blip; give",
        ),
        ({}, {"hidden_size": 24}, "its vision encoder has hidden_size=24 and its text encoder 16; give a BLIP whose"),
        ({}, {"hidden_act": "relu"}, "its activations are relu and gelu; give a BLIP with gelu"),
    ],
)
def test_directories_that_it_refuses(config, vision, said, tmp_path, capsys):
    write_blip(tmp_path / "x", CAPTIONER, **vision)
    told = json.loads((tmp_path / "x/config.json").read_text()) | config
    (tmp_path / "x/config.json").write_text(json.dumps(told))
    assert said in refused(capsys, export.main, "from-hf", tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_multiway_encoders_are_written_out(tmp_path, capsys):
    write_weights(PretrainTask(MODEL, (), (Captioning(),)).state_dict(), tmp_path / WEIGHTS, {"model": to_json(MODEL)})
    said = refused(capsys, export.main, "to-hf", tmp_path, tmp_path / "out")
    assert "has a EncoderDecoder, not a Multiway encoder; give the directory of one" in said
