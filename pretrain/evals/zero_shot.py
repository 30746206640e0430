"""Zero-shot classification: a picture's class is the one whose name has the nearest text vector (CLIP, arXiv
2103.00020, 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import PAD, Layout, make_batch
from pretrain.contracts import Evaluation
from pretrain.data.labelled import LABEL, LabelledShards
from pretrain.evals.trained import Trained, check_counts, missing_head
from pretrain.json_files import read_json
from pretrain.settings import fill_variables

TEMPLATES = ("a photo of a {}.",)  # CLIP's default; its 80 for ImageNet are open_clip.OPENAI_IMAGENET_TEMPLATES
TEXTS = 256  # that go through the encoder at once


@dataclass(frozen=True)
class ZeroShot(Evaluation):
    """Percent of pictures whose own class is the nearest. `names`: a JSON list of the classes' names by number, such as
    from_table's labels.json; `templates`: texts with {} in the place of a name, whose vectors are averaged."""

    images: LabelledShards
    names: str
    templates: tuple[str, ...] = TEMPLATES
    samples: int = 10**9
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)
        check_templates(self.templates)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "contrastive")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        names = read_names(self.names)
        if len(names) != self.images.classes:
            raise ValueError(f"evals: names={self.names} has {len(names)}, not classes={self.images.classes}; use one")
        head, task = trained.head("contrastive"), trained.task

        def embed(texts: Sequence[str]) -> Tensor:
            ids = [trained.text.encode(text, 64) for text in texts]
            tokens = torch.full((len(ids), max(map(len, ids))), PAD, device=trained.device)
            for row, own in zip(tokens, ids, strict=True):
                row[: len(own)] = torch.tensor(own)
            images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=trained.device)
            layout = Layout(texts=len(ids), text_len=tokens.shape[1])
            return head.embed_texts(task.encoder(make_batch(layout, images=images, text_tokens=tokens)))

        classes, right = class_vectors(embed, names, self.templates), list[Tensor]()
        samples = min(self.samples, trained.samples_of(self.images))
        for batch in trained.batches({"images": self.images}, min(self.batch, samples), samples):
            nearest = (head.embed_images(task.encoder(batch)) @ classes.T).argmax(-1)
            right.append((nearest == batch.extra[LABEL]).cpu())
        return {"zero_shot/top-1": 100 * torch.cat(right)[:samples].double().mean().item()}, {}


def class_vectors(
    embed: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Unit vectors [classes, E]: for each name the mean of its texts' vectors over the templates. `embed`: texts ->
    unit vectors. ValueError for a template without {}."""
    texts = class_texts(names, templates)
    vectors = torch.cat([embed(texts[start : start + TEXTS]) for start in range(0, len(texts), TEXTS)])
    return mean_of_templates(vectors, len(names))


def class_texts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The texts for all classes, those of one name together. ValueError as for `class_vectors`."""
    check_templates(templates)
    return [template.replace("{}", name) for name in names for template in templates]


def mean_of_templates(vectors: Tensor, names: int) -> Tensor:
    """Vectors [names * templates, E] of `class_texts` -> unit vectors [names, E]."""
    return F.normalize(vectors.unflatten(0, (names, -1)).mean(1), dim=-1)


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for templates that are no list of texts with a place for the name."""
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise ValueError(f"templates={templates!r} must be texts with {{}} for the name, such as 'a photo of a {{}}.'")


def read_names(name: str) -> list[str]:
    """The names in a JSON list. ValueError for a file that is missing or of another kind."""
    path = Path(fill_variables(name, "names")).expanduser()
    if not path.is_file():
        raise ValueError(f"names={path} does not exist; give a labels.json of data_tools.from_table")
    names = read_json(path)
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise ValueError(f"names={path} is no list of names; give a labels.json of data_tools.from_table")
    return names
