"""The mean of weights files, and their differences, tensor by tensor, so that memory holds one tensor of each file."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.weights import (
    CONFIG,
    HEADER,
    LORA,
    WEIGHTS,
    SaveError,
    check_digest,
    hash_tensor,
    open_weights,
    weights_digest,
)
from pretrain.files import write_json, written_in_one_step
from pretrain.tensors import check_finite

UNKNOWN = "0" * 64  # the hash's place in the header until it is known
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def average(paths: Sequence[Path], out: Path) -> str:
    """Writes the mean of weights files of one model (the uniform model soup of Wortsman et al., arXiv 2203.05482) into
    the directory `out`, as write_weights does -> the content's sha256. Numbers are added in float64. ValueError, naming
    file and tensor, if the files are of different models, damaged or not finite; SaveError if `out` cannot be written.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} file has no mean; give two or more")
    if (out / WEIGHTS).exists():
        raise ValueError(f"{out / WEIGHTS} exists already; give another --out")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(path)) for path in paths]
        files, headers = [file for file, _ in opened], [header for _, header in opened]
        tensors = _agree(paths, files, headers)
        for path, header in zip(paths, headers, strict=True):
            if LORA in header.get("config", {}):
                raise ValueError(
                    f"{path} holds adapters, and the mean of two factors is not that of their products; give the "
                    f"{WEIGHTS} that the stage writes at its end"
                )
        config = headers[0].get("config", {}) | {"average_of": [weights_digest(path) for path in paths]}
        digests, own = [hashlib.sha256() for _ in paths], hashlib.sha256()
        offsets = _offsets(tensors)
        head, place = _head(tensors, offsets, config)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with written_in_one_step(out / WEIGHTS) as growing:
                with open(growing, "wb") as file:
                    file.write(head)
                    for name in sorted(tensors):
                        mean = _mean(paths, files, digests, name)
                        hash_tensor(own, name, mean)
                        file.seek(len(head) + offsets[name])
                        file.write(mean.contiguous().reshape(-1).view(torch.uint8).numpy())
                    file.seek(place)
                    file.write(own.hexdigest().encode())
                for path, header, digest in zip(paths, headers, digests, strict=True):
                    check_digest(path, header, digest)
            write_json(out / CONFIG, config | {"weights_sha256": own.hexdigest()})
        except OSError as error:
            number = error.errno or errno.EIO
            raise SaveError(number, f"cannot write {out / WEIGHTS}: {error}; take another --out") from error
    return own.hexdigest()


class Kind(NamedTuple):
    """A tensor's type and shape."""

    type: str  # safetensors' name
    shape: tuple[int, ...]


def kinds(file: Any) -> dict[str, Kind]:
    """Type and shape of each tensor in an open weights file; no tensor is read."""
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    return {name: Kind(str(each.get_dtype()), tuple(each.get_shape())) for name, each in slices.items()}


def _agree(paths: Sequence[Path], files: Sequence[Any], headers: Sequence[dict]) -> dict[str, Kind]:
    """The tensors that all files hold. ValueError if a file's tensors or model differ from the first one's."""
    first = kinds(files[0])
    for path, file, header in zip(paths[1:], files[1:], headers[1:], strict=True):
        other = kinds(file)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                ours, theirs = (f"{k.type} {k.shape}" if k else "nothing" for k in (first.get(name), other.get(name)))
                raise ValueError(f"{path} holds {theirs} as {name} and {paths[0]} {ours}; average weights of one model")
        models = [each.get("config", {}).get("model") for each in (headers[0], header)]
        if models[0] != models[1]:
            raise ValueError(
                f"{path} is of another model than {paths[0]}: {_first_difference(*models)}; give weights of one model"
            )
    if unknown := sorted({kind.type for kind in first.values()} - SIZES.keys()):
        raise ValueError(
            f"{paths[0]} holds numbers of the type {unknown[0]}, which cannot be averaged; give weights that a stage "
            "wrote"
        )
    return first


def _first_difference(ours: Any, theirs: Any) -> str:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return "one of them does not name its model"
    name = next(key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key))
    return f"{name} is {theirs.get(name)} and not {ours.get(name)}"


def _mean(paths: Sequence[Path], files: Sequence[Any], digests: Sequence[Any], name: str) -> Tensor:
    total, first = None, None
    for path, file, digest in zip(paths, files, digests, strict=True):
        value = file.get_tensor(name)
        hash_tensor(digest, name, value)
        check_finite(path, name, value)
        if first is None:
            first, total = value, value.double() if value.is_floating_point() else None
        elif total is not None:
            total += value
        elif not torch.equal(first, value):
            raise ValueError(f"{path} and {paths[0]} differ in {name}, whole numbers that have no mean")
    assert first is not None
    return first if total is None else (total / len(paths)).to(first.dtype)


def _bytes(kind: Kind) -> int:
    return SIZES[kind.type] * torch.Size(kind.shape).numel()


def _offsets(tensors: dict[str, Kind]) -> dict[str, int]:
    """Where each tensor begins, counted from the end of the header: wider numbers first, so that all are aligned."""
    offsets, end = dict[str, int](), 0
    for name in sorted(tensors, key=lambda name: (-SIZES[tensors[name].type], name)):
        offsets[name], end = end, end + _bytes(tensors[name])
    return offsets


def _head(tensors: dict[str, Kind], offsets: dict[str, int], config: dict[str, Any]) -> tuple[bytes, int]:
    """The header of a safetensors file, and the place in it where the hash will be written."""
    metadata = json.dumps({"config": config, "sha256": UNKNOWN}, sort_keys=True)
    listed: dict[str, Any] = {"__metadata__": {HEADER: metadata}}
    for name, begin in offsets.items():
        kind = tensors[name]
        place = [begin, begin + _bytes(kind)]
        listed[name] = {"dtype": kind.type, "shape": list(kind.shape), "data_offsets": place}
    text = json.dumps(listed).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + text.rindex(UNKNOWN.encode())


class Difference(NamedTuple):
    """How a tensor differs between two weights files a and b."""

    name: str
    what: str  # how shape or type differ; "" if only numbers do
    largest: float = 0.0  # the largest |a - b|
    relative: float = 0.0  # the norm of a - b, as a share of the norm of a


def differences(a: Path, b: Path) -> tuple[int, list[Difference]]:
    """How many tensors of two weights files are equal to the bit, and the others, those that moved most first."""
    same, others = 0, list[Difference]()
    with open_weights(a) as (first, _), open_weights(b) as (second, _):
        ours, theirs = kinds(first), kinds(second)
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in theirs or name not in ours:
                others.append(Difference(name, f"only in {a if name in ours else b}", relative=float("inf")))
                continue
            if ours[name] != theirs[name]:
                both = " and ".join(f"{kind.type} {kind.shape}" for kind in (ours[name], theirs[name]))
                others.append(Difference(name, both, relative=float("inf")))
                continue
            x, y = first.get_tensor(name), second.get_tensor(name)
            if torch.equal(x, y):
                same += 1
                continue
            apart = x.double() - y.double()
            largest, norm = apart.abs().max().item() if apart.numel() else 0.0, x.double().norm().item()
            share = apart.norm().item() / norm if norm else float("inf")
            others.append(Difference(name, "", largest, share))
    return same, sorted(others, key=lambda each: (-each.relative, each.name))
