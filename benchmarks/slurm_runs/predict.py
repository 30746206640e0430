"""The effective training time of a larger run, from the seconds that a fault costs and published rates of faults."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

GPUS = 64 * 8
# For how long a save stops all ranks: 20 to 25 s for giant where it waits for the disk, a step where it does not.
STALLS_S = (25.0, 1.0)
# What a start costs on a cluster beyond what it costs here: imports and weights from a shared disk, NCCL, compilation.
# None of it was measured, so the prediction is given for several.
MORE_S = (0.0, 60.0, 300.0)


class Rate(NamedTuple):
    """Interruptions of a run, or of a fleet of GPUs, that were published."""

    faults: int
    days: float
    gpus: int
    source: str

    @property
    def per_gpu_s(self) -> float:
        return self.faults / (self.days * 86400 * self.gpus)


RATES = {
    "Llama 3": Rate(466, 54, 16384, "arXiv 2407.21783, section 3.3.4: all interruptions, 47 of them planned"),
    "OPT-175B": Rate(105, 60, 992, "arXiv 2205.01068, section 2.5: 35 restarts by hand and 70 by itself, 2 months"),
    # A whole fleet's, of jobs of every size and kind, by the GPUs that it has (more than 200,000): for a long run of
    # one program the rate may be lower. Its two long runs' counts could not be had.
    "ByteRobust": Rate(
        43_264 + 5_948,
        91,
        200_000,
        "arXiv 2509.16293, table 1: explicit and implicit failures of three months; GPUs: abstract of its first "
        "version. Both read where others quote them, not in the paper",
    ),
}


def effective(rate_per_s: float, cost_s: float, interval_s: float, stall_s: float) -> float:
    """The share of the time that goes into steps which count, for faults that are rare: a save costs stall / interval
    of it, and a fault its restart and, on average, half of what lies between two saves again."""
    saves = 1 + stall_s / interval_s
    return max(1 - rate_per_s * (interval_s + stall_s) / 2, 0.0) / (1 + rate_per_s * cost_s) / saves


def best_interval(rate_per_s: float, stall_s: float) -> float:
    """Between saves, after Young (CACM 17(9), 1974): sqrt(2 * stall / rate)."""
    return math.sqrt(2 * stall_s / rate_per_s)


def simulate(rate_per_s: float, cost_s: float, interval_s: float, stall_s: float, useful_s: float, seed: int) -> float:
    """What `effective` approximates, by simulation: faults at random moments, until `useful_s` of steps are saved."""
    dice, now, saved = random.Random(seed), 0.0, 0.0
    fault = dice.expovariate(rate_per_s)
    while saved < useful_s:
        if fault < now + interval_s + stall_s:
            now = fault + cost_s
            fault = now + dice.expovariate(rate_per_s)
        else:
            now, saved = now + interval_s + stall_s, saved + interval_s
    return saved / now


def predict(in_place_s: float, requeue_s: float, gpus: int = GPUS) -> dict[str, Any]:
    """`effective` for each published rate, each of STALLS_S and each of MORE_S, when all faults are mended in place and
    when all need the queue. Saves are made at the best interval."""
    table: dict[str, Any] = {"gpus": gpus}
    for name, rate in RATES.items():
        per_s = rate.per_gpu_s * gpus
        table[name] = {"source": rate.source, "faults_per_day": round(per_s * 86400, 3)}
        for stall in STALLS_S:
            interval = best_interval(per_s, stall)
            table[name][f"a save stops all ranks for {stall:.0f} s"] = {
                "save_every_s": round(interval),
                **{
                    f"start costs {more:.0f} s more": {
                        how: round(effective(per_s, cost + more, interval, stall), 4)
                        for how, cost in (("in place", in_place_s), ("requeue", requeue_s))
                    }
                    for more in MORE_S
                },
            }
    return table
