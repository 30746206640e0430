"""Makes one shard of data_tools.capfilt: writes a text for each picture, judges all texts, and keeps those that fit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_tools.shards.writer import ShardWriter
from pretrain.data.labelled import metadata
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader
from pretrain.data.sources import CAPTIONS, METADATA, TEXT, picture, text_of
from pretrain.data.transforms import sample_rng
from pretrain.files import write_json
from pretrain.models.generation import Writing
from pretrain.pretrained import Pretrained

WEB, WRITTEN = "web", "written"  # where a text comes from
KEPT = "kept"
MAX_WEB = 16  # texts of a sample that are judged; a hostile list may have a million


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the new shards, besides weights and input. `batch` does too: rounding depends on it."""

    writing: Writing
    min_web: float
    min_written: float
    seed: int
    batch: int


class Sample(NamedTuple):
    number: int  # in its shard
    key: str
    members: dict[str, bytes]
    web: list[str]
    looks: tuple[Tensor, ...] = ()  # for the captioner, for the filter


class Verdict(NamedTuple):
    origin: str
    text: str
    match: float  # the probability that it belongs to the picture
    reason: str  # KEPT, or why it does not stay


def counts_path(out: Path, number: int) -> Path:
    """The outcome of input shard `number`; written last, so that a shard that has it is finished."""
    return out / ".capfilt" / f"{number:05d}.json"


def caption_shard(
    captioner: Pretrained,
    judge: Pretrained,
    reader: ShardReader,
    number: int,
    out: Path,
    settings: Settings,
    workers: int,
) -> None:
    """Writes OUT/NUMBER.tar and its counts. OSError, ShardError."""
    shard = reader.manifest.shards[number]
    name, drops = shard.name.removesuffix(".tar"), list[tuple[str, str, str, str]]()
    texts: dict[str, Counter[str]] = {WEB: Counter(), WRITTEN: Counter()}
    with (
        ThreadPoolExecutor(workers) as threads,
        ShardWriter(out, samples_per_shard=max(shard.samples, 1), first=number) as writer,
    ):
        samples = _samples(captioner, judge, reader, number, settings.batch, threads)
        for some in samples:
            good = [each for each in some if isinstance(each, Sample)]
            drops += [
                (name, key, "undecodable", str(error)) for key, error in (e for e in some if not isinstance(e, Sample))
            ]
            for sample, verdicts in zip(good, _judge(captioner, judge, good, number, settings), strict=True):
                for each in verdicts:
                    texts[each.origin][each.reason] += 1
                if kept := [each.text for each in verdicts if each.reason == KEPT]:
                    writer.write(sample.key, _members(sample, kept, verdicts))
                else:
                    best = max((each.match for each in verdicts), default=0.0)
                    drops.append((name, sample.key, "no_text_stayed", f"{best:.3f}"))
    counts = {"samples": shard.samples, "kept": shard.samples - len(drops)}
    path = counts_path(out, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, counts | {"texts": {origin: dict(own) for origin, own in texts.items()}, "drops": drops})


def _samples(
    captioner: Pretrained, judge: Pretrained, reader: ShardReader, number: int, batch: int, threads: ThreadPoolExecutor
) -> Iterator[list[Any]]:
    """Up to `batch` samples at a time; (key, error) stands in the place of one that cannot be used."""

    def with_looks(sample: Any) -> Any:
        if not isinstance(sample, Sample):
            return sample
        try:
            encoded = picture(sample.members)
            look = captioner.look(encoded)
            return sample._replace(looks=(look, look if judge is captioner else judge.look(encoded)))
        except BadSample as error:
            return sample.key, error

    places = iter(range(reader.manifest.shards[number].samples))
    while some := list(islice(places, batch)):
        yield list(threads.map(with_looks, [_read(reader, number, place) for place in some]))


def _read(reader: ShardReader, number: int, place: int) -> Any:
    try:
        members = reader.read(number, place, (*IMAGE_EXTENSIONS, TEXT, METADATA))
    except BadSample as error:
        return f"sample {place}", error
    key = members.pop("__key__").decode()
    return Sample(place, key, members, web_texts(members))


def web_texts(members: dict[str, bytes]) -> list[str]:
    """The texts that a sample came with: the `captions` of its JSON, else (also if that list is empty) its txt; none
    where there is no text."""
    try:
        texts = metadata(members).get(CAPTIONS)
    except BadSample:
        texts = None
    if not texts or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        try:
            texts = [text_of(members)]
        except BadSample:
            texts = []
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))[:MAX_WEB]


def _judge(
    captioner: Pretrained, judge: Pretrained, samples: list[Sample], shard: int, settings: Settings
) -> Iterator[list[Verdict]]:
    """For each sample the verdicts on its texts from the web, and on the one that the captioner writes."""
    if not samples:
        return
    # Each sample has its own random numbers, so that neither batches nor --part change what is drawn.
    rngs = [sample_rng(settings.seed, shard, sample.number) for sample in samples]
    draws = torch.from_numpy(np.stack([rng.random(settings.writing.max_words) for rng in rngs]))
    written = captioner.caption_looks(torch.stack([sample.looks[0] for sample in samples]), settings.writing, draws)
    asked = [
        (place, text)
        for place, sample in enumerate(samples)
        for text in [*sample.web, *([written[place].strip()] if written[place].strip() else [])]
    ]
    matches = iter(_matches(judge, samples, asked, settings.batch))
    for sample, own in zip(samples, (text.strip() for text in written), strict=True):
        verdicts = [_verdict(WEB, text, next(matches), settings.min_web) for text in sample.web]
        if not sample.web:
            verdicts.append(Verdict(WEB, "", 0.0, "missing"))
        if not own:
            verdicts.append(Verdict(WRITTEN, "", 0.0, "empty"))
        else:
            one = _verdict(WRITTEN, own, next(matches), settings.min_written)
            same = own.casefold() in (text.casefold() for text in sample.web)
            verdicts.append(one._replace(reason="same_as_web") if same else one)
        yield verdicts


def _matches(judge: Pretrained, samples: list[Sample], asked: list[tuple[int, str]], batch: int) -> list[float]:
    """The probability of each (place in `samples`, text) that the text belongs to the picture."""
    matches: list[float] = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        pixels = torch.stack([samples[place].looks[1] for place, _ in some])
        matches += judge.score_looks(pixels, [text for _, text in some]).tolist()
    return matches


def _verdict(origin: str, text: str, match: float, least: float) -> Verdict:
    return Verdict(origin, text, match, KEPT if match >= least else "unmatched")


def _members(sample: Sample, kept: list[str], verdicts: list[Verdict]) -> dict[str, bytes]:
    """The members of the new sample, in the same order for every sample."""
    try:
        facts = metadata(sample.members)
    except BadSample:
        facts = {}
    noted = [
        {"origin": j.origin, "text": j.text, "match": round(j.match, 6), "reason": j.reason} for j in verdicts if j.text
    ]
    content = json.dumps(facts | {CAPTIONS: kept, "capfilt": noted}, ensure_ascii=False)
    pictures = {name: value for name, value in sample.members.items() if name in IMAGE_EXTENSIONS}
    return {**pictures, TEXT: kept[0].encode("utf-8", "replace"), METADATA: content.encode("utf-8", "replace")}
