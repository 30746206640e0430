"""Trains the text tokenizer, a SentencePiece unigram model, on the texts of shards and on files of documents.

    python -m data_tools.train_text_tokenizer data/pairs data/wiki.jsonl.gz --vocab-size 64000 --out data/text.model

The settings are those of XLM-R's model (unigram, nmt_nfkc, no byte fallback, character coverage 0.9995), so that
BEiT-3's id layout applies. The same shards and options give the same file on any machine.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from data_tools.text.documents import Input, find_inputs, kind_of, read_blocks, text_of_document
from pretrain.command import make_parser, run
from pretrain.data.shards.manifest import MANIFEST
from pretrain.data.shards.reader import BadSample, Manifest, ShardReader, load_manifest
from pretrain.data.sources import TEXT, text_of
from pretrain.data.text_tokenizer import OFFSET
from pretrain.files import write_file
from pretrain.workers import worker_pool

# The trainer drops sentences above 4192 bytes, so longer texts are split, at a space if possible.
MAX_CHARACTERS = 1000
# Fixed, not the machine's number of cores, because EM sums in an order that depends on the number of threads.
THREADS = 8
REPORT_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _train_apart(args), state="nothing was written")


def _train_apart(args: argparse.Namespace) -> None:
    """Trains in a process of its own, which can be killed: signals wait until SentencePiece's C++ is done."""
    options = {"column": args.text_col, "model_type": args.model_type, "verbose": args.verbose}
    with worker_pool(1, get_context("spawn")) as pool:
        try:
            pool.submit(train, args.inputs, args.out, args.vocab_size, args.max_texts, **options).result()
        except BrokenProcessPool:
            raise ValueError(
                "the training process was killed, most likely because the memory was full; use a lower --max-texts"
            ) from None
    print(f"{args.out}: {args.vocab_size} pieces, {args.vocab_size + OFFSET + 1} ids with <pad> and <mask>")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "data_tools.train_text_tokenizer",
        __doc__,
        "data/pairs data/wiki.jsonl.gz --vocab-size 64000 --out data/text.model",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="indexed shards (directories, or patterns such as 'cc12m/{00000..00009}.tar') and documents as pack_text "
        "reads them: .txt, .jsonl (also compressed), .parquet, or directories of them",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the model to write, such as data/text.model"
    )
    parser.add_argument(
        "--text-col", default="text", metavar="NAME", help="the column in parquet, the key in .jsonl (%(default)s)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=64000, metavar="N", help="including <unk>, <s>, </s> (%(default)s)"
    )
    parser.add_argument(
        "--model-type",
        choices=("unigram", "bpe"),
        default="unigram",
        help="unigram, as XLM-R and BEiT-3; bpe keeps words whole if there are few, as in quickstart (%(default)s)",
    )
    parser.add_argument(
        "--max-texts",
        type=int,
        metavar="N",
        help="read N texts of the shards, evenly spread, and the first N documents (all)",
    )
    parser.add_argument("--verbose", action="store_true", help="show SentencePiece's own log, one line per EM step")
    return parser.parse_args(argv)


def train(
    inputs: list[str],
    out: Path,
    vocab_size: int,
    max_texts: int | None = None,
    *,
    column: str = "text",
    model_type: str = "unigram",
    verbose: bool = False,
) -> None:
    """Writes `out` atomically. ValueError if the texts do not suffice for that vocabulary; ShardError, OSError."""
    from sentencepiece import SentencePieceTrainer

    if vocab_size < 8:
        raise ValueError(f"--vocab-size={vocab_size} leaves no room for pieces; use 64000")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"--max-texts={max_texts} is below 1; use 10000000, or omit it")
    _check_out(out)
    documents = find_inputs([Path(name) for name in inputs if _holds_documents(Path(name))], column)
    shards = tuple(name for name in inputs if not _holds_documents(Path(name)))
    texts = [sentences(load_manifest(shards), max_texts)] if shards else []
    texts += [document_sentences(documents, max_texts)] if documents else []
    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=chain(*texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc",
            byte_fallback=False,
            num_threads=THREADS,
            minloglevel=0 if verbose else 2,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size, inputs) from None
    write_file(out, model.getvalue())


def _holds_documents(path: Path) -> bool:
    """A file of documents, or a directory that holds no shards (theirs has tables beside them, which are none)."""
    return bool(kind_of(path)) or (path.is_dir() and not (path / MANIFEST).exists() and not any(path.glob("*.tar")))


def _check_out(out: Path) -> None:
    """Checks `out` before the hours of reading. Raises ValueError, OSError."""
    if out.is_dir():
        raise ValueError(f"--out={out} is a directory; give the path of a file, such as {out / 'text.model'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out={out}: {out.parent} is not writable; choose another place")


def sentences(manifest: Manifest, max_texts: int | None) -> Iterator[str]:
    """The shards' texts in pieces of at most MAX_CHARACTERS; bad samples are skipped and counted."""
    reader, bad, texts, last = ShardReader(manifest), 0, 0, time.monotonic()
    most = min(max_texts or manifest.samples, manifest.samples)
    number = -1
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            number += 1
            if number * most % manifest.samples >= most:  # `most` of the samples, at even distances
                continue
            try:
                members = reader.read(shard, sample, (TEXT,))
                if TEXT not in members:  # a picture without text
                    continue
                text = text_of(members)
            except BadSample:
                bad += 1
                continue
            texts += 1
            yield from split_text(text)
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            print(f"read {shard + 1} of {len(manifest.shards)} shards, {texts} texts", file=sys.stderr, flush=True)
    skipped = f", skipped {bad} bad samples" if bad else ""
    print(f"read {texts} texts of {len(manifest.shards)} shards{skipped}", file=sys.stderr, flush=True)


def document_sentences(inputs: list[Input], max_texts: int | None) -> Iterator[str]:
    """The documents' texts in pieces of at most MAX_CHARACTERS; unusable documents are skipped and counted."""
    texts = bad = 0
    for block in read_blocks(inputs):
        for raw in block.documents:
            text, reason = text_of_document(raw, inputs[raw.source])
            if reason:
                bad += 1
                continue
            texts += 1
            yield from split_text(text)
            if texts == max_texts:
                break
        if texts == max_texts:
            break
    skipped = f", skipped {bad} unusable ones" if bad else ""
    print(f"read {texts} documents of {len(inputs)} files{skipped}", file=sys.stderr, flush=True)


def split_text(text: str) -> Iterator[str]:
    """The lines of a text; long lines are split. Lone surrogates, which have no UTF-8, become question marks."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    for line in text.splitlines():
        while len(line) > MAX_CHARACTERS:
            space = line.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS)
            cut = space if space > 0 else MAX_CHARACTERS
            yield line[:cut]
            line = line[cut:].lstrip()
        if line.strip():
            yield line


def _explain(error: RuntimeError, vocab_size: int, inputs: list[str]) -> Exception:
    """SentencePiece's error as one sentence with the way out."""
    text = str(error)
    if most := re.search(r"set it to a value <= (\d+)", text):
        return ValueError(f"--vocab-size={vocab_size} is more than these texts can give; use {most[1]} or less")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", text):
        return ValueError(f"--vocab-size={vocab_size} is less than the texts' characters need; use {least[1]} or more")
    if "sentences_.empty()" in text:
        return ValueError(f"{' '.join(inputs)}: these contain no text; give shards with txt members, or documents")
    return ValueError(f"cannot train SentencePiece on {' '.join(inputs)}: {text.splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
