"""Splits a document into chunks with a maximum number of tokens, at the ends of sentences if possible.

The chunks of a document, concatenated, are the document: nothing is lost or added. A chunk also has at most as many
characters as training reads of a text, so that training always reads all of it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from pretrain.data.sources import WINDOW_CHARACTERS_PER_ID

LEAST_CHUNK_TOKENS = 8  # BOS, EOS, and a few words
# If the next sentence does not fit: from this share on the chunk is full; below it the sentence is split at a word.
FULL_FROM = 0.75
SHORT_BELOW = 32  # tokens

# A sentence ends after a mark, including closing quotes and brackets, if blanks and then no lower-case letter follow;
# after a Chinese or Japanese mark, which no blank follows; and at the end of its line. The dots of "Mr." and "J." do
# not end one. Possessive quantifiers, and matches only at the start of a run of marks, so that a megabyte of dots costs
# no more than other text.
_NO_END = "".join(rf"(?<!\b{short}\.)" for short in ("Mr", "Ms", "Dr", "St", "vs", "Mrs", r"[^\W\d_]"))
_SENTENCE_END = re.compile(
    rf"""[.!?…。！？\n]
        (?: (?<=\n)\n*+
          | (?<=[。！？])[。！？]*+[”’」』）]*+\s*+
          | (?<![.!?…]{{2}}){_NO_END}[.!?…]*+["'”’)\]»]*+\s++(?![a-zß-öø-ÿ]) )""",  # noqa: RUF001
    re.VERBOSE,
)
_WORD = re.compile(r"\S++\s*+|\s++")


class Chunk(NamedTuple):
    text: str
    tokens: int  # without BOS and EOS


class Limits(NamedTuple):
    """The maximum size of a chunk, and its minimum if the document is long enough."""

    tokens: int
    characters: int
    least: int

    def hold(self, tokens: int, characters: int) -> bool:
        return tokens <= self.tokens and characters <= self.characters

    def full(self, tokens: int, characters: int) -> bool:
        return tokens >= FULL_FROM * self.tokens or characters >= FULL_FROM * self.characters


def limits_of(chunk_tokens: int) -> Limits:
    """The limits of chunks for `TextShards(text_len=chunk_tokens)`, which counts BOS and EOS. Raises ValueError."""
    if chunk_tokens < LEAST_CHUNK_TOKENS:
        raise ValueError(
            f"--chunk-tokens={chunk_tokens} is below {LEAST_CHUNK_TOKENS}, the least for BOS, EOS and words; use 196"
        )
    tokens = chunk_tokens - 2
    return Limits(tokens, chunk_tokens * WINDOW_CHARACTERS_PER_ID, min(SHORT_BELOW, tokens // 4))


def sentences(text: str) -> list[str]:
    """The text's sentences, each with the blanks after it; joined they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [part for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if (part := text[a:b])]


def words(text: str) -> list[str]:
    """The text's words, each with the blanks after it; joined they are the text."""
    return _WORD.findall(text)


def cut(text: str, count: Callable[[str], int], limits: Limits) -> list[Chunk]:
    """The chunks of a document; `count` gives the tokens of a text, without BOS and EOS."""
    pending = deque(_with_counts(sentences(text), count))
    chunks: list[Chunk] = []
    # The parts of the current chunk. Tokenised together they may have slightly fewer or more tokens.
    parts: list[Chunk] = []
    tokens = characters = 0
    while pending or parts:
        if pending:
            part = pending[0]
            if limits.hold(tokens + part.tokens, characters + len(part.text)):
                parts.append(pending.popleft())
                tokens, characters = tokens + part.tokens, characters + len(part.text)
                continue
            if len(part.text) > 1 and not limits.full(tokens, characters):
                pending.extendleft(reversed(_with_counts(_divide(pending.popleft().text), count)))
                continue
            if not parts:  # a single character with more tokens than a chunk; no known tokenizer has any
                parts.append(pending.popleft())
        chunk, rest = _join(parts, count, limits)
        chunks.append(chunk)
        pending.extendleft(reversed(rest))
        parts, tokens, characters = [], 0, 0
    return _balance(chunks, count, limits)


def _with_counts(parts: list[str], count: Callable[[str], int]) -> list[Chunk]:
    return [Chunk(part, count(part)) for part in parts]


def _divide(text: str) -> list[str]:
    """A sentence's words, or the halves of a word. Repeated halving fills a chunk as far as necessary."""
    parts = words(text)
    return parts if len(parts) > 1 else [text[: len(text) // 2], text[len(text) // 2 :]]


def _join(parts: list[Chunk], count: Callable[[str], int], limits: Limits) -> tuple[Chunk, list[Chunk]]:
    """(the chunk of these parts, tokenised together; the last parts, if all of them together are too much)."""
    for used in range(len(parts), 0, -1):
        text = "".join(part.text for part in parts[:used])
        tokens = count(text)
        if limits.hold(tokens, len(text)) or used == 1:
            return Chunk(text, tokens), parts[used:]
    raise AssertionError("no parts")


def _balance(chunks: list[Chunk], count: Callable[[str], int], limits: Limits) -> list[Chunk]:
    """Merges a short last chunk with the one before it, or makes both about equally long."""
    if len(chunks) < 2 or chunks[-1].tokens >= limits.least:
        return chunks
    both = chunks[-2].text + chunks[-1].text
    if limits.hold(tokens := count(both), len(both)):
        return [*chunks[:-2], Chunk(both, tokens)]
    for parts in (sentences(both), words(both), list(both)):
        middle = min(accumulate(map(len, parts)), key=lambda end: abs(2 * end - len(both)))
        halves = _with_counts([both[:middle], both[middle:]], count)
        if all(limits.hold(half.tokens, len(half.text)) and half.tokens >= limits.least for half in halves):
            return [*chunks[:-2], *halves]
    return chunks
