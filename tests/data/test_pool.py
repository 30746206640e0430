"""The loader's workers: what they hand over, and that no batch is lost with one that dies, hangs or meets a bug."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import time
from itertools import islice

import numpy as np
import pytest
import torch

from pretrain.data import pool as pools
from pretrain.data.parcel import ONCE, Opened, Parcel
from pretrain.data.pinning import pinned
from pretrain.data.pool import Pool, WorkerDied
from pretrain.parallel.faults import worker_died
from tests.data.test_loader import by_key


class Numbers:
    """Makes (item, a tensor in the pictures' place, a small one), after `before(item)`."""

    pictures = (2, 3, 4, 4)

    def __init__(self, before=None):
        self.before = before

    def make(self, item, pictures):
        if self.before:
            self.before(item)
        pictures[:] = item[0]
        return item, torch.from_numpy(pictures), torch.full((3,), item[1])


ITEMS = [(step, micro) for step in range(1, 15) for micro in range(2)]


def check(results) -> None:
    results = list(results)
    assert [item for item, *_ in results] == ITEMS
    for item, pictures, small in results:
        assert pictures.shape == Numbers.pictures and (pictures == item[0]).all() and small.tolist() == [item[1]] * 3


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 3), (3, 200)])
def test_results_come_in_the_order_of_the_items_and_nothing_stays_behind(workers: int, ahead: int) -> None:
    files = []
    for _ in range(3):  # multiprocessing keeps a file for all that is shared
        with Pool(Numbers(), workers, ahead) as pool:
            check(pool.results(iter(ITEMS)))
        del pool
        gc.collect()
        files.append(len(os.listdir("/proc/self/fd")))
    assert not multiprocessing.active_children() and files[0] == files[2]


def test_workers_may_come_from_a_server_that_forks_them(monkeypatch, caplog) -> None:
    """As they do by default since Python 3.14: their parent is not the main process."""
    server = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(pools.multiprocessing, "get_context", lambda: server)
    with Pool(Numbers(), 1, 2) as pool:
        check(pool.results(iter(ITEMS)))
    assert not caplog.messages


def test_too_many_open_files_are_named() -> None:
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Pool(Numbers(), 1, 1) as pool:
        results = pool.results(iter(ITEMS))
        next(results)
        opened = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(opened)]  # there is no free place below
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, most))
            with pytest.raises(OSError, match="ulimit -n"):
                next(results)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))
            for file in held:
                os.close(file)


def strike(number: int) -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_workers_had_to_do_is_made_again_with_the_same_bytes(build, monkeypatch, caplog, number: int) -> None:
    monkeypatch.setattr(pools, "HANG_S", 1.0)
    expected = [by_key(step) for step in build().batches(0, 8)]
    batches, steps = build(loading={"workers": 2, "prefetch": 1}).batches(0, 8), []
    for step in batches:
        if len(steps) in (1, 4):
            strike(number)
        steps.append(by_key(step))
    assert steps == expected
    says = {signal.SIGKILL: "is killed by SIGKILL; another one", signal.SIGSTOP: "hangs: no sign of life"}[number]
    assert sum(says in line for line in caplog.messages) >= 2
    assert not multiprocessing.active_children()


def test_one_that_waits_for_its_turn_does_not_hang() -> None:
    with Pool(Numbers(), 1, 1) as pool:
        results = pool.results(iter(ITEMS))
        next(results)
        counts = set()
        end = time.monotonic() + 60
        while len(counts) < 4 and time.monotonic() < end:
            counts.add(pool._pulses[0])
            time.sleep(0.05)
        assert len(counts) == 4


def die(item) -> None:
    if item == (3, 0):
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_item_that_kills_every_worker_ends_the_run() -> None:
    with Pool(Numbers(die), 2, 2) as pool, pytest.raises(WorkerDied) as met:
        list(pool.results(iter(ITEMS)))
    assert str(met.value).endswith("is killed by SIGKILL, 3 times in a row at step 3") and worker_died(met.value)


def stumble(item) -> None:
    if item == (3, 0):
        raise KeyError("no such word")


def test_a_bug_in_a_worker_is_told_with_its_traceback_in_its_turn() -> None:
    with Pool(Numbers(stumble), 2, 2) as pool:
        results = pool.results(iter(ITEMS))
        assert len(list(islice(results, 4))) == 4
        with pytest.raises(RuntimeError, match=r"(?s)at step 3:\nTraceback.*in stumble.*no such word"):
            next(results)


class Unsendable(Numbers):
    def make(self, item, pictures):
        return lambda: None


def test_a_result_that_cannot_be_sent_is_a_bug_and_no_wait_for_ever() -> None:
    with Pool(Unsendable(), 1, 1) as pool, pytest.raises(RuntimeError, match=r"(?s)at step 1:.*pickle"):
        next(iter(pool.results(iter(ITEMS))))


def orphan(told) -> None:
    with Pool(Numbers(), 2, 1) as pool:
        next(iter(pool.results(iter(ITEMS))))
        told.send([worker.pid for worker in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_soon_after_their_main_process_is_killed_and_say_nothing(capfd) -> None:
    fork = multiprocessing.get_context("fork")
    hears, told = fork.Pipe(duplex=False)
    main = fork.Process(target=orphan, args=(told,))
    main.start()
    workers = hears.recv()
    main.join()
    end = time.monotonic() + 30
    while any(alive(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(alive(worker) for worker in workers)
    assert capfd.readouterr().err == ""


def alive(pid: int) -> bool:
    return pools._state(pid) not in ("", "Z")


def test_a_parcel_holds_arrays_of_every_kind_and_the_pictures_once() -> None:
    parcel = Parcel((4, 3, 32, 32))
    parcel.array[:] = 7
    value = {
        "pictures": torch.from_numpy(parcel.array),
        "half of them": torch.from_numpy(parcel.array)[:2],
        "ids": torch.arange(10),
        "turned": torch.arange(12).view(3, 4).t(),
        "none": torch.zeros(0, 5),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "array": np.arange(3.0),
        "words": ("a", ["b"]),
    }
    start, size = parcel.close_with(value)
    same = Opened().open(parcel.fd, ONCE, start, size)
    assert size < parcel.array.nbytes + 4096
    os.close(parcel.fd)
    del parcel
    for name, each in value.items():
        if isinstance(each, torch.Tensor):
            assert each.dtype == same[name].dtype and torch.equal(each, same[name]), name
    assert (same["array"] == value["array"]).all() and same["words"] == value["words"]
    same["ids"] += 1
    assert same["ids"][0] == 1


def test_memory_is_filled_again_when_nobody_holds_a_part_of_it() -> None:
    items = [(step, 0) for step in range(1, 60)]
    with Pool(Numbers(), 2, 3) as pool:
        held = {}
        for item, pictures, small in pool.results(iter(items)):
            step = item[0]
            # Whoever holds a view, of torch's or numpy's, holds the memory: also where the rest is gone.
            if step % 10 == 1:
                held[step] = (pictures[1, 1:], pictures.numpy()[0], iter(pictures))[step // 10 % 3]
            assert (pictures == step).all() and (small == 0).all()
            if step == 40:
                del held[1], held[21]
        del pictures, small
        for step in (11, 31, 41, 51):
            each = held.pop(step)
            values = [each] if isinstance(each, torch.Tensor | np.ndarray) else list(each)
            assert len(values) and all((value == step).all() for value in values), step
        files = [len(worker._parcels._memory) for worker in pool._workers]
    assert 6 <= sum(files) < 20, files  # of 59 batches: six ahead, one or two at work, those that were held


def test_a_value_that_grows_needs_no_new_parcel() -> None:
    parcel, opened = Parcel((2, 3), 1), Opened()
    for length in (10, 20, 10**6, 30):
        parcel.array[:] = length % 251
        value = opened.open(parcel.fd, 1, *parcel.close_with((torch.from_numpy(parcel.array), torch.arange(length))))
        assert (value[0] == length % 251).all() and torch.equal(value[1], torch.arange(length))
        assert not opened.freed
        del value
        assert opened.freed.popleft() == 1 and not opened.freed
    os.close(parcel.fd)


def test_pinning_keeps_the_order_and_hands_errors_on_in_their_turn() -> None:
    def pin(result):
        return result[0]

    with Pool(Numbers(stumble), 2, 2) as pool:
        results = pinned(pool, iter(ITEMS), pin)
        assert list(islice(results, 4)) == ITEMS[:4]
        with pytest.raises(RuntimeError, match="no such word"):
            next(results)
    with Pool(Numbers(), 2, 2) as pool:
        assert list(pinned(pool, iter(ITEMS), pin)) == ITEMS
    with Pool(Numbers(), 2, 2) as pool:
        results = pinned(pool, iter(ITEMS), pin)
        assert next(results) == ITEMS[0]
        results.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_computes_or_waits_for_its_storage_does_not_hang(monkeypatch) -> None:
    with Pool(Numbers(), 1, 1) as pool:
        next(iter(pool.results(iter(ITEMS))))
        (worker,) = pool._workers
        strike(signal.SIGSTOP)
        while pools._state(worker.process.pid) != "T":
            time.sleep(0.01)
        spent = iter([10.0, 20.0, 20.0, 20.0, 20.0])
        monkeypatch.setattr(pools, "_cpu_s", lambda pid: next(spent))
        assert not worker.hangs(100.0) and not worker.hangs(200.0)  # it has computed for 10 s
        assert not worker.hangs(200.0 + pools.HANG_S) and worker.hangs(201.0 + pools.HANG_S)
        monkeypatch.setattr(pools, "_state", lambda pid: "D")
        assert not worker.hangs(202.0 + pools.HANG_S)
