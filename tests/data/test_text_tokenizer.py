"""The text tokenizer: ids as transformers' XLM-R tokenizer gives them, hostile text, and its training command."""

from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path

import pytest
import sentencepiece

from data_tools import train_text_tokenizer
from pretrain.batch import BOS, EOS, UNK
from pretrain.data.text_tokenizer import TextTokenizer
from tests.toys import text_sample, write_source, write_text_model

WORDS = ["a", "the", "red", "blue", "green", "circle", "square", "star", "left", "right", "of", "above", "below", "big"]
# Normalised by NFKC: a ligature, full-width digits.
WORDS += ["striped", "naïve", "\N{LATIN SMALL LIGATURE FI}ne", "\N{FULLWIDTH DIGIT ONE}2", "日本", "語"]


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=8)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("spm") / "text.model", sentences(2000), 56)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return TextTokenizer(model)


def strings(count: int) -> list[str]:
    """Words of the corpus, other words, spaces, symbols, letters of many scripts, accents, NULs.

    Left out is what transformers' own normaliser treats otherwise than SentencePiece, which BEiT-3 ran: accents that
    stand alone (it goes by grapheme), and white space that nmt_nfkc keeps, such as NEL (it splits there).
    """
    generator = random.Random(1)
    alphabet = [*"abcdefgRED ,.!?-'\"\t\n  éü日本語▁\x00", "\N{FULLWIDTH DIGIT ONE}", "e\u0301", "\xa0"]
    alphabet += ["\N{LATIN SMALL LIGATURE FI}", "\N{GREEK SMALL LETTER ALPHA}", "\u200b", "\u3000", "\N{GRINNING FACE}"]
    return ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(count)] + sentences(count, 2)


def test_ids_equal_transformers_xlm_roberta_over_the_same_file(tokenizer: TextTokenizer) -> None:
    from transformers import XLMRobertaTokenizer

    reference = XLMRobertaTokenizer(**XLMRobertaTokenizer.convert_to_native_format(vocab_file=str(tokenizer.path)))
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.mask_id == reference.mask_token_id
    assert (reference.bos_token_id, reference.eos_token_id, reference.unk_token_id) == (BOS, EOS, UNK)
    for text in strings(400):
        assert tokenizer.encode(text) == reference(text)["input_ids"], repr(text)
        assert tokenizer.encode(text, max_len=12) == reference(text, truncation=True, max_length=12)["input_ids"]
    for index in range(tokenizer.vocab_size):
        assert tokenizer.token(index) == reference.convert_ids_to_tokens(index)


def test_control_ids_cannot_be_written_in_a_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("<mask> red </s> <s> <pad>")
    assert not {BOS, EOS, 1, tokenizer.mask_id} & set(ids[1:-1])


def test_decoding_gives_the_text_back(tokenizer: TextTokenizer) -> None:
    text = "the big red circle left of a striped star"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 1, tokenizer.mask_id]) == text


def test_hostile_text_costs_little_and_raises_nothing(tokenizer: TextTokenizer) -> None:
    start = time.process_time()
    for text in [
        "\x00" * 10,
        "x\ud800y",
        "",
        "a" * 5_000_000,
        "red " * 1_000_000,
        "\x00" * 1_000_000,
        "\u0301" * 100_000,
    ]:
        ids = tokenizer.encode(text, max_len=64)
        assert ids[0] == BOS and ids[-1] == EOS and len(ids) <= 64
    assert time.process_time() - start < 5
    assert tokenizer.encode("red " * 1000, max_len=64) == tokenizer.encode("red " * 1_000_000, max_len=64)


def test_a_tokenizer_can_go_to_a_spawned_worker(tokenizer: TextTokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("red star") == tokenizer.encode("red star")


def test_files_that_are_not_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; write one with: python -m data_tools\.train_text_tokenizer"):
        TextTokenizer(tmp_path / "none.model")
    for content in (b"", b"\x00garbage" * 9):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            TextTokenizer(tmp_path / "bad.model")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = sentences(600)
    samples = [text_sample(f"{i:05d}", text) for i, text in enumerate(texts)]
    samples[3]["txt"] = b"\xff\xfe not UTF-8"
    samples[4]["txt"] = ("long words " * 2000).encode()
    samples[5]["txt"] = b"a \x00 red\x00 star"
    return write_source(tmp_path_factory.mktemp("texts"), [samples[:300], samples[300:]])


def train(shards: Path, out: Path, *options: str) -> int:
    return train_text_tokenizer.main([str(shards), "--out", str(out), *options])


def test_training_writes_a_file_that_does_not_depend_on_the_run(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "new" / "a.model", "--vocab-size", "48") == 0
    assert train(shards, tmp_path / "b.model", "--vocab-size", "48") == 0
    assert (tmp_path / "new" / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert TextTokenizer(tmp_path / "b.model").vocab_size == 48 + 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.model", "new"]  # no temporary file remains


def test_fewer_texts_are_spread_over_the_shards(shards: Path) -> None:
    manifest = train_text_tokenizer.load_manifest((str(shards),))
    some = list(train_text_tokenizer.sentences(manifest, 60))
    assert len(some) <= 60 + 25  # one text is long and is split
    read = [len(list(train_text_tokenizer.sentences(manifest, most))) for most in (599, 600, 9999)]
    assert read[0] == read[1] - 1 == read[2] - 1  # nearly all of them, and not every second one
    everything = sentences(600)
    assert any(text in some for text in everything[300:]) and any(text in some for text in everything[:300])


def test_documents_train_it_as_shards_do(shards: Path, tmp_path: Path) -> None:
    manifest = train_text_tokenizer.load_manifest((str(shards),))
    texts = list(train_text_tokenizer.sentences(manifest, None))
    (tmp_path / "docs" / "more").mkdir(parents=True)
    document = tmp_path / "docs" / "more" / "d.jsonl"
    document.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + "no json\n")
    train_text_tokenizer.train([str(shards)], tmp_path / "a.model", 50)
    train_text_tokenizer.train([str(tmp_path / "docs")], tmp_path / "b.model", 50, column="body")
    pieces = [sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{name}.model")) for name in "ab"]
    assert [pieces[0].id_to_piece(i) for i in range(50)] == [pieces[1].id_to_piece(i) for i in range(50)]
    assert train_text_tokenizer.main([str(document), "--out", str(tmp_path / "c.model")]) == 2, "no column text"


def test_a_document_with_half_a_character_does_not_end_the_training(tmp_path: Path) -> None:
    rows = [{"text": f"the quick brown fox number {n} jumps over a lazy dog"} for n in range(99)]
    rows.append({"text": "half an emoji \ud83d at the end of a cut text"})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_text_tokenizer.train([str(tmp_path / "d.jsonl")], tmp_path / "a.model", 50)
    assert TextTokenizer(tmp_path / "a.model").vocab_size == 50 + 2


@pytest.mark.parametrize(
    ("size", "message"), [("5000", "can give; use"), ("12", "characters need; use"), ("2", "no room")]
)
def test_an_impossible_vocabulary_is_one_sentence(shards: Path, tmp_path: Path, capfd, size: str, message: str) -> None:
    assert train(shards, tmp_path / "x.model", "--vocab-size", size) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f"--vocab-size={size}" in error[0] and message in error[0]
    assert not list(tmp_path.iterdir())


def test_an_unwritable_out_is_an_error_before_anything_is_read(shards: Path, tmp_path: Path, capfd) -> None:
    assert train(shards, tmp_path, "--vocab-size", "48") == 2
    assert train(shards, shards / "00000.tar" / "x.model", "--vocab-size", "48") == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2 and "is a directory" in errors[0] and "00000.tar" in errors[1]


def test_the_suggested_largest_vocabulary_works(shards: Path, tmp_path: Path, capfd) -> None:
    assert train(shards, tmp_path / "x.model", "--vocab-size", "5000") == 2
    largest = capfd.readouterr().err.rsplit("use ", 1)[1].split()[0]
    assert train(shards, tmp_path / "x.model", "--vocab-size", largest) == 0


def test_shards_without_text_and_broken_shards_are_named(tmp_path: Path, capfd) -> None:
    source = write_source(tmp_path / "s", [[text_sample("a", "  ")]])
    assert train(source, tmp_path / "x.model", "--vocab-size", "48") == 2
    assert "these contain no text;" in capfd.readouterr().err
    assert train(tmp_path / "missing", tmp_path / "x.model") == 2
    assert "missing" in capfd.readouterr().err
    tar = source / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:100])
    assert train(source, tmp_path / "x.model") == 2
    assert "00000.tar" in capfd.readouterr().err
