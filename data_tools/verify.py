"""Checks that shards match their manifest, that no member is left out, and that each sample can be used. Prints a line
per problem.

    python -m data_tools.verify data/cc12m --decode --workers 8

Without --decode only a picture's header is read (format, size, decompression bombs), with it every pixel. Changes
nothing. Exit code 0: no problems, 1: problems, 2: nothing to check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.content import with_checksums
from pretrain.data.shards.indexing import complete_shards, map_in_order, stats_path
from pretrain.data.shards.left_out import count, in_words
from pretrain.data.shards.manifest import MANIFEST, MAX_MANIFEST_BYTES, Shard, read_manifest
from pretrain.data.shards.overlooked import overlooked
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, BadSample, ShardError
from pretrain.data.shards.tar_index import EXTENSIONS, IMAGE_EXTENSIONS, index_shard, shard_parts
from pretrain.json_files import read_bytes, read_json, typed
from pretrain.visible import say, visible

KINDS = ("auto", "images", "pairs", "texts")
# The number of shards from which the kind of a source is guessed.
_GUESS_FROM = 16


@dataclass(frozen=True)
class Finding:
    shard: str
    key: str  # "": the whole shard
    what: str

    def __str__(self) -> str:
        return "\t".join(part for part in (self.shard, self.key, self.what) if part)


class Job(NamedTuple):
    path: Path
    entry: Shard | None  # its entry in the manifest
    decode: bool
    kind: str


class ShardReport(NamedTuple):
    findings: list[Finding]
    samples: int


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    shards: int
    samples: int


def verify_directory(directory: Path, *, kind: str = "auto", decode: bool = False, workers: int = 1) -> Report:
    """Checks every complete shard of a directory. ValueError if it has none."""
    complete, _ = complete_shards(directory)
    entries, findings = _manifest_entries(directory)
    missing = sorted(set(entries) - {path.name for path in complete})
    findings += [Finding(name, "", f"is in {MANIFEST}, but missing or partial") for name in missing]
    findings += [Finding(name, "", why) for name, why in overlooked(directory)]
    if kind == "auto":
        kind = _guess_kind(complete)
    jobs = [Job(path, entries.get(path.name), decode, kind) for path in complete]
    samples = 0
    with map_in_order(check_shard, jobs, workers) as results:
        for shard_report in tqdm(
            results, total=len(jobs), desc=visible(f"verifying {directory}"), unit=" shards", disable=None
        ):
            findings += shard_report.findings
            samples += shard_report.samples
    if entries:
        findings += [Finding(j.path.name, "", f"is not in {MANIFEST}; index again") for j in jobs if j.entry is None]
    return Report(findings, len(jobs), samples)


def _manifest_entries(directory: Path) -> tuple[dict[str, Shard], list[Finding]]:
    try:
        manifest = read_manifest(read_bytes(directory / MANIFEST, MAX_MANIFEST_BYTES), os.path.join(directory, ""))
    except FileNotFoundError:
        return {}, [Finding(MANIFEST, "", f"is missing; run: python -m data_tools.index {directory}")]
    except ValueError as error:
        return {}, [Finding(MANIFEST, "", str(error))]
    return {shard.name: shard for shard in manifest.shards}, []


def _guess_kind(tars: list[Path]) -> str:
    """The kind of the source: pairs if there are pictures and texts, even in different samples."""
    extensions = set()
    for path in tars[:_GUESS_FROM]:
        try:
            for part in shard_parts(path):
                extensions.add("" if part.left_out else part.extension)
                if "txt" in extensions and extensions.intersection(IMAGE_EXTENSIONS):
                    return "pairs"
        except ShardError:
            continue  # reported when it is checked
    return "texts" if "txt" in extensions else "images"


def check_shard(job: Job) -> ShardReport:
    """The problems of one shard. A truncated tar is checked up to its end."""
    name, findings = job.path.name, []
    size = job.path.stat().st_size if job.path.is_file() else None
    if job.entry is not None and size is not None and job.entry.bytes != size:
        what = f"has {size} bytes but {MANIFEST} says {job.entry.bytes}; run python -m data_tools.index again"
        findings.append(Finding(name, "", what))
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    left_out, examples = Counter[str](), dict[str, str]()
    whole = True
    try:
        for key, extension, member, reason in shard_parts(job.path):
            if reason:
                examples.setdefault(count(left_out, reason), member.name)
                continue
            if extension in samples.setdefault(key, {}):
                repeat = Finding(name, _printable(key), f".{extension} occurs more than once; the last one is used")
                findings += [] if repeat in findings[-len(EXTENSIONS) :] else [repeat]
            samples[key][extension] = member.offset, member.size
    except ShardError as error:
        findings.append(Finding(name, "", str(error).removeprefix(f"{job.path} ")))
        whole = False
        if samples:
            samples.popitem()  # its other members may be missing
    if whole:
        findings += _index_findings(job, len(samples))
    findings += [
        Finding(name, "", f"leaves out {line} (such as {_printable(examples[reason])})")
        for reason, line in in_words(left_out).items()
    ]
    if not samples:
        return ShardReport(findings, 0)
    if job.kind == "pairs" and (apart := _keys_apart(samples)):
        differ = " and ".join(map(_printable, apart))
        findings.append(
            Finding(name, "", f"has no sample with both picture and text, which need one key: {differ} differ")
        )
        job = job._replace(kind="auto")  # instead of the same for each sample
    with open(job.path, "rb") as file:
        for key, members in samples.items():
            findings += [Finding(name, _printable(key), what) for what in _sample_findings(file, members, job)]
    return ShardReport(findings, len(samples))


def _keys_apart(samples: dict[str, dict[str, tuple[int, int]]]) -> tuple[str, str] | None:
    """The keys of a picture and of a text, if no sample of the shard has both."""
    picture = next((key for key, members in samples.items() if members.keys() & set(IMAGE_EXTENSIONS)), None)
    text = next((key for key, members in samples.items() if "txt" in members), None)
    both = any("txt" in members and members.keys() & set(IMAGE_EXTENSIONS) for members in samples.values())
    return None if picture is None or text is None or both else (picture, text)


def _index_findings(job: Job, samples: int) -> Iterator[Finding]:
    name = job.path.name
    if samples == 0:
        yield Finding(name, "", "contains no sample")
    if job.entry is not None:
        if job.entry.samples != samples:
            yield Finding(name, "", f"has {samples} samples but {MANIFEST} says {job.entry.samples}; index again")
        index = job.path.with_suffix(".idx")
        right, sha256 = with_checksums(job.path, index_shard(job.path))
        if not index.is_file():
            yield Finding(name, "", f"has no {index.name}; run python -m data_tools.index again")
        elif index.read_bytes() != (right.data if job.entry.sha256 else right.places):
            yield Finding(name, "", f"{index.name} does not match it; run python -m data_tools.index again")
        if not job.entry.sha256:
            what = f"has no checksums in {MANIFEST} of an earlier version; run python -m data_tools.index again"
            yield Finding(name, "", what)
        elif sha256 != job.entry.sha256:
            what = f"has another content than when {MANIFEST} was written; put it back, or index again if it is right"
            yield Finding(name, "", what)
    if stats_path(job.path).exists():
        try:
            successes = typed(read_json(stats_path(job.path)), "successes", int)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{stats_path(job.path)} ")
            yield Finding(name, "", f"{stats_path(job.path).name} cannot be used: {reason}")
            return
        if successes != samples:
            yield Finding(name, "", f"has {samples} samples but {stats_path(job.path).name} says {successes}")


def _sample_findings(file: BinaryIO, members: dict[str, tuple[int, int]], job: Job) -> Iterator[str]:
    pictures = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if job.kind in ("images", "pairs") and not pictures:
        yield "has no picture"
    if job.kind in ("pairs", "texts") and "txt" not in members:
        yield "has no caption (.txt)"
    if len(pictures) > 1:
        yield f"has {len(pictures)} pictures (.{', .'.join(pictures)})"
    for extension, (offset, size) in members.items():
        limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
        if size == 0:
            yield f".{extension} has 0 bytes"
        elif size > limit:
            yield f".{extension} has {size} bytes; the limit is {limit}"
        elif extension != "json":
            file.seek(offset)
            yield from _content_findings(extension, file.read(size), job.decode)


def _content_findings(extension: str, data: bytes, decode: bool) -> Iterator[str]:
    if extension == "txt":
        try:
            if not data.decode().strip():
                yield ".txt is blank"
        except UnicodeDecodeError as error:
            yield f".txt is not UTF-8 (byte {error.start} of {len(data)})"
        return
    try:
        if decode:
            decode_image(data)
        else:
            read_header(data)
    except BadSample as error:
        yield f".{extension}: {error}"


def _printable(key: str) -> str:
    """The key as printable text on one line."""
    text = key.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return text if text.isprintable() else repr(text)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.verify", __doc__, "data/cc12m --decode --json findings.json")
    add_directories(parser)
    parser.add_argument("--kind", choices=KINDS, default="auto", help="what each sample must contain (%(default)s)")
    parser.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    add_workers(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="no findings were written")


def _run(args: argparse.Namespace) -> int:
    findings: list[dict[str, str]] = []
    shards = samples = 0
    for directory in args.directories:
        report = verify_directory(directory, kind=args.kind, decode=args.decode, workers=args.workers)
        for path in complete_shards(directory)[1]:
            say(f"note: {directory / path.name} is partial (no {stats_path(path).name}) and was not checked")
        for finding in report.findings:
            print("\t".join(map(visible, f"{directory}{os.sep}{finding}".split("\t"))))
            findings.append({"directory": str(directory), **asdict(finding)})
        shards, samples = shards + report.shards, samples + report.samples
    if args.json is not None:
        content = {"shards": shards, "samples": samples, "findings": findings}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"{samples:,} samples in {shards:,} shards: {len(findings):,} findings"
        if findings
        else f"{samples:,} samples in {shards:,} shards: clean"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
