"""The server under load: mixed requests of many clients with hostile ones among them, every answer compared with that
of a single call; then pictures a second with and without batches.

    python -m benchmarks.serve --out benchmarks/results/serve.json

Servers are processes of python -m pretrain.serve on this machine, with random weights of the quickstart's model (or
--weights). A wrong answer is a vector, cosine or score that differs by more than 1e-6 from that of `pretrain.load` with
one picture or text at a time, another caption or class, or another status than what may answer a hostile request.
Speeds are pictures a second by /embed with one picture a request: one client after the other, and all clients at once
with --batch 1 and with batches, in turns; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.record import machine
from benchmarks.serve_clients.answers import Known, make_weights
from benchmarks.serve_clients.exchange import ask, exchange
from benchmarks.serve_clients.hostile import Hostile, hostile_requests
from pretrain.command import about, make_parser, run, write
from pretrain.models.generation import Writing
from pretrain.pretrained import load
from pretrain.serving.limits import Limits

# Bodies below the default, because larger ones would only take longer to send; seconds above it, because a machine that
# does other work too is no reason to refuse.
LIMITS = Limits(body=2**20, seconds=120.0)
SETTINGS = ["--body", str(LIMITS.body), "--seconds", str(LIMITS.seconds)]
CLOSE = 1e-6


class Server(NamedTuple):
    port: int
    process: subprocess.Popen

    def peak_mib(self) -> float:
        """The highest resident memory so far (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        """CPU time that it has used so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(weights: Path, batch: int) -> Iterator[Server]:
    """A process that serves the weights until the block ends. RuntimeError where it then ends with another code than 0
    or left a traceback."""
    line = [sys.executable, "-m", "pretrain.serve", str(weights), "--port", "0", "--batch", str(batch), *SETTINGS]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:]}")
            yield Server(int(said.split()[0].rsplit(":", 1)[1]), process)
            died = process.poll()
            process.terminate()
            code = process.wait(120)
            log.seek(0)
            if died is not None or code != 0 or "Traceback" in (text := log.read()):
                raise RuntimeError(f"the server ended with {died if died is not None else code}: {text[-2000:]}")
        finally:
            process.kill()
            process.wait()


class Tally:
    """What came of the requests; all clients write to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds, self.statuses, self.wrong = list[float](), Counter[str](), list[str]()
        self.differs, self.hostile = 0.0, 0

    def good(self, seconds: float, difference: float, what: str) -> None:
        with self.lock:
            self.seconds.append(seconds)
            self.differs = max(self.differs, difference)
            if not difference <= CLOSE:
                self.wrong.append(f"{what}: {difference}")

    def bad(self, each: Hostile, status: int | None) -> None:
        with self.lock:
            self.hostile += 1
            self.statuses[str(status)] += 1
            if status not in each.statuses:
                self.wrong.append(f"{each.name}: {status}")


def mixed_load(port: int, known: Known, requests: int, hostile: float, clients: int) -> dict[str, Any]:
    """Sends `requests` by `clients` threads, a share of them hostile (each kind at least once), in a seeded order."""
    rng, tally = random.Random(0), Tally()
    kinds = hostile_requests(LIMITS)
    count = max(round(requests * hostile), len(kinds)) if hostile else 0
    jobs: list[Callable[[], None]] = [_hostile(port, kinds[n % len(kinds)], tally) for n in range(count)]
    jobs += [_good(port, known, n, tally) for n in range(requests - count)]
    rng.shuffle(jobs)
    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(job) for job in jobs]:
            done.result()
    seconds = time.monotonic() - begin
    p50, p99 = (statistics.quantiles(tally.seconds, n=100)[place - 1] for place in (50, 99))
    return {
        "requests": requests,
        "hostile": tally.hostile,
        "kinds_of_hostile": len(kinds),
        "clients": clients,
        "wrong": tally.wrong,
        "largest_difference": tally.differs,
        "statuses_of_hostile": dict(sorted(tally.statuses.items())),
        "requests_per_second": requests / seconds,
        "good_seconds_p50": p50,
        "good_seconds_p99": p99,
    }


def _hostile(port: int, each: Hostile, tally: Tally) -> Callable[[], None]:
    return lambda: tally.bad(each, exchange(port, each.parts, pause=each.pause).status)


def _good(port: int, known: Known, number: int, tally: Tally) -> Callable[[], None]:
    def job() -> None:
        path, body, compare = known.request(number)
        begin = time.monotonic()
        reply = ask(port, path, body)
        seconds = time.monotonic() - begin
        difference = compare(reply.content) if reply.status == 200 else float("inf")
        tally.good(seconds, difference, f"{path} {reply.status}")

    return job


def speed(port: int, known: Known, clients: int, seconds: float) -> tuple[float, list[float]]:
    """(pictures a second, the seconds of each request) of `clients` at once, each sending a picture after the other."""
    end, latencies = time.monotonic() + seconds, list[float]()
    begin = time.monotonic()

    def client(number: int) -> None:
        while (now := time.monotonic()) < end:
            reply = ask(port, "/embed", {"pictures": [known.sent[number % len(known.sent)]]})
            assert reply.status == 200, reply
            latencies.append(time.monotonic() - now)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return len(latencies) / (time.monotonic() - begin), latencies


def speeds(alone: Server, batched: Server, known: Known, args: argparse.Namespace) -> dict[str, Any]:
    """Compares two servers, one of them without batches. Where other work keeps the machine busy, the server's CPU time
    says more than pictures a second."""
    ways = {"one client": (alone, 1), "no batches": (alone, args.clients), "batches": (batched, args.clients)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    latencies: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}  # milliseconds a picture
    for _ in range(args.rounds):
        for way, (asked, clients) in ways.items():
            before = asked.cpu_seconds()
            rate, some = speed(asked.port, known, clients, args.seconds)
            cpu[way].append(1000 * (asked.cpu_seconds() - before) / len(some))
            rates[way].append(rate)
            latencies[way] += some

    def times(way: str) -> float:
        return statistics.median(b / a for a, b in zip(rates[way], rates["batches"], strict=True))

    def less_cpu(way: str) -> float:
        return statistics.median(a / b for a, b in zip(cpu[way], cpu["batches"], strict=True))

    cuts = {way: statistics.quantiles(some, n=100) for way, some in latencies.items()}
    return {
        "pictures_per_second": {way: statistics.median(some) for way, some in rates.items()},
        "batches_times_one_client": times("one client"),
        "batches_times_no_batches": times("no batches"),
        "cpu_ms_of_the_server_per_picture": {way: statistics.median(some) for way, some in cpu.items()},
        "cpu_of_one_client_times_batches": less_cpu("one client"),
        "cpu_of_no_batches_times_batches": less_cpu("no batches"),
        "seconds_p50": {way: cut[49] for way, cut in cuts.items()},
        "seconds_p99": {way: cut[98] for way, cut in cuts.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.serve", __doc__, "--out benchmarks/results/serve.json")
    parser.add_argument("--weights", type=Path, help="of a stage that embeds and captions (random ones)")
    parser.add_argument("--requests", type=int, default=1000, help="of the mixed load (%(default)s)")
    parser.add_argument("--hostile", type=float, default=0.05, metavar="SHARE", help="of them (%(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="of the server with batches (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the speeds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each speed in a round (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        weights = args.weights or make_weights(Path(work) / "stage")
        known = Known(load(weights), Writing())
        with server(weights, 1) as alone, server(weights, args.batch) as batched:
            mixed = mixed_load(batched.port, known, args.requests, args.hostile, args.clients)
            mixed["peak_mib_of_the_server"] = batched.peak_mib()
            fast = speeds(alone, batched, known, args)
    facts = {**about("benchmarks.serve", arguments), **machine("torch", "fastapi", "uvicorn")}
    write(
        {**facts, "weights": str(args.weights or "random, the quickstart's model"), "mixed": mixed, "speed": fast},
        args.out,
    )
    if mixed["wrong"]:
        raise ValueError(f"{len(mixed['wrong'])} answers were wrong; `wrong` names them")


if __name__ == "__main__":
    sys.exit(main())
