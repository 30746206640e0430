"""benchmarks.lora: its stages are what they are called; figures take minutes and are not made here."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import lora
from pretrain.files import write_json
from pretrain.recipes import find_recipe, tiny
from pretrain.run.identity import identity_of
from tests.toys import refused


def test_its_rows_train_less_and_less(tmp_path, capsys):
    rows = {stage: lora.sizes(stage) for stage in find_recipe(str(lora.RECIPE)).stages}
    shares = [rows[stage]["trained_percent"] for stage in rows]
    assert rows["full"]["trained_percent"] == 100 and all(share < 60 for share in shares[1:])
    assert rows["locked"]["trained"] < rows["lora_4"]["trained"] < rows["lora_16_every_layer"]["trained"]
    # Two factors for queries and values of four blocks.
    assert rows["lora_4"]["trained"] - rows["locked"]["trained"] == 4 * 2 * 2 * 4 * 128
    assert "has no finished fusion" in refused(capsys, lora.main, "--quickstart", tmp_path, "--work", tmp_path / "w")


def test_the_quickstarts_retrieval_is_its_first_row(tmp_path):
    """Whatever the two call their files; not before it is evaluated, and not where its settings are others."""
    retrieval = tiny.RECIPE.stages["retrieval"]
    write_json(tmp_path / "recipe.json", {"identity": identity_of(tiny.RECIPE, retrieval)})
    assert not lora.is_retrieval(tmp_path, "full")
    write_json(tmp_path / "eval.json", {})
    assert [stage for stage in find_recipe(str(lora.RECIPE)).stages if lora.is_retrieval(tmp_path, stage)] == ["full"]
    write_json(tmp_path / "recipe.json", {"identity": identity_of(tiny.RECIPE, replace(retrieval, steps=301))})
    assert not lora.is_retrieval(tmp_path, "full")
