"""Filters downloaded shards by picture (broken, tiny, narrow, blank) and by repeated captions.

    python -m data_tools.filter_shards data/cc12m --min-side 64 --max-aspect 3 --max-caption-repeats 100

Changes nothing: DIR/drops/filter_shards.parquet names the samples to drop (data_tools.rewrite drops them), and
DIR/steps/filter_shards.json has their number by reason, with the thresholds. The measures of a shard are stored in
DIR/measures, so a killed run continues, and other thresholds need no second pass. A sample counts under the first of:

    undecodable too_small extreme_aspect blank low_entropy one_colour caption_repeats

Of a caption with more than --max-caption-repeats pictures, the first ones (by shard and key) are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.pictures.filters import REASONS, REPEATED, Measures, PictureSettings, measure, reasons
from data_tools.pictures.hashes import caption_hash
from data_tools.shards.samples import make_table, samples_of
from data_tools.shards.step_table import step_table
from data_tools.shards.steps import Drop, Step, write_drops, write_step
from pretrain.command import add_workers, make_parser, run
from pretrain.data.shards.indexing import check_writable, complete_shards, map_in_order, stats_path
from pretrain.data.shards.reader import MAX_IMAGE_BYTES
from pretrain.data.shards.tar_index import Member
from pretrain.visible import say, visible

STEP = "filter_shards"
DROPS = "drops"  # the directory for drops files
FOLDER, VERSION = "measures", 1
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("picture", pa.bool_()),  # whether it has one; otherwise its measures are null
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("contrast", pa.float32()),
        ("entropy", pa.float32()),
        ("one_colour", pa.float32()),
        ("problem", pa.string()),
        ("caption", pa.uint64()),  # hash of the words; null if there are none
    ]
)
_NUMBERS = ("width", "height", "contrast", "entropy", "one_colour")


@dataclass(frozen=True)
class MeasureFiles:
    """The files of measures, one per shard, sorted by name."""

    files: tuple[Path, ...]
    pictures: int  # decoded in this run; the others were up to date
    seconds: float


def filter_shards(directory: Path, settings: PictureSettings, workers: int = 1) -> tuple[Step, MeasureFiles]:
    """Writes the drops and the step record. Raises ValueError if there is no shard, ShardError (a ValueError) for a
    broken one, naming it."""
    measures = measure_shards(directory, workers)
    path = directory / DROPS / f"{STEP}.parquet"
    total = Counter[str]()
    dropped = write_drops(path, _drops(measures.files, settings, total))
    order = {name: dropped[name] for name in (*REASONS, REPEATED) if dropped[name]}
    step = Step(STEP, total["samples"], total["samples"] - dropped.total(), order, asdict(settings), [str(directory)])
    write_step(directory, STEP, step)
    return step, measures


def measure_shards(directory: Path, workers: int = 1) -> MeasureFiles:
    """Measures all complete shards, except those whose file in DIRECTORY/measures is up to date."""
    tars = complete_shards(directory)[0]
    check_writable(directory)
    (directory / FOLDER).mkdir(exist_ok=True)
    jobs = [(tar, directory / FOLDER / f"{tar.stem}.parquet") for tar in tars]
    started, pictures = time.perf_counter(), 0
    with map_in_order(_up_to_date, jobs, workers) as results:
        for fresh in tqdm(
            results, total=len(jobs), desc=visible(f"measuring {directory}"), unit=" shards", disable=None
        ):
            pictures += fresh
    return MeasureFiles(tuple(file for _, file in jobs), pictures, time.perf_counter() - started)


def _drops(files: tuple[Path, ...], settings: PictureSettings, total: Counter[str]) -> Iterator[Drop]:
    """The drops, in the order of shards and keys. Counts the samples in `total` on the way."""
    frequent = _frequent(files, settings)
    occurrences: Counter[int] = Counter()
    for file in files:
        table = pq.read_table(file)
        total["samples"] += len(table)
        reason_index, captions = _reasons(table, settings)
        drops: dict[int, Drop] = {}
        for row in np.flatnonzero(reason_index >= 0).tolist():
            sample = table.slice(row, 1).to_pylist()[0]
            reason = REASONS[reason_index[row]]
            drops[row] = Drop(file.stem, sample["key"], reason, _detail(reason, sample))
        for row in np.flatnonzero(np.isin(captions, list(frequent))).tolist() if frequent else ():
            caption = int(captions[row])
            occurrences[caption] += 1
            if occurrences[caption] > settings.max_caption_repeats:
                key = table["key"][row].as_py()
                drops[row] = Drop(file.stem, key, REPEATED, f"under {frequent[caption]} pictures")
        yield from (drops[row] for row in sorted(drops))


def _reasons(table: pa.Table, settings: PictureSettings) -> tuple[np.ndarray, np.ndarray]:
    """(index in REASONS or -1; the caption's hash if the picture passes, otherwise 0), [samples] each."""
    measures = {name: pc.fill_null(table[name], 0).to_numpy() for name in _NUMBERS}
    measures["problem"] = table["problem"].is_valid().to_numpy()
    pictures = table["picture"].to_numpy()
    reason_index = np.where(pictures, reasons(measures, settings), -1)  # samples without picture pass
    captions = pc.fill_null(table["caption"], 0).to_numpy()
    return reason_index, np.where(pictures & (reason_index == -1), captions, 0).astype(np.uint64)


def _frequent(files: tuple[Path, ...], settings: PictureSettings) -> dict[int, int]:
    """The captions that have too many pictures: hash -> number of pictures. Takes 8 bytes per sample."""
    if not settings.max_caption_repeats:
        return {}
    captions = [captions[captions > 0] for _, captions in (_reasons(pq.read_table(f), settings) for f in files)]
    hashes, counts = np.unique(np.concatenate(captions), return_counts=True)
    many = counts > settings.max_caption_repeats
    return dict(zip(hashes[many].tolist(), counts[many].tolist(), strict=True))


def _detail(reason: str, sample: dict) -> str:
    if reason == "undecodable":
        return sample["problem"]
    if reason in ("too_small", "extreme_aspect"):
        return f"{sample['width']} x {sample['height']}"
    if reason == "one_colour":
        return f"{100 * sample['one_colour']:.1f} % of the picture"
    return f"contrast {sample['contrast']:.2g} levels" if reason == "blank" else f"entropy {sample['entropy']:.2g} bits"


def _up_to_date(job: tuple[Path, Path]) -> int:
    """Brings the measures of one shard up to date. -> how many pictures it decoded."""
    table = make_table(*job, _SCHEMA, VERSION, _measure_shard)
    return 0 if table is None else sum(table["picture"].to_pylist())


def _measure_shard(tar: Path) -> Iterator[dict]:
    with open(tar, "rb") as file:
        for sample in samples_of(tar):
            row: dict = {"key": sample.key, "picture": sample.picture is not None}
            if sample.picture is not None:
                row |= _measure_member(file, sample.picture)._asdict()
            if (text := sample.text(file)) is not None:
                caption, words = caption_hash(text)
                row["caption"] = caption if words else None
            yield row


def _measure_member(file: BinaryIO, picture: Member) -> Measures:
    if picture.size > MAX_IMAGE_BYTES:
        return Measures(problem=f"{picture.size} bytes are more than the limit of {MAX_IMAGE_BYTES}")
    file.seek(picture.offset)
    return measure(file.read(picture.size))


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.filter_shards", __doc__, "data/cc12m --min-side 200 --workers 8")
    parser.add_argument("directory", type=Path, metavar="DIR", help="contains 00000.tar, 00001.tar, ...")
    for name, kind, metavar, text in (
        ("min_side", int, "PIXELS", "of the shorter side"),
        ("max_aspect", float, "RATIO", "of the longer side to the shorter; inf: any"),
        ("min_contrast", float, "LEVELS", "standard deviation of a channel, out of 255; 0: any"),
        ("min_entropy", float, "BITS", "of the brightness histogram, out of 8; 0: any"),
        ("max_one_colour", float, "SHARE", "of the pixels that have one colour; 1: any"),
        ("max_caption_repeats", int, "N", "pictures with the same caption; 0: any number"),
    ):
        flag = f"--{name.replace('_', '-')}"
        default = getattr(PictureSettings, name)
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=f"{text} (%(default)s)")
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished measures are stored; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    settings = PictureSettings(**{field.name: getattr(args, field.name) for field in fields(PictureSettings)})
    step, measures = filter_shards(args.directory, settings, args.workers)
    for path in complete_shards(args.directory)[1]:
        say(f"note: {path.name} is partial (no {stats_path(path).name}) and was not filtered")
    print(step_table(step))
    if measures.pictures:
        rate = measures.pictures / measures.seconds
        print(f"{measures.pictures:,} pictures measured in {measures.seconds:.1f} s, {rate:,.0f} pictures/s")
    path = args.directory / DROPS / f"{STEP}.parquet"
    say(f"{path} names {step.rows - step.kept:,} samples to drop; drop them with python -m data_tools.rewrite")


if __name__ == "__main__":
    sys.exit(main())
