"""Takes connections by uvicorn: a bounded number at a time, and none for long without a request's head. After SIGTERM
it takes no more, and answers the requests that it has."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pretrain.serving.gate import Gate, refusal_messages
from pretrain.serving.limits import HEAD_SECONDS, RETRY_AFTER, Limits, Refused

BACKLOG = 2048  # connections that the kernel holds until they are taken
KEEP_ALIVE_SECONDS = 20  # a connection may rest so long between requests


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that clients are refused until the model is loaded. ValueError where the
    address cannot be used."""
    if not 0 <= port < 2**16:  # getaddrinfo would silently use another port
        raise ValueError(f"--port {port} is no port; use {2**10} to {2**16 - 1}, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be used ({error.strerror}); take another") from None
    return listener


def serve(app: Gate, listener: socket.socket, limits: Limits, *, started: Callable[[], None] = lambda: None) -> None:
    """Answers requests until SIGTERM or Ctrl-C. Then it takes no more connections, answers the requests that it has,
    and returns. `started` is called when it listens."""
    server = Server(make_config(app, limits), started)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    try:
        server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def make_config(app: Gate, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings for the server."""

    class Bounded(Connection):
        most = limits.connections

    return uvicorn.Config(
        app,
        http=Bounded,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,  # /metrics counts requests
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(limits.seconds + limits.body_seconds) + 1,
    )


class Server(uvicorn.Server):
    """uvicorn's, which also calls `say_started` when it listens."""

    def __init__(self, config: uvicorn.Config, say_started: Callable[[], None]):
        super().__init__(config)
        self._say_started = say_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._say_started()


class Connection(H11Protocol):
    """uvicorn's, with what it lacks: it closes a connection without a request's head in time, and answers one above
    `most` with Retry-After."""

    most = Limits.connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            transport.write(_busy())
            transport.close()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request was there already
            self._expect_head(KEEP_ALIVE_SECONDS + HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self, seconds: float = HEAD_SECONDS) -> None:
        self._stop_waiting()
        self._head = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


def _busy() -> bytes:
    """The whole answer to a connection above the limit."""
    refusal = Refused(503, f"all connections are taken; come again in {RETRY_AFTER} s")
    start, body = refusal_messages(refusal, hang_up=True)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in start["headers"])
    return b"HTTP/1.1 503 Service Unavailable\r\n" + head + b"\r\n" + body["body"]
