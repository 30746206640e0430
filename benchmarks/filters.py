"""The cost of the filters: rows/s and peak memory of filter_list on a generated LAION-like parquet, the time of each
filter, and pictures/s of filter_shards on drawn pictures.

    python -m benchmarks.filters --rows 1e7 --pictures 5000 --out benchmarks/results/filters.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import machine, peak_bytes
from data_tools.filter_shards import filter_shards
from data_tools.lists.filters import ListSettings, make_filters
from data_tools.lists.reading import open_list
from data_tools.lists.url_set import UrlSet
from data_tools.pictures.filters import PictureSettings
from data_tools.sample_corpus import Corpus, write_corpus
from pretrain.command import about, make_parser, run, write

GROUP = 262_144  # rows
OPTIONS = (
    "--min-similarity 0.28 --max-punsafe 0.9 --max-pwatermark 0.8 --min-side 200 --max-aspect 3 --min-caption-words 3 "
    "--unique-urls"
)
_WORDS = (
    "the of and in a for with on to black white red blue new vintage woman man city house dog cat night old garden "
    "kitchen wall art design poster photo 2019 beach dress shoes leather summer wedding winter view table"
)
_JUNK = ["IMG_1234.jpg", "stock photo", "123-456", "click to enlarge", "http://a.example/b.jpg", "<b>sale</b>", ""]


def batches(rows: int) -> Iterator[pa.RecordBatch]:
    """Rows like LAION's: 2 to 18 words, one caption in 20 is junk, one URL in 50 repeats an earlier one."""
    rng = np.random.default_rng(0)
    words = np.array(_WORDS.split())
    for first in range(0, rows, GROUP):
        n = min(GROUP, rows - first)
        lengths = rng.integers(2, 19, n)
        random_words = words[rng.integers(0, len(words), int(lengths.sum()))].tolist()
        ends = np.cumsum(lengths).tolist()
        captions = [
            " ".join(random_words[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)
        ]
        for row in rng.integers(0, n, n // 20).tolist():
            captions[row] = _JUNK[row % len(_JUNK)]
        numbers = np.arange(first, first + n)
        repeats = rng.random(n) < 0.02
        numbers[repeats] = rng.integers(0, first + n, int(repeats.sum()))
        hosts = (numbers**2 % 50_021).tolist()
        pages = zip(numbers.tolist(), hosts, strict=True)
        urls = [f"https://img{host % 7}.site{host}.example/media/{i}/p_{i}.jpg" for i, host in pages]
        columns: dict[str, Any] = {"URL": urls, "TEXT": captions}
        columns |= {name: rng.random(n) for name in ("punsafe", "pwatermark")}
        columns["similarity"] = 0.22 + 0.2 * rng.random(n)
        columns |= {name: rng.integers(100, 1200, n) for name in ("WIDTH", "HEIGHT")}
        yield pa.RecordBatch.from_pydict(columns)


def write_list(path: Path, rows: int) -> None:
    stream = batches(rows)
    first = next(stream)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in stream:
            writer.write_batch(batch)


def whole(path: Path, out: Path) -> dict[str, float]:
    """Times the real command in a process of its own, for its peak memory."""
    command = [
        sys.executable,
        "-m",
        "data_tools.filter_list",
        "--list",
        str(path),
        "--preset",
        "laion",
        *OPTIONS.split(),
    ]
    start = time.perf_counter()
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [*command, "--out", str(out)])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise ValueError(f"filter_list failed with status {os.waitstatus_to_exitcode(status)}; see its message above")
    step = json.loads((out.parent / "steps" / "filter_list.json").read_bytes())
    return {
        "rows": step["rows"],
        "kept": step["kept"],
        "seconds": round(seconds, 2),
        "rows_per_s": round(step["rows"] / seconds),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(peak_bytes(usage) / 2**20, 1),
    }


def each(path: Path) -> dict[str, float]:
    """Nanoseconds per row of every filter, on unfiltered rows and one core."""
    rows = open_list([path], "laion")
    batch = next(rows.batches(65_536))
    settings = ListSettings(0.28, 0.9, 0.8, 200, 3.0, 3, 5, blocked_domains=("site7.example", "nowhere.example"))
    nanoseconds = {}
    for filter_ in make_filters(settings, rows.columns):
        nanoseconds[filter_.name] = _nanoseconds(lambda drops=filter_.drops: drops(batch), len(batch))
    nanoseconds["duplicate_url"] = _nanoseconds(lambda: UrlSet().add(batch["url"]), len(batch))
    try:
        language = make_filters(ListSettings(keep_junk_captions=True, language=("en",)), rows.columns)[-1]
        part = batch.slice(0, 4096)
        nanoseconds["other_language (py3langid)"] = _nanoseconds(lambda: language.drops(part), len(part))
    except ValueError:  # not installed
        pass
    return nanoseconds


def _nanoseconds(function, rows: int) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return round(1e9 * min(times) / rows, 1)


def pictures(directory: Path, number: int, size: int, workers: int) -> dict[str, float]:
    """The first pass over drawn pictures, and the second, which only reads the stored measures."""
    write_corpus(
        directory, Corpus(number, 0, 0, 4, size, samples_per_shard=max(1, number // 8), familiar=0), workers=workers
    )
    shards = directory / "pairs" / "train"
    _, measures = filter_shards(shards, PictureSettings(), workers)
    start = time.perf_counter()
    filter_shards(shards, PictureSettings(min_side=2 * size), workers)
    second = time.perf_counter() - start
    return {
        "pictures": measures.pictures,
        "side": size,
        "workers": workers,
        "pictures_per_s": round(measures.pictures / measures.seconds),
        "other_thresholds_s": round(second, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.filters", __doc__, "--rows 1e7 --pictures 5000")
    parser.add_argument("--rows", type=float, default=1e7, help="of the list (%(default)g)")
    parser.add_argument("--pictures", type=int, default=2000, help="of the shards (%(default)s)")
    parser.add_argument("--side", type=int, default=256, help="pixels of a picture's side (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="for the pictures (%(default)s)")
    parser.add_argument("--dir", type=Path, help="for lists and shards (the system's temporary directory)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("rows", "pictures", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "list.parquet"
        write_list(path, int(args.rows))
        result = {
            "filter_list": whole(path, Path(folder) / "clean" / "kept.parquet"),
            "options": OPTIONS,
            "ns_per_row": each(path),
            "filter_shards": pictures(Path(folder) / "corpus", args.pictures, args.side, args.workers),
        }
    write({**result, **about("benchmarks.filters", arguments), **machine("pyarrow")}, args.out)


if __name__ == "__main__":
    sys.exit(main())
