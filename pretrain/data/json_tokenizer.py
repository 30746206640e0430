"""Text <-> ids with a tokenizer.json of Hugging Face's `tokenizers` (WordPiece, BPE, Unigram), in our layout of ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.batch import BOS, EOS, PAD, UNK
from pretrain.json_files import read_bytes

# The names in published tokenizers of the four specials that are our first ids, and of the mask, our last one.
NAMES = {
    BOS: ("[CLS]", "<s>", "<|startoftext|>"),
    PAD: ("[PAD]", "<pad>"),
    EOS: ("[SEP]", "</s>", "<|endoftext|>"),
    UNK: ("[UNK]", "<unk>"),
}
MASK_NAMES = ("[MASK]", "<mask>")
FIRST_WORD = len(NAMES)
MISSING = -1
MAX_IDS = 2_000_000
# As in text_tokenizer.py: as many characters are enough for an id.
CHARACTERS_PER_ID = 64


class JsonTokenizer:
    """A tokenizer.json in TextTokenizer's layout of ids: BOS 0, PAD 1, EOS 2, UNK 3, then its other ids in their own
    order, the mask last. `own_ids`: for each of our ids the tokenizer's, MISSING if it lacks one (CLIP's has no padding
    and no mask). RoBERTa's layout is ours already. ValueError for a file that is missing or of another kind.

    Text is only text: a "[MASK]" or "</s>" in a caption never becomes a control id.
    """

    file_name = "text.json"  # beside the weights that were trained with it

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        wanted = "give a tokenizer.json of the library tokenizers, or a SentencePiece model"
        if not self.path.is_file():
            raise ValueError(f"tokenizer={self.path} does not exist; {wanted}")
        # Data workers are forked, and this library's own threads do not survive that.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"tokenizer={self.path} needs the package tokenizers ({error}); install it") from error
        try:
            self._own: Any = Tokenizer.from_str(read_bytes(self.path).decode())
        except OSError:
            raise
        except Exception as error:  # the library raises plain Exceptions; decode() raises for what is not UTF-8
            first = str(error).splitlines()[0][:200]
            raise ValueError(f"tokenizer={self.path} is no tokenizer.json ({first}); {wanted}") from None
        self._own.no_truncation()
        self._own.no_padding()
        self._own.encode_special_tokens = True
        self.own_ids = self._layout()
        self._ours = {own: ours for ours, own in enumerate(self.own_ids) if own != MISSING}

    def _layout(self) -> list[int]:
        """`own_ids`. ValueError for a vocabulary of no usable size, or without BOS and EOS."""
        vocabulary: dict[str, int] = self._own.get_vocab(with_added_tokens=True)
        count = max(vocabulary.values(), default=MISSING) + 1
        if not 0 < count <= MAX_IDS:
            raise ValueError(f"tokenizer={self.path} has {count} ids; give one with 1 to {MAX_IDS:,}")
        special = [self._find(vocabulary, names) for names in NAMES.values()]
        if MISSING in (special[BOS], special[EOS]) and special[BOS] == special[EOS]:
            raise ValueError(
                f"tokenizer={self.path} has none of {', '.join(NAMES[BOS] + NAMES[EOS])}, with which texts begin and "
                "end; give another one"
            )
        mask = self._find(vocabulary, MASK_NAMES)
        taken = {*special, mask}
        return [*special, *(own for own in range(count) if own not in taken), mask]

    @staticmethod
    def _find(vocabulary: dict[str, int], names: tuple[str, ...]) -> int:
        return next((vocabulary[name] for name in names if name in vocabulary), MISSING)

    def __reduce__(self):
        # Spawned workers read the file again.
        return JsonTokenizer, (self.path,)

    @property
    def vocab_size(self) -> int:
        return len(self.own_ids)

    @property
    def mask_id(self) -> int:
        return len(self.own_ids) - 1

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """BOS, the text's ids, EOS; with `max_len`, cut to so many ids in all, and only the text's beginning is
        read."""
        if max_len is None:
            return [BOS, *self.pieces(text), EOS]
        return [BOS, *self.pieces(text[: max_len * CHARACTERS_PER_ID])[: max_len - 2], EOS]

    def pieces(self, text: str) -> list[int]:
        """The text's ids without BOS and EOS."""
        # Lone surrogates have no UTF-8 and would raise.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = (self._ours[own] for own in self._own.encode(text, add_special_tokens=False).ids)
        return [index if FIRST_WORD <= index < self.mask_id else UNK for index in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, without specials and the mask."""
        return self._own.decode([self.own_ids[int(i)] for i in ids if FIRST_WORD <= i < self.mask_id])

    def token(self, index: int) -> str:
        """The text of one id, for pictures and reports."""
        specials = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNK: "<unk>", self.mask_id: "<mask>"}
        return specials[index] if index in specials else self.own_name(index)

    def own_name(self, index: int) -> str:
        """The tokenizer's own name for one of our ids, which it must not lack."""
        return str(self._own.id_to_token(self.own_ids[index]))
