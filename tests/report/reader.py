"""Reads a page back, and checks what has to hold of every page: it stands alone, and strangers' text is only text."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

EVIL = '<script>alert(1)</script>"><img src=x onerror="alert(2)">\u202e\0\x1b[31m</style>&'
SHOWN = EVIL.translate(dict.fromkeys(map(ord, "\u202e\0\x1b"), "\ufffd"))


class Reader(HTMLParser):
    """Collects tags, text, and what is inline, and fails on tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.inline: dict[str, str] = {"style": "", "script": ""}
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.inline:
            self.inline[self.open[-1]] += data
        else:
            self.text += data + " "


def check_inert(html: str) -> Reader:
    page = Reader(html)
    assert [tag for tag, _ in page.tags[:4]] == ["html", "head", "meta", "meta"]
    policy = page.tags[3][1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.split(None, 1) for rule in policy["content"].split("; "))
    hashes = {f"{tag}-src": _hash(text) for tag, text in page.inline.items() if text}
    none = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert rules == none | {"img-src": "data:"} | hashes
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "form")
        assert not [name for name in attributes if name == "style" or name.startswith("on")], attributes
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), attributes
    for tag, text in page.inline.items():
        assert [name for name, _ in page.tags].count(tag) == bool(text)
    assert not re.search(r"https?:|url\(", html) and html.replace("\n", "").isprintable() and SHOWN in page.text
    return page


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
