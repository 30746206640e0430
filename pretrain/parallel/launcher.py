"""This process's rank and world size, as torchrun, deepspeed or srun set them, checked before they are used."""

from __future__ import annotations

import os
import re

import torch.distributed as dist

WAY_OUT = "start by torchrun, deepspeed or srun, which set it, or unset it to run alone"


def adopt_launcher() -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables under a plain `srun python -m ...`, and checks them
    under any launcher. Raises ValueError for numbers that do not go together, with which ranks would wait for others
    that never come, or each train alone."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ:
        _adopt_slurm()
    world = _number("WORLD_SIZE", 1, least=1)
    place = _number("RANK", 0)
    if "WORLD_SIZE" in os.environ and world > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={world} is set and RANK is not; {WAY_OUT}")
    if place >= world:
        raise ValueError(
            f"RANK={place} is not below WORLD_SIZE={os.environ.get('WORLD_SIZE', '(not set: 1)')}; {WAY_OUT}"
        )
    local = _number("LOCAL_RANK", 0)
    here = _number("LOCAL_WORLD_SIZE", max(world, local + 1), least=1)
    if local >= here:
        raise ValueError(f"LOCAL_RANK={local} is not below LOCAL_WORLD_SIZE={here}; {WAY_OUT}")
    if world > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ValueError(f"{missing[0]} is not set for WORLD_SIZE={world}; export MASTER_ADDR and MASTER_PORT")
        if _number("MASTER_PORT", 0) not in range(65536):
            raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port; use one below 65536")


def _adopt_slurm() -> None:
    if "SLURM_NTASKS" not in os.environ:
        if several := _several_tasks():
            raise ValueError(f"SLURM_NTASKS is not set but there are several tasks ({several}); give srun --ntasks=N")
        return
    tasks, place = _number("SLURM_NTASKS", 1, least=1), _number("SLURM_PROCID", 0)
    if place >= tasks:
        raise ValueError(
            f"SLURM_PROCID={place} is not below SLURM_NTASKS={tasks}; another one was exported, give srun --ntasks=N"
        )
    if tasks == 1:
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"{missing[0]} is not set under srun; export MASTER_ADDR and MASTER_PORT before srun")
    for name, source in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if source not in os.environ:
            raise ValueError(f"{source} is not set under srun with SLURM_NTASKS={tasks}; start each task by srun")
        _number(source, 0)
        os.environ[name] = os.environ[source]
    if "LOCAL_WORLD_SIZE" not in os.environ and (here := _tasks_here()):
        os.environ["LOCAL_WORLD_SIZE"] = str(here)


def _tasks_here() -> int | None:
    """The number of the step's tasks on this node, from SLURM's list, such as 8(x3),4, and the node's place in it; None
    if SLURM does not say."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(","):
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    place = _number("SLURM_NODEID", 0)
    return counts[place] if place < len(counts) else None


def _several_tasks() -> str:
    """A variable, with its value, which shows that the step has more than one task; "" if none does."""
    for name, alone in (
        ("SLURM_PROCID", "0"),
        ("SLURM_STEP_NUM_TASKS", "1"),
        ("SLURM_NPROCS", "1"),
        ("SLURM_STEP_TASKS_PER_NODE", "1"),
    ):
        if os.environ.get(name, alone) != alone:
            return f"{name}={os.environ[name]}"
    return ""


def _number(name: str, default: int, least: int = 0) -> int:
    """A whole number from the environment. ValueError for anything else, or one below `least`."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(f"{name}={text!r} is no whole number from {least} on; {WAY_OUT}")
    return int(text)
