"""pretrain.command: how commands end; and that the example in each command's help works."""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from os import strerror
from pathlib import Path

import pytest

import data_tools
from data_tools import sample_corpus
from pretrain.command import run

PLACE = Path(data_tools.__file__).parent
HELPERS = ("__init__", "ownership")
TOOLS = sorted(f"data_tools.{path.stem}" for path in PLACE.glob("*.py") if path.stem not in HELPERS)
COMMANDS = ["pretrain.caption", "pretrain.encode_images", "pretrain.evaluate", "pretrain.export", *TOOLS]
KILLED = "error: a worker process was killed, perhaps because memory ran out; use fewer --workers (no work is lost)\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("x=1 is wrong; use 2"), 2, "error: x=1 is wrong; use 2\n"),
        (FileNotFoundError(2, "No such file", "list"), 2, "error: [Errno 2] No such file: 'list'\n"),
        (FileNotFoundError(2, strerror(2), "list"), 2, "error: list does not exist; check the path\n"),
        (IsADirectoryError(21, strerror(21), "list"), 2, "error: list is a directory; give a file\n"),
        (OSError(28, strerror(28), "list"), 2, "error: [Errno 28] No space left on device: 'list'\n"),
        (BrokenProcessPool("A process was terminated abruptly"), 2, KILLED),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), 2, KILLED),
        (KeyboardInterrupt(), 130, "stopped; no work is lost\n"),
    ],
)
def test_how_commands_end(error, code, says, capsys):
    def action() -> None:
        raise error

    assert run(action, state="no work is lost") == code
    assert capsys.readouterr().err == says


def test_an_error_of_the_program_has_its_traceback():
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(lambda: (_ for _ in ()).throw(RuntimeError("size mismatch")), state="")
    assert run(lambda: None, state="") == 0 and run(lambda: 1, state="") == 1


@pytest.mark.parametrize("lines", [1, 100_000])  # found out when the last of it is written, and while it prints
def test_a_command_whose_reader_has_gone_ends_without_a_word(lines):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has seen enough
    code = f"import sys; from pretrain.command import run; sys.exit(run(lambda: print('line\\n' * {lines}), state=''))"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_an_error(capsys):
    def action() -> None:
        raise BrokenPipeError(errno.EPIPE, "the worker is gone")

    assert run(action, state="") == 2
    assert capsys.readouterr().err == f"error: [Errno {errno.EPIPE}] the worker is gone\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_the_help_works(name, tmp_path, monkeypatch, capsys):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit):
        main(["--help"])
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("example: "))
    assert command[:3] == ["python", "-m", name]
    monkeypatch.chdir(tmp_path)  # where the files that it names do not exist
    monkeypatch.setattr(sample_corpus, "write_corpus", lambda *_, **__: (_ for _ in ()).throw(ValueError("drawn")))
    assert main(command[3:]) == 2
    assert capsys.readouterr().err.startswith("error: ")
