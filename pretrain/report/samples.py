"""The sample pictures and captions of a stage as HTML. Paths and texts come from a file: neither is trusted."""

from __future__ import annotations

import base64
import difflib
import io
import re
from html import escape
from pathlib import Path

EMBED_AS_IT_IS = 48_000  # bytes; larger pictures are made smaller, so that the page stays light
SIDE_AT_MOST = 224
FILE_AT_MOST = 50_000_000
KINDS = ("masked", "retrieval")


def samples_html(directory: Path, samples: dict[str, list]) -> tuple[str, list[str]]:
    """-> the HTML, and one line for each thing that had to be left out."""
    problems: dict[str, None] = {}

    def picture(entry: dict, key: str, label: str) -> str:
        name = entry.get(key)
        if not isinstance(name, str):
            return ""
        data = _embed(directory, name)
        if data is None:
            problems[f"{name} is no picture of this stage; it is left out."] = None
            return ""
        return f'<img src="{data}" alt="{escape(label, quote=True)}" loading="lazy">'

    masked = "".join(_masked(entry, picture) for entry in samples.get("masked", []))
    hidden = any("masked" in entry or "masked_caption" in entry for entry in samples.get("masked", []))
    title = "Masked and predicted, on held-out data" if hidden else "Pictures, and what their codes keep of them"
    html = _fold(title, "shows", masked)
    for direction, title in (("text_to_image", "Text → image retrieval"), ("image_to_text", "Image → text retrieval")):
        entries = [entry for entry in samples.get("retrieval", []) if entry.get("direction") == direction]
        html += _fold(title, "queries", "".join(_query(entry, picture) for entry in entries))
    return html, list(problems)


def _fold(title: str, css: str, inner: str) -> str:
    return f'<details open><summary>{title}</summary><div class="{css}">{inner}</div></details>' if inner else ""


def _masked(entry: dict, picture) -> str:
    pictures = "".join(
        f"<div>{html}{label}</div>"
        for key, label in (("input", "picture"), ("masked", "hidden"), ("predicted", "predicted"))
        if (html := picture(entry, key, label))
    )
    caption, hidden, guess = (_text(entry, key) for key in ("caption", "masked_caption", "predicted_caption"))
    words = ""
    if caption:
        shown = re.sub(r"\[([^\[\]]*)\]", r"<mark>\1</mark>", escape(hidden)) if hidden else escape(caption)
        words += f"<li><small>text, hidden words marked</small>{shown}</li>"
    if guess:
        words += f"<li><small>filled in</small>{_compare(caption, guess) if caption else escape(guess)}</li>"
    trio = f'<div class="trio">{pictures}</div>' if pictures else ""
    return f'<div class="show">{trio}{f"<ul class=words>{words}</ul>" if words else ""}</div>' if trio or words else ""


def _compare(right: str, guess: str) -> str:
    """The guess, with the words that differ from the right ones underlined."""
    a, b = right.split(), guess.split()
    parts = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        words = escape(" ".join(b[start:stop]))
        if words:
            parts.append(words if tag == "equal" else f'<span class="off">{words}</span>')
    return " ".join(parts)


def _query(entry: dict, picture) -> str:
    results = [result for result in entry.get("results") or [] if isinstance(result, dict)]
    rank = entry.get("rank")
    rank_html = ""
    if isinstance(rank, int):
        rank_html = f'<span class="rank{" first" if rank == 1 else ""}">{"✓" if rank == 1 else "✗"} rank {rank}</span>'
    asked = picture(entry, "query_image", "query picture") or f"<span>{escape(_text(entry, 'query_text'))}</span>"
    by_picture = any(isinstance(result.get("image"), str) for result in results)
    items = ""
    for place, result in enumerate(results, start=1):
        right = result.get("right") is True
        label = f"{place}{' ✓' if right else ''}"
        text = _text(result, "text")
        inner = f"{picture(result, 'image', text)}{label}" if by_picture else f"<span>{label}</span>{escape(text)}"
        items += f"<li{' class=right' if right else ''}>{inner}</li>"
    css = "pictures" if by_picture else "texts"
    return f'<div class="query"><div class="ask">{asked}{rank_html}</div><ol class="results {css}">{items}</ol></div>'


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
