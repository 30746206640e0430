"""What is seen of a run on a terminal, and of Ctrl-C before it has begun."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest

from tests.small_run import ROOT
from tests.toys import wait_for

SHOW = """
from pretrain.run.display import Display
display = Display("vision", 0, 10)
display.show(5, {"loss": 1.25, "samples_per_s": 3.0, "data_wait": 0.0})
display.bar.update(5)
display.bar.refresh()
"""


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 0), (0, 100), (24, 100)])
def test_progress_is_seen_also_where_a_terminal_has_no_columns(rows, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    line = [sys.executable, "-c", SHOW]
    subprocess.run(line, stderr=theirs, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    os.close(theirs)
    text = ""
    try:
        while part := os.read(ours, 4096):
            text += part.decode()
    except OSError:  # the end of a terminal
        pass
    assert re.search(r"vision: +50%.*5/10.*loss 1\.25", text), repr(text)


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, delay):
    line = [sys.executable, "-v", "-m", "pretrain.train", "--recipe", "tiny", "--stage", "vision"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*line, "--ds", "x", "--run-dir", str(tmp_path)], stderr=file, cwd=ROOT)
        wait_for(lambda: b"import 'argparse'" in log.read_bytes())  # -v names each import
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    said = log.read_text(errors="replace")
    assert "Traceback" not in said and "stopped before the start" in said
