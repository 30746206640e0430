"""Imports only go down the floors: what stands higher knows what stands lower, never the other way round."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    **{"batch": 0, "distributed": 0, "settings": 0, "layers": 0.5},
    **{"models": 1, "data": 1, "parallel": 1, "optim": 1, "metrics": 1, "weights": 1},
    **{"objectives": 2, "evals": 2, "task": 2, "checkpoint": 2},
    **{"config": 3, "recipes": 4, "assembly": 4, "run": 5},
    **{"train": 6, "evaluate": 6, "export": 6, "report": 6},
}
# Each heavy dependency has its doors: nobody else imports it.
DOORS = {
    "deepspeed": {"pretrain/parallel/engine.py", "pretrain/parallel/pipeline.py"},
    "megatron": {"pretrain/parallel/mesh.py", "pretrain/parallel/megatron_layers.py"},
    "flash_attn": {"pretrain/models/attention.py"},
    "webdataset": {"pretrain/data/shards.py", "pretrain/data/cache.py"},
    "img2dataset": {"data_tools/fetch/guarded_img2dataset.py"},
    "transformers": {"pretrain/models/teachers.py"},
}
FILES = sorted((ROOT / "pretrain").rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(module: str) -> str:
    # report_page.py and its like belong to the room of report.py.
    return module.split(".")[1].removesuffix(".py").split("_")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(str(path.relative_to(ROOT).with_suffix("")).replace("/", "."))
    if here == "__init__":
        return
    for name in imported(path):
        if name.startswith("pretrain.") and room(name) != here:
            assert FLOORS[room(name)] < FLOORS[here], f"{path.name} on floor {FLOORS[here]} imports {name}"


def test_heavy_dependencies_have_one_door():
    for path in [*FILES, *(ROOT / "data_tools").rglob("*.py")]:
        for name in imported(path):
            doors = DOORS.get(name.split(".")[0])
            assert doors is None or str(path.relative_to(ROOT)) in doors, f"{path} imports {name}"


def test_files_stay_small():
    for path in [*FILES, *(ROOT / "data_tools").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        lines = path.read_text().count("\n")
        assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines; split it by what it is about"
