"""What tests of several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes is no property of the code: the first compiles its patterns, and the machine may be busy.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The data of small_run and its first stage, trained (`tokenizer_of` names it): to read, not to write to."""
    from tests.small_run import train_stage, write_data

    path = write_data(tmp_path_factory.mktemp("small"))
    done = train_stage(path, path / "start", "tokenizer")
    assert done.returncode == 0, done.stderr
    return path
