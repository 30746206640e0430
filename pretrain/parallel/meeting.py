"""The ranks meet before they form a process group: one that does not come is named with its node, and soon.

What forms the group can only say that somebody is missing, after the time that its calls may take, which is long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from pretrain.parallel.board import node_name, started
from pretrain.parallel.patience import FACTOR, OTHER_S

LOOK_S, HEAR_S = 0.2, 5.0
SHOWN = 4  # ranks that are named


def meet(number: int, world: int, limit_s: float) -> dist.Store:
    """The store that a process group of `world` ranks forms by, when all have come to it. Raises TimeoutError on all
    that have, where one does not come within `limit_s` of the first rank's coming, or the first one does not at all."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds a store itself
    try:
        store = dist.TCPStore(
            address, port, world, number == 0 and not of_launcher, timedelta(seconds=limit_s),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(f"meeting/{number}", node_name())
        if number == 0:
            return _gather(store, world, limit_s)
        # The first rank may have come later than this one, and waits from then on.
        store.wait(["meeting/verdict"], timedelta(seconds=2 * limit_s))
        verdict = store.get("meeting/verdict").decode()
        store.set(f"meeting/heard/{number}", "")
    except dist.DistError as error:
        raise TimeoutError(
            f"rank 0 on {address} does not come to the start within {limit_s:.0f} s ({str(error).splitlines()[0]}); "
            f"see that all ranks started and reach MASTER_ADDR={address} MASTER_PORT={port}"
        ) from error
    if verdict:
        raise TimeoutError(verdict)
    return store


def limit_s() -> float:
    """How long to wait for the others: by how long this process has lived, as they read and import what it did."""
    ticks = started(os.getpid())
    lived = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
    return max(OTHER_S, FACTOR * lived)


def _gather(store: dist.Store, world: int, limit: float) -> dist.Store:
    """For the first rank, with which the store ends: those that came must have heard why."""
    verdict, came = _wait_for_all(store, world, limit)
    store.set("meeting/verdict", verdict)
    if not verdict:
        return store
    with suppress(dist.DistError):
        store.wait([f"meeting/heard/{number}" for number in came if number], timedelta(seconds=HEAR_S))
    raise TimeoutError(verdict)


def _wait_for_all(store: dist.Store, world: int, limit: float) -> tuple[str, list[int]]:
    """Who does not come ("" where all did), and the ranks that did."""
    end, names = time.monotonic() + limit, [f"meeting/{number}" for number in range(world)]
    while not store.check(names):
        if time.monotonic() > end:
            hosts = [store.get(name).decode() if store.check([name]) else None for name in names]
            if missing := [number for number, host in enumerate(hosts) if host is None]:
                others = ", ".join(map(str, missing[1 : SHOWN + 1])) + (" ..." if len(missing) > SHOWN + 1 else "")
                said = (
                    f"rank {missing[0]} {_place(missing[0], hosts)} does not come to the start within {limit:.0f} s"
                    f"{others and f', nor do {len(missing) - 1} others ({others})'}; see its log, and that it reaches "
                    f"MASTER_ADDR={os.environ['MASTER_ADDR']}"
                )
                return said, [number for number in range(world) if number not in missing]
        time.sleep(LOOK_S)
    return "", list(range(world))


def _place(number: int, hosts: Sequence[str | None]) -> str:
    """On which node a rank must be that has not said it: with those that have its place among the nodes, or as the
    batch script says."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not each:
        return f"of {len(hosts)}"
    node = number // each
    said = [host for host in hosts[node * each : (node + 1) * each] if host is not None]
    names = said or os.environ.get("IMGLISH_NODES", "").split()[node : node + 1]
    return f"on {names[0]}" if names else f"of {len(hosts)}"
