"""The ranks meet before they form a process group, so that one that does not come is named, with its node, and soon.

torch itself can only say that some rank is missing, and only after the long time that its collectives may take.
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
    """The store for a process group of `world` ranks, once all ranks have connected to it; `number` is this rank's.
    Raises TimeoutError on every rank that has, if another one does not within `limit_s` after rank 0, or if rank 0
    itself does not."""
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
        # Rank 0 may have come later than this rank, and its time counts from then.
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
    """How long to wait for the others, in seconds: a multiple of the time since this process started, since they have
    to import the same."""
    ticks = started(os.getpid())
    lived = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
    return max(OTHER_S, FACTOR * lived)


def _gather(store: dist.Store, world: int, limit: float) -> dist.Store:
    """Rank 0's part of `meet`. The store ends with this process, so it waits until the others have read the verdict."""
    verdict, came = _wait_for_all(store, world, limit)
    store.set("meeting/verdict", verdict)
    if not verdict:
        return store
    with suppress(dist.DistError):
        store.wait([f"meeting/heard/{number}" for number in came if number], timedelta(seconds=HEAR_S))
    raise TimeoutError(verdict)


def _wait_for_all(store: dist.Store, world: int, limit: float) -> tuple[str, list[int]]:
    """A sentence that names the ranks which did not come ("" if all did), and the ranks that did."""
    end, names = time.monotonic() + limit, [f"meeting/{number}" for number in range(world)]
    while not store.check(names):
        if time.monotonic() > end:
            hosts = [store.get(name).decode() if store.check([name]) else None for name in names]
            if missing := [number for number, host in enumerate(hosts) if host is None]:
                others = ", ".join(map(str, missing[1 : SHOWN + 1])) + (" ..." if len(missing) > SHOWN + 1 else "")
                verdict = (
                    f"rank {missing[0]} {_place(missing[0], hosts)} does not come to the start within {limit:.0f} s"
                    f"{others and f', nor do {len(missing) - 1} others ({others})'}; see its log, and that it reaches "
                    f"MASTER_ADDR={os.environ['MASTER_ADDR']}"
                )
                return verdict, [number for number in range(world) if number not in missing]
        time.sleep(LOOK_S)
    return "", list(range(world))


def _place(number: int, hosts: Sequence[str | None]) -> str:
    """The node of a rank that did not come: that of the other ranks of the same node, or as the batch script says."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not each:
        return f"of {len(hosts)}"
    node = number // each
    neighbours = [host for host in hosts[node * each : (node + 1) * each] if host is not None]
    names = neighbours or os.environ.get("IMGLISH_NODES", "").split()[node : node + 1]
    return f"on {names[0]}" if names else f"of {len(hosts)}"
