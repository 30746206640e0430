"""The ranks meet: all come, one does not, the first one does not."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pretrain.launch.outcome import _failure
from pretrain.parallel.meeting import limit_s, meet
from pretrain.parallel.patience import OTHER_S


@pytest.fixture
def address(monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    for name in ("LOCAL_WORLD_SIZE", "IMGLISH_NODES", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def come(numbers: list[int], world: int, limit: float) -> list[object]:
    """What each of these ranks gets: a store, or an error."""

    def one(number: int) -> object:
        try:
            return meet(number, world, limit)
        except TimeoutError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


def test_all_come(address):
    first, *others = come([0, 1, 2], 3, 20)
    first.set("a", "b")
    assert [store.get("a") for store in others] == [b"b", b"b"]


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, "rank 1 of 6 "),
        ({"LOCAL_WORLD_SIZE": "2"}, "rank 1 on node1 "),
        ({"LOCAL_WORLD_SIZE": "1", "IMGLISH_NODES": "a b c d e f"}, "rank 1 on b "),
    ],
)
def test_a_rank_that_does_not_come_is_named_on_all_that_did(address, monkeypatch, variables, missing):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    said = come([0, 4], 6, 0.5)
    assert time.monotonic() - start < 30 and said[0] == said[1]
    assert str(said[0]).startswith(f"{missing}does not come to the start within 0 s, nor do 3 others (2, 3, 5); see")
    # The job leaves such a node out when it is named again.
    assert _failure(f"rank00000.log:12:00:00 {said[0]}").node == (missing.split()[3] if " on " in missing else "")


def test_the_first_rank_that_does_not_come_is_named_by_its_address(address):
    (said,) = come([1], 2, 1)
    assert str(said).startswith("rank 0 on 127.0.0.1 does not come to the start within 1 s")


def test_who_needed_long_itself_waits_longer(monkeypatch):
    assert limit_s() >= OTHER_S
    monkeypatch.setattr("pretrain.parallel.meeting.started", lambda process: 0)
    assert limit_s() == OTHER_S
    monkeypatch.setattr("pretrain.parallel.meeting.started", lambda process: 1)  # as old as the machine
    assert limit_s() == pytest.approx(max(OTHER_S, 3 * time.clock_gettime(time.CLOCK_BOOTTIME)), abs=1)
