"""Answers requests by the model, within the limits, the queue and the batches of the server."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.decoding import judge_pixels, read_header
from pretrain.data.shards.reader import BadSample
from pretrain.evals.zero_shot import TEMPLATES, class_texts, class_vectors, mean_of_templates
from pretrain.models.generation import Writing
from pretrain.pretrained import Pretrained
from pretrain.serving.batching import Batcher
from pretrain.serving.counts import Counts
from pretrain.serving.limits import Deadline, Limits, Refused

STUCK = 10  # a pass that takes longer than this many times Limits.seconds will not end


class Service:
    """The model and what belongs to it. `labels`: the classes' names by number; `templates`: the texts around a name;
    `writing`: how captions are written; `batch`: pictures or texts of one pass; `workers`: threads that decode
    pictures. ValueError for labels that do not fit, and for weights that can answer nothing."""

    def __init__(
        self,
        model: Pretrained,
        limits: Limits,
        counts: Counts,
        *,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
        writing: Writing | None = None,
        batch: int = 64,
        workers: int = 1,
    ):
        self.model, self.limits, self.counts, self.templates = model, limits, counts, templates
        self.working = 0  # pictures and texts of all requests that are being worked on
        self.classes = self._class_names(labels)
        self.lacks = {path: lack for path, lack in self._lacks().items() if lack}
        if len(self.lacks) == len(PATHS):
            raise ValueError(f"these weights can answer nothing: {'; '.join(dict.fromkeys(self.lacks.values()))}")
        self.known = self._vectors_of_classes(labels)
        how = writing or Writing()
        passes: dict[str, Callable[[list], Sequence]] = {
            "pictures": lambda looks: model.embed_images(looks, batch),
            "texts": lambda ids: model.embed_texts(ids, batch),
            "captions": lambda looks: model.caption(looks, how, batch=batch),
            "classes": lambda looks: model.class_scores(looks, batch),
        }
        self._warm_up(passes)
        self.batcher = Batcher(passes, batch, counts.passed)
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.batcher.close()

    # -- what the weights can do

    def _lacks(self) -> dict[str, str | None]:
        """For each path the reason why the weights cannot answer it, or None where they can."""
        head, text = _problem(lambda: self.model.head), _problem(self.model.tokenizer)
        writes = text or _problem(lambda: self.model.next_word_head(self.model.tokenizer()))
        classes = None if self.fine_tuned else head or text
        return {"/embed": head, "/similarity": head or text, "/caption": writes, "/predict": classes}

    @property
    def fine_tuned(self) -> bool:
        return "classification" in self.model.task.objectives

    def _class_names(self, labels: Sequence[str] | None) -> list[str]:
        """The names of a fine-tuned stage's classes, which are numbers without `labels`; [] for other weights.
        ValueError where there are not as many labels as classes."""
        if not self.fine_tuned:
            return []
        count = self.model.task.objectives["classification"].classes.out_features
        if labels is not None and len(labels) != count:
            raise ValueError(f"--labels has {len(labels)} names and the weights {count} classes; give theirs")
        return list(labels) if labels is not None else [str(number) for number in range(count)]

    def _vectors_of_classes(self, labels: Sequence[str] | None) -> tuple[list[str], Tensor] | None:
        """(the labels, their vectors [classes, E]) for weights without classes of their own; None without labels.
        ValueError where the weights can make no such vectors."""
        if labels is None or self.fine_tuned:
            return None
        if "/predict" in self.lacks:
            raise ValueError(f"--labels is of no use: {self.lacks['/predict']}")
        return list(labels), class_vectors(self.model.embed_texts, labels, self.templates)

    def _warm_up(self, passes: dict[str, Callable[[list], Sequence]]) -> None:
        """Runs each pass once, so that the server does not start with weights that fail in one, and no client waits for
        a first call."""
        black = torch.zeros(3, self.model.model.image_size, self.model.model.image_size, dtype=torch.uint8)
        if "/embed" not in self.lacks:
            passes["pictures"]([black])
        if "/similarity" not in self.lacks:
            passes["texts"]([self.model.tokenizer().encode("")])
        if "/caption" not in self.lacks:
            passes["captions"]([black])
        if self.fine_tuned:
            passes["classes"]([black])

    # -- what clients ask

    async def embed(self, pictures: list[str], texts: list[str], deadline: Deadline) -> dict[str, Any]:
        """-> unit vectors of the pictures and of the texts, each in their order."""
        self._able("/embed")
        if texts and (lack := self.lacks.get("/similarity")):
            raise Refused(501, lack)
        with self._admitted(pictures, texts):
            seen, read = await _all(self._pictures("pictures", pictures, deadline), self._texts(texts, deadline))
        return {"pictures": _lists(seen), "texts": _lists(read)}

    async def similarity(self, pictures: list[str], texts: list[str], deadline: Deadline) -> dict[str, Any]:
        """-> cosines of every picture with every text."""
        self._able("/similarity")
        _some(pictures=pictures, texts=texts)
        with self._admitted(pictures, texts):
            seen, read = await _all(self._pictures("pictures", pictures, deadline), self._texts(texts, deadline))
        return {"similarity": (torch.stack(seen) @ torch.stack(read).T).tolist()}

    async def caption(self, pictures: list[str], deadline: Deadline) -> dict[str, Any]:
        """-> a text for each picture."""
        self._able("/caption")
        with self._admitted(pictures, []):
            return {"captions": await self._pictures("captions", pictures, deadline)}

    async def predict(
        self, pictures: list[str], names: list[str] | None, best: int, deadline: Deadline
    ) -> dict[str, Any]:
        """-> for each picture the `best` classes, the most likely first, with probabilities by a fine-tuned stage, or
        with cosines for classes that only their names describe."""
        self._able("/predict")
        if names is not None and self.fine_tuned:
            raise Refused(400, "names: these weights have classes of their own; leave the names out")
        if names is None and not self.fine_tuned and self.known is None:
            raise Refused(400, "names: these weights know no classes; give their names")
        if names is not None:
            _some(names=names)
        if best < 1:
            raise Refused(400, f"best: {best} is below 1; use 5")
        texts = class_texts(names, self.templates) if names is not None else []
        with self._admitted(pictures, texts):
            kind = "classes" if self.fine_tuned else "pictures"
            seen, read = await _all(self._pictures(kind, pictures, deadline), self._texts(texts, deadline))
        if self.fine_tuned:
            return {"scores": "probability", "classes": _best(seen, self.classes, best)}
        if names is not None:
            known, vectors = names, mean_of_templates(torch.stack(read), len(names))
        else:
            assert self.known is not None
            known, vectors = self.known
        return {"scores": "cosine", "classes": _best([vector @ vectors.T for vector in seen], known, best)}

    def health(self) -> dict[str, Any]:
        """What the server can answer, and its limits. Raises Refused (503) where the model's thread is dead or
        hangs."""
        since = self.batcher.busy_since
        if not self.batcher.alive:
            raise Refused(503, "the model's thread has ended")
        if since is not None and time.monotonic() - since > STUCK * self.limits.seconds:
            raise Refused(503, f"a pass through the model has taken {time.monotonic() - since:.0f} seconds")
        answers = {path: self.lacks.get(path) or True for path in PATHS}
        return {"status": "ok", "answers": answers, "limits": asdict(self.limits)}

    def metrics(self, held: int) -> str:
        """The counts in Prometheus' format; `held`: bytes of bodies that the server holds."""
        return self.counts.text({
            "imglish_working_items": ("Pictures and texts of all requests that are being worked on.", self.working),
            "imglish_held_bytes": ("Bytes of bodies that are held.", held),
        })  # fmt: skip

    # -- how they are answered

    def _able(self, path: str) -> None:
        """Raises Refused (501) where the weights cannot answer the path."""
        if lack := self.lacks.get(path):
            raise Refused(501, lack)

    @contextmanager
    def _admitted(self, pictures: list[str], texts: list[str]) -> Iterator[None]:
        """Counts the pictures and texts as work while the context lasts. Raises Refused where they are too many for a
        request, a text is too long, or all requests together have too many."""
        limits, items = self.limits, len(pictures) + len(texts)
        for name, count, most in (("pictures", len(pictures), limits.pictures), ("texts", len(texts), limits.texts)):
            if count > most:
                raise Refused(400, f"{name}: {count} are more than the limit of {most}; send them in several requests")
        for number, text in enumerate(texts):
            if len(text) > limits.characters:
                raise Refused(400, f"text {number}: {len(text):,} characters are more than {limits.characters:,}")
        if self.working + items > limits.queue:
            raise Refused(503, f"{self.working} pictures and texts are waiting, and {limits.queue} may; come again")
        self.working += items
        try:
            yield
        finally:
            self.working -= items

    async def _pictures(self, kind: str, pictures: list[str], deadline: Deadline) -> list[Any]:
        """The results of the pass `kind` over pictures in base64."""
        look, loop = self._look, asyncio.get_running_loop()
        looks = [loop.run_in_executor(self.threads, look, n, text, deadline) for n, text in enumerate(pictures)]
        return await self.batcher(kind, await _all(*looks), deadline)

    async def _texts(self, texts: list[str], deadline: Deadline) -> list[Tensor]:
        """The unit vectors [E] of the texts."""
        if not texts:
            return []
        longest, encode = self.model.model.max_text_len, self.model.tokenizer().encode
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self.threads, lambda: [encode(text, longest) for text in texts])
        return await self.batcher("texts", ids, deadline)

    def _look(self, number: int, text: str, deadline: Deadline) -> Tensor:
        """Picture `number` of a request, in base64 -> what Pretrained.look makes of it. Raises Refused where it cannot
        be decoded."""
        deadline.check()
        try:
            data = base64.b64decode(text, validate=True)
            judge_pixels(read_header(data), self.limits.pixels)
            return self.model.look(data)
        except (binascii.Error, UnicodeError, ValueError) as error:
            # b64decode raises a plain ValueError for a text beyond ASCII
            reason = str(error) if isinstance(error, BadSample) else "it is no base64"
            raise Refused(400, f"picture {number}: {reason}") from None


PATHS = ("/embed", "/similarity", "/caption", "/predict")


async def _all(*parts: Any) -> list[Any]:
    """The results of all parts. An error is raised only when all have ended, since they count as work until then."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def _problem(check: Callable[[], Any]) -> str | None:
    """The message of the ValueError that `check` raises; None where it raises none."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _some(**lists: list[str]) -> None:
    """Raises Refused (400) for a list that is empty."""
    for name, each in lists.items():
        if not each:
            raise Refused(400, f"{name}: there are none; give one or more")


def _lists(vectors: list[Tensor]) -> list[list[float]]:
    return torch.stack(vectors).tolist() if vectors else []


def _best(scores: Sequence[Tensor], names: Sequence[str], best: int) -> list[list[dict[str, Any]]]:
    """For each picture's scores [classes] the `best` names with their scores, the highest first."""
    answers = []
    for row in scores:
        values = row.numpy()
        order = np.argsort(-values, kind="stable")[:best]
        answers.append([{"name": names[n], "score": float(values[n])} for n in order])
    return answers
