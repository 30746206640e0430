"""URLs as browsers send them: lists hold what people typed, with blanks and letters of every script.

The rules are those of the WHATWG's URL standard, as far as lists need them. Standard library only: it runs in
img2dataset's environment.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote, unquote

_HTTP = re.compile(r"(https?:)[/\\]{2}([^/\\?#]*)([^?#]*)(\?[^#]*)?", re.IGNORECASE)
_BLANKS_AROUND = "".join(map(chr, range(0x21)))
# Left as they are, besides letters, digits and _.-~; a percent sign is that of a character which is encoded already.
_IN_PATH, _IN_QUERY = "!$%&'()*+,/:;=@[]|", "!$%&()*+,/:;=?@[]|\\^`{}"
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")
# In names of hosts: other forms of the full stop, and characters that have no effect.
_FULL_STOPS = dict.fromkeys(map(ord, "\u3002\uff0e\uff61"), ".")
_IGNORED = dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10)))


def as_browsers_send(url: str) -> str:
    """The URL in ASCII: the host by IDNA, path and query by UTF-8 and percent signs, without a fragment. What is
    encoded already stays. Other URLs than those of http and https stay as they are. Raises ValueError for a host that
    no browser takes."""
    found = _HTTP.match(url.strip(_BLANKS_AROUND).translate(dict.fromkeys(b"\t\r\n")))
    if found is None:
        return url
    scheme, place, path, query = found.groups(default="")
    user, at, place = place.rpartition("@")
    path = quote(path.replace("\\", "/"), safe=_IN_PATH, errors="replace")
    return f"{scheme}//{user}{at}{_ascii_place(place)}{path}{quote(query, safe=_IN_QUERY, errors='replace')}"


def _ascii_place(place: str) -> str:
    """HOST or HOST:PORT."""
    if place.isascii() and "%" not in place:
        return place
    host, colon, port = place.partition(":")
    return ascii_host(host) + colon + port


def ascii_host(host: str) -> str:
    """A host's name as name servers know it: bücher.example -> xn--bcher-kva.example. Raises ValueError if it has a
    character that no name may have."""
    name = unicodedata.normalize("NFKC", unquote(host, errors="replace").translate(_FULL_STOPS | _IGNORED))
    # Letter by letter, because a word's last sigma would become another letter.
    name = unicodedata.normalize("NFC", "".join(letter.lower() for letter in name))
    if "\ufffd" in name or _FORBIDDEN_IN_HOST.search(name):
        raise ValueError(f"the host {host[:100]!r} has a character that no browser takes")
    return ".".join(
        label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in name.split(".")
    )
