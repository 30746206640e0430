"""What clients send by mistake or on purpose, each kind with the statuses that may answer it. None of them may cost the
server more than a refusal."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.serve_clients.exchange import head, in_base64, post
from pretrain.serving.limits import MAX_MARKS, Limits

GONE = None  # the connection may end without an answer


class Hostile(NamedTuple):
    name: str
    parts: Sequence[bytes]  # of one connection
    statuses: tuple[int | None, ...]
    pause: float = 0.0  # seconds between the parts


def hostile_requests(limits: Limits) -> list[Hostile]:
    """All kinds, against a server with these limits."""
    return [*_pictures(limits), *_bodies(limits), *_wires(limits)]


def _encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> bytes:
    noise, data = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).convert(mode).save(data, kind)
    return data.getvalue()


def _black_png(width: int, height: int, rows: int, color: int = 0) -> bytes:
    """A PNG of few bytes that promises width x height pixels (`color` 0: grey, 6: RGBA) and has some rows of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = bytes(1 + width * (4 if color == 6 else 1))
    pack = zlib.compressobj(9)
    packed = b"".join(pack.compress(line) for _ in range(rows)) + pack.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _pictures(limits: Limits) -> list[Hostile]:
    jpeg, png, webp = _encoded("JPEG"), _encoded("PNG"), _encoded("WEBP")
    side = int(limits.pixels**0.5) + 1
    files = {
        "empty": b"",
        "web page": b"<!doctype html><title>404</title>",
        "noise": np.random.default_rng(2).bytes(3000),
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "half a PNG": png[: len(png) // 2],
        "half a WebP": webp[: len(webp) // 2],
        "head of a JPEG": b"\xff\xd8\xff\xe0 broken",
        "GIF": _encoded("GIF"),
        "TIFF": _encoded("TIFF"),
        "BMP": _encoded("BMP"),
        "bomb of 900 megapixels": _black_png(30_000, 30_000, 300),
        "one pixel more than the limit": _black_png(side, side, 0),
        "wide as 60 million": _black_png(60_000_000, 1, 0),
        "high as 60 million": _black_png(1, 60_000_000, 0),
        "transparent and large": _black_png(8000, 8000, 0, color=6),
    }
    texts = {"path": "/etc/passwd", "address": "http://127.0.0.1:22/a.jpg", "data URI": "data:image/png;base64,AAAA"}
    texts |= {"no base64": "*" * 64, "beyond ASCII": "ä" * 64, "half a surrogate": "\ud800"}
    made = [Hostile(name, [_ask("/embed", pictures=in_base64(data))], (400,)) for name, data in files.items()]
    made += [Hostile(name, [_ask("/embed", pictures=[text])], (400,)) for name, text in texts.items()]
    good_and_bad = [Hostile("one of three broken", [_ask("/caption", pictures=in_base64(jpeg, b"no", jpeg))], (400,))]
    return [*made, *good_and_bad]


def _ask(path: str, **fields: object) -> bytes:
    return post(path, json.dumps(fields).encode())


def _bodies(limits: Limits) -> list[Hostile]:
    path, many = "/embed", MAX_MARKS + 5
    jpeg = in_base64(_encoded("JPEG"))
    bodies: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "no body": (b"", (400,)),
        "no JSON": (b"pictures=1", (400,)),
        "half JSON": (b'{"texts": ["a', (400,)),
        "not UTF-8": (b'{"texts": ["\xff\xfe"]}', (400,)),
        "a list": (b"[]", (400,)),
        "null": (b"null", (400,)),
        "a number for a text": (b'{"texts": [1]}', (400,)),
        "a text for a list": (b'{"texts": "a red bus"}', (400,)),
        "null for a list": (b'{"pictures": null}', (400,)),
        "an object for a picture": (b'{"pictures": [{"path": "/etc/passwd"}]}', (400,)),
        "an unknown field": (b'{"texts": [], "url": "http://127.0.0.1"}', (400,)),
        "half a surrogate for a field": (b'{"\\ud800\\u0007": 1}', (400,)),
        "half a surrogate for a text": (b'{"texts": ["\\ud800"]}', (200, 400)),
        "a number of a million digits": (b'{"texts": [' + b"1" * 10**6 + b"]}", (400,)),
        "nested without end": (b"[" * 10**5, (413,)),
        "nested in the limit": (b'{"texts": ' + b"[" * (MAX_MARKS // 2) + b"]" * (MAX_MARKS // 2) + b"}", (400,)),
        "many numbers": (b'{"texts": [' + b"0," * many + b"0]}", (413,)),
        "many fields": (b"{" + b",".join(b'"%d":0' % n for n in range(many // 2)) + b"}", (413,)),
        "fields in the limit": (b"{" + b",".join(b'"%d":0' % n for n in range(MAX_MARKS // 2 - 5)) + b"}", (400,)),
        "many texts": (json.dumps({"texts": ["a"] * (limits.texts + 1)}).encode(), (400,)),
        "many pictures": (json.dumps({"pictures": jpeg[:1] * (limits.pictures + 1)}).encode(), (400, 413)),
        "a long text": (json.dumps({"texts": ["a" * (limits.characters + 1)]}).encode(), (400,)),
    }
    made = [Hostile(name, [post(path, body)], statuses) for name, (body, statuses) in bodies.items()]
    best = post("/predict", {"pictures": jpeg, "names": ["a"], "best": 10**30})
    return [
        *made,
        Hostile("best of 10^30", [best], (200, 400)),
        Hostile("best below 1", [post("/predict", {"pictures": jpeg, "names": ["a"], "best": 0})], (400,)),
        Hostile("half a surrogate for a name", [post("/predict", {"pictures": jpeg, "names": ["\ud800"]})], (200, 400)),
        Hostile("no names", [post("/predict", {"pictures": jpeg, "names": []})], (400,)),
        Hostile("a form", [post(path, b"--x\r\n", kind="multipart/form-data; boundary=x")], (415,)),
        Hostile("huge JSON", [post(path, b'{"texts": ["' + b"a" * limits.body + b'"]}')], (413, GONE)),
    ]


def _wires(limits: Limits) -> list[Hostile]:
    body = b'{"texts": ["a"]}'
    late = limits.body_seconds * 1.5
    slow = [head("POST", "/embed", len(body), "Connection: close"), *(body[n : n + 1] for n in range(len(body)))]
    chunked = "Transfer-Encoding: chunked"
    endless = head("POST", "/embed", None, chunked) + (b"10000\r\n" + b"a" * 0x10000 + b"\r\n") * (
        limits.body // 0x10000 + 2
    )
    return [
        Hostile("Content-Length above the body", [head("POST", "/embed", len(body) + 9) + body], (408,)),
        Hostile("Content-Length below the body", [head("POST", "/embed", 5) + body], (400,)),
        Hostile("Content-Length of 10^15", [head("POST", "/embed", 10**15) + body], (413, GONE)),
        Hostile("Content-Length of 10^30", [head("POST", "/embed", 10**30) + body], (400, 413, GONE)),
        Hostile("Content-Length below 0", [head("POST", "/embed", -1) + body], (400,)),
        Hostile("Content-Length that is a word", [head("POST", "/embed", "many") + body], (400,)),
        Hostile("two lengths", [head("POST", "/embed", 5, "Content-Length: 50") + body], (400,)),
        Hostile("endless chunks", [endless], (413, GONE)),
        Hostile("broken chunks", [head("POST", "/embed", None, chunked) + b"zz\r\n"], (400, 408, GONE)),
        Hostile("slow body", slow, (408, GONE), pause=late / len(body)),
        Hostile("no HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n"], (400, GONE)),
        Hostile("a head without end", [b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 40_000], (400, GONE)),
        Hostile("another method", [head("DELETE", "/embed", 0, "Connection: close")], (405,)),
        Hostile("another path", [head("GET", "/../../etc/passwd", None, "Connection: close")], (404,)),
        Hostile("a WebSocket", [head("GET", "/embed", None, "Connection: upgrade", "Upgrade: websocket")], (405, 400)),
    ]
