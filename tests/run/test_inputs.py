"""Before the start: whether this node has room for what the loader makes ahead."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from pretrain.data.mixture import MOST_WORKERS, Loading
from pretrain.parallel.mesh import Place
from pretrain.recipes import find_recipe
from pretrain.run import inputs
from pretrain.run.inputs import build_loader
from tests.toys import image_sample, write_source

ALONE = Place(0, 0, 0, 0, 1)


@pytest.fixture
def images(tmp_path, monkeypatch):
    write_source(tmp_path / "images/train", [[image_sample(f"i{n}", n) for n in range(80)]])
    monkeypatch.setenv("DATA", str(tmp_path))
    recipe = find_recipe("tiny")
    return replace(recipe, loading=replace(recipe.loading, workers=2, prefetch=4)), recipe.stages["vision"]


# 64 pictures of 3 * 64 * 64 bytes and 17 rows of 24 bytes, 2 * 4 times: 6.2 MiB.
@pytest.mark.parametrize(("free", "here", "fits"), [(7, "1", True), (6, "1", False), (7, "2", False), (13, "2", True)])
@pytest.mark.parametrize("limit", ["node", "group"])
def test_memory_that_is_too_small_is_named_with_the_numbers(images, monkeypatch, tmp_path, limit, free, here, fits):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    small, large = f"{free * 1024}", f"{2**30}"
    node, group = (small, large) if limit == "node" else (large, small)
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text(f"{int(group) * 1024}\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {node} kB\n")
    (tmp_path / "group").write_text("0::/job/step\n")
    for name, path in (("MEMORY", "meminfo"), ("OWN_GROUP", "group"), ("GROUPS", "")):
        monkeypatch.setattr(inputs, name, tmp_path / path)
    if fits:
        build_loader(*images, None, ALONE)
        return
    need = 7 * int(here) - (here == "2")
    says = f"has {free} MiB of free memory, but 2 loading.workers \\* 4 .* need {need} MiB; lower loading.prefetch"
    with pytest.raises(ValueError, match=says):
        build_loader(*images, None, ALONE)


def test_without_workers_no_memory_is_needed(images, monkeypatch):
    monkeypatch.setattr(inputs, "free_memory", lambda: 0)
    recipe, stage = images
    with pytest.raises(ValueError, match="has 0 MiB of free memory"):
        build_loader(recipe, stage, None, ALONE)
    build_loader(replace(recipe, loading=replace(recipe.loading, workers=0)), stage, None, ALONE)


def test_a_system_that_tells_nothing_is_trusted(monkeypatch, tmp_path):
    for name in ("MEMORY", "OWN_GROUP", "GROUPS"):
        monkeypatch.setattr(inputs, name, tmp_path / "none")
    assert inputs.free_memory() == 2**63


@pytest.mark.parametrize(
    ("environment", "workers"),
    [
        ({}, 11),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, 2),  # torchrun
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "8", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 5),  # srun
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 1),  # both
        ({"SLURM_CPUS_PER_TASK": "64"}, 11),  # not bound to what it got
        ({"LOCAL_WORLD_SIZE": "16", "WORLD_SIZE": "16"}, 1),
        ({"SLURM_CPUS_PER_TASK": "many", "LOCAL_WORLD_SIZE": "0"}, 11),
    ],
)
def test_a_rank_has_a_worker_for_each_of_its_cpus_but_one(monkeypatch, environment, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Loading().processes == workers
    assert Loading(workers=0).processes == 0 and Loading(workers=3).processes == 3


def test_a_node_full_of_cpus_is_not_one_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert Loading().processes == MOST_WORKERS


@pytest.mark.parametrize(
    ("launcher", "cpus", "warns"), [("srun", 1, True), ("srun", 12, False), ("torchrun", 1, False)]
)
def test_a_task_that_srun_bound_to_one_cpu_says_so(images, monkeypatch, caplog, launcher, cpus, warns):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_PROCID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if launcher == "srun":
        monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    recipe, stage = images
    build_loader(replace(recipe, loading=replace(recipe.loading, workers=None)), stage, None, ALONE)
    assert ("1 of 96 CPUs" in caplog.text and "srun --cpus-per-task=N" in caplog.text) == warns
