"""BLEU, ROUGE-L, METEOR and SPICE of captions, by pycocoevalcap (an optional dependency). METEOR and SPICE are Java
programs, and SPICE also needs Stanford's models, which are never downloaded here.

Texts are prepared as for CIDEr, in lower case and without punctuation (data/cider.py), where pycocoevalcap's own
command calls Stanford's tokenizer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.cider import words_of

METRICS = ("BLEU", "ROUGE", "METEOR", "SPICE")
MODELS = tuple(f"lib/stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models"))  # of SPICE
Texts = Mapping[int, list[str]]


class Missing(Exception):
    """Why a metric cannot be computed, as a sentence with the way out."""


def coco_metrics(
    names: Sequence[str], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float | str | None]:
    """{"captions/BLEU-4": percent, ...} for `names`, some of METRICS. A metric that cannot be computed is None, and
    captions/NAME/missing says why."""
    given = {number: [" ".join(words_of(text)) for text in texts] for number, texts in enumerate(references)}
    own = {number: [" ".join(words_of(text))] for number, text in enumerate(captions)}
    values: dict[str, float | str | None] = {}
    for name in names:
        try:
            values |= {f"captions/{key}": 100 * value for key, value in SCORERS[name](given, own).items()}
        except Missing as error:
            values |= {f"captions/{name}": None, f"captions/{name}/missing": str(error)}
    return values


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed; pip install '.[captions]'") from None


def _java(name: str) -> None:
    if shutil.which("java") is None:
        raise Missing(f"{name} is a Java program and there is no java on PATH; install a Java runtime (8 or newer)")


def _bleu(given: Texts, own: Texts) -> dict[str, float]:
    with _installed():
        from pycocoevalcap.bleu.bleu import Bleu
    scores, _ = Bleu(4).compute_score(given, own, verbose=0)
    return {f"BLEU-{n}": score for n, score in enumerate(scores, 1)}


def _rouge(given: Texts, own: Texts) -> dict[str, float]:
    with _installed():
        from pycocoevalcap.rouge.rouge import Rouge
    return {"ROUGE-L": float(Rouge().compute_score(given, own)[0])}


def _meteor(given: Texts, own: Texts) -> dict[str, float]:
    with _installed():
        from pycocoevalcap.meteor.meteor import Meteor
    _java("METEOR")
    try:
        return {"METEOR": Meteor().compute_score(given, own)[0]}
    except (OSError, ValueError) as error:  # it died, or printed no number
        raise Missing(f"java ran METEOR and it failed ({error}); it needs 2 GB of memory") from None


def _spice(given: Texts, own: Texts) -> dict[str, float]:
    with _installed():
        from pycocoevalcap.spice.spice import Spice
    _java("SPICE")
    folder = Path(str(sys.modules[Spice.__module__].__file__)).parent
    if not all((folder / name).is_file() for name in MODELS):
        raise Missing(
            f"SPICE needs {' and '.join(MODELS)} of Stanford CoreNLP in {folder}; put them there, as python "
            "-m pycocoevalcap.spice.get_stanford_models does with a network"
        )
    try:
        return {"SPICE": float(Spice().compute_score(given, own)[0])}
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Missing(f"java ran SPICE and it failed ({error}); it needs 8 GB of memory and Java 8") from None


SCORERS: dict[str, Callable[[Texts, Texts], dict[str, float]]] = dict(
    zip(METRICS, (_bleu, _rouge, _meteor, _spice), strict=True)
)
