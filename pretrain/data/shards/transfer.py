"""The bytes of a remote file, from the command-line tool for its scheme: curl, aws, gsutil, or a command of the user's.

Each tool runs in a session of its own, so that all its processes can be ended; a transfer that stalls is ended, and no
message holds what may be secret. webdataset's `gopen` opens the rarer schemes.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple

from pretrain.data.pulse import beat

_CHUNK = 2**20
# A transfer slower than RATE over STALL_S has stalled. Time in which we do not read does not count.
STALL_S, RATE = 60.0, 64 * 2**10  # seconds, bytes per second
_TICK_S = 1.0  # the most that a single wait counts: the job may have been suspended meanwhile
_CURL = ("http", "https", "ftps", "sftp", "scp")
# curl has a limit of its own, by which it also ends if this process was killed during a transfer that stalls.
_CURL_OPTIONS = "--globoff --fail --silent --show-error --no-buffer --location --connect-timeout 30"
_CURL_OPTIONS += " --speed-limit 1 --speed-time 300"
_CURL_CODES = {
    3: "the URL is not valid",
    6: "the name of its host is not known",
    7: "its server does not take the connection",
    18: "the transfer was interrupted",
    28: "its server did not answer in time",
    35: "no secure connection could be made",
    47: "it redirects too often",
    52: "its server answered nothing",
    56: "the connection was lost",
    60: "its server's certificate is not valid",
}
_BUSY = (408, 425, 429)  # the HTTP errors below 500 that may pass by themselves
_CLOSED_EARLY = 141  # a shell's exit code, with pipefail, if the reader of a pipe closes it early
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")  # a word of a command, with its quoted parts
_FILE = re.compile(r"([\w.,+@~{}/-]*/)?[\w.,+@~{}*-]+\.[a-z0-9_]{1,12}|[\w.,+@~{}/-]*/")
_PASSWORD_WITH_SLASH = re.compile(r"[^/?#@]*:[^/?#@\d\]][^/?#@]*/.*@")


class ShardError(ValueError):
    """A shard that cannot be read at all; the message names the shard and the way out."""


class Unreachable(ShardError):
    """A shard whose store has trouble; a later attempt may succeed."""


class Refusal(ShardError):
    """A shard for which another attempt would fail too."""


def is_remote(url: str) -> bool:
    """Whether this is a URL or a pipe:COMMAND, and not a local path."""
    return url.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None


def redact(url: str) -> str:
    """For messages: the URL without user, password and query, which may be secrets; of a pipe only its program and
    file."""
    if url.startswith("pipe:"):
        words = [word.strip("'\"") for word in _WORD.findall(url[len("pipe:") :]) if "=" not in word.split("/")[0]]
        program, *words = [*words, ""]
        files = [redact(word) for word in words if is_remote(word)] or [word for word in words if _FILE.fullmatch(word)]
        return " ... ".join([f"pipe:{program}", *files[-1:]])
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    if _PASSWORD_WITH_SLASH.match(rest):
        rest = rest.rpartition("@")[2]
    place, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


class _Source(NamedTuple):
    file: Any  # the tool's output; or a plain file
    process: subprocess.Popen | None
    program: str


def chunks(url: str) -> Iterator[bytes]:
    """The file at `url` in parts of at most 1 MiB. ShardError if it cannot be fetched, is incomplete or stalls; a
    Refusal if another attempt would be useless."""
    source = _start(url)
    try:
        # A Pipe of webdataset has its stream inside.
        yield from _read(getattr(source.file, "stream", source.file).fileno(), url)
        if source.process is not None:
            _check_end(source.process, source.program, url)
    finally:
        _stop(source)


def _read(fd: int, url: str) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    waited, got = 0.0, 0  # seconds and bytes since the transfer last showed progress
    while True:
        beat()
        start = time.monotonic()
        ready = poll.poll(1000 * _TICK_S)
        waited += min(time.monotonic() - start, _TICK_S)
        data = os.read(fd, _CHUNK) if ready else None
        if data == b"":
            return
        got += len(data or b"")
        if got >= RATE * STALL_S:
            waited, got = 0.0, 0
        elif waited >= STALL_S:
            raise _failure(url, f"it stalled: {got} bytes came in {STALL_S:g} s", "check its server and the network")
        if data:
            yield data


def _start(url: str) -> _Source:
    scheme = url.partition(":")[0].lower()
    if scheme != "pipe" and "'" in url:  # webdataset 0.2 passes URLs to a shell in single quotes
        raise Refusal(f"the URL {redact(url)} contains a quote character; write it as %27")
    try:
        from webdataset.gopen import gopen, rewrite_url

        url = rewrite_url(url)
        command = _command(url)
        if command is None:
            stream = gopen(url, "rb")
            return _Source(stream, getattr(stream, "proc", None), f"the tool for {scheme}:")
        program = "its command" if scheme == "pipe" else command[0]
        error_stream = subprocess.PIPE if program == "curl" else None
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=none, stdout=pipe, stderr=error_stream, start_new_session=True)
        return _Source(process.stdout, process, program)
    except ShardError:
        raise
    except FileNotFoundError as error:
        # Only the tool's name: a message of a tool or library may hold the whole URL, or a header with a password.
        way_out = "check the URL, and install the command-line tool for it (curl, aws, gsutil)"
        raise _failure(url, f"{os.path.basename(str(error.filename))} is missing", way_out, Refusal) from None
    except (OSError, ValueError, AssertionError, ImportError) as error:
        why = f"{scheme}: cannot be opened here, {type(error).__name__}"
        raise _failure(url, why, "check the URL and the credentials", Refusal) from None


def _command(url: str) -> list[str] | None:
    """The command that writes the file to its output; None: webdataset's `gopen` opens this scheme."""
    from webdataset import utils
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0].lower()
    if not is_remote(url) or scheme in os.environ.get("USE_AIS_FOR", "").split(":"):
        return None
    if scheme == "pipe":
        if getattr(utils, "enforce_security", False):
            raise ValueError("WDS_SECURE forbids pipes")
        return ["/bin/sh", "-c", url[len("pipe:") :]]
    if scheme in _CURL:
        return ["curl", *_CURL_OPTIONS.split(), "--url", url]
    if scheme == "s3":
        return ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    if scheme == "gs":
        return ["gsutil", "cat", url]
    if scheme not in gopen_schemes and scheme != "file":
        raise _failure(url, f"no tool for {scheme}:// is known", "use https, s3, gs or pipe:COMMAND", Refusal)
    return None


def _check_end(process: subprocess.Popen, program: str, url: str) -> None:
    """Waits for the tool to end; raises ShardError if it fails."""
    code, end = None, time.monotonic() + STALL_S
    while code is None:
        beat()
        try:
            code = process.wait(_TICK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise _failure(url, f"{program} does not end", "check its server and the network") from None
    if code in (0, _CLOSED_EARLY):
        return
    if program != "curl":
        text = f"{program} ended with exit code {code}"
        raise _failure(url, text, "see its own message above, and check the URL and the credentials")
    message = process.stderr.read(2**16) if process.stderr is not None else b""
    answer = re.search(rb"returned error: (\d{3})", message)
    if code != 22 or answer is None:
        why = _CURL_CODES.get(code, f"curl ended with exit code {code}")
        raise _failure(url, why, "check the URL, its server and the network", Refusal if code == 3 else ShardError)
    status = int(answer[1])
    words = f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
    if status >= 500 or status in _BUSY:
        raise _failure(url, f"its server answered {words}", "the server has trouble; try again later")
    raise _failure(url, f"its server answered {words}", "check the URL and the credentials", Refusal)


def _failure(url: str, why: str, way_out: str, kind: type[ShardError] = ShardError) -> ShardError:
    return kind(f"cannot fetch {redact(url)} ({why}); {way_out}")


def _stop(source: _Source) -> None:
    """Ends the tool with all processes that it started."""
    process = source.process
    if process is not None and process.returncode is None:  # not reaped, so the number is still its own
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.wait()
    for stream in (source.file, None if process is None else process.stderr):
        if stream is not None:
            with suppress(OSError):  # webdataset's stream would raise an error that was already reported
                stream.close()
