"""Several nodes without SLURM, as launch/README.md says: torchrun on each, and deepspeed with pdsh and ssh from one.

The nodes are two network namespaces of this machine, with an address each and nothing but a cable between them.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_run import ROOT, check_weights, command, environment, tokenizer_of, train_stage

pytestmark = pytest.mark.slow
CARD, ADDRESSES, ENDS_S = "vl0", ("10.213.7.1", "10.213.7.2"), 180.0
SSHD = """
Port 22
ListenAddress {address}
HostKey {place}/host
AuthorizedKeysFile {place}/key.pub
PidFile {place}/sshd-{address}.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces."""
    names = f"vl{os.getpid()}a", f"vl{os.getpid()}b"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two nodes on one machine need root and ip (iproute2)")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
                for card in ("lo", CARD):
                    ip("-n", name, "link", "set", card, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets us make no network namespaces: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def run_of(data: Path, place: Path) -> tuple[list[str], dict[str, str]]:
    """The words behind `-m pretrain.train`, and the environment of a node."""
    line = command(data, place / "run", "vision", tokenizer_of(data), "steps=2", ds="zero1.json")
    # A node's own name leads to 127.0.0.1, as launch/README.md says of some.
    return line[3:], environment(data) | {"GLOO_SOCKET_IFNAME": CARD, "CUDA_VISIBLE_DEVICES": ""}


def check(data: Path, place: Path) -> None:
    alone = train_stage(data, place / "alone", "vision", tokenizer_of(data), "steps=2")
    assert alone.returncode == 0, alone.stderr
    check_weights(place / "run" / "vision", place / "alone" / "vision", most=1e-5)


def test_torchrun_on_each_of_two_nodes(hosts, data, tmp_path):
    words, own = run_of(data, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"]
    logs = [tmp_path / name for name in hosts]
    nodes = []
    for name, address, log in zip(hosts, ADDRESSES, logs, strict=True):
        line = [
            "ip",
            "netns",
            "exec",
            name,
            *torchrun,
            "--local-addr",
            address,
            "--rdzv-conf",
            f"is_host={address == ADDRESSES[0]}",
            "-m",
            "pretrain.train",
            *words,
        ]
        with log.open("w") as out:
            nodes.append(subprocess.Popen(line, cwd=ROOT, env=own, stdout=out, stderr=out))
    try:
        assert [node.wait(ENDS_S) for node in nodes] == [0, 0], "".join(log.read_text() for log in logs)
    finally:
        for node in nodes:
            node.kill()
    assert "vision: finished at step 2" in "".join(log.read_text() for log in logs)
    check(data, tmp_path)


@pytest.fixture
def ssh(hosts, tmp_path) -> Iterator[dict[str, str]]:
    """What the environment of pdsh needs, so that each node takes our key."""
    if missing := [name for name in ("sshd", "ssh", "pdsh", "ssh-keygen") if shutil.which(name) is None]:
        pytest.skip(f"deepspeed --hostfile needs {', '.join(missing)}")
    for name in ("host", "key"):
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(line, check=True, capture_output=True, timeout=20)
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons = []
    for name, address in zip(hosts, ADDRESSES, strict=True):
        (tmp_path / f"{address}.conf").write_text(SSHD.format(address=address, place=tmp_path))
        line = ["ip", "netns", "exec", name, shutil.which("sshd") or "", "-D", "-e", "-f", f"{tmp_path}/{address}.conf"]
        with (tmp_path / f"{address}.log").open("w") as log:
            daemons.append(subprocess.Popen(line, stdout=log, stderr=log))
    known = f"-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -i {tmp_path}/key"
    try:
        for address in ADDRESSES:
            end, line = time.monotonic() + 20, ["ip", "netns", "exec", hosts[0], "ssh", *known.split()]
            while subprocess.run([*line, f"{getpass.getuser()}@{address}", "true"], capture_output=True).returncode:
                assert time.monotonic() < end, (tmp_path / f"{address}.log").read_text()
                time.sleep(0.2)
        yield {"PDSH_SSH_ARGS_APPEND": known, "PDSH_RCMD_TYPE": "ssh"}
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(10)


def test_deepspeed_from_one_node(hosts, ssh, data, tmp_path):
    words, own = run_of(data, tmp_path)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    # The ranks get of the environment what this file says; deepspeed looks for it where it is called.
    told = {name: own[name] for name in ("DATA", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in told.items()))
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(tmp_path / "hosts")]
    deepspeed += ["--no_ssh_check", "--master_addr", ADDRESSES[0], "--no_local_rank", "--module", "pretrain.train"]
    line = ["ip", "netns", "exec", hosts[0], *deepspeed, *words]
    done = subprocess.run(line, cwd=tmp_path, env=own | ssh, capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vision: finished at step 2" in done.stdout + done.stderr
    check(data, tmp_path)
