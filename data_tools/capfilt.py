"""Shards -> shards whose captions a captioner and a filter made better: BLIP's CapFilt (arXiv 2201.12086, 3.3).

    python -m data_tools.capfilt data/cc12m --captioner runs/captioner --filter runs/blip/fusion --out data/cc12m-cf

The captioner, weights with a head of words such as a stage with Captioning(), writes a text for each picture, drawn
from the best words of --top-p. The filter, weights with the head of Matching(), says of the web's texts and of that
one how likely they belong to the picture, and only those of at least --min-web and --min-written stay. Both may be the
same weights. A sample's `captions` in its JSON (for the source CaptionShards) are what stayed, the web's first, its txt
is the first of them, and `capfilt` has each text with its probability; a sample without a text that stayed is dropped.

Finished shards stay: after a kill, run the same command to continue, and the bytes are those of a run without one.
Several processes, on GPUs of their own, share the shards with --part 0/8, 1/8, ... Whichever comes last writes the
index, steps/capfilt.json beside the input's records, and report.json: how many texts of each origin stayed, and why
the others did not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.pictures.caption_shard import Settings, caption_shard, counts_path
from data_tools.shards.steps import Drop, Step, carry_steps, free_name, write_drops, write_step
from pretrain.command import add_workers, make_parser, part_of, run
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.manifest import MANIFEST
from pretrain.files import WRITING, sweep, write_json
from pretrain.json_files import read_object
from pretrain.lock import Lock
from pretrain.models.generation import Writing
from pretrain.portions import Shards, agree, weights_name
from pretrain.pretrained import Pretrained, load
from pretrain.visible import say

STAMP, REPORT, STEP = "capfilt.json", "report.json", "capfilt"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    example = "data/cc12m --captioner runs/captioner --filter runs/blip/fusion --out data/cc12m-cf"
    parser = make_parser("data_tools.capfilt", __doc__, example)
    parser.add_argument("input", type=Path, help="a directory of indexed shards")
    parser.add_argument("--captioner", type=Path, required=True, help="weights for pretrain.load, with a head of words")
    parser.add_argument("--filter", type=Path, required=True, help="weights for pretrain.load, with Matching()'s head")
    parser.add_argument("--out", type=Path, required=True, help="a new directory of shards")
    parser.add_argument("--min-web", type=float, default=0.5, metavar="P", help="of the web's texts (%(default)s)")
    parser.add_argument("--min-written", type=float, default=0.5, metavar="P", help="of written texts (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="P", help="0: the most likely words (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of what is drawn (%(default)s)")
    parser.add_argument("--max-words", type=int, default=20, metavar="N", help="ids of a text, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures in one pass (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th shard from the I-th on (%(default)s)")
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: capfilt(args), state="finished shards stay; run the same command to continue")


def capfilt(args: argparse.Namespace) -> None:
    """ValueError for wrong arguments or weights, and where --out holds something else."""
    part, parts = part_of(args.part)
    settings = _settings(args)
    if not (args.input / MANIFEST).is_file():
        raise ValueError(
            f"{args.input} has no {MANIFEST}; index its shards first: python -m data_tools.index {args.input}"
        )
    if args.out.resolve() == args.input.resolve():
        raise ValueError(f"--out {args.out} is the input; choose a new directory")
    source = Shards(args.input)
    request = _request(args, settings, source)
    new, existing = not (args.out / STAMP).is_file(), args.out.iterdir() if args.out.is_dir() else ()
    if new and any(not path.name.endswith(WRITING) for path in existing):
        raise ValueError(f"{args.out} contains other files; choose an empty directory for --out")
    if not new:
        agree(args.out, STAMP, request)
    numbers = range(len(source.portions))
    todo = [number for number in numbers[part::parts] if not counts_path(args.out, number).is_file()]
    models = _models(args) if todo else None
    if new:  # after the weights were read: wrong ones leave nothing behind
        agree(args.out, STAMP, request)
    for number in todo:
        assert models is not None
        caption_shard(*models, source.reader, number, args.out, settings, args.workers)
    done = sum(counts_path(args.out, number).is_file() for number in numbers)
    if done < len(numbers):
        say(f"{args.out}: {done} of {len(numbers)} shards are finished; the others belong to other --part")
        return
    try:
        lock = Lock(args.out / ".capfilt")
    except ValueError:  # another part came last too, and has all that it needs
        say(f"{args.out}: all {done} shards are finished; another process writes the index")
        return
    with lock:
        _finish(args, settings, source)


def _settings(args: argparse.Namespace) -> Settings:
    for name in ("min_web", "min_written"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is no probability; use 0 to 1, such as 0.5")
    for name in ("batch", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is below 1; use 1 or more")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; use 0 or more")
    writing = Writing(1, 1.0, args.top_p, args.temperature, args.max_words)
    return Settings(writing, args.min_web, args.min_written, args.seed, args.batch)


def _request(args: argparse.Namespace, settings: Settings, source: Shards) -> dict[str, Any]:
    """What decides the results: all processes that write to --out must agree on it."""
    weights = {}
    for name in ("captioner", "filter"):
        path = getattr(args, name)
        if not path.exists():
            raise ValueError(f"--{name} {path} does not exist; give a stage's directory or a weights.safetensors")
        weights[name] = weights_name(path)
    return {"input": str(args.input.resolve()), "digest": source.digest, "bf16": args.bf16} | asdict(settings) | weights


def _models(args: argparse.Namespace) -> tuple[Pretrained, Pretrained]:
    import torch

    options: Any = {"text_tokenizer": args.text_tokenizer, "dtype": torch.bfloat16 if args.bf16 else torch.float32}
    captioner = load(args.captioner, **options)
    judge = captioner if args.filter.resolve() == args.captioner.resolve() else load(args.filter, **options)
    try:
        captioner.next_word_head(captioner.tokenizer())
    except ValueError as error:
        raise ValueError(f"--captioner {args.captioner}: {error}") from None
    if "matching" not in judge.task.objectives:
        raise ValueError(f"--filter {args.filter} has no head of matching; give the weights of a stage with Matching()")
    try:
        judge.tokenizer()
    except ValueError as error:
        raise ValueError(f"--filter {args.filter}: {error}") from None
    return captioner, judge


def _finish(args: argparse.Namespace, settings: Settings, source: Shards) -> None:
    """The index, the step's record, the list of what was dropped, and the report, from the counts of all shards."""
    shards = [read_object(counts_path(args.out, number)) for number in range(len(source.portions))]
    rows, kept = (sum(shard[name] for shard in shards) for name in ("samples", "kept"))
    if not kept:
        raise ValueError(
            f"no text of the {rows} samples of {args.input} stayed; use a better filter, or lower --min-web and "
            "--min-written"
        )
    texts: dict[str, dict[str, int]] = {}
    for shard in shards:
        for origin, counts in shard["texts"].items():
            own = texts.setdefault(origin, {})
            for reason, count in counts.items():
                own[reason] = own.get(reason, 0) + count
    drops = (Drop(*drop) for shard in shards for drop in shard["drops"])
    dropped = write_drops(args.out / "steps" / f"{STEP}.parquet", drops)
    sweep(args.out)
    index_directory(args.out)
    noted = asdict(settings) | {"captioner": str(args.captioner), "filter": str(args.filter), "texts": texts}
    name = free_name(carry_steps([args.input], args.out), STEP)
    write_step(args.out, name, Step("capfilt", rows, kept, dict(dropped), noted, [str(args.input)]))
    write_json(args.out / REPORT, {"samples": rows, "kept": kept, "dropped": dict(dropped), "texts": texts})
    words = "; ".join(f"{origin}: {', '.join(f'{count} {reason}' for reason, count in sorted(counts.items()))}"
                      for origin, counts in sorted(texts.items()))  # fmt: skip
    say(f"{args.out}: {kept:,} of {rows:,} samples in {sum(shard['kept'] > 0 for shard in shards):,} shards; {words}")


if __name__ == "__main__":
    sys.exit(main())
