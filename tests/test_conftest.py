from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems, pytest_configure


@pytest.mark.parametrize(("chosen", "visible"), [("", ""), ("not slow", ""), ("not cuda", ""), ("cuda", "0,1")])
def test_only_the_tests_of_a_gpu_see_one(monkeypatch, chosen, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pytest_configure(SimpleNamespace(getoption=lambda name: {"markexpr": chosen}[name]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_the_longest_tests_begin_first_and_the_others_keep_their_order():
    def item(name: str, *marks: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, get_closest_marker=lambda wanted: wanted if wanted in marks else None)

    items = [item("a"), item("b", "slow"), item("c", "timeout"), item("d", "slow", "timeout"), item("e", "slow")]
    pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert "".join(each.name for each in items) == "dbeca"
