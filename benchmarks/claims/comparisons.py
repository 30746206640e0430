"""What benchmarks.claims asks: which arms are compared, by which score, and when a claim is shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORDS_IN_PAIRS, WORDS, PATCHES = (f"masked/{part}/accuracy" for part in ("pair_text", "text", "image"))
QUESTIONS, FOILS, RANDOM_PARTNERS, CIDER = "answers/accuracy", "foils/choice", "matching/accuracy", "captions/CIDEr"
RETRIEVAL = "R@5, mean of both ways"
SHORT = {
    WORDS_IN_PAIRS: "hidden words of pairs",
    WORDS: "hidden words of texts",
    PATCHES: "hidden patches",
    QUESTIONS: "questions",
    FOILS: "captions with a fact changed",
    RANDOM_PARTNERS: "captions of others",
    CIDER: "CIDEr",
    RETRIEVAL: "R@5",
}
SHOWN, NOT_SHOWN, CONTRADICTED, OPEN = "shown", "not shown", "contradicted", "open: needs two seeds"
ERRORS = 2  # standard errors that the mean difference must exceed


@dataclass(frozen=True)
class Comparison:
    """A statement, and the weighted sum of the arms' scores that is above 0 where it is true."""

    claim: str  # its letter
    says: str
    score: str  # a key of SHORT
    terms: Mapping[str, float]  # stage of the recipe: weight

    def value(self, scores: Mapping[str, float]) -> float:
        """In points, from the score of each of its arms."""
        return sum(weight * scores[arm] for arm, weight in self.terms.items())


def better(claim: str, says: str, one: str, other: str, *scores: str, judged_by: str = "") -> list[Comparison]:
    """`one` is above `other` in each of the scores."""
    return [Comparison(claim, says, score, {judged_by + one: 1, judged_by + other: -1}) for score in scores]


def most(claim: str, says: str, arm: str, low: str, high: str, *scores: str) -> list[Comparison]:
    """`arm` has more than half of what lies between `low` and `high`."""
    return [Comparison(claim, says, score, {arm: 1, low: -0.5, high: -0.5}) for score in scores]


def judged(claim: str, says: str, one: str, other: str) -> list[Comparison]:
    """After both were fine-tuned on questions, and on retrieval."""
    return [
        *better(claim, says, one, other, QUESTIONS, judged_by="questions_"),
        *better(claim, says, one, other, RETRIEVAL, judged_by="retrieval_"),
    ]


COMPARISONS = (
    *better("a", "hard negatives beat random ones", "hard", "random", FOILS, RANDOM_PARTNERS),
    *better(
        "a", "hard negatives from the first step beat random ones", "hard_from_the_start", "random", FOILS,
        RANDOM_PARTNERS,
    ),
    *judged("b", "stages beat joint pretraining on as many samples", "stagewise", "joint"),
    *better("b", "stages beat joint pretraining on as many samples", "stagewise", "joint", WORDS_IN_PAIRS),
    *judged("b", "stages beat joint pretraining on as many samples in as many steps", "stagewise",
            "joint_small_steps"),
    *better("b", "stages beat joint pretraining on as many samples in as many steps", "stagewise",
            "joint_small_steps", WORDS_IN_PAIRS),
    *judged("b", "stages beat their last one alone", "stagewise", "pairs"),
    *better("b", "stages beat their last one alone", "stagewise", "pairs", WORDS_IN_PAIRS),
    *judged("b", "stages beat no pretraining", "stagewise", "scratch"),
    *better("c", "attention from pictures serves texts better than random attention", "language_on_vision",
            "language_on_random", WORDS),
    *most("c", "attention from pictures gives texts most of what open attention does", "language_on_vision",
          "language_on_random", "language", WORDS),
    *better("c", "attention from pictures serves texts as well as attention trained on both", "language_on_vision",
            "both", WORDS),
    *better("c", "open attention that begins with pictures beats one that begins anew", "language_from_vision",
            "language", WORDS),
    *better("c", "attention from texts serves pictures better than random attention", "vision_on_language",
            "vision_on_random", PATCHES),
    *most("c", "attention from texts gives pictures most of what open attention does", "vision_on_language",
          "vision_on_random", "vision", PATCHES),
    *judged("d", "masked data alone beats contrast, matching and masked words for as many FLOPs", "joint", "three"),
    *judged("d", "masked data in small steps beats them for as many FLOPs", "joint_small_steps", "three"),
    *judged("d", "masked words of pairs alone beat them for a third of the FLOPs", "pairs", "three"),
    *better("e", "wrong captions cost something", "clean_tuned", "noisy_tuned", FOILS, CIDER, RETRIEVAL),
    *better("e", "CapFilt is better than the noise", "filtered_tuned", "noisy_tuned", FOILS, CIDER, RETRIEVAL),
    *most("e", "CapFilt recovers most of the loss", "filtered_tuned", "noisy_tuned", "clean_tuned", FOILS, CIDER,
          RETRIEVAL),
    *better("f", "three top layers with a fusion expert beat none", "pairs", "no_fusion_expert", WORDS_IN_PAIRS),
    *better("f", "three top layers with a fusion expert beat none", "pairs", "no_fusion_expert", QUESTIONS,
            judged_by="questions_"),
)  # fmt: skip


def score(name: str, evaluated: Mapping[str, Any]) -> float:
    """Of an eval.json."""
    if name == RETRIEVAL:
        return statistics.mean(float(evaluated[f"retrieval/{way}/R@5"]) for way in ("image_to_text", "text_to_image"))
    return float(evaluated[name])


def verdict(differences: list[float]) -> str:
    """SHOWN where each seed's difference is above 0 and their mean above ERRORS times its standard error, CONTRADICTED
    where the same holds below 0."""
    if len(differences) < 2:
        return OPEN
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= ERRORS * error:
        return NOT_SHOWN
    if all(difference > 0 for difference in differences):
        return SHOWN
    return CONTRADICTED if all(difference < 0 for difference in differences) else NOT_SHOWN


def row(comparison: Comparison, evaluated: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What is known of a comparison, from {seed: {stage: eval.json}}. Only seeds that have all of its arms count."""
    scores = {
        seed: {arm: score(comparison.score, stages[arm]) for arm in comparison.terms}
        for seed, stages in evaluated.items()
        if all(arm in stages for arm in comparison.terms)
    }
    differences = {seed: comparison.value(own) for seed, own in scores.items()}
    values = list(differences.values())
    several = len(values) > 1
    return {
        "claim": comparison.claim,
        "says": comparison.says,
        "score": comparison.score,
        "arms": {
            arm: {str(seed): round(own[arm], 3) for seed, own in scores.items()} for arm in comparison.terms
        },
        "weights": dict(comparison.terms),
        "differences": {str(seed): round(value, 3) for seed, value in differences.items()},
        "mean": round(statistics.mean(values), 3) if values else None,
        "standard_error": round(statistics.stdev(values) / math.sqrt(len(values)), 3) if several else None,
        "verdict": verdict(values),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each comparison of which at least one seed is done."""
    lines = [("", "claim", "score", "arms: each seed, mean ± spread", "difference: each seed, mean", "verdict"),
             ("---",) * 6]  # fmt: skip
    for each in rows:
        if not each["differences"]:
            continue
        arms = "; ".join(f"{arm} {_seeds(seeds.values())}" for arm, seeds in each["arms"].items())
        lines.append((each["claim"], each["says"], SHORT[each["score"]], arms, _seeds(each["differences"].values(),
                      sign="+"), each["verdict"]))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seeds(values: Any, sign: str = "") -> str:
    """Each seed's value and, where there are several, their mean and standard deviation."""
    numbers = list(values)
    each = " ".join(f"{value:{sign}.1f}" for value in numbers)
    if len(numbers) < 2:
        return each
    return f"{each}, mean {statistics.mean(numbers):{sign}.1f} ± {statistics.stdev(numbers):.1f}"
