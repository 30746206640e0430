"""Packs documents into shards of text chunks for the language stage: cleaned, without duplicates, by a token budget.

Documents are read in the order of INPUT (directories by name): .txt, .jsonl (both also .gz, .bz2, .xz, .zst), .parquet.
A document is cleaned, dropped for a reason that is counted and listed, or cut at the ends of sentences into chunks of
at most --chunk-tokens ids with BOS and EOS, which training takes whole: TextShards("OUT", text_len=196). A chunk holds
text of one document. Of duplicates the first stays. Shards keep the order of the input: training shuffles by itself.

    OUT/00000.tar       KEY.txt and KEY.json (source, document, chunk, tokens); .parquet and _stats.json beside it
    OUT/steps/          pack_text.json, pack_text_chunks.json: kept + dropped by reason = rows, and all settings;
                        pack_text_dropped.parquet: every dropped document, why, and what it repeats
    OUT/manifest.json   what training reads

OUT appears at the end, whole. Until then the work lies in .OUT.packing beside it: the shards, three times their text,
and about half of the input's text more. After a crash or kill -9 the same command goes on from there. The shards are
the same for any number of --workers.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from data_tools.text.clean import TextRules
from data_tools.text.packing import Packed, Packing, pack, too_long_hint
from pretrain.command import add_workers, make_parser, run

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RULES = ", ".join(f"{name}={value:g}" for name, value in asdict(TextRules()).items())


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args), left="what was worked on is kept, the same command goes on from there")


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
    packed = pack(packing, args.workers)
    print(table(packed, packing))


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
        help="the recipe's: beit3.spm, or one that data_tools.train_text_tokenizer made of captions",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new directory for the shards")
    parser.add_argument(
        "--text-col", default="text", metavar="NAME", help="of parquet, and the name in JSONL (%(default)s)"
    )
    parser.add_argument(
        "--txt",
        choices=("file", "blank"),
        default="file",
        help="a .txt file is one document, or documents stand between blank lines (%(default)s)",
    )
    _add_choices(parser)
    add_workers(parser)
    return parser.parse_args(argv)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Which documents are good, and how they are cut and shared out."""
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=196,
        metavar="N",
        help="with BOS and EOS: the source's text_len (%(default)s)",
    )
    parser.add_argument(
        "--budget",
        metavar="TOKENS",
        help="such as 3B or 500M: stop before the first chunk that would take the sum of the chunks' tokens, BOS and "
        "EOS not counted, over it (all)",
    )
    parser.add_argument(
        "--language", metavar="CODE", help="keep documents in this language, such as en, by py3langid (any)"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="drop what shares this much of its runs of five words (Jaccard, by MinHash) with an earlier document; 1: "
        "exact duplicates alone. 2.2 GiB of memory per million documents at 0.8, 145 MiB at 1 (%(default)s)",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"change a bound on good documents, or turn it off by NAME=off; may be repeated. Gopher's: {_RULES}",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="chunks in a tar (%(default)s)"
    )
    parser.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="a random order of the files, so that a budget takes of all (that of INPUT)",
    )


def parse_budget(text: str) -> int:
    """ "3B", "2.5M", "1e9", "5000" -> tokens. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip().replace("_", ""), re.IGNORECASE)
    budget = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if budget < 1:
        raise ValueError(f"--budget={text} is no number of tokens above 0; use one such as 3B, 500M or 1e9")
    return budget


def parse_rules(changes: list[str]) -> TextRules:
    """NAME=VALUE or NAME=off, upon the standard ones. Raises ValueError naming the rules there are."""
    names = {field.name for field in fields(TextRules)}
    rules = TextRules()
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise ValueError(f"--rule {change}: there is no rule {name!r}; the rules are {', '.join(sorted(names))}")
        try:
            bound = None if value == "off" else float(value)
        except ValueError:
            raise ValueError(f"--rule {change}: {value!r} is no number; use {name}=VALUE or {name}=off") from None
        if bound is not None and not 0 <= bound < float("inf"):
            raise ValueError(f"--rule {change}: {value} is no bound; use a number of 0 or more, or {name}=off")
        rules = replace(rules, **{name: bound})
    return rules


def table(packed: Packed, packing: Packing) -> str:
    """What became of the documents, for people."""
    documents, chunks = packed.documents, packed.chunks
    counts = {"documents read": documents.rows, "kept": documents.kept}
    counts |= {f"dropped: {reason}": n for reason, n in sorted(documents.dropped.items(), key=lambda item: -item[1])}
    width, share = max(map(len, counts)), max(documents.rows, 1) / 100
    lines = [f"{name:<{width}} {count:>13,} {count / share:>6.1f} %" for name, count in counts.items()]
    lines.append(
        f"{packing.out}: {chunks.kept:,} chunks in {packed.shards} shards, {packed.tokens:,} tokens, chunks "
        f"{100 * packed.fill:.1f} % full"
    )
    if packed.at_budget:
        lines.append("the budget is reached; the rest of the input was not used")
    if hint := too_long_hint(documents.dropped, packing, packed.kinds):
        lines.append(f"note: {hint}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
