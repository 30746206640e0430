"""Run a function on n gloo ranks of this machine, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# Imported once into the server that the ranks fork from: a set of ranks then starts in a fraction of a second.
# The muon optimizer is what deepspeed.initialize imports (with torch._inductor, a second of work), auto_ep_layer the
# engine; megatron_layers brings Megatron, two seconds. The rest is what a small run imports on its way.
PRELOAD = [
    *("torch", "torch.distributed", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.runtime.pipe.module", "deepspeed.module_inject.auto_ep_layer", "pretrain.parallel.megatron_layers"),
    *("torch.utils.serialization", "torch.utils.tensorboard", "numpy.ctypeslib"),
    *("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.GifImagePlugin"),
    *("pretrain.train", "pretrain.evaluate", "pretrain.tasks.tokenizer", "pretrain.evals.masked"),
    *("pretrain.evals.retrieval", "pretrain.objectives.contrastive", "pretrain.objectives.masked"),
    "tests.frozen",
]

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers in the server
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


class RankFailed(AssertionError):
    """A rank raised, died, or did not finish in time; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`fn(*args)` on `n` processes that form a gloo group -> what each returned, in rank order.

    `fn` stands at the top level of its module, and arguments and results are picklable (tensors are). The first rank
    that raises ends all, and its traceback is raised here.
    """
    with tempfile.TemporaryDirectory(prefix="ranks") as name:
        place = Path(name)
        ranks = [CONTEXT.Process(target=_rank, args=(fn, r, n, args, place), daemon=False) for r in range(n)]
        for process in ranks:
            process.start()
        try:
            _join(ranks, place, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
            sweep_shared_memory([process.pid for process in ranks])
        return [pickle.loads((place / f"{r}.result").read_bytes()) for r in range(n)]


def _join(ranks: list, place: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    left = {process.sentinel: (number, process) for number, process in enumerate(ranks)}
    while left:
        ended = wait(list(left), timeout=max(deadline - time.monotonic(), 0))
        if not ended:
            raise RankFailed(f"ranks {sorted(number for number, _ in left.values())} still run after {timeout:.0f} s")
        for sentinel in ended:
            number, process = left.pop(sentinel)
            process.join()
            if (error := place / f"{number}.error").is_file():
                raise RankFailed(f"rank {number}:\n{error.read_text()}")
            if process.exitcode:
                raise RankFailed(f"rank {number} ended with exit code {process.exitcode}")


def _rank(fn: Callable, rank: int, world: int, args: tuple, place: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        # A file instead of a port: nothing to collide with.
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world)
        (place / f"{rank}.result").write_bytes(pickle.dumps(fn(*args)))
        dist.barrier()
    except BaseException:
        (place / f"{rank}.writing").write_text(traceback.format_exc())
        (place / f"{rank}.writing").rename(place / f"{rank}.error")
        os._exit(1)  # without waiting for the peers: they are stopped by the parent
    dist.destroy_process_group()
    os._exit(0)


def sweep_shared_memory(pids: Iterable[int | None]) -> None:
    """Removes what DeepSpeed's ranks leave in shared memory when they are killed (69 MB each)."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        for leftover in shared.glob("deepspeed_*"):
            if any(str(pid) in leftover.name for pid in pids):
                leftover.unlink(missing_ok=True)
