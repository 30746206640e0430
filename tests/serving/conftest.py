"""A server of toy weights in this process, which all tests of a module ask over its port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform
from pretrain.models.generation import Writing
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.pretrained import Pretrained
from pretrain.serving.counts import Counts
from pretrain.serving.limits import Limits
from pretrain.serving.service import Service
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import RELEASED
from tests.toys import needs, write_text_model

needs("fastapi")
needs("uvicorn")

WRITING = Writing(max_words=6)
# Little of everything, so that a test reaches each limit soon.
LIMITS = Limits(body=2**20, pictures=8, texts=32, characters=500, pixels=2**20, seconds=20, body_seconds=1.2)


class Running(NamedTuple):
    port: int
    service: Service


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Pretrained:
    torch.manual_seed(7)
    task = PretrainTask(RELEASED, ("vision", "language"), [Contrastive(), Captioning()])
    text = write_text_model(tmp_path_factory.mktemp("text") / "text.model", ["a red bus", "two dogs"] * 9, 48)
    look = ImageTransform(size=RELEASED.image_size, train=False)
    return Pretrained(task, RELEASED, look, TextTokenizer(text), torch.device("cpu"), torch.float32)


@contextmanager
def serving(model: Pretrained, limits: Limits = LIMITS, **settings) -> Iterator[Running]:
    """A server until the block ends, as SIGTERM would end it."""
    from pretrain.serving.app import make_app
    from pretrain.serving.connections import Server, bind, make_config

    service, ready = Service(model, limits, Counts(), writing=WRITING, **settings), threading.Event()
    with bind("127.0.0.1", 0) as made:
        server = Server(make_config(make_app(service), limits), ready.set)
        thread = threading.Thread(target=server.run, args=([made],))
        thread.start()
        try:
            assert ready.wait(30)
            yield Running(made.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model) -> Iterator[Running]:
    with serving(model, batch=16, workers=2) as running:
        yield running


def wait_for(there: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
