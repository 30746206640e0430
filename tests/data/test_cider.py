"""CIDEr-D: against pycocoevalcap 1.2's numbers, noted."""

from __future__ import annotations

import pytest

from pretrain.data.cider import cider, words_of
from pretrain.evals.captions import other_captions

CAPTIONS = ["a red bus on the street", "two dogs run", "a cat sleeps on a mat"]
REFERENCES = [
    ["a red bus drives on the street", "a bus on a street"],
    ["two dogs run in the grass", "dogs are running"],
    ["a cat is sleeping on a mat", "the cat sleeps"],
]
# Cider().compute_score of the above; our own and its numbers differed by 2e-16 on 20 random captions of 5 references.
THEIRS = [3.8442276273102634, 2.520376242532245, 2.8398583306609115]


def test_scores_are_those_of_pycocoevalcap():
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(THEIRS, abs=1e-12)


def test_the_best_caption_is_the_reference_itself():
    texts = ["a red bus", "two dogs run far", "cat"]
    assert cider(texts, [[text] for text in texts])[1] == pytest.approx(10.0)
    assert cider(["", "!"], [["a"], ["b"]]) == [0.0, 0.0]


def test_a_reward_counts_the_end_as_a_word():
    """A text that stops in the middle of a phrase loses by it."""
    texts, ended = ["a red bus on the", "two dogs run", "a cat sleeps on a mat"], [True, True, False]
    marked = [text + " zzz" * end for text, end in zip(texts, ended, strict=True)]
    given = [[f"{text} zzz" for text in own] for own in REFERENCES]
    assert cider(texts, REFERENCES, None, ended) == pytest.approx(cider(marked, given), abs=1e-12)
    assert cider(texts, REFERENCES, None, ended)[0] < cider(texts, REFERENCES)[0]


def test_the_baseline_is_what_was_written_about_the_next_picture():
    about_the_next = ["two dogs run in the grass", "a cat is sleeping on a mat", "a red bus drives on the street"]
    assert other_captions(REFERENCES) == cider(about_the_next, REFERENCES)
    assert max(other_captions(REFERENCES)) < min(THEIRS)


def test_words_have_no_punctuation():
    assert words_of("A man's hat, red-blue; 2 dogs.") == ["a", "man's", "hat", "red-blue", "2", "dogs"]
    with pytest.raises(ValueError, match="2 captions and 1 lists"):
        cider(["a", "b"], [["a"]])
