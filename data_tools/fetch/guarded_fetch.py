"""Safe fetching from untrusted servers: what urllib opens inside img2dataset's workers, and where it connects.

`install` replaces urllib's opener with one that supports only http and https, connects to exactly the address that it
checked (so neither redirects nor DNS tricks get past it), ignores proxies, and limits a request's time and bytes. It
needs no thread and no second request per picture. Standard library only: it runs in img2dataset's environment.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from data_tools.fetch.addresses import NOT_PUBLIC, check_networks, why_not
from data_tools.fetch.urls import as_browsers_send

# A progressive JPEG has about ten scans. Thousands would each cost a pass over all its pixels.
MAX_SCANS = 100
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_READ = 2**16
_ADDRESSES = 16  # of a host, in a message


class Refused(OSError):
    """A request that the guard stopped. The first word of the message is the reason."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"guard: {reason} {detail}".strip())


@dataclass(frozen=True)
class Limits:
    """The limits of one request."""

    max_bytes: int = 20 * 2**20  # of a body
    deadline: float = 30.0  # seconds, including redirects
    max_redirects: int = 5
    allow: tuple[str, ...] = ()  # networks that are allowed though they are not public
    refuse: tuple[str, ...] = ()  # networks that are refused, even where `allow` has them

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("deadline", 0.01), ("max_redirects", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"--{name.replace('_', '-')}={getattr(self, name)} is below {least}; use {least} or more"
                )
        check_networks("--allow-address", self.allow)
        check_networks("--refuse-address", self.refuse)


class _Deadline:
    """The end of a request's time, and its number of redirects; a request shares it with its redirects."""

    __slots__ = ("at", "redirects", "step")

    def __init__(self, seconds: float, step: float):
        self.at, self.step, self.redirects = time.monotonic() + seconds, step, 0

    def remaining(self) -> float:
        """Seconds for the next operation. Raises Refused if there are none."""
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise Refused("deadline")
        return min(seconds, self.step)


class _Timed:
    """Limits each read and write to the remaining time: a slow drip of bytes would renew a plain timeout forever."""

    deadline: _Deadline

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self.deadline.remaining())  # type: ignore[attr-defined]
        try:
            return super().recv_into(*args)  # type: ignore[misc]
        except TimeoutError:
            self.deadline.remaining()  # raises if it was the deadline that ended this read
            raise

    def sendall(self, *args: Any) -> None:
        self.settimeout(self.deadline.remaining())  # type: ignore[attr-defined]
        super().sendall(*args)  # type: ignore[misc]


class _Socket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    pass


def _connect(host: str, port: int, deadline: _Deadline, limits: Limits) -> _Socket:
    """Connects to one of the host's addresses. The name is looked up once, so the checked address is the one used."""
    failure: OSError | None = None
    refused: dict[str, str] = {}  # address -> reason
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if reason := why_not(str(place[0]), limits.allow, limits.refuse):
            refused[str(place[0])] = reason
            continue
        sock = _Socket(family, kind, protocol)
        sock.deadline = deadline
        try:
            sock.settimeout(deadline.remaining())
            sock.connect(place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            failure = error
            if isinstance(error, Refused):
                break
    # All addresses: when the options change, they say which rows to try again.
    raise failure or Refused(next(iter(refused.values()), NOT_PUBLIC), ",".join([*refused][:_ADDRESSES]))


class _Response(http.client.HTTPResponse):
    """A body of at most `limit` bytes."""

    limit: int

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        if self.length is not None and self.length > self.limit:
            raise Refused("too_many_bytes", self.length)
        parts: list[bytes] = []
        size = 0
        # In parts, because asking for `limit` bytes at once would allocate them.
        while part := super().read(self.length if self.length else min(_READ, self.limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if size > self.limit:
                raise Refused("too_many_bytes", f"over {self.limit}")
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.length:  # fewer bytes than announced: as in urllib
            raise http.client.IncompleteRead(data, self.length)
        if data.startswith(_JPEG) and data.count(_SCAN) > MAX_SCANS:
            raise Refused("too_many_scans", data.count(_SCAN))
        return data


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, deadline: _Deadline, limits: Limits, **kwargs: Any):
        super().__init__(host, **kwargs)
        self.deadline, self.limits = deadline, limits
        self.response_class = partial(_response, limits.max_bytes)  # type: ignore[assignment]

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.deadline, self.limits)


class _TlsConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        plain = self.sock
        try:
            plain.settimeout(self.deadline.remaining())
            # This timeout limits the handshake as a whole.
            tls = _tls().wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
            tls.deadline = self.deadline  # type: ignore[attr-defined]
            self.sock = tls
            tls.do_handshake()
        except BaseException:
            self.sock.close()
            plain.close()
            raise


def _response(limit: int, *args: Any, **kwargs: Any) -> _Response:
    response = _Response(*args, **kwargs)
    response.limit = limit
    return response


@lru_cache(1)
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context


class _Handler(urllib.request.AbstractHTTPHandler):
    """http and https, guarded."""

    def __init__(self, limits: Limits):
        super().__init__()
        self.limits = limits

    def _open(self, connection: Callable[..., _Connection], request: urllib.request.Request):
        if "@" in (request.host or ""):
            raise Refused("credentials_in_url")
        deadline = getattr(request, "deadline", None)
        if deadline is None:
            step = request.timeout if isinstance(request.timeout, int | float) else self.limits.deadline
            deadline = request.deadline = _Deadline(self.limits.deadline, step)  # type: ignore[attr-defined]
        return self.do_open(connection, request, deadline=deadline, limits=self.limits)

    def http_open(self, request: urllib.request.Request):
        return self._open(_Connection, request)

    def https_open(self, request: urllib.request.Request):
        return self._open(_TlsConnection, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Limits the redirects of a request, which share its deadline."""

    max_redirections = max_repeats = 1000  # urllib's own limits, above any of ours

    def __init__(self, most: int):
        self.most = most

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        req.deadline.redirects += 1
        if req.deadline.redirects > self.most:
            raise Refused("too_many_redirects", f"over {self.most}")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.deadline = req.deadline  # type: ignore[attr-defined]
        return new


class _Opener(urllib.request.OpenerDirector):
    """Opens URLs, those of redirects too, as browsers send them; http.client takes only ASCII without blanks."""

    def open(self, fullurl, *args, **kwargs):
        if isinstance(fullurl, str):
            fullurl = urllib.request.Request(as_browsers_send(fullurl))
        else:
            fullurl.full_url = as_browsers_send(fullurl.full_url)
        return super().open(fullurl, *args, **kwargs)


def opener(limits: Limits) -> urllib.request.OpenerDirector:
    """urllib's opener without proxies, files, ftp and data: URLs; its connections obey `limits`."""
    director = _Opener()
    for handler in (
        _Handler(limits),
        _Redirects(limits.max_redirects),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        director.add_handler(handler)
    return director


def install(limits: Limits) -> None:
    """Makes urllib.request.urlopen obey `limits` in this process from now on."""
    urllib.request.install_opener(opener(limits))
