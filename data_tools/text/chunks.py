"""Cuts a document into chunks of at most so many tokens, at the ends of sentences where that is possible.

The chunks of a document, put behind each other, are the document: nothing is lost or added between them. A chunk also
has at most as many characters as training reads of a text, so that training takes all of it and never a part.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from pretrain.data.sources import WINDOW_CHARACTERS_PER_ID

LEAST_CHUNK_TOKENS = 8  # BOS, EOS, and a few words
# Where the next sentence does not fit: at this share the chunk is full, below it the sentence is cut between words.
FULL_FROM = 0.75
SHORT_BELOW = 32  # tokens

# A sentence ends behind a mark, with the quotes and brackets that close after it, where blanks and no small letter
# follow; behind a mark of Chinese and Japanese, which no blank follows; and with its line. The dot of "Mr." or "J."
# ends none. Possessive, and at the start of a run of marks alone: a megabyte of dots costs no more than other text.
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
    """What a chunk may hold at most, and at least where its document has enough."""

    tokens: int
    characters: int
    least: int

    def hold(self, tokens: int, characters: int) -> bool:
        return tokens <= self.tokens and characters <= self.characters

    def full(self, tokens: int, characters: int) -> bool:
        return tokens >= FULL_FROM * self.tokens or characters >= FULL_FROM * self.characters


def limits_of(chunk_tokens: int) -> Limits:
    """For chunks of `chunk_tokens` with BOS and EOS: those of a `TextShards(text_len=chunk_tokens)`. ValueError."""
    if chunk_tokens < LEAST_CHUNK_TOKENS:
        raise ValueError(
            f"--chunk-tokens={chunk_tokens} is below {LEAST_CHUNK_TOKENS}, what BOS, EOS and a few words need; use 196"
        )
    tokens = chunk_tokens - 2
    return Limits(tokens, chunk_tokens * WINDOW_CHARACTERS_PER_ID, min(SHORT_BELOW, tokens // 4))


def sentences(text: str) -> list[str]:
    """The text's sentences, each with the blanks behind it; joined they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [part for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if (part := text[a:b])]


def words(text: str) -> list[str]:
    """The text's words, each with the blanks behind it; joined they are the text."""
    return _WORD.findall(text)


def cut(text: str, count: Callable[[str], int], limits: Limits) -> list[Chunk]:
    """The chunks of a document; `count` gives the tokens of a text, without BOS and EOS."""
    waiting = deque(_counted(sentences(text), count))
    chunks: list[Chunk] = []
    inside: list[
        Chunk
    ] = []  # the parts of the chunk that grows; beside each other they may count a little less or more
    tokens = characters = 0
    while waiting or inside:
        if waiting:
            part = waiting[0]
            if limits.hold(tokens + part.tokens, characters + len(part.text)):
                inside.append(waiting.popleft())
                tokens, characters = tokens + part.tokens, characters + len(part.text)
                continue
            if len(part.text) > 1 and not limits.full(tokens, characters):
                waiting.extendleft(reversed(_counted(_divided(waiting.popleft().text), count)))
                continue
            if not inside:  # one character that is more than a chunk; no tokenizer is known to have any
                inside.append(waiting.popleft())
        chunk, spare = _closed(inside, count, limits)
        chunks.append(chunk)
        waiting.extendleft(reversed(spare))
        inside, tokens, characters = [], 0, 0
    return _balanced(chunks, count, limits)


def _counted(parts: list[str], count: Callable[[str], int]) -> list[Chunk]:
    return [Chunk(part, count(part)) for part in parts]


def _divided(text: str) -> list[str]:
    """A sentence's words, or the halves of a word. Halves of halves fill a chunk as far as it must be."""
    parts = words(text)
    return parts if len(parts) > 1 else [text[: len(text) // 2], text[len(text) // 2 :]]


def _closed(parts: list[Chunk], count: Callable[[str], int], limits: Limits) -> tuple[Chunk, list[Chunk]]:
    """The chunk of these parts, counted as a whole, and the last parts if it then holds too much."""
    for used in range(len(parts), 0, -1):
        text = "".join(part.text for part in parts[:used])
        tokens = count(text)
        if limits.hold(tokens, len(text)) or used == 1:
            return Chunk(text, tokens), parts[used:]
    raise AssertionError("no parts")


def _balanced(chunks: list[Chunk], count: Callable[[str], int], limits: Limits) -> list[Chunk]:
    """A short last chunk is made one with the chunk before it, or both of about the same length."""
    if len(chunks) < 2 or chunks[-1].tokens >= limits.least:
        return chunks
    both = chunks[-2].text + chunks[-1].text
    if limits.hold(tokens := count(both), len(both)):
        return [*chunks[:-2], Chunk(both, tokens)]
    for parts in (sentences(both), words(both), list(both)):
        middle = min(accumulate(map(len, parts)), key=lambda end: abs(2 * end - len(both)))
        halves = _counted([both[:middle], both[middle:]], count)
        if all(limits.hold(half.tokens, len(half.text)) and half.tokens >= limits.least for half in halves):
            return [*chunks[:-2], *halves]
    return chunks
