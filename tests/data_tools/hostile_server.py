"""A local web server with every kind of picture and of trouble that a list of URLs may lead to.

    with HostileServer() as server:
        server.url("jpg", 7), server.url("slow_drip", 8)

KINDS has the outcome of each: "success", or the reason that data_tools.fetch.reasons gives. The same kind and number
always give the same picture, and different numbers look different.
"""

from __future__ import annotations

import gzip
import socket
import socketserver
import threading
import time
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from tests.toys import black_png, encoded

GOOD = {
    **dict.fromkeys(("jpg", "png", "webp", "gif", "cmyk", "rgba", "gray16", "big", "redirect"), "success"),
    **dict.fromkeys(("wrong_type", "chunked", "no_length", "noai_for_others", "late"), "success"),
}
BAD = {
    "not_found": "http_404",
    "error": "http_500",
    "refused": "refused",
    "reset": "connection_lost",
    "truncated": "not_an_image",
    "short_body": "truncated",
    "html": "not_an_image",
    "empty": "not_an_image",
    "tiny": "too_small",
    "long": "extreme_aspect",
    "noai": "robots",
}
# Each of these would block a thread, fill the memory or reach a forbidden place.
ATTACKS = {
    "huge": "too_many_pixels",
    "many_scans": "too_many_scans",
    "slow_drip": "deadline",
    "slow_headers": "deadline",
    "endless": "too_many_bytes",
    "long_length": "too_many_bytes",
    "gzip_bomb": "not_an_image",
    "redirect_loop": "too_many_redirects",
    "redirect_private": "not_public_address",
    "redirect_metadata": "not_public_address",
    "redirect_file": "not_http",
    "private": "not_public_address",
    "metadata": "not_public_address",
    "any_address": "not_public_address",
    "credentials": "credentials_in_url",
    "file": "not_http",
    "data": "not_http",
    "ftp": "not_http",
}
KINDS = {**GOOD, **BAD, **ATTACKS}
_ELSEWHERE = {
    "private": "http://10.255.255.1/{}.jpg",
    "metadata": "http://169.254.169.254/latest/{}",
    "any_address": "http://0.0.0.0:{port}/jpg/{}",
    "credentials": "http://user:secret@127.0.0.1:{port}/jpg/{}",
    "file": "file:///etc/hostname?{}",
    "data": "data:image/png;base64,iVBORw0KGgo={}",
    "ftp": "ftp://127.0.0.1/{}.jpg",
    "refused": "http://127.0.0.1:{closed}/{}.jpg",
}


def caption(number: int) -> str:
    return f"picture number {number} of a thousand, painted by a machine"


@lru_cache(maxsize=4096)
def picture(number: int, form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] | None = None) -> bytes:
    """An encoded picture of coarse blotches: no two numbers have a similar perceptual hash."""
    random = np.random.default_rng(number)
    size = size or (int(random.integers(64, 200)), int(random.integers(64, 200)))
    blotches = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    if mode == "I;16":
        blotches = Image.fromarray(np.asarray(blotches.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        blotches = blotches.convert(mode)
    return encoded(blotches, form, **({"quality": 90} if form in ("JPEG", "WEBP") else {}))


@lru_cache(maxsize=1)
def huge() -> bytes:
    """900 million pixels in 100 kB: OpenCV's own limit lets them pass."""
    return black_png(30_000, 30_000, rows=30_000, bits=1)


def _many_scans(number: int) -> bytes:
    data = picture(number)
    # The same useless scan many times: for each a decoder processes the whole picture.
    return data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00" * 5000 + b"\xff\xd9"


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (part := self.request.recv(65_536)):
                return
            request += part
        path = urlsplit(request.split(b" ", 2)[1].decode("latin-1")).path
        kind, _, number = path.strip("/").partition("/")
        with self.server.lock:
            self.server.requests.append(path)
        with suppress(OSError):  # the guard hangs up
            if path in self.server.own:
                self._send(self.server.own[path], "image/jpeg")
            else:
                self._answer(kind, int("0" + "".join(filter(str.isdigit, number))))

    def _answer(self, kind: str, number: int) -> None:
        if (known := _bodies(kind, number)) is not None:
            self._send(*known)
        elif kind == "not_found":
            self._send(b"gone", status="404 Not Found")
        elif kind == "error":
            self._send(b"oh", status="500 Internal Server Error")
        elif kind == "late":
            time.sleep(0.1)
            self._send(picture(number), "image/jpeg")
        elif kind == "noai":
            self._send(picture(number), "image/jpeg", extra="X-Robots-Tag: noai\r\n")
        elif kind == "noai_for_others":
            self._send(picture(number), "image/jpeg", extra="X-Robots-Tag: otherbot: noai\r\n")
        elif kind.startswith("redirect"):
            place = {
                "redirect": f"/jpg/{number}",
                "redirect_loop": f"/redirect_loop/{number + 1}",
                "redirect_private": "http://192.168.255.1/a.jpg",
                "redirect_metadata": "http://169.254.169.254/latest/meta-data/",
                "redirect_file": "file:///etc/passwd",
            }[kind]
            self._send(b"moved", status="302 Found", extra=f"Location: {place}\r\n")
        else:
            self._attack(kind, number)

    def _attack(self, kind: str, number: int) -> None:
        head, body = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n", picture(number)
        if kind == "chunked":
            parts = (body[at : at + 1000] for at in range(0, len(body), 1000))
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            self.request.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        elif kind == "no_length":
            self.request.sendall(head + b"\r\n" + body)
        elif kind == "short_body":
            self.request.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
        elif kind == "long_length":
            self.request.sendall(head + b"Content-Length: 1000000000000\r\n\r\n" + body)
        elif kind == "endless":
            self.request.sendall(head + b"\r\n")
            while True:
                self.request.sendall(b"\0" * 65_536)
        elif kind == "slow_drip":
            self._drip(head + b"Content-Length: %d\r\n\r\n" % len(body), body)
        elif kind == "slow_headers":
            self._drip(b"", head + b"X: y\r\n" * 90 + b"\r\n" + body)
        # reset: just close the connection

    def _drip(self, at_once: bytes, slowly: bytes) -> None:
        self.request.sendall(at_once)
        for byte in slowly:
            self.request.sendall(bytes([byte]))
            time.sleep(0.05)

    def _send(self, body: bytes, type_: str = "text/html", status: str = "200 OK", extra: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {type_}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        self.request.sendall(head.encode() + body)


def _bodies(kind: str, number: int) -> tuple[bytes, str] | None:
    forms = {"png": ("PNG", "RGB"), "webp": ("WEBP", "RGB"), "gif": ("GIF", "P"), "cmyk": ("JPEG", "CMYK")}
    forms |= {"rgba": ("PNG", "RGBA"), "gray16": ("PNG", "I;16")}
    if kind in forms:
        return picture(number, *forms[kind]), f"image/{forms[kind][0].lower()}"
    if kind == "truncated":
        return picture(number, "PNG")[:60], "image/png"
    if kind == "gzip_bomb":
        return _gzip_bomb(), "image/jpeg\r\nContent-Encoding: gzip"
    if kind == "huge":
        return huge(), "image/png"
    bodies = {
        "jpg": lambda: picture(number),
        "wrong_type": lambda: picture(number),
        "big": lambda: picture(number, size=(800, 600)),
        "html": lambda: b"<html><body>please log in</body></html>",
        "empty": lambda: b"",
        "tiny": lambda: picture(number, size=(2, 2)),
        "long": lambda: picture(number, size=(2000, 40)),
        "many_scans": lambda: _many_scans(number),
    }
    return (bodies[kind](), "text/plain" if kind == "wrong_type" else "image/jpeg") if kind in bodies else None


@lru_cache(maxsize=1)
def _gzip_bomb() -> bytes:
    return gzip.compress(b"\0" * 50_000_000)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock, self.requests = threading.Lock(), list[str]()
        self.own: dict[str, bytes] = {}

    def handle_error(self, request, client_address) -> None: ...


class HostileServer:
    """Serves on 127.0.0.1 while the context is open. `requests` are the requested paths."""

    def __enter__(self) -> HostileServer:
        huge(), _gzip_bomb()  # in advance, because requests have a deadline
        self._server = _Server()
        self._closed = socket.socket()  # bound, but not listening
        self._closed.bind(("127.0.0.1", 0))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._closed.close()

    @property
    def requests(self) -> list[str]:
        with self._server.lock:
            return list(self._server.requests)

    def url(self, kind: str, number: int) -> str:
        assert kind in KINDS, kind
        if kind in _ELSEWHERE:
            return _ELSEWHERE[kind].format(number, port=self.port, closed=self._closed.getsockname()[1])
        return f"http://127.0.0.1:{self.port}/{kind}/{number}"

    def serve(self, name: str, body: bytes) -> str:
        """The URL of a test's own picture."""
        self._server.own[f"/own/{name}"] = body
        return f"http://127.0.0.1:{self.port}/own/{name}"
