"""Good requests, and what single calls of the same weights answer."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from benchmarks.serve_clients.exchange import in_base64
from data_tools.drawn.captions import describe
from data_tools.drawn.scenes import draw_scene, random_scene
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.models.generation import Writing
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.pretrained import Pretrained
from pretrain.recipes.tiny import LOOK, MODEL
from pretrain.tasks.pretrain import PretrainTask

POOL = 40  # pictures, and as many texts
NAMES = ["red circle", "blue star", "green square", "yellow triangle", "purple ring"]
KINDS = ("png", "jpeg", "webp")

Compare = Callable[[Any], float]  # an answer -> the largest difference; inf: another caption, class or number of them
Request = tuple[str, dict[str, Any], Compare]


def scenes(seed: int = 0) -> tuple[list[bytes], list[str]]:
    """Drawn pictures as files of all kinds and sizes, and a caption of each."""
    rng, pictures, texts = random.Random(seed), list[bytes](), list[str]()
    for number in range(POOL):
        scene, data = random_scene(rng, held_out=False), io.BytesIO()
        draw_scene(scene, rng.choice((64, 96, 200)), rng).save(data, KINDS[number % len(KINDS)])
        pictures.append(data.getvalue())
        texts.append(describe(scene, rng)[0])
    return pictures, texts


def make_weights(stage: Path) -> Path:
    """A stage's directory with random weights of the quickstart's model, which embed and write."""
    torch.manual_seed(0)
    task = PretrainTask(MODEL, ("vision", "language"), [Contrastive(), Captioning()])
    config = {"model": to_json(MODEL), "look": {"evaluation": LOOK.evaluation}}
    write_weights(task.state_dict(), stage / "weights.safetensors", config)
    text = io.BytesIO()
    lines = iter(scenes()[1] * 9)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines, model_writer=text, vocab_size=200, hard_vocab_limit=False, minloglevel=2
    )
    (stage / "text.model").write_bytes(text.getvalue())
    return stage


class Known:
    """What the weights answer, one picture or text at a time."""

    def __init__(self, model: Pretrained, how: Writing):
        pictures, self.texts = scenes()
        self.sent = in_base64(*pictures)
        self.images = torch.cat([model.embed_images([each]) for each in pictures])
        self.vectors = torch.cat([model.embed_texts([each]) for each in self.texts])
        self.captions = [model.caption([each], how)[0] for each in pictures]
        self.scores = torch.cat([model.classify([each], NAMES, batch=1) for each in pictures])

    def request(self, number: int) -> Request:
        """The request of this number in a fixed sequence: path, body, and what compares an answer."""
        rng = random.Random(number)
        some, others = (rng.sample(range(POOL), rng.randint(1, 4)) for _ in range(2))
        pictures, texts = [self.sent[n] for n in some], [self.texts[n] for n in others]
        match number % 5:
            case 0:
                return "/embed", {"pictures": pictures}, lambda a: _far(a["pictures"], self.images[some])
            case 1:
                return "/embed", {"texts": texts}, lambda a: _far(a["texts"], self.vectors[others])
            case 2:
                cosines = self.images[some] @ self.vectors[others].T
                both = {"pictures": pictures, "texts": texts}
                return "/similarity", both, lambda a: _far(a["similarity"], cosines)
            case 3:
                expected = [self.captions[n] for n in some]
                same: Compare = lambda a: 0.0 if a["captions"] == expected else float("inf")  # noqa: E731
                return "/caption", {"pictures": pictures}, same
        body = {"pictures": pictures, "names": NAMES, "best": len(NAMES)}
        return "/predict", body, lambda a: self._predicted(a["classes"], some)

    def _predicted(self, classes: list[list[dict[str, Any]]], some: list[int]) -> float:
        rows = [[{each["name"]: each["score"] for each in own}[name] for name in NAMES] for own in classes]
        if any([each["score"] for each in own] != sorted((e["score"] for e in own), reverse=True) for own in classes):
            return float("inf")
        return _far(rows, self.scores[some])


def _far(made: list[list[float]], expected: torch.Tensor) -> float:
    values = torch.tensor(made)
    return (values - expected).abs().max().item() if values.shape == expected.shape else float("inf")
