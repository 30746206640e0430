"""Packs documents into shards of text chunks for the language stage: cleaned, deduplicated, up to a token budget.

Reads documents in the order of INPUT (directories by name): .txt, .jsonl (both also .gz, .bz2, .xz, .zst), .parquet.
Each document is cleaned and then either dropped, for a reason that is counted and listed, or split at the ends of
sentences into chunks of at most --chunk-tokens ids including BOS and EOS, which training reads whole:
TextShards("OUT", text_len=196). A chunk has text of one document. Of duplicates the first is kept. The shards have the
order of the input, because training shuffles.

    OUT/00000.tar       KEY.txt and KEY.json (source, document, chunk, tokens); .parquet and _stats.json beside it
    OUT/steps/          pack_text.json, pack_text_chunks.json: kept + dropped by reason = rows, and all settings;
                        pack_text_dropped.parquet: every dropped document, why, and what it repeats
    OUT/manifest.json   what training reads

OUT appears only when it is complete. Until then .OUT.packing beside it needs space for the shards (three times their
text) and about half of the input's text. After a crash or kill -9, run the same command to continue. The shards are the
same for any number of --workers.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from data_tools.text.clean import TextRules
from data_tools.text.packing import Packing, Result, pack, too_long_hint
from pretrain.command import add_workers, make_parser, run

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RULES = ", ".join(f"{name}={value:g}" for name, value in asdict(TextRules()).items())


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args), state="finished blocks are stored; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    packing = Packing(
        paths=tuple(args.inputs),
        tokenizer=args.tokenizer,
        out=args.out,
        column=args.text_col,
        split=args.txt,
        chunk_tokens=args.chunk_tokens,
        budget=None if args.budget is None else parse_budget(args.budget),
        language=args.language,
        near=args.near,
        rules=parse_rules(args.rule),
        samples_per_shard=args.samples_per_shard,
        seed=args.shuffle_seed,
    )
    result = pack(packing, args.workers)
    print(table(result, packing))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "data_tools.pack_text",
        __doc__,
        "wiki/ books/ --tokenizer text.model --language en --budget 3B --out data/texts --workers 16",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files, or directories of them")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FILE",
        help="the recipe's: beit3.spm, or one from data_tools.train_text_tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new directory for the shards")
    parser.add_argument(
        "--text-col", default="text", metavar="NAME", help="the column in parquet, the key in JSONL (%(default)s)"
    )
    parser.add_argument(
        "--txt",
        choices=("file", "blank"),
        default="file",
        help="a .txt file is one document, or has documents separated by blank lines (%(default)s)",
    )
    _add_choices(parser)
    add_workers(parser)
    return parser.parse_args(argv)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """The options that select documents and split them."""
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=196,
        metavar="N",
        help="including BOS and EOS: the source's text_len (%(default)s)",
    )
    parser.add_argument(
        "--budget",
        metavar="TOKENS",
        help="such as 3B or 500M: stop before the first chunk with which all tokens, without BOS and EOS, would "
        "exceed it (all)",
    )
    parser.add_argument(
        "--language", metavar="CODE", help="keep only documents in this language, such as en, by py3langid (any)"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="drop documents that share this much of their five-word runs (Jaccard, MinHash) with an earlier one; 1: "
        "only exact duplicates. 2.2 GiB of memory per million documents at 0.8, 145 MiB at 1 (%(default)s)",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"change a limit for good documents, or turn it off with NAME=off; repeatable. Gopher's: {_RULES}",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="chunks in a tar (%(default)s)"
    )
    parser.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="a random order of the files, so that a budget samples all of them (the order of INPUT)",
    )


def parse_budget(text: str) -> int:
    """ "3B", "2.5M", "1e9", "5000" -> tokens. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip().replace("_", ""), re.IGNORECASE)
    budget = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if budget < 1:
        raise ValueError(f"--budget={text} is not a number of tokens above 0; use one such as 3B, 500M or 1e9")
    return budget


def parse_rules(changes: list[str]) -> TextRules:
    """Applies NAME=VALUE and NAME=off to the default rules. Raises ValueError naming the existing rules."""
    names = {field.name for field in fields(TextRules)}
    rules = TextRules()
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise ValueError(f"--rule {change}: there is no rule {name!r}; the rules are {', '.join(sorted(names))}")
        try:
            bound = None if value == "off" else float(value)
        except ValueError:
            raise ValueError(f"--rule {change}: {value!r} is not a number; use {name}=VALUE or {name}=off") from None
        if bound is not None and not 0 <= bound < float("inf"):
            raise ValueError(f"--rule {change}: {value} is not a valid limit; use a number of 0 or more, or {name}=off")
        rules = replace(rules, **{name: bound})
    return rules


def table(result: Result, packing: Packing) -> str:
    """The outcome of the documents, as lines for a terminal."""
    documents, chunks = result.documents, result.chunks
    counts = {"documents read": documents.rows, "kept": documents.kept}
    counts |= {f"dropped: {reason}": n for reason, n in sorted(documents.dropped.items(), key=lambda item: -item[1])}
    width, share = max(map(len, counts)), max(documents.rows, 1) / 100
    lines = [f"{name:<{width}} {count:>13,} {count / share:>6.1f} %" for name, count in counts.items()]
    lines.append(
        f"{packing.out}: {chunks.kept:,} chunks in {result.shards} shards, {result.tokens:,} tokens, chunks "
        f"{100 * result.fill:.1f} % full"
    )
    if result.at_budget:
        lines.append("the budget is exhausted; the rest of the input was not used")
    if hint := too_long_hint(documents.dropped, packing, result.kinds):
        lines.append(f"note: {hint}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
