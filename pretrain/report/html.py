"""Renders every HTML page from Jinja2 templates, as one file that needs no network.

Three measures keep text from outside mere text: the templates escape it, invisible characters become visible, and the
content security policy names the page's style sheet and script by their hashes, so that no other script would run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pretrain.visible import visible

TEMPLATES = Path(__file__).parent / "templates"


def render(template: Path, *, styles: Iterable[Path] = (), scripts: Iterable[Path] = (), **values: Any) -> str:
    """The page of a template that extends base.html, with its `values`. The templates that it includes lie beside it or
    in TEMPLATES. `styles` come after the style sheet of all pages."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _read([TEMPLATES / "style.css", *styles]), _read(scripts)
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {_source(style)}"
    policy += f"; script-src {_source(script)}" if script else ""
    inline = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    written = f"{datetime.now():%d %B %Y, %H:%M}"
    return environment.get_template(template.name).render(values | inline, written=written)


def _read(paths: Iterable[Path]) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def _source(text: str) -> str:
    """The name of a style sheet or a script in a content security policy: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
