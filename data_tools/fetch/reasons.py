"""Why a download failed: the messages of urllib, img2dataset, the decoder and the guard -> a few names to count by."""

from __future__ import annotations

import re

SUCCESS = "success"
OTHER = "other"
_GUARD = re.compile(r"guard: (\w+)")
_HTTP = re.compile(r"HTTP Error (\d{3})")
# The first of these that occurs in a message (in lower case) gives the name.
_WORDS = (
    ("redirection to url", "not_http"),  # before the status code with which its message begins
    ("x-robots-tag", "robots"),
    ("timed out", "timeout"),
    ("image too small", "too_small"),
    ("image area too large", "too_many_pixels"),
    ("cv_io_max_image", "too_many_pixels"),
    ("pixels are more than the limit", "too_many_pixels"),  # these four before "image decoding error"
    ("decompression bomb", "too_many_pixels"),
    ("pixels have a side above the limit", "too_many_pixels"),
    ("mib to decode; at most", "too_many_pixels"),
    ("aspect ratio too large", "extreme_aspect"),
    ("image decoding error", "not_an_image"),
    ("opencv(", "not_an_image"),
    ("incompleteread", "truncated"),
    ("unknown url type", "not_http"),
    ("name or service not known", "dns"),
    ("temporary failure in name resolution", "dns"),
    ("no address associated", "dns"),
    ("nodename nor servname", "dns"),
    ("connection refused", "refused"),
    ("certificate", "tls"),
    ("ssl", "tls"),
    ("unreachable", "unreachable"),
    ("no route to host", "unreachable"),
    ("reset by peer", "connection_lost"),
    ("remote end closed", "connection_lost"),
    ("broken pipe", "connection_lost"),
    ("control characters", "bad_url"),
    ("no host given", "bad_url"),
    ("nonnumeric port", "bad_url"),
    ("invalid ipv6 url", "bad_url"),
    ("idna", "bad_url"),
    ("no browser takes", "bad_url"),
    ("codec can't encode", "bad_url"),
    ("got more than", "bad_response"),
    ("badstatusline", "bad_response"),
    ("invalid literal for int", "bad_response"),
)


def reason_of(message: str | None) -> str:
    """A short name for an error message; "success" for none."""
    if message is None or message == SUCCESS:
        return SUCCESS
    if guard := _GUARD.search(message):
        return guard[1]
    lower = message.lower()
    for words, name in _WORDS:
        if words in lower:
            return name
    status = _HTTP.search(message)
    return f"http_{status[1]}" if status else OTHER
