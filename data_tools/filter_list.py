"""Filters a list of URLs and captions before the download: by scores, size, domain, caption and language.

    python -m data_tools.filter_list --list laion.parquet --preset laion --min-similarity 0.3 --out clean/kept.parquet

writes clean/kept.parquet (the canonical columns), clean/dropped/kept.parquet (row, url, reason, detail) and
clean/steps/filter_list.json (the thresholds, and the rows dropped for each reason). An --out that does not end in
.parquet is a directory of many files. A column of captions may have lists of them: the first usable one is the
picture's caption, which the filters judge, and with --captions all the column captions keeps them all; they travel to
the JSON of the picture's sample. Each row counts once, under the first filter that drops it, in this order:

    bad_row empty_url long_url long_caption not_utf8 nul_byte           always: such rows cannot be used
    empty_caption bad_url caption_too_long                              always
    low_similarity unsafe watermark too_small extreme_aspect            with their thresholds
    blocked_domain                                                      with a file of domains
    caption_is_url caption_is_filename caption_without_letters ...      unless --keep-junk-captions (caption_rules)
    caption_too_short other_language duplicate_url                      with their options

Of equal URLs, the first that no other filter drops is kept. After a kill, run the same command to continue.
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

from data_tools.inputs.text_stream import open_text
from data_tools.lists.columns import EXTRA, REASONS
from data_tools.lists.filters import Filter, ListSettings, describe_values, make_filters
from data_tools.lists.parts import SCHEMA, Filtered, dropped_path, home, owned_parts, work_path
from data_tools.lists.reading import CAPTIONS, PRESETS, List, fingerprint, open_list
from data_tools.lists.url_set import UrlSet
from data_tools.shards.step_table import describe_drops, step_table
from data_tools.shards.steps import Step, read_steps, write_step
from pretrain.command import make_parser, run
from pretrain.visible import visible

STEP = "filter_list"
DUPLICATE = "duplicate_url"
# The options that are ListSettings unchanged.
PLAIN_OPTIONS = sorted({field.name for field in fields(ListSettings)} - {"language", "blocked_domains"})
BATCH = 16_384  # rows at a time; more are hardly faster, and captions may have megabytes
PART = 4_194_304  # rows between two checkpoints of a run


def apply_filters(batch: pa.RecordBatch, filters: list[Filter]) -> Filtered:
    """Each filter sees only the rows that passed the filters before it."""
    drops, counts = [], Counter[str]()
    for each in filters:
        mask = each.drops(batch)
        if mask.any():
            bad, batch = batch.filter(pa.array(mask)), batch.filter(pa.array(~mask))
            drops.append(_drop_lines(bad, each.name, each.details(bad)))
            counts[each.name] += len(bad)
    return Filtered(batch, drops, counts)


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
    """-> (the step record, False if `out` was complete already). `inputs` are the files of the list, `read_as` its
    column names from the command line. Raises ValueError for a missing column, or (unless `overwrite`) if `out`
    contains something else."""
    filters = make_filters(settings, rows.columns)
    order = [each.name for each in filters] + [DUPLICATE] * settings.unique_urls
    read = {"preset": rows.preset, **(read_as or {})}
    used = {"out": out.name, "list": fingerprint(inputs), **read, "filters": order, **_settings_in_use(settings)}
    if (done := _done(out, used, overwrite=overwrite)) is not None:
        return done, False
    with owned_parts(out, {**used, "part": part}, overwrite=overwrite) as parts:
        counts = parts.done()
        total = math.ceil(rows.rows / part)
        url_set = UrlSet() if settings.unique_urls else None
        if url_set is not None and len(counts) < total:
            for number in range(len(counts)):
                for urls in parts.urls(number):
                    url_set.add(urls)
        skip = sum(each["rows"] for each in counts)
        with tqdm(
            total=rows.rows, initial=skip, desc=visible(f"filtering to {out.name}"), unit=" rows", disable=None
        ) as bar:
            for number in range(len(counts), total):
                batches = _filter_batches(_read_batches(rows, number * part, (number + 1) * part), filters)
                counts.append(parts.write(number, _drop_duplicates(batches, url_set, bar), schema_of(rows.columns)))
        totals = sum(counts, Counter[str]())
        dropped = {name: totals[name] for name in (*REASONS, *order) if totals[name]}
        parts.publish(len(counts))
        step = Step(STEP, totals["rows"], totals["kept"], dropped, used, inputs, unit="rows")
        write_step(home(out), STEP, step)
        parts.remove()
    return step, True


def schema_of(columns: Sequence[str]) -> pa.Schema:
    """The schema of a list's batches."""
    kinds = {"row": pa.int64(), "url": pa.string(), "caption": pa.string(), CAPTIONS: pa.list_(pa.string()), **EXTRA}
    return pa.schema([(name, kinds[name]) for name in columns])


def _read_batches(rows: List, first: int, stop: int) -> Iterator[tuple[pa.RecordBatch, Filtered]]:
    """(batch, the rows beside it that cannot be used)."""
    for batch, unusable in rows.batches_and_drops(BATCH, first, stop):
        blank = pa.array([""] * len(unusable))
        columns = [unusable["row"], blank, unusable["reason"], unusable["detail"]]
        lines = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        yield batch, Filtered(batch.slice(0, 0), [lines], Counter(unusable["reason"].to_pylist()))


def _filter_batches(batches: Iterable[tuple[pa.RecordBatch, Filtered]], filters: list[Filter]) -> Iterator[Filtered]:
    """`apply_filters` in threads, in the order of the batches: pyarrow's kernels release Python's lock."""
    threads = min(4, os.cpu_count() or 1)
    pending: deque[tuple[Filtered, Future[Filtered]]] = deque()

    def next_batch() -> Filtered:
        unusable, future = pending.popleft()
        rows, drops, counts = future.result()
        return Filtered(rows, unusable.drops + drops, unusable.counts + counts)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch, unusable in batches:
                pending.append((unusable, pool.submit(apply_filters, batch, filters)))
                if len(pending) > threads:
                    yield next_batch()
            while pending:
                yield next_batch()
        finally:  # after an error or Ctrl-C, not those that wait
            pool.shutdown(wait=False, cancel_futures=True)


def _drop_duplicates(batches: Iterable[Filtered], url_set: UrlSet | None, bar: tqdm) -> Iterator[Filtered]:
    """Drops repeated URLs. In one thread and in the order of the list, because the first of equal URLs is kept."""
    for rows, drops, counts in batches:
        total = len(rows) + counts.total()
        if url_set is not None:
            repeats = url_set.add(rows["url"])
            if repeats.any():
                duplicates, rows = rows.filter(pa.array(repeats)), rows.filter(pa.array(~repeats))
                drops.append(_drop_lines(duplicates, DUPLICATE, describe_values(duplicates, ("caption",))))
                counts[DUPLICATE] += len(duplicates)
        yield Filtered(rows, drops, counts)
        bar.update(total)


def _drop_lines(rows: pa.RecordBatch, reason: str, details: list[str]) -> pa.RecordBatch:
    texts = (describe_values(rows, ("url",)), [reason] * len(rows), details)
    return pa.RecordBatch.from_arrays([rows["row"], *(pa.array(text, pa.string()) for text in texts)], schema=SCHEMA)


def _done(out: Path, used: dict[str, Any], *, overwrite: bool) -> Step | None:
    """The step record of a complete `out` with these settings; None if there is work to do."""
    step = read_steps(home(out)).get(STEP)
    if overwrite or work_path(out).exists() or (step is None and not out.exists()):
        return None
    if step is not None and step.settings.get("out") != out.name:
        raise ValueError(
            f"{home(out)} has the step record of another list, {step.settings.get('out')}; give each its own directory"
        )
    if not out.exists():
        return None
    if step is None or step.settings != used:
        raise ValueError(f"{out} was made from another list or thresholds; choose another --out, or --overwrite")
    return step


def _settings_in_use(settings: ListSettings) -> dict[str, Any]:
    """The thresholds in use, for the step record. Of the blocked domains only their number and a hash."""
    in_use = {name: value for name, value in asdict(settings).items() if value not in (None, (), False)}
    if domains := in_use.get("blocked_domains"):
        digest = hashlib.sha256("\n".join(sorted(domains)).encode()).hexdigest()
        in_use["blocked_domains"] = {"domains": len(domains), "sha256": digest}
    if languages := in_use.get("language"):
        in_use["language"] = list(languages)
    return in_use


def read_domains(path: Path) -> tuple[str, ...]:
    """The domains of a file, one per line, in lower case; # begins a comment. Raises ValueError for any other line."""
    domains = []
    with open_text(path) as file:
        lines = file.read().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        domain = line.partition("#")[0].strip().lower().removeprefix("*.").strip(".")
        if not domain:
            continue
        if any(c in domain for c in "/:@? \t"):
            raise ValueError(
                f"line {number} of {path} is not a domain ({domain[:80]!r}); write example.com, one per line"
            )
        domains.append(domain)
    if not domains:
        raise ValueError(f"{path} contains no domain; write one per line, or omit --blocked-domains")
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
    add("--preset", required=True, metavar="NAME", help=f"the kind of list: {presets}")
    add("--url-col", metavar="NAME", help="the column of the URLs, if no preset fits")
    add("--caption-col", metavar="NAME", help="the column of the captions, if no preset fits")
    add(
        "--captions",
        choices=("first", "all"),
        help="of a picture with several: only the first, or all (first)",
    )
    add("--out", type=Path, required=True, help="FILE.parquet, or a directory for many files")
    add("--min-similarity", type=float, metavar="COSINE", help="of picture and caption, by the list's column")
    add("--max-punsafe", type=float, metavar="P", help="probability that a picture is unsafe, by the list's column")
    add("--max-pwatermark", type=float, metavar="P", help="probability of a watermark, by the list's column")
    add("--min-side", type=int, metavar="PIXELS", help="of the shorter side, by the list's columns")
    add("--max-aspect", type=float, metavar="RATIO", help="of the longer side to the shorter, by the list's columns")
    add("--min-caption-words", type=int, metavar="N", help="drop captions with fewer words")
    add("--min-caption-chars", type=int, metavar="N", help="drop captions with fewer characters")
    add(
        "--max-caption-chars",
        type=int,
        metavar="N",
        default=ListSettings.max_caption_chars,
        help="drop longer captions (%(default)s)",
    )
    add("--keep-junk-captions", action="store_true", help="keep file names, addresses, boilerplate, template code, ...")
    add(
        "--language",
        default="",
        metavar="en,de",
        help="by the list's column, otherwise by py3langid (about 40,000 rows/s)",
    )
    add("--blocked-domains", type=Path, metavar="FILE", help="one domain per line; subdomains are blocked too")
    add("--unique-urls", action="store_true", help="drop repeated URLs (16 bytes of memory per URL)")
    add("--overwrite", action="store_true", help="replace an existing --out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), state="finished parts are stored; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    settings = ListSettings(
        **{name: getattr(args, name) for name in PLAIN_OPTIONS},
        language=tuple(code.strip() for code in args.language.split(",") if code.strip()),
        blocked_domains=() if args.blocked_domains is None else read_domains(args.blocked_domains),
    )
    rows = open_list(args.list, args.preset, args.url_col, args.caption_col, args.captions)
    read_as = {name: value for name in ("url_col", "caption_col", "captions") if (value := getattr(args, name))}
    inputs = [str(path) for path in args.list]
    step, new = filter_list(rows, settings, args.out, inputs, read_as=read_as, overwrite=args.overwrite)
    print(step_table(step))
    print(f"{args.out}: {'written' if new else 'complete already'}; {dropped_path(args.out)} lists the dropped rows")
    if not step.kept:
        raise ValueError(
            f"--list={inputs[0]}: all {step.rows:,} rows are dropped ({describe_drops(step.dropped)}); "
            f"{dropped_path(args.out)} says why, so check the columns and the thresholds"
        )


if __name__ == "__main__":
    sys.exit(main())
