"""Finds what pretrain.train would refuse on the nodes before a job waits for them."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.copies import local_root
from pretrain.checkpoint.directory import complete
from pretrain.checkpoint.weights import WEIGHTS
from pretrain.config import Recipe, Stage
from pretrain.data.shards.manifest import load_manifest
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.teachers import check_clip
from pretrain.parallel.mesh import place_of
from pretrain.plan.hardware import FRAGMENTS, GIB, GPUS, OUTSIDE
from pretrain.plan.memory import Cell, peak_memory
from pretrain.plan.model import micro_batch_layout, planned
from pretrain.recipes import load_recipe
from pretrain.run.build import check_model, stage_ds_config
from pretrain.run.directory import is_finished, run_identity
from pretrain.run.evaluation import sources
from pretrain.run.identity import as_begun, hash_of
from pretrain.run.image_targets import predicts_codes
from pretrain.run.inputs import open_data
from pretrain.run.labels import check_labels
from pretrain.run.stored_weights import weights_path
from pretrain.run.whole_recipe import check_other_stages
from pretrain.settings import fill_variables

# File systems that only one machine sees, by the names that `stat --file-system` has for them.
LOCAL = {"tmpfs", "ramfs", "overlayfs", "ext2/ext3", "xfs", "btrfs", "zfs", "f2fs"}
SHARED = "IMGLISH_SHARED"  # "1": the nodes see the run directory all the same
CHECKOUT = Path(__file__).parents[2]
# The tools that prepare.sbatch runs: DOWNLOAD where none is named; those of DIVIDED divide their shards among the tasks
# of an array.
TOOL, DOWNLOAD = re.compile(r"(data_tools|pretrain)\.[a-z_]+"), "data_tools.download"
DIVIDED = ("data_tools.capfilt", "pretrain.embed", "pretrain.caption")


class Line(NamedTuple):
    """The arguments of pretrain.train, without the stage."""

    recipe: str
    ds: str
    run_dir: Path
    settings: list[str]
    of_stage: Mapping[str, Sequence[str]] = {}  # further settings of single stages


class Ranks(NamedTuple):
    """The ranks of a job."""

    nodes: int
    each: int  # ranks of one node
    gpu: str | None  # their kind, a key of plan.hardware.GPUS; None: memory is not checked

    @property
    def world(self) -> int:
        return self.nodes * self.each


def check_stages(line: Line, names: Sequence[str], ranks: Ranks, *, stored: bool = True) -> list[str]:
    """The stages that are not finished, in the order in which they will run. Writes nothing.

    Raises ValueError with the stage and the way out for the first that pretrain.train would refuse. What an earlier
    stage of `names` will have made need not be there; without `stored` neither need the codes that `line.of_stage`
    names.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"stage {twice[0]} is named twice; name each stage once")
    ahead: list[str] = []
    for name in names:
        recipe, stage = load_recipe(line.recipe, name, [*line.settings, *line.of_stage.get(name, ())])
        try:
            if _finished(line, recipe, name, stage):
                continue
            if not stored:
                recipe, stage = load_recipe(line.recipe, name, line.settings)
            check_stage(line, recipe, name, ranks, ahead)
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {name}: {error}") from error
        if not ahead:
            check_other_stages(recipe, name, line.run_dir, changed=bool(line.settings))
        ahead.append(name)
    return ahead


def check_stage(line: Line, recipe: Recipe, name: str, ranks: Ranks, ahead: Collection[str]) -> None:
    """Raises ValueError for what is wrong with one stage; `ahead` are the stages that run before it."""
    check_writable(line.run_dir / name)
    if recipe.copy_every:
        local_root()  # ValueError where none is set; the nodes find out themselves whether they can use it
    stage = recipe.stages[name]
    stage = as_begun(stage, run_identity(line.run_dir / name, recipe, stage))
    _check_layout(line, recipe, name, stage, ranks)
    _check_inputs(line, recipe, stage, ahead)
    open_data(recipe, stage, None, place_of(stage.parallel, 0, ranks.world))


def check_layout(line: Line, name: str, ranks: Ranks) -> None:
    """`check_stage` without the checks of data and run directory."""
    recipe, stage = load_recipe(line.recipe, name, line.settings)
    _check_layout(line, recipe, name, stage, ranks)


def _check_layout(line: Line, recipe: Recipe, name: str, stage: Stage, ranks: Ranks) -> None:
    config = stage_ds_config(line.ds, recipe, stage, world=ranks.world, node=ranks.each)
    check_model(recipe, stage)
    check_labels(stage)
    if ranks.gpu is not None:
        _check_memory(line, recipe, name, stage, config, ranks)


def _finished(line: Line, recipe: Recipe, name: str, stage: Stage) -> bool:
    """Whether the stage is finished. Raises ValueError where its directory is another recipe's."""
    directory = line.run_dir / name
    identity = run_identity(directory, recipe, stage)
    _, manifest = next(complete(directory / "checkpoints"), ("", {}))
    if manifest.get("recipe_hash", hash_of(identity)) != hash_of(identity):
        raise ValueError(
            f"{directory} has checkpoints of another recipe, and no recipe.json that says which; take another --run-dir"
        )
    return is_finished(directory, identity)


def _check_inputs(line: Line, recipe: Recipe, stage: Stage, ahead: Collection[str]) -> None:
    """Raises ValueError where weights that the stage reads, another stage's or a file's, will not be there."""
    named = {"init_from": stage.init_from, **stage.reads}
    if predicts_codes(stage):
        named["visual_tokenizer"] = stage.visual_tokenizer
    for knob, value in named.items():
        if value is None or value in ahead or (line.run_dir / value / WEIGHTS).is_file():
            continue
        if value in recipe.stages:
            raise ValueError(
                f"{knob}={value} is a stage that is neither finished in {line.run_dir} nor one of those that run "
                "before this one; name it before"
            )
        path = Path(fill_variables(value, knob)).expanduser()
        if path.resolve() in {(line.run_dir / each).resolve() for each in ahead}:
            continue
        foreign = path.is_dir() or ("$" in value and not path.exists())
        if knob == "teacher" and foreign and not (path / WEIGHTS).is_file():
            check_clip(path)  # the visual tokenizer's may be another program's
        else:
            weights_path(value, line.run_dir, knob)


def _check_memory(line: Line, recipe: Recipe, name: str, stage: Stage, config: dict, ranks: Ranks) -> None:
    """Raises ValueError where a GPU's memory is too small, for models that pretrain.plan can count."""
    if not isinstance(recipe.model_of(stage), MultiwayConfig):
        return
    assert ranks.gpu is not None
    stage_plan, data = planned(recipe, stage), ranks.world // stage.parallel.model
    accumulation = stage.batch.accumulation
    layout = micro_batch_layout(stage_plan, data * accumulation)
    cell = Cell(config, stage.parallel, data, layout, accumulation, int(stage.activation_checkpointing))
    need, usable = peak_memory(stage_plan, cell).total, (GPUS[ranks.gpu].memory - OUTSIDE) * (1 - FRAGMENTS)
    if need > usable:
        raise ValueError(
            f"a rank needs about {need / GIB:.1f} GiB with {line.ds} on {ranks.world} ranks, and {usable / GIB:.1f} "
            f"GiB of a {ranks.gpu} are usable; python -m pretrain.plan --recipe {line.recipe} --stage {name} --gpus "
            f"{ranks.world} --gpu {ranks.gpu} shows the layouts that fit"
        )


def unevaluated(stage: Stage) -> str:
    """Why the stage's evaluations will not find their data; "" where all of it is there. Training does not need it."""
    for source in sources(stage.evals):
        try:
            load_manifest(source.shards)
        except (ValueError, OSError) as error:
            return str(error)
    return ""


def check_writable(directory: Path) -> None:
    """Raises ValueError where `directory` cannot be made or written to. Leaves nothing behind."""
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written: {place}: {error.strerror}; make it writable, or take another --run-dir"
        ) from None


def check_shared(directory: Path, hosts: Collection[str]) -> None:
    """Raises ValueError where `directory` is on a disk of this machine and `hosts`, the job's nodes, are others."""
    here = socket.gethostname().partition(".")[0]
    if os.environ.get(SHARED) == "1" or {host.partition(".")[0] for host in hosts} == {here}:
        return
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    line = ["stat", "--file-system", "--format=%T", str(place)]
    kind = subprocess.run(line, capture_output=True, text=True).stdout.strip()
    if kind in LOCAL:
        raise ValueError(
            f"--run-dir {directory} is on {kind}, a file system of this machine, and the job runs on others; take a "
            f"directory on a shared file system, or export {SHARED}=1 if the nodes see this one"
        )


def job_name(run_dir: Path, stage: str) -> str:
    """The name by which a stage's job is found among all others of its user: one word that a person can read too."""
    readable = re.sub(r"[^\w.-]", "_", run_dir.absolute().name)
    return f"imglish-{readable}-{stage}-{hash_of({'run_dir': str(run_dir.resolve())})[:6]}"


def check_tool(words: Sequence[str], *, array: bool) -> None:
    """Checks the arguments of prepare.sbatch: a tool's name and its arguments, or those of the download; `array`:
    whether the job is an array of tasks. ValueError for an unknown tool, and for one whose work cannot be divided
    so."""
    named = bool(words) and TOOL.fullmatch(words[0]) is not None
    tool = words[0] if named else DOWNLOAD
    if not (CHECKOUT / f"{tool.replace('.', '/')}.py").is_file():
        raise ValueError(f"{tool} is no command of this checkout; name one such as {DIVIDED[0]}")
    if tool == DOWNLOAD and not array and "--merge" not in words:
        raise ValueError("prepare.sbatch is an array of slices; give --array=0-15 before it, or --merge after it")
    if array and tool not in (DOWNLOAD, *DIVIDED):
        raise ValueError(f"--array: {tool} does all of its work in one task; leave it out")
