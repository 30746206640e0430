"""The command pretrain.serve: a process that ends gracefully, and what it refuses before it begins."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import pretrain
from benchmarks.serve_clients.exchange import ask, exchange, get, head, in_base64
from pretrain.serve import main
from tests.test_pretrained import pictures, stage, task  # noqa: F401, the fixtures
from tests.toys import needs, refused, write_text_model

needs("fastapi")
needs("uvicorn")


def test_a_served_stage_answers_and_sigterm_lets_what_is_at_work_end(stage):  # noqa: F811
    line = [sys.executable, "-m", "pretrain.serve", str(stage), "--port", "0", "--seconds", "60"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("http://127.0.0.1:") and said.endswith(" answers /embed, /similarity, /predict\n"), said
        port = int(said.split()[0].rsplit(":", 1)[1])
        reply = ask(port, "/embed", {"pictures": in_base64(*pictures(2))})
        expected = pretrain.load(stage).embed_images(pictures(2))
        assert abs(expected - expected.new_tensor(reply.content["pictures"])).max() < 1e-6
        body = b'{"texts": ["a red bus"]}'
        replies = []
        parts = [head("POST", "/embed", len(body)) + body[:5], body[5:]]
        slow = threading.Thread(target=lambda: replies.append(exchange(port, parts, pause=1.5)))
        slow.start()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        slow.join(60)
        assert replies[0].status == 200  # it came after the signal
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "all requests are answered\n") and "Traceback" not in error
        with pytest.raises(ConnectionRefusedError):
            exchange(port, [get("/health")])
    finally:
        process.kill()


def test_what_cannot_be_used_is_one_sentence(stage, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("pretrain.serving.connections.serve", lambda *_, **__: pytest.fail("it serves"))
    for words, line in (
        ("does not exist; give a stage's directory", [tmp_path / "retrievl"]),
        ("has no weights.safetensors; give the directory of a finished stage", [tmp_path]),
        ("--device nowhere cannot be used", [stage, "--device", "nowhere"]),
        ("--batch 0 and --workers 1", [stage, "--batch", "0", "--workers", "1"]),
        ("--pixels -5 must be above 0", [stage, "--pixels", "-5"]),
        ("names=nowhere.json does not exist", [stage, "--labels", "nowhere.json"]),
        ("must be texts with {}", [stage, "--template", "a photo"]),
        ("--port 70000 is no port", [stage, "--port", "70000"]),
        (
            "--host no.such.host.invalid --port 0 cannot be used",
            [stage, "--port", "0", "--host", "no.such.host.invalid"],
        ),
    ):
        assert words in refused(capsys, main, *line, *([] if "--port" in line else ["--port", "0"]))
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    assert "weights.safetensors" in refused(capsys, main, tmp_path, "--port", "0")
    other = write_text_model(tmp_path / "other.model", [" ".join(f"word{n}{n * 7}" for n in range(99))] * 9, 150)
    told = refused(capsys, main, stage, "--text-tokenizer", other, "--port", "0")
    assert "is not the text tokenizer that the weights came with" in told


def test_a_port_that_is_taken_is_refused_before_the_weights_are_read(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(capsys, main, tmp_path / "nowhere", "--port", port)
    assert f"--port {port} cannot be used (Address already in use); take another" in error


def test_without_its_packages_it_says_how_to_install_them(stage, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "pretrain.serving.app", raising=False)
    assert "pip install 'imglish[serve]'" in refused(capsys, main, stage)
