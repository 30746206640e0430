"""Remote shards: fetched whole and once, kept in a bounded directory that processes share."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import shlex
import threading
from pathlib import Path

import pytest

from pretrain.data.shards import cache as cache_module
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.reader import ShardError, ShardReader, load_manifest
from pretrain.files import beside
from tests.toys import read_all


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cache_module, "PAUSE_S", 0.0)


@pytest.fixture
def server(source):
    """(URL of the source, paths asked for), from a server on this machine. It knows 00001.tar as half of itself if
    `halve` is in the list."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            if "halve" in asked and self.path == "/00001.tar":
                data = (source / "00001.tar").read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return
            super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=source)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", asked
        httpd.shutdown()


@pytest.mark.parametrize("ending", ["", "{00000..00002}.tar", "*.tar"])
def test_shards_come_over_http_once(source, server, tmp_path, ending):
    url, asked = server
    remote = load_manifest(url + ending)
    assert remote.digest == load_manifest(str(source)).digest
    everything = read_all(ShardReader(load_manifest(str(source))))
    assert read_all(ShardReader(remote, tmp_path / "cache")) == everything
    assert read_all(ShardReader(remote, tmp_path / "cache")) == everything  # another process would find them too
    names = [f"/0000{number}.{ending}" for number in range(3) for ending in ("idx", "tar")]
    assert sorted(asked) == [*names, "/manifest.json"]


def test_shards_come_through_a_pipe(source, tmp_path):
    remote = load_manifest(f"pipe:cat {shlex.quote(str(source))}/{{00000..00002}}.tar")
    reader = ShardReader(remote, tmp_path / "cache")
    assert read_all(reader) == read_all(ShardReader(load_manifest(str(source))))
    reader.fetch(0)
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 6


@pytest.mark.usefixtures("quick")
def test_an_interrupted_download_leaves_nothing_behind(source, server, tmp_path):
    url, asked = server
    reader = ShardReader(load_manifest(url), tmp_path / "cache")
    asked.append("halve")
    with pytest.raises(ShardError, match=r"00001.tar"):
        reader.read(1, 0)
    assert asked.count("/00001.tar") == cache_module.ATTEMPTS
    with pytest.raises(ShardError, match=r"00001.tar"):  # remembered, not asked for again
        reader.read(1, 1)
    assert asked.count("/00001.tar") == cache_module.ATTEMPTS
    assert not list((tmp_path / "cache").glob(".*"))
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1  # the index, which is whole
    asked.remove("halve")
    assert ShardReader(reader.manifest, tmp_path / "cache").read(1, 0)["txt"] == b"000010000"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:cat /nowhere/00000.tar", "cannot be fetched"),
        ("pipe:head -c 10 /dev/zero", "has 10 bytes where its manifest says 2000"),
        ("pipe:head -c 9000 /dev/zero", "has more bytes where its manifest says 2000: it was replaced"),
        ("nosuch://host/00000.tar", "cannot be fetched"),
        ("https://host/it's/00000.tar", "%27"),
    ],
)
def test_what_cannot_be_fetched_is_named(tmp_path, url, words):
    with pytest.raises(ShardError, match=words):
        ShardCache(tmp_path, 1.0).open(url, 2000)
    assert not list(tmp_path.glob("*.shard")) and not list(tmp_path.glob(".*"))


def test_s3_goes_through_the_aws_command(tmp_path, monkeypatch):
    (tmp_path / "aws").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said = cache_module.fetch("s3://bucket/a dir/00000.tar", 1000)
    assert said == b"s3 cp --only-show-errors s3://bucket/a dir/00000.tar -\n"


def test_secrets_in_a_url_are_not_shown():
    assert cache_module.shown("https://me:secret@host/a.tar?token=secret") == "https://host/a.tar"


def blob(directory: Path, name: str, size: int) -> str:
    (directory / name).write_bytes(name[0].encode() * size)
    return f"pipe:cat {shlex.quote(str(directory / name))}"


def test_the_least_recently_used_is_evicted_and_the_cache_stays_bounded(tmp_path, caplog):
    cache = ShardCache(tmp_path / "cache", 2500 / 2**30)
    urls = [blob(tmp_path, f"{i}.tar", 1000) for i in range(4)]

    def held() -> list[str]:
        return sorted(path.read_bytes()[:1].decode() for path in (tmp_path / "cache").glob("*.shard"))

    for turn, i in enumerate((0, 1, 0, 2)):  # 0 is used again, so 1 has to go
        os.close(cache.open(urls[i], 1000))
        for path in (tmp_path / "cache").glob("*.shard"):  # clocks are coarse: an hour between two uses
            stat = path.stat()
            os.utime(path, (stat.st_mtime - 3600, stat.st_mtime - 3600))
        assert len(held()) <= 2, turn
    assert held() == ["0", "2"]
    assert not caplog.records
    os.close(cache.open(urls[3], 1000))
    os.close(cache.open(urls[1], 1000))
    os.close(cache.open(urls[0], 1000))
    assert "cache_gib" in caplog.text and "too small" in caplog.text
    with pytest.raises(ValueError, match=r"loading.cache_gib=.* is smaller than the one shard"):
        cache.open(urls[0], 5000)


def test_what_a_killed_process_left_is_swept_or_taken_over(tmp_path):
    cache = ShardCache(tmp_path / "cache", 2500 / 2**30)
    url = blob(tmp_path, "a.tar", 1000)
    half = beside(cache._path(url, " 1000"))
    half.write_bytes(b"half")
    (tmp_path / "cache" / ".other.shard.writing").write_bytes(bytes(1200))
    (tmp_path / "cache" / "other.tmp").write_bytes(bytes(1200))  # of an earlier version
    os.close(cache.open(url, 1000))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir() if path.name != "lock") == [".shard"]


def test_a_file_that_the_disk_cut_short_is_fetched_again(tmp_path):
    cache, url = ShardCache(tmp_path / "cache", 1.0), blob(tmp_path, "a.tar", 1000)
    os.close(cache.open(url, 1000))
    (path,) = (tmp_path / "cache").glob("*.shard")
    os.truncate(path, 10)
    handle = cache.open(url, 1000)
    assert os.fstat(handle).st_size == 1000
    os.close(handle)


def _hammer(directory: Path, urls: list[str], limit: float, turns: int) -> None:
    cache = ShardCache(directory, limit)
    for turn in range(turns):
        url = urls[(turn * 7 + os.getpid()) % len(urls)]
        handle = cache.open(url, 1000)
        content = os.pread(handle, 2000, 0)
        os.close(handle)
        assert len(content) == 1000 and len(set(content)) == 1 and f"/{chr(content[0])}.tar" in url


def hammer_together(*arguments) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


def test_several_processes_share_a_cache_that_is_too_small(tmp_path):
    urls = [blob(tmp_path, f"{i}.tar", 1000) for i in range(5)]
    hammer_together(tmp_path / "cache", urls, 3500 / 2**30, 12)
    assert len(list((tmp_path / "cache").glob("*.shard"))) <= 3 + 3  # the bound, and downloads that were in flight
    assert not list((tmp_path / "cache").glob(".*"))


def test_processes_that_want_one_shard_fetch_it_once(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"a" * 1000)
    count = tmp_path / "count"
    url = f"pipe:echo x >> {shlex.quote(str(count))}; sleep 0.3; cat {shlex.quote(str(tmp_path / 'a.tar'))}"
    hammer_together(tmp_path / "cache", [url], 1.0, 1)
    assert count.read_text() == "x\n"
