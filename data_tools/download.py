"""Downloads the pictures of a list safely, with img2dataset, into shards that training reads.

    python -m data_tools.download --list laion/part-00000.parquet --preset laion --out data/laion

Runs img2dataset in an environment of its own (bash launch/env/download.sh makes it). After a kill, run the same command
to continue. --slice I/N downloads the I-th (from 0) of N slices of the list into the same --out, on any machine; the
slice that finishes last writes the manifest. Pictures are decoded as in training, and those that are encoded anew are
upright, 8 bits deep and without transparency. URLs are sent as browsers send them. Servers are untrusted: only http and
https, only public addresses, limits on bytes, time, redirects and pixels. X-Robots-Tag is respected. To fetch from a
mirror in an intranet, or from a cluster whose own machines have public addresses, --allow-address and --refuse-address
name networks; the same command with other networks fetches the shards again that have pictures at addresses which are
permitted only now.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.fetch.addresses import NOT_PUBLIC, may_connect_now
from data_tools.fetch.guarded_fetch import Limits
from data_tools.fetch.reasons import SUCCESS
from data_tools.fetch.run_img2dataset import ROOT, Run, download_slice
from data_tools.fetch.slices import WORK, Slice, SliceShards, owned_slice, write_list
from data_tools.lists.columns import EXTRA
from data_tools.lists.reading import CAPTIONS, PRESETS, fingerprint, open_list
from data_tools.shards.step_table import describe_drops
from data_tools.shards.steps import STEPS, Step, free_name, write_step
from pretrain.command import add_workers, make_parser, run
from pretrain.data.decoding import MAX_PIXELS
from pretrain.data.shards.indexing import index_directory
from pretrain.files import write_file, write_json
from pretrain.json_files import fields, read_fields, whole_numbers

# img2dataset writes its own width and height.
_OF_LIST = ("list", "fingerprint", "preset", "url_col", "caption_col", "captions")
OWN_STEPS = ("list", "download")  # the records that `merge` writes
MOST_SLICES = 100_000  # of a list
_PLAN = {"list": list, "fingerprint": str, "preset": str, "slices": int, "samples_per_shard": int}
_PASSED_ON = ("row", CAPTIONS, *(name for name in EXTRA if name not in ("width", "height")))


def find_python() -> str:
    """The Python that has img2dataset. Raises ValueError if there is none."""
    if python := os.environ.get("IMGLISH_DOWNLOAD_PYTHON"):
        if shutil.which(python) is None:
            raise ValueError(f"IMGLISH_DOWNLOAD_PYTHON={python} is not a program; unset it, or set it to a Python")
        return python
    home = Path(os.environ.get("IMGLISH_DOWNLOAD_ENV") or ROOT / ".venv-download")
    if (home / "bin" / "python").exists():
        return str(home / "bin" / "python")
    if importlib.util.find_spec("img2dataset") is not None:
        return sys.executable
    raise ValueError(
        f"img2dataset is installed neither in {home} nor here; run: bash launch/env/download.sh (a minute, once), or "
        "set IMGLISH_DOWNLOAD_PYTHON to a Python that has it"
    )


def download(args: argparse.Namespace, part: Slice) -> None:
    """Downloads the slice `part` and writes the outcome of its rows to its done.json."""
    run = Run(find_python(), _arguments(args), _limits(args), args.max_pixels, args.stall_seconds)
    rows = open_list(args.list, args.preset, args.url_col, args.caption_col, args.captions)
    with owned_slice(part, _plan(args, part)):
        start = time.monotonic()
        shards = write_list(rows, part)
        _repeat_refused(shards, run.limits)
        if rows.first_bad_row:
            print(f"note: {rows.dropped['bad_row']:,} rows cannot be read, the first of {rows.first_bad_row}")
        passed_on = [name for name in rows.columns if name in _PASSED_ON]
        run.img2dataset["save_additional_columns"] = passed_on
        before, rows_to_fetch = len(shards.published()), shards.listed.kept
        counts = download_slice(run, shards)
        assert counts.total() == rows_to_fetch, (counts, shards)
        _write_done(shards, counts)
        seconds = time.monotonic() - start
    new = len(shards.numbers) - before
    speed = f", {new} of them now, {rows_to_fetch / seconds:.0f} img/s" if new and not before else ""
    print(f"{part.out}: slice {part.number}/{part.slices} is done, {len(shards.numbers)} shards{speed}")
    if shards.kept:
        print(
            f"{part.out}: {len(shards.kept)} shards stay as they were, because fewer of their pictures came this time; "
            "run the same command to try again"
        )


def _repeat_refused(shards: SliceShards, limits: Limits) -> None:
    """Lets shards be made again that have pictures at addresses which the options forbade then and permit now."""
    if count := shards.repeat(partial(may_connect_now, allow=limits.allow, refuse=limits.refuse)):
        print(f"{shards.part.out}: {count} shards are made again: they have pictures whose addresses are now permitted")


def _write_done(shards: SliceShards, counts: Counter[str]) -> None:
    listed = shards.listed
    content = {
        "list": {"rows": listed.rows, "kept": listed.kept, "dropped": listed.dropped},
        "download": {"rows": listed.kept, "kept": counts[SUCCESS], "dropped": _without_success(counts)},
    }
    write_json(shards.part.done, content)


def _read_done(part: Slice) -> dict[str, Any]:
    """What `_write_done` wrote. ValueError if it is damaged."""
    way_out = "remove it, and run the download of this slice again"
    content = read_fields(part.done, {"list": dict, "download": dict}, way_out)
    try:
        for name in ("list", "download"):
            outcome = fields(content[name], {"rows": int, "kept": int, "dropped": dict})
            if outcome["rows"] != outcome["kept"] + sum(whole_numbers(outcome["dropped"]).values()):
                raise ValueError(f"its {name} has rows that are neither kept nor dropped")
    except ValueError as error:
        raise ValueError(f"{part.done} is damaged ({error}); {way_out}") from None
    return content


def _without_success(counts: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counts.items()) if reason != SUCCESS}


def merge(out: Path, workers: int = 1) -> list[int]:
    """Writes the step records of all slices together, and the manifest. If some slices are not done, writes nothing and
    returns their numbers. Raises ValueError if no download was started, or no picture could be downloaded."""
    try:
        plan = read_fields(out / WORK / "plan.json", _PLAN, f"take another --out than {out}")
    except FileNotFoundError:
        raise ValueError(f"--out={out} has no download; give the --out of a download that was started") from None
    if not 1 <= plan["slices"] <= MOST_SLICES:
        raise ValueError(f"{out / WORK / 'plan.json'} is damaged (slices={plan['slices']}); take another --out")
    parts = [Slice(out, number, plan["slices"], plan["samples_per_shard"]) for number in range(plan["slices"])]
    if missing := [part.number for part in parts if not part.done.exists()]:
        return missing
    done = [_read_done(part) for part in parts]
    listed = _write_step(out, "list", done, {name: plan.get(name) for name in _OF_LIST}, plan["list"])
    rest = {name: value for name, value in plan.items() if name not in _OF_LIST}
    result = _write_step(out, "download", done, rest, plan["list"])
    if not listed.kept:
        raise ValueError(
            f"--list={plan['list'][0]}: all {listed.rows:,} rows are dropped ({describe_drops(listed.dropped)}); check "
            "its columns"
        )
    dropped = _describe_drops(result.dropped)
    if not result.kept:
        raise ValueError(
            f"--out={out}: none of {result.rows:,} pictures could be downloaded ({dropped}); check the list and the "
            "network"
        )
    indexed = index_directory(out, workers)
    print(
        f"{out}: {result.kept:,} of {result.rows:,} pictures ({100 * result.kept / result.rows:.1f} %) in "
        f"{len(indexed.manifest.shards):,} shards; {dropped}"
    )
    return []


def _write_step(out: Path, name: str, done: list[dict], settings: dict[str, Any], inputs: list[str]) -> Step:
    dropped: Counter[str] = sum((Counter(part[name]["dropped"]) for part in done), Counter())
    rows, kept = (sum(part[name][key] for part in done) for key in ("rows", "kept"))
    step = Step("data_tools.download", rows, kept, dict(sorted(dropped.items())), settings, inputs, "rows")
    write_step(out, name, step)
    return step


def _describe_drops(dropped: dict[str, int]) -> str:
    """Of the whole download, with the way out where the guard refused addresses."""
    text = f"dropped: {describe_drops(dropped)}"
    if dropped.get(NOT_PUBLIC):
        text += (
            f"; to fetch from addresses that are not public, as of a mirror in your intranet ({NOT_PUBLIC}), run the "
            "same command with --allow-address NETWORK"
        )
    return text


def carry_steps(lists: list[Path], out: Path) -> None:
    """Copies the step records of the lists, such as filter_list's, to `out`. Those of one name, of lists in several
    directories, get numbers, the same in every slice."""
    names = list(OWN_STEPS)
    for home in dict.fromkeys(path if path.is_dir() else path.parent for path in lists):
        for path in sorted((home / STEPS).glob("*.json")):
            (out / STEPS).mkdir(parents=True, exist_ok=True)
            names.append(free_name(names, path.stem))
            write_file(out / STEPS / f"{names[-1]}.json", path.read_bytes())


def _plan(args: argparse.Namespace, part: Slice) -> dict[str, Any]:
    """The settings that determine the shards: all slices, and every run that continues one, must agree on them."""
    names: tuple[str, ...] = (
        "preset",
        "url_col",
        "caption_col",
        "captions",
        "samples_per_shard",
        "image_size",
        "resize_mode",
        "encode_format",
    )
    names += ("encode_quality", "reencode", "min_image_size", "max_aspect_ratio", "max_pixels", "max_bytes")
    plan = {"list": [path.name for path in args.list], "fingerprint": fingerprint(args.list), "slices": part.slices}
    return plan | {name: getattr(args, name) for name in names}


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of img2dataset.download."""
    return {
        "input_format": "parquet",
        "output_format": "webdataset",
        "url_col": "url",
        "caption_col": "caption",
        "processes_count": args.workers,
        "thread_count": args.threads,
        "image_size": args.image_size,
        "resize_mode": args.resize_mode,
        "resize_only_if_bigger": True,
        "skip_reencode": not args.reencode,
        "encode_format": args.encode_format,
        "encode_quality": args.encode_quality,
        "min_image_size": args.min_image_size,
        "max_aspect_ratio": args.max_aspect_ratio,
        "timeout": args.timeout,
        "retries": args.retries,
        "user_agent_token": args.user_agent_token,
        "extract_exif": False,
        "enable_wandb": False,
    }


def _limits(args: argparse.Namespace) -> Limits:
    return Limits(
        args.max_bytes, args.deadline, args.max_redirects, tuple(args.allow_address), tuple(args.refuse_address)
    )


def _slice(text: str) -> tuple[int, int]:
    try:
        number, slices = (int(word) for word in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} does not have the form I/N, such as 0/16") from None
    if not 0 <= number < slices:
        raise argparse.ArgumentTypeError(f"{text}: I counts from 0 to N-1")
    if slices > MOST_SLICES:
        raise argparse.ArgumentTypeError(f"{text}: more than {MOST_SLICES} slices; use less")
    return number, slices


def _parser() -> argparse.ArgumentParser:
    example = "--list cc12m.tsv --preset cc12m --out data/cc12m --workers 16"
    parser = make_parser("data_tools.download", __doc__, example)
    add = parser.add_argument
    add("--list", nargs="+", type=Path, metavar="FILE", help="the list: files, or directories of them")
    add(
        "--preset", choices=PRESETS, metavar="NAME", help="; ".join(f"{name} ({p.what})" for name, p in PRESETS.items())
    )
    add("--url-col", metavar="NAME", help="the column of the URLs, if the preset does not name it")
    add("--caption-col", metavar="NAME", help="the column of the captions")
    several = "of a picture with several: the first, or all in the JSON of its sample (those that filter_list kept)"
    add("--captions", choices=("first", "all"), help=several)
    add("--out", type=Path, required=True, metavar="OUT", help="the directory of 00000.tar, 00001.tar, ...")
    add("--slice", type=_slice, default=(0, 1), metavar="I/N", help="only the I-th (from 0) of N parts of the list")
    add("--merge", action="store_true", help="only write the manifest and the step records of all slices of --out")
    work = parser.add_argument_group("work")
    add = work.add_argument
    add_workers(work, most=16)
    add("--threads", type=int, default=64, metavar="N", help="simultaneous requests per worker (%(default)s)")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="rows of the list per shard (%(default)s)")
    stall = "restart after this long without progress (%(default)s)"
    add("--stall-seconds", type=float, default=300, metavar="S", help=stall)
    picture = parser.add_argument_group("pictures")
    add = picture.add_argument
    sides = "of the shorter side; smaller pictures stay as they are (%(default)s)"
    add("--image-size", type=int, default=256, metavar="PIXELS", help=sides)
    modes = ("no", "keep_ratio", "keep_ratio_largest", "center_crop", "border")
    add("--resize-mode", choices=modes, default="keep_ratio", help="img2dataset's (%(default)s)")
    add("--encode-format", choices=("jpg", "png", "webp"), default="jpg", help="(%(default)s)")
    add("--encode-quality", type=int, default=95, metavar="Q", help="(%(default)s; png: 0 to 9)")
    add("--reencode", action="store_true", help="also re-encode pictures that have the format and need no resizing")
    add("--min-image-size", type=int, default=32, metavar="PIXELS", help="drop smaller pictures (%(default)s)")
    add("--max-aspect-ratio", type=float, default=8, metavar="R", help="drop longer pictures (%(default)s)")
    guard = parser.add_argument_group("guard")
    add = guard.add_argument
    add("--timeout", type=float, default=10, metavar="S", help="for connecting and for each read (%(default)s)")
    add("--deadline", type=float, default=30, metavar="S", help="for a request with its redirects (%(default)s)")
    add("--retries", type=int, default=0, metavar="N", help="of a failed request (%(default)s)")
    add("--max-bytes", type=int, default=20 * 2**20, metavar="N", help="of one picture (%(default)s)")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="by the picture's header (%(default)s)")
    add("--max-redirects", type=int, default=5, metavar="N", help="(%(default)s)")
    allow, refuse = "allow it though it is not public, such as 10.1.0.0/16", "refuse it, even where it is allowed"
    add("--allow-address", action="append", default=[], metavar="NETWORK", help=f"{allow}; may be repeated")
    add("--refuse-address", action="append", default=[], metavar="NETWORK", help=f"{refuse}; may be repeated")
    add("--user-agent-token", metavar="WORD", help="your name in User-Agent and X-Robots-Tag")
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.list or not args.preset:
        raise ValueError("--list or --preset is missing; give both, or --merge if all slices are done")
    if any(sign in str(args.out) for sign in "*?["):
        raise ValueError(f"--out={args.out} contains one of * ? [, which img2dataset reads as a pattern; rename it")
    least = {"workers": 1, "threads": 1, "samples_per_shard": 2, "stall_seconds": 1, "image_size": 1, "timeout": 0.01}
    least |= {"min_image_size": 0, "max_aspect_ratio": 1, "retries": 0, "max_pixels": 1, "encode_quality": 0}
    for name, value in least.items():
        if not getattr(args, name) >= value:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} is below {value}; use {value} or more")
    if args.max_pixels > MAX_PIXELS:
        raise ValueError(f"--max-pixels={args.max_pixels} is above what is decoded; use at most {MAX_PIXELS}")
    best = 9 if args.encode_format == "png" else 100
    if args.encode_quality > best:
        raise ValueError(
            f"--encode-quality={args.encode_quality} is above the maximum for {args.encode_format}; use at most {best}"
        )


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return run(lambda: _run(args), state="finished shards stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    args.out = args.out.absolute()
    if not args.merge:
        _check(args)
        number, slices = args.slice
        download(args, Slice(args.out, number, slices, args.samples_per_shard))
        carry_steps(args.list, args.out)
    if missing := merge(args.out, args.workers):
        numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        if args.merge:
            raise ValueError(f"--out={args.out}: slices {numbers} are not done; run them, then merge")
        print(f"{args.out}: will be merged when the other slices are done ({numbers})")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that img2dataset is stopped too
    sys.exit(main())
