"""Which language a caption is in: by py3langid, which needs no network (4.6 MB, about 40,000 captions a second)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Two words may be in ten languages. Below this share of the probability (over 140 languages) nothing is said.
SURE_FROM = 0.2
UNKNOWN = "und"  # ISO 639's code for a language that could not be told
HOW_TO_INSTALL = "pip install py3langid, or pip install '.[prepare]' in the checkout"

_MANY = 500  # characters that tell enough; the rest of a long text costs time only


def detector() -> Callable[[Iterable[str]], list[str]]:
    """texts -> their ISO 639-1 codes, UNKNOWN where no language is likely. Raises ValueError where py3langid is not
    installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError(f"py3langid, which tells the languages of texts, is not installed; {HOW_TO_INSTALL}") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE_FROM)

    def detect(texts: Iterable[str]) -> list[str]:
        # "zxx": no language at all, such as a row of digits
        codes = (identifier.classify(text[:_MANY])[0] for text in texts)
        return [UNKNOWN if code == "zxx" else code for code in codes]

    return detect


def language_code(text: str) -> str:
    """A language as lists name it ("EN", "en-US", " de ") -> "en", "de"."""
    return text.strip().lower().replace("_", "-").partition("-")[0]
