"""The sample pictures and captions of a stage, for templates/samples.html. Paths and texts come from a file: neither is
trusted."""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

EMBED_AS_IT_IS = 48_000  # bytes; larger pictures are made smaller, so that the page stays light
SIDE_AT_MOST = 224  # pixels of a picture that was made smaller
FILE_AT_MOST = 50_000_000  # bytes; larger files are not read

# (an entry of samples.json, the key of a picture in it) -> a data URI; None where there is no such picture.
Picture = Callable[[dict, str], str | None]


def folds(directory: Path, samples: dict[str, list]) -> tuple[list[tuple[str, str, list]], list[str]]:
    """-> ([(title, "shows" or "queries", entries) of each group], [a line for each picture that had to be left
    out])."""
    problems: dict[str, None] = {}

    def picture(entry: dict, key: str) -> str | None:
        name = entry.get(key)
        if not isinstance(name, str):
            return None
        data = _embed(directory, name)
        if data is None:
            problems[f"{name} is no picture of this stage; it is left out."] = None
        return data

    entries = samples.get("masked", [])
    hidden = any("masked" in entry or "masked_caption" in entry for entry in entries)
    title = "Masked and predicted, on held-out data" if hidden else "Pictures, and what their codes keep of them"
    masked = [shown for entry in entries if any((shown := _masked(entry, picture)).values())]
    groups: list[tuple[str, str, list]] = [(title, "shows", masked)]
    for key, entries in samples.items():
        name = key.removeprefix("captions").removeprefix("/")
        if key.startswith("captions"):
            written = [_written(entry, picture) for entry in entries if isinstance(entry, dict)]
            groups.append((f"Captions of {name or 'held-out'} pictures", "shows", written))
    for direction, title in (("text_to_image", "Text → image retrieval"), ("image_to_text", "Image → text retrieval")):
        entries = [entry for entry in samples.get("retrieval", []) if entry.get("direction") == direction]
        groups.append((title, "queries", [_query(entry, picture) for entry in entries]))
    return [group for group in groups if group[2]], list(problems)


def _masked(entry: dict, picture: Picture) -> dict[str, list]:
    """`pictures`: (data URI, label) of each; `texts`: (label, [(piece, style sheet's class)]) of each."""
    labels = {"input": "picture", "masked": "hidden", "predicted": "predicted"}
    pictures = [(data, label) for key, label in labels.items() if (data := picture(entry, key))]
    caption, hidden, guess = (_text(entry, key) for key in ("caption", "masked_caption", "predicted_caption"))
    texts = []
    if caption:
        # re.split puts the words that stood in brackets into every second piece.
        pieces = re.split(r"\[([^\[\]]*)\]", hidden) if hidden else [caption]
        marked = [(piece, "hidden" if i % 2 else "") for i, piece in enumerate(pieces)]
        texts.append(("text, hidden words marked", marked))
    if guess:
        texts.append(("filled in", _compare(caption, guess) if caption else [(guess, "")]))
    return {"pictures": pictures, "texts": texts}


def _written(entry: dict, picture: Picture) -> dict[str, list]:
    """A caption that the model wrote beside those by people, in the form of `_masked`."""
    data = picture(entry, "input")
    texts = {"written here": _text(entry, "written"), "written by people": _text(entry, "references")}
    return {
        "pictures": [(data, "picture")] if data else [],
        "texts": [(about, [(text, "")]) for about, text in texts.items() if text],
    }


def _compare(right: str, guess: str) -> list[tuple[str, str]]:
    """The guess in pieces, each with "wrong" where it differs from the right words, else with ""."""
    a, b = right.split(), guess.split()
    pieces: list[tuple[str, str]] = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if start < stop:
            pieces += [(" ", "")] if pieces else []
            pieces.append((" ".join(b[start:stop]), "" if tag == "equal" else "wrong"))
    return pieces


def _query(entry: dict, picture: Picture) -> dict[str, Any]:
    """A retrieval query and its results, best first."""
    results = [result for result in entry.get("results") or [] if isinstance(result, dict)]
    rank = entry.get("rank")
    return {
        "picture": picture(entry, "query_image"),
        "text": _text(entry, "query_text"),
        "rank": rank if isinstance(rank, int) else None,
        "by_picture": any(isinstance(result.get("image"), str) for result in results),
        "results": [(picture(each, "image"), _text(each, "text"), each.get("right") is True) for each in results],
    }


def _text(entry: dict, key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _embed(directory: Path, name: str) -> str | None:
    """The picture as a data URI; None if it is outside the directory or not a PNG, JPEG or WebP."""
    root = directory.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file() or path.stat().st_size > FILE_AT_MOST:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    kind = _kind(data)
    if kind and len(data) > EMBED_AS_IT_IS:
        data, kind = _shrink(data), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if kind and data else None


def _kind(data: bytes) -> str | None:
    """The format by the file's first bytes: png, jpeg, webp, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _shrink(data: bytes) -> bytes:
    """A smaller JPEG of the picture; b"" if it cannot be decoded."""
    from PIL import Image

    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            small = picture.convert("RGB")
            small.thumbnail((SIDE_AT_MOST, SIDE_AT_MOST))
            small.save(out, format="JPEG", quality=88)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    return out.getvalue()
