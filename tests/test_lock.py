"""pretrain.lock: one writer at a time, whatever locks the file system has."""

from __future__ import annotations

import errno
import fcntl
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import lock
from pretrain.lock import LOCK, Lock

HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from pretrain import lock

def none(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

lock.BEAT_S = 0.05
if sys.argv[2] == "none":
    fcntl.lockf = none
held = lock.Lock(Path(sys.argv[1]))
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that has the lock; `kind`: which locks its file system offers."""
    started = []

    def start(kind: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, kind], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("kind", ["kernel", "none", "for each node apart"])
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, monkeypatch, holder, kind):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "BEATS", 10)
    if kind == "none":
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    if kind == "for each node apart":
        monkeypatch.setattr(fcntl, "lockf", lambda *_: None)
        monkeypatch.setattr(socket, "gethostname", lambda: "another-node")
    host = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    first = holder(kind)
    says = (
        rf"is in use: process {first.pid} on {re.escape(host)} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC writes to it"
    )
    with pytest.raises(ValueError, match=says) as refused:
        Lock(tmp_path)
    assert "\n" not in str(refused.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    Lock(tmp_path).release()
    assert (tmp_path / LOCK).read_bytes() == b"", "released"


def test_a_released_lock_is_free_at_once_for_another_node(tmp_path, monkeypatch):
    Lock(tmp_path).release()
    monkeypatch.setattr(socket, "gethostname", lambda: "another-node")
    monkeypatch.setattr(Lock, "_alive", lambda *_: pytest.fail("there is nobody to wait for"))
    Lock(tmp_path).release()


def test_a_place_that_cannot_be_written_is_an_oserror(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Lock(tmp_path / "file" / "run")
    assert not list(Path("/proc/self/fd").glob(f"*{LOCK}"))
