"""Detects the language of captions with py3langid, which needs no network (4.6 MB, about 40,000 captions/s)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Two words may be valid in ten languages. Below this probability (over 140 languages) the answer is UNKNOWN.
SURE_FROM = 0.2
UNKNOWN = "und"  # ISO 639's code for an undetermined language
HOW_TO_INSTALL = "pip install py3langid, or pip install '.[prepare]' in the checkout"

_ENOUGH = 500  # characters; more of a text costs only time


def detector() -> Callable[[Iterable[str]], list[str]]:
    """A function texts -> their ISO 639-1 codes, UNKNOWN where no language is likely. Raises ValueError if py3langid is
    not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError(f"py3langid, which detects languages, is not installed; {HOW_TO_INSTALL}") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE_FROM)

    def detect(texts: Iterable[str]) -> list[str]:
        # "zxx": no language at all, such as a row of digits
        codes = (identifier.classify(text[:_ENOUGH])[0] for text in texts)
        return [UNKNOWN if code == "zxx" else code for code in codes]

    return detect


def language_code(text: str) -> str:
    """A language as lists name it ("EN", "en-US", " de ") -> "en", "de"."""
    return text.strip().lower().replace("_", "-").partition("-")[0]
