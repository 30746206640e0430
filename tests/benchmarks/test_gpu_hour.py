"""The first GPU hour: every cell's line is understood by its benchmark, and cells run as promised, a toy of each kind
on the CPU. What the figures of a GPU are, only a GPU can say."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import before
from benchmarks.gpu_hour import __main__ as command
from benchmarks.gpu_hour import runner
from benchmarks.gpu_hour.cells import PARTS, Cell
from benchmarks.gpu_hour.runner import CUT, Results, run_cells
from pretrain import layers
from pretrain.models.multiway import block
from pretrain.parallel import ds_config
from pretrain.recipes import load_recipe
from pretrain.run.build import stage_ds_config
from tests.small_run import ROOT
from tests.toys import refused, wait_for

CELLS = {f"{part}, {cell.name}": cell for part, cells in PARTS.items() for cell in cells}
# A cell that does what its arguments say, and notes that it ran.
CELL = """
import json, os, subprocess, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
with open(os.environ["RUNS"], "a") as runs:
    runs.write(sys.argv[1] + " ")
if sys.argv[2] == "sleep":
    child = "import os, time; open(os.environ['CHILD'], 'w').write(str(os.getpid())); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", child])
    time.sleep(60)
if sys.argv[2] == "good":
    json.dump({"mfu": 0.5, "mfu_real": 0.25}, open(out, "w"))
if sys.argv[2] == "half":
    open(out, "w").write('{"mfu":')
if sys.argv[2] == "bad":
    sys.exit("error: no")
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "toy_cell.py").write_text(CELL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    return tmp_path


def cell(name: str, does: str = "good", limit_s: int = 60) -> Cell:
    return Cell(name, f"toy_cell {name} {does}", "", limit_s)


def run(place: Path, *cells: Cell, seconds: float = 60) -> tuple[dict[str, bool], dict, list[str], list[str]]:
    """What is not done, what the file holds, what ran, and what was told."""
    (place / "runs").write_text("")
    told: list[str] = []
    left = run_cells(cells, Results(place / "p.json", "p", False), place / "logs", seconds, False, told.append)
    return left, json.loads((place / "p.json").read_text())["cells"], (place / "runs").read_text().split(), told


@pytest.mark.parametrize("toy", [False, True], ids=["real", "toy"])
@pytest.mark.parametrize("name", CELLS)
def test_a_gpu_hour_is_data_that_its_benchmarks_understand(name, toy, monkeypatch, tmp_path):
    module, *words = CELLS[name].words(toy)
    benchmark = importlib.import_module(module)
    words += ["--out", str(tmp_path / "out")]
    if module != "benchmarks.throughput":
        ran: list[str] = []
        owner = benchmark if hasattr(benchmark, "run") else benchmark.command
        monkeypatch.setattr(owner, "run", lambda action, state: ran.append(state) or 0)
        assert benchmark.main(words) == 0 and ran
        return
    args = benchmark.parse_args(words)
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    stage_ds_config(args.ds, recipe, stage)
    assert not args.stored_codes or stage.visual_tokenizer
    assert toy or stage.batch.total == {"beit3_giant": 96, "vlmo_base": 256}.get(args.recipe, 768)


def test_cells_run_in_their_order_once_and_those_that_failed_again_at_the_end(place):
    cells = cell("a"), cell("b", "bad"), cell("c"), cell("d", "half"), cell("e", "nothing")
    left, done, ran, told = run(place, *cells)
    assert ran == ["a", "b", "c", "d", "e"] and left == dict.fromkeys("bde", True)
    assert done["a"]["ended"] == 0 and done["a"]["result"] == {"mfu": 0.5, "mfu_real": 0.25}
    assert done["b"]["ended"] == 1 and "error: no" in done["b"]["said"] and "result" not in done["b"]
    assert {done[name]["ended"] for name in "de"} == {"ended without a result"}
    assert told[0].startswith("a: mfu 0.5, mfu_real 0.25") and told[1].startswith("b: exit code 1: error: no")
    again = *cells, cell("f"), Cell("c", "toy_cell c good --changed", "")
    left, done, ran, _ = run(place, *(again[number] for number in (0, 1, 6, 5)))
    assert ran == ["c", "f", "b"] and left == {"b": True} and "--changed" in done["c"]["command"]


def test_a_cell_ends_at_its_limit_with_what_it_started_and_a_cut_one_comes_again(place, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_S", 0)
    left, done, _, told = run(place, cell("a", "sleep", limit_s=3), cell("b"))
    assert left == {"a": True} and done["a"]["ended"] == "ended after its limit of 3 s" and done["b"]["ended"] == 0
    assert told[0].startswith("a: ended after its limit") and not alive(int((place / "child").read_text()))
    left, done, ran, _ = run(place, cell("c", "sleep"), cell("d"), seconds=2)
    assert left == {"c": False, "d": False} and done["c"]["ended"] == CUT and ran == ["c"]
    assert run(place, Cell("a", "toy_cell a bad", ""), cell("c", "sleep"), seconds=2)[2][0] == "a", "not yet tried"


def alive(pid: int) -> bool:
    """Not as the remains of a process that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_is_ended_ends_its_cell(place):
    code = (
        "import sys; from benchmarks.gpu_hour import __main__ as m; from benchmarks.gpu_hour.cells import Cell; "
        "m.PARTS = {'p': (Cell('a', 'toy_cell a sleep', ''),)}; sys.exit(m.main(sys.argv[1:]))"
    )
    part = subprocess.Popen([sys.executable, "-c", code, "p", "--out", str(place / "out")], stderr=subprocess.PIPE)
    wait_for(lambda: (place / "child").exists() and (place / "child").read_text())
    part.send_signal(signal.SIGTERM)
    assert b"stopped; finished cells are in" in part.communicate(timeout=30)[1] and part.returncode == 130
    assert not alive(int((place / "child").read_text()))


@pytest.mark.parametrize(
    ("holds", "arguments", "says"),
    [
        (None, ["--seconds", "0"], "--seconds=0 is no time; use more than 0, such as 540"),
        (None, ["--seconds", "nan"], "--seconds=nan is no time"),
        (None, ["--cells", "produts"], "--cells 'produts' is not in the part ceilings; did you mean products?"),
        ("{", [], "ceilings.json"),
        ("[]", [], "is no file of the part ceilings; move it away, or use another --out"),
        ({"part": "ceilings", "machine": {}, "cells": {"a": 1}}, [], "is no file of the part ceilings"),
        ({"part": "tests", "machine": {}, "cells": {}}, [], "is no file of the part ceilings"),
        ({"part": "ceilings", "machine": {"gpus": ["another"]}, "cells": {}}, [], "gpus: ['another'] there, ["),
        ({"part": "ceilings", "machine": "here", "cells": {}}, [], "toy: False there, True here), which are not"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, capsys, holds, arguments, says):
    path = tmp_path / "ceilings.json"
    if isinstance(holds, dict) and holds["machine"] == "here":
        holds |= {"machine": runner.here(toy=False)}
    if holds is not None:
        path.write_text(holds if isinstance(holds, str) else json.dumps(holds))
    before = path.read_bytes() if holds is not None else b""
    assert says in refused(capsys, command.main, "ceilings", "--toy", "--out", tmp_path, *arguments)
    assert holds is None or path.read_bytes() == before


def test_what_is_carried_is_all_that_the_package_depends_on():
    """The quickstart of a machine without an index stopped for want of pyarrow."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split("[<>=]", line)[0] for line in needed}
    text = (ROOT / "benchmarks" / "README.md").read_text()
    section = text[text.index("## To a machine without a package index") :]
    carried = set(re.findall(r"[\w-]+", section))  # torch, numpy and Pillow are there, as the section says first
    assert names - {"pillow"} <= carried, names - carried


def test_a_list_runs_nothing(tmp_path, capsys):
    assert command.main(["loader", "--out", str(tmp_path), "--list"]) == 0 and not list(tmp_path.iterdir())
    lines = json.loads(capsys.readouterr().out)
    assert shlex.split(lines["256 px"])[:3] == ["python", "-m", "benchmarks.loader"]


def test_a_step_without_its_gains_is_the_one_of_before():
    def gains() -> tuple:
        config = ds_config.load_ds_config("ds_configs/zero1_bf16.json", micro=1, accumulation=1, world=1, clip=1.0)
        return layers.padded(64010), config["bf16"], config.get("timers"), block.gains_by_fusing.__name__

    now = (
        64128,
        {"enabled": True, "check_grad_overflow": False},
        {"throughput": {"enabled": False}},
        "gains_by_fusing",
    )
    assert gains() == now
    with before.without(["vocabulary", "overflow", "fusing"]):
        assert gains() == (64010, {"enabled": True}, None, "_never")
    assert gains() == now
    with before.without(["vocabulary"]):
        assert gains() == (64010, *now[1:])


@pytest.mark.parametrize(
    ("body", "code", "counts", "says"),
    [
        ("def test_a(): pass", 0, (1, 0, 0), ""),
        ("def test_a(): assert 1 == 2, 'not so'", 1, (0, 1, 0), "not so"),
        ("import nothing_of_this_name", 1, (0, 1, 0), "nothing_of_this_name"),
        ("def test_a(no_fixture): pass\ndef test_b(): pass", 1, (1, 1, 0), "no_fixture"),
        ("import pytest\n@pytest.mark.skip(reason='no need')\ndef test_a(): pass", 1, (0, 0, 1), "no need"),
        ("", 1, (0, 0, 0), ""),
    ],
    ids=["good", "bad", "no import", "error", "skipped", "none"],
)
def test_the_suite_says_what_became_of_each_test(tmp_path, body, code, counts, says):
    (tmp_path / "test_a.py").write_text(f"{body}\n")
    out, line = tmp_path / "out.json", [sys.executable, "-m", "benchmarks.gpu_hour.suite", "-p", "no:xdist"]
    done = subprocess.run([*line, "--rootdir", str(tmp_path), str(tmp_path), "--out", str(out)], cwd=ROOT)
    value = json.loads(out.read_text())
    assert (done.returncode, *(value[name] for name in ("passed", "failed", "skipped"))) == (code, *counts)
    assert says in json.dumps({**value["failures"], **value["skips"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "cells", "holds"),
    [
        ("ceilings", ["indexes", "vocabulary"], "times_as_fast"),
        ("tests", ["compiled"], "passed"),
        ("throughput", ["all"], "planned_memory_gib"),
        ("loader", ["256 px"], "loader_per_second"),
    ],
)
def test_a_toy_of_every_kind(tmp_path, capsys, part, cells, holds):
    line = [part, "--toy", "--seconds", "120", "--out", str(tmp_path), "--cells", *cells]
    assert command.main(line) == 0, capsys.readouterr().out
    value = json.loads((tmp_path / f"{part}.json").read_text())
    assert list(value["cells"]) == cells and value["machine"]["toy"]
    for each in value["cells"].values():
        assert each["result"][holds] and each["result"]["command"]
