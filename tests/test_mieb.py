"""mteb's door: what its evaluations call gives our vectors; where it is installed, it runs a task of local pictures."""

from __future__ import annotations

import importlib.util
import io
import sys

import pytest
import torch
from PIL import Image

import pretrain
import tests.vision_operators  # noqa: F401
from pretrain.mieb import Encoder, main
from tests.test_pretrained import pictures, stage, task  # noqa: F401, the fixtures
from tests.toys import refused

TEXTS = ["a red bus", "two small dogs", "a cat"]


def opened(count: int) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in pictures(count)]


def test_it_gives_our_vectors(stage):  # noqa: F811
    ours = pretrain.load(stage)
    encoder, close = Encoder(ours), {"rtol": 0, "atol": 1e-6}
    images, texts = ours.embed_images(pictures(3)), ours.embed_texts(TEXTS)
    split = [{"image": opened(3)[:2]}, {"image": opened(3)[2:]}]
    torch.testing.assert_close(
        encoder.encode(split, task_metadata=None, hf_split="test", hf_subset="x"), images, **close
    )
    torch.testing.assert_close(encoder.encode([{"text": TEXTS, "id": [0, 1, 2]}]), texts, **close)
    both = encoder.encode([{"text": TEXTS, "image": opened(3)}])
    torch.testing.assert_close(both, images + texts, **close)
    torch.testing.assert_close(encoder.similarity((3 * images).numpy(), texts), images @ texts.T, **close)
    torch.testing.assert_close(encoder.similarity_pairwise(images, texts), (images * texts).sum(-1), **close)
    assert encoder.encode([]).shape == (0, images.shape[1])
    with pytest.raises(ValueError, match="holds audio and neither image nor text; choose other tasks"):
        encoder.encode([{"audio": []}])


def test_what_cannot_be_used_is_one_sentence(stage, tmp_path, monkeypatch, capsys):  # noqa: F811
    (stage / "text.model").unlink()
    with pytest.raises(ValueError, match="without a text tokenizer"):
        Encoder(pretrain.load(stage))
    monkeypatch.setitem(sys.modules, "mteb", None)
    line = [stage, "--tasks", "CIFAR10ZeroShot", "--out", tmp_path / "out"]
    assert "mteb cannot be imported" in refused(capsys, main, *line)
    assert "--batch 0 is below 1; use 64" in refused(capsys, main, *line, "--batch", "0")


@pytest.mark.skipif(
    importlib.util.find_spec("mteb") is None, reason="mteb is not installed; it is no part of the suite"
)
def test_a_task_of_local_pictures_runs_in_mteb(stage, tmp_path, capsys):  # noqa: F811
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    class Local(AbsTaskZeroShotClassification):
        metadata = mteb.get_task("CIFAR10ZeroShot").metadata.model_copy(update={"name": "LocalZeroShot"})
        input_column_name, label_column_name = "image", "label"

        def load_data(self, **_) -> None:
            data = Dataset.from_dict({"image": opened(6), "label": [n % 3 for n in range(6)]})
            self.dataset, self.data_loaded = DatasetDict(test=data), True

        def get_candidate_labels(self) -> list[str]:
            return TEXTS

    ours = pretrain.load(stage)
    encoder = Encoder(ours)
    assert encoder.mteb_model_meta.embed_dim == ours.head.width and encoder.mteb_model_meta.name == "imglish/model"
    result = mteb.evaluate(encoder, Local(), cache=mteb.ResultCache(tmp_path), co2_tracker=False)
    nearest = (ours.embed_images(pictures(6)) @ ours.embed_texts(TEXTS).T).argmax(-1)
    wanted = (nearest == torch.arange(6) % 3).double().mean().item()
    assert result.task_results[0].get_score() == pytest.approx(wanted)
    assert list(tmp_path.rglob("LocalZeroShot.json"))
    assert "mteb does not know it" in refused(capsys, main, stage, "--tasks", "NoSuchTask", "--out", tmp_path / "x")
