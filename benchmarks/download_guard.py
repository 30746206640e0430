"""The cost of the guard: img2dataset alone and guarded, alternately, on the same list and local server.

    python -m benchmarks.download_guard --pictures 4000 --repeats 5 --out benchmarks/results/download_guard.json

Both run as commands, as in real use. The time is that from the start of the first shard to the end of the last, by
img2dataset's own statistics. CPU time is that of the whole command including its start (alone, that includes
img2dataset's logger process, which data_tools.download does not start); it depends less on other processes.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from benchmarks.record import machine
from data_tools.download import find_python
from data_tools.fetch.run_img2dataset import ROOT
from pretrain.command import about, make_parser, run, write

_ALONE = """\
import json, sys, img2dataset
if __name__ == "__main__":
    img2dataset.download(**json.loads(sys.argv[1]))
"""
_KINDS = 64  # different pictures of the server


@contextmanager
def picture_server(side: int) -> Iterator[int]:
    """Runs a local server, in one thread, that answers every request with a JPEG. -> its port."""
    answers = [_answer(number, side) for number in range(_KINDS)]
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            writer.write(answers[hash(request[:40]) % _KINDS])
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _answer(number: int, side: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {file.tell()}\r\nConnection: close\r\n\r\n"
    return head.encode() + file.getvalue()


def measure(pictures: int, repeats: int, processes: int, threads: int, side: int) -> dict[str, object]:
    """Medians of img/s and of CPU time for both, in alternating runs."""
    python = find_python()
    runs: dict[str, list[tuple[float, float]]] = {"alone": [], "guarded": []}
    with picture_server(side) as port, tempfile.TemporaryDirectory() as home:
        rows = _write_list(Path(home, "list.parquet"), port, pictures)
        for repeat in tqdm(range(repeats), unit=" repeats", disable=None):
            for name in sorted(runs, reverse=bool(repeat % 2)):  # so that neither is always first
                runs[name].append(_download(name, python, rows, Path(home), processes, threads))
    figures: dict[str, object] = {}
    for what, place in (("img_per_s", 0), ("cpu_ms_per_img", 1)):
        values = {name: [round(run[place], 3) for run in runs[name]] for name in runs}
        alone, guarded = (statistics.median(values[name]) for name in ("alone", "guarded"))
        cost = 1 - guarded / alone if what == "img_per_s" else guarded / alone - 1
        figures |= {
            f"alone_{what}": alone,
            f"guarded_{what}": guarded,
            f"guard_costs_percent_of_{what}": round(100 * cost, 2),
        }
        figures[f"runs_{what}"] = values
    return figures


def _write_list(path: Path, port: int, count: int) -> Path:
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": ["a picture of a test"] * count}), path)
    return path


def _download(name: str, python: str, rows: Path, home: Path, processes: int, threads: int) -> tuple[float, float]:
    """(img/s, milliseconds of CPU per picture) of one download."""
    with tempfile.TemporaryDirectory(dir=home) as out:
        if name == "alone":
            arguments: dict[str, object] = {
                "url_list": str(rows),
                "output_folder": out,
                "input_format": "parquet",
                "url_col": "url",
            }
            arguments |= {"caption_col": "caption", "output_format": "webdataset", "image_size": 256}
            arguments |= {"resize_mode": "keep_ratio", "resize_only_if_bigger": True, "skip_reencode": True}
            arguments |= {"processes_count": processes, "thread_count": threads, "number_sample_per_shard": 500}
            arguments |= {"extract_exif": False, "min_image_size": 32, "max_aspect_ratio": 8}
            script = home / "alone.py"
            script.write_text(_ALONE)
            line = [python, str(script), json.dumps(arguments)]
        else:
            line = [sys.executable, "-m", "data_tools.download", "--list", str(rows), "--preset", "canonical"]
            line += ["--out", out, "--workers", str(processes), "--threads", str(threads)]
            line += ["--samples-per-shard", "500", "--allow-address", "127.0.0.1/32"]
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": str(ROOT)}
        before = _cpu_seconds()
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        cpu = _cpu_seconds() - before
        shards = [json.loads(path.read_bytes()) for path in Path(out).glob("*_stats.json")]
    successes, count = sum(shard["successes"] for shard in shards), pq.read_metadata(rows).num_rows
    if done.returncode or successes != count:
        message = done.stderr.strip()[-300:]
        raise ValueError(f"{name}: downloaded {successes} of {count}, exit code {done.returncode}: {message}")
    seconds = max(shard["end_time"] for shard in shards) - min(shard["start_time"] for shard in shards)
    return count / seconds, 1000 * cpu / count


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.download_guard", __doc__, "--pictures 4000 --repeats 5")
    parser.add_argument("--pictures", type=int, default=4000, help="per measurement (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each, alternating (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of img2dataset (%(default)s)")
    parser.add_argument("--threads", type=int, default=32, help="per process (%(default)s)")
    parser.add_argument("--side", type=int, default=384, help="pixels of the pictures (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("pictures", "repeats", "processes", "threads", "side"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    setting = {name: value for name, value in vars(args).items() if name != "out"}
    facts = about("benchmarks.download_guard", arguments) | machine()
    write({**setting, **measure(**setting), **facts}, args.out)


if __name__ == "__main__":
    sys.exit(main())
