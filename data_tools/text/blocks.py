"""Processes one block of documents in a worker of `data_tools.pack_text`: decode, clean, filter, split, store."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.lists.languages import detector, language_code
from data_tools.text.chunks import cut, limits_of
from data_tools.text.clean import TextRules, clean, why_dropped
from data_tools.text.documents import Block, Input, Raw, text_of_document
from data_tools.text.duplicates import comparable, digest, signature
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.files import write_file

_SCHEMA = pa.schema(
    {
        "source": pa.int64(),
        "number": pa.int64(),
        "reason": pa.string(),  # "": not dropped so far
        "detail": pa.string(),
        "digest": pa.binary(),
        "signature": pa.binary(),
        "chunks": pa.list_(pa.string()),
        "tokens": pa.list_(pa.int64()),
    }
)
_LANGUAGE_CHARACTERS = 500  # from a document's middle, because its first lines may be a title


@dataclass(frozen=True)
class BlockWork:
    """The settings that determine the result of a block."""

    inputs: tuple[Input, ...]
    tokenizer: Path
    chunk_tokens: int
    language: str | None
    near: bool  # whether near duplicates will be dropped
    rules: TextRules

    def check(self) -> None:
        """Raises ValueError for an unknown language code, or if no detector is installed."""
        if self.language is None:
            return
        if len(code := language_code(self.language)) not in (2, 3) or not code.isalpha():
            raise ValueError(f"--language={self.language} is not a code of ISO 639-1; use one such as en, de, fr, zh")
        detector()


class Cutter:
    """The state of a worker: its tokenizer and language detector."""

    def __init__(self, work: BlockWork):
        self.work, self.limits, self.tokenizer = work, limits_of(work.chunk_tokens), TextTokenizer(work.tokenizer)
        self.wanted = None if work.language is None else language_code(work.language)
        self.detect: Callable | None = None if self.wanted is None else detector()

    def count(self, text: str) -> int:
        return len(self.tokenizer.pieces(text))

    def row(self, raw: Raw) -> dict[str, Any]:
        """One document's row in the block's file."""
        row: dict[str, Any] = {"source": raw.source, "number": raw.number, "reason": "", "detail": ""}
        text, row["reason"] = text_of_document(raw, self.work.inputs[raw.source])
        if row["reason"]:
            return row
        text = clean(text)
        if text and self.detect is not None and (language := self.language(text)) != self.wanted:
            return row | {"reason": "language", "detail": language}
        if violation := why_dropped(text, self.work.rules, english=self.wanted == "en"):
            return row | dict(zip(("reason", "detail"), violation, strict=True))
        chunks = cut(text, self.count, self.limits)
        if len(chunks) == 1 and chunks[0].tokens < self.limits.least:
            return row | {"reason": "too_few_tokens", "detail": f"{chunks[0].tokens}"}
        words = comparable(text)
        row |= {"digest": digest(words, text), "signature": signature(words) if self.work.near else b""}
        return row | {"chunks": [chunk.text for chunk in chunks], "tokens": [chunk.tokens for chunk in chunks]}

    def language(self, text: str) -> str:
        assert self.detect is not None
        start = max(0, (len(text) - _LANGUAGE_CHARACTERS) // 2)
        return self.detect([text[start : start + _LANGUAGE_CHARACTERS]])[0]


_cutter: Cutter  # of this worker
_directory: Path


def start_worker(work: BlockWork, directory: Path) -> None:
    """Called once in each worker, before its first block."""
    global _cutter, _directory
    _cutter, _directory = Cutter(work), directory / "blocks"


def cut_block(block: Block) -> Path:
    """The file of the block's rows; one of a killed run is reused."""
    path = _directory / f"{block.number:08d}.parquet"
    if not path.exists():
        table = pa.Table.from_pylist([_cutter.row(raw) for raw in block.documents], _SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_file(path, buffer.getvalue())
    return path
