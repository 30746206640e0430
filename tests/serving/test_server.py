"""The server over its port: answers are those of single calls, whatever else it is asked at the time."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks.serve_clients.exchange import ask, exchange, get, head, in_base64, post
from benchmarks.serve_clients.hostile import hostile_requests
from pretrain.objectives.classification import ImageClassification
from pretrain.pretrained import Pretrained
from pretrain.tasks.pretrain import PretrainTask
from tests.serving.conftest import LIMITS, WRITING, serving, wait_for
from tests.toy_models import RELEASED
from tests.toys import encoded, picture

PICTURES = [encoded(picture(seed, width=40 + seed, height=50)) for seed in range(6)]
TEXTS = ["a red bus", "two dogs and a bus", "", "a", "dogs " * 20, "red red dogs"]
HOSTILE = {each.name: each for each in hostile_requests(LIMITS)}


def alone(model: Pretrained) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Vectors and captions of single calls."""
    images = torch.cat([model.embed_images([each]) for each in PICTURES])
    texts = torch.cat([model.embed_texts([each]) for each in TEXTS])
    return images, texts, [model.caption([each], WRITING)[0] for each in PICTURES]


def test_answers_of_concurrent_requests_are_those_of_single_calls(server, model):
    images, texts, captions = alone(model)
    sent = in_base64(*PICTURES)

    def check(number: int) -> None:
        order = [(number + n) % 6 for n in range(1 + number % 5)]
        pictures, some = [sent[n] for n in order], [TEXTS[n] for n in order]
        match number % 4:
            case 0:
                reply = ask(server.port, "/embed", {"pictures": pictures, "texts": some})
                assert reply.status == 200, reply
                torch.testing.assert_close(torch.tensor(reply.content["pictures"]), images[order], rtol=0, atol=1e-6)
                torch.testing.assert_close(torch.tensor(reply.content["texts"]), texts[order], rtol=0, atol=1e-6)
            case 1:
                reply = ask(server.port, "/similarity", {"pictures": pictures, "texts": TEXTS})
                made = torch.tensor(reply.content["similarity"])
                torch.testing.assert_close(made, images[order] @ texts.T, rtol=0, atol=1e-6)
            case 2:
                reply = ask(server.port, "/caption", {"pictures": pictures})
                assert reply.content == {"captions": [captions[n] for n in order]}
            case 3:
                names = ["bus", "dog", "cat"]
                reply = ask(server.port, "/predict", {"pictures": pictures, "names": names, "best": 2})
                scores = model.classify([PICTURES[n] for n in order], names)
                for own, row in zip(reply.content["classes"], scores, strict=True):
                    assert [each["name"] for each in own] == [names[n] for n in row.argsort(descending=True)[:2]]
                    assert own[0]["score"] == pytest.approx(row.max().item(), abs=1e-6)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(check, range(60)))
    metrics = ask(server.port, "/metrics").content
    passes = int(metrics.split('imglish_batch_items_count{kind="pictures"} ')[1].split()[0])
    assert passes < 45, "requests that came together did not go together"
    wait_for(lambda: server.service.working == 0)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_in_a_sentence_and_others_are_answered(server, name):
    each = HOSTILE[name]
    reply = exchange(server.port, each.parts, pause=each.pause)
    assert reply.status in each.statuses, reply
    if isinstance(reply.content, dict) and reply.status != 200:
        assert list(reply.content) == ["error"] and len(reply.content["error"]) < 300
        assert "\n" not in reply.content["error"] and "mistake" not in reply.content["error"]
    assert ask(server.port, "/embed", {"texts": ["a red bus"]}).status == 200
    assert server.service.working == 0
    assert "\nimglish_held_bytes 0\n" in ask(server.port, "/metrics").content


def test_what_is_refused_is_named(server):
    bad = in_base64(PICTURES[0], b"no picture")
    for path, body, words in (
        ("/embed", {"pictures": bad}, "picture 1: not a readable JPEG, PNG or WebP header"),
        ("/embed", {"pictures": ["%%%"]}, "picture 0: it is no base64"),
        ("/embed", {"texts": ["a" * 501]}, "text 0: 501 characters are more than 500"),
        ("/embed", {"texts": [3]}, "texts.0: Input should be a valid string"),
        ("/similarity", {"pictures": bad[:1], "texts": []}, "texts: there are none"),
        ("/predict", {"pictures": bad[:1]}, "names: these weights know no classes; give their names"),
    ):
        reply = ask(server.port, path, body)
        assert reply.status == 400 and words in reply.content["error"], reply


def test_nothing_to_do_is_nothing(server):
    assert ask(server.port, "/embed", {}).content == {"pictures": [], "texts": []}
    assert ask(server.port, "/caption", {"pictures": []}).content == {"captions": []}


def test_health_says_what_it_can_and_metrics_have_every_path(server):
    health = ask(server.port, "/health")
    assert health.status == 200 and health.content["answers"]["/caption"] is True
    assert health.content["limits"]["pictures"] == LIMITS.pictures
    ask(server.port, "/no/such/path-7")
    text = ask(server.port, "/metrics").content
    assert 'imglish_requests_total{path="/health",status="200"}' in text
    assert 'imglish_requests_total{path="other",status="404"}' in text and "path-7" not in text
    values = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    assert len({name for name, _ in values}) == len(values) and all(float(value) >= 0 for _, value in values)
    buckets = [int(v) for n, v in values if n.startswith('imglish_request_seconds_bucket{path="/health"')]
    assert buckets == sorted(buckets) and buckets[-1] >= 1


def test_a_full_queue_says_when_to_come_again(model):
    with serving(model, replace(LIMITS, queue=32, pictures=8), workers=1) as running:
        running.service.working += 30
        reply = ask(running.port, "/embed", {"texts": ["a", "b", "c"]})
        assert reply.status == 503 and reply.headers["retry-after"] == "1" and "come again" in reply.content["error"]
        assert ask(running.port, "/embed", {"texts": ["a", "b"]}).status == 200
        running.service.working -= 30


def test_bodies_that_are_held_have_a_limit_together(model):
    with serving(model, replace(LIMITS, bodies=3000, body_seconds=2)) as running:
        half = head("POST", "/embed", 2000) + b" " * 1500
        with ThreadPoolExecutor(4) as threads:
            replies = list(threads.map(lambda _: exchange(running.port, [half], timeout=20), range(3)))
        assert sorted(reply.status or 0 for reply in replies)[-1] == 503
        assert ask(running.port, "/embed", {"texts": ["a"]}).status == 200


def test_connections_have_a_limit(model):
    with serving(model, replace(LIMITS, connections=3)) as running:
        idle = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
        wait_for(lambda: ask(running.port, "/health").status == 503)
        assert "all connections are taken" in ask(running.port, "/health").content["error"]
        for each in idle:
            each.close()
        wait_for(lambda: ask(running.port, "/health").status == 200)


def test_a_connection_without_a_head_is_closed(model, monkeypatch):
    from pretrain.serving import connections

    monkeypatch.setattr(connections.Connection._expect_head, "__defaults__", (0.3,))
    with (
        serving(model) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as silent,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as slow,
    ):
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        assert silent.recv(100) == b"" and slow.recv(100) == b""


def test_time_that_is_up_is_an_answer_and_the_work_is_not_done(model, monkeypatch):
    with serving(model, replace(LIMITS, seconds=0.4)) as running:
        done = []
        passes = running.service.batcher.passes
        monkeypatch.setitem(
            passes, "texts", lambda ids: done.append(len(ids)) or time.sleep(1.0) or [torch.zeros(1)] * len(ids)
        )
        with ThreadPoolExecutor(3) as threads:
            sent = [threads.submit(ask, running.port, "/embed", {"texts": ["a"]})]
            wait_for(lambda: done)  # else the three may go together
            sent += [threads.submit(ask, running.port, "/embed", {"texts": ["a"] * n}) for n in (2, 3)]
            assert [each.result().status for each in sent] == [504] * 3
        wait_for(lambda: running.service.working == 0)
        assert done == [1], "what nobody waits for was done"


def test_what_a_client_has_left_behind_is_not_done(model, monkeypatch):
    with serving(model) as running:
        go, begun, done = threading.Event(), threading.Event(), []
        passes = running.service.batcher.passes
        plain = passes["texts"]

        def held(ids: list) -> list:
            begun.set()
            assert go.wait(20)
            done.append(len(ids))
            return list(plain(ids))

        monkeypatch.setitem(passes, "texts", held)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(ask, running.port, "/embed", {"texts": ["a"]})
            assert begun.wait(20)
            with socket.create_connection(("127.0.0.1", running.port)) as impatient:
                impatient.sendall(post("/embed", {"texts": ["b"] * 3}))
                wait_for(lambda: running.service.working == 4)
            wait_for(lambda: 'status="499"' in ask(running.port, "/metrics").content)
            go.set()
            assert first.result().status == 200
        wait_for(lambda: running.service.working == 0)
        assert done == [1]


def test_a_model_that_hangs_or_has_died_is_not_healthy(model, monkeypatch):
    with serving(model) as running:
        batcher = running.service.batcher
        monkeypatch.setattr(batcher, "busy_since", time.monotonic() - 11 * LIMITS.seconds)
        assert "a pass through the model has taken 220 seconds" in ask(running.port, "/health").content["error"]
        monkeypatch.setattr(batcher, "busy_since", None)
        assert ask(running.port, "/health").status == 200
        batcher.close()
        reply = ask(running.port, "/health")
        assert reply.status == 503 and "thread has ended" in reply.content["error"]


def test_an_error_of_the_model_is_500_for_its_request_alone(model, monkeypatch, caplog):
    with serving(model) as running:
        passes = running.service.batcher.passes
        plain = passes["texts"]
        monkeypatch.setitem(passes, "texts", lambda ids: plain(ids) if all(len(i) < 9 for i in ids) else 1 / 0)
        with ThreadPoolExecutor(8) as threads:
            sent = [
                threads.submit(ask, running.port, "/embed", {"texts": ["a" * (1 + 30 * (n == 3))]}) for n in range(8)
            ]
            statuses = [each.result().status for each in sent]
        assert statuses == [200, 200, 200, 500, 200, 200, 200, 200]
        assert "ZeroDivisionError" in caplog.text


def test_a_fine_tuned_stage_answers_its_classes_and_nothing_else(model):
    torch.manual_seed(3)
    task = PretrainTask(RELEASED, ("vision",), [ImageClassification(4)])
    tuned = Pretrained(task, RELEASED, model.transform, None, torch.device("cpu"), torch.float32)
    with serving(tuned, labels=["bus", "dog", "cat", "bird"]) as running:
        reply = ask(running.port, "/predict", {"pictures": in_base64(*PICTURES[:3]), "best": 9})
        assert reply.content["scores"] == "probability"
        scores = tuned.class_scores(PICTURES[:3])
        for own, row in zip(reply.content["classes"], scores, strict=True):
            assert [each["score"] for each in own] == pytest.approx(row.sort(descending=True)[0].tolist(), abs=1e-6)
            assert own[0]["name"] == ["bus", "dog", "cat", "bird"][row.argmax()]
        refused = ask(running.port, "/embed", {"texts": ["a"]})
        assert refused.status == 501 and "no contrastive head" in refused.content["error"]
        with_names = ask(running.port, "/predict", {"pictures": [], "names": ["a"]})
        assert with_names.status == 400 and "classes of their own" in with_names.content["error"]
    with (
        pytest.raises(ValueError, match="--labels has 2 names and the weights 4 classes"),
        serving(tuned, labels=["a", "b"]),
    ):
        pass


def test_names_given_at_the_start_are_the_classes(model):
    with serving(model, labels=["bus", "dog"]) as running:
        reply = ask(running.port, "/predict", {"pictures": in_base64(PICTURES[0])})
        best = model.classify(PICTURES[:1], ["bus", "dog"])[0]
        (classes,) = reply.content["classes"]
        assert reply.content["scores"] == "cosine" and classes[0]["name"] == ["bus", "dog"][best.argmax()]


def test_two_requests_of_one_connection_and_openapi(server):
    body = json.dumps({"texts": ["a red bus"]}).encode()
    both = head("POST", "/embed", len(body)) + body + get("/health")
    assert exchange(server.port, [both]).status == 200
    schema = ask(server.port, "/openapi.json").content
    assert set(schema["paths"]) == {"/embed", "/similarity", "/caption", "/predict", "/health", "/metrics"}
    assert (
        exchange(server.port, [post("/embed", b'{"texts": ["a"]}', kind="application/json; charset=utf-8")]).status
        == 200
    )
