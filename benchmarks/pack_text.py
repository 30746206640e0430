"""The cost of packing text: MB/s and documents/s of the whole command, memory, and its recall of planted duplicates.

python -m benchmarks.pack_text --megabytes 200 --workers 2 --out benchmarks/results/pack_text.json
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import sentencepiece

from benchmarks.record import machine, peak_bytes
from data_tools.shards.steps import read_drops, read_steps
from data_tools.text.chunks import cut, limits_of
from data_tools.text.clean import TextRules, clean, why_dropped
from data_tools.text.duplicates import RUN, comparable, signature
from pretrain.command import about, make_parser, run, write
from pretrain.data.text_tokenizer import TextTokenizer

SIMILARITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.5)  # of planted near duplicates: Jaccard of their runs of five words
PLANTED_EVERY = 20  # documents: one exact or near duplicate
NEAR = 0.8
CHUNK_TOKENS = 196


class Corpus:
    """Documents of invented words with the frequencies of real ones (Zipf), like prose, but without repetitions except
    the planted ones."""

    def __init__(self, seed: int, words: int = 50_000):
        rng = random.Random(seed)
        syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "or")]
        invented = ("".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4)))) for _ in range(words))
        self._words = ["the", "of", "and", "to", "that", *dict.fromkeys(invented)]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(len(self._words))))
        self._rng = rng

    def words(self, count: int) -> list[str]:
        return self._rng.choices(self._words, cum_weights=self._weights, k=count)

    def document(self) -> list[str]:
        return self.words(int(min(self._rng.lognormvariate(6, 0.8), 20_000)) + 100)

    def near(self, words: list[str], similarity: float) -> list[str]:
        """A copy with a stretch of other words, whose length gives this similarity of the runs: with n runs each and s
        in common it is s / (2n - s)."""
        runs = len(words) - RUN + 1
        lost = round(runs * (1 - similarity) / (1 + similarity))
        stretch = max(1, lost - RUN + 1)
        start = self._rng.randrange(RUN, len(words) - stretch - RUN)
        return [*words[:start], *self.words(stretch), *words[start + stretch :]]


def as_text(words: list[str]) -> str:
    """Sentences of twelve words, paragraphs of six sentences."""
    sentences = [" ".join(words[i : i + 12]).capitalize() + "." for i in range(0, len(words), 12)]
    return "\n\n".join(" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6))


def write_corpus(path: Path, megabytes: float, seed: int) -> dict[int, float]:
    """Writes JSONL. -> the planted duplicates' numbers and similarities (1 for an exact one)."""
    corpus, planted, sources, size = Corpus(seed), dict[int, float](), list[list[str]](), 0
    rng = random.Random(seed + 1)
    with path.open("w") as file:
        number = 0
        while size < megabytes * 1e6 or not planted:
            if number % PLANTED_EVERY == PLANTED_EVERY - 1:
                planted[number] = rng.choice((1.0, *SIMILARITIES))
                # Each original has only one copy: of several the nearest would be random.
                words = sources.pop(rng.randrange(len(sources)))
                if planted[number] < 1:
                    words = corpus.near(words, planted[number])
            else:
                words = corpus.document()
                sources.append(words)
                if len(sources) > 1000:  # copies come up to some thousands of documents after their originals
                    sources.pop(0)
            size += file.write(json.dumps({"text": as_text(words)}) + "\n")
            number += 1
    return planted


def train_tokenizer(path: Path, seed: int) -> None:
    corpus, model = Corpus(seed), io.BytesIO()
    lines = (" ".join(corpus.words(30)) for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines, model_writer=model, vocab_size=8000, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(model.getvalue())


def time_pack(directory: Path, workers: int) -> float:
    """Seconds of the whole command, including its start."""
    out = Path(tempfile.mkdtemp(dir=directory)) / "texts"
    line = [sys.executable, "-m", "data_tools.pack_text", str(directory / "corpus.jsonl"), "--out", str(out)]
    line += ["--tokenizer", str(directory / "text.model"), "--workers", str(workers), "--near", str(NEAR)]
    start = time.perf_counter()
    done = subprocess.run([*line, "--chunk-tokens", str(CHUNK_TOKENS)], check=False, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"pack_text failed with status {done.returncode}; see its message above")
    (directory / "last").unlink(missing_ok=True)
    (directory / "last").symlink_to(out)
    return seconds


def recall(directory: Path, planted: dict[int, float]) -> dict[str, float]:
    """The dropped share of the planted documents, for each similarity, and of all others."""
    drops = read_drops([directory / "last" / "steps" / "pack_text_dropped.parquet"])
    dropped = {int(drop.key) for drop in drops if drop.reason in ("duplicate", "near_duplicate")}
    rows = read_steps(directory / "last")["pack_text"].rows
    total, hits = Counter(planted.values()), Counter(planted[number] for number in dropped & planted.keys())
    shares = {f"{similarity:g}": round(hits[similarity] / total[similarity], 4) for similarity in sorted(total)}
    return shares | {"others": round(len(dropped - planted.keys()) / max(rows - len(planted), 1), 6)}


def parts(directory: Path, repeats: int, megabytes: float = 2) -> dict[str, float]:
    """MB/s of each step on one core, without reading and writing; medians."""
    with (directory / "corpus.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file.readlines(int(megabytes * 1e6))]
    tokenizer, limits, size = TextTokenizer(directory / "text.model"), limits_of(CHUNK_TOKENS), sum(map(len, texts))
    steps: dict[str, Callable[[str], object]] = {
        "clean": clean,
        "judge": lambda text: why_dropped(text, TextRules(), english=True),
        "cut": lambda text: cut(text, lambda part: len(tokenizer.pieces(part)), limits),
        "tokenize_only": tokenizer.pieces,
        "minhash": lambda text: signature(comparable(text)),
    }
    speeds = {}
    for name, step in steps.items():
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            for text in texts:
                step(text)
            seconds.append(time.perf_counter() - start)
        speeds[name] = round(size / 1e6 / statistics.median(seconds), 2)
    return speeds


def measure(megabytes: float, workers: int, repeats: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        planted = write_corpus(directory / "corpus.jsonl", megabytes, seed)
        train_tokenizer(directory / "text.model", seed)
        size = (directory / "corpus.jsonl").stat().st_size / 1e6
        seconds = [time_pack(directory, workers) for _ in range(repeats)]
        peak = peak_bytes(resource.getrusage(resource.RUSAGE_CHILDREN)) / 2**20
        steps = read_steps(directory / "last")
        documents, chunks, median = steps["pack_text"], steps["pack_text_chunks"], statistics.median(seconds)
        return {
            "corpus_mb": round(size, 1),
            "documents": documents.rows,
            "kept": documents.kept,
            "seconds": round(median, 2),
            "seconds_of_all": [round(value, 2) for value in seconds],
            "mb_per_s": round(size / median, 2),
            "documents_per_s": round(documents.rows / median, 1),
            "tokens_per_s": round(chunks.settings["tokens"] / median),
            "largest_process_mib": round(peak, 1),
            "fill": chunks.settings["fill"],
            "near": NEAR,
            "recall_by_similarity": recall(directory, planted),
            "parts_mb_per_s": parts(directory, repeats),
        }


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.pack_text", __doc__, "--megabytes 200 --workers 2 --repeats 5")
    parser.add_argument("--megabytes", type=float, default=100, help="of the corpus (%(default)g)")
    parser.add_argument("--workers", type=int, default=1, help="of pack_text (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("megabytes", "workers", "repeats"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name}={getattr(args, name)} is not above 0; use 1 or more")
    setting = {name: value for name, value in vars(args).items() if name != "out"}
    facts = about("benchmarks.pack_text", arguments) | machine("numpy", "sentencepiece", "rensa")
    write({**setting, **measure(**setting), **facts}, args.out)


if __name__ == "__main__":
    sys.exit(main())
