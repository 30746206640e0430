"""Signs of life of all ranks, in the store of the process group, where every rank can read them.

A collective that fails says only that some rank is missing. So each rank posts once a second what it is doing, from a
thread of its own, which works also while the main thread waits in gloo or NCCL. These signs show which rank hangs, and
which ones only wait for it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from pretrain.distributed import rank, world_size

BEAT_S = 1.0
# How many ranks read all signs all the time; the others do so when their own part takes too long.
LOOKERS = 4
ANSWER_S = 10.0  # how long the store may take to answer
HANG = "watch/hang"
# The description of a process group whose collectives run in the background, where ranks need not be equally far.
BEHIND = "behind"


class Sign(NamedTuple):
    """What a rank posts about itself."""

    beat: int  # counts its signs
    part: int  # how many parts of the run it has entered; every rank enters the same ones
    doing: str  # the name of the part
    left_s: float  # seconds until it finds itself that this part takes too long
    silent_s: float  # for how long it may post nothing in this part
    host: str
    process: Sequence[int]  # its process number, and when it was started; see `started`
    calls: dict[str, int]  # how many collectives of each process group it has begun


class Verdict(NamedTuple):
    """Which rank hangs (-1: none is behind the others), on which host, and the evidence."""

    rank: int
    host: str
    says: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.says}" if self.rank >= 0 else self.says


def silent_rank(signs: Sequence[Sign | None], silent_s: Sequence[float]) -> Verdict | None:
    """Of the ranks that have been silent for longer than they may, the one that has been so for the longest: it is
    stopped, or its node is gone. None if there is none."""
    over = [number for number, sign in enumerate(signs) if sign is not None and silent_s[number] > sign.silent_s]
    if not over:
        return None
    longest = max(over, key=lambda number: silent_s[number])
    sign = signs[longest]
    assert sign is not None
    return Verdict(longest, sign.host, f"gives no sign of life for {silent_s[longest]:.0f} s, the last in {sign.doing}")


def slow_rank(signs: Sequence[Sign | None]) -> Verdict | None:
    """The rank for which the others wait, by the signs of all; None while that rank is within its own limit, or if a
    rank has posted nothing yet."""
    known = [sign for sign in signs if sign is not None]
    if len(known) < len(signs):
        return None
    first = min(sign.part for sign in known)
    behind = [number for number, sign in enumerate(known) if sign.part == first]
    if any(known[number].left_s > 0 for number in behind):
        return None
    if len(behind) < len(known):
        sign = known[behind[0]]
        return Verdict(behind[0], sign.host, f"is still in {sign.doing}, and others wait for it")
    if waited_for := _missing_in_collectives(known):
        sign = known[waited_for[0]]
        return Verdict(
            waited_for[0], sign.host, f"hangs in {sign.doing}: it did not come to the collective in which others wait"
        )
    return Verdict(-1, "", f"all ranks wait in {known[0].doing}, and none is behind the others")


def _missing_in_collectives(signs: Sequence[Sign]) -> list[int]:
    """The ranks that have begun fewer collectives than other members in each uneven group of theirs. A rank that is
    ahead in one group waits there itself, which is why it may be missing in another."""
    most: dict[str, int] = {}
    for sign in signs:
        for group, count in sign.calls.items():
            most[group] = max(most.get(group, 0), count)
    members = {group: [sign.calls[group] for sign in signs if group in sign.calls] for group in most}
    uneven = {group for group, counts in members.items() if min(counts) < max(counts)}

    def counts_of(sign: Sign) -> dict[str, int]:
        return {group: count for group, count in sign.calls.items() if group in uneven}

    return [
        number
        for number, sign in enumerate(signs)
        if (counts := counts_of(sign)) and all(count < most[group] for group, count in counts.items())
    ]


class Board:
    """Posts this rank's sign once a second, and reads all ranks'. `own` returns `part`, `doing`, `left_s` and
    `silent_s` of this rank's sign. Raises dist.DistError if the store does not answer."""

    def __init__(self, own: Callable[[], tuple[int, str, float, float]]):
        self._own, self._beat, self._rounds = own, 0, 0
        # A connection of its own: calls on one connection wait for each other.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=ANSWER_S))
        self._names = [f"watch/{number}" for number in range(world_size())]
        self._process = os.getpid(), started(os.getpid())
        self.looks = rank() < LOOKERS
        self.signs: list[Sign | None] = [None] * world_size()
        self.silent_s = [0.0] * world_size()
        self.hang: Verdict | None = None
        self._accusation: Verdict | None = None
        self._over, self._wake = threading.Event(), threading.Event()
        self._post()
        threading.Thread(target=self._work, name="board", daemon=True).start()

    @property
    def rounds(self) -> int:
        """How many rounds the store has answered; a Watch sees by it whether the store still does."""
        return self._rounds

    def accuse(self, verdict: Verdict) -> None:
        """Posts a verdict for all ranks, in the next round and without waiting: the store may not answer, and a rank
        that ends must not wait for it. The first verdict in the store counts."""
        self._accusation = verdict

    def post_now(self) -> None:
        """Posts a sign at once: called before a part in which this rank may be silent for longer, and after it."""
        self._wake.set()

    def close(self) -> None:
        self._over.set()

    def signal_accused(self, verdict: Verdict, number: int) -> None:
        """Sends the signal `number` to the process that hangs, if that is another one on this node."""
        sign = self.signs[verdict.rank] if verdict.rank >= 0 else None
        if sign is None or sign.host != node_name() or verdict.rank == rank():
            return
        process, since = sign.process
        if since == started(process):  # the number still belongs to the same process
            with suppress(OSError):
                os.kill(process, number)

    def _work(self) -> None:
        while not self._over.is_set():
            if self._wake.wait(BEAT_S):
                self._wake.clear()
                with suppress(dist.DistError, RuntimeError):
                    self._post()
                continue
            try:
                self._post()
                if self._accusation is not None and self.hang is None:
                    self._store.compare_set(HANG, "", json.dumps(self._accusation))
                if self.hang is None and self._store.check([HANG]):
                    self.hang = Verdict(*json.loads(self._store.get(HANG)))
                if self.looks or self.hang is not None:
                    self._look()
            except (dist.DistError, RuntimeError, ValueError):
                continue
            self._rounds += 1

    def _post(self) -> None:
        self._beat += 1
        sign = Sign(self._beat, *self._own(), node_name(), self._process, _calls())
        self._store.set(self._names[rank()], json.dumps(sign))

    def _look(self) -> None:
        names = self._names
        there = range(len(names)) if self._store.check(names) else [n for n in range(len(names)) if self._has(n)]
        for number, text in zip(there, self._store.multi_get([names[n] for n in there]), strict=True):
            sign = Sign(*json.loads(text))
            before = self.signs[number]
            fresh = before is None or before.beat != sign.beat
            # Counted in this thread's own rounds, so that a job that is suspended as a whole is not taken for silent.
            self.silent_s[number] = 0.0 if fresh else self.silent_s[number] + BEAT_S
            self.signs[number] = sign

    def _has(self, number: int) -> bool:
        return self._store.check([self._names[number]])


def node_name() -> str:
    """This node's name in SLURM, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def started(process: int) -> int:
    """When a process was started, in the kernel's clock ticks since boot; 0 if that is not known. Number and start
    together identify a process, since numbers are reused."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _calls() -> dict[str, int]:
    """{group: how many collectives this rank has begun}, for the groups that count them, without BEHIND's."""
    calls = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        if group.group_desc == BEHIND:
            continue
        with suppress(RuntimeError):
            calls[name] = group._get_sequence_number_for_group()
    return calls
