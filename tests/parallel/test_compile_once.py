"""Extensions are compiled by one process at a time, and a kill leaves no lock for which all others wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from pretrain.parallel.compile_once import one_compiles


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "some_op"


def _killed_while_it_compiles(folder: Path) -> None:
    with one_compiles("some_op"):
        assert FileBaton(str(folder / "lock")).try_acquire()  # as torch's load does
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_killed_process_is_taken_away(folder):
    process = multiprocessing.get_context("fork").Process(target=_killed_while_it_compiles, args=(folder,))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL and (folder / "lock").exists()
    with one_compiles("some_op"):
        assert FileBaton(str(folder / "lock")).try_acquire(), "torch would wait for ever"


def test_the_lock_of_another_program_stays(folder):
    with one_compiles("some_op"):
        pass
    (folder / "lock").touch()
    with one_compiles("some_op"):
        assert (folder / "lock").exists()


def test_one_at_a_time(folder):
    inside, most = [0], [0]

    def compile_() -> None:
        with one_compiles("some_op"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=compile_) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
