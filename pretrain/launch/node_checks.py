"""Finds what is wrong with a node, from the node itself, before anything is trained on it."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.parallel.board import node_name

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "triton")
# Bytes of /dev/shm for each rank: semaphores and queues of its data workers. What its batches need is checked later.
SHM_FREE = 64 * 2**20
FILES = 1024  # open files of a rank: shards, sockets, workers' pipes
PRODUCT = {"cuda": 8192, "cpu": 768}  # rows and columns of the matrices that are multiplied
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
TIMES = 3  # each product and copy is timed so often


def report() -> dict[str, Any]:
    """The facts that are compared between nodes, and the `problems` that this node has by itself, as plain JSON
    values."""
    facts: dict[str, Any] = {"node": node_name(), "problems": problems()}
    facts["versions"] = {name: _version(name) for name in PACKAGES} | {"checkout": checkout_digest()}
    try:
        facts |= speeds()
    except RuntimeError as error:  # CUDA's: a GPU fell off the bus, or its memory is broken
        facts["problems"].append(f"a device does not compute: {str(error).splitlines()[0]}")
    return facts


def problems() -> list[str]:
    """A sentence for each thing that is wrong with this node."""
    sentences = []
    asked, seen = os.environ.get("SLURM_GPUS_ON_NODE", ""), torch.cuda.device_count()
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"  # how DeepSpeed is told to leave the GPUs alone
    if torch.version.cuda and not on_cpu and asked.isdigit() and int(asked) != seen:
        sentences.append(
            f"torch sees {seen} GPUs, and SLURM gave {asked}; see nvidia-smi there, and the driver against torch"
        )
    ranks = int(os.environ.get("IMGLISH_RANKS_OF_NODE", "1"))
    free = shutil.disk_usage("/dev/shm").free
    if free < SHM_FREE * ranks:
        sentences.append(
            f"/dev/shm has {free / 2**20:.0f} MiB free, and its {ranks} ranks need {SHM_FREE * ranks / 2**20:.0f}"
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES:
        sentences.append(f"a process may open {files} files (ulimit -n), and a rank needs {FILES}")
    return sentences


def speeds() -> dict[str, list[float]]:
    """The best of TIMES for each device: `product` in FLOP/s of a square matrix product, `copy` in bytes/s read and
    written in its memory. Raises RuntimeError for a wrong product, and where a device does not compute."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    devices = (
        [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if kind == "cuda" else [torch.device("cpu")]
    )
    result: dict[str, list[float]] = {"product": [], "copy": []}
    for device in devices:
        size = PRODUCT[kind]
        matrix = torch.full((size, size), 0.5, device=device, dtype=torch.bfloat16 if kind == "cuda" else torch.float32)
        best, product = _best(lambda matrix=matrix: matrix @ matrix, device)
        wrong = int((product != size / 4).sum())
        if wrong:
            raise RuntimeError(f"{wrong} entries of a matrix product are wrong on {device}")
        result["product"].append(2 * size**3 / best)
        block = torch.empty(COPY_BYTES[kind], dtype=torch.uint8, device=device)
        best, _ = _best(block.clone, device)
        result["copy"].append(2 * COPY_BYTES[kind] / best)
    return result


def _best(action: Any, device: torch.device) -> tuple[float, Tensor]:
    """(the fewest seconds that the action took, its result), after one call that is not timed."""
    result, best = action(), float("inf")
    for _ in range(TIMES):
        _settle(device)
        began = time.perf_counter()
        result = action()
        _settle(device)
        best = min(best, time.perf_counter() - began)
    return best, result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def checkout_digest() -> str:
    """A hash of the code that the ranks import."""
    place = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*.py")):
        digest.update(f"{file.relative_to(place)} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
