"""VQA's answers: the official normalisation, and the accuracy of an answer among those of ten people.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (v2.0), whose results these functions
reproduce, its peculiarities included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")
# A word that equals one of these but for a missing apostrophe becomes it.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
WITHOUT = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_GROUPED = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)  # the official code passes this flag as the number of replacements


def normalised(answer: str) -> str:
    """The answer without punctuation, articles and capitals, with numbers as digits and missing apostrophes added."""
    text = answer
    grouped = _GROUPED.search(answer) is not None
    for mark in PUNCTUATION:
        spaced = f"{mark} " in answer or f" {mark}" in answer or grouped
        text = text.replace(mark, "" if spaced else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(WITHOUT.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """The official accuracy of one answer, given those of people: the mean over the people of min(matches among the
    others / 3, 1). If all people agree, nothing is normalised."""
    plain = [" ".join(re.split(r"[\n\t]", text)).strip() for text in given]
    own = " ".join(re.split(r"[\n\t]", answer)).strip()
    if len(set(plain)) > 1:
        plain, own = [normalised(text) for text in plain], normalised(own)
    matches = sum(text == own for text in plain)
    return sum(min((matches - (text == own)) / 3, 1.0) for text in plain) / len(plain)


def scores(given: Sequence[str]) -> dict[str, float]:
    """{normalised answer: its target in training}: 0.3 for each person who gave it, at most 1 (unilm beit3/datasets.py,
    get_score, which counts the answers without normalising them)."""
    return {answer: min(0.3 * count, 1.0) for answer, count in Counter(map(normalised, given)).items()}
