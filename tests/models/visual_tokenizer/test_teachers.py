from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.batch import Layout, make_batch
from pretrain.layers import PLAIN
from pretrain.models.visual_tokenizer.teachers import (
    Clip,
    ClipTeacher,
    Encoder,
    EncoderTeacher,
    Pixels,
    PixelTeacher,
    onto_grid,
)
from pretrain.tasks.tokenizer import TrainTokenizer
from tests.toy_models import PAPER, PATCHES, VQ, encoder, pictures

# ---- pixels


def test_pixels_are_the_mean_colours_of_each_patch():
    images, teacher = pictures(2, 16), PixelTeacher(8, cells=2)
    targets = teacher(images)
    assert targets.shape == (2, 4, teacher.dim) and teacher.dim == 12 and targets.dtype == torch.float32
    # Patch 1 is the upper right one; within it colour, row, column.
    square = images[1, 2, 4:8, 8:12].float().mean()
    assert targets[1, 1].view(3, 2, 2)[2, 1, 0].item() == pytest.approx(2 * (square.item() / 127.5 - 1), abs=1e-5)
    torch.testing.assert_close(teacher(images.float() / 127.5 - 1), targets)


def test_a_picture_of_targets_is_the_small_image():
    images = pictures(2, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    teacher = PixelTeacher(8, cells=2)
    assert torch.equal(teacher.picture(teacher(images)), images[:, :, ::4, ::4])


def test_cells_must_divide_the_patch():
    with pytest.raises(ValueError, match=r"cells=3 does not divide patch_size=16.*use 2"):
        PixelTeacher(16, cells=3)
    with pytest.raises(ValueError, match="cells=0"):
        PixelTeacher(16, cells=0)


# ---- CLIP


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {"vocab_size": 50, "max_position_embeddings": 8}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 8}, text_config=text, projection_dim=24)
    directory = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(directory)
    return directory


def test_clip_rows_are_projected_as_its_own_class_row(clip_directory):
    """transformers projects the class row; what the teacher does to patches must do the same to that row."""
    from transformers import CLIPModel

    teacher, images = ClipTeacher(clip_directory, grid=4), pictures(3, 32)
    targets = teacher(images)
    assert targets.shape == (3, 16, 24) and teacher.dim == 24 and not targets.requires_grad
    model = CLIPModel.from_pretrained(clip_directory).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        out = model.get_image_features((images / 255 - mean) / std)
        rows = model.visual_projection(model.vision_model.post_layernorm(out.last_hidden_state))
    torch.testing.assert_close(rows[:, 0], out.pooler_output)
    torch.testing.assert_close(targets, rows[:, 1:])


def test_clip_takes_other_sizes_and_grids_and_float_pictures(clip_directory):
    teacher = ClipTeacher(clip_directory, grid=2)
    images = pictures(2, 32)
    assert torch.equal(teacher(images), onto_grid(ClipTeacher(clip_directory, grid=4)(images), 2))
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert teacher(large).shape == (2, 4, 24)
    torch.testing.assert_close(teacher(images.float() / 127.5 - 1), teacher(images), rtol=1e-4, atol=1e-5)


def test_clip_reads_the_directory_s_own_statistics(clip_directory, tmp_path):
    for file in clip_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images, settings = pictures(2, 32), tmp_path / "preprocessor_config.json"
    before = ClipTeacher(tmp_path, grid=4)(images)
    settings.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert (ClipTeacher(tmp_path, grid=4)(images) - before).abs().max() > 1e-3
    for wrong in ('{"image_mean": 3}', "[", '{"image_mean": [0.5], "image_std": [0.5]}'):
        settings.write_text(wrong)
        with pytest.raises(ValueError, match="preprocessor_config"):
            ClipTeacher(tmp_path, grid=4)


def test_clip_says_what_is_wrong_with_a_directory(clip_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"no config\.json.*hf download"):
        ClipTeacher(tmp_path, grid=4)
    (tmp_path / "config.json").write_bytes((clip_directory / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        ClipTeacher(tmp_path, grid=4)
    weights = load_file(clip_directory / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no whole CLIP vision model"):
        ClipTeacher(tmp_path, grid=4)
    name = next(name for name in weights if "vision" in name and "layers.1" in name)
    for wrong, says in ((weights[name].double(), "F64"), (weights[name].int(), "I32"), (weights[name] / 0, "NaN")):
        save_file(weights | {name: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"cannot be read as a CLIP.*layers.1.* holds {says}"):
            ClipTeacher(tmp_path, grid=4)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        ClipTeacher(tmp_path, grid=4)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="cannot be read"):
        ClipTeacher(tmp_path, grid=4)


def test_code_in_a_directory_is_not_run(clip_directory, tmp_path, monkeypatch):
    import json
    import shutil

    place = shutil.copytree(clip_directory, tmp_path / "clip")
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot be read as a CLIP model"):
        ClipTeacher(place, grid=4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("own", "grid", "least"), [(14, 16, 0.997), (16, 14, 0.997), (14, 7, 0.99)])
def test_features_of_another_grid_are_those_at_the_same_places(own, grid, least):
    """A smooth field seen on both grids, as a giant's patches of 14 pixels beside a teacher's of 16."""
    generator = torch.Generator().manual_seed(0)
    waves, phases = 5 * torch.randn(64, 2, generator=generator), 6.28 * torch.rand(64, generator=generator)

    def seen(side: int) -> torch.Tensor:
        middles = (torch.arange(side) + 0.5) / side
        places = torch.stack(torch.meshgrid(middles, middles, indexing="ij"), -1).flatten(0, 1)
        return (places @ waves.T + phases).sin()[None]

    cosines = torch.nn.functional.cosine_similarity(onto_grid(seen(own), grid), seen(grid), dim=-1)
    assert cosines.mean() > least
    assert cosines.min() > least - 0.02


# ---- one of our own encoders


def read(name: str, knob: str, experts: tuple[str, ...] = ("vision", "language")):
    """Weights of an encoder, as run.stored_weights reads them."""
    assert (name, knob) == ("vision", "teacher")
    return {f"encoder.{key}": value for key, value in encoder(PAPER, experts).state_dict().items()}, PAPER


def test_encoder_rows_without_the_class_row():
    model = encoder(PAPER, ("vision",))
    teacher, images = EncoderTeacher(model, PAPER, grid=4), pictures(3)
    targets = teacher(images)
    rows = model(make_batch(Layout(images=3, patches=PATCHES), images=images)).images
    assert torch.equal(targets, rows[:, 1:]) and not targets.requires_grad and teacher.dim == PAPER.dim
    assert EncoderTeacher(model, PAPER, grid=2)(pictures(3, 24)).shape == (3, 4, PAPER.dim)


def test_an_encoder_without_vision_is_refused():
    with pytest.raises(ValueError, match="holds no encoder with vision"):
        Encoder("vision").build(VQ, lambda *names: read(*names, experts=("language",)))


# ---- all


@pytest.mark.parametrize("kind", ["pixels", "clip", "encoder"])
def test_a_teacher_is_frozen_and_no_part_of_the_tokenizer(clip_directory, kind):
    configs = {"pixels": Pixels(cells=2), "clip": Clip(str(clip_directory)), "encoder": Encoder("vision")}
    small = replace(VQ, image_size=32, patch_size=8)
    teacher = configs[kind].build(small, read)
    assert not isinstance(teacher, torch.nn.Module)
    fitting = replace(small, target_dim=teacher.dim, distill=teacher.distill)
    task = TrainTokenizer(configs[kind]).build(fitting, None, PLAIN, read)
    task(make_batch(Layout(images=2, patches=16), images=pictures(2)))["loss"].backward()
    assert {name.split(".")[1] for name in task.state_dict()} == {
        "encoder", "encoder_head", "codebook", "decoder", "decoder_head",
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"task\.teacher=.*gives {teacher.dim} numbers .*model\.target_dim=7"):
        TrainTokenizer(configs[kind]).build(replace(small, target_dim=7), None, PLAIN, read)
