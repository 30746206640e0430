"""Stands before the ASGI application: it bounds bodies before anything is made of them, gives every request a deadline,
and counts every answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from pretrain.serving.counts import Counts
from pretrain.serving.limits import MAX_MARKS, RETRY_AFTER, Deadline, Limits, Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OTHER = "other"  # the path under which requests for unknown paths are counted


class Gone(Exception):
    """The client went away before its body was there."""


class Answer:
    """The answer to one client. Once it is closed, whatever is still sent is dropped."""

    def __init__(self, send: Send):
        self._send, self.status, self.closed = send, 0, False

    async def send(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, refusal: Refused, *, hang_up: bool = False) -> None:
        """Sends the refusal, unless an answer has begun. `hang_up`: the connection is closed after it, since part of
        the body was not read and no other request can follow."""
        if self.status or self.closed:
            return
        start, body = refusal_messages(refusal, hang_up=hang_up)
        await self.send(start)
        await self.send(body)


class Gate:
    """An ASGI application around `app`, which gets the body in one piece and the Deadline as `request.state.deadline`.
    `paths`: those of the routes of `app`."""

    def __init__(self, app: App, limits: Limits, counts: Counts, paths: Collection[str]):
        self.app, self.limits, self.counts, self.paths = app, limits, counts, paths
        self.held = 0  # bytes of all bodies that are held
        self._running: set[asyncio.Task] = set()  # also those whose client was refused meanwhile or went away

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline, answer = Deadline(self.limits.seconds), Answer(send)
        try:
            body = await self._read(scope, receive)
            task = asyncio.create_task(self._run(scope, body, deadline, answer))
        except Refused as refusal:
            await answer.refuse(refusal, hang_up=True)
        except Gone:
            return
        else:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await self._wait(task, receive, deadline, answer)
        finally:
            path = scope["path"] if scope["path"] in self.paths else OTHER
            self.counts.answered(path, answer.status or 499, time.monotonic() - deadline.begin)

    async def _read(self, scope: Message, receive: Receive) -> bytes:
        """The body, whose bytes count as held until `_run` ends. Raises Refused for a body over a limit, of another
        type or not there in time, and Gone."""
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").startswith(b"application/json"):
            raise Refused(415, "the body must be JSON; send Content-Type: application/json")
        if (declared := headers.get(b"content-length", b"0")).isdigit() and int(declared) > self.limits.body:
            raise Refused(413, self._too_large())
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    body += part
                    self.held += len(part)
                    if len(body) > self.limits.body:
                        raise Refused(413, self._too_large())
                    if self.held > self.limits.bodies:
                        raise Refused(503, "the server holds as many bodies as it can; come again")
                    if not message.get("more_body", False):
                        break
            if sum(body.count(mark) for mark in b",:[{") > MAX_MARKS:
                raise Refused(
                    413, f"the body has more than {MAX_MARKS:,} commas, colons and brackets; send less at once"
                )
        except TimeoutError:
            self.held -= len(body)
            raise Refused(408, f"the body was not there after {self.limits.body_seconds:g} seconds") from None
        except BaseException:
            self.held -= len(body)
            raise
        return bytes(body)

    def _too_large(self) -> str:
        return (
            f"the body is larger than the limit of {self.limits.body:,} bytes; send fewer or smaller pictures at once"
        )

    async def _run(self, scope: Message, body: bytes, deadline: Deadline, answer: Answer) -> None:
        """The application's work on one request."""
        parts = [body]

        async def replay() -> Message:
            if not parts:  # whoever asks again waits for the end of the connection, which `_wait` sees
                await asyncio.Event().wait()
            return {"type": "http.request", "body": parts.pop(), "more_body": False}

        try:
            state = scope.setdefault("state", {}) | {"deadline": deadline}
            await self.app({**scope, "state": state}, replay, answer.send)
        finally:
            self.held -= len(body)

    async def _wait(self, task: asyncio.Task, receive: Receive, deadline: Deadline, answer: Answer) -> None:
        """Waits until the task is done, the deadline passes or the client goes away, and closes the answer in the last
        two cases. The task is never cancelled: its threads would go on anyway, and count as work until they end."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({task, gone}, timeout=deadline.left(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if task.done():
            task.result()  # the application's own errors go on to the server's log
            return
        passed = Refused(504, "the answer was not ready in time; send less at once, or later")
        if not gone.done() or gone.cancelled():
            await answer.refuse(passed)
        answer.closed = True
        deadline.now()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal_messages(refusal: Refused, *, hang_up: bool = False) -> tuple[Message, Message]:
    """The refusal as the two ASGI messages of an answer: its start and its body."""
    data = json.dumps({"error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if refusal.status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    if hang_up:
        headers.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
    return start, {"type": "http.response.body", "body": data}
