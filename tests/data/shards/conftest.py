from __future__ import annotations

from pathlib import Path

import pytest

from tests.toys import numbered_source


@pytest.fixture
def source(tmp_path) -> Path:
    return numbered_source(tmp_path / "source")
