"""pretrain.checkpoints: the mean of weights files, what differs between two, and what one holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from pretrain.checkpoint.weights import LORA, WEIGHTS, read_weights, write_weights
from pretrain.checkpoints import main
from pretrain.config import to_json
from pretrain.objectives.contrastive import Contrastive
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import RELEASED
from tests.toys import refused, write_text_model

CONFIG = {"model": {"dim": 4}, "recipe": "toy", "stage": "vision"}


def state(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "encoder.a": torch.randn(3, 5, generator=made),
        "encoder.flags": torch.tensor([True, False, True]),
        "encoder.half": torch.randn(7, generator=made).bfloat16(),
        "objectives.b": torch.randn(4, generator=made),
        "objectives.count": torch.tensor(3),
    }


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        write_weights(state(seed), tmp_path / str(seed) / WEIGHTS, CONFIG)
    return [tmp_path / str(seed) for seed in range(3)]


def test_the_mean_is_torch_s_and_a_file_like_any_other(three, tmp_path):
    assert main(["average", *map(str, three), "--out", str(tmp_path / "soup")]) == 0
    values, config = read_weights(tmp_path / "soup")
    states = [state(seed) for seed in range(3)]
    for name, value in values.items():
        whole = [each[name] for each in states]
        mean = torch.stack([v.double() for v in whole]).mean(0).to(whole[0].dtype)
        assert value.dtype == whole[0].dtype and torch.equal(value, mean), name
    assert {**CONFIG, "average_of": config["average_of"]} == config and len(set(config["average_of"])) == 3
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["weights_sha256"] == write_weights(
        values, tmp_path / "again" / WEIGHTS, config
    )
    assert load_file(tmp_path / "soup" / WEIGHTS).keys() == values.keys()


def test_a_mean_loads_with_its_tokenizer(tmp_path):
    places, texts = [tmp_path / "a", tmp_path / "b"], ["a red bus", "two dogs"]
    for seed, place in enumerate(places):
        torch.manual_seed(seed)
        task = PretrainTask(RELEASED, ("vision", "language"), [Contrastive()])
        write_weights(task.state_dict(), place / WEIGHTS, {"model": to_json(RELEASED)})
        write_text_model(place / "text.model", texts * 9, 48)
    assert main(["average", *map(str, places), "--out", str(tmp_path / "soup")]) == 0
    assert pretrain.load(tmp_path / "soup").embed_texts(texts).shape == (2, RELEASED.dim)


def test_what_cannot_be_averaged_is_one_sentence_and_nothing_is_written(three, tmp_path, capsys):
    def error(*places: Path) -> str:
        said = refused(capsys, main, "average", *places, "--out", tmp_path / "soup")
        assert not (tmp_path / "soup" / WEIGHTS).exists() and not list((tmp_path / "soup").glob(".*"))
        return said

    def other(config: dict = CONFIG, **changed: torch.Tensor) -> Path:
        write_weights(state(4) | {k.replace("_", "."): v for k, v in changed.items()}, tmp_path / "x" / WEIGHTS, config)
        return tmp_path / "x"

    assert "1 file has no mean" in error(three[0])
    assert "x holds F32 (2,) as encoder.a" in error(three[0], other(encoder_a=torch.zeros(2)))
    assert "x holds F32 (1,) as encoder.new" in error(three[0], other(encoder_new=torch.zeros(1)))
    assert "dim is 8 and not 4" in error(three[0], other({"model": {"dim": 8}}))
    assert "differ in objectives.count" in error(three[0], other(objectives_count=torch.tensor(4)))
    assert "NaN or infinite" in error(three[0], other(encoder_a=torch.full((3, 5), torch.nan)))
    data = bytearray((three[1] / WEIGHTS).read_bytes())
    data[-20] ^= 4
    (three[1] / WEIGHTS).write_bytes(data)
    assert "is damaged" in error(three[0], three[1])
    assert "does not exist" in error(three[0], tmp_path / "nowhere")
    adapters = other(CONFIG | {LORA: {"rank": 2}})
    assert "holds adapters, and the mean of two factors is not that of their products" in error(adapters, adapters)
    assert "exists already" in refused(capsys, main, "average", *three[::2], "--out", three[0])


def test_what_differs_is_named_the_largest_first(three, tmp_path, capsys):
    assert main(["diff", str(three[0]), str(three[0] / WEIGHTS)]) == 0
    assert capsys.readouterr().out == "5 tensors are the same, 0 are not\n"
    changed = state(0) | {"encoder.new": torch.zeros(1)}
    changed["encoder.a"] = changed["encoder.a"] * 1.5
    changed["objectives.b"] = changed["objectives.b"] + torch.tensor([0, 0, 1e-3, 0])
    write_weights(changed, tmp_path / "x" / WEIGHTS, CONFIG | {"model": {"dim": 8}})
    assert main(["diff", str(three[0]), str(tmp_path / "x")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"encoder.new: only in {tmp_path / 'x'}"
    assert lines[1].startswith("encoder.a: at most ") and lines[1].endswith(" 50 % of its norm")
    assert lines[2].startswith("objectives.b: at most 0.001, ")
    assert lines[3:] == ["config: model.dim is 4 and 8", "3 tensors are the same, 3 are not"]


def test_what_a_file_holds_and_what_was_evaluated(three, capsys):
    digest = json.loads((three[0] / "config.json").read_text())["weights_sha256"]
    (three[0] / "eval.json").write_text(json.dumps({"step": 70, "weights": digest, "retrieval/R@1": 73.0}))
    (three[0] / "eval-5k.json").write_text(json.dumps({"step": 60, "weights": "other", "retrieval/R@1": 1.0}))
    assert main(["inspect", *map(str, three[:2])]) == 0
    out = capsys.readouterr().out
    for line in (
        f"{digest}\n", "  recipe  toy\n", "  stage  vision\n", "  step  70\n", "  eval.json  retrieval/R@1 73\n",
        "\neval-5k.json  of other weights\n", "encoder.a 15, ",
        "30 in 5 tensors, BF16 x 1, BOOL x 1, F32 x 2, I64 x 1\n",
    ):  # fmt: skip
        assert line in out
    data = bytearray((three[1] / WEIGHTS).read_bytes())
    data[-20] ^= 4
    (three[1] / WEIGHTS).write_bytes(data)
    assert "is damaged" in refused(capsys, main, "inspect", three[1])
