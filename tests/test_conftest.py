from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_configure


@pytest.mark.parametrize(("chosen", "visible"), [("", ""), ("not slow", ""), ("not cuda", ""), ("cuda", "0,1")])
def test_only_the_tests_of_a_gpu_see_one(monkeypatch, chosen, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pytest_configure(SimpleNamespace(getoption=lambda name: {"markexpr": chosen}[name]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
