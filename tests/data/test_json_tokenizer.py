from __future__ import annotations

import pickle

import pytest

from pretrain.batch import BOS, EOS, PAD, UNK
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.data.text_tokenizer import TextTokenizer, open_tokenizer
from tests.models.towers.others import WORDS, write_tokenizer
from tests.toys import needs, write_text_model

needs("tokenizers")


@pytest.mark.parametrize("kind", ["bert", "roberta", "clip", "siglip"])
def test_ids_have_the_layout_of_ours(kind, tmp_path):
    tokenizer = JsonTokenizer(write_tokenizer(tmp_path / "tokenizer.json", kind))
    words = tokenizer.encode("word0 word3 word19 never")
    first = 4
    assert words == [BOS, first, first + 3, first + 19, UNK, EOS]
    assert tokenizer.vocab_size == 4 + len(WORDS) + 1 and tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(words) == "word0 word3 word19"
    assert [tokenizer.token(i) for i in (BOS, PAD, EOS, UNK, first, tokenizer.mask_id)] == [
        "<s>", "<pad>", "</s>", "<unk>", "word0", "<mask>",
    ]  # fmt: skip
    assert tokenizer.encode("word0 " * 100, max_len=5) == [BOS, first, first, first, EOS]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("word0") == tokenizer.encode("word0")


@pytest.mark.parametrize("text", ["[MASK] word1 [SEP]", "\ud800 word1", "word1" + "\0" * 5, "[CLS][PAD]"])
def test_a_text_holds_no_control_ids(text, tmp_path):
    tokenizer = JsonTokenizer(write_tokenizer(tmp_path / "tokenizer.json", "bert"))
    ids = tokenizer.pieces(text)
    assert all(UNK <= index < tokenizer.mask_id for index in ids)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no json", "is no tokenizer.json"),
        (b"{}", "is no tokenizer.json"),
        (b"\xff\xfe\x00", "is no tokenizer.json"),
        (b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "begin and end;"),
        (
            b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<s>": 4000000000}, "unk_token": "x"}}',
            "ids; give one with 1 to 2,000,000",
        ),
    ],
)  # fmt: skip
def test_files_of_another_kind(content, said, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        JsonTokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_the_ending_decides(tmp_path):
    assert isinstance(open_tokenizer(write_tokenizer(tmp_path / "t.json", "bert")), JsonTokenizer)
    assert isinstance(open_tokenizer(write_text_model(tmp_path / "t.model", WORDS * 3, 60)), TextTokenizer)
    with pytest.raises(ValueError, match=r"absent\.json does not exist; give a tokenizer\.json"):
        open_tokenizer(tmp_path / "absent.json")
