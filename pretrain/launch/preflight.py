"""Are the nodes of a job fit to train? One process on each of them says it in seconds, and names the one that is not.

    srun --ntasks-per-node=1 python -m pretrain.launch.preflight --run-dir runs/base

launch/stage.sbatch calls it before each start of the ranks (IMGLISH_PREFLIGHT=no: it does not). Checked are matrix
products and copies on each device (right, and their speed against the median), the GPUs that torch sees against those
that SLURM gave, free /dev/shm, open files, packages and code against the other nodes', clocks, the run directory (each
node must see what the others write), and an all-reduce with two other nodes. It ends with 69 where a node is bad. A
slow one is bad on GPUs; on CPUs, which others may use, it is a note. Alone it checks this machine.
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

BAD = 69
HERE_S, PHASE_S, PAIR_S = 60.0, 15.0, 15.0  # in which all nodes come; end a phase; a pair's all-reduce
SKEW_S = 5.0  # of clocks: file times of locks and logs are compared across nodes
SLOW = 0.7  # of the median
PAIR_BYTES, PAIR_TIMES, ROUNDS = 2**22, 3, 2
SEEN_S = 10.0  # an NFS client may not know a new name for so long


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.launch.preflight", __doc__, "--run-dir runs/base")
    parser.add_argument("--run-dir", type=Path, help="which all nodes must see")
    args, _ = parser.parse_known_args(arguments)  # of pretrain.train
    start_logging()
    log.setLevel(logging.INFO)

    def tell() -> int:
        try:
            return _run(args)
        except ValueError as error:
            log.error("error: %s", error)  # with the time, by which a job finds the error that came first
            return 2

    return run(tell, state="nothing was started")


def _run(args: argparse.Namespace) -> int:
    own, nodes = place()
    facts = report()
    if nodes == 1:
        return _tell(judge([facts]), [facts])
    with _store(own, nodes) as store:
        if not _all_here(store, own, nodes):
            return BAD
        facts |= _together(store, own, nodes, args.run_dir)
        store.set(f"report/{own}", json.dumps(facts))
        if own:
            return 0
        reports = [json.loads(store.get(f"report/{number}")) for number in range(nodes)]
    return _tell(judge(reports), reports)


def place() -> tuple[int, int]:
    """This process's number, and how many there are: by SLURM, else by torchrun, else alone."""
    for own, all_of_them in (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("RANK", "WORLD_SIZE")):
        if own in os.environ and all_of_them in os.environ:
            return int(os.environ[own]), int(os.environ[all_of_them])
    return 0, 1


@contextmanager
def _store(own: int, nodes: int) -> Iterator[dist.TCPStore]:
    """The first process's store ends last."""
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
    """The first process names the nodes that do not come."""
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
    """What a node sees of the others. Problems are values: each phase goes on without those who have some."""
    facts: dict[str, Any] = {}
    _meet(store, "clock", own, nodes)
    facts["clock"] = time.time()
    if run_dir is not None:
        facts["shared"] = _shared(store, own, nodes, run_dir)
    facts["pairs"] = _pairs(store, own, nodes)
    return facts


def _meet(store: dist.TCPStore, phase: str, own: int, nodes: int) -> None:
    store.set(f"{phase}/{own}", "")
    with suppress(dist.DistError):
        store.wait([f"{phase}/{number}" for number in range(nodes)], timedelta(seconds=PHASE_S))


def _shared(store: dist.TCPStore, own: int, nodes: int, run_dir: Path) -> str:
    """What is wrong with the run directory for this node; ""."""
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
    """An all-reduce with one other node in each of ROUNDS rounds: {with, seconds} or {with, problem}."""
    told: list[dict[str, Any]] = []
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for number in range(min(ROUNDS, nodes - 1)):
        other = partner(own, nodes, number)
        if other is None:
            continue
        first = min(own, other)
        told.append({"with": other})
        try:
            pair = dist.PrefixStore(f"pair/{number}/{first}", store)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo", store=pair, rank=int(own != first), world_size=2,
                timeout=timedelta(seconds=PAIR_S),
            )  # fmt: skip
            told[-1]["seconds"] = _all_reduce(kind)
        except (dist.DistError, RuntimeError, ValueError) as error:
            told[-1]["problem"] = str(error).splitlines()[0][:200]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return told


def _all_reduce(kind: str) -> float:
    """The best of PAIR_TIMES, in seconds. RuntimeError where the sum is wrong."""
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
    """With whom in round `number`: each node meets every other one once in nodes - 1 rounds (the circle method); None:
    with an odd number of nodes one rests."""
    seats = nodes + nodes % 2
    if own == seats - 1:
        other = number * (seats // 2) % (seats - 1)
    else:
        other = (number - own) % (seats - 1)
        if other == own:
            other = seats - 1
    return other if other < nodes else None


def judge(reports: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """{bad node: what is wrong}, and notes, from the reports of all nodes."""
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
                    says = f"{what} on device {number} has {rate / usual_rate:.0%} of the median speed"
                    bad[each["node"]].append(says) if gpus else notes.append(f"{each['node']}: {says}")
    for node, says in _bad_links(reports).items():
        bad[node].append(says)
    return {node: what for node, what in bad.items() if what}, notes


def _bad_links(reports: list[dict[str, Any]]) -> dict[str, str]:
    """Nodes of which every pair failed. Where two nodes failed only with each other, both are named."""
    failed = {
        number: [pair["with"] for pair in each.get("pairs", []) if "problem" in pair]
        for number, each in enumerate(reports)
        if each.get("pairs")
    }
    whole = [n for n, others in failed.items() if others and len(others) == len(reports[n]["pairs"])]
    # A node whose partners fail with nobody else is the one; its partner is then free of blame.
    worst = [n for n in whole if len(failed[n]) == max(len(failed[m]) for m in whole)]
    problem = {n: next(pair["problem"] for pair in reports[n]["pairs"] if "problem" in pair) for n in worst}
    return {reports[n]["node"]: f"an all-reduce with another node failed: {problem[n]}" for n in worst}


def _tell(found: tuple[dict[str, list[str]], list[str]], reports: list[dict[str, Any]]) -> int:
    bad, notes = found
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
