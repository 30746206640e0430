"""A rank that dies, hangs or fails in the middle of a step: the others end in time, and the same line goes on."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pretrain.metrics import read_metrics
from pretrain.parallel import faults
from pretrain.parallel.faults import LOST, STOPPED, Watch, leave
from pretrain.recipes import find_recipe
from pretrain.run.identity import stage_hash
from tests.small_run import Ranks, check_weights, command, tokenizer_of

TIMEOUT_S = 4.0
GRACE_S = 5.0  # instead of 20
STEPS = 12
LAYOUTS = {
    "zero1": ("zero1.json", []),
    "zero3": ("zero3.json", []),
    "tensor": ("zero1.json", ["parallel.tensor=2"]),
    "pipe": ("zero1.json", ["parallel.pipe=2"]),
}


def line(data: Path, run: Path, layout: str, *more: str) -> list[str]:
    ds, settings = LAYOUTS[layout]
    settings = [*settings, tokenizer_of(data), f"timeout_s={TIMEOUT_S}", f"steps={STEPS}", "save_every=4"]
    return command(data, run, "fusion", *settings, "drop_path=0.0", *more, ds=ds)


def strike(number: int, victim: int, calls: int, rank: int) -> None:
    """`victim` sends itself a signal in its `calls`-th backward pass, when the others wait for its gradients."""
    backward, left = torch.autograd.backward, [calls]

    def struck(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return backward(*args, **kwargs)

    if rank == victim:
        torch.autograd.backward = struck


def sentences(log: Path) -> list[str]:
    """What the ranks said at their end; asserts that they said nothing else of it."""
    text = log.read_text()
    assert "Traceback" not in text and "gloo" not in text, text
    log.unlink()
    return [told[9:] for told in text.splitlines() if told[9:].startswith(("rank ", "error"))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_hangs_then_one_dies_and_the_run_ends_bit_equal(data, tmp_path, layout):
    # In the foreground: a save of step 4 that is still being written at step 6 would be lost with the run.
    settings = (layout, "save_in_background=false")
    log, alone, struck = tmp_path / "log", tmp_path / "alone", tmp_path / "struck"
    assert Ranks(line(data, alone, *settings), data, 2, log).wait(60) == [0, 0], log.read_text()
    log.unlink()

    ranks = Ranks(line(data, struck, *settings), data, 2, log, partial(strike, signal.SIGSTOP, 1, 6))
    assert ranks.wait(60) == [LOST, LOST], log.read_text()
    assert "in struck" in log.read_text(), "the stack of the rank that hung"
    first, *_ = sentences(log)
    assert first.startswith(f"rank 0 of 2: rank 1 on {socket.gethostname()} gives no sign of life for ")
    assert first.endswith("(here: in step 6); checkpoints are intact, start the same line again")

    ranks = Ranks(line(data, struck, *settings), data, 2, log, partial(strike, signal.SIGKILL, 0, 6))
    assert ranks.wait(60) == [-signal.SIGKILL, LOST], log.read_text()
    (told,) = sentences(log)
    assert "rank 1 of 2: another rank died or hung up (in step 10; " in told
    ranks.kill()

    assert Ranks(line(data, struck, *settings), data, 2, log).wait(60) == [0, 0], log.read_text()
    assert "resumed from" in log.read_text()
    assert len(read_metrics(struck / "fusion" / "metrics.jsonl")) == STEPS
    check_weights(struck / "fusion", alone / "fusion")
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")), "69 MB each, left by killed ranks"


def wait(victim: int, rank: int) -> None:
    """`victim` reads for 5 s before its sixth step, and sleeps for ever in its ninth; a step may take 2 s."""
    from pretrain.data.loader import Loader
    from pretrain.parallel import patience
    from pretrain.run import build

    patience.FLOORS_S["step"] = 2.0
    batches, step, steps = Loader.batches, build.train_step, iter(range(1, 100))

    def reading(self, start: int, stop: int):
        for count, micro_batches in enumerate(batches(self, start, stop), 1):
            if count == 6:
                time.sleep(5)
            yield micro_batches

    def stepping(*args, **kwargs):
        if next(steps) == 9:
            time.sleep(600)
        return step(*args, **kwargs)

    if rank == victim:
        Loader.batches, build.train_step = reading, stepping


@pytest.mark.slow
def test_a_rank_that_reads_for_long_is_waited_for_and_one_that_hangs_is_named(data, tmp_path):
    log = tmp_path / "log"
    ranks = Ranks(line(data, tmp_path, "zero1", "timeout_s=300"), data, 2, log, partial(wait, 1))
    began = time.monotonic()
    assert ranks.wait(60) == [LOST, LOST], log.read_text()
    assert time.monotonic() - began < 40, "it waited for timeout_s"
    assert "in stepping" in log.read_text(), "the stack of the rank that hung"
    missing = f"rank 1 on {socket.gethostname()} hangs in step 9: it did not come to the collective in which"
    # A rank that has said so may still see the other one end before it ends itself.
    told = [sentence for sentence in sentences(log) if "another rank died or hung up" not in sentence]
    assert len(told) == 2 and all(f"{missing} others wait (here: in step 9)" in sentence for sentence in told), told


def stop_first(rank: int) -> None:
    """Rank 0, in whose process the signs of life are, stops in its sixth step; silence may last 3 s."""
    from pretrain.parallel import faults

    faults.SILENT_S = 3.0
    strike(signal.SIGSTOP, 0, 6, rank)


@pytest.mark.slow
def test_the_rank_that_holds_the_signs_is_named_too(data, tmp_path):
    log = tmp_path / "log"
    ranks = Ranks(line(data, tmp_path, "zero1", "timeout_s=300"), data, 2, log, stop_first)
    assert ranks.wait(60, 1) == [LOST], log.read_text()
    ranks.kill()  # rank 0 goes on by itself only where rank 1 had seen a sign of it
    told = sentences(log)[0]  # the node, or its address where no sign of it was seen
    assert told.startswith("rank 1 of 2: rank 0 on ") and " does not answer for " in told


def fail(error: Exception, victim: int, rank: int) -> None:
    """`victim` raises in the third step's reading."""
    from pretrain.data.loader import Loader

    batches = Loader.batches

    def failing(self, start: int, stop: int):
        for count, micro_batches in enumerate(batches(self, start, stop)):
            if count == 2:
                raise error
            yield micro_batches

    if rank == victim:
        Loader.batches = failing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("shard 7 is broken; mend it"), 2, "error on rank 1: shard 7 is broken; mend it"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "error on rank 1: [Errno 28] No space left"),
        (KeyError("a bug"), 1, "bug on rank 1"),
    ],
)
def test_the_one_rank_that_fails_is_heard_first(data, tmp_path, error, code, says):
    log = tmp_path / "log"
    ranks = Ranks(line(data, tmp_path, "zero1"), data, 2, log, partial(fail, error, 1))
    assert ranks.wait(60) == [LOST, code], log.read_text()
    text = log.read_text()
    assert ("Traceback" in text and "KeyError: 'a bug'" in text) == (code == 1)
    first, second = text.index(says), text.index("rank 0 of 2: another rank died or hung up (in step 3; ")
    assert first < second


def lose_worker(number: int, victim: int, stop: int, rank: int) -> None:
    """`victim` sends its data workers a signal before its third step, and itself the signal `stop` a second later."""
    from pretrain.run import build

    if victim:  # a process alone comes to its save within torch's five seconds of waiting, and has 20 for it
        faults.GRACE_S = GRACE_S
    step, left = build.train_step, [3]

    def stepping(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, number)
            if stop:
                threading.Timer(1, os.kill, (os.getpid(), stop)).start()
        return step(*args, **kwargs)

    if rank == victim:
        build.train_step = stepping


def kill_workers(victim: int, rank: int) -> None:
    """Each data worker of `victim` dies at its third batch, however often it is replaced."""
    from pretrain.data.micro_batches import MicroBatches

    make = MicroBatches.make

    def dying(self, item, pictures):
        if item[0] >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, item, pictures)

    if rank == victim:
        MicroBatches.make = dying


WORKER = ["loading.workers=1", "loading.prefetch=1", "steps=4000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "number", "says"),
    [
        (2, signal.SIGKILL, "rank 1 of 2: a data worker died (in "),
        (2, signal.SIGSTOP, "rank 1 of 2: its own data did not come within "),
        (1, signal.SIGKILL, "rank 0 of 1: a data worker died (in "),
        (1, signal.SIGSTOP, "rank 0 of 1: its own data did not come within "),
    ],
)
def test_data_workers_that_die_or_hang(data, tmp_path, world, number, says):
    log = tmp_path / "log"
    started, last = line(data, tmp_path, "zero1", *WORKER), world - 1
    lost = partial(kill_workers, last) if number == signal.SIGKILL else partial(lose_worker, number, last, 0)
    ranks = Ranks(started, data, world, log, lost)
    assert ranks.wait(60) == [LOST] * world, log.read_text()
    told = sentences(log)
    assert any(says in sentence for sentence in told), told
    assert all(sentence.endswith("checkpoints are intact, start the same line again") for sentence in told)


@pytest.mark.slow
def test_a_killed_data_worker_costs_a_run_nothing_but_its_place(data, tmp_path):
    log, alone, struck = tmp_path / "log", tmp_path / "alone", tmp_path / "struck"
    more = ["timeout_s=60", "loading.prefetch=1"]
    assert Ranks(line(data, alone, "zero1", *more), data, 1, log).wait(60) == [0], log.read_text()
    workers = line(data, struck, "zero1", *more, "loading.workers=2")
    assert Ranks(workers, data, 1, log, partial(lose_worker, signal.SIGKILL, 0, 0)).wait(60) == [0], log.read_text()
    assert "is killed by SIGKILL; another one makes its batches again, from step " in log.read_text()
    check_weights(struck / "fusion", alone / "fusion")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_ends_a_run_that_waits_for_its_data(data, tmp_path, world):
    log = tmp_path / "log"
    started = line(data, tmp_path, "zero1", *WORKER, "timeout_s=600", "save_every=4000")
    ranks = Ranks(started, data, world, log, partial(lose_worker, signal.SIGSTOP, world - 1, signal.SIGTERM))
    assert ranks.wait(60) == ([LOST, STOPPED] if world == 2 else [STOPPED]), log.read_text()
    said = log.read_text()
    if world == 1:  # it waits for nobody, and saves what it has done
        (checkpoint,) = (tmp_path / "fusion" / "checkpoints").glob("step_*")
        done = len(read_metrics(tmp_path / "fusion" / "metrics.jsonl"))
        assert checkpoint.name == f"step_{done:08d}" and f"saved at step {done}" in said
    else:
        assert "rank 1 of 2: stopped by a signal (in the reading of step " in said


@pytest.mark.slow
def test_sigterm_ends_a_run_whose_other_ranks_do_not_come(data, tmp_path):
    log = tmp_path / "log"
    ranks = Ranks(line(data, tmp_path, "zero1"), data, 2, log, come_alone)
    assert ranks.wait(60) == [STOPPED, -signal.SIGKILL], log.read_text()
    assert "stopped by a signal before the first step" in log.read_text()


def come_alone(rank: int) -> None:
    """Rank 1 never comes, and rank 0 is asked to end while it waits for it."""
    faults.GRACE_S = GRACE_S
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.distributed.DistStoreError("wait timeout after 1000ms"), "another rank died or hung up (in step 7;"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"), "another rank died or hung up (in step 7;"),
        (RuntimeError("NCCL error in: x.cpp:1, remote process exited"), "another rank died or hung up (in step 7;"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "by signal: Killed), most likely"),
        (RuntimeError("DataLoader worker (pid 3) is killed by SIGKILL, 3 times"), "because the memory was full; use"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by SIGSEGV, 3 times"),
            "a full memory does not do; see what",
        ),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. "), "because /dev/shm was full"),
        (RuntimeError("DataLoader worker (pid 3) ended with exit code 3, 3 times"), "a full memory does not do; see"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "a data worker died (in step 7"),
        (KeyError("Caught KeyError in DataLoader worker process 0.\nOriginal Traceback"), None),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_only_what_other_processes_did_is_explained(error, says):
    watch = Watch()
    watch.enter("step 7")
    told = watch.explain(error)
    assert told is None if says is None else says in told


def test_workers_that_a_run_leaves_behind_raise_nothing_later():
    """torch's SIGCHLD handler raises in whatever the main thread does when a worker is found killed."""
    rows = iter(DataLoader([0] * 8, num_workers=2))
    next(rows)
    assert len(multiprocessing.active_children()) == 2
    handler = signal.getsignal(signal.SIGCHLD)
    assert leave(2) == 2
    for _ in range(50):
        time.sleep(0.01)
    assert not multiprocessing.active_children() and signal.getsignal(signal.SIGCHLD) == handler
    del rows


def test_a_loss_met_on_the_way_out_does_not_hide_the_cause():
    with pytest.raises(RuntimeError) as met:  # noqa: PT012
        try:
            raise ValueError("the disk is full")
        finally:
            raise RuntimeError("gloo/transport: Connection closed by peer")
    told = Watch().explain(met.value)
    assert told is not None and told.endswith("(after ValueError: the disk is full)")


def test_the_time_is_a_knob_that_changes_no_run():
    recipe = find_recipe("tiny")
    stage = recipe.stages["vision"]
    assert stage_hash(replace(recipe, timeout_s=20.0), stage) == stage_hash(recipe, stage)
    with pytest.raises(ValueError, match=r"timeout_s=0 is below 1; use 1 or more"):
        replace(recipe, timeout_s=0)
