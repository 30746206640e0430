"""If a rank dies or hangs, every other one ends within the configured time, with one sentence and an exit code.

The connections of a dead rank close, and its peers' next collective fails: gloo raises at once; under NCCL torch's own
watchdog ends the process, with messages of its own. A rank that hangs closes nothing, and for it there is `Watch`. It
learns from the run's own steps how long a part of it may take (patience.py), and sees from the signs that all ranks
post (board.py) for which one the others wait.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch.distributed as dist

from pretrain.distributed import rank, world_size
from pretrain.parallel.board import Board, Verdict, silent_rank, slow_rank
from pretrain.parallel.patience import PATIENCE_S, Patience, has_reason_to_wait

log = logging.getLogger("pretrain")

# EX_UNAVAILABLE of sysexits.h: another rank, or the data, did not answer. A failure for every launcher.
LOST = 69
TICK_S = 0.25
# The time between naming a rank that hangs and the end, in which all ranks write their stacks.
DUMP_S = 3.0
# How long a rank may give no sign of life (its watch needs only Python's lock, for a moment): in a step, and elsewhere,
# where large files are read. Also how long the first rank, which holds the store, may not answer.
SILENT_S, SILENT_ELSEWHERE_S = 15.0, 60.0
# How long, once a limit is over, it may take to see for which rank the others wait.
JUDGE_S = 5.0
# EX_TEMPFAIL of sysexits.h: stopped by a signal; a launcher may start the same command again.
STOPPED = 75
# How long a run that a signal asked to end may wait for its data or, at its start, for other ranks.
GRACE_S = 20.0
WAY_OUT = "checkpoints are intact, start the same line again"


class Watch:
    """Ends this process with LOST if a rank hangs, or if this rank's data do not come. It runs in a thread of its own,
    since the main one may wait for the others in gloo, NCCL or CUDA. It counts time by its own ticks, so that it does
    not end a job that was suspended as a whole and goes on.

    If a part of the run takes longer than it should, the watch looks for the rank that the others wait for. If that
    rank is silent or over its own limit, it is named, all ranks write their stacks, and the run ends. If it may still
    need its time (it saves, or fetches a shard), it is waited for, up to `timeout_s`. `asked_s` returns the seconds
    since a signal asked for the end; a process that waits then ends with STOPPED."""

    def __init__(self, asked_s: Callable[[], float] = lambda: 0.0) -> None:
        self.timeout_s = self._limit = self._soft = self._waited = 0.0
        self.asked_s, self._starting = asked_s, True
        self._doing, self._patient, self._part = "the start", True, 0
        self.waits_for_data = False  # or for another rank
        self._patience = Patience()
        self._board: Board | None = None
        self._rounds, self._unanswered = 0, 0.0
        self._over = threading.Event()

    def start(self, timeout_s: float) -> None:
        """Starts the watch. A process alone waits for nothing but its data."""
        self.timeout_s = timeout_s
        self.enter("the start", patient=True)
        self._starting = True
        # faulthandler writes the stacks from C, without Python's lock, which a thread that hangs may hold.
        faulthandler.register(signal.SIGUSR2, file=2)
        threading.Thread(target=self._count, name="watch", daemon=True).start()

    def join(self) -> None:
        """Called when the process group is formed: from now on the ranks see each other's signs."""
        if world_size() > 1 and "MASTER_ADDR" in os.environ:
            try:
                self._board = Board(self._sign)
            except (dist.DistError, RuntimeError) as error:
                log.warning(
                    "%s cannot see the other ranks' signs of life (%s); it waits up to %.0f s for them",
                    *(place(), error, self.timeout_s),
                )

    def enter(self, doing: str, *, patient: bool = False) -> None:
        """Begins the next part of the run, called `doing`; every rank enters the same parts. `patient`: it may take
        PATIENCE_S, and its time says nothing about parts of the same name that are not patient."""
        if self._part:
            self._patience.note(self._doing, self._patient, self._waited)
        self._waited = 0.0  # before the limits change: the last part's time must not be held against the next one's
        self._limit = max(self.timeout_s, PATIENCE_S) if patient else self.timeout_s
        self._soft = min(self._limit, self._patience.limit_s(doing, patient))
        news = patient or self._patient
        self._doing, self._patient, self._part = doing, patient, self._part + 1
        self.waits_for_data, self._starting = False, False
        # Steps may be shorter than a beat, and the others must know at once whether this part is patient.
        if news and self._board is not None:
            self._board.post_now()

    def extend(self) -> None:
        """Makes the current part a patient one."""
        self.enter(self._doing, patient=True)

    def stop(self) -> None:
        self._over.set()
        if self._board is not None:
            self._board.close()

    @property
    def outlast_s(self) -> float:
        """A timeout for collectives that is longer than this watch ever waits, since their own messages say less."""
        return 1.5 * max(self.timeout_s, PATIENCE_S)

    def outlast_all(self) -> None:
        """Gives every process group that timeout: DeepSpeed makes its groups with torch's default (NCCL: 10
        minutes)."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.outlast_s), group)

    def explain(self, error: Exception) -> str | None:
        """One sentence for an error which means that another process is gone; None for any other error."""
        text = str(error)
        if worker_died(error):
            how = text.splitlines()[0].rstrip(". ")
            return f"{place()}: a data worker died (in {self._doing}: {how}), {_likely_cause(how)}; {WAY_OUT}"
        if not (isinstance(error, dist.DistError) or "gloo/transport" in text or "NCCL error" in text):
            return None
        sentence = (
            f"{place()}: another rank died or hung up (in {self._doing}; see what it wrote, if it could); {WAY_OUT}"
        )
        # This rank's own error, if the other rank was lost while it handled that.
        cause = error.__context__
        return sentence if cause is None else f"{sentence} (after {type(cause).__name__}: {cause})"

    def _count(self) -> None:
        while not self._over.wait(TICK_S):
            self._waited += TICK_S
            if self.asked_s() > GRACE_S and (self.waits_for_data or self._starting):
                log.error("%s: stopped by a signal (in %s); %s", place(), self._doing, WAY_OUT)
                _end_now(STOPPED)
            if self.waits_for_data and self._waited > self._soft:
                self._give_up("its own data did not come", self._soft)
            if world_size() == 1:
                continue
            if self._board is not None:
                self._judge(self._board)
            elif self._waited > self._soft:
                self._give_up("another rank did not answer", self._soft)
            if self._waited > self._limit + (JUDGE_S if self._board is not None else 0.0):
                self._give_up("another rank did not answer", self._limit)

    def _judge(self, board: Board) -> None:
        """Ends this process if the signs of all ranks show that one hangs."""
        self._unanswered = 0.0 if board.rounds != self._rounds else self._unanswered + TICK_S
        self._rounds = board.rounds
        late = self._waited > self._soft
        board.looks = board.looks or late
        verdict = board.hang or silent_rank(board.signs, board.silent_s)
        if verdict is None and late:
            verdict = slow_rank(board.signs)
            if verdict is not None and verdict.rank < 0 and self._waited < min(self._limit, PATIENCE_S):
                verdict = None  # all of them may be busy with the same thing
        if verdict is None and self._unanswered > self._silent_s:
            first = board.signs[0]
            host = os.environ["MASTER_ADDR"] if first is None else first.host
            verdict = Verdict(0, host, f"does not answer for {self._unanswered:.0f} s")
        if verdict is not None and not self._over.is_set():
            if verdict.rank == rank() and self.waits_for_data and self._waited > self._soft / 2:
                # Another rank's watch was the first to say so; only this one knows for what it waits.
                self._give_up("its own data did not come", min(self._waited, self._soft))
            self._end_for(verdict, board)

    def _end_for(self, verdict: Verdict, board: Board) -> None:
        if board.hang is None:
            board.accuse(verdict)
        log.error("%s: %s (here: in %s); %s", place(), verdict, self._doing, WAY_OUT)
        faulthandler.dump_traceback(file=2)
        board.signal_accused(verdict, signal.SIGUSR2)
        self._over.wait(DUMP_S)
        # A process that was stopped writes its stack when it goes on, and then ends because the others are gone.
        board.signal_accused(verdict, signal.SIGCONT)
        _end_now(LOST)

    @property
    def _silent_s(self) -> float:
        return min(SILENT_ELSEWHERE_S if self._patient else SILENT_S, self.timeout_s)

    def _sign(self) -> tuple[int, str, float, float]:
        """This rank's `part`, `doing`, `left_s` and `silent_s`, for the board."""
        limit = self._limit if self._waited > self._soft and has_reason_to_wait() else self._soft
        return self._part, self._doing, limit - self._waited, self._silent_s

    def _give_up(self, what: str, limit_s: float) -> NoReturn:
        log.error("%s: %s within %.0f s (in %s); %s", place(), what, limit_s, self._doing, WAY_OUT)
        faulthandler.dump_traceback(file=2)
        _end_now(LOST)


def worker_died(error: Exception) -> bool:
    """Whether an error is torch's for a data worker that was killed or has ended, for which it has no exception class.
    An error that was raised in a worker ("Caught KeyError in DataLoader worker ...") is not one."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _likely_cause(how: str) -> str:
    """Why a data worker has ended, by the signal that `how`, torch's text or ours, names."""
    if "Killed" in how or "SIGKILL" in how:
        return "most likely killed because the memory was full; use less loading.workers or loading.prefetch"
    if "Bus error" in how or "SIGBUS" in how:
        return "most likely because /dev/shm was full, or a file that it reads was cut; make room there"
    return "which a full memory does not do; see what it wrote, and whether it is always the same sample"


def place() -> str:
    """How messages name this rank."""
    return f"rank {rank()} of {world_size()}"


def leave(code: int) -> int:
    """Ends the data workers. A process alone gets `code` back, to exit with; one of several ranks exits here at once.
    The usual end of Python and torch may wait for ranks that are gone, and has aborted pipeline runs that were complete
    (about 2 of 50 on gloo, for an unknown reason). The other ranks notice this one's end by its closed connections."""
    if world_size() == 1:
        # torch's handler would raise "DataLoader worker is killed" for these too, wherever this thread is by then.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in _kill_workers():  # Python would wait for one that hangs
            worker.join()
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        return code
    _end_now(code)


def _kill_workers() -> list[BaseProcess]:
    # The data loader's; they ignore gentler signals.
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for worker in workers:
        worker.kill()
    return workers


def _end_now(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _kill_workers()
    os._exit(code)
