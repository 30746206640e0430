"""One Ctrl-C ends a command within a second or two, with one line and 130, and nothing half-written stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.command import run  # noqa: F401  for the process that a test starts
from pretrain.files import written_in_one_step
from pretrain.workers import worker_pool
from tests.small_run import ROOT
from tests.toys import wait_for

AT_MOST_S = 10.0  # on a machine that does other things too; what is interrupted would take a minute


def start(line: list[str], place: Path, *more: Path) -> subprocess.Popen:
    paths = os.pathsep.join(map(str, (*more, ROOT)))
    return subprocess.Popen(
        line, cwd=place, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True, process_group=0
    )


def press_ctrl_c(process: subprocess.Popen) -> tuple[int, str]:
    """As a terminal does, to every process of the group; -> exit code and what was said."""
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - pressed < AT_MOST_S
    return process.returncode, said


@pytest.mark.parametrize(
    "name", ["data_tools.train_text_tokenizer", "data_tools.index", "pretrain.evaluate", "pretrain.train"]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, name):
    (tmp_path / "numpy.py").write_text(
        "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    process = start([sys.executable, "-m", name], tmp_path, tmp_path)
    assert process.stderr is not None and process.stderr.readline() == "importing\n"
    assert press_ctrl_c(process) == (130, "stopped before the start\n")


def test_ctrl_c_while_sentencepiece_trains_leaves_no_file(tmp_path):
    words = (f"{n * 7919 % 99991:x}{n:x} {n * 31 % 997:x}" for n in range(200_000))
    (tmp_path / "texts.txt").write_text("\n\n".join(words))
    line = [sys.executable, "-m", "data_tools.train_text_tokenizer", "texts.txt"]
    line += ["--vocab-size", "8000", "--out", "out/m"]
    process = start(line, tmp_path)
    assert process.stderr is not None and process.stderr.readline().startswith("read ")  # now its C++ is at work
    code, said = press_ctrl_c(process)
    assert code == 130 and said == "stopped; nothing was written\n"
    assert list((tmp_path / "out").iterdir()) == []


def grow(path: Path) -> None:
    with written_in_one_step(path) as growing:
        growing.write_bytes(b"half")
        Path(f"{path}.begun").touch()
        time.sleep(60)


def work() -> int:
    with worker_pool(2) as pool:
        return len([*pool.map(grow, [Path("out", str(number)) for number in range(9)])])


def test_ctrl_c_while_workers_write_leaves_no_file(tmp_path):
    (tmp_path / "out").mkdir()
    code = "import sys; from tests.test_interrupt import run, work; sys.exit(run(work, state='x'))"
    process = start([sys.executable, "-c", code], tmp_path)
    wait_for(lambda: len(list((tmp_path / "out").glob("*.begun"))) == 2)
    assert press_ctrl_c(process) == (130, "stopped; x\n")
    assert all(path.name.endswith(".begun") for path in (tmp_path / "out").iterdir())
