"""What strikes a job on the SLURM of this machine, as a cluster would."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.slurm.one_host import start_node

HIGH = "high"  # a partition whose jobs preempt others
STALL_S, FULL_S, BACK_S = 25.0, 8.0, 20.0


class Target(NamedTuple):
    """A job that runs: its directory (a file system of its own), SLURM's directory, the environment of its commands."""

    job: str
    run: Path
    place: Path
    environment: Mapping[str, str]

    def ask(self, *line: str) -> str:
        whole = os.environ | dict(self.environment)
        return subprocess.run(line, env=whole, capture_output=True, text=True, timeout=60).stdout

    def fact(self, name: str) -> str:
        """A field of the job, such as Restarts."""
        return self.ask("scontrol", "-o", "show", "job", self.job).partition(f" {name}=")[2].partition(" ")[0]

    def nodes(self) -> list[str]:
        return self.ask("scontrol", "show", "hostnames", self.fact("NodeList")).split()

    def ranks(self) -> dict[int, int]:
        """{rank: its process}, of those that train: of a start that forks, the forked one, and no data worker."""
        trains = {
            process: int(variables["SLURM_PROCID"])
            for process, variables in self._processes()
            if "pretrain.train" in (command := _read(process, "cmdline")) and "python" in command[0]
        }
        forks = {process for process in trains if "pretrain.launch.warm" in _read(process, "cmdline")}
        first = {process for process in forks if _parent(process) not in trains}
        return {
            rank: process
            for process, rank in trains.items()
            if (_parent(process) in first if process in forks else _parent(process) not in trains)
        }

    def rank(self, number: int) -> int:
        """Its process. Raises ValueError where there is none."""
        end = time.monotonic() + 20
        while (process := self.ranks().get(number)) is None:
            if time.monotonic() > end:
                raise ValueError(f"job {self.job} has no rank {number} that trains")
            time.sleep(0.2)
        return process

    def on_node(self, node: str) -> list[int]:
        return [process for process, variables in self._processes() if variables.get("SLURMD_NODENAME") == node]

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        for entry in Path("/proc").glob("[0-9]*"):
            variables = dict(_variables(int(entry.name)))
            if variables.get("SLURM_JOB_ID") == self.job and variables.get("SLURM_CONF") == str(
                self.place / "slurm.conf"
            ):
                yield int(entry.name), variables


def _read(process: int, what: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{what}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def _variables(process: int) -> Iterator[tuple[str, str]]:
    for word in _read(process, "environ"):
        name, equals, value = word.partition("=")
        if equals:
            yield name, value


def _parent(process: int) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _send(number: int, process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def kill_rank(target: Target, victim: int) -> None:
    _send(signal.SIGKILL, target.rank(victim))


def stop_rank(target: Target, victim: int) -> None:
    _send(signal.SIGSTOP, target.rank(victim))


def usr1(target: Target, victim: int) -> None:
    target.ask("scancel", "--batch", "--signal=USR1", target.job)


def requeue(target: Target, victim: int) -> None:
    target.ask("scontrol", "requeue", target.job)


def node_down(target: Target, victim: int) -> None:
    node = target.nodes()[victim % 2]
    target.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=benchmark")
    time.sleep(1)
    target.ask("scontrol", "update", f"nodename={node}", "state=resume")


def kill_node(target: Target, victim: int) -> None:
    """Its slurmd, the slurmstepds and all tasks, at one moment; it comes back when SLURM has noticed."""
    node = target.nodes()[victim % 2]
    daemon = int((target.place / f"slurmd-{node}.pid").read_text())
    steps = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if _read(int(entry.name), "comm")[0].strip() == "slurmstepd" and _uses(entry, f"{target.place}/", node)
    ]
    # A slurmstepd that outlives its task tells the controller that the job has failed: no dead node could.
    for process in (daemon, *steps, *target.on_node(node)):
        _send(signal.SIGKILL, process)
    time.sleep(BACK_S)
    subprocess.run(start_node(target.place, node), env=os.environ | dict(target.environment), check=True, timeout=20)


def _uses(process: Path, place: str, node: str) -> bool:
    """Whether a slurmstepd is of that node: it has its log or its spool directory open."""
    links = [process / "cwd", *(process / "fd").glob("*")]
    for link in links:
        with suppress(OSError):
            file = os.readlink(link)
            if file.startswith((f"{place}state/{node}", f"{place}slurmd-{node}.")):
                return True
    return False


def preempt(target: Target, victim: int) -> None:
    line = ["sbatch", "--parsable", "-p", HIGH, "-N", "2", "--ntasks-per-node=4", "--wrap", "sleep 3"]
    target.ask(*line, "--output=/dev/null")


def time_limit(target: Target, victim: int) -> None:
    """As if the limit were near: SLURM warns by USR1, 300 s before it. Afterwards the job has its time again."""
    restarts, longer = target.fact("Restarts"), target.fact("TimeLimit")
    target.ask("scontrol", "update", f"JobId={target.job}", "TimeLimit=2")
    end = time.monotonic() + 150
    while target.fact("Restarts") == restarts and time.monotonic() < end:
        time.sleep(0.2)
    target.ask("scontrol", "update", f"JobId={target.job}", f"TimeLimit={longer}")


def stall_store(target: Target, victim: int) -> None:
    """A rank's data do not come for a while, as from a store that stalls: its data workers are stopped."""
    rank = target.rank(victim)
    workers = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _parent(int(entry.name)) == rank]
    for worker in workers:
        _send(signal.SIGSTOP, worker)
    time.sleep(STALL_S)
    for worker in workers:
        _send(signal.SIGCONT, worker)


def fill_disk(target: Target, victim: int) -> None:
    """The run's file system is full for some seconds."""
    filler = target.run / "filler"
    with filler.open("wb") as file:
        while True:
            try:
                file.write(bytes(2**20))
                file.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
    time.sleep(FULL_S)
    filler.unlink()


STRIKES: dict[str, Callable[[Target, int], None]] = {
    "rank killed": kill_rank,
    "rank stopped": stop_rank,
    "USR1": usr1,
    "requeue": requeue,
    "node down": node_down,
    "node killed": kill_node,
    "preemption": preempt,
    "time limit": time_limit,
    "store stalled": stall_store,
    "disk full": fill_disk,
}
