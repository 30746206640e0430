"""What becomes a model's weights is whole, of its shapes and of its types; anything else is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pretrain import export
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.models.visual_tokenizer.teachers import Encoder
from pretrain.objectives.masked import MaskedData
from pretrain.run.image_targets import load_visual_tokenizer
from tests.run.test_identity import RECIPE, VISION
from tests.toy_models import PAPER, RELEASED, VQ, encoder

CHANGES = {
    "missing": "lacks NAME",
    "shape": "NAME has shape",
    "float64": "NAME holds float64",
    "int32": "NAME holds int",
}


def changed(state: dict, name: str, how: str) -> dict:
    if how == "missing":
        return {key: value for key, value in state.items() if key != name}
    value = state[name]
    if how in ("shape", "nan"):
        return state | {name: value.flatten()[:1] if how == "shape" else torch.full_like(value, float("nan"))}
    return state | {name: value.to(getattr(torch, how))}


@pytest.mark.parametrize(("how", "says"), CHANGES.items())
def test_a_teacher_that_is_not_whole_is_refused_by_name(how, says):
    state = {f"encoder.{key}": value for key, value in encoder(PAPER, ("vision",)).state_dict().items()}
    state = changed(state, "encoder.vision_embed.cls_token", how)
    with pytest.raises(ValueError, match=f"weights=it.*{says.replace('NAME', 'vision_embed.cls_token')}"):
        Encoder("it").build(VQ, lambda *_: (state, PAPER))


@pytest.mark.parametrize(("how", "says"), CHANGES.items())
def test_a_visual_tokenizer_that_is_not_whole_is_refused_by_name(tmp_path, how, says):
    state = {f"tokenizer.{key}": value for key, value in VQ.build().state_dict().items()}
    state = changed(state, "tokenizer.encoder.positions", how)
    write_weights(state, tmp_path / "tokenizer" / "weights.safetensors", {"model": to_json(VQ)})
    model = replace(PAPER, image_size=VQ.image_size, patch_size=VQ.patch_size)
    stage = replace(VISION, objectives=(MaskedData(image_codes=VQ.codes),), model=model)
    with pytest.raises(ValueError, match=f"visual_tokenizer=tokenizer.*{says.replace('NAME', 'encoder.positions')}"):
        load_visual_tokenizer(RECIPE, stage, tmp_path)


@pytest.mark.parametrize(("how", "says"), [("float64", "float64"), ("int64", "int64"), ("nan", "NaN")])
def test_an_export_reads_no_other_types_and_no_nan(tmp_path, capsys, how, says):
    state = {f"encoder.{key}": value for key, value in encoder(RELEASED).state_dict().items()}
    ours, released = tmp_path / "ours", tmp_path / "released.safetensors"
    state = {"encoder.vision_embed.proj.weight": state.pop("encoder.vision_embed.proj.weight")} | state
    wrong = changed(state, "encoder.vision_embed.proj.weight", how)
    write_weights(wrong, ours / "weights.safetensors", {"model": to_json(RELEASED)})
    export.write_tensors(released, export.to_released(wrong, RELEASED))
    for line in (
        ["to-released", str(ours), str(tmp_path / "x.pth")],
        ["from-released", str(released), str(tmp_path / "x")],
        ["resize", str(ours), str(tmp_path / "x"), "--image-size", "32"],
    ):
        assert export.main(line) == 2
        said = capsys.readouterr().err
        assert re.search(rf"vision_embed\.proj\.weight holds {says}", said) and said.count("\n") == 1, said
