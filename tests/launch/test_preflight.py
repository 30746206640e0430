"""Whether a job's nodes are fit, by what each says of itself and sees of the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from pretrain.launch import node_checks
from pretrain.launch.preflight import BAD, judge, main, partner
from pretrain.parallel.board import node_name
from tests.small_run import ROOT


def node(number: int, **facts: Any) -> dict[str, Any]:
    other = 1 - number if number < 2 else 0
    fit = {"node": f"n{number}", "problems": [], "versions": {"torch": "2.13"}, "clock": 100.0 + number, "shared": ""}
    return fit | {"product": [1.0, 1.0], "copy": [1.0, 1.0], "pairs": [{"with": other, "seconds": 0.1}]} | facts


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, None),
        ({"problems": ["/dev/shm has 3 MiB free"]}, "/dev/shm has 3 MiB free"),
        ({"versions": {"torch": "2.11"}}, "torch is 2.11 there and 2.13 elsewhere"),
        ({"clock": 160.0}, "its clock is +59.0 s from the others'"),
        ({"shared": "/run does not show there what 2 other nodes wrote"}, "/run does not show there"),
        ({"pairs": [{"with": 0, "problem": "timed out"}, {"with": 1, "problem": "x"}]}, "failed: timed out"),
    ],
)
def test_the_node_that_differs_is_named(facts, says):
    # A bad node's partners met it once, and another one.
    link = {"pairs": [{"with": 3, "problem": "timed out"}, {"with": 2, "seconds": 0.1}]} if "pairs" in facts else {}
    bad, notes = judge([node(0, **link), node(1, **link), node(2), node(3, **facts)])
    assert not notes and (bad == {} if says is None else list(bad) == ["n3"] and says in bad["n3"][0]), bad


@pytest.mark.parametrize("gpus", [True, False])
def test_a_slow_device_is_bad_on_gpus_and_noted_on_cpus(monkeypatch, gpus):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    bad, notes = judge([node(0), node(1, product=[1.0, 0.5]), node(2)])
    says = "product on device 1 has 50% of the median speed"
    assert (bad, notes) == (({"n1": [says]}, []) if gpus else ({}, [f"n1: {says}"]))


@pytest.mark.parametrize("nodes", range(2, 10))
def test_every_node_meets_every_other_one_once(nodes):
    met = []
    for number in range(nodes - 1 + nodes % 2):
        for own in range(nodes):
            other = partner(own, nodes, number)
            assert other is None or (other != own and partner(other, nodes, number) == own)
            met += [(own, other)] if other is not None and own < other else []
    assert len(met) == len(set(met)) == nodes * (nodes - 1) // 2


def test_this_machine_is_fit_or_says_why(monkeypatch, capsys):
    for name in ("SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main([]) == 0
    monkeypatch.setattr(node_checks, "FILES", 2**40)
    assert main([]) == BAD
    said = capsys.readouterr().err
    assert "a rank needs 1099511627776" in said and f"bad node {node_name()}: a process may open" in said


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_a_problem_unless_ranks_stay_on_the_cpu(monkeypatch):
    monkeypatch.setattr(node_checks.torch.version, "cuda", "13.0")
    monkeypatch.setattr(node_checks.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert any("torch sees 0 GPUs, and SLURM gave 2" in sentence for sentence in node_checks.problems())
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not any("GPUs" in sentence for sentence in node_checks.problems())


def test_a_product_that_is_wrong_is_found(monkeypatch):
    best = node_checks._best
    monkeypatch.setattr(node_checks, "_best", lambda action, device: (best(action, device)[0], action() + 1))
    assert "entries of a matrix product are wrong on cpu" in node_checks.report()["problems"][0]


@pytest.mark.slow
def test_two_nodes_together_and_one_that_has_another_version(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # The second one's code is of another checkout.
    start = "import sys; from pretrain.launch import node_checks, preflight"
    start += "; node_checks.checkout_digest = lambda: sys.argv[-1]; sys.exit(preflight.main())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start, "--run-dir", str(tmp_path / "run"), digest],
            env=base | {"RANK": str(number), "WORLD_SIZE": "2", "SLURMD_NODENAME": f"n{number}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, digest in enumerate(("one", "two"))
    ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [BAD, 0], said
    assert "bad node n1: checkout is two there and one elsewhere" in said[0] and not said[1]
    assert list((tmp_path / "run").iterdir()) == []
