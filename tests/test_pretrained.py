"""pretrain.load: what it reads, that its vectors are those of the model, and what it refuses."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from pretrain.batch import Layout, make_batch
from pretrain.checkpoint.save import average_in
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.data.shards.reader import BadSample
from pretrain.data.transforms import ImageTransform
from pretrain.models.generation import Writing
from pretrain.objectives.answering import Answering
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.parallel.state import named_state
from pretrain.pretrained import Pretrained
from pretrain.released_weights import to_released, write_tensors
from pretrain.run.hand_over import carry_over
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import RELEASED, VQ
from tests.toys import encoded, picture, write_text_model

TEXTS = ["a red bus", "two small dogs and a cat", ""]


@pytest.fixture(scope="module")
def task() -> PretrainTask:
    torch.manual_seed(3)
    return PretrainTask(RELEASED, ("vision", "language"), [Contrastive()]).eval()


@pytest.fixture
def stage(tmp_path: Path, task) -> Path:
    """A stage's directory as training leaves it."""
    config = {"model": to_json(RELEASED), "look": {"evaluation": "crop"}}
    write_weights(task.state_dict(), tmp_path / "retrieval" / "weights.safetensors", config)
    write_text_model(tmp_path / "retrieval" / "text.model", TEXTS * 9, RELEASED.vocab_size - 2)
    return tmp_path / "retrieval"


def test_another_text_tokenizer_than_the_weights_came_with_is_refused(stage, tmp_path):
    other = write_text_model(tmp_path / "other.model", ["red and blue", "some dogs"] * 9, RELEASED.vocab_size - 2)
    with pytest.raises(ValueError, match=r"other\.model is not the text tokenizer that .* came with, .*; leave it out"):
        pretrain.load(stage, text_tokenizer=other)
    same = tmp_path / "same.model"
    same.write_bytes((stage / "text.model").read_bytes())
    assert pretrain.load(stage, text_tokenizer=same).text.path == same


def pictures(count: int = 5) -> list[bytes]:
    return [encoded(picture(seed, width=60 + seed, height=50)) for seed in range(count)]


def test_its_vectors_are_those_of_the_model_whatever_the_batches(stage, task):
    model = pretrain.load(stage)
    images, texts = model.embed_images(pictures(), batch=2), model.embed_texts(TEXTS, batch=2)
    torch.testing.assert_close(images, model.embed_images(pictures()), rtol=0, atol=1e-6)
    look = ImageTransform(size=RELEASED.image_size, train=False)
    pixels = torch.stack([torch.from_numpy(look(data)) for data in pictures()])
    head, layout = task.objectives["contrastive"], Layout(images=5, patches=RELEASED.patches)
    with torch.no_grad():
        expected = head.embed_images(task.encoder(make_batch(layout, images=pixels)))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.embed_texts(TEXTS[1:2]), texts[1:2], rtol=0, atol=1e-6)  # padding changes nothing
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(model.similarity(pictures(), TEXTS), images @ texts.T, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_head_is_the_one_that_the_last_stage_trained(tmp_path, task):
    """The stage before had projections with a bias and a word head with a transform, and this one has neither."""
    torch.manual_seed(5)
    contrast, words = Contrastive(projection_bias=True), MaskedData(image_codes=7, transform=True)
    before = PretrainTask(RELEASED, ("vision", "language"), [contrast, words])
    state = {name: torch.randn_like(value) for name, value in before.state_dict().items()}
    write_weights(state, tmp_path / "before" / "weights.safetensors", {"model": to_json(RELEASED)})
    after = PretrainTask(
        RELEASED, ("vision", "language"), [Contrastive(), MaskedData(image_ratio=0, pair_image_ratio=0)]
    )
    whole = carry_over(after.state_dict(), tmp_path / "before")
    write_weights(whole, tmp_path / "after" / "weights.safetensors", {"model": to_json(RELEASED)})
    assert whole["objectives.masked.image.weight"].equal(state["objectives.masked.image.weight"])  # it is not built
    loaded = pretrain.load(tmp_path / "after", device="cpu").task
    assert {n: v for n, v in loaded.state_dict().items() if "objectives" in n}.keys() == {
        name for name in after.state_dict() if "objectives" in name
    }


def test_of_a_checkpoint_with_an_average_that_is_loaded(tmp_path, task, monkeypatch):
    """As pretrain.evaluate does; a tied head's average is that of the table, under whose name alone it is saved."""
    table, head = "encoder.text_embed.tokens.weight", "objectives.masked.text.weight"
    tied = PretrainTask(RELEASED, ("vision", "language"), [MaskedData(image_codes=7, tied_text_head=True)])
    raw = {name: value.clone() for name, value in tied.state_dict().items()}
    assert raw[head].equal(raw[table])
    average = {table: raw[table] + 1, "encoder.vision_embed.cls_token": raw["encoder.vision_embed.cls_token"] + 1}
    monkeypatch.setattr("pretrain.checkpoint.save.read_average", lambda files, shapes: dict(average) if files else {})
    write_weights(raw, tmp_path / "weights.safetensors", {"model": to_json(RELEASED)})
    (tmp_path / "moments_rank00000.safetensors").touch()
    assert average_in(tmp_path).keys() == {*average, head} and average_in(tmp_path)[head].equal(raw[table] + 1)
    for place in (tmp_path, tmp_path / "weights.safetensors"):
        state = pretrain.load(place, device="cpu").task.state_dict()
        assert all(state[name].equal(value) for name, value in average.items())
        assert state[head].equal(average[table])


def test_patches_are_the_rows_behind_the_class_row(stage, task):
    model = pretrain.load(stage)
    pixels = torch.stack([model.look(data) for data in pictures(3)])
    with torch.no_grad():
        layout = Layout(images=3, patches=RELEASED.patches)
        rows = task.encoder(make_batch(layout, images=pixels)).images
    torch.testing.assert_close(model.patches(pictures(3), batch=2), rows[:, 1:], rtol=0, atol=1e-5)
    assert model.patches([]).shape == (0, RELEASED.patches, RELEASED.dim)


def test_classes_are_told_by_their_names(stage):
    model = pretrain.load(stage)
    scores = model.classify(pictures(2), ["bus", "dog"], ("a {}", "red {}"))
    texts = model.embed_texts(["a bus", "red bus", "a dog", "red dog"]).view(2, 2, -1).mean(1)
    expected = model.embed_images(pictures(2)) @ torch.nn.functional.normalize(texts, dim=-1).T
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_a_picture_is_the_same_in_whatever_form(stage, tmp_path):
    model, image = pretrain.load(stage), picture(1, width=40, height=40)
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data.getvalue(), Image.fromarray(image), image]
    vectors = model.embed_images(forms)
    assert (vectors == vectors[0]).all()
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image)))
    turned.getexif()[0x0112] = 6  # turn it back by 90 degrees
    assert (model.embed_images([turned, *forms[1:]]) == vectors).all()


def test_pairs_see_each_other(stage):
    model = pretrain.load(stage)
    both = model.embed_pairs(pictures(3), TEXTS, batch=2)
    assert both.shape == (3, RELEASED.dim)
    torch.testing.assert_close(model.embed_pairs(pictures(1), TEXTS[:1]), both[:1], rtol=0, atol=1e-5)
    assert (model.embed_pairs(pictures(1), TEXTS[1:2]) - both[:1]).abs().max() > 1e-3


def test_bfloat16_is_close_and_results_are_float32(stage):
    exact, rounded = (pretrain.load(stage, dtype=d).embed_images(pictures()) for d in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32 and not rounded.requires_grad
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["released.pth", "released.safetensors"])
def test_released_files_load_by_themselves(stage, task, tmp_path, name, monkeypatch):
    monkeypatch.setattr("pretrain.released_weights.RELEASED_HEAD_DIM", RELEASED.dim // RELEASED.heads)
    write_tensors(tmp_path / name, to_released(task.state_dict(), RELEASED))
    model = pretrain.load(tmp_path / name, text_tokenizer=stage / "text.model")
    torch.testing.assert_close(model.embed_texts(TEXTS), pretrain.load(stage).embed_texts(TEXTS), rtol=0, atol=1e-6)
    assert model.transform.evaluation == "squash"
    with pytest.raises(ValueError, match=r"without a text tokenizer; give load\(.*text_tokenizer="):
        pretrain.load(tmp_path / name).embed_texts(TEXTS)


def test_nothing_to_embed_is_nothing(stage):
    model = pretrain.load(stage)
    assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, RELEASED.dim)


@pytest.fixture
def fusion(tmp_path: Path) -> tuple[Path, PretrainTask]:
    """Weights with heads of masked words, matching and captions, over a vocabulary large enough to be padded."""
    torch.manual_seed(5)
    model = replace(RELEASED, vocab_size=4100)
    objectives = [Contrastive(), Matching(), MaskedData(image_codes=7), Captioning()]
    made = PretrainTask(model, ("vision", "language"), objectives).eval()
    state = {name: value[: getattr(value, "real_rows", None)] for name, value in named_state(made).items()}
    assert len(state["objectives.masked.text.bias"]) == 4100 < len(made.objectives["masked"].text.bias)
    write_weights(state, tmp_path / "fusion" / "weights.safetensors", {"model": to_json(model)})
    write_text_model(tmp_path / "fusion" / "text.model", TEXTS * 9, RELEASED.vocab_size - 2)
    return tmp_path / "fusion", made


def pair_rows(model: Pretrained, task: PretrainTask, texts: list[list[int]], count: int):
    """What the task itself makes of pictures with these ids."""
    pixels, tokens = torch.stack([model.look(data) for data in pictures(count)]), torch.tensor(texts)
    layout = Layout(pairs=count, patches=RELEASED.patches, pair_len=tokens.shape[1])
    with torch.no_grad():
        return task.encoder(make_batch(layout, images=pixels, pair_tokens=tokens))


def test_gaps_are_filled_with_and_without_a_picture(fusion):
    path, task = fusion
    model = pretrain.load(path)
    text = model.tokenizer()
    ids = [0, *text.pieces("a"), text.mask_id, *text.pieces("bus"), text.mask_id, 2]
    (gaps,) = model.fill_mask(["a <mask> bus <mask>"], pictures(1), best=3)
    encoded, head = pair_rows(model, task, [ids], 1), task.objectives["masked"].text
    places = [place for place, i in enumerate(ids) if i == text.mask_id]
    with torch.no_grad():
        shares, best = head.logits(encoded.pair_texts[0, places])[:, 4 : text.mask_id].softmax(-1).topk(3)
    got = torch.tensor([[share for _, share in gap] for gap in gaps])
    torch.testing.assert_close(got, shares, rtol=0, atol=1e-6)
    first = int(best[0, 0]) + 4
    assert gaps[0][0][0] == (text.decode([first]) or text.token(first))
    alone = model.fill_mask(["<mask>", "a <mask> bus <mask>"], batch=1)
    assert [len(gaps) for gaps in alone] == [1, 2] and alone[1] != gaps
    with pytest.raises(ValueError, match=r"'a bus' has no <mask>"):
        model.fill_mask(["a bus"])
    with pytest.raises(ValueError, match="the model reads 12; shorten it"):
        model.fill_mask(["<mask>" * 11])


def test_pairs_are_scored_by_the_matching_head(fusion):
    path, task = fusion
    model = pretrain.load(path)
    scores = model.score_pairs(pictures(2), ["a red bus", "a red bus"], batch=1)
    encoded = pair_rows(model, task, [[*model.tokenizer().encode("a red bus")]] * 2, 2)
    with torch.no_grad():
        expected = task.objectives["matching"].match(encoded.first.pair_images).softmax(-1)[:, 1]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_fine_tuned_stages_say_classes_and_answers(tmp_path):
    model = replace(RELEASED, final_norm=False)
    made = PretrainTask(model, ("vision", "language"), [ImageClassification(5), Answering(7)]).eval()
    write_weights(made.state_dict(), tmp_path / "weights.safetensors", {"model": to_json(model)})
    write_text_model(tmp_path / "text.model", TEXTS * 9, RELEASED.vocab_size - 2)
    loaded = pretrain.load(tmp_path)
    pixels = torch.stack([loaded.look(data) for data in pictures(3)])
    with torch.no_grad():
        images = made.encoder(make_batch(Layout(images=3, patches=RELEASED.patches), images=pixels))
        pairs = pair_rows(loaded, made, [loaded.tokenizer().encode("a bus")] * 3, 3)
        classes = made.objectives["classification"].logits(images).softmax(-1)
        answers = made.objectives["answering"].logits(pairs).sigmoid()
    torch.testing.assert_close(loaded.class_scores(pictures(3), batch=2), classes, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.answer_scores(pictures(3), ["a bus"] * 3, batch=2), answers, rtol=0, atol=1e-6)
    assert loaded.class_scores([]).shape == (0, 5) and loaded.answer_scores([], []).shape == (0, 7)


def test_captions_are_the_same_in_any_batches(fusion):
    model = pretrain.load(fusion[0])
    for how in (None, Writing(beams=1, top_p=0.9, max_words=6)):
        texts = model.caption(pictures(3), how, batch=2, seed=1)
        assert texts == model.caption(pictures(3), how, seed=1) and len(texts) == 3
    assert all(len(model.tokenizer().encode(text)) <= RELEASED.max_text_len for text in model.caption(pictures(3)))
    assert model.caption([]) == []


def test_weights_without_the_head_say_so(stage):
    model = pretrain.load(stage)
    for call, words in (
        (lambda: model.caption(pictures(1)), "no masked head; load a stage with Captioning"),
        (lambda: model.fill_mask(["<mask>"]), "no masked head; load a stage that hides words"),
        (lambda: model.class_scores(pictures(1)), "no classification head; fine-tune a stage for classes"),
        (lambda: model.answer_scores(pictures(1), ["a"]), "no answering head; fine-tune a stage on questions"),
        (lambda: model.score_pairs(pictures(1), ["a"]), "no matching head; train a stage with Matching"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_what_cannot_be_used_is_one_sentence(stage, tmp_path):
    model = pretrain.load(stage)
    with pytest.raises(BadSample, match=r"picture 1: not a readable JPEG, PNG or WebP header"):
        model.embed_images([pictures()[0], b"no picture"])
    with pytest.raises(ValueError, match=r"array float32 \(2, 2\) is no picture; give uint8"):
        model.embed_images([np.zeros((2, 2), np.float32)])
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        model.embed_pairs(pictures(2), TEXTS[:1])
    with pytest.raises(ValueError, match="batch=0"):
        model.embed_texts(TEXTS, batch=0)
    for path, words in ((tmp_path / "no", "does not exist"), (tmp_path, r"has no weights\.safetensors")):
        with pytest.raises(ValueError, match=words):
            pretrain.load(path)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 is not one of"):
        pretrain.load(stage, dtype=torch.float16)


def test_weights_of_another_kind_are_one_sentence(task, tmp_path):
    state = dict(task.state_dict())
    write_weights({}, tmp_path / "vq" / "weights.safetensors", {"tokenizer": to_json(VQ)})
    with pytest.raises(ValueError, match="has a VQKDConfig, not an encoder"):
        pretrain.load(tmp_path / "vq")
    del state["encoder.blocks.1.experts.vision.up.weight"]
    write_weights(state, tmp_path / "part" / "weights.safetensors", {"model": to_json(RELEASED)})
    with pytest.raises(ValueError, match=r"lacks encoder\.blocks\.1\.experts\.vision\.up\.weight"):
        pretrain.load(tmp_path / "part")
    bare = {name: value for name, value in task.state_dict().items() if "contrastive" not in name}
    write_weights(bare, tmp_path / "bare" / "weights.safetensors", {"model": to_json(RELEASED)})
    with pytest.raises(ValueError, match="have no contrastive head, so"):
        pretrain.load(tmp_path / "bare").embed_images(pictures(1))
