"""What tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes is no property of the code: the first compiles its patterns, and the machine may be busy.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Beside a GPU the suite runs on the CPU too, in every process that it starts; `-m cuda` is for what needs one."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, and of these the ones with a time limit of their own: one that began last would run for a
    minute beside a worker that has nothing left to steal."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("slow", "timeout")])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and torch sees none")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The data of small_run and its first stage, trained (`tokenizer_of` names it): to read, not to write to."""
    from tests.small_run import train_stage, write_data

    path = write_data(tmp_path_factory.mktemp("small"))
    done = train_stage(path, path / "start", "tokenizer", launched=True, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    return path
