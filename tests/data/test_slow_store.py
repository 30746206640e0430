"""A store of shards that stalls and fails: for a while, and for good."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.data.shards import cache, transfer
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.transfer import Unreachable
from tests.store import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cache, "PAUSE_S", 0.0)
    monkeypatch.setattr(cache, "ATTEMPTS", 4)
    monkeypatch.setattr(transfer, "STALL_S", 0.8)
    monkeypatch.setattr(transfer, "_TICK_S", 0.2)


@pytest.fixture
def remote(build, mix, tmp_path) -> Callable:
    """A loader of texts whose shards come from a store."""

    def remote(store: Store, **loading):
        source = replace(mix["texts"], shards=store.url)
        options = {"cache_dir": str(tmp_path / f"cache {store.url.split(':')[-1][:-1]}"), **loading}
        return build(mix={"texts": source}, counts={"texts": 12}, transform=None, loading=options)

    return remote


def keys(loader, steps: int = 4) -> list[tuple[str, ...]]:
    return [batch.keys for step in loader.batches(0, steps) for batch in step]


def test_trouble_that_passes_changes_nothing(build, mix, remote):
    plain = keys(build(mix={"texts": mix["texts"]}, counts={"texts": 12}, transform=None))
    for skip in (False, True):  # also where a shard may be left out: it was there in the end
        with Store(Path(mix["texts"].shards), ["503", "stall", "cut"], "00000.tar") as store:
            assert keys(remote(store, skip_bad_shards=skip)) == plain
            assert store.asked.count("/00000.tar") == 4


def test_each_trouble_is_a_log_line(mix, tmp_path, caplog):
    whole = Path(mix["texts"].shards) / "00000.tar"
    with Store(whole.parent, ["503", "stall", "cut"]) as store, caplog.at_level(logging.WARNING):
        os.close(ShardCache(tmp_path, 1.0).open(f"{store.url}00000.tar", whole.stat().st_size))
    whys = ("answered 503", "it stalled", "the transfer was interrupted")
    for attempt, (why, record) in enumerate(zip(whys, caplog.records, strict=True), start=1):
        assert f"attempt {attempt} of 4 failed" in record.message and why in record.message


def test_trouble_that_stays_is_one_sentence_that_says_it_may_pass(mix, remote):
    with Store(Path(mix["texts"].shards), ["503"] * 99) as store, pytest.raises(TimeoutError) as raised:
        keys(remote(store))
    assert "\n" not in str(raised.value)
    assert "503 Service Unavailable); the server has trouble; try again later (attempt 4 of 4)" in str(raised.value)


def test_what_stays_unreachable_is_left_out_by_the_rule_of_the_order(build, mix, remote, tmp_path):
    """As if the shard were missing from the disk."""
    with Store(Path(mix["texts"].shards), ["503"] * 99, "00002.tar") as store:
        loader = remote(store, skip_bad_shards=True)
        got = keys(loader)
    gone = replace(mix["texts"], shards=str(shutil.copytree(mix["texts"].shards, tmp_path / "gone")))
    (tmp_path / "gone" / "00002.tar").unlink()
    local = build(mix={"texts": gone}, counts={"texts": 12}, transform=None, loading={"skip_bad_shards": True})
    assert got == keys(local) and loader.replaced == local.replaced > 0


def test_pauses_grow_to_a_limit_and_differ(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(cache, "PAUSE_S", 1.0)
    monkeypatch.setattr(cache.time, "sleep", slept.append)
    pauses = []
    for attempt in range(7):
        slept.clear()
        cache._pause(attempt)
        pauses.append(sum(slept))
        assert max(slept) <= 1.0  # in small pieces, so that a worker can show that it lives
    for pause, least in zip(pauses, [1, 3, 9, 27, 60, 60, 60], strict=True):
        assert least <= pause <= 1.5 * least + 1e-6
    assert sum(pauses) > 200 and len({round(pause, 6) for pause in pauses[4:]}) > 1


def test_processes_that_wait_for_one_shard_share_that_it_may_come_later(tmp_path):
    url = "pipe:sleep 0.3; false"
    errors: list[Exception] = []

    def fetch() -> None:
        try:
            ShardCache(tmp_path, 1.0).open(url, 10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [Unreachable] * 3 and len({str(error) for error in errors}) == 1
