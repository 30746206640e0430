"""Saves in the background: training goes on, and nothing is lost, hidden or waited for without end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import saver as saving
from pretrain.checkpoint.directory import Retention
from pretrain.checkpoint.save import newest
from pretrain.checkpoint.saver import BUSY, FAILED, IDLE, Saver
from pretrain.checkpoint.snapshot import HostCopies
from pretrain.checkpoint.weights import SaveError
from pretrain.parallel.faults import Watch
from tests.checkpoint.stand_in import StandIn, install, restored_value
from tests.distributed import CONTEXT, run_ranks
from tests.toys import full_beyond, wait_for

pytestmark = pytest.mark.usefixtures("stand_ins")
PLAIN = Retention()


def new_saver(engine: StandIn, directory: Path, **rest) -> Saver:
    directory.mkdir(exist_ok=True)
    return Saver(engine, directory, Watch(), **rest)


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("step_*"))


@pytest.fixture
def gate(monkeypatch):
    """Writes wait until it is set."""
    opened, write = threading.Event(), saving.write_snapshot

    def waiting(*args):
        opened.wait()
        return write(*args)

    monkeypatch.setattr(saving, "write_snapshot", waiting)
    yield opened
    opened.set()


def test_training_goes_on_and_what_is_written_is_the_snapshot(tmp_path, gate):
    engine = StandIn(5)
    saver = new_saver(engine, tmp_path)
    saver.save(5, {}, PLAIN)
    engine.value += 1  # the next step
    for _ in range(3):
        saver.advance(saver.state)
    assert saver.state == BUSY and visible(tmp_path) == []
    gate.set()
    wait_for(lambda: saver.state == IDLE)
    assert visible(tmp_path) == [], "the ranks have not met since"
    saver.advance(saver.state)
    wait_for(lambda: visible(tmp_path))
    wait_for(lambda: saver.state == IDLE)
    saver.advance(saver.state)
    assert not saver.finish(), "nothing is left to wait for"
    assert restored_value(tmp_path) == (5, 5.0)
    assert not [path.name for path in tmp_path.rglob("*share*")]


def test_it_writes_what_a_plain_save_does(tmp_path):
    for name, background in (("plain", False), ("behind", True)):
        with new_saver(StandIn(5), tmp_path / name, background=background, identity={"recipe_hash": "r"}) as saver:
            saver.save(5, {"model": 1}, PLAIN)
    for path in (tmp_path / "plain" / "step_00000005").iterdir():
        assert path.read_bytes() == (tmp_path / "behind" / "step_00000005" / path.name).read_bytes(), path.name
    assert newest(tmp_path / "behind", precision="fp32", recipe_hash="r").step == 5


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, gate, caplog, monkeypatch):
    monkeypatch.setattr(saving, "LONG_S", 0.05)
    engine = StandIn(1)
    with caplog.at_level(logging.INFO), new_saver(engine, tmp_path) as saver:
        saver.save(1, {}, PLAIN)
        engine.value += 1
        threading.Timer(0.1, gate.set).start()
        saver.save(2, {}, PLAIN)
        assert visible(tmp_path) == ["step_00000001"]
    assert restored_value(tmp_path) == (2, 2.0)
    assert "step 2: waited" in caplog.text


def test_an_exception_waits_for_the_write(tmp_path, gate):
    with suppress(KeyError), new_saver(StandIn(4), tmp_path) as saver:
        saver.save(4, {}, PLAIN)
        threading.Timer(0.1, gate.set).start()
        raise KeyError
    assert restored_value(tmp_path) == (4, 4.0)


@pytest.mark.parametrize("fault", ["full", "bug", "before"])
def test_a_failed_write_is_reported_at_the_next_step(tmp_path, monkeypatch, fault):
    engine = StandIn(1)
    saver = new_saver(engine, tmp_path)
    saver.save(1, {}, PLAIN)
    saver.finish()

    def fail(*args):
        raise OSError(28, "No space left on device", "/x") if fault == "before" else KeyError("weight")

    if fault == "bug":
        monkeypatch.setattr(saving, "write_snapshot", fail)
    with full_beyond(2000) if fault == "full" else nullcontext():
        saver.save(2, {}, PLAIN, (fail,) if fault == "before" else ())
        wait_for(lambda: saver.state != BUSY)
    says = {"full": "moments_rank00000", "bug": "KeyError: 'weight'", "before": "No space left on device (/x)"}
    with pytest.raises(SaveError) as error, saver:
        saver.advance(saver.state)
    assert says[fault] in str(error.value) and "cannot save step 2" in str(error.value)
    assert visible(tmp_path) == ["step_00000001"] and not list(tmp_path.glob(".step*"))
    assert restored_value(tmp_path) == (1, 1.0)


def test_a_failure_to_publish_is_reported_too(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    saver = new_saver(StandIn(1), tmp_path)
    monkeypatch.setattr(saving, "publish", fail)
    saver.save(1, {}, PLAIN)
    for _ in range(2):
        wait_for(lambda: saver.state != BUSY)
        state = saver.state
        if state == IDLE:
            saver.advance(state)
    assert saver.state == FAILED
    with pytest.raises(SaveError, match=r"cannot save step 1 .*Input/output error"):
        saver.advance(saver.state)


# ---- kill -9 at each moment of a write behind training


def die_in_background(directory: Path, call: str, moments: int) -> None:
    """Saves step 2 and is killed in its thread's `moments`-th `call`."""
    real, left = getattr(os, call), [moments]

    def dying(*args, **kwargs):
        if threading.current_thread().name == "save":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, call, dying)
    engine = StandIn(2)
    with new_saver(engine, directory) as saver:
        saver.save(2, {}, Retention(1))
        engine.value += 1
        for _ in range(2):
            wait_for(lambda: saver.state != BUSY)
            saver.advance(saver.state)


def die_at_each_moment(root: Path, call: str) -> None:
    """Each in a process of its own, until one comes to its end."""
    install(setattr)
    status, moments = signal.SIGKILL, 0
    while status == signal.SIGKILL:
        directory = root / f"{moments:02d}"
        with new_saver(StandIn(1), directory, background=False) as saver:
            saver.save(1, {}, PLAIN)
        if (child := os.fork()) == 0:
            die_in_background(directory, call, moments)
            os._exit(0)
        status, moments = os.waitpid(child, 0)[1], moments + 1
    os._exit(status)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_killed_at_any_moment_of_a_write_in_the_background(tmp_path, call):
    process = CONTEXT.Process(target=die_at_each_moment, args=(tmp_path, call))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    *killed, whole = sorted(tmp_path.iterdir())
    assert len(killed) > {"fsync": 10, "replace": 3, "rename": 0}[call]
    for directory in killed:
        assert restored_value(directory) in [(1, 1.0), (2, 2.0)], directory
    assert restored_value(whole) == (2, 2.0) and restored_value(killed[0])[0] == (2 if call == "rename" else 1)
    assert not list(tmp_path.glob("*/.*")), "what was left is removed at the next start"


# ---- two ranks


def meet(saver: Saver) -> None:
    """The end of a step."""
    from pretrain.distributed import highest

    (state,) = highest([saver.state], torch.device("cpu"))
    saver.advance(state)


def two_ranks(root: str) -> list[object]:
    from pretrain.distributed import barrier, rank

    install(setattr)
    outcomes: list[object] = []
    write = saving.write_snapshot

    def slow(*args):
        time.sleep(0.2 * rank())
        return write(*args)

    saving.write_snapshot = slow
    # A failure on one rank is an error on both, at the same step; then the run could go on.
    saver = new_saver(StandIn(1), Path(root) / "disk")
    with full_beyond(1000) if rank() == 1 else nullcontext():
        saver.save(1, {}, PLAIN)
        try:
            for _ in range(1000):
                meet(saver)
                time.sleep(0.002)
        except SaveError as error:
            outcomes.append(str(error))
    saver.save(2, {}, PLAIN)
    saver.finish()
    barrier()
    outcomes.append(visible(Path(root) / "disk"))

    # An exception on one rank: the other one's would come from its next collective.
    try:
        with new_saver(StandIn(3), Path(root) / "bug") as saver:
            saver.save(3, {}, PLAIN)
            raise KeyError(rank())
    except KeyError:
        barrier()
        outcomes.append(visible(Path(root) / "bug"))

    # The same, and the other rank is gone before it has written.
    saving.GRACE_S = 0.3
    if rank() == 1:
        saving.write_snapshot = lambda *args: time.sleep(60)
    start = time.monotonic()
    try:
        with new_saver(StandIn(4), Path(root) / "gone") as saver:
            saver.save(4, {}, PLAIN)
            if rank() == 0:
                raise KeyError
            saver._pending = False
    except KeyError:
        assert time.monotonic() - start < 30
    barrier()
    outcomes.append(visible(Path(root) / "gone"))
    return outcomes


def test_two_ranks_fail_together_and_finish_apart(tmp_path):
    for message, disk, bug, gone in run_ranks(two_ranks, 2, str(tmp_path), timeout=60):
        assert "cannot save step 1" in message and "rank 1" in message and "moments_rank00001" in message
        assert disk == ["step_00000002"] and bug == ["step_00000003"] and gone == []


# ---- which ones stay


@pytest.mark.parametrize("background", [True, False])
def test_the_newest_each_nth_and_the_best_stay(tmp_path, background):
    with new_saver(StandIn(), tmp_path, background=background) as saver:
        for step in range(1, 12):
            saver.engine.value.fill_(step)
            best = {2} if step < 9 else {9}
            saver.save(step, {}, Retention(2, 4, frozenset(best)))
            if step == 7:
                saver.finish()
                assert visible(tmp_path) == [f"step_{n:08d}" for n in (2, 4, 6, 7)]
    assert visible(tmp_path) == [f"step_{n:08d}" for n in (4, 8, 9, 10, 11)]


def test_the_memory_of_a_snapshot_is_used_again():
    copies, value = HostCopies(), torch.ones(5)
    first = copies.copy("a", value)
    value += 1
    assert first.tolist() == [1] * 5 and copies.gib == 20 / 2**30
    assert copies.copy("a", value) is first and first.tolist() == [2] * 5
    assert copies.copy("a", torch.ones(3)).shape == (3,) and copies.gib == 12 / 2**30
