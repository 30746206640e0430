"""Which rank makes the others wait.

In synchronous training every step takes all ranks equally long: the fast ones wait for the slow one in a collective,
which a clock around the step cannot distinguish from work. So each rank times what it does before it needs another one:
the wait for its own data, and the encoder's first pass in each step, in which nothing is exchanged under ZeRO-0, 1 and
2. Under ZeRO-3, and where tensor, sequence or pipe ranks share a model, the encoder exchanges weights or rows all the
time; there each rank times matrix products of its own after every fifth step instead, which show a slow chip and
nothing else. On a GPU times are taken by pairs of events, which are read long after they have passed, so that nothing
waits for the device.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pretrain.distributed import all_gather, device, gather_objects, rank, world_size
from pretrain.lives import note_slow
from pretrain.metrics import Throughput
from pretrain.run.build import Run

log = logging.getLogger("pretrain")

EVERY = 50  # steps over which times are compared
WARM = 5
SLOW = 0.15  # a rank is slow if it takes this share longer than the median rank
LEAST = 0.02  # of a step: a rank that is above the median by less than that holds nobody up
# Where the encoder cannot be timed: the steps between two timings, how many matrix products are timed together, and
# their sides. They take less than a millisecond of a core or a GPU, and 16 MiB of a GPU's memory.
PRODUCT_EVERY, PRODUCTS, SIDE, SIDE_ON_GPU = 5, 4, 192, 2048


class Slow(NamedTuple):
    """A rank for which others wait."""

    rank: int
    doing: str  # "compute" or "data"
    share: float  # how much longer its pass takes, of the median rank's; or its wait for data, of the step

    def sentence(self, nodes: Sequence[str]) -> str:
        """For the log; `nodes`: the host of each rank."""
        if self.doing == "data":
            return f"rank {self.rank} on {nodes[self.rank]} waits {self.share:.0%} of the step longer for its data"
        return f"rank {self.rank} on {nodes[self.rank]} computes {self.share:.0%} longer"


def slow_ranks(passes: Sequence[float], waits: Sequence[float], step_s: float, least: float = LEAST) -> list[Slow]:
    """The slow ranks, the slowest first. `passes`, `waits`: seconds per step of each rank; `step_s`: seconds of a whole
    step. A pass counts as slow only if it is also above the median by `least` of a step. Of an even number of ranks the
    lower median is taken, so that the slower of two can be named."""
    usual, usual_wait = statistics.median_low(passes), statistics.median_low(waits)
    bound = max((1 + SLOW) * usual, usual + least * step_s)
    slow = [Slow(n, "compute", own / usual - 1) for n, own in enumerate(passes) if usual and own > bound]
    late = [(own - usual_wait) / step_s for own in waits]
    slow += [Slow(n, "data", share) for n, share in enumerate(late) if share > SLOW]
    return sorted(slow, key=lambda each: -each.share)


class RankTimes:
    """Times this rank's steps, and compares all ranks' times every EVERY steps. `module`: the task; `apart`: its
    encoder's pass exchanges nothing with other ranks; if it does, matrix products are timed instead. The first WARM
    steps, in which blocks compile and workers start, do not count."""

    def __init__(self, module: nn.Module, directory: Path, *, apart: bool, start: int = 0):
        """`start`: the last step that is done."""
        self.directory, self._apart, self._step = directory, apart, start
        self._on_gpu = device().type == "cuda"
        self._steps, self._seconds, self._waited, self._mark = -WARM, 0.0, 0.0, time.perf_counter()
        self._began: Any = None
        self._passed = False  # the first pass of this step is over
        self._passes: deque[tuple[Any, Any]] = deque(maxlen=EVERY)
        self._square: torch.Tensor | None = None
        self._nodes: list[str] = []
        self._told = ""
        if apart and world_size() > 1:
            encoder = getattr(module, "encoder", module)
            encoder.register_forward_pre_hook(lambda *_: self._enter())
            encoder.register_forward_hook(lambda *_: self._leave())

    def tick(self, waited: float) -> None:
        """Called when a step has been launched; `waited`: seconds that the rank waited for its data."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._step, self._steps = self._step + 1, self._steps + 1
        self._waited, self._passed = self._waited + waited, False
        if not self._apart and world_size() > 1 and self._steps % PRODUCT_EVERY == 0:
            began = self._now()
            self._multiply()
            self._passes.append((began, self._now()))
        if self._steps <= 0:
            self._clear()

    def skip(self) -> None:
        """Forgets the time since the last step, which went into something else, such as saving."""
        self._mark = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Figures for metrics.jsonl if EVERY steps have passed since the last ones, else {}. pass_spread: how much
        longer than the median the slowest rank's pass is, as a share of the median; wait_spread: the same for its wait
        for data, as a share of the step; slow_rank: the slowest rank, if one is slow. A collective of every rank. Rank
        0 names the slow ranks in the log and in lives.jsonl whenever they change."""
        if world_size() == 1 or self._steps < EVERY:
            return {}
        own = [self._pass_s(), self._waited / self._steps, self._seconds / self._steps]
        self._steps = 0
        self._clear()
        every = torch.stack(all_gather(torch.tensor(own, device=device()))).double().tolist()
        self._nodes = self._nodes or gather_objects(socket.gethostname())
        passes, waits, whole = zip(*every, strict=True)
        step_s = statistics.median_low(whole)
        slow = slow_ranks(passes, waits, step_s, LEAST if self._apart else 0.0)
        self._tell(slow)
        line = {"wait_spread": (max(waits) - statistics.median_low(waits)) / step_s}
        if usual := statistics.median_low(passes):
            line["pass_spread"] = max(passes) / usual - 1
        return line | ({"slow_rank": slow[0].rank} if slow else {})

    def _tell(self, slow: list[Slow]) -> None:
        who = ", ".join(dict.fromkeys(f"{each.rank} {each.doing}" for each in slow))
        if who == self._told:
            return
        self._told = who
        text = "; ".join(each.sentence(self._nodes) for each in slow[:3])
        if slow:
            log.warning("step %d: %s than the median rank, over %d steps; the others wait", self._step, text, EVERY)
        else:
            log.info("step %d: no rank is slow any more", self._step)
        if rank() == 0:
            note_slow(self.directory, text and f"step {self._step}: {text} than the median rank")

    def _enter(self) -> None:
        if not self._passed:
            self._began = self._now()

    def _leave(self) -> None:
        if not self._passed and self._began is not None:
            self._passes.append((self._began, self._now()))
            self._passed, self._began = True, None

    def _multiply(self) -> None:
        if self._square is None:
            side, kind = (SIDE_ON_GPU, torch.bfloat16) if self._on_gpu else (SIDE, torch.float32)
            self._square = torch.ones(side, side, dtype=kind, device=device())
        for _ in range(PRODUCTS):
            torch.mm(self._square, self._square)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _pass_s(self) -> float:
        """The median seconds of the timed passes; those that the GPU has not finished are left out."""
        if self._on_gpu:
            done = [begin.elapsed_time(end) / 1e3 for begin, end in self._passes if end.query()]
        else:
            done = [end - begin for begin, end in self._passes]
        return statistics.median(done) if done else 0.0

    def _clear(self) -> None:
        self._seconds = self._waited = 0.0
        self._passes.clear()


class RankMeter(Throughput):
    """The run's throughput meter, which also compares the ranks."""

    def __init__(self, data_ranks: int, times: RankTimes):
        super().__init__(device(), data_ranks)
        self._times, self._wait_s = times, 0.0

    def wait(self, seconds: float, *parts: float) -> None:
        super().wait(seconds, *parts)
        self._wait_s = seconds

    def tick(self, **counts: Any) -> None:
        super().tick(**counts)
        self._times.tick(self._wait_s)
        self._wait_s = 0.0

    def skip(self) -> None:
        super().skip()
        self._times.skip()

    def read(self) -> dict[str, float | None]:
        """Every rank calls it at the same steps."""
        return super().read() | self._times.read()


def meter_of(run: Run, directory: Path) -> RankMeter:
    """The meter of the run in `directory`."""
    apart = run.stage.parallel.model == 1 and run.engine.zero_optimization_stage() < 3
    times = RankTimes(run.engine.module, directory, apart=apart, start=run.done)
    return RankMeter(run.mesh.data.size, times)
