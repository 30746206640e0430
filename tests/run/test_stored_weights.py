"""Which model stored weights are of: also those that were written before each model named its class."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from pretrain.config import to_json
from pretrain.run.stored_weights import model_in
from tests.toy_models import PAPER, VQ

HERE = Path("weights.safetensors")
# Beside weights of before 2026-11-28; drop_path and activation_checkpointing were fields of the model that did nothing.
OLD = asdict(PAPER) | {"image_codes": 16, "drop_path": 0.1, "activation_checkpointing": 0}


@dataclass(frozen=True)
class Tower:
    width: int = 3


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"model": to_json(PAPER)}, PAPER),
        ({"model": to_json(VQ)}, VQ),
        ({"model": {"class": "MultiwayConfig"} | OLD}, PAPER),
        ({"model": OLD, "tokenizer": None}, PAPER),
        ({"tokenizer": {"class": "VQKDConfig"} | asdict(VQ), "model": None}, VQ),
        ({"model": {"class": "Tower", "width": 4}}, Tower(4)),
    ],
)
def test_a_config_json_names_its_model(config, model):
    assert model_in({"recipe": "tiny", "stage": "vision"} | config, HERE, known=[Tower]) == model


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model": {"class": "Tower"}}, "holds a Tower, which is no model of this recipe; name a recipe that uses it"),
        ({"model": {"class": "this.Popen", "args": "x"}}, "holds a this.Popen, which is no model"),
        ({"model": to_json(PAPER) | {"rotary": True}}, "MultiwayConfig has no rotary"),
        ({"vqkd": {}}, "does not say to which model its weights belong"),
        ({}, "does not say to which model"),
        ({"model": {"class": ["MultiwayConfig"]}}, "is no model of this recipe"),
        ({"model": to_json(PAPER) | {"dim": "x"}}, "its config is no MultiwayConfig"),
        ({"model": to_json(PAPER) | {"heads": []}}, "its config is no MultiwayConfig"),
        ({"model": to_json(VQ) | {"patch_size": 0}}, "its config is no VQKDConfig"),
    ],
)
def test_what_is_not_known_is_refused_and_nothing_is_imported(config, says):
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=rf"weights\.safetensors.*{says}"):
        model_in(config, HERE)
    assert set(sys.modules) == modules
