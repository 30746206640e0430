"""Everything that an audit counts, over any number of shards in any order, in bounded memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.audit_page.shard import Job, Place, ShardFacts, read_shard
from data_tools.audit_page.sketches import Histogram, RandomSample, Repeats, TopCounter, hash_of, lot
from data_tools.shards.steps import Step, read_drops, read_steps
from pretrain.data.shards.indexing import complete_shards, map_in_order
from pretrain.visible import visible

SIDES = (0, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
ASPECTS = (0, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.43, 1.67, 2, 2.5, 3, 100)  # width / height
WORDS = (*range(0, 31), 40, 60, 100, 1000)
KIB = tuple(2.0**i for i in range(-1, 15))
TOP = 200_000  # different words, servers and captions that are counted at the same time
LANGUAGE_SAMPLES = 20_000
_BATCH = 65_536
_DISTANCE = re.compile(r" distance=\d+$")
EXAMPLES = 6  # dropped samples to show for each reason


@dataclass(frozen=True)
class DropExample:
    shard: str
    key: str
    detail: str
    place: Place | None  # None: it is no longer in the shards
    twin: Place | None = None  # the sample that it repeats, if the detail names one


@dataclass
class Facts:
    shards: int = 0
    partial: list[str] = field(default_factory=list)
    samples: int = 0
    pictures: int = 0
    tar_bytes: int = 0
    unreadable: int = 0
    rows: int | None = None
    failures: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    server_successes: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    server_failures: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    vocabulary: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    captions: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    sides: Histogram = field(default_factory=lambda: Histogram(SIDES))  # the shorter side of each picture
    aspects: Histogram = field(default_factory=lambda: Histogram(ASPECTS))
    words: Histogram = field(default_factory=lambda: Histogram(WORDS))
    kib: Histogram = field(default_factory=lambda: Histogram(KIB))
    equal_pictures: Repeats = field(default_factory=Repeats)
    equal_captions: Repeats = field(default_factory=Repeats)
    wall: RandomSample = field(default_factory=lambda: RandomSample(0))
    texts: RandomSample = field(default_factory=lambda: RandomSample(LANGUAGE_SAMPLES))
    languages: Counter[str] | None = None  # of `texts`; None: py3langid is not installed
    steps: dict[str, Step] = field(default_factory=dict)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)  # drops file -> reason -> samples
    dropped_samples: Repeats = field(default_factory=Repeats)  # by shard and key, because some are in two files
    examples: dict[str, list[DropExample]] = field(default_factory=dict)  # reason -> samples

    def add(self, shard: ShardFacts) -> None:
        self.shards += 1
        self.samples += shard.samples
        self.pictures += len(shard.picture_bytes)
        self.tar_bytes += shard.tar_bytes
        self.unreadable += shard.unreadable
        if shard.rows is not None:
            self.rows = (self.rows or 0) + shard.rows
        self.failures += shard.failures
        self.formats += shard.formats
        self.server_successes.add(shard.server_successes)
        self.server_failures.add(shard.server_failures)
        self.vocabulary.add(shard.vocabulary)
        self.captions.add(shard.captions)
        width, height = shard.sizes.T
        self.sides.add(np.minimum(width, height))
        self.aspects.add(width / np.maximum(height, 1))
        self.words.add(shard.words)
        self.kib.add(shard.picture_bytes / 1024)
        self.equal_pictures.add(shard.picture_hashes)
        self.equal_captions.add(shard.caption_hashes[shard.words > 0])
        self.wall.merge(shard.wall)
        self.texts.merge(shard.texts)


def gather(
    directories: list[Path],
    *,
    seed: int = 0,
    wall: int = 60,
    workers: int = 1,
    detect: Callable[[Iterable[str]], list[str]] | None = None,
) -> Facts:
    """Reads all shards once. `detect` detects the languages of captions, see lists.languages. Raises ValueError if a
    directory has no shard, or a broken one."""
    facts = Facts(wall=RandomSample(wall))
    for directory in directories:
        for name, step in read_steps(directory).items():
            facts.steps[name] = _merge(facts.steps[name], step) if name in facts.steps else step
    facts.steps = dict(sorted(facts.steps.items(), key=lambda item: item[1].time))
    examples = [_read_drops(facts, directory, seed) for directory in directories]
    wanted = _wanted_keys(directories, examples)
    places: dict[tuple[Path, str, str], Place] = {}
    for directory in directories:
        complete, partial = complete_shards(directory)
        facts.partial += [str(path) for path in partial]
        jobs = [Job(tar, seed, wall, frozenset(wanted[directory, tar.stem])) for tar in complete]
        with map_in_order(read_shard, jobs, workers) as results:
            bar = tqdm(results, total=len(jobs), desc=visible(f"auditing {directory}"), unit=" shards", disable=None)
            for job, shard in zip(jobs, bar, strict=True):
                places |= {(directory, job.tar.stem, key): place for key, place in shard.places.items()}
                facts.add(shard)
    for directory, by_reason in zip(directories, examples, strict=True):
        for reason, drops in by_reason.items():
            of_reason = facts.examples.setdefault(reason, [])
            for shard_name, key, detail in drops.items()[: EXAMPLES - len(of_reason)]:
                twin = _twin(detail, directories)
                pair = places.get((directory, shard_name, key)), places.get(twin) if twin else None
                of_reason.append(DropExample(shard_name, key, detail, *pair))
    if detect is not None:
        facts.languages = Counter(detect(facts.texts.items()))
    return facts


def _wanted_keys(directories: list[Path], examples: list[dict[str, RandomSample]]) -> dict[tuple[Path, str], set[str]]:
    """(directory, shard) -> the keys of the examples and of their twins."""
    wanted: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for directory, by_reason in zip(directories, examples, strict=True):
        for drops in by_reason.values():
            for shard, key, detail in drops.items():
                wanted[directory, shard].add(key)
                if twin := _twin(detail, directories):
                    wanted[twin[:2]].add(twin[2])
    return wanted


def _read_drops(facts: Facts, directory: Path, seed: int) -> dict[str, RandomSample]:
    """Counts the drops of a directory. -> for each reason some examples: (shard, key, detail)."""
    examples: dict[str, RandomSample] = {}
    for path in sorted((directory / "drops").glob("*.parquet")):
        counts = facts.dropped.setdefault(path.stem, Counter())
        hashes: list[int] = []
        for drop in read_drops([path]):
            counts[drop.reason] += 1
            of_reason = examples.setdefault(drop.reason, RandomSample(EXAMPLES))
            name = f"{path.stem}\0{drop.shard}\0{drop.key}"
            of_reason.add(lot(seed, drop.shard, drop.key), name, (drop.shard, drop.key, drop.detail))
            hashes.append(hash_of(str(directory), drop.shard, drop.key))
            if len(hashes) == _BATCH:
                facts.dropped_samples.add(np.array(hashes, np.uint64))
                hashes.clear()
        facts.dropped_samples.add(np.array(hashes, np.uint64))
    return examples


def _twin(detail: str, directories: list[Path]) -> tuple[Path, str, str] | None:
    """(directory, shard, key) of the sample that this one repeats, if the detail names it, as dedup does:
    DIR/SHARD/KEY. Only the name of DIR is compared, because it may have moved."""
    parts = _DISTANCE.sub("", detail).rsplit("/", 2)
    if len(parts) < 3:
        return None
    home = next((directory for directory in directories if directory.resolve().name == Path(parts[0]).name), None)
    return (home, parts[1], parts[2]) if home is not None else None


def _merge(a: Step, b: Step) -> Step:
    """The sum of one tool's records of two directories that are audited as one."""
    dropped = dict(Counter(a.dropped) + Counter(b.dropped))
    inputs = list(dict.fromkeys([*a.inputs, *b.inputs]))
    return Step(a.tool, a.rows + b.rows, a.kept + b.kept, dropped, a.settings, inputs, a.unit, min(a.time, b.time))
