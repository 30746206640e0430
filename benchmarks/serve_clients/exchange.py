"""One HTTP exchange over a socket of its own, byte for byte as the caller wants it: libraries send no lies."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple


class Reply(NamedTuple):
    status: int | None  # None: the server hung up without a word
    content: Any  # of JSON; else the text
    headers: dict[str, str]


def head(method: str, path: str, length: int | str | None, *more: str, kind: str = "application/json") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: bytes | dict[str, Any], *more: str, kind: str = "application/json") -> bytes:
    """A whole request; the server closes the connection behind it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("POST", path, len(data), "Connection: close", *more, kind=kind) + data


def get(path: str) -> bytes:
    return head("GET", path, None, "Connection: close")


def exchange(port: int, parts: Sequence[bytes], *, pause: float = 0.0, timeout: float = 180.0) -> Reply:
    """Sends the parts, `pause` seconds between them, and reads one answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            for number, part in enumerate(parts):
                if number:
                    time.sleep(pause)
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it need not read all; perhaps it has answered
        try:
            response = HTTPResponse(connection)
            response.begin()
            data = response.read()
        except (HTTPException, ConnectionError):
            return Reply(None, "", {})
    headers = {name.lower(): value for name, value in response.getheaders()}
    as_json = headers.get("content-type") == "application/json"
    return Reply(response.status, json.loads(data) if as_json else data.decode(), headers)


def ask(port: int, path: str, body: dict[str, Any] | None = None, timeout: float = 180.0) -> Reply:
    return exchange(port, [get(path) if body is None else post(path, body)], timeout=timeout)


def in_base64(*pictures: bytes) -> list[str]:
    return [base64.b64encode(data).decode() for data in pictures]
