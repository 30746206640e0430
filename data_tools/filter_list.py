"""Filters a list of URLs and captions before anything is downloaded: by scores, size, domain, caption and language.

    python -m data_tools.filter_list --list laion.parquet --preset laion --min-similarity 0.3 --out clean/kept.parquet

writes clean/kept.parquet (the canonical columns), clean/dropped/kept.parquet (row, url, reason, detail) and
clean/steps/filter_list.json (the thresholds, and how many rows each reason dropped). An --out that does not end in
.parquet is a directory of many files. Each row counts once, under the first filter that drops it, in this order:

    bad_row empty_url long_url long_caption not_utf8 nul_byte           what no list may hold, always
    empty_caption bad_url caption_too_long                              always
    low_similarity unsafe watermark too_small extreme_aspect            with their thresholds
    blocked_domain                                                      with a file of domains
    caption_is_url caption_is_filename caption_without_letters ...      unless --keep-junk-captions (caption_rules)
    caption_too_short other_language duplicate_url                      where asked for

Of equal URLs the first that no other filter drops is kept. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from data_tools.lists.filters import Filter, ListSettings, chosen, shown
from data_tools.lists.parts import SCHEMA, Judged, dropped_path, home, owned_parts, work_path
from data_tools.lists.reading import EXTRA, PRESETS, REASONS, List, fingerprint, open_list
from data_tools.lists.url_set import UrlSet
from data_tools.shards.step_table import step_table
from data_tools.shards.steps import Step, read_steps, write_step
from pretrain.command import make_parser, run

STEP = "filter_list"
DUPLICATE = "duplicate_url"
# Those options that are ListSettings as they stand.
PLAIN_OPTIONS = sorted({field.name for field in fields(ListSettings)} - {"language", "blocked_domains"})
BATCH = 16_384  # rows at a time; more are hardly faster, and captions may be of megabytes
PART = 4_194_304  # rows between two points that a killed run can go on from


def judge(batch: pa.RecordBatch, filters: list[Filter]) -> Judged:
    """Each filter sees the rows that those before it left."""
    dropped, counts = [], Counter[str]()
    for each in filters:
        mask = each.drops(batch)
        if mask.any():
            gone, batch = batch.filter(pa.array(mask)), batch.filter(pa.array(~mask))
            dropped.append(_dropped(gone, each.name, each.tells(gone)))
            counts[each.name] += len(gone)
    return Judged(batch, dropped, counts)


def filter_list(
    rows: List,
    settings: ListSettings,
    out: Path,
    inputs: list[str],
    *,
    read_as: Mapping[str, str] | None = None,
    overwrite: bool = False,
    part: int = PART,
) -> tuple[Step, bool]:
    """-> (the record of the step, False if `out` was complete already). `inputs` are the files of the list, `read_as`
    the names of its columns that were given. Raises ValueError for a column that is missing, or an `out` that holds
    something else (and not `overwrite`)."""
    filters = chosen(settings, rows.columns)
    order = [each.name for each in filters] + [DUPLICATE] * settings.unique_urls
    read = {"preset": rows.preset, **(read_as or {})}
    used = {"out": out.name, "list": fingerprint(inputs), **read, "filters": order, **_told(settings)}
    if (done := _done(out, used, overwrite=overwrite)) is not None:
        return done, False
    with owned_parts(out, {**used, "part": part}, overwrite=overwrite) as parts:
        counts = parts.done()
        total = math.ceil(rows.rows / part)
        seen = UrlSet() if settings.unique_urls else None
        if seen is not None and len(counts) < total:
            for urls in (urls for number in range(len(counts)) for urls in parts.urls(number)):
                seen.add(urls)
        skip = sum(each["rows"] for each in counts)
        with tqdm(total=rows.rows, initial=skip, desc=f"filtering to {out.name}", unit=" rows", disable=None) as bar:
            for number in range(len(counts), total):
                judged = _judged(_taken(rows, number * part, (number + 1) * part), filters)
                counts.append(parts.write(number, _watched(judged, seen, bar), schema_of(rows.columns)))
        totals = sum(counts, Counter[str]())
        dropped = {name: totals[name] for name in (*REASONS, *order) if totals[name]}
        parts.publish(len(counts))
        step = Step(STEP, totals["rows"], totals["kept"], dropped, used, inputs, unit="rows")
        write_step(home(out), STEP, step)
        parts.remove()
    return step, True


def schema_of(columns: Sequence[str]) -> pa.Schema:
    """Of the batches of a list."""
    kinds = {"row": pa.int64(), "url": pa.string(), "caption": pa.string(), **EXTRA}
    return pa.schema([(name, kinds[name]) for name in columns])


def _taken(rows: List, first: int, stop: int) -> Iterator[tuple[pa.RecordBatch, Judged]]:
    """(batch, what the list itself refused of its rows)."""
    for batch, refused in rows.judged(BATCH, first, stop):
        blank = pa.array([""] * len(refused))
        lines = pa.RecordBatch.from_arrays([refused["row"], blank, refused["reason"], blank], schema=SCHEMA)
        yield batch, Judged(batch.slice(0, 0), [lines], Counter(refused["reason"].to_pylist()))


def _judged(taken: Iterable[tuple[pa.RecordBatch, Judged]], filters: list[Filter]) -> Iterator[Judged]:
    """`judge` in the order of the batches, in threads: the kernels of pyarrow let go of Python's lock."""
    threads = min(4, os.cpu_count() or 1)
    waiting: deque[tuple[Judged, Future[Judged]]] = deque()

    def next_one() -> Judged:
        refused, future = waiting.popleft()
        kept, dropped, counts = future.result()
        return Judged(kept, refused.dropped + dropped, refused.counts + counts)

    with ThreadPoolExecutor(threads) as pool:
        for batch, refused in taken:
            waiting.append((refused, pool.submit(judge, batch, filters)))
            if len(waiting) > threads:
                yield next_one()
        while waiting:
            yield next_one()


def _watched(judged: Iterable[Judged], seen: UrlSet | None, bar: tqdm) -> Iterator[Judged]:
    """Without the URLs that were there before, which only one thread in the order of the list can tell."""
    for kept, dropped, counts in judged:
        rows = len(kept) + counts.total()
        if seen is not None:
            again = seen.add(kept["url"])
            if again.any():
                gone, kept = kept.filter(pa.array(again)), kept.filter(pa.array(~again))
                dropped.append(_dropped(gone, DUPLICATE, shown(gone, ("caption",))))
                counts[DUPLICATE] += len(gone)
        yield Judged(kept, dropped, counts)
        bar.update(rows)


def _dropped(gone: pa.RecordBatch, reason: str, details: list[str]) -> pa.RecordBatch:
    texts = (shown(gone, ("url",)), [reason] * len(gone), details)
    return pa.RecordBatch.from_arrays([gone["row"], *(pa.array(text, pa.string()) for text in texts)], schema=SCHEMA)


def _done(out: Path, used: dict[str, Any], *, overwrite: bool) -> Step | None:
    """The record of what stands at `out`, if it is what is asked for."""
    step = read_steps(home(out)).get(STEP)
    if overwrite or work_path(out).exists() or (step is None and not out.exists()):
        return None
    if step is not None and step.settings.get("out") != out.name:
        raise ValueError(
            f"{home(out)} holds the record of another list, {step.settings.get('out')}; give each its own directory"
        )
    if not out.exists():
        return None
    if step is None or step.settings != used:
        raise ValueError(f"{out} holds another list or other thresholds; choose another --out, or --overwrite")
    return step


def _told(settings: ListSettings) -> dict[str, Any]:
    """The thresholds that are in use, for the record; of a long list of domains its number and hash."""
    told = {name: value for name, value in asdict(settings).items() if value not in (None, (), False)}
    if domains := told.get("blocked_domains"):
        digest = hashlib.sha256("\n".join(sorted(domains)).encode()).hexdigest()
        told["blocked_domains"] = {"domains": len(domains), "sha256": digest}
    if languages := told.get("language"):
        told["language"] = list(languages)
    return told


def read_domains(path: Path) -> tuple[str, ...]:
    """One domain per line, in lower case; # begins a comment. Raises ValueError for a line that is no domain."""
    domains = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        domain = line.partition("#")[0].strip().lower().removeprefix("*.").strip(".")
        if not domain:
            continue
        if any(c in domain for c in "/:@? \t"):
            raise ValueError(f"line {number} of {path} is no domain ({domain[:80]!r}); write example.com, one per line")
        domains.append(domain)
    if not domains:
        raise ValueError(f"{path} names no domain; write one per line, or leave --blocked-domains out")
    return tuple(sorted(set(domains)))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        "data_tools.filter_list",
        __doc__,
        "--list laion.parquet --preset laion --min-similarity 0.3 "
        "--max-punsafe 0.1 --max-pwatermark 0.8 --min-side 200 --max-aspect 3 --unique-urls --out clean/kept.parquet",
    )
    add = parser.add_argument
    add("--list", nargs="+", type=Path, required=True, metavar="FILE", help="parquet, TSV, ... or a directory of them")
    presets = ", ".join(PRESETS)
    add("--preset", required=True, metavar="NAME", help=f"what the list looks like: {presets}")
    add("--url-col", metavar="NAME", help="the column of the URLs, where no preset fits")
    add("--caption-col", metavar="NAME", help="the column of the captions, where no preset fits")
    add("--out", type=Path, required=True, help="FILE.parquet, or a directory for many files")
    add("--min-similarity", type=float, metavar="COSINE", help="of picture and caption, as the list says")
    add("--max-punsafe", type=float, metavar="P", help="probability that a picture is unsafe, as the list says")
    add("--max-pwatermark", type=float, metavar="P", help="probability of a watermark, as the list says")
    add("--min-side", type=int, metavar="PIXELS", help="of the shorter side, as the list says")
    add("--max-aspect", type=float, metavar="RATIO", help="of the longer side to the shorter, as the list says")
    add("--min-caption-words", type=int, metavar="N", help="fewer words are dropped")
    add("--min-caption-chars", type=int, metavar="N", help="fewer characters are dropped")
    add("--max-caption-chars", type=int, metavar="N", default=ListSettings.max_caption_chars, help="(%(default)s)")
    add("--keep-junk-captions", action="store_true", help="keep file names, addresses, boilerplate, template code, ...")
    add("--language", default="", metavar="en,de", help="by the list's column, else by py3langid (about 40,000 rows/s)")
    add("--blocked-domains", type=Path, metavar="FILE", help="a domain per line; what is below it is blocked too")
    add("--unique-urls", action="store_true", help="each URL once (16 bytes of memory for each that is kept)")
    add("--overwrite", action="store_true", help="replace what stands at --out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), left="what was filtered is kept, the same command goes on from there")


def _run(args: argparse.Namespace) -> None:
    settings = ListSettings(
        **{name: getattr(args, name) for name in PLAIN_OPTIONS},
        language=tuple(code.strip() for code in args.language.split(",") if code.strip()),
        blocked_domains=() if args.blocked_domains is None else read_domains(args.blocked_domains),
    )
    rows = open_list(args.list, args.preset, args.url_col, args.caption_col)
    read_as = {name: value for name in ("url_col", "caption_col") if (value := getattr(args, name))}
    inputs = [str(path) for path in args.list]
    step, new = filter_list(rows, settings, args.out, inputs, read_as=read_as, overwrite=args.overwrite)
    print(step_table(step))
    print(f"{args.out}: {'written' if new else 'complete already'}; the rest is listed in {dropped_path(args.out)}")


if __name__ == "__main__":
    sys.exit(main())
