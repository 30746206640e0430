"""Imports go down the floors and run in no circle: what stands higher knows what stands lower, never the reverse."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"contracts", "batch", "layers", "distributed", "files", "json_files", "lock", "settings", "command", "flops"}
    | {
        "cross_entropy",
        "jitter",
        "rows",
        "tensors",
        "workers",
        "interrupt",
        "visible",
        "pictures",
        "weights_and_biases",
    },
    {"models", "data", "parallel", "optim", "metrics", "lives", "restarts", "rollbacks"},
    {"tasks", "objectives", "evals", "checkpoint"},
    {"config"},
    {"recipes"},
    {"run", "report", "plan", "released_names"},
    {"hub", "released_weights"},
    {"train", "evaluate", "encode_images", "status", "launch", "checkpoints"},
    {"stored_model"},
    {"pretrained", "onnx"},
    {"portions", "clip_benchmark", "mieb", "serving", "export"},
    {"embed", "caption", "serve"},
    {"search"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Each heavy dependency has its doors: nobody else imports it, and every door is used.
DOORS = {
    "deepspeed": {f"pretrain/parallel/{name}.py" for name in ("engine", "pipeline", "state")},
    "megatron": {"pretrain/parallel/mesh.py", "pretrain/parallel/megatron_layers.py"},
    "flash_attn": {"pretrain/models/attention.py"},
    "webdataset": {"pretrain/data/shards/transfer.py"},
    "img2dataset": {"data_tools/fetch/guarded_img2dataset.py"},
    "jinja2": {"pretrain/report/html.py"},
    "transformers": {"pretrain/models/visual_tokenizer/teachers.py", "pretrain/models/towers/tower.py"}
    | {f"pretrain/hub/files/{name}_multiway.py" for name in ("configuration", "modeling", "processing")},
    "onnx": {"pretrain/onnx/write.py"},
    "onnxruntime": {"pretrain/onnx/write.py"},
    "tokenizers": {"pretrain/data/json_tokenizer.py"},
    "wandb": {"pretrain/weights_and_biases.py"},
    "fastapi": {"pretrain/serving/app.py"},
    "pycocoevalcap": {"pretrain/evals/coco_metrics.py"},
    "uvicorn": {"pretrain/serving/connections.py"},
}
PRETRAIN = sorted((ROOT / "pretrain").rglob("*.py"))
CODE = [*PRETRAIN, *sorted((ROOT / "data_tools").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def module_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(path) for path in CODE}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function, by a statement or by importlib."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in whole}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names |= {each.value for each in node.args[:1] if isinstance(each, ast.Constant)}
    return names


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    if module_of(path) == "pretrain":
        return
    here = room(module_of(path))
    for name in imports(path):
        assert not name.startswith(("data_tools", "benchmarks", "tests")), f"{path.name} imports {name}"
        if name.startswith("pretrain.") and room(name) != here:
            assert FLOOR_OF[room(name)] < FLOOR_OF[here] or _same_floor_0(room(name), here), (
                f"{path.name} on floor {FLOOR_OF[here]} imports {name}"
            )


def _same_floor_0(name: str, here: str) -> bool:
    """The ground floor is a handful of files without rooms; they may know each other, in no circle."""
    return name in FLOORS[0] and here in FLOORS[0]


def test_no_circle_of_imports():
    """Between files, also those inside a room and those that are only imported for their types."""
    arrows = {module_of(path): imports(path) & MODULES for path in CODE}
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(arrows.get(module, ())):
                walk(name, [*trail, module])
            done.add(module)

    for module in sorted(arrows):
        walk(module, [])


def test_heavy_dependencies_have_one_door():
    used: dict[str, set[str]] = {name: set() for name in DOORS}
    for path in CODE:
        if path.is_relative_to(ROOT / "benchmarks"):
            continue
        for name in imports(path):
            if (top := name.split(".")[0]) in DOORS:
                used[top].add(str(path.relative_to(ROOT)))
    assert used == DOORS


def test_files_and_functions_stay_small():
    for path in CODE:
        text = path.read_text()
        assert text.count("\n") <= 350, f"{path.relative_to(ROOT)} is too long; split it by what it is about"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_the_top_level_holds_nothing_else():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.partition("/")[0] for name in files if name and not name.startswith(".")}
    rooms = {"pretrain", "ds_configs", "launch", "data_tools", "tests", "benchmarks"}
    assert top == rooms | {"pyproject.toml", "README.md"}


def test_a_commands_example_is_a_line_that_can_be_copied():
    """argparse breaks what stands below the options into lines, unless a formatter forbids it (command.make_parser)."""
    for path, text in ((path, path.read_text()) for path in CODE):
        for call in ast.walk(ast.parse(text)) if "ArgumentParser(" in text else ():
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "ArgumentParser":
                given = {keyword.arg for keyword in call.keywords}
                assert "epilog" not in given or "formatter_class" in given, f"{path}, line {call.lineno}"
