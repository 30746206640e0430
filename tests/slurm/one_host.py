"""A real SLURM of several nodes on this machine: private munged, slurmctld and slurmds, everything below one directory.

For root, without systemd; only loopback addresses. Ranks meet at ports that follow from the job's number, so no two of
them number their jobs alike. GPUs are device nodes that nobody opens. Node names do not resolve,
as on some clusters.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel")
READY_S, ENDS_S = 20.0, 15.0
CONF = """
ClusterName=onehost
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/state/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout={lost_s}
MessageTimeout=10
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
"""
PARTITIONS = """
PartitionName=DEFAULT Nodes=node[1-{nodes}] MaxTime=60 DefaultTime=10 State=UP OverSubscribe=NO
PartitionName=main Default=YES
PartitionName=debug
"""


def why_not() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"SLURM is not installed ({', '.join(missing)} missing); see tests/run.sh" if missing else None


@contextmanager
def slurm(
    place: Path, nodes: int = 2, gpus: int = 2, cpus: int = 4, lost_s: int = 60, more: str = ""
) -> Iterator[dict[str, str]]:
    """Gives what the environment of SLURM's commands needs more. `lost_s`: a node that is silent for so long is lost;
    `more`: lines for slurm.conf."""
    place.chmod(0o755)  # munged and slurmd see to that
    write_configuration(place, nodes, gpus, cpus, lost_s, more)
    environment = {"SLURM_CONF": str(place / "slurm.conf")}
    try:
        for line in (
            ["munged", "--force", f"--socket={place}/munge.socket", f"--key-file={place}/munge.key",
             f"--pid-file={place}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/munge.seed"],
            ["slurmctld", "-c", "-f", environment["SLURM_CONF"]],
            *(start_node(place, f"node{i}") for i in range(1, nodes + 1)),
        ):  # fmt: skip
            subprocess.run(line, check=True, timeout=READY_S)
        _wait_for_nodes(environment, nodes)
        yield environment
    finally:
        _stop(place, environment)


def start_node(place: Path, node: str) -> list[str]:
    """The command that does it."""
    return ["slurmd", "-N", node, "-f", str(place / "slurm.conf")]


def write_configuration(place: Path, nodes: int, gpus: int, cpus: int, lost_s: int, more: str) -> None:
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o600)
    port, *ports = _free_ports(nodes + 1)
    host = socket.gethostname().partition(".")[0]
    conf, gres = CONF.format(host=host, port=port, place=place, lost_s=lost_s), ""
    for number, own in enumerate(ports, 1):
        (place / "state" / f"node{number}").mkdir(parents=True)
        conf += (
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs={cpus} RealMemory=16000 "
            f"Gres=gpu:a100:{gpus} State=UNKNOWN\n"
        )
        gres += f"NodeName=node{number} Name=gpu Type=a100 File={place}/gpu[0-{gpus - 1}]\n"
    for number in range(gpus):
        os.mknod(place / f"gpu{number}", 0o020600, os.makedev(1, 3))  # clones of /dev/null
    (place / "slurm.conf").write_text(conf + PARTITIONS.format(nodes=nodes) + more)
    (place / "gres.conf").write_text(gres)


def wait_for(job: str, environment: dict[str, str], seconds: float) -> str:
    """The state in which the job ends, such as COMPLETED; "" when it has not by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        line = ["scontrol", "-o", "show", "job", job]
        said = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True).stdout
        state = said.partition("JobState=")[2].partition(" ")[0]
        if state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", ""):
            return state
        time.sleep(0.1)
    return ""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_for_nodes(environment: dict[str, str], nodes: int) -> None:
    line, end = ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], time.monotonic() + READY_S
    while time.monotonic() < end:
        done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)
        if done.stdout.split() == ["idle"] * nodes:
            return
        time.sleep(0.1)
    raise RuntimeError(f"SLURM's nodes are not ready after {READY_S:.0f} s: {done.stdout}{done.stderr}")


def _stop(place: Path, environment: dict[str, str]) -> None:
    """Jobs first, then daemons: the controller, the nodes, munge."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--quiet", "-u", "root"], env=os.environ | environment, timeout=5)
        end = time.monotonic() + ENDS_S
        while time.monotonic() < end:
            left = subprocess.run(["squeue", "-h"], env=os.environ | environment, capture_output=True, timeout=5)
            if not left.stdout:
                break
            time.sleep(0.1)
    daemons = {int(file.read_text()): file.name for name in ("slurm*", "munged") for file in place.glob(f"{name}.pid")}
    for process in daemons:
        _signal(process, daemons[process], signal.SIGTERM)
    end = time.monotonic() + ENDS_S
    while time.monotonic() < end and any(Path(f"/proc/{process}").exists() for process in daemons):
        time.sleep(0.05)
    for process in daemons:
        _signal(process, daemons[process], signal.SIGKILL)


def _signal(process: int, file: str, number: int) -> None:
    """To the daemon that wrote the pid file; not to another process that has the number by now."""
    with suppress(OSError):
        if file.startswith(Path(f"/proc/{process}/comm").read_text().strip()):
            os.kill(process, number)
