"""No character from outside steers a terminal, whichever way it gets there."""

from __future__ import annotations

import logging

import pytest

from data_tools import verify
from data_tools.shards.step_table import step_table
from data_tools.shards.steps import Step
from pretrain.command import run
from pretrain.visible import say, start_logging
from tests.toys import image_sample, write_source

EVIL = "\x1b[2J\x00\u202ecat\r\n12:00:00 error: forged"
SHOWN = "\ufffd[2J\ufffd\ufffdcat  12:00:00 error: forged"


@pytest.fixture
def root():
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_a_log_and_the_traceback_in_it_steer_nothing(capsys, root):
    start_logging()
    root.warning("sample 3 of %s replaced: %s", "x.tar", EVIL)
    assert capsys.readouterr().err.endswith(f"sample 3 of x.tar replaced: {SHOWN}\n")
    try:
        raise KeyError("a\x1b[31m" + EVIL)
    except KeyError:
        root.exception("bug")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(" bug") and lines[1].startswith("Traceback") and all(map(str.isprintable, lines))


def test_errors_of_commands_and_their_warnings_steer_nothing(capsys, root):
    root.handlers[:] = []

    def action() -> None:
        root.warning("%s is skipped", EVIL)
        raise ValueError(f"{EVIL} is wrong")

    assert run(action, state="") == 2
    assert capsys.readouterr().err == f"{SHOWN} is skipped\nerror: {SHOWN} is wrong\n"
    say(EVIL)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_what_verify_says_of_a_place_steers_nothing(tmp_path, capsys):
    write_source(tmp_path / "d\x1b[31m", [[image_sample("ok"), {"key": "k\x1b", "jpg": b"no picture"}]])
    assert verify.main([str(tmp_path / "d\x1b[31m"), "--workers", "1"]) in (1, 2)
    said = capsys.readouterr()
    assert "/d\ufffd[31m/00000.tar" in said.out
    assert all(line.replace("\t", "").isprintable() for line in (said.out + said.err).splitlines())


def test_a_table_of_reasons_steers_nothing():
    assert SHOWN in step_table(Step("drop", 3, 2, {EVIL: 1}, {}, []))
