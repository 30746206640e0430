"""Finds out in seconds, by one process on each of a job's nodes, whether they are fit to train, and names those that
are not.

    srun --ntasks-per-node=1 python -m pretrain.launch.preflight --run-dir runs/base

launch/stage.sbatch calls it before each start of the ranks, unless IMGLISH_PREFLIGHT=no. It checks matrix products and
copies on each device (their results, and their speed against the median), the GPUs that torch sees against those that
SLURM gave, free /dev/shm, open files, packages and code against the other nodes', clocks, the run directory (each node
must see what the others write), and an all-reduce with two other nodes. It ends with exit code 69 where a node is bad.
A slow node is bad on GPUs; on CPUs, which others may be using, it is only a note. Without SLURM or torchrun it checks
this machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.command import make_parser, run
from pretrain.launch.node_checks import report
from pretrain.parallel.board import node_name
from pretrain.visible import start_logging

log = logging.getLogger("pretrain.launch")

BAD = 69  # exit code
HERE_S = 60.0  # in which all nodes must have come
PHASE_S = 15.0  # in which they must have ended a phase
PAIR_S = 15.0  # in which a pair's all-reduce must be done
SKEW_S = 5.0  # by which clocks may differ: file times of locks and logs are compared across nodes
SLOW = 0.7  # the share of the median speed below which a device is slow
PAIR_BYTES, PAIR_TIMES, ROUNDS = 2**22, 3, 2  # size of an all-reduce, how often it is timed, with how many other nodes
SEEN_S = 10.0  # so long an NFS client may not see a new file


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.launch.preflight", __doc__, "--run-dir runs/base")
    parser.add_argument("--run-dir", type=Path, help="which all nodes must see")
    args, _ = parser.parse_known_args(arguments)  # of pretrain.train
    start_logging()
    log.setLevel(logging.INFO)

    def check() -> int:
        try:
            return _run(args)
        except ValueError as error:
            log.error("error: %s", error)  # the log's time tells a job which error came first
            return 2

    return run(check, state="nothing was started")


def _run(args: argparse.Namespace) -> int:
    own, nodes = place()
    facts = report()
    if nodes == 1:
        return _log_verdict(judge([facts]), [facts])
    with _store(own, nodes) as store:
        if not _all_here(store, own, nodes):
            return BAD
        facts |= _together(store, own, nodes, args.run_dir)
        store.set(f"report/{own}", json.dumps(facts))
        if own:
            return 0
        reports = [json.loads(store.get(f"report/{number}")) for number in range(nodes)]
    return _log_verdict(judge(reports), reports)


def place() -> tuple[int, int]:
    """(this process's number, how many there are), from SLURM or torchrun; (0, 1) without either."""
    for number, count in (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("RANK", "WORLD_SIZE")):
        if number in os.environ and count in os.environ:
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


@contextmanager
def _store(own: int, nodes: int) -> Iterator[dist.TCPStore]:
    """A store that all processes share. The first process holds it, and ends last. ValueError where it cannot be
    reached."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, nodes, own == 0, timedelta(seconds=HERE_S), wait_for_workers=False)
    except dist.DistError as error:
        raise ValueError(f"{node_name()} does not reach {address} port {port}: {str(error).splitlines()[0]}") from None
    yield store
    store.set(f"over/{own}", "")
    if own == 0:
        with suppress(dist.DistError):
            store.wait([f"over/{number}" for number in range(nodes)], timedelta(seconds=PHASE_S))


def _all_here(store: dist.TCPStore, own: int, nodes: int) -> bool:
    """Whether all nodes came within HERE_S; the first process logs those that did not."""
    store.set(f"here/{own}", node_name())
    keys = [f"here/{number}" for number in range(nodes)]
    with suppress(dist.DistError):
        store.wait(keys, timedelta(seconds=HERE_S))
        return True
    if own == 0:
        names = os.environ.get("IMGLISH_NODES", "").split()
        for number in range(nodes):
            if not store.check([keys[number]]):
                name = names[number] if number < len(names) else f"number {number}"
                log.error("bad node %s: it did not answer within %.0f s", name, HERE_S)
    return False


def _together(store: dist.TCPStore, own: int, nodes: int, run_dir: Path | None) -> dict[str, Any]:
    """What this node sees of the others. Problems are returned, not raised, so that the others' phases go on."""
    facts: dict[str, Any] = {}
    _meet(store, "clock", own, nodes)
    facts["clock"] = time.time()
    if run_dir is not None:
        facts["shared"] = _shared(store, own, nodes, run_dir)
    facts["pairs"] = _pairs(store, own, nodes)
    return facts


def _meet(store: dist.TCPStore, phase: str, own: int, nodes: int) -> None:
    """Waits until all nodes have come to this phase, but no longer than PHASE_S."""
    store.set(f"{phase}/{own}", "")
    with suppress(dist.DistError):
        store.wait([f"{phase}/{number}" for number in range(nodes)], timedelta(seconds=PHASE_S))


def _shared(store: dist.TCPStore, own: int, nodes: int, run_dir: Path) -> str:
    """What is wrong with the run directory as this node sees it; "" where nothing is."""
    if own == 0:
        store.set("token", secrets.token_hex(4))
    folder = run_dir / f".preflight_{store.get('token').decode()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(own)).touch()
    except OSError as error:
        _meet(store, "written", own, nodes)
        return f"{run_dir} cannot be written there ({error.strerror})"
    _meet(store, "written", own, nodes)
    end = time.monotonic() + SEEN_S
    while (missing := [n for n in range(nodes) if not (folder / str(n)).exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    _meet(store, "seen", own, nodes)
    if own == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{run_dir} does not show there what {len(missing)} other nodes wrote" if missing else ""


def _pairs(store: dist.TCPStore, own: int, nodes: int) -> list[dict[str, Any]]:
    """An all-reduce with one other node in each of ROUNDS rounds -> for each of them {with, seconds} or {with,
    problem}."""
    pairs: list[dict[str, Any]] = []
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for number in range(min(ROUNDS, nodes - 1)):
        other = partner(own, nodes, number)
        if other is None:
            continue
        first = min(own, other)
        pairs.append({"with": other})
        try:
            pair = dist.PrefixStore(f"pair/{number}/{first}", store)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo", store=pair, rank=int(own != first), world_size=2,
                timeout=timedelta(seconds=PAIR_S),
            )  # fmt: skip
            pairs[-1]["seconds"] = _all_reduce(kind)
        except (dist.DistError, RuntimeError, ValueError) as error:
            pairs[-1]["problem"] = str(error).splitlines()[0][:200]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return pairs


def _all_reduce(kind: str) -> float:
    """The fewest seconds of PAIR_TIMES all-reduces with the other node. RuntimeError where a sum is wrong."""
    best = float("inf")
    for _ in range(PAIR_TIMES):
        values = torch.ones(PAIR_BYTES // 4, device=kind)
        began = time.perf_counter()
        dist.all_reduce(values)
        wrong = int((values != 2).sum())
        best = min(best, time.perf_counter() - began)
        if wrong:
            raise RuntimeError(f"{wrong} sums of an all-reduce are wrong")
    return best


def partner(own: int, nodes: int, number: int) -> int | None:
    """The node that node `own` meets in round `number`: each meets every other one once in nodes - 1 rounds (the circle
    method). None where it rests, as one does in each round of an odd number of nodes."""
    seats = nodes + nodes % 2
    if own == seats - 1:
        other = number * (seats // 2) % (seats - 1)
    else:
        other = (number - own) % (seats - 1)
        if other == own:
            other = seats - 1
    return other if other < nodes else None


def judge(reports: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """({bad node: what is wrong with it}, notes) from the reports of all nodes."""
    bad: dict[str, list[str]] = {each["node"]: list(each["problems"]) for each in reports}
    notes: list[str] = []
    gpus = torch.cuda.is_available()
    for each in reports:
        if each.get("shared"):
            bad[each["node"]].append(each["shared"])
    for name in reports[0]["versions"]:
        values = [each["versions"][name] for each in reports]
        usual = statistics.mode(values)
        for each, value in zip(reports, values, strict=True):
            if value != usual:
                bad[each["node"]].append(f"{name} is {value} there and {usual} elsewhere")
    if len(clocks := [each["clock"] for each in reports if "clock" in each]) > 1:
        for each, clock in zip(reports, clocks, strict=True):
            if abs(skew := clock - statistics.median_low(clocks)) > SKEW_S:
                bad[each["node"]].append(f"its clock is {skew:+.1f} s from the others'")
    for what in ("product", "copy"):
        usual_rate = statistics.median([rate for each in reports for rate in each.get(what, [])] or [0.0])
        for each in reports:
            for number, rate in enumerate(each.get(what, [])):
                if rate < SLOW * usual_rate:
                    slow = f"{what} on device {number} has {rate / usual_rate:.0%} of the median speed"
                    bad[each["node"]].append(slow) if gpus else notes.append(f"{each['node']}: {slow}")
    for node, problem in _bad_links(reports).items():
        bad[node].append(problem)
    return {node: sentences for node, sentences in bad.items() if sentences}, notes


def _bad_links(reports: list[dict[str, Any]]) -> dict[str, str]:
    """{node: what is wrong} for the nodes whose every all-reduce failed. Where two nodes failed only with each other,
    both are named."""
    failed = {
        number: [pair["with"] for pair in each.get("pairs", []) if "problem" in pair]
        for number, each in enumerate(reports)
        if each.get("pairs")
    }
    whole = [n for n, others in failed.items() if others and len(others) == len(reports[n]["pairs"])]
    # The node with the most failures is to blame; a partner that failed with it alone is not.
    worst = [n for n in whole if len(failed[n]) == max(len(failed[m]) for m in whole)]
    problem = {n: next(pair["problem"] for pair in reports[n]["pairs"] if "problem" in pair) for n in worst}
    return {reports[n]["node"]: f"an all-reduce with another node failed: {problem[n]}" for n in worst}


def _log_verdict(verdict: tuple[dict[str, list[str]], list[str]], reports: list[dict[str, Any]]) -> int:
    """Logs what `judge` returned -> the exit code. ValueError where all of several nodes have a problem."""
    bad, notes = verdict
    for note in notes:
        log.info("note: %s", note)
    if bad and len(bad) == len(reports) > 1:
        what = next(iter(bad.values()))[0]
        raise ValueError(f"all {len(reports)} nodes have a problem, the first: {what}")
    for node, problems in bad.items():
        log.error("bad node %s: %s", node, "; ".join(problems))
    if not bad:
        rate = statistics.median([rate for each in reports for rate in each["product"]])
        log.info("preflight: %d nodes are fit; a product has %.3g TFLOP/s", len(reports), rate / 1e12)
    return BAD if bad else 0


if __name__ == "__main__":
    sys.exit(main())
