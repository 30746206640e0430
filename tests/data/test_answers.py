"""VQA's answers: the official scorer's own results, noted from its code (GT-Vision-Lab/VQA a013f00), and targets."""

from __future__ import annotations

import pytest

from pretrain.data.answers import CONTRACTIONS, WITHOUT, accuracy, normalised, scores

# What processPunctuation and processDigitArticle of vqaEval.py make of these.
OFFICIAL = {
    "It's a bus, yes.": "it's bus yes",
    "1,000 dogs": "1000 dogs",
    "the U.S. flag": "us flag",
    "Don't-know": "don't know",
    "dont / cant": "don't can't",
    "none": "0",
    "ten o'clock": "10 o'clock",
    "2.5 m": "2.5 m",
    "a/b": "b",
    "somebody'd": "somebodyd",
    "yall'll": "y'all'll",
    "?": "",
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_answers_are_normalised_as_officially(text):
    assert normalised(text) == OFFICIAL[text]


def test_the_table_of_contractions_is_whole():
    """The official one has 120 entries; four of them have capitals and never match, two change nothing."""
    assert len(WITHOUT) == 120 - 4 - 2 and len(set(CONTRACTIONS.split())) == len(CONTRACTIONS.split())


def test_an_answer_is_as_right_as_three_others_say():
    given = ["red"] * 3 + ["Red."] + ["blue"] * 2 + ["a dog"] * 4
    assert accuracy("RED", given) == pytest.approx(1.0)  # 4 matches: 3 or 4 among the others of each
    assert accuracy("blue", given) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert accuracy("the dog", given) == 1.0 and accuracy("cat", given) == 0
    # Where all agree, nothing is normalised, neither theirs nor ours.
    assert accuracy("red.", ["red."] * 10) == 1.0 and accuracy("red", ["red."] * 10) == 0


def test_targets_are_a_third_of_three():
    given = ["red"] * 3 + ["Red."] + ["blue"] * 2 + ["dog"]
    assert scores(given) == pytest.approx({"red": 1.0, "blue": 0.6, "dog": 0.3})
