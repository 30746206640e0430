"""Compares what a job asks of SLURM with what SLURM offers, lists the user's jobs in the queue, and calls sbatch.

SLURM refuses some mistakes itself, without naming a way out; jobs with others wait in its queue for ever.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from pretrain.settings import nearest

ANSWER_S = 60.0  # in which SLURM's commands must have answered
AWAY = ("down", "drain", "drng", "fail", "maint", "unk")  # how sinfo's states of nodes that take no jobs begin
CLEARS_S = 30.0  # so long a job may be COMPLETING before it is known whether it comes back into the queue
# sbatch's variables that set an option too. Where both are set, sbatch silently prefers the variable over the #SBATCH
# lines, and an option over the variable.
VARIABLES = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_GPUS_PER_NODE": "gpus_per_node",
    "SBATCH_GRES": "gres",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_OUTPUT": "output",
    "SBATCH_JOB_NAME": "job_name",
}


class Job(NamedTuple):
    """What a job asks for, as far as it can be checked here."""

    partition: str | None  # None: SLURM's default
    nodes: int
    tasks: int | None  # on each node
    gpus: int  # on each node
    gpu_type: str  # "": any
    cpus: int  # of each task
    memory: int  # MiB of each node; 0: all
    minutes: float | None  # None: the partition's default
    output: str | None
    name: str | None

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.tasks or 1


class Node(NamedTuple):
    """A node of a partition, as sinfo describes it."""

    name: str
    host: str  # the machine's own name
    cpus: int
    memory: int  # MiB
    gpus: dict[str, int]  # by type
    state: str
    minutes: float  # the partition's limit

    @property
    def up(self) -> bool:
        return not self.state.startswith(AWAY)

    def has(self, job: Job) -> bool:
        """Whether it has the GPUs that the job asks for."""
        return job.gpus <= (self.gpus.get(job.gpu_type, 0) if job.gpu_type else sum(self.gpus.values()))


class WordParser(argparse.ArgumentParser):
    """Reads the arguments of another command, which `prog` names. ValueError where it cannot."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see its --help")


def read_job(options: Sequence[str], script: Path, environment: Mapping[str, str]) -> Job:
    """The job that sbatch's `options` ask for, or where they do not say, the #SBATCH lines of `script` and sbatch's
    variables in `environment`. Raises ValueError for a value that sbatch would not read either, and for a variable that
    contradicts an option."""
    parser = WordParser(prog="options of sbatch", add_help=False)
    add = parser.add_argument
    add("-p", "--partition")
    add("-N", "--nodes", default="1")
    add("-n", "--ntasks")
    add("--ntasks-per-node")
    add("--gpus-per-node")
    add("--gres", default="")
    add("-c", "--cpus-per-task", default="1")
    add("--mem", default="0")
    add("-t", "--time")
    add("-o", "--output")
    add("-J", "--job-name")
    given, _ = parser.parse_known_args([*_lines_of(script), *options])
    for variable, name in VARIABLES.items():
        if (value := environment.get(variable)) is None:
            continue
        if (option := getattr(given, name)) and option != value:
            raise ValueError(
                f"{variable}={value} and --{name.replace('_', '-')}={option} (cluster.env, or the command line) say "
                f"two things; unset {variable}"
            )
        setattr(given, name, value)
    nodes = _whole("--nodes", given.nodes)
    tasks = _whole("--ntasks-per-node", given.ntasks_per_node) if given.ntasks_per_node else None
    if tasks is None and given.ntasks:
        total = _whole("--ntasks", given.ntasks)
        if total % nodes:
            raise ValueError(f"--ntasks={total} is not a multiple of --nodes={nodes}; give --ntasks-per-node")
        tasks = total // nodes
    kind, gpus = _gpus(given.gpus_per_node, given.gres)
    return Job(
        given.partition,
        nodes,
        tasks,
        gpus,
        kind,
        _whole("--cpus-per-task", given.cpus_per_task),
        _megabytes(given.mem),
        None if given.time is None else _minutes("--time", given.time),
        given.output,
        given.job_name,
    )


def check_job(job: Job) -> list[Node]:
    """The nodes of the job's partition. Raises ValueError with the way out where the job could never start on them."""
    nodes = _nodes_of(job.partition)
    where = f"partition {job.partition}" if job.partition else "the default partition (no --partition is given)"
    if job.nodes > len(nodes):
        raise ValueError(
            f"--nodes={job.nodes} is more than the {len(nodes)} nodes of {where}; use {len(nodes)} or less"
        )
    fitting = [node for node in nodes if node.has(job)]
    if len(fitting) < job.nodes:
        have = max((sum(node.gpus.values()) for node in nodes), default=0)
        kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
        asked = f"{job.gpu_type}:{job.gpus}" if job.gpu_type else str(job.gpus)
        raise ValueError(
            f"--nodes={job.nodes} with {asked} GPUs each are asked for, and {len(fitting)} of the {len(nodes)} nodes "
            f"of {where} have them: a node has {have} ({', '.join(kinds) or 'no kind is named'}); use "
            f"--gpus-per-node={have} or less, or another partition"
        )
    if job.gpus and job.tasks is not None and job.tasks != job.gpus:
        raise ValueError(
            f"--ntasks-per-node={job.tasks} but --gpus-per-node={job.gpus}, and each rank has one GPU; use one number"
        )
    threads = max(node.cpus for node in fitting)
    if job.ranks * job.cpus > threads:
        raise ValueError(
            f"--ntasks-per-node={job.ranks} times --cpus-per-task={job.cpus} is more than the {threads} CPUs of a node "
            f"of {where}; use --cpus-per-task={max(threads // job.ranks, 1)}"
        )
    memory = max(node.memory for node in fitting)
    if job.memory > memory:
        raise ValueError(
            f"--mem={job.memory}M is more than the {memory} MiB of a node of {where}; use --mem=0, which is all of it"
        )
    longest = max(node.minutes for node in fitting)
    if job.minutes is not None and job.minutes > longest:
        raise ValueError(
            f"--time={job.minutes:.0f} minutes is over the limit of {where}, {longest:.0f} minutes; use that: a stage "
            "saves before the limit and goes on in its next life"
        )
    return nodes


def check_with_sbatch(options: Sequence[str], script: Path, arguments: Sequence[str]) -> None:
    """Lets SLURM check the job, with account, QOS and constraints. Raises ValueError with its words where it would
    refuse the job."""
    done = ask("sbatch", "--test-only", *options, str(script), *arguments)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason was given"]
        reason = re.sub(r"^(sbatch: |error: |allocation failure: )+", "", lines[-1])
        raise ValueError(
            f"sbatch would refuse this job: {reason}; see the options in cluster.env and on the command line"
        )


def waiting_jobs() -> dict[str, str]:
    """{name: id} of this user's jobs that wait or run. May take CLEARS_S while a job ends."""
    end = time.monotonic() + CLEARS_S
    while True:
        lines = [line.split() for line in answer("squeue", "-h", "--me", "-o", "%i %T %j").splitlines()]
        jobs = [line for line in lines if len(line) == 3]
        # A job that is COMPLETING may be requeued, and waits again after that.
        if time.monotonic() > end or not any(state == "COMPLETING" for _, state, _ in jobs):
            return {name: number for number, state, name in jobs if state != "COMPLETING"}
        time.sleep(0.5)


def submit(options: Sequence[str], script: Path, arguments: Sequence[str], **variables: str) -> str:
    """Submits the job -> its id. `variables` are added to its environment. Raises ValueError where sbatch refuses
    it."""
    done = ask("sbatch", "--parsable", *options, str(script), *arguments, environment=os.environ | variables)
    if done.returncode:
        raise ValueError(f"sbatch: {done.stderr.strip() or 'failed without a reason'}")
    return done.stdout.strip().partition(";")[0]  # ;CLUSTER


def command_line(options: Sequence[str], script: Path, arguments: Sequence[str]) -> str:
    return shlex.join(["sbatch", *options, str(script), *arguments])


def _nodes_of(partition: str | None) -> list[Node]:
    """The nodes of one partition or several, separated by commas; None: of the default one. Raises ValueError for one
    that the cluster does not have."""
    known = [line.split("|") for line in answer("sinfo", "-h", "-o", "%R|%P").splitlines()]
    names = [name for name, _ in known]
    default = [name for name, marked in known if marked.endswith("*")]
    asked = partition.split(",") if partition else default
    if not asked:
        raise ValueError("no --partition is given and SLURM has no default one; set --partition in cluster.env")
    for name in asked:
        if name not in names:
            raise ValueError(f"--partition={name} is no partition of this cluster{nearest(name, names)}")
    rows = answer("sinfo", "-h", "-e", "-N", "-p", ",".join(asked), "-o", "%N|%n|%c|%m|%t|%l|%G").splitlines()
    nodes = {}
    for row in rows:
        name, host, cpus, memory, state, limit, gres = row.split("|", 6)
        # sinfo writes "64+" for at least 64.
        numbers = int(cpus.rstrip("+")), int(memory.rstrip("+"))
        nodes[name] = Node(name, host, *numbers, _gpus_of(gres), state, _minutes("sinfo's limit", limit))
    return list(nodes.values())


def _lines_of(script: Path) -> list[str]:
    """The options in the #SBATCH lines of a script."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]


def _gpus(per_node: str | None, gres: str) -> tuple[str, int]:
    """(type, "" for any; count on a node) of the GPUs that --gpus-per-node or else --gres ask for."""
    text = per_node or ",".join(part for part in gres.split(",") if part.removeprefix("gres/").startswith("gpu"))
    if not text:
        return "", 0
    kind, _, count = text.removeprefix("gres/").removeprefix("gpu").removeprefix(":").rpartition(":")
    # "gpu" alone means one GPU.
    return kind, _whole("--gpus-per-node" if per_node else "--gres", count or "1", least=0)


def _gpus_of(gres: str) -> dict[str, int]:
    """{type: count} from a column of sinfo's, such as "gpu:a100:8(S:0-1),gpu:h100:2,shard:4" or "(null)"."""
    gpus: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, _, rest = part.partition(":")
        kind, _, count = rest.rpartition(":")
        if name == "gpu" and count.isdigit():
            gpus[kind] = gpus.get(kind, 0) + int(count)
    return gpus


def _whole(name: str, text: str, least: int = 1) -> int:
    """The whole number in `text`. ValueError where there is none, or one below `least`."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(f"{name}={text} is wrong; use one whole number from {least} on")
    return int(text)


def _megabytes(text: str) -> int:
    """A size of --mem, such as 32G, in MiB."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--mem={text} is wrong; use a size such as 32G, or 0 for all that a node has")
    return int(int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()])


def _minutes(name: str, text: str) -> float:
    """A time in one of SLURM's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes."""
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise ValueError(f"{name}={text} is no time; use days-hours:minutes:seconds, such as 1-00:00:00")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    hours, minutes, seconds = [*([0] if len(numbers) < 3 else []), *numbers, 0, 0][:3]
    return hours * 60 + minutes + seconds / 60


def answer(*line: str) -> str:
    """The output of one of SLURM's commands. ValueError where it fails."""
    done = ask(*line)
    if done.returncode:
        raise ValueError(f"{line[0]} failed: {(done.stderr.strip() or 'no reason was given').splitlines()[-1]}")
    return done.stdout


def ask(*line: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one of SLURM's commands. ValueError where there is no such command, or no answer within ANSWER_S."""
    try:
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise ValueError(
            f"{line[0]} is not on the PATH, so there is no SLURM here; load its module, or run on this machine with "
            "bash launch/local.sh"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{line[0]} did not answer within {ANSWER_S:.0f} s; SLURM seems to be down") from None
