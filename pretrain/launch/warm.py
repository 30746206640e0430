"""Starts a rank, and starts it again in place: one process for each rank imports everything once and forks the rank.

    srun python -m pretrain.launch.warm --logs runs/base/logs/JOB pretrain.train --recipe beit3_base --stage vision ...

launch/stage.sbatch calls it. When a rank is lost, the processes of all ranks agree in a store of their own to fork
again, without imports and without a new step of SLURM; each life has its own port and logs. outcome.py decides what is
done. Everything but a start in place is left to the batch script, and so is the decision when one of these processes,
and with it perhaps a node, does not answer. A process that has started CUDA must not fork. A first child therefore
tries whether a forked process can use the GPU; where it cannot, this process becomes the rank itself, which is then not
started again here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist

from pretrain.command import make_parser, run
from pretrain.launch.outcome import decide_and_note, first_failure
from pretrain.launch.preflight import main as preflight
from pretrain.parallel.board import node_name
from pretrain.parallel.engine import preload

# Seconds after the first rank has ended until those that have not are killed: where a rank was lost, and where they
# were asked to save, since one of them may still be writing.
HANG_S, SAVE_S = 10.0, 600.0
START_S = 600.0  # in which all ranks' processes must have imported everything
AGREE_S = 90.0  # in which they must all have ended a phase
LOOK_S, CHECK_S = 0.02, 0.5  # between two looks at the child, and at the store
SIGNALLED = (75, 138)  # exit codes after a signal, on which the job requeues itself: see launch/stage.sbatch
LOST = 69  # exit code where a rank or a node was lost
PREFLIGHT = "pretrain.launch.preflight"
STOP = "stop"  # the answer in the store where no life follows


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.launch.warm", __doc__, "--logs logs/job-41 pretrain.train --recipe tiny ...")
    parser.add_argument("--logs", type=Path, required=True, help="of the first life; those that follow get -againN")
    parser.add_argument("--life", type=int, default=0, help="of the job's ranks, which begins now (%(default)s)")
    parser.add_argument("module", help="whose main() is a rank")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="of the module")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="nothing was started")


def _run(args: argparse.Namespace) -> int:
    # Lets torch find out whether there is a GPU without starting CUDA, after which no fork would work.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    preload()
    module = importlib.import_module(args.module)
    where, _ = _stage_parser().parse_known_args(args.words)
    try:
        rank = Rank(args.logs, args.life, where.run_dir / where.stage)
    except dist.DistError as error:
        _say(f"rank {os.environ['SLURM_PROCID']} on {node_name()} does not reach the first rank: {error}", None)
        return LOST
    if torch.version.cuda and torch.cuda.device_count() and _wait(_fork(_use_gpu, None)):
        os.environ["MASTER_PORT"] = str(rank.port + 3)
        if not rank.nodes_are_fit(lambda words: subprocess.call([sys.executable, "-m", PREFLIGHT, *words])):
            return LOST
        os.execv(sys.executable, [sys.executable, "-m", args.module, *args.words])
    return rank.live(lambda: module.main(args.words))


def _stage_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run-dir", type=Path, default=Path())
    parser.add_argument("--stage", default="")
    return parser


class Rank:
    """The lives of one rank. The first rank's process holds the store; `life` counts the lives of the job's ranks."""

    def __init__(self, logs: Path, life: int, stage: Path):
        self.number, self.world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        self.first_of_node = os.environ["SLURM_LOCALID"] == "0"
        self.base, self.life, self.stage = logs, life, stage
        self.first_life = life  # srun writes its logs
        self.port = int(os.environ["MASTER_PORT"])
        self.child, self.asked = 0, 0  # the rank's process id, the signal that asked it to save; 0: none
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], self.port + 2, self.world, self.number == 0, timedelta(seconds=START_S),
            wait_for_workers=False,
        )  # fmt: skip
        self.store.set_timeout(timedelta(seconds=AGREE_S))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)

    @property
    def logs(self) -> Path:
        """The directory of this life's logs."""
        return self.base.with_name(f"{self.base.name}-again{self.life}") if self.life else self.base

    def live(self, main: Callable[[], int]) -> int:
        """Runs one life after another -> the exit code of the last one, or LOST where the nodes were not fit for it."""
        code, fit = LOST, self.nodes_are_fit(preflight)
        while fit:
            code = self._live(main)
            if self._agree(code) == STOP:
                break
            fit = self.nodes_are_fit(preflight)
        self._part()
        return code if fit else LOST

    def _part(self) -> None:
        """Lets the first rank's process, with which the store ends, wait for the others."""
        with suppress(dist.DistError):
            self.store.set(f"over/{self.number}", "")
            if self.number == 0:
                self.store.wait([f"over/{number}" for number in range(self.world)], timedelta(seconds=HANG_S))

    def _live(self, main: Callable[[], int]) -> int:
        """One life of this rank -> its exit code, or 128 + the signal that killed it, which the other ranks then know
        too. Kills the rank where it goes on too long after another has ended."""
        os.environ["MASTER_PORT"] = str(self.port + 3 + self.life)
        log = self.logs / f"rank{self.number:05d}.log" if self.life > self.first_life else None
        self.child = _fork(main, log)
        ended = checked = 0.0
        by_us = False
        while (code := _poll(self.child)) is None:
            time.sleep(LOOK_S)
            if (now := time.monotonic()) - checked > CHECK_S:
                checked = now
                ended = ended or (now if self._says(f"ended/{self.life}") else 0.0)
                if ended and now - ended > (SAVE_S if self._says(f"saved/{self.life}", gone=False) else HANG_S):
                    by_us = True
                    os.kill(self.child, signal.SIGKILL)
        self.child = 0
        if code < 0:
            code, name = 128 - code, signal.Signals(-code).name
            if not by_us and code not in SIGNALLED:
                _say(f"rank {self.number} on {node_name()} was killed by {name}", log)
        with suppress(dist.DistError):
            if code:
                if code in SIGNALLED:
                    self.store.set(f"saved/{self.life}", "")
                self.store.set(f"ended/{self.life}", "")
            self.store.set(f"code/{self.life}/{self.number}", str(code))
        return code

    def _agree(self, code: int) -> str:
        """What all ranks do after this life: "again", when the next one may begin, or STOP."""
        try:
            codes = self._codes(code)
            if max(codes) == 0 or any(each in SIGNALLED for each in codes):
                return STOP
            if self.number == 0:
                decision = STOP if self.asked else self._decide(max(codes))
                self.store.set(f"do/{self.life}", decision)
            decision = self.store.get(f"do/{self.life}").decode()
        except dist.DistError:  # a node is lost, or the first rank's process: SLURM will find out
            return STOP
        if decision == STOP:
            return STOP
        end = time.monotonic() + float(decision)
        while time.monotonic() < end and not self.asked:
            time.sleep(LOOK_S)
        self.life += 1
        self.logs.mkdir(parents=True, exist_ok=True)
        return "again"

    def _codes(self, code: int) -> list[int]:
        """The exit codes of all ranks; `code` is this rank's. One that has finished waits as long as the others work.
        DistError where one does not answer."""
        names = [f"code/{self.life}/{number}" for number in range(self.world)]
        while code == 0 and not self._says(f"ended/{self.life}") and not self.store.check(names):
            time.sleep(CHECK_S)
        patience = SAVE_S if self._says(f"saved/{self.life}", gone=False) else HANG_S
        self.store.wait(names, timedelta(seconds=patience + AGREE_S))
        return [int(value) for value in self.store.multi_get(names)]

    def _decide(self, code: int) -> str:
        """The seconds to wait before the next life, or STOP."""
        with job_log() as file, redirect_stderr(file):
            action = decide_and_note(first_failure(self.logs), code, self.stage, self.life, only="again")
            if action:
                print(f"the ranks of life {self.life + 1} write to {self.base}-again{self.life + 1}", file=sys.stderr)
        return action.removeprefix("again ") or STOP

    def nodes_are_fit(self, check: Callable[[list[str]], int]) -> bool:
        """Whether all nodes pass `check`, preflight.py's main, which the first rank of each node runs in a process of
        its own."""
        if os.environ.get("IMGLISH_PREFLIGHT") == "no":
            return True
        node, nodes = os.environ["SLURM_NODEID"], int(os.environ["SLURM_JOB_NUM_NODES"])
        try:
            if self.first_of_node:
                place = {"RANK": node, "WORLD_SIZE": str(nodes), "MASTER_PORT": str(self.port + 1)}
                words = ["--run-dir", str(self.stage.parent)]
                log = self.logs / f"preflight{int(node):05d}.log"
                code = _wait(_fork(lambda: check(words), log, place))
                self.store.set(f"fit/{self.life}/{node}", str(code))
            names = [f"fit/{self.life}/{number}" for number in range(nodes)]
            self.store.wait(names, timedelta(seconds=START_S if self.life == self.first_life else 2 * AGREE_S))
            return all(value == b"0" for value in self.store.multi_get(names))
        except dist.DistError:
            return False

    def _says(self, name: str, gone: bool = True) -> bool:
        """Whether a rank has set `name` in the store; `gone`: the answer where the store, and perhaps the first rank's
        node, is gone."""
        with suppress(dist.DistError):
            return self.store.check([name])
        return gone

    def _pass_on(self, number: int, frame: object) -> None:
        """Handles a signal: sends it on to the rank."""
        self.asked = number
        if self.child:
            with suppress(ProcessLookupError):
                os.kill(self.child, number)


def job_log() -> TextIO:
    """The job's log, opened to append; a copy of stderr where it is not known or cannot be written."""
    with suppress(OSError, KeyError):
        return open(os.environ["IMGLISH_JOB_LOG"], "a")
    return os.fdopen(os.dup(2), "w")


def _fork(action: Callable[[], int], log: Path | None, place: dict[str, str] | None = None) -> int:
    """Forks a child that runs `action` and ends with its exit code -> the child's process id. The child dies with its
    parent, writes its output to `log` if one is given, and has the variables `place` instead of SLURM_PROCID."""
    sys.stdout.flush()
    sys.stderr.flush()
    waiting = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)  # the child must not meet them with its parent's handlers
    child = os.fork()
    if child == 0:
        _be_child(action, log, place or {}, waiting)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
    return child


def _be_child(
    action: Callable[[], int], log: Path | None, place: dict[str, str], waiting: set[signal.Signals]
) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number in waiting:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
        if place:
            os.environ.pop("SLURM_PROCID", None)
            os.environ.update(place)
        code = action() or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _poll(child: int) -> int | None:
    """The child's exit code, or minus the signal that killed it; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _wait(child: int) -> int:
    """Waits for the child's end -> as `_poll`."""
    while True:
        with suppress(InterruptedError):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _say(text: str, log: Path | None) -> None:
    """Appends a line with the time to the log; None: to stderr."""
    line = f"{time.strftime('%H:%M:%S')} {text}\n".encode()
    if log is None:
        os.write(2, line)
    else:
        with log.open("ab") as file:
            file.write(line)


def _use_gpu() -> int:
    """Fails where this process cannot use the GPU."""
    torch.zeros(1, device="cuda").cpu()
    return 0


if __name__ == "__main__":
    sys.exit(main())
