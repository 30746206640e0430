"""Rewrites shards: without the samples that other tools dropped, in even sizes, in a reproducible order.

    python -m data_tools.rewrite data/cc12m --drop data/cc12m/drops/*.parquet --out data/clean --max-side 256

Samples are in the order of their shards and keys, or with --shuffle-seed in a random order. The new tars are identical
byte for byte for any number of --workers, and after any number of kills, because finished shards stay. A key that
occurred before in the input gets a number appended. Step records of the input are copied to OUT/steps, so that the
audit shows the complete history, and OUT/steps/rewrite.parquet lists the samples that had to be dropped here.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.ownership import DONE, owned
from data_tools.pictures.recode import FORMATS, Recode
from data_tools.shards.rewrite_plan import Plan, make_plan
from data_tools.shards.rewrite_shard import NewShard, write_shard
from data_tools.shards.steps import (
    STEPS,
    Step,
    carry_steps,
    free_name,
    read_drops,
    read_steps,
    write_drops,
    write_step,
)
from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.data.shards.indexing import complete_shards, index_directory
from pretrain.data.shards.left_out import in_words
from pretrain.files import WRITING, sha256_of, sweep, write_json
from pretrain.visible import say, visible
from pretrain.workers import worker_pool

VERSION = 1
STAMP, WORK = "rewrite.json", ".rewrite"  # in OUT: the settings, and the directory for unfinished files
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """The settings that determine the new shards, besides the old ones and the drops."""

    samples_per_shard: int | None = 10_000
    bytes_per_shard: int | None = None  # approximately
    shuffle_seed: int | None = None
    max_side: int | None = None
    format: str = "keep"
    quality: int = 95

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "bytes_per_shard"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} is below 1; use 10000 samples, or 1e9 bytes")
        if self.bytes_per_shard is not None and not self.recode.keeps_all:
            raise ValueError(
                "--bytes-per-shard is wrong with --max-side or --format, because sizes are only known after encoding; "
                "use --samples-per-shard"
            )
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ValueError(f"--shuffle-seed {self.shuffle_seed} is negative; use 0 or more")

    @property
    def recode(self) -> Recode:
        return Recode(self.max_side, self.format, self.quality)


class Result(NamedTuple):
    step: Step
    shards: int
    notes: list[str]  # for the user
    new: bool  # False: it was complete already


def rewrite(inputs: list[Path], out: Path, settings: Settings, drops: list[Path], workers: int = 1) -> Result:
    """Writes the missing shards of `out`. Raises ValueError if `out` contains anything else, if no sample remains, or
    for drops that do not belong to these inputs; ShardError for a broken shard."""
    if any(out.resolve() == directory.resolve() for directory in inputs):
        raise ValueError(f"--out {out} is one of the inputs; choose a new directory")
    manifests = [index_directory(directory, workers).manifest for directory in inputs]
    request = {
        "version": VERSION,
        "inputs": [manifest.digest for manifest in manifests],
        "drops": [sha256_of(path) for path in drops],
        **asdict(settings),
    }
    with _owned_out(out, request) as summary:
        if new := summary is None:
            sweep(out)
            tars = [[Path(shard.url) for shard in manifest.shards] for manifest in manifests]
            plan = _plan(inputs, tars, out, settings, drops, workers)
            _write_all([path for part in tars for path in part], plan, out, settings, workers)
            summary = _finish(inputs, drops, out, settings, plan)
            write_json(out / STAMP, request | {DONE: summary})
        shutil.rmtree(out / WORK, ignore_errors=True)
    step = read_steps(out)[summary["step"]]
    return Result(step, len(complete_shards(out)[0]), summary["notes"], new)


def _owned_out(out: Path, request: dict[str, Any]) -> AbstractContextManager[dict[str, Any] | None]:
    """Yields the summary of a finished rewrite with these settings; None if there is work to do."""
    return owned(
        out,
        request,
        stamp=out / STAMP,
        work=out / WORK,
        has_other_files=lambda: out.exists() and any(not path.name.endswith((WORK, WRITING)) for path in out.iterdir()),
        restart=lambda: not any(out.glob("*.tar")),  # no shard was written, because an error came first
        patience=LOCK_SECONDS,
    )


def _plan(
    inputs: list[Path], tars: list[list[Path]], out: Path, settings: Settings, drops: list[Path], workers: int
) -> Plan:
    """Makes the plan, and writes its places to a file that all workers map."""
    plan = make_plan(
        [path for part in tars for path in part],
        [(files, tars[k]) for k, files in enumerate(_drops_by_input(drops, inputs))],
        samples_per_shard=settings.samples_per_shard if settings.bytes_per_shard is None else None,
        bytes_per_shard=settings.bytes_per_shard,
        shuffle_seed=settings.shuffle_seed,
        workers=workers,
    )
    np.save(out / WORK / "places.npy", plan.places, allow_pickle=False)
    if plan.schema is not None:
        pq.write_metadata(plan.schema, out / WORK / "rows.schema")
    write_drops(out / WORK / "duplicates.parquet", plan.duplicates)
    return plan


def _drops_by_input(drops: list[Path], inputs: list[Path]) -> list[list[Path]]:
    """The drops files of each input. Shards of different inputs have the same names, so each file must lie in one."""
    if len(inputs) == 1:
        return [drops]
    by_input: list[list[Path]] = [[] for _ in inputs]
    for path in drops:
        homes = [k for k, directory in enumerate(inputs) if path.resolve().is_relative_to(directory.resolve())]
        if len(homes) != 1:
            raise ValueError(
                f"--drop {path} lies in none of the directories, so it is unclear whose samples it names; move it to "
                "DIR/drops, or rewrite the directories one by one"
            )
        by_input[homes[0]].append(path)
    return by_input


def _write_all(tars: list[Path], plan: Plan, out: Path, settings: Settings, workers: int) -> None:
    edges = list(zip(plan.edges[:-1], plan.edges[1:], strict=True))
    jobs = [
        NewShard(out, out / WORK, number, first, last, tuple(str(tar) for tar in tars), plan.dashes, settings.recode)
        for number, (first, last) in enumerate(edges)
    ]
    todo = [job for job in jobs if not job.is_done]
    with tqdm(total=len(plan.places), desc=visible(f"writing {out}"), unit=" samples", disable=None) as bar:
        bar.update(len(plan.places) - sum(job.last - job.first for job in todo))
        for job in _write(todo, workers):
            bar.update(job.last - job.first)


def _write(jobs: list[NewShard], workers: int) -> Iterator[NewShard]:
    if min(workers, len(jobs)) <= 1:
        yield from map(write_shard, jobs)
        return
    with worker_pool(min(workers, len(jobs))) as pool:
        for future in as_completed([pool.submit(write_shard, job) for job in jobs]):
            yield future.result()


def _finish(inputs: list[Path], drops: list[Path], out: Path, settings: Settings, plan: Plan) -> dict[str, Any]:
    """Writes the index, the step records and the list of samples dropped here. -> the summary for the stamp."""
    pieces = [out / WORK / "duplicates.parquet", *sorted((out / WORK).glob("?????*.left.parquet"))]
    own_drops = write_drops(out / STEPS / "rewrite.parquet", read_drops(pieces))
    dropped = plan.dropped + own_drops
    dropped["duplicate_key"] -= len(plan.duplicates)  # they are in both
    kept = plan.rows - dropped.total()
    if not kept:
        raise ValueError(f"no sample remains: all {plan.rows} are dropped ({_counts(dropped)}); give fewer drops")
    index_directory(out)
    for path in (out / STEPS).glob("*.json"):  # of a run that was killed here
        path.unlink()
    name = free_name(carry_steps(inputs, out), "rewrite")
    facts = {"drops": [str(path) for path in drops], "renamed": plan.renamed, "unused_drops": plan.unused}
    step = Step(
        "rewrite",
        plan.rows,
        kept,
        dict(+dropped),
        asdict(settings) | facts | {"members_left_out": dict(plan.others)},
        [str(directory) for directory in inputs],
    )
    write_step(out, name, step)
    return {"step": name, "notes": _notes(plan)}


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.renamed:
        notes.append(
            f"{plan.renamed:,} samples had the key of an earlier one; they are now called KEY{plan.dashes}1, ..."
        )
    if plan.unused:
        notes.append(f"{plan.unused:,} drops match no sample of these shards")
    return notes + [f"left out: {line}" for line in in_words(plan.others).values()]


def _counts(counts) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "data_tools.rewrite",
        __doc__,
        "data/cc12m --drop data/cc12m/drops/*.parquet --out data/clean --max-side 256 --shuffle-seed 0",
    )
    add_directories(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new directory")
    parser.add_argument(
        "--drop", nargs="*", type=Path, default=[], metavar="FILE", help="drop the samples that these files name"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="maximum (%(default)s)")
    size.add_argument("--bytes-per-shard", type=float, metavar="N", help="approximate, such as 1e9")
    parser.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="shuffle all samples (default: the order of the input)"
    )
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink larger pictures")
    parser.add_argument(
        "--format", choices=FORMATS, default="keep", help="re-encode pictures of other formats (%(default)s)"
    )
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of re-encoded pictures (%(default)s)")
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), state="finished shards stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    if args.bytes_per_shard is not None and not math.isfinite(args.bytes_per_shard):
        raise ValueError(f"--bytes-per-shard {args.bytes_per_shard} is no size; use 1e9")
    by_bytes = None if args.bytes_per_shard is None else int(args.bytes_per_shard)
    settings = Settings(
        None if by_bytes is not None else args.samples_per_shard,
        by_bytes,
        args.shuffle_seed,
        args.max_side,
        args.format,
        args.quality,
    )
    result = rewrite(args.directories, args.out, settings, args.drop, args.workers)
    for note in result.notes:
        say(f"note: {note}")
    dropped = f"; dropped: {_counts(result.step.dropped)}" if result.step.dropped else ""
    already = "" if result.new else " (complete already)"
    kept, rows = result.step.kept, result.step.rows
    say(f"{args.out}: {kept:,} of {rows:,} samples in {result.shards:,} shards{already}{dropped}")


if __name__ == "__main__":
    sys.exit(main())
