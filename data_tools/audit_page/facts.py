"""All that an audit counts, over any number of shards in any order, in bounded memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.audit_page.shard import Job, Place, ShardFacts, read_shard
from data_tools.audit_page.sketches import Drawn, Histogram, Repeats, TopCounter, hash_of, lot
from data_tools.shards.steps import Step, read_drops, read_steps
from pretrain.data.shards.indexing import complete_shards, map_in_order

SIDES = (0, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
ASPECTS = (0, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.43, 1.67, 2, 2.5, 3, 100)  # width / height
WORDS = (*range(0, 31), 40, 60, 100, 1000)
KIB = tuple(2.0**i for i in range(-1, 15))
TOP = 200_000  # words, servers and captions that are counted at one time
LANGUAGE_SAMPLES = 20_000
_BATCH = 65_536
_DISTANCE = re.compile(r" distance=\d+$")
EXAMPLES = 6  # dropped samples of each reason that are shown


@dataclass(frozen=True)
class DropExample:
    shard: str
    key: str
    detail: str
    place: Place | None  # None: it is in none of the shards any more
    twin: Place | None = None  # the sample that it equals, where the detail names one


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
    served: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    failed: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    vocabulary: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    captions: TopCounter = field(default_factory=lambda: TopCounter(TOP))
    sides: Histogram = field(default_factory=lambda: Histogram(SIDES))  # the shorter of each picture
    aspects: Histogram = field(default_factory=lambda: Histogram(ASPECTS))
    words: Histogram = field(default_factory=lambda: Histogram(WORDS))
    kib: Histogram = field(default_factory=lambda: Histogram(KIB))
    equal_pictures: Repeats = field(default_factory=Repeats)
    equal_captions: Repeats = field(default_factory=Repeats)
    wall: Drawn = field(default_factory=lambda: Drawn(0))
    texts: Drawn = field(default_factory=lambda: Drawn(LANGUAGE_SAMPLES))
    languages: Counter[str] | None = None  # of `texts`; None: py3langid is not installed
    steps: dict[str, Step] = field(default_factory=dict)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)  # drops file -> reason -> samples
    dropped_samples: Repeats = field(default_factory=Repeats)  # by shard and key: some stand in two files
    examples: dict[str, list[DropExample]] = field(default_factory=dict)  # reason -> samples

    def take(self, shard: ShardFacts) -> None:
        self.shards += 1
        self.samples += shard.samples
        self.pictures += len(shard.picture_bytes)
        self.tar_bytes += shard.tar_bytes
        self.unreadable += shard.unreadable
        if shard.rows is not None:
            self.rows = (self.rows or 0) + shard.rows
        self.failures += shard.failures
        self.formats += shard.formats
        self.served.add(shard.served)
        self.failed.add(shard.failed)
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
    """Reads all shards once. `detect` tells the languages of captions, see lists.languages. Raises ValueError
    where a directory has no shard, or one that is broken."""
    facts = Facts(wall=Drawn(wall))
    for directory in directories:
        for name, step in read_steps(directory).items():
            facts.steps[name] = _together(facts.steps[name], step) if name in facts.steps else step
    facts.steps = dict(sorted(facts.steps.items(), key=lambda item: item[1].time))
    drawn = [_read_drops(facts, directory, seed) for directory in directories]
    wanted = _wanted(directories, drawn)
    places: dict[tuple[Path, str, str], Place] = {}
    for directory in directories:
        complete, partial = complete_shards(directory)
        facts.partial += [str(path) for path in partial]
        jobs = [Job(tar, seed, wall, frozenset(wanted[directory, tar.stem])) for tar in complete]
        with map_in_order(read_shard, jobs, workers) as results:
            bar = tqdm(results, total=len(jobs), desc=f"auditing {directory}", unit=" shards", disable=None)
            for job, shard in zip(jobs, bar, strict=True):
                places |= {(directory, job.tar.stem, key): place for key, place in shard.found.items()}
                facts.take(shard)
    for directory, of_directory in zip(directories, drawn, strict=True):
        for reason, examples in of_directory.items():
            shown = facts.examples.setdefault(reason, [])
            for shard_, key, detail in examples.things()[: EXAMPLES - len(shown)]:
                twin = _twin(detail, directories)
                pair = places.get((directory, shard_, key)), places.get(twin) if twin else None
                shown.append(DropExample(shard_, key, detail, *pair))
    if detect is not None:
        facts.languages = Counter(detect(facts.texts.things()))
    return facts


def _wanted(directories: list[Path], drawn: list[dict[str, Drawn]]) -> dict[tuple[Path, str], set[str]]:
    """(directory, shard) -> the keys of the examples, and of the samples that they equal."""
    wanted: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for directory, of_directory in zip(directories, drawn, strict=True):
        for examples in of_directory.values():
            for shard, key, detail in examples.things():
                wanted[directory, shard].add(key)
                if twin := _twin(detail, directories):
                    wanted[twin[:2]].add(twin[2])
    return wanted


def _read_drops(facts: Facts, directory: Path, seed: int) -> dict[str, Drawn]:
    """Counts the drops files of a directory. -> some samples of each reason: (shard, key, detail)."""
    drawn: dict[str, Drawn] = {}
    for path in sorted((directory / "drops").glob("*.parquet")):
        counts = facts.dropped.setdefault(path.stem, Counter())
        hashes: list[int] = []
        for drop in read_drops([path]):
            counts[drop.reason] += 1
            examples = drawn.setdefault(drop.reason, Drawn(EXAMPLES))
            name = f"{path.stem}\0{drop.shard}\0{drop.key}"
            examples.add(lot(seed, drop.shard, drop.key), name, (drop.shard, drop.key, drop.detail))
            hashes.append(hash_of(str(directory), drop.shard, drop.key))
            if len(hashes) == _BATCH:
                facts.dropped_samples.add(np.array(hashes, np.uint64))
                hashes.clear()
        facts.dropped_samples.add(np.array(hashes, np.uint64))
    return drawn


def _twin(detail: str, directories: list[Path]) -> tuple[Path, str, str] | None:
    """(directory, shard, key) where the detail names the sample that one equals, as dedup does: DIR/SHARD/KEY. DIR may
    have moved since, so its name is enough."""
    parts = _DISTANCE.sub("", detail).rsplit("/", 2)
    if len(parts) < 3:
        return None
    home = next((directory for directory in directories if directory.resolve().name == Path(parts[0]).name), None)
    return (home, parts[1], parts[2]) if home is not None else None


def _together(a: Step, b: Step) -> Step:
    """Two records of one tool, of two directories that are audited as one."""
    dropped = dict(Counter(a.dropped) + Counter(b.dropped))
    inputs = list(dict.fromkeys([*a.inputs, *b.inputs]))
    return Step(a.tool, a.rows + b.rows, a.kept + b.kept, dropped, a.settings, inputs, a.unit, min(a.time, b.time))
