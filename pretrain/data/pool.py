"""Processes that prefetch batches. A worker that dies or hangs is replaced, and its batches are made again: a batch
depends on its item alone, so that only the log shows a difference.

torch's DataLoader fails in both cases: its handler of SIGCHLD raises in whatever the main thread does, and it waits for
ever for a worker that hangs. It also makes each batch in private memory, copies it into shared memory, and allocates
that anew for each; here a batch is made in shared memory, which is used again.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import multiprocessing
import os
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pretrain.data import pulse
from pretrain.data.parcel import ONCE, Opened, Parcel

log = logging.getLogger(__name__)

# A worker hangs if it gives no sign of life for HANG_S: beats come with every sample and each second of a transfer. One
# that has not begun yet has START_S, since it imports its modules, perhaps from a slow file system.
HANG_S, START_S = 20.0, 300.0
_WORK_S = 0.1  # CPU seconds: more than an idle worker takes within HANG_S
TICK_S = 0.25
# The most that a stretch counts in which the main process does something else, or is suspended.
_MOST_S = 1.0
# How many workers may die in a row at one item before the run ends.
MOST_DEATHS = 3
# A socket holds more items than this, so that the main process never blocks when it sends one.
_MOST_AHEAD = 128
# The messages. To a worker: an item, and the number of a parcel that it may fill again, or ONCE for none. From a
# worker: a parcel's number, and where its pickle begins and ends.
_ITEM, _PARCEL = struct.Struct("<qqq"), struct.Struct("<qqq")
Item = tuple[int, int]  # step, micro-step


class Work(Protocol):
    """The workers' work. It is forked or pickled."""

    @property
    def pictures(self) -> tuple[int, ...]:
        """The shape of an item's pictures, uint8."""

    def make(self, item: Item, pictures: np.ndarray) -> Any:
        """The item's result, which must be picklable. `pictures`: memory to fill, which may be a part of it."""


class WorkerDied(RuntimeError):
    """Workers die again and again at one item."""


class _Bug(NamedTuple):
    """The traceback of an unexpected exception in a worker."""

    text: str


class Pool:
    """`workers` processes that do `work`, each up to `ahead` items ahead. Use it as a context."""

    def __init__(self, work: Work, workers: int, ahead: int):
        assert workers >= 1 and ahead >= 1, (workers, ahead)
        self._work, self._ahead = work, min(ahead, _MOST_AHEAD)
        self._context = multiprocessing.get_context()
        self._pulses = self._context.RawArray(ctypes.c_uint64, workers)
        self._clock, self._looked = 0.0, time.monotonic()
        self._closing = threading.Event()
        self._deaths: tuple[Item | None, int] = None, 0  # the item at which workers died last, and how many
        self._workers = [_Worker(self, number) for number in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()

    def stop(self) -> None:
        """Makes `results` end soon, whatever it waits for; may be called from another thread."""
        self._closing.set()

    def results(self, items: Iterator[Item]) -> Iterator[Any]:
        """The result of each item, in their order. Raises WorkerDied, and RuntimeError with the traceback of a bug in
        a worker."""
        turns, waiting = cycle(self._workers), deque[_Worker]()

        def give(some: Iterator[Item]) -> None:
            for item in some:
                worker = next(turns)
                worker.give(item)
                waiting.append(worker)

        give(islice(items, len(self._workers) * self._ahead))
        while waiting and not self._closing.is_set():
            result = self._take(waiting.popleft())
            if self._closing.is_set():
                return
            give(islice(items, 1))
            yield result

    def _take(self, worker: _Worker) -> Any:
        """The result of the worker's first item; None if the pool closes meanwhile."""
        while not self._closing.is_set():
            self._look()
            if not worker.ready(TICK_S):
                continue
            result, came = worker.receive()
            if came:
                item = worker.items.popleft()
                if isinstance(result, _Bug):
                    raise RuntimeError(f"a bug in a data worker, at step {item[0]}:\n{result.text}")
                return result
            self._note_death(worker)
            worker.replace()

    def _note_death(self, worker: _Worker) -> None:
        worker.process.join(1)
        item, (last, deaths) = worker.items[0], self._deaths
        self._deaths = item, deaths + 1 if item == last else 1
        # In torch's words, so that parallel/faults.py can explain both.
        how = f"DataLoader worker (pid {worker.process.pid}) {_end(worker.process.exitcode)}"
        if self._deaths[1] >= MOST_DEATHS:
            raise WorkerDied(f"{how}, {MOST_DEATHS} times in a row at step {item[0]}")
        log.warning("%s; another one makes its batches again, from step %d on", how, item[0])

    def _look(self) -> None:
        """Replaces workers that hang."""
        now = time.monotonic()
        self._clock += min(now - self._looked, _MOST_S)
        self._looked = now
        for worker in self._workers:
            if not worker.hangs(self._clock):
                continue
            log.warning(
                "data worker (pid %s) hangs: no sign of life for %.0f s; another one makes its batches again",
                worker.process.pid,
                HANG_S,
            )
            worker.replace()


class _Worker:
    """The main process's side of one worker."""

    def __init__(self, pool: Pool, number: int):
        self._pool, self._number = pool, number
        self.items = deque[Item]()  # sent to it, and whose results have not come yet
        self._start()

    def _start(self) -> None:
        pool, number = self._pool, self._number
        pool._pulses[number] = 0
        self._pulse, self._spent, self._since = 0, 0.0, pool._clock
        self._parcels = Opened()
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = (pool._work, theirs, pool._pulses, number, os.getpid())
        self.process = pool._context.Process(target=_run, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Item) -> None:
        self.items.append(item)
        self._send(item)

    def _send(self, item: Item) -> None:
        freed = self._parcels.freed
        with suppress(BrokenPipeError, ConnectionResetError):  # it died, which the next `receive` will see
            self.connection.send(_ITEM.pack(*item, freed.popleft() if freed else ONCE))

    def ready(self, seconds: float) -> bool:
        """Whether it sends something, or dies, within so many seconds."""
        waiting = select.poll()  # select.select cannot take descriptors above 1023
        waiting.register(self.connection, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))

    def receive(self) -> tuple[Any, bool]:
        """(the next result, True), or (None, False) if the worker is dead."""
        try:
            message, fds, *_ = socket.recv_fds(self.connection, _PARCEL.size, 1)
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            return None, False
        if not fds:  # the kernel drops a descriptor without an error if there are too many
            raise OSError(errno.EMFILE, "too many open files to take a batch from a data worker; raise ulimit -n")
        try:
            return self._parcels.open(fds[0], *_PARCEL.unpack(message)), True
        finally:
            os.close(fds[0])

    def hangs(self, clock: float) -> bool:
        """Whether it has shown no sign of life for HANG_S: neither a beat nor CPU time. A worker that uses CPU time may
        just be slow, with a huge picture on a busy machine; one in the kernel's state D waits for storage, which would
        not answer another worker either."""
        pulse, spent = self._pool._pulses[self._number], _cpu_s(self.process.pid)
        if pulse != self._pulse or spent > self._spent + _WORK_S:
            self._pulse, self._spent, self._since = pulse, spent, clock
        late = clock - self._since > (HANG_S if pulse else START_S)
        return late and self.process.is_alive() and _state(self.process.pid) != "D"

    def replace(self) -> None:
        self.kill()
        self._start()
        for item in self.items:
            self._send(item)

    def kill(self) -> None:
        """Kills the worker: it has nothing to save, and might ignore a gentler signal."""
        self.connection.close()
        self.process.kill()
        self.process.join(1)  # takes longer only if the kernel holds it


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"is killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _cpu_s(pid: int | None) -> float:
    """The CPU time that a process has used, in seconds; 0 for one that is gone. The clock's number is computed as in
    Linux's clock_getcpuclockid."""
    try:
        return time.clock_gettime(~pid << 3 | 2) if pid else 0.0
    except OSError:
        return 0.0


def _state(pid: int | None) -> str:
    """A process's state as ps shows it: R, S, T, D (uninterruptible) ...; "" if that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _run(work: Work, connection: socket.socket, pulses: Any, number: int, parent: int) -> None:
    """The body of a worker process."""
    ignore_signals(parent)
    torch.set_num_threads(1)  # there is a worker for each core
    pulse.begin(pulses, number)
    connection.settimeout(1)
    parcels, free = dict[int, Parcel](), list[Parcel]()
    while True:
        try:
            message = connection.recv(_ITEM.size)
        except TimeoutError:
            pulse.beat()
            continue
        except ConnectionResetError:
            message = b""
        if not message:  # the main process is gone
            return
        step, micro, freed = _ITEM.unpack(message)
        if freed != ONCE:
            free.append(parcels[freed])
        if not free:
            number = len(parcels) + 1
            parcels[number] = Parcel(work.pictures, number)
            free.append(parcels[number])
        parcel = free.pop()
        try:
            place = parcel.close_with(work.make((step, micro), parcel.array))
        except Exception:
            free.append(parcel)
            parcel = Parcel((0,))
            place = parcel.close_with(_Bug(traceback.format_exc()))
        _hand_over(connection, parcel, _PARCEL.pack(parcel.number, *place))
        if parcel.number == ONCE:
            os.close(parcel.fd)


def _hand_over(connection: socket.socket, parcel: Parcel, message: bytes) -> None:
    """Sends a parcel to the main process; ends this process if that is gone."""
    while True:
        pulse.beat()
        try:
            socket.send_fds(connection, [message], [parcel.fd])
            break
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
        except OSError as error:
            # Too many descriptors of this user are in flight; the main process will receive some.
            if error.errno != errno.ETOOMANYREFS:
                raise
            time.sleep(TICK_S)


def ignore_signals(parent: int) -> None:
    """Makes workers ignore the signals that ask a job to save and stop, because schedulers send them to every process:
    the main process still needs the batches of its current step, and stops its workers itself."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
