"""Transfers end: in bytes, or in one sentence that names the cause and holds no secret."""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.data.shards import cache as cache_module
from pretrain.data.shards import transfer
from pretrain.data.shards.cache import ShardCache, ShardError, fetch, redact
from pretrain.data.shards.manifest import load_manifest
from tests.toys import wait_for

SECRETS = ("hunter2", "5iGn4tUr3", "t0k3n")
QUERY = "?X-Amz-Credential=t0k3n&X-Amz-Signature=5iGn4tUr3"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cache_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(cache_module, "ATTEMPTS", 2)
    monkeypatch.setattr(transfer, "STALL_S", 0.8)  # it takes curl some of it to start
    monkeypatch.setattr(transfer, "_TICK_S", 0.2)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable], tuple[str, list[str]]]]:
    """serve(answer) -> (address of a server that calls `answer(handler)` for each GET, paths asked for)."""
    servers = []

    def start(answer: Callable) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

            def do_GET(self) -> None:
                asked.append(self.path)
                answer(self)

        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        httpd.daemon_threads, httpd.block_on_close = True, False
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(httpd)
        return f"127.0.0.1:{httpd.server_port}", asked

    yield start
    for httpd in servers:
        httpd.shutdown()
        httpd.server_close()


def refused(action: Callable[[], object]) -> str:
    """The sentence with which a fetch ends, soon and without a secret."""
    start = time.monotonic()
    with pytest.raises(ShardError) as raised:
        action()
    assert time.monotonic() - start < 10
    assert not [secret for secret in SECRETS if secret in str(raised.value)], raised.value
    assert "\n" not in str(raised.value)
    return str(raised.value)


def stalls(handler, head: int = 100, drip: float = 0.0) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(bytes(head))
    while drip:
        time.sleep(drip)
        handler.wfile.write(b"x")
    time.sleep(20)


@pytest.mark.parametrize("drip", [0.0, 0.05], ids=["silent", "dripping"])
def test_a_server_that_stalls_in_the_middle_ends_in_a_sentence(serve, tmp_path, drip):
    address, asked = serve(lambda handler: stalls(handler, drip=drip))
    error = refused(lambda: ShardCache(tmp_path, 1.0).open(f"http://{address}/00000.tar", 1_000_000))
    assert "/00000.tar (it stalled: " in error and "came in 0.8 s); check its server" in error
    assert 1 <= len(asked) <= cache_module.ATTEMPTS
    assert not list(tmp_path.glob("*.shard")) and not list(tmp_path.glob(".*"))


def test_processes_that_wait_for_one_shard_share_its_failure(serve, tmp_path):
    """Otherwise eight workers would wait for eight times as long."""
    address, asked = serve(stalls)
    caches = [ShardCache(tmp_path, 1.0) for _ in range(4)]
    errors: list[str] = []

    def fetch_it(cache: ShardCache) -> None:
        errors.append(refused(lambda: cache.open(f"http://{address}/00000.tar", 1_000_000)))

    threads = [threading.Thread(target=fetch_it, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 and len(set(errors)) == 1 and len(asked) <= cache_module.ATTEMPTS
    refused(lambda: caches[0].open(f"http://{address}/00000.tar", 1_000_000))
    assert len(asked) > cache_module.ATTEMPTS  # later it is tried again


@pytest.mark.parametrize(
    "command", ["sleep 20", "printf half; sleep 20", "sleep 20 | cat", "(sleep 20 &)", "exec >&-; sleep 20"]
)
def test_a_command_that_stalls_is_ended_with_its_children(tmp_path, command):
    error = refused(lambda: fetch(f"pipe:echo $$ >> {tmp_path}/groups; {command}; true {tmp_path}/00000.tar", 100))
    assert "stalled" in error or "does not end" in error
    for group in (tmp_path / "groups").read_text().split():
        wait_for(lambda group=group: not alive(group), 5)


def alive(group: str) -> list[str]:
    """The states of the processes of a group, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            found += [fields[0]] if fields[2] == group and fields[0] != "Z" else []
    return found


def test_a_slow_disk_is_no_stall(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "RATE", 10**9)
    (tmp_path / "a").write_bytes(bytes(300_000))
    parts = []
    for part in transfer.chunks(f"pipe:cat {tmp_path}/a"):
        parts.append(part)
        time.sleep(0.3)
    assert b"".join(parts) == bytes(300_000)


def test_a_suspended_job_is_no_stall(monkeypatch):
    clock = iter(range(0, 10**9, 3600))  # an hour passes with each look
    monkeypatch.setattr(transfer.time, "monotonic", lambda: next(clock))
    assert b"".join(transfer.chunks("pipe:printf a; printf b")) == b"ab"


@pytest.mark.parametrize(
    ("status", "words", "again"),
    [
        (503, "503 Service Unavailable); the server has trouble; try again later", True),
        (429, "429 Too Many Requests); the server has trouble", True),
        (404, "404 Not Found); check the URL", False),
        (403, "403 Forbidden); check the URL and the credentials", False),
        (599, "its server answered 599)", True),
    ],
)
def test_a_refusal_names_the_servers_answer(serve, status, words, again):
    def answer(handler) -> None:
        handler.send_response(status, "Service hunter2")
        handler.send_header("Retry-After", "100000")
        handler.end_headers()

    address, asked = serve(answer)
    error = refused(lambda: fetch(f"http://me:hunter2@{address}/00000.tar{QUERY}", 100))
    assert error.startswith(f"cannot fetch http://{address}/00000.tar (its server answered {status}") and words in error
    assert len(asked) == (cache_module.ATTEMPTS if again else 1)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://me:hunter2@127.0.0.1:1/a.tar{QUERY}", "does not take the connection"),
        (f"http://me:hunter2@host.invalid/a.tar{QUERY}", "the name of its host is not known"),
        (f"http://me:hunter2@[::1/a.tar{QUERY}", "the URL is not valid"),
        (f"nosuch://me:hunter2@host/a.tar{QUERY}", r"no tool for nosuch:// is known"),
        (f"htgs://me:hunter2@host/a.tar{QUERY}", "cannot fetch htgs://host/a.tar"),
        (f"gs://bucket/a.tar{QUERY}", "gsutil is missing"),
        (f"https://me:hunter2@host/it's.tar{QUERY}", "%27"),
        (f"pipe:false -H 'Authorization: Bearer t0k3n' 'https://me:hunter2@h/a.tar{QUERY}' -u me:hunter2", "a.tar ("),
        ("pipe:TOKEN=t0k3n false --token=t0k3n -u me:hunter2 s3/5iGn4tUr3/AAAA/BBBB==", "pipe:false ("),
    ],
)
def test_no_sentence_holds_a_secret(url, words, monkeypatch, tmp_path):
    (tmp_path / "curl").symlink_to(shutil.which("curl"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert words in refused(lambda: fetch(url, 100))
    if "pipe" not in url:
        assert "hunter2" not in refused(lambda: ShardCache(tmp_path, 1.0).open(url, 100))


def test_webdatasets_own_rules_hold(tmp_path, monkeypatch):
    """Rewriting of URLs, and schemes that only it opens."""
    (tmp_path / "a.tar").write_bytes(b"a tar")
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://bucket/={tmp_path}/")
    assert fetch("s3://bucket/a.tar", 100) == b"a tar"
    (tmp_path / "ais").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "ais").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert fetch("ais://bucket/a.tar", 100) == b"get ais://bucket/a.tar -\n"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@h/a.tar#t0k3n",
        "https://me:hunter2/5iGn4tUr3@h/a.tar?t0k3n",
        "https://me:hunter2@[::1]:80/a.tar?a/b@c=t0k3n",
        "pipe:TOKEN='5iGn4tUr3 t0k3n' curl -H \"X: t0k3n/5iGn4tUr3.abc\" h/a.tar?t0k3n.abc",
        "pipe:curl https://h/a.tar\\?X-Amz-Signature=5iGn4tUr3 -H 'Authorization: Bearer t0k3n'",
        "pipe:curl -u me:hunter2 https://h/a.tar -H Authorization:5iGn4tUr3.t0k3n_5iGn4tUr3",
        "pipe:http_proxy=http://me:hunter2@proxy/ wget -qO- https://h/a.tar",
        "pipe:sh -c 'curl -u me:hunter2 https://h/a.tar?t0k3n'",
    ],
)
def test_secrets_are_not_shown(url):
    assert not [secret for secret in SECRETS if secret in redact(url)], redact(url)


def test_of_a_pipe_its_program_and_its_file_are_shown():
    assert redact("pipe:cat /data/00000.tar") == "pipe:cat ... /data/00000.tar"
    assert redact("pipe:aws s3 cp s3://bucket/a/{0..9}.tar - | zstd -d") == "pipe:aws ... s3://bucket/a/{0..9}.tar"
    assert redact("pipe:curl 'https://h/a/") == "pipe:curl ... https://h/a/"
    assert redact("pipe:TOKEN=x wget -qO- 'https://h/a.tar?t'") == "pipe:wget ... https://h/a.tar"
    assert redact("https://h:8000/a@b/00000.tar?t") == "https://h:8000/a@b/00000.tar"
    assert redact("https://[::1]/a.tar") == "https://[::1]/a.tar"
    assert redact("pipe:") == "pipe:" and redact("/data/00000.tar") == "/data/00000.tar"


def endless(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**16))


def test_a_limit_ends_the_transfer(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MOST_BYTES", 2**20)
    address, asked = serve(endless)
    assert "has more than 1000 bytes" in refused(lambda: fetch(f"http://{address}/manifest.json{QUERY}", 1000))
    error = refused(lambda: ShardCache(tmp_path, 1.0).open(f"http://{address}/00000.idx{QUERY}"))
    assert f"http://{address}/00000.idx has more than 1048576 bytes, so it is the wrong file" in error
    assert len(asked) == 2 and not list(tmp_path.glob("*.shard")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["{00000..00001}.tar", "[0-9].tar", "{0..1.tar", "no_shard", "00000.tar"])
def test_a_pattern_with_a_signature_is_shown_without_it(tmp_path, name):
    (tmp_path / "manifest.json").write_text('{"version": 1, "shards": [], "digest": ""}')
    for pattern in (f"pipe:cat {tmp_path}/{name} # {QUERY} hunter2", f"http://me:hunter2@127.0.0.1:1/{name}{QUERY}"):
        with pytest.raises(ValueError, match=r".") as raised:
            load_manifest(pattern)
        assert not [secret for secret in SECRETS if secret in str(raised.value)], raised.value
