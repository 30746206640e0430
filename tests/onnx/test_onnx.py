"""ONNX files: onnxruntime computes from them what the packed pass does, at sizes that the exporter did not see."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batch import PAD, Layout, make_batch
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.export import main
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.onnx.graphs import routes_of
from pretrain.onnx.write import difference, example, export, run
from pretrain.parallel.state import named_state
from pretrain.released_weights import resize_positions
from pretrain.stored_model import FURTHER, build_stored, read_stored
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CONFIGS
from tests.toys import needs, refused, write_text_model

SIZES = ((1, 4, 4), (3, 7, 6), (2, 12, 2))  # sequences, words, patches a side; the model's own are 4


def shaken(task: torch.nn.Module) -> torch.nn.Module:
    """Every number away from 0 and 1, so that a swapped one shows."""
    with torch.no_grad():
        for value in task.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return task.eval()


def toy(name: str, experts=("vision", "language", "fusion")) -> tuple:
    torch.manual_seed(3)
    cfg = replace(CONFIGS[name], depth=2, fusion_layers=min(CONFIGS[name].fusion_layers, 1))
    return cfg, shaken(PretrainTask(cfg, experts, [Contrastive(5), Matching()]))


@torch.no_grad()
def packed(task, cfg, route: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the packed pass says, of a model whose positions were resized for these pictures."""
    images, ids = inputs.get("pixels"), inputs.get("ids")
    if images is not None:
        state, cfg = resize_positions(dict(named_state(task)), cfg, images.shape[-1])
        task = build_stored(state, cfg, Path("toy")).eval()
    count = len(next(iter(inputs.values())))
    patches, length = cfg.patches if images is not None else 0, 0 if ids is None else ids.shape[1]
    layouts = {
        "vision": Layout(images=count, patches=patches),
        "text": Layout(texts=count, text_len=length),
        "fusion": Layout(pairs=count, patches=patches, pair_len=length),
    }
    words = {"text": "text_tokens", "fusion": "pair_tokens"}
    parts = {"images": images} | ({words[route]: ids} if ids is not None else {})
    encoded = task.encoder(make_batch(layouts[route], **parts))
    head = task.objectives["contrastive"]
    if route == "vision":
        return {"rows": encoded.images, "vector": head.embed_images(encoded)}
    if route == "text":
        return {"rows": encoded.texts, "vector": head.embed_texts(encoded)}
    match = task.objectives["matching"].match(encoded.first.pair_images).softmax(-1)[:, 1]
    return {"image_rows": encoded.pair_images, "text_rows": encoded.pair_texts, "match": match}


def apart(got: np.ndarray, want: torch.Tensor, ids: torch.Tensor | None) -> float:
    off = (torch.as_tensor(got) - want).abs()
    if ids is not None and off.shape[:2] == ids.shape:
        off = off[ids != PAD]  # of padding anything may come out
    return off.max().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_route_is_the_packed_pass(name):
    cfg, task = toy(name)
    for route, graph in routes_of(task).items():
        for count, length, grid in SIZES:
            inputs = example(graph, cfg, count=count, length=length, grid=grid)
            with torch.no_grad():
                got = dict(zip(graph.outputs, graph(*inputs.values()), strict=True))
            want = packed(task, cfg, route, inputs)
            assert got.keys() == want.keys()
            for output, value in want.items():
                ids = inputs.get("ids") if "text" in (route, output.removesuffix("_rows")) else None
                assert apart(got[output], value, ids) < 1e-5, (route, output, grid)


@pytest.mark.slow
def test_onnxruntime_computes_the_route(tmp_path):
    needs("onnxruntime")
    cfg, task = toy("vlmo")
    route = routes_of(task)["fusion"]  # both embeddings, the bias of both, and the fusion expert
    export(route, cfg, tmp_path / "fusion.onnx")
    for count, length, grid in SIZES:
        sizes = {"count": count, "length": length, "grid": grid, "model": cfg}
        assert difference(tmp_path / "fusion.onnx", route, sizes) < 1e-5, grid


@pytest.mark.slow
def test_the_command_writes_graphs_that_say_what_they_compute(tmp_path, capsys):
    needs("onnxruntime")
    cfg, task = toy("released", ("vision", "language"))
    write_weights(dict(named_state(task)), tmp_path / "ours" / "weights.safetensors", {"model": to_json(cfg)})
    write_text_model(tmp_path / "ours" / "text.model", ["a red bus", "two small dogs"] * 9, 40)
    out = tmp_path / "onnx"
    assert main(["to-onnx", str(tmp_path / "ours"), str(out), "--int8"]) == 0
    about = json.loads((out / "model.json").read_text())
    assert about["tokenizer"]["file"] == "text.model" and (out / "text.model").is_file()
    assert about["graphs"].keys() == {"vision", "text", "fusion"}
    for name, graph in about["graphs"].items():
        route = routes_of(task)[name]
        assert graph["largest_difference"] < 1e-5
        inputs = example(route, cfg, count=3, length=6)
        assert list(graph["inputs"]) == list(inputs) and graph["outputs"] == list(route.outputs)
        whole, small = (
            dict(zip(graph["outputs"], run(out / graph[key], inputs), strict=True)) for key in ("file", "int8")
        )
        if name != "fusion":
            cosine = (whole["vector"] * small["vector"]).sum(-1)
            assert ((cosine > 0.97) & (cosine < 1)).all()
    assert "is not empty" in refused(capsys, main, "to-onnx", tmp_path / "ours", out)


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    cfg, task = toy("paper", ("vision", "language"))
    write_weights(dict(named_state(task)), tmp_path / "ours" / "weights.safetensors", {"model": to_json(cfg)})
    write_text_model(tmp_path / "large.model", [chr(97 + i) + chr(97 + j) for i in range(26) for j in range(26)], 90)
    large = ("--text-tokenizer", tmp_path / "large.model")
    assert "more ids than the model's" in refused(capsys, main, "to-onnx", tmp_path / "ours", tmp_path / "x", *large)
    assert "weights" in refused(capsys, main, "to-onnx", tmp_path, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install" in refused(capsys, main, "to-onnx", tmp_path / "ours", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("clip", "text"), ("siglip", "vision")])
def test_onnxruntime_computes_dual_towers(tmp_path, kind, name):
    needs("transformers")
    needs("onnxruntime")
    from tests.models.towers.others import whole_model, write_directory

    theirs = write_directory(tmp_path / "hf", whole_model(kind), kind)
    assert main(["from-hf", str(theirs), str(tmp_path / "ours")]) == 0
    state, model, _ = read_stored(tmp_path / "ours", FURTHER)
    task = build_stored(state, model, tmp_path / "ours").eval()
    route = routes_of(task)[name]
    export(route, model, tmp_path / "route.onnx")
    for count, length in ((1, 4), (3, 8)):
        inputs = example(route, model, count=count, length=length)
        layout = Layout(texts=count, text_len=length) if name == "text" else Layout(images=count, patches=1)
        parts = {"text_tokens": inputs["ids"]} if name == "text" else {"images": inputs["pixels"]}
        head = task.objectives["contrastive"]
        with torch.no_grad():
            encoded = task.encoder(make_batch(layout, **parts))
            want = head.embed_texts(encoded) if name == "text" else head.embed_images(encoded)
        assert apart(run(tmp_path / "route.onnx", inputs)[1], want, None) < 1e-5
