"""Writes a trained stage as ONNX files by torch's exporter, and checks them with onnxruntime."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD
from pretrain.data.text_tokenizer import BESIDE_WEIGHTS, open_tokenizer
from pretrain.files import write_json
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.towers.dual import DualTowers
from pretrain.onnx.graphs import Route, routes_of
from pretrain.stored_model import build_stored, read_stored, stored_tokenizer

log = logging.getLogger(__name__)

ABOUT = "model.json"
OPSET = 18  # the exporter's own; onnxruntime knows it since 1.14
WORST = 1e-4  # a difference from our model that is larger than this is not rounding
LARGEST_GRID = 128  # patches a side: 2048 pixels with patches of 16


def write_directory(source: Path, out: Path, *, text_tokenizer: Path | None = None, int8: bool = False) -> None:
    """Writes OUT/vision.onnx, text.onnx and fusion.onnx, as far as the weights have their parts, model.json and the
    tokenizer; with `int8` OUT/NAME.int8.onnx too. `source`: weights of a Multiway encoder or of dual towers. ValueError
    for a model that cannot be written, and where onnxruntime computes something else; nothing is left then."""
    _check_installed()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new directory")
    state, model, config = read_stored(source, (DualTowers,))
    task = build_stored(state, model, source).eval()
    text = stored_tokenizer(source if source.is_dir() else source.parent, text_tokenizer)
    if text is not None and open_tokenizer(text).vocab_size > model.vocab_size:
        raise ValueError(f"{text} has more ids than the model's vocabulary of {model.vocab_size}; give its own")
    out.mkdir(parents=True, exist_ok=True)
    try:
        graphs = {name: _write(route, model, name, out, int8) for name, route in routes_of(task).items()}
        text = text if "text" in graphs else None  # a stage of pictures alone reads no texts
        if text is not None:
            shutil.copyfile(text, out / BESIDE_WEIGHTS[text.suffix == ".json"])
        write_json(out / ABOUT, _about(model, config, graphs, text))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed, which writes ONNX; pip install imglish[onnx]") from None


def _write(route: Route, model: Any, name: str, out: Path, int8: bool) -> dict[str, Any]:
    """Writes and checks one file -> what model.json says of it. ValueError where either fails."""
    path = out / f"{name}.onnx"
    try:
        export(route, model, path)
        apart = max(difference(path, route, sizes) for sizes in _tried(model))
    except Exception as error:  # torch's exporter and onnxruntime raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the {name} route of this model cannot be written as ONNX ({reason})") from error
    if not apart <= WORST:
        raise ValueError(f"{path} computes something else than the model (by {apart:.2g}), so it was not written")
    log.info("%s: %.1f MiB, %.1e from our model at the most", path, _mebibytes(path), apart)
    about = {"file": path.name, **_shapes(route, model), "largest_difference": float(f"{apart:.1e}")}
    if int8:
        small = path.with_suffix(".int8.onnx")
        quantize(path, small)
        log.info("%s: %.1f MiB", small, _mebibytes(small))
        about["int8"] = small.name
    return about


def export(route: Route, model: Any, path: Path) -> None:
    """Writes the graph into one file (and, above 2 GB, its weights into another). Its batch and text length stay free,
    and a Multiway encoder's grid too."""
    free = isinstance(model, MultiwayConfig)
    batch, length = torch.export.Dim("batch", max=65536), torch.export.Dim("length", min=3, max=_longest(model))
    dynamic: dict[str, Any] = {"pixels": {0: batch}, "ids": {0: batch, 1: length}}
    if free:
        side = model.patch_size * torch.export.Dim("grid", max=LARGEST_GRID)
        dynamic["pixels"] |= {2: side, 3: side}
    # No size is 1 or the model's own, since the exporter would take two equal sizes for one.
    grid = model.image_size // model.patch_size + 1 if free else None
    inputs = example(route, model, count=2, length=min(5, _longest(model)), grid=grid)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            route,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=tuple(dynamic[name] for name in route.inputs),
            input_names=list(route.inputs),
            output_names=list(route.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def example(route: Route, model: Any, *, count: int, length: int, grid: int | None = None) -> dict[str, Tensor]:
    """Inputs of a route: `count` pictures of grid * grid patches (None: the model's own), and texts of `length` ids,
    some of them padding."""
    drawn = torch.Generator().manual_seed(count)
    side = model.image_size if grid is None else grid * model.patch_size
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=drawn, dtype=torch.uint8)
    ids = torch.randint(EOS + 2, model.vocab_size, (count, length), generator=drawn)
    ids[:, 0] = BOS
    for row, own in enumerate(ids):
        end = max(length - 1 - row, 1)
        own[end], own[end + 1 :] = EOS, PAD
    return {name: value for name, value in (("pixels", pixels), ("ids", ids)) if name in route.inputs}


def _tried(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `example` with which a file is checked: the model's own sizes, others, and the smallest."""
    grid = model.image_size // model.patch_size
    longest = _longest(model)
    grids = (grid, grid + 2, max(grid // 2, 1)) if isinstance(model, MultiwayConfig) else (None, None, None)
    for count, length, own in zip((2, 3, 1), (min(8, longest), longest, 3), grids, strict=True):
        yield {"count": count, "length": length, "grid": own, "model": model}


def difference(path: Path, route: Route, sizes: Mapping[str, Any]) -> float:
    """The largest absolute difference between onnxruntime's outputs and torch's, except in rows of padding, which
    nobody reads."""
    inputs = example(route, **sizes)
    with torch.no_grad():
        wanted = route(*inputs.values())
    apart = 0.0
    for name, got, want in zip(route.outputs, run(path, inputs), wanted, strict=True):
        off = (torch.from_numpy(got) - want).abs()
        if name in ("rows", "text_rows") and "ids" in inputs and off.shape[1] == inputs["ids"].shape[1]:
            off = off[inputs["ids"] != PAD]
        apart = max(apart, off.max().item())
    return apart


def run(path: Path, inputs: Mapping[str, Tensor]) -> list[np.ndarray]:
    """The outputs of a file, computed on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def quantize(path: Path, out: Path) -> None:
    """Writes `path` with int8 matrices, one scale for each output; the other factor of a product is quantised when the
    graph runs (onnxruntime's dynamic quantisation)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        products = ["MatMul", "Gemm"]
        quantize_dynamic(path, out, op_types_to_quantize=products, per_channel=True, weight_type=QuantType.QInt8)


def _about(model: Any, config: dict[str, Any], graphs: dict[str, Any], text: Path | None) -> dict[str, Any]:
    look = config.get("look")
    evaluation = look.get("evaluation", "squash") if isinstance(look, dict) else "squash"
    size = model.image_size
    how = {
        "squash": f"all of it resized to {size} x {size} by Pillow's bicubic filter",
        "crop": f"its central square resized to {size} x {size} by averaging",
    }
    words = None
    if text is not None:
        tokenizer = open_tokenizer(text)
        words = {"file": tokenizer.file_name, "ids": tokenizer.vocab_size, "mask": tokenizer.mask_id}
        words |= {"begin": BOS, "pad": PAD, "end": EOS, "longest": _longest(model)}
        if tokenizer.file_name == "text.model":
            words["piece"] = "number i of SentencePiece is the id i + 1; its unknown piece is 3"
    return {
        "recipe": config.get("recipe"),
        "stage": config.get("stage"),
        "opset": OPSET,
        "preprocessing": {
            "picture": f"upright, RGB, {how.get(evaluation, evaluation)}",
            "pixels": "bytes 0 to 255, [N, 3, S, S]; the graph normalises them",
        },
        "tokenizer": words,
        "graphs": graphs,
    }


def _shapes(route: Route, model: Any) -> dict[str, Any]:
    side = f"multiple of {model.patch_size}" if isinstance(model, MultiwayConfig) else model.image_size
    inputs = {
        "pixels": {"type": "uint8", "shape": ["batch", 3, side, side]},
        "ids": {"type": "int64", "shape": ["batch", f"3 to {_longest(model)}"]},
    }
    about = " ".join((type(route).__doc__ or "").split())
    return {"inputs": {name: inputs[name] for name in route.inputs}, "outputs": list(route.outputs), "about": about}


def _longest(model: Any) -> int:
    return int(model.max_text_len)


def _mebibytes(path: Path) -> float:
    """The size of a file in MiB, with its weights if they are in a file of their own."""
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")) / 2**20


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's log lines and warnings, which are notes to its own authors."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
