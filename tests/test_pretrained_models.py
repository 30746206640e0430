"""pretrain.load of encoders that are no Multiway: two towers, late fusion, words that ask the picture, co-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretrain
from pretrain.batch import BOS, EOS, PAD, UNK, Layout, make_batch
from pretrain.checkpoint.weights import write_weights
from pretrain.clip_benchmark import load_for_benchmark
from pretrain.config import to_json
from pretrain.embed import main as embed
from pretrain.embed import read_vectors
from pretrain.export import main as export
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.parallel.state import named_state
from pretrain.search import main as search
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.test_co_attention import MODEL as CO_ATTENTION
from tests.models.fusion.test_late import MODEL as LATE
from tests.models.fusion.test_several_depths import MODEL as DEPTHS
from tests.models.fusion.test_single_stream import MODEL as SINGLE
from tests.models.fusion.test_text_queries_image import SMALL as ASKING
from tests.models.towers.others import whole_model, write_directory
from tests.test_pretrained import pictures
from tests.toy_models import EXPERTS, PAPER, RELEASED
from tests.toys import needs, refused, write_text_model

TEXTS = ["ab", "b a b", ""]
WORDS = MaskedData(image_ratio=0, pair_image_ratio=0, transform=True, tied_text_head=True)
MODELS: dict[str, tuple[Any, list]] = {
    "LateFusion": (LATE, [Contrastive(), Matching()]),
    "TextQueriesImage": (ASKING, [Contrastive(embed_dim=8, projection_bias=True), Matching(), WORDS]),
    "SeveralDepths": (DEPTHS, [Contrastive(embed_dim=8), Matching()]),
    "SingleStream": (SINGLE, [Contrastive(embed_dim=8), Matching("random")]),
    "CoAttention": (CO_ATTENTION, [Contrastive(embed_dim=8), Matching("random")]),
}


def stage_of(place: Path, model: Any, objectives: list) -> tuple[Path, PretrainTask]:
    torch.manual_seed(1)
    task = PretrainTask(model, EXPERTS if model is not RELEASED else EXPERTS[:2], objectives).eval()
    state = {name: value[: getattr(value, "real_rows", None)].clone() for name, value in named_state(task).items()}
    write_weights(state, place / "weights.safetensors", {"model": to_json(model)})
    write_text_model(place / "text.model", ["ab", "ba a", "a b"] * 9, 12)
    return place, task


@pytest.mark.parametrize("kind", MODELS)
def test_its_vectors_and_answers_are_those_of_the_model(kind, tmp_path):
    needs("transformers")
    model, objectives = MODELS[kind]
    place, task = stage_of(tmp_path, model, objectives)
    loaded = pretrain.load(place)
    pixels = torch.stack([loaded.look(each) for each in pictures(3)])
    tokens = loaded.tokens(TEXTS)
    length, patches = tokens.shape[1], (model.image_size // model.patch_size) ** 2
    with torch.no_grad():
        dual = Layout(images=3, texts=3, patches=patches, text_len=length, dual=3)
        apart = task.encoder(make_batch(dual, images=pixels, text_tokens=tokens))
        images, texts = task.objectives["contrastive"].embed(apart, dual)
        fused = task.encoder(make_batch(Layout(pairs=3, patches=patches, pair_len=length), images=pixels,
                                        pair_tokens=tokens))  # fmt: skip
        wanted = task.objectives["matching"].match(fused.first.pair_images).softmax(-1)[:, 1]
    near = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(loaded.similarity(pictures(3), TEXTS, batch=2), images @ texts.T, **near)
    torch.testing.assert_close(loaded.score_pairs(pictures(3), TEXTS, batch=2), wanted, **near)
    torch.testing.assert_close(loaded.embed_pairs(pictures(3), TEXTS), fused.first.pair_images, **near)
    assert loaded.embed_pairs([], []).shape == (0, model.width("pair_images"))
    with pytest.raises(ValueError, match=r"no masked head|a TextQueriesImage reads whole texts and writes none"):
        loaded.caption(pictures(1))
    if kind == "TextQueriesImage":
        (((_, best), *_),) = loaded.fill_mask(["a <mask>"], pictures(1))[0]
        ids = [BOS, *loaded.tokenizer().pieces("a"), loaded.tokenizer().mask_id, EOS]
        alone = make_batch(Layout(pairs=1, patches=patches, pair_len=len(ids)), images=pixels[:1],
                           pair_tokens=torch.tensor([ids]))  # fmt: skip
        with torch.no_grad():
            said = task.objectives["masked"].words.logits(task.encoder(alone).pair_texts[0, -2])
        written = [place for place in range(loaded.tokenizer().mask_id) if place not in (BOS, PAD, EOS, UNK)]
        assert abs(said[written].softmax(-1).max().item() - best) < 1e-6


def test_two_towers_answer_as_the_published_model(tmp_path, capsys):
    needs("transformers")
    theirs = whole_model("clip")
    assert export(["from-hf", str(write_directory(tmp_path / "hf", theirs, "clip")), str(tmp_path / "ours")]) == 0
    model, texts = pretrain.load(tmp_path / "ours"), ["word1 word2", "word3"]
    pixels = torch.stack([model.look(each) for each in pictures(3)])
    with torch.no_grad():
        shown = theirs.vision_model(pixel_values=(pixels / 255 - model.task.encoder.vision.mean)
                                    / model.task.encoder.vision.std).pooler_output  # fmt: skip
        wanted = torch.nn.functional.normalize(theirs.visual_projection(shown), dim=-1)
    torch.testing.assert_close(model.embed_images(pictures(3), batch=2), wanted, rtol=0, atol=1e-5)
    assert model.embed_images([]).shape == (0, 12) and model.similarity(pictures(3), texts).shape == (3, 2)
    named = load_for_benchmark("x", str(tmp_path / "ours"))[0]
    torch.testing.assert_close(named.encode_image(pixels), model.embed_images(pictures(3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(named.encode_text(named.tokenizer(texts)), model.embed_texts(texts), rtol=0, atol=1e-6)
    for call, said in (
        (lambda: model.embed_pairs(pictures(2), texts), "DualTowers have no rows of pair_images"),
        (lambda: model.patches(pictures(1)), "gives one row for each picture; use embed_images"),
        (lambda: model.score_pairs(pictures(2), texts), "DualTowers have no rows of pair_images"),
        (lambda: model.caption(pictures(1)), "no masked head"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    (tmp_path / "pictures").mkdir()
    for number, data in enumerate(pictures(3)):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(data)
    vectors = tmp_path / "vectors"
    assert embed([str(tmp_path / "ours"), str(tmp_path / "pictures"), "--out", str(vectors)]) == 0
    np.testing.assert_allclose(read_vectors(vectors)[1], model.embed_images(pictures(3)).numpy(), atol=1e-6)
    capsys.readouterr()
    assert search([str(vectors), "--weights", str(tmp_path / "ours"), "word3"]) == 0
    best = int(model.similarity(pictures(3), ["word3"]).argmax())
    assert f"{best}.jpg" in capsys.readouterr().out.splitlines()[1]


def test_matching_without_a_contrast_is_asked_too(tmp_path):
    """ViLT's partners are random, and it has no contrast."""
    place, _ = stage_of(tmp_path, PAPER, [Matching("random")])
    assert pretrain.load(place).score_pairs(pictures(2), TEXTS[:2]).shape == (2,)


def test_graphs_are_written_of_multiway_and_of_two_towers(tmp_path, capsys):
    needs("onnxruntime")
    place, _ = stage_of(tmp_path / "x", *MODELS["TextQueriesImage"])
    assert "has a TextQueriesImage, not" in refused(capsys, export, "to-onnx", place, tmp_path / "onnx")


@pytest.mark.parametrize("to", ["to-hf", "to-released"])
def test_a_word_head_with_a_transform_is_not_written_for_others(to, tmp_path, capsys):
    """Neither format has a place for it, and without it the words would be wrong."""
    place, _ = stage_of(tmp_path / "x", RELEASED, [MaskedData(image_ratio=0, pair_image_ratio=0, transform=True)])
    assert " transform" in refused(capsys, export, to, place, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
