"""data_tools.ownership: who may write to a directory, and what becomes of work that was begun before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from data_tools.ownership import owned


def own(out: Path, settings: dict, **options) -> AbstractContextManager:
    return owned(out, settings, stamp=out / "stamp.json", work=out / ".work", **options)


def test_the_same_work_goes_on_and_other_settings_are_named(tmp_path):
    with own(tmp_path, {"size": 1, "sides": (1, 2)}) as done:
        assert done is None
        (tmp_path / ".work" / "part").touch()
    with own(tmp_path, {"size": 1, "sides": (1, 2)}):
        assert (tmp_path / ".work" / "part").exists()
    refused = pytest.raises(ValueError, match=r"was begun with size=1 \(now 2\); .*, or choose another --out$")
    with refused, own(tmp_path, {"size": 2, "sides": (1, 2)}):
        pass
    refused = pytest.raises(ValueError, match=r"was begun with sides=\[1, 2\] \(now None\)")
    with refused, own(tmp_path, {"size": 1}):
        pass
    with own(tmp_path, {"size": 2}, restart=lambda: True):
        assert os.listdir(tmp_path / ".work") == ["lock"]
    assert json.loads((tmp_path / "stamp.json").read_bytes()) == {"size": 2}


def test_what_was_noted_of_finished_work_comes_back(tmp_path):
    (tmp_path / "stamp.json").write_text('{"size": 1, "done": {"rows": 3}}')  # in the format of any version
    with own(tmp_path, {"size": 1}) as done:
        assert done == {"rows": 3} and os.listdir(tmp_path) == ["stamp.json"]


def test_nothing_is_made_in_a_directory_of_something_else(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holds files of something else"), own(tmp_path, {}, stranger=lambda: True):
        pass
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_damaged_stamp_is_no_stamp_of_this_work(tmp_path):
    (tmp_path / "stamp.json").write_text("[1")
    with pytest.raises(ValueError, match=r"size=None \(now 1\)"), own(tmp_path, {"size": 1}):
        pass


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from tests.data_tools.test_ownership import own\n"
    code += "with own(Path(sys.argv[1]), {}): print('begun', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "begun\n"
    refused = pytest.raises(
        ValueError, match=rf"process {first.pid} on .* is writing to .*lock\); wait for it, or end it"
    )
    with refused, own(tmp_path, {}):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with own(tmp_path, {}):
        pass
