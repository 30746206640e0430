"""The hand-over between stages: one weights.safetensors that carries its own config and hash, config.json beside it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pretrain.files import open_regular, open_safetensors, sha256_of, write_json, written_in_one_step
from pretrain.json_files import parse_json, read_object
from pretrain.models.lora import is_adapter, merged
from pretrain.parallel.state import dense_shape, fill
from pretrain.tensors import check_finite, check_type

HEADER = "imglish"  # the only metadata key of our safetensors files: several would be written in no fixed order
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
ADAPTERS = "adapters.safetensors"  # beside the weights of a stage with lora
LAST = "last.safetensors"  # the last step's weights, beside those of a stage with ema, which are its average
LORA = "lora"  # in the config of weights whose adapters are not added to their layers

# (tensors of a wrong shape, the header's config, the required shapes) -> tensors
Adapt = Callable[[dict[str, Tensor], dict[str, Any], dict[str, tuple[int, ...]]], dict[str, Tensor]]


class SaveError(OSError):
    """A checkpoint or weights file could not be written; earlier files are intact."""

    def __str__(self) -> str:
        return str(self.strerror)  # one sentence, without "[Errno 28]"


@dataclass(frozen=True)
class Handover:
    """What `load_handover` did with each name: loaded it; missed it in the file; or left it, unexpected, in the file,
    because it is not built here. `adapted`: the loaded tensors whose shape differed in the file."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    digest: str
    adapted: list[str] = field(default_factory=list)


def write_weights(state: dict[str, Tensor], path: Path, config: dict[str, Any]) -> str:
    """Writes `state` and the config that rebuilds its model to `path` (weights.safetensors) atomically, and config.json
    beside it -> the content's sha256. Called on one rank. Raises SaveError."""
    digest = write_tensors(state, path, config)
    with _saving(path):
        write_json(path.with_name(CONFIG), config | {"weights_sha256": digest})
    return digest


def write_tensors(state: dict[str, Tensor], path: Path, config: dict[str, Any]) -> str:
    """`write_weights` without a config.json."""
    from safetensors.torch import save_file

    state = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    digest = hashlib.sha256()
    for name, value in state.items():
        hash_tensor(digest, name, value)
    header = {"config": config, "sha256": digest.hexdigest()}
    with _saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.saving").unlink(missing_ok=True)  # a killed run's, of an earlier version
        with written_in_one_step(path) as growing:
            save_file(state, growing, metadata={HEADER: json.dumps(header, sort_keys=True)})
    return digest.hexdigest()


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        raise SaveError(number, f"cannot write {path}: {error}; free some space or choose another run-dir") from error


def mend_config(path: Path) -> bool:
    """Writes config.json beside weights.safetensors, from the weights' own header, if a kill between the two left none
    or an older one -> whether it did. Called on one rank."""
    header, place = weights_header(path), path.with_name(CONFIG)
    try:
        stored = read_object(place).get("weights_sha256")
    except (OSError, ValueError):
        stored = None
    if stored == header.get("sha256"):
        return False
    write_json(place, header.get("config", {}) | {"weights_sha256": header.get("sha256")})
    return True


def read_weights(path: Path, average: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a weights.safetensors (or of the directory that contains it) and its config. Adapters, as in a
    checkpoint of a stage with lora, are added to their layers. `average`: tensors that take the places of the file's.
    Raises ValueError if the file is missing, damaged, not safetensors, or not finite."""
    state, config = read_apart(path)
    state |= average or {}
    if not isinstance(lora := config.get(LORA), dict):
        return state, config
    try:
        return merged(state, lora), {name: value for name, value in config.items() if name != LORA}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_apart(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_weights` with adapters left as they are."""
    state = {}
    with open_weights(path) as (file, header):
        digest = hashlib.sha256()
        for name in sorted(file.keys()):
            state[name] = file.get_tensor(name)
            hash_tensor(digest, name, state[name])
            check_finite(path, name, state[name])
        check_digest(path, header, digest)
    return state, header.get("config", {})


def check_weights(path: Path) -> None:
    """Raises ValueError as `read_weights` does, with one tensor in memory at a time."""
    with open_weights(path) as (file, header):
        digest = hashlib.sha256()
        for name in sorted(file.keys()):
            value = file.get_tensor(name)
            hash_tensor(digest, name, value)
            check_finite(path, name, value)
        check_digest(path, header, digest)


def with_adapters(base: Path, adapters: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the config that a stage with lora handed over, from the weights with which it began and the
    adapters.safetensors beside its own. Raises ValueError if the two do not belong together."""
    (state, _), (trained, config) = read_weights(base), read_apart(adapters)
    if not isinstance(lora := config.pop(LORA, None), dict):
        raise ValueError(f"{adapters} holds no adapters; give the {ADAPTERS} of a stage with lora")
    if config.pop("base_sha256", None) != weights_digest(base):
        raise ValueError(f"{adapters} was trained beside other weights than {base}; give the file that init_from named")
    try:
        return merged(state | trained, lora), config
    except ValueError as error:
        raise ValueError(f"{adapters}: {error}") from None


def weights_header(path: Path) -> dict[str, Any]:
    """Our header of a weights.safetensors: `config` and `sha256`; {} for a file of other origin."""
    with open_weights(path) as (_, header):
        return header


def weights_digest(path: Path) -> str:
    """The sha256 that identifies a weights.safetensors: the one in our header, or that of the whole file if it is of
    other origin."""
    if (digest := weights_header(path).get("sha256")) is not None:
        return str(digest)
    return sha256_of(path / WEIGHTS if path.is_dir() else path)


def weights_entry(path: Path, digest: str) -> dict[str, Any]:
    """The manifest entry of weights that `write_weights` has just written with this digest. The digest covers names,
    types, shapes and numbers, and `header` the bytes before the numbers, so that the file need not be read again."""
    return {"bytes": path.stat().st_size, "sha256": digest, "header": _header_hash(path)}


def matches_entry(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the file matches its `weights_entry`. Raises OSError and ValueError if it cannot be read."""
    if _header_hash(path) != entry["header"]:
        return False
    with open_weights(path) as (file, _):
        digest = hashlib.sha256()
        for name in sorted(file.keys()):
            hash_tensor(digest, name, file.get_tensor(name))
    return digest.hexdigest() == entry["sha256"]


def _header_hash(path: Path) -> str:
    """The sha256 of everything before the numbers: 8 bytes of length, and a JSON of that length."""
    with open_regular(path) as file:
        length = file.read(8)
        rest = min(int.from_bytes(length, "little"), path.stat().st_size)
        return hashlib.sha256(length + file.read(rest)).hexdigest()


def load_handover(
    wanted: nn.Module | dict[str, Tensor],
    path: Path,
    *,
    shape_of: Callable[[Tensor], tuple[int, ...]] = dense_shape,
    fill: Callable[[Tensor, Tensor], Any] = fill,
    adapt: Adapt | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> Handover:
    """Fills a module's parameters and buffers, or a dictionary of tensors, from a weights.safetensors. If a rank holds
    only parts of tensors, `shape_of(tensor)` is the whole's shape and `fill(tensor, whole)` copies the part. `adapt`
    may change tensors of a wrong shape (see contracts.Model.adapt). `average`: as of `read_weights`. Raises ValueError
    if the file is damaged, if a number in it is not finite, if a type would lose digits, or if a shape is still wrong
    (with its name and both shapes)."""
    average = average or {}
    wanted = wanted.state_dict(keep_vars=True) if isinstance(wanted, nn.Module) else wanted
    with open_weights(path) as (file, header), torch.no_grad():
        names = sorted(file.keys())
        if LORA in header.get("config", {}) and not any(is_adapter(name) for name in wanted):
            raise ValueError(
                f"{path} is a checkpoint of a stage with lora, whose adapters are not added to its weights; give the "
                f"{WEIGHTS} that the stage writes at its end"
            )
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name in wanted}
        misfits = {name: shape_of(wanted[name]) for name, shape in shapes.items() if shape != shape_of(wanted[name])}
        adapted: dict[str, Tensor] = {}
        if misfits and adapt is not None:
            state = {name: average.get(name, file.get_tensor(name)) for name in misfits}
            for name, value in state.items():
                check_type(path, name, value.dtype, wanted[name].dtype)
            adapted = adapt(state, header.get("config", {}), misfits)
        for name, shape in misfits.items():
            if name not in adapted or tuple(adapted[name].shape) != shape:
                raise ValueError(
                    f"{path}: {name} has shape {shapes[name]} but this stage needs {shape}; "
                    "use the model settings those weights were trained with, or another init_from"
                )
        digest = hashlib.sha256()
        for name in names:
            value = file.get_tensor(name)
            hash_tensor(digest, name, value)
            check_finite(path, name, value)
            if name in wanted:
                check_type(path, name, value.dtype, wanted[name].dtype)
                fill(wanted[name], adapted.get(name, average.get(name, value)))
        check_digest(path, header, digest)
    loaded = [name for name in names if name in wanted]
    # With attention per modality, vision and language share no names: such a stage only passes the weights on.
    if not loaded and "model" not in header.get("config", {}):
        raise ValueError(
            f"{path}: none of its {len(names)} tensors belongs to this stage, which has names such as "
            f"{next(iter(wanted))}; give weights that a stage or pretrain.export wrote"
        )
    missing = [name for name in wanted if name not in set(names)]
    unexpected = [name for name in names if name not in wanted]
    return Handover(loaded, missing, unexpected, digest.hexdigest(), sorted(misfits))


class HashedFile:
    """A file that hashes what is written to it, and stores its first error instead of raising it: torch's zip writer
    kills the process if its destructor meets an error, and a rank that left in the middle of a save would block the
    others."""

    def __init__(self, path: Path):
        self.bytes, self.digest = 0, hashlib.sha256()
        self.file: BinaryIO | None = None
        self.error: OSError | None = None
        with self._store_error():
            self.file = open(path, "wb")  # noqa: SIM115  closed in close(), which stores errors too

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        with self._store_error():
            if self.file is not None and self.error is None:
                self.file.write(data)
                self.digest.update(data)
                self.bytes += size
        return size

    def flush(self) -> None:
        """For torch.save, which calls it; close() does the work."""

    def close(self) -> None:
        if self.file is None:
            return
        with self._store_error():
            self.file.flush()
            os.fsync(self.file.fileno())
        with self._store_error():
            self.file.close()

    @contextmanager
    def _store_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file, and our header, which is {} in files of other origin. ValueError if it is missing or
    damaged."""
    from safetensors import SafetensorError

    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run the stage that writes it to completion first")
    try:
        with open_safetensors(path) as file:
            yield file, _our_header(path, (file.metadata() or {}).get(HEADER, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); write it again") from error


def _our_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        for name, kind in (("config", dict), ("sha256", str)):
            if not isinstance(header.get(name, kind()), kind):
                raise ValueError(f"its {name} is a {type(header[name]).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be used ({error}); write it again") from None
    return header


def hash_tensor(digest, name: str, value: Tensor) -> None:
    """Adds a tensor's name, type, shape and numbers to `digest`."""
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def check_digest(path: Path, header: dict[str, Any], digest) -> None:
    """ValueError if `digest`, over all tensors by name, is not the one in our header; a file without one passes."""
    if header.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise ValueError(
            f"{path} is damaged: its tensors do not match its hash; remove it and run its stage again, which rewrites "
            "it from the last checkpoint"
        )
