"""Retrieval with several captions a picture: the published protocol's numbers, from shards to eval.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pretrain.data.loader import Loader
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.shards.reader import BadSample
from pretrain.data.sources import CaptionShards, PairShards, captions_of
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform
from pretrain.evals.retrieval import Retrieval, both_ways, mean_of_folds, own_captions, recall
from pretrain.evals.trained import Trained
from pretrain.objectives.contrastive import Contrastive
from tests.toy_models import EXPERTS, PAPER
from tests.toys import encoded, pair_sample, picture, write_source, write_text_model

LENGTH = 12


def made_features(pictures: int, captions: int, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of pictures and of captions, each caption near its own picture, and whose they are."""
    count = torch.arange(pictures * width, dtype=torch.float64)
    images = torch.sin(count * count * 0.37).view(pictures, width)
    owner = torch.arange(pictures).repeat_interleave(captions)
    count = torch.arange(pictures * captions * width, dtype=torch.float64)
    texts = images[owner] + 1.3 * torch.sin(count * count * 0.53).view(-1, width)
    return (*(torch.nn.functional.normalize(rows, dim=1) for rows in (images, texts)), owner)


def test_numbers_are_those_of_the_published_protocol():
    """60 pictures of five captions. The expected numbers are what the top-k rule of unilm's beit3 retrieval gives: a
    picture hits if one of its k best captions is its own, a caption if one of its k best pictures is."""
    images, texts, owner = made_features(60, 5)
    right, scores = own_captions(owner, 60), images @ texts.T
    to_text, to_image = recall(scores, right), recall(scores.T, right.T)
    assert [round(to_text[k], 3) for k in ("R@1", "R@5", "R@10")] == [35.0, 78.333, 95.0]
    assert [round(to_image[k], 3) for k in ("R@1", "R@5", "R@10")] == [24.333, 64.667, 84.333]


def test_folds_are_parts_that_know_nothing_of_each_other():
    images, texts, owner = made_features(60, 5)
    texts, owner = texts[2:], owner[2:]  # the first picture has three captions
    means = mean_of_folds(images @ texts.T, own_captions(owner, 60), owner, 4)
    alone = []
    for start in range(0, 60, 15):
        own = (owner >= start) & (owner < start + 15)
        alone.append(both_ways(images[start : start + 15] @ texts[own].T, own_captions(owner[own] - start, 15)))
    assert means.pop("candidates") == 15
    assert means == {name: pytest.approx(sum(each[name] for each in alone) / 4) for name in alone[0]}
    assert means["text_to_image/R@1"] > both_ways(images @ texts.T, own_captions(owner, 60))["text_to_image/R@1"]
    with pytest.raises(ValueError, match="60 pictures do not make folds=7 equal parts"):
        mean_of_folds(images @ texts.T, own_captions(owner, 60), owner, 7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    words = (f"picture number {n} of many words" for n in range(400))
    return TextTokenizer(write_text_model(tmp_path_factory.mktemp("spm") / "text.model", words, 45))


def trained(tokenizer: TextTokenizer, directory: Path, samples: int) -> Trained:
    torch.manual_seed(0)
    head = Contrastive().build(PAPER, EXPERTS)
    task = SimpleNamespace(encoder=PAPER.build(EXPERTS).eval(), objectives={"contrastive": head})
    view = View(tokenizer, ImageTransform(PAPER.image_size, train=False), None, PAPER.patch_size)
    loading = Loading(workers=0, streams=4, block_shards=2)
    return Trained(
        task=task,
        device=torch.device("cpu"),
        directory=directory,
        loader=lambda mix, counts, masking: Loader(Mixture(mix, counts, loading=loading), view),
        with_codes=lambda batch: batch,
        draw_codes=None,
        samples_of=lambda source: samples,
        masking=None,
        text=tokenizer,
    )


def captioned(number: int, captions: list) -> dict:
    return {"key": f"{number:04d}", "jpg": encoded(picture(number)), "json": json.dumps({"captions": captions})}


def test_all_captions_of_a_picture_are_its_partners(tokenizer, tmp_path):
    """13 pictures with 2 to 4 captions, one of them unreadable and so replaced by another, in batches of 5."""
    lists = [[f"{n} of {k}" for k in range(2 + n % 3)] for n in range(13)]
    samples = [captioned(n, texts) for n, texts in enumerate(lists)]
    samples.append({"key": "none", "jpg": encoded(picture(99)), "json": b"{}"})
    source = CaptionShards(str(write_source(tmp_path / "data", [samples[:8], samples[8:]])), text_len=LENGTH)
    metrics, shown = Retrieval(source, samples=20, batch=5, folds=13).run(trained(tokenizer, tmp_path, 14))
    assert metrics["retrieval/folds/text_to_image/R@1"] == 100 and metrics["retrieval/folds/candidates"] == 1
    assert metrics["retrieval/candidates"] == 13 and metrics["retrieval/captions"] == sum(map(len, lists))
    texts = {text for texts in lists for text in texts}
    assert {row["query_text"] for row in shown["retrieval"] if row["query_text"]} <= texts
    # The same by hand: every caption with its picture, one pair after another.
    model = trained(tokenizer, tmp_path, 14)
    pairs = [pair_sample(f"{n:04d}-{k}", n, text) for n, each in enumerate(lists) for k, text in enumerate(each)]
    flat = PairShards(str(write_source(tmp_path / "flat", [pairs])), text_len=LENGTH)
    images, texts, keys = {}, [], []
    for batch in model.batches({"dual": flat}, 1, len(pairs)):
        image, text = model.head("contrastive").embed(model.task.encoder(batch), batch.layout)
        number = int(batch.keys[0].rsplit("/", 1)[1].split("-")[0])
        images[number] = image[0]
        texts.append(text[0])
        keys.append(number)
    scores = torch.stack([images[n] for n in range(13)]) @ torch.stack(texts).T
    hits = [keys[scores[n].argmax()] == n for n in range(13)]
    assert metrics["retrieval/image_to_text/R@1"] == pytest.approx(100 * sum(hits) / 13)
    hits = [n in scores[:, row].topk(5).indices.tolist() for row, n in enumerate(keys)]
    assert metrics["retrieval/text_to_image/R@5"] == pytest.approx(100 * sum(hits) / len(keys))


def test_a_picture_under_two_keys_with_two_captions_is_refused(tokenizer, tmp_path):
    samples = [pair_sample(f"{n}", n % 5, f"{n}") for n in range(6)]
    source = PairShards(str(write_source(tmp_path / "data", [samples])), text_len=LENGTH)
    with pytest.raises(ValueError, match=r"dual/00000/[05] and dual/00000/[05] are the same picture.*CaptionShards"):
        Retrieval(source, batch=3).run(trained(tokenizer, tmp_path, 6))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{}", 'no list "captions"'),
        (b'{"captions": "one text"}', 'no list "captions"'),
        (b'{"captions": []}', 'no list "captions"'),
        (b'{"captions": ["a text", 7]}', "no text"),
        (b'{"captions": ["a text", " "]}', "is empty"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_list_of_captions_is_a_bad_sample(content, says):
    with pytest.raises(BadSample, match=says):
        captions_of({"json": content})
