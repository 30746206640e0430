"""The answers that a model of visual questions may give: those that people gave often, as a list.

    python -m data_tools.answers data/vqa/train data/vqa/val --least 9 --out data/vqa/answers.json

Counts, in shards of questions (data_tools.from_table makes them of VQAv2's files), how many questions each answer
belongs to, after VQA's official normalisation. A question's answer is the one that its annotation names, or else the
most frequent of its ten. Over VQAv2's training and validation questions, the answers with at least 9 are the choice of
unilm's beit3/datasets.py, which has 3129. QuestionShards(vocabulary=...) reads the list; for released weights give it
unilm's answer2label.txt, whose numbers they were trained with.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from pretrain.command import add_directories, make_parser, run
from pretrain.data.answers import normalised
from pretrain.data.labelled import metadata
from pretrain.data.shards.manifest import load_manifest
from pretrain.data.shards.reader import BadSample, ShardReader
from pretrain.files import write_json


def count(directories: list[Path]) -> tuple[Counter[str], int]:
    """-> how many questions each answer belongs to, and how many questions there are."""
    counts, questions = Counter[str](), 0
    for directory in directories:
        reader = ShardReader(load_manifest(str(directory)))
        places = [(shard, n) for shard, samples in enumerate(reader.manifest.counts) for n in range(samples)]
        for shard, number in tqdm(places, desc=str(directory), unit=" questions", disable=None):
            try:
                content = metadata(reader.read(shard, number, ("json",)))
            except BadSample:
                continue
            given, answer = content.get("answers"), content.get("answer")
            if not isinstance(answer, str) and isinstance(given, list):
                answer = next((text for text, _ in Counter(map(str, given)).most_common(1)), None)
            if isinstance(answer, str):
                questions += 1
                counts[normalised(answer)] += 1
    return counts, questions


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.answers", __doc__, "data/vqa/train data/vqa/val --out data/vqa/answers.json")
    add_directories(parser)
    parser.add_argument("--least", type=int, default=9, metavar="N", help="questions with that answer (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the list, as JSON")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="nothing was written")


def _run(args: argparse.Namespace) -> None:
    if args.least < 1:
        raise ValueError(f"--least {args.least} is below 1; use 9")
    counts, questions = count(args.directories)
    # The most frequent first; equally frequent ones in the order of the alphabet.
    kept = sorted((answer for answer, n in counts.items() if n >= args.least and answer), key=lambda a: (-counts[a], a))
    if not kept:
        places = ", ".join(map(str, args.directories))
        raise ValueError(
            f"no answer of the {questions} questions in {places} belongs to --least={args.least} of them; lower it"
        )
    write_json(args.out, kept)
    covered = sum(counts[answer] for answer in kept)
    print(f"{args.out}: {len(kept)} answers, which {100 * covered / questions:.1f} % of {questions:,} questions have")


if __name__ == "__main__":
    sys.exit(main())
