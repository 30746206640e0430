"""data_tools.text.chunks: nothing is lost, training reads every chunk whole, and chunks are well filled."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.text.chunks import Limits, cut, limits_of, sentences, words
from pretrain.data.sources import TextShards
from pretrain.data.text_tokenizer import TextTokenizer
from tests.toys import write_text_model

VOCABULARY = ["the", "a", "red", "small", "river", "house", "Mr.", "Smith", "goes", "near", "over", "stone."]
VOCABULARY += ["Water?", "3.5", "and", "with", "long,", "words!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("spm") / "text.model")


def make_tokenizer(path: Path) -> TextTokenizer:
    rng = random.Random(0)
    lines = (" ".join(rng.choice(VOCABULARY) for _ in range(12)) for _ in range(300))
    return TextTokenizer(write_text_model(path, lines, 80))


def prose(length: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(length))


def check(text: str, tokenizer: TextTokenizer, chunk_tokens: int) -> list:
    """The invariants for any text."""
    limits = limits_of(chunk_tokens)
    chunks = cut(text, lambda part: len(tokenizer.pieces(part)), limits)
    assert "".join(chunk.text for chunk in chunks) == text
    source, rng = TextShards("unused", text_len=chunk_tokens), np.random.default_rng(0)
    for chunk in chunks:
        pieces = tokenizer.pieces(chunk.text)
        assert chunk.text and chunk.tokens == len(pieces)
        assert limits.hold(chunk.tokens, len(chunk.text))
        if chunk.text.strip() and pieces:
            ids = source.decode({"txt": chunk.text.encode()}, None, tokenizer, rng).ids
            assert ids is not None and ids[1 : len(pieces) + 1].tolist() == pieces  # all of it, never a stretch
    return chunks


@pytest.mark.parametrize("chunk_tokens", [8, 16, 64, 196])
def test_prose_is_cut_into_well_filled_chunks(tokenizer, chunk_tokens):
    chunks = check(prose(3000), tokenizer, chunk_tokens)
    room = chunk_tokens - 2
    assert sum(chunk.tokens for chunk in chunks) / len(chunks) / room > 0.8
    assert min(chunk.tokens for chunk in chunks) >= limits_of(chunk_tokens).least


def test_chunks_end_with_sentences_where_they_can(tokenizer):
    chunks = check("The small red river goes over a stone near the house. " * 200, tokenizer, 196)
    assert len(chunks) > 10
    assert sum(chunk.text.rstrip()[-1] == "." for chunk in chunks) >= len(chunks) - 2


ODD = [*VOCABULARY, "\n", "\n\n", "...", "x" * 300, "\u4e2d\u6587\u3002", "=" * 70, "\ufdfa"]
PARTS = st.one_of(st.sampled_from(ODD), st.text(max_size=20))


@settings(max_examples=150)
@given(parts=st.lists(PARTS, max_size=80), chunk_tokens=st.sampled_from([24, 32, 60]))
def test_any_text_is_cut_without_loss(tokenizer, parts, chunk_tokens):
    text = " ".join(parts).encode("utf-8", "replace").decode()
    check(text, tokenizer, chunk_tokens)


@pytest.mark.parametrize(
    "text",
    ["x" * 20_000, "\u4e2d" * 20_000, "a " + "y" * 5000 + " b", " " * 5000 + "word", "." * 100_000, "ab" + "-" * 9000],
    ids=["word", "unknown", "middle", "blanks", "dots", "dashes"],
)
def test_words_longer_than_a_chunk_are_split(tokenizer, text):
    check(text, tokenizer, 64)


def test_a_short_last_chunk_is_merged_or_balanced():
    count, limits = (lambda part: len(part.split())), Limits(tokens=10, characters=1000, least=3)
    text = "One two three four five. Six seven eight nine ten. Eleven."
    assert [chunk.tokens for chunk in cut(text, count, limits)] == [5, 6]
    joined = cut("One two three four. Five six seven. Eight.", count, limits)
    assert [chunk.text for chunk in joined] == ["One two three four. Five six seven. Eight."]


def test_a_sentence_that_does_not_fit_goes_to_the_next_chunk_if_this_one_is_full():
    count, limits = (lambda part: len(part.split())), Limits(tokens=10, characters=1000, least=1)
    full = "One two three four five six seven eight. Nine ten eleven twelve."
    assert [chunk.tokens for chunk in cut(full, count, limits)] == [8, 4]
    empty = "One two three. " + "Word " * 9 + "end."
    assert [chunk.tokens for chunk in cut(empty, count, limits)] == [10, 3]


def test_tokens_are_counted_for_the_whole_chunk():
    text = "ab cd ef gh ij kl mn op qr st."
    chunks = cut(text, lambda part: len(part.split()) ** 2, Limits(tokens=9, characters=100, least=1))
    assert "".join(chunk.text for chunk in chunks) == text
    assert max(chunk.tokens for chunk in chunks) <= 9


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("Mr. Smith and J. R. met. They left.", ["Mr. Smith and J. R. met. ", "They left."]),
        ("It is 3.5 m, i.e. long. Yes", ["It is 3.5 m, i.e. long. ", "Yes"]),
        ('He said "No." Then left.', ['He said "No." ', "Then left."]),
        ("Title\n\nText here.\nMore", ["Title\n\n", "Text here.\n", "More"]),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01"]),
        ("wait... what? Yes", ["wait... what? ", "Yes"]),
        ("", []),
    ],
)
def test_where_sentences_end(text, parts):
    assert sentences(text) == parts


@given(st.text())
def test_sentences_and_words_joined_are_the_text(text):
    assert "".join(sentences(text)) == text == "".join(words(text))


@pytest.mark.parametrize("chunk_tokens", [7, 0, -196])
def test_chunks_that_are_too_small_are_refused(chunk_tokens):
    with pytest.raises(ValueError, match="chunk-tokens"):
        limits_of(chunk_tokens)
