"""What the tests of checkpoints share."""

from __future__ import annotations

import pytest

from tests.checkpoint.stand_in import install


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    install(monkeypatch.setattr)
