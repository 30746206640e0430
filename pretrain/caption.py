"""Pictures -> a caption for each, in JSON lines.

    python -m pretrain.caption runs/base/captioning data/cc12m --out captions/cc12m
    python -m pretrain.caption runs/base/captioning ~/Pictures --out captions/mine --beams 1 --top-p 0.9

The input is a directory of indexed shards, or a folder of pictures (subfolders included). A line of --out has the
`key`, the `caption`, and `file` and `sample` (the portion's name, and the picture's number in it). The weights are
those of a stage with the objective captioning, or of one that learned to fill in hidden words of causal texts about
pictures (BEiT-3's captioning checkpoints); a stage whose words saw the words on both sides writes too, but not well.
Finished files stay: after a kill, run the same command to continue. Several processes share the work with --part 0/8,
1/8, ... Pictures that cannot be decoded are left out, counted and named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pretrain.command import make_parser, run
from pretrain.data.transforms import sample_rng
from pretrain.files import write_file
from pretrain.models.generation import Writing
from pretrain.portions import Folder, Portion, Shards, add_arguments, finish, looks, start
from pretrain.pretrained import Pretrained

ABOUT = "caption.json"


def caption(
    model: Pretrained,
    source: Shards | Folder,
    out: Path,
    portions: Iterable[Portion],
    how: Writing,
    *,
    seed: int,
    batch: int,
    workers: int,
) -> tuple[int, list[str]]:
    """Writes OUT/NAME.jsonl for each portion -> (how many pictures have a caption, [what was left out and why])."""
    done, left_out = 0, list[str]()
    numbers = {portion.name: number for number, portion in enumerate(source.portions)}
    with ThreadPoolExecutor(workers) as threads:
        for portion in portions:
            lines = []
            for good in looks(model, source, portion, batch, threads, left_out):
                # Each picture has draws of its own, so that neither --batch nor --part changes its caption.
                draws = [sample_rng(seed, numbers[portion.name], item.sample).random(how.max_words) for item, _ in good]
                pixels = torch.stack([look for _, look in good])
                texts = model.caption_looks(pixels, how, torch.from_numpy(np.stack(draws)))
                for (item, _), text in zip(good, texts, strict=True):
                    line = {"key": item.key, "caption": text, "file": portion.name, "sample": item.sample}
                    lines.append(json.dumps(line, ensure_ascii=False))
            text = "".join(f"{line}\n" for line in lines)
            write_file(out / f"{portion.name}.jsonl", text.encode("utf-8", "surrogateescape"))
            done += len(lines)
    return done, left_out


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.caption", __doc__, "runs/base/captioning ~/Pictures --out captions/mine")
    add_arguments(parser, 16, "directory of the .jsonl files")
    plain = Writing()
    parser.add_argument("--beams", type=int, help=f"texts that are kept at once ({plain.beams}; with --top-p 1)")
    parser.add_argument("--top-p", type=float, default=0.0, metavar="P", help="draw from the best words of this share")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of what is drawn (%(default)s)")
    parser.add_argument("--length-penalty", type=float, default=plain.length_penalty, metavar="X", help="(%(default)s)")
    parser.add_argument(
        "--max-words", type=int, default=plain.max_words, metavar="N", help="ids of a text (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --top-p (%(default)s)")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished files stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    beams = args.beams if args.beams is not None else (1 if args.top_p else Writing.beams)
    how = Writing(beams, args.length_penalty, args.top_p, args.temperature, args.max_words)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; use 0 or more")
    settings = {"writing": asdict(how), "seed": args.seed}
    job = start(args, ABOUT, ".jsonl", settings, lambda model: model.next_word_head(model.tokenizer()))
    rest = {"seed": args.seed, "batch": args.batch, "workers": args.workers}
    finish(args, job, *caption(job.model, job.source, args.out, job.todo, how, **rest))


if __name__ == "__main__":
    sys.exit(main())
