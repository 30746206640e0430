"""Why a picture did not come: the messages of urllib, img2dataset, OpenCV and the guard -> a few names to count by."""

from __future__ import annotations

import re

SUCCESS = "success"
OTHER = "other"
_GUARD = re.compile(r"guard: (\w+)")
_HTTP = re.compile(r"HTTP Error (\d{3})")
# The first that is found in a message, in lower case, gives the name.
_WORDS = (
    ("redirection to url", "not_http"),  # before the status code that its message begins with
    ("x-robots-tag", "robots"),
    ("timed out", "timeout"),
    ("image too small", "too_small"),
    ("image area too large", "too_many_pixels"),
    ("cv_io_max_image", "too_many_pixels"),
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
    ("codec can't encode", "bad_url"),
    ("got more than", "bad_response"),
    ("badstatusline", "bad_response"),
    ("invalid literal for int", "bad_response"),
)


def reason_of(message: str | None) -> str:
    """A short name for an error message; "success" for none."""
    if message is None or message == SUCCESS:
        return SUCCESS
    if found := _GUARD.search(message):
        return found[1]
    lower = message.lower()
    found = _HTTP.search(message)
    other = f"http_{found[1]}" if found else OTHER
    return next((name for word, name in _WORDS if word in lower), other)
