"""Sources for fine-tuning tasks, from shards as data_tools.from_table writes them: pictures with labels, questions with
answers, sentences about two pictures, sentences that a picture entails or not, reference captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.random import Generator

from pretrain.data.answers import scores
from pretrain.data.mixing import LABEL, Mixing
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample
from pretrain.data.shards.tar_index import SECOND_PICTURE
from pretrain.data.sources import CAPTIONS, METADATA, ImageShards, PairShards, Raw, check_count, text_of
from pretrain.json_files import parse_json, read_bytes
from pretrain.settings import fill_variables

SECOND, SCORES, ANSWERS, LABEL_NAME, REFERENCES = "second", "scores", "answers", "label_name", "references"


@dataclass(frozen=True)
class LabelledShards(ImageShards):
    """Pictures with a class number each, `label` in a sample's JSON -> extra["label"].

    `balance`: with 1 every class gets as many looks in an epoch as any other, with 0 every picture gets one, and in
    between a class of N pictures gets looks in proportion to N ** (1 - balance); all labels are read at the start.
    `mixing` blends pictures in training; see mixing.py."""

    classes: int = 1000
    balance: float = 0.0
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise ValueError(f"images.balance={self.balance} is not a share; use 0 to 1")
        if self.balance and self.weights:
            raise ValueError(f"images.balance={self.balance} does not go with images.weights={self.weights}; use one")

    def class_of(self, members: Mapping) -> int:
        """A sample's class, for `balance`. One whose label is unusable counts as class 0; when it is read it will be
        replaced."""
        try:
            return label_in(members, self.classes)
        except BadSample:
            return 0

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*IMAGE_EXTENSIONS, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        label = label_in(members, self.classes)
        return super().decode(members, transform, tokenizer, rng)._replace(extra={LABEL: label})


@dataclass(frozen=True)
class QuestionShards(PairShards):
    """Pictures with a question each (txt) and people's answers (`answers` in the JSON): VQAv2. `vocabulary`: a JSON
    list of the possible answers (data_tools.answers makes one). -> extra["scores"], float32 [answers], the score of
    each possible answer; extra["answers"], people's answers."""

    vocabulary: str = "$DATA/answers.json"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.vocabulary, *super().files)

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        given = metadata(members).get("answers")
        if not isinstance(given, list) or not given or not all(isinstance(answer, str) for answer in given):
            raise BadSample('its json has no list of "answers"')
        numbers = read_vocabulary(self.vocabulary)
        targets = np.zeros(len(numbers), np.float32)
        for answer, score in scores(given).items():
            if answer in numbers:
                targets[numbers[answer]] = score
        extra = {SCORES: targets, ANSWERS: tuple(given)}
        return super().decode(members, transform, tokenizer, rng)._replace(extra=extra)


@dataclass(frozen=True)
class TwoPictureShards(PairShards):
    """A sentence (txt) about two pictures, true (`label` 1) or not (0): NLVR2. The second picture is the member "jpe".
    -> extra["second"], uint8 [3, size, size], and extra["label"]."""

    pictures: ClassVar[int] = 2

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        label = label_in(members, 2)
        if SECOND_PICTURE not in members:
            raise BadSample(f"it has no second picture ({SECOND_PICTURE})")
        first = super().decode(members, transform, tokenizer, rng)
        return first._replace(extra={LABEL: label, SECOND: transform(members[SECOND_PICTURE], rng)})


@dataclass(frozen=True)
class LabelledPairShards(PairShards):
    """A picture and a sentence (txt) with one class for both: visual entailment, SNLI-VE. -> extra["label"], and
    extra["label_name"], the class's name ("" if the JSON has none)."""

    classes: int = 3

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        label, name = label_in(members, self.classes), metadata(members).get(LABEL_NAME)
        extra = {LABEL: label, LABEL_NAME: name if isinstance(name, str) else ""}
        return super().decode(members, transform, tokenizer, rng)._replace(extra=extra)


@dataclass(frozen=True)
class ReferenceShards(PairShards):
    """Pictures with reference captions: `captions` in a sample's JSON, else its txt. -> extra["references"], a tuple of
    texts."""

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        extra = {REFERENCES: references_of(members)}
        return super().decode(members, transform, tokenizer, rng)._replace(extra=extra)


@dataclass(frozen=True)
class RewardShards(ReferenceShards):
    """ReferenceShards for SelfCritical. `frequencies`: a file of data_tools.caption_frequencies, with CIDEr's document
    frequencies of the training captions."""

    frequencies: str = "$DATA/frequencies.json"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.frequencies, *super().files)


def references_of(members: Mapping) -> tuple[str, ...]:
    """A sample's `captions`, else its txt. BadSample if there is neither."""
    texts = metadata(members).get(CAPTIONS) if METADATA in members else None
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        check_count(texts)
        return tuple(texts)
    return (text_of(members),)


def metadata(members: Mapping) -> dict[str, Any]:
    """A sample's JSON object. BadSample if there is none."""
    if METADATA not in members:
        raise BadSample("it has no json")
    try:
        content = parse_json(members[METADATA])
    except ValueError:
        raise BadSample("its json cannot be read") from None
    if not isinstance(content, dict):
        raise BadSample("its json is no object")
    return content


def label_in(members: Mapping, classes: int) -> int:
    """A sample's class number, below `classes`. BadSample for any other label."""
    label = metadata(members).get(LABEL)
    if type(label) is not int or not 0 <= label < classes:
        raise BadSample(f"its label {str(label)[:40]!r} is no number from 0 to {classes - 1}")
    return label


def read_vocabulary(name: str) -> dict[str, int]:
    """{answer: its number} from a JSON list, or from unilm's answer2label.txt, which has {"answer", "label"} in each
    line. ValueError if the file is missing, of another kind, or has an answer twice."""
    return _read_vocabulary(Path(fill_variables(name, "vocabulary")).expanduser())


@lru_cache(maxsize=4)
def _read_vocabulary(path: Path) -> dict[str, int]:
    way_out = "write it with python -m data_tools.answers"
    if not path.is_file():
        raise ValueError(f"vocabulary={path} does not exist; {way_out}")
    data = read_bytes(path)
    try:
        content = parse_json(data)
    except ValueError:
        try:
            lines = [parse_json(line) for line in data.splitlines() if line.strip()]
            content = [line["answer"] for line in sorted(lines, key=lambda line: int(line["label"]))]
        except (ValueError, KeyError, TypeError):
            content = None
    if not isinstance(content, list) or not content or not all(isinstance(answer, str) for answer in content):
        raise ValueError(f"vocabulary={path} is no list of answers; {way_out}")
    if len(set(content)) < len(content):
        raise ValueError(f"vocabulary={path} has an answer twice; {way_out}")
    return {answer: number for number, answer in enumerate(content)}
