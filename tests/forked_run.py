"""`pretrain.train.main` on several ranks that are forked with everything imported: a start takes a second, not five."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from tests.distributed import CONTEXT


class ForkedRanks:
    """`n` ranks with the arguments of a command of small_run; `prepare(rank)` is called in each before it begins. What
    is in this process's environment they may not see: the server that they are forked from may be older."""

    def __init__(
        self,
        line: list[str],
        data: Path,
        n: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
        **environment: str,
    ):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(n), "DATA": str(data)} | environment
        arguments = line[line.index("pretrain.train") + 1 :]
        self.processes = [
            CONTEXT.Process(
                target=_rank, args=(place | {"RANK": str(r), "LOCAL_RANK": str(r)}, arguments, log, prepare)
            )
            for r in range(n)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float, *ranks: int) -> list[int | None]:
        """Exit codes of `ranks` (all) after at most so long; None for one that still runs, -9 after a kill."""
        chosen = [self.processes[r] for r in ranks] or self.processes
        for process in chosen:
            process.join(seconds)
        return [process.exitcode for process in chosen]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        wait([process.sentinel for process in self.processes], timeout=10)


def _rank(place: dict[str, str], arguments: list[str], log: Path, prepare: Callable[[int], None] | None) -> None:
    os.environ.update(place)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from pretrain import train

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers; a forked rank inherits "forkserver"
    if prepare is not None:
        prepare(int(place["RANK"]))
    code = train.main(arguments)
    sys.stderr.flush()
    os._exit(code)
