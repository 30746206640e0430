"""Text <-> ids, with SentencePiece and the id layout of BEiT-3's `beit3.spm`; `open_tokenizer` takes others too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pretrain.batch import BOS, EOS, UNK
from pretrain.data.json_tokenizer import JsonTokenizer

# XLM-R puts <s> <pad> </s> <unk> before the pieces; SentencePiece's own file begins with <unk> <s> </s>.
OFFSET = 1
SPM_SPECIALS = 3
TOKENIZER = "text.model"  # its name beside the weights that were trained with it
BESIDE_WEIGHTS = (TOKENIZER, JsonTokenizer.file_name)
# Pieces have at most 16 characters by SentencePiece's default, so this many per id are more than enough.
CHARACTERS_PER_ID = 64


class TextTokenizer:
    """A SentencePiece model with the ids that `transformers.XLMRobertaTokenizer` assigns to the same file: <s> 0,
    <pad> 1, </s> 2, <unk> 3, piece i at i + 1, <mask> last. ValueError for a file that is missing or of another kind.

    Text is only text: a "<mask>" or "</s>" in a caption is encoded as ordinary pieces and never becomes a control id.
    """

    file_name = TOKENIZER

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        make = "write one with: python -m data_tools.train_text_tokenizer SHARDS --out text.model"
        if not self.path.is_file():
            raise ValueError(f"tokenizer={self.path} does not exist; {make}")
        self._sp = SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(self.path.read_bytes())
        except (RuntimeError, OSError):
            raise ValueError(f"tokenizer={self.path} is not a SentencePiece model; {make}") from None
        if (self._sp.unk_id(), self._sp.bos_id(), self._sp.eos_id()) != (0, 1, 2):
            raise ValueError(f"tokenizer={self.path} has other ids than 0, 1, 2 for <unk>, <s>, </s>; {make}")

    def __reduce__(self):
        # Spawned workers read the file again.
        return TextTokenizer, (self.path,)

    @property
    def vocab_size(self) -> int:
        return len(self._sp) + OFFSET + 1

    @property
    def mask_id(self) -> int:
        return len(self._sp) + OFFSET

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """BOS, the text's ids, EOS; truncated to `max_len` ids in all.

        With `max_len`, only the beginning of the text is read, so that megabytes cost no more than a page.
        """
        if max_len is None:
            return [BOS, *self.pieces(text), EOS]
        return [BOS, *self.pieces(text[: max_len * CHARACTERS_PER_ID])[: max_len - 2], EOS]

    def pieces(self, text: str) -> list[int]:
        """The text's ids without BOS and EOS."""
        # Lone surrogates have no UTF-8 and would raise.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return [i + OFFSET if i else UNK for i in self._sp.EncodeAsIds(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, without specials and <mask>."""
        first, last = SPM_SPECIALS + OFFSET, self.mask_id
        return self._sp.DecodeIds([int(i) - OFFSET for i in ids if first <= i < last])

    def token(self, index: int) -> str:
        """The text of one id, for pictures and reports."""
        specials = {BOS: "<s>", 1: "<pad>", EOS: "</s>", UNK: "<unk>", self.mask_id: "<mask>"}
        return specials[index] if index in specials else self._sp.IdToPiece(index - OFFSET)


AnyTokenizer = TextTokenizer | JsonTokenizer


def open_tokenizer(path: str | os.PathLike[str]) -> AnyTokenizer:
    """The tokenizer in a file: a tokenizer.json if its name ends in .json, else a SentencePiece model. ValueError for a
    file that is missing or of another kind."""
    return JsonTokenizer(path) if Path(path).suffix == ".json" else TextTokenizer(path)
