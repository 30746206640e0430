"""The hand-over file: what goes in comes out, by name, or is refused."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from pretrain.checkpoint.weights import (
    SaveError,
    load_handover,
    mend_config,
    read_weights,
    weights_digest,
    write_weights,
)
from pretrain.parallel import moments
from pretrain.run.hand_over import carry_over


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.randn(2, 3),
        "a.bias": torch.randn(3),
        "count": torch.tensor(4),
        "half": torch.ones(2).bfloat16(),
    }


def test_round_trip_with_config_and_hash(tmp_path, state):
    path = tmp_path / "run" / "weights.safetensors"
    digest = write_weights(state, path, {"model": {"dim": 3}})
    again, config = read_weights(path)
    assert config == {"model": {"dim": 3}}
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
    assert weights_digest(path) == digest == json.loads((path.parent / "config.json").read_text())["weights_sha256"]
    assert read_weights(path.parent)[1] == config, "its directory will do"
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "weights.safetensors"]


def test_the_same_weights_are_the_same_bytes(tmp_path, state):
    write_weights(state, tmp_path / "a.safetensors", {"x": 1, "y": 2})
    write_weights(dict(reversed(state.items())), tmp_path / "b.safetensors", {"y": 2, "x": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    state["count"] += 1
    assert write_weights(state, tmp_path / "b.safetensors", {}) != weights_digest(tmp_path / "a.safetensors")


def test_handover_fills_what_is_there_and_reports_the_rest(tmp_path):
    write_weights(nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)}).state_dict(), tmp_path / "w", {})
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    untouched = target["b"].weight.clone()
    handover = load_handover(target, tmp_path / "w")
    assert handover.loaded == ["a.bias", "a.weight"]
    assert handover.missing == ["b.weight", "b.bias"]
    assert handover.unexpected == ["c.bias", "c.weight"]
    assert handover.digest == weights_digest(tmp_path / "w")
    written, _ = read_weights(tmp_path / "w")
    assert torch.equal(target["a"].weight, written["a.weight"]) and torch.equal(target["b"].weight, untouched)
    # What the stage did not build reaches the next file; what it trained wins.
    new = {name: value + 1 for name, value in target.state_dict().items()}
    whole = carry_over(new, tmp_path / "w")
    assert torch.equal(whole["c.weight"], written["c.weight"]) and torch.equal(whole["a.weight"], new["a.weight"])
    assert carry_over(new, None) is new


def test_another_shape_is_refused_with_both(tmp_path):
    write_weights(nn.Linear(2, 3).state_dict(), tmp_path / "w", {})
    target = nn.Linear(4, 3)
    before = target.weight.clone()
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\) but .* \(3, 4\)"):
        load_handover(target, tmp_path / "w")
    assert torch.equal(target.weight, before)


def test_a_file_of_another_model_is_refused(tmp_path):
    write_weights({"other": torch.ones(1)}, tmp_path / "w", {})
    with pytest.raises(ValueError, match="none of its 1 tensors"):
        load_handover(nn.Linear(1, 1), tmp_path / "w")


def test_one_flipped_byte_is_found(tmp_path, state):
    path = tmp_path / "w"
    write_weights(state, path, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_weights(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="damaged or not a safetensors"):
        load_handover(nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(tmp_path / "nothing")


def test_files_of_other_origin_are_read_and_named_by_their_content(tmp_path):
    for name in "wv":
        save_file({"x": torch.full((2,), float(ord(name)))}, tmp_path / name, metadata={"format": "pt"})
    state, config = read_weights(tmp_path / "w")
    assert config == {} and list(state) == ["x"]
    assert len({weights_digest(tmp_path / "w"), weights_digest(tmp_path / "v"), ""}) == 3


def test_a_full_disk_keeps_the_old_file(tmp_path, state, monkeypatch):
    path = tmp_path / "w"
    write_weights(state, path, {"n": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SaveError, match="No space left"):
        write_weights({"x": torch.ones(1)}, path, {"n": 2})
    assert read_weights(path)[1] == {"n": 1}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_frozen_names_keep_the_bits_of_the_file_and_new_ones_their_own(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights({"frozen": torch.tensor([0.1]), "unbuilt": torch.ones(2)}, path, {})
    state = {"frozen": torch.tensor([0.1]).bfloat16().float(), "new": torch.zeros(1), "moved": torch.ones(1)}
    got = carry_over(state, path, {"frozen", "new"})
    assert got.keys() == {"frozen", "unbuilt", "new", "moved"}
    assert got["frozen"].item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("left", [None, "{", "[]", '{"weights_sha256": "of an older run"}'])
def test_a_config_that_a_kill_left_out_is_written_again(tmp_path, state, left):
    path, config = tmp_path / "weights.safetensors", tmp_path / "config.json"
    write_weights(state, path, {"model": {"dim": 3}})
    whole = config.read_bytes()
    assert not mend_config(path)
    config.unlink()
    if left is not None:
        config.write_text(left)
    assert mend_config(path)
    assert config.read_bytes() == whole and not mend_config(path)


@pytest.mark.parametrize("metadata", ["[]", "7", "[" * 100_000, '{"config": []}', '{"sha256": 3}', "{"])
def test_damaged_metadata_is_one_sentence(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(2, 2)}, path, metadata={"imglish": metadata})
    for read in (
        lambda: load_handover(nn.Linear(2, 2, bias=False), path),
        lambda: read_weights(path),
        lambda: mend_config(path),
    ):
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: its metadata") as refused:
            read()
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2]
)
def test_a_type_that_would_be_cast_is_refused_by_name(tmp_path, kind):
    path, module = tmp_path / "weights.safetensors", nn.Linear(2, 2)
    write_weights({"weight": torch.ones(2, 2).to(kind), "bias": torch.zeros(2)}, path, {})
    name = str(kind).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"weights.safetensors: weight holds {name} but must hold float32; convert it"):
        load_handover(module, path)
    # Neither is it made to fit another shape first.
    with pytest.raises(ValueError, match=f"weight holds {name}"):
        load_handover(nn.Linear(3, 2), path, adapt=lambda state, *_: {"weight": state["weight"].repeat(1, 2)[:, :3]})
    read_weights(path)  # a stage that does not build it passes it on


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_types_that_fp32_holds_exactly_are_read(tmp_path, kind):
    module, value = nn.Linear(2, 2, bias=False), torch.randn(2, 2).to(kind)
    write_weights({"weight": value}, tmp_path / "w", {})
    load_handover(module, tmp_path / "w")
    assert torch.equal(module.weight, value.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "not_built_here"])
def test_numbers_that_are_not_finite_are_named_as_such(tmp_path, value, name):
    path, module = tmp_path / "weights.safetensors", nn.Linear(2, 2, bias=False)
    state = {"weight": torch.ones(2, 2), "not_built_here": torch.ones(3)}
    state[name].view(-1)[1] = value
    write_weights(state, path, {})
    for read in (lambda: load_handover(module, path), lambda: read_weights(path)):
        with pytest.raises(ValueError, match=f"weights.safetensors: {name} holds NaN or infinite numbers") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_disk_that_fails_is_one_sentence(tmp_path, state, monkeypatch):
    """torch, which maps the file, has a RuntimeError for whatever the disk says."""
    path = tmp_path / "weights.safetensors"
    write_weights(state, path, {})

    def failing(*_, **__):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Input/output error (5)\nmore")

    monkeypatch.setattr(safetensors, "safe_open", failing)
    with pytest.raises(OSError, match=r"could not be read: unable to open .*: Input/output error \(5\): '.*tensors'"):
        read_weights(path)
    with pytest.raises(OSError, match="could not be read"), ExitStack() as opened:
        moments._Saved([path], opened)
