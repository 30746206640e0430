"""Trains the text tokenizer, a SentencePiece unigram model, on the texts of shards and on files of documents.

    python -m data_tools.train_text_tokenizer data/pairs data/wiki.jsonl.gz --vocab-size 64000 --out data/text.model

The settings are those of XLM-R's model (unigram, nmt_nfkc, no byte fallback, character coverage 0.9995), so that
BEiT-3's id layout holds. Equal shards and options give an equal file, on any machine.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from data_tools.text.documents import Input, find_inputs, kind_of, read_blocks, text_of_document
from pretrain.command import make_parser, run
from pretrain.data.shards.reader import BadSample, Manifest, ShardReader, load_manifest
from pretrain.data.sources import TEXT, text_of
from pretrain.data.text_tokenizer import OFFSET
from pretrain.files import write_file

# The trainer drops sentences above 4192 bytes; documents are cut before that, at a space where there is one.
MAX_CHARACTERS = 1000
# EM sums in an order that depends on the number of threads, so it is fixed and not the machine's number of cores.
THREADS = 8
REPORT_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(
        lambda: train(
            args.inputs,
            args.out,
            args.vocab_size,
            args.max_texts,
            column=args.text_col,
            model_type=args.model_type,
            verbose=args.verbose,
        ),
        left="nothing was written",
    )


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
        help="indexed shards (directories, or patterns such as 'cc12m/{00000..00009}.tar') and files of documents as "
        "pack_text reads them: .txt, .jsonl (also packed), .parquet",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write, such as data/text.model")
    parser.add_argument("--text-col", default="text", metavar="NAME", help="of parquet and .jsonl (%(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=64000, metavar="N", help="with <unk>, <s>, </s> (%(default)s)"
    )
    parser.add_argument(
        "--model-type",
        choices=("unigram", "bpe"),
        default="unigram",
        help="unigram as XLM-R and BEiT-3; bpe keeps whole words where they are few, as in quickstart (%(default)s)",
    )
    parser.add_argument(
        "--max-texts",
        type=int,
        metavar="N",
        help="read so many texts of the shards, spread evenly, and the first so many of the documents (all)",
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
    """Writes `out` at once or not at all. ValueError if the texts cannot give that vocabulary; ShardError, OSError."""
    from sentencepiece import SentencePieceTrainer

    if vocab_size < 8:
        raise ValueError(f"--vocab-size={vocab_size} is wrong because it leaves no room for pieces; use 64000")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"--max-texts={max_texts} is wrong because it leaves no text; use 10000000, or leave it out")
    _check_out(out)
    documents = find_inputs([Path(name) for name in inputs if kind_of(Path(name))], column)
    shards = tuple(name for name in inputs if not kind_of(Path(name)))
    read = [sentences(load_manifest(shards), max_texts)] if shards else []
    read += [document_sentences(documents, max_texts)] if documents else []
    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=chain(*read),
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
        raise _explained(error, vocab_size, inputs) from None
    write_file(out, model.getvalue())
    print(f"{out}: {vocab_size} pieces, {vocab_size + OFFSET + 1} ids with <pad> and <mask>")


def _check_out(out: Path) -> None:
    """Said before hours of reading, not after them. ValueError, OSError."""
    if out.is_dir():
        raise ValueError(f"--out={out} is a directory; give the path of a file, such as {out / 'text.model'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out={out}: nothing can be written to {out.parent}; choose another place")


def sentences(manifest: Manifest, max_texts: int | None) -> Iterator[str]:
    """The shards' texts in pieces of at most MAX_CHARACTERS; bad samples are counted and left out."""
    reader, bad, texts, last = ShardReader(manifest), 0, 0, time.monotonic()
    every = max(1, -(-manifest.samples // max_texts)) if max_texts else 1
    number = -1
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            number += 1
            if number % every:
                continue
            try:
                members = reader.read(shard, sample, (TEXT,))
                if TEXT not in members:  # a picture alone
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
    left_out = f", {bad} bad samples left out" if bad else ""
    print(f"read {texts} texts of {len(manifest.shards)} shards{left_out}", file=sys.stderr, flush=True)


def document_sentences(inputs: list[Input], max_texts: int | None) -> Iterator[str]:
    """The documents' texts in pieces of at most MAX_CHARACTERS; what cannot be used is counted and left out."""
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
    left_out = f", {bad} that cannot be used left out" if bad else ""
    print(f"read {texts} documents of {len(inputs)} files{left_out}", file=sys.stderr, flush=True)


def split_text(text: str) -> Iterator[str]:
    """Lines, and long lines in parts."""
    for line in text.splitlines():
        while len(line) > MAX_CHARACTERS:
            space = line.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS)
            cut = space if space > 0 else MAX_CHARACTERS
            yield line[:cut]
            line = line[cut:].lstrip()
        if line.strip():
            yield line


def _explained(error: RuntimeError, vocab_size: int, inputs: list[str]) -> Exception:
    """SentencePiece's message as one sentence with the way out."""
    text = str(error)
    if found := re.search(r"set it to a value <= (\d+)", text):
        return ValueError(f"--vocab-size={vocab_size} is more than these texts can give; use {found[1]} or less")
    if found := re.search(r"required_chars\. \d+ vs (\d+)", text):
        return ValueError(f"--vocab-size={vocab_size} is less than the texts' characters need; use {found[1]} or more")
    if "sentences_.empty()" in text:
        return ValueError(f"{' '.join(inputs)}: no text in these; give shards with txt members, or documents")
    return ValueError(f"SentencePiece could not be trained on {' '.join(inputs)}: {text.splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
