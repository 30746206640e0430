"""The optimizer's state in a checkpoint: each rank writes its own part, and a run under any layout reads what it needs.

The moments are stored in the pieces into which ZeRO, tensor and pipeline parallelism cut them, each with its name and
place. So saving needs no communication, and a run goes on under the same layout or another.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.files import open_safetensors
from pretrain.parallel.state import dense_shape, named_state, padded_shape, real_rows, split_dim

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, the optimizer of every recipe
AVERAGE = "average"  # of the weights, if the stage keeps one (average.py); cut and stored like a moment
HEADER = "imglish"


class _Share(NamedTuple):
    """The part of one parameter that this rank's optimizer holds: a contiguous run of the flattened parameter, or of
    this tensor rank's slice of it."""

    parameter: Any
    flat: Any  # the tensor that the optimizer knows: the parameter itself, or one with the runs of many parameters
    start: int  # where the run begins in the flattened parameter
    length: int
    state: dict[str, Any]  # the optimizer's, of `flat`
    offset: int  # where the run begins in `flat`

    def moment(self, name: str) -> Tensor:
        return self.state[name].view(-1).narrow(0, self.offset, self.length)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in the state that are stored."""
        return (*MOMENTS, AVERAGE) if AVERAGE in self.state else MOMENTS

    def set_steps(self, steps: int) -> None:
        """Sets AdamW's count of the steps that have moved it."""
        step = self.state["step"]
        self.state["step"] = torch.full_like(step, steps) if isinstance(step, Tensor) else steps


class Moments(NamedTuple):
    """This rank's part of a checkpoint: fp32 runs of flattened parameters as "exp_avg/NAME", and where each belongs."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def own_moments(engine, mesh: Mesh | None) -> Moments:
    """This rank's moments. They are the optimizer's own tensors, which the next step overwrites."""
    tensors: dict[str, Tensor] = {}
    places, steps = {}, 0
    for name, share in _shares(engine, create=True):  # DeepSpeed may have skipped every step so far
        own = int(share.state["step"])
        steps = max(steps, own)
        if _writes(share.parameter, engine, mesh):
            places[name] = {"start": share.start, "split": split_dim(share.parameter), "steps": own}
            tensors |= {f"{key}/{name}": share.moment(key) for key in share.keys}
    rank, size = (mesh.tensor.rank, mesh.tensor.size) if mesh is not None else (0, 1)
    return Moments(tensors, {"tensor_rank": rank, "tensor_size": size, "steps": steps, "places": places})


def read_moments(engine, mesh: Mesh | None, files: list[Path]) -> None:
    """Fills this rank's moments from the files of all ranks of a run, which may have had another layout. Raises
    ValueError if a part of a parameter is in none of them."""
    rank, size = (mesh.tensor.rank, mesh.tensor.size) if mesh is not None else (0, 1)
    with ExitStack() as opened:
        saved = _Saved(files, opened)
        for name, share in _shares(engine, create=True):
            share.set_steps(saved.steps_of.get(name, saved.steps))
            split, end = split_dim(share.parameter), share.start + share.length
            if split is None:  # whole on this rank, but perhaps split in the files
                split = saved.splits.get(name)
            vocabulary = _vocabulary(share.parameter, mesh, size)
            for key in share.keys:
                if vocabulary is not None and saved.numbers(name) != vocabulary.padded:
                    value = saved.vocabulary(key, name, vocabulary)
                    value = value.chunk(vocabulary.parts)[rank % vocabulary.parts][share.start : end]
                elif split is None or saved.tensor_size == size:
                    value = saved.run(key, name, 0 if split is None else rank, share.start, end)
                else:
                    whole = saved.whole(key, name, split, padded_shape(share.parameter, mesh))
                    value = whole.chunk(size, split)[rank].flatten()[share.start : end]
                share.moment(key).copy_(value)


class _Vocabulary(NamedTuple):
    """The sizes of a parameter whose rows are padded."""

    padded: int  # its numbers with padding
    real: int  # and without
    parts: int  # the tensor ranks over which it is split


def _vocabulary(parameter: Any, mesh: Mesh | None, size: int) -> _Vocabulary | None:
    if real_rows(parameter) is None:
        return None
    parts = 1 if split_dim(parameter) is None else size
    return _Vocabulary(math.prod(padded_shape(parameter, mesh)), math.prod(dense_shape(parameter, mesh)), parts)


def _shares(engine, *, create: bool) -> Iterator[tuple[str, _Share]]:
    """Name and share of each trainable parameter of which this rank's optimizer holds a part. `create`: make the
    optimizer's state where it does not exist yet."""
    stage, seen = engine.zero_optimization_stage(), set()
    for name, value in named_state(engine.module).items():
        if not isinstance(value, nn.Parameter) or not value.requires_grad or id(value) in seen:
            continue  # tied weights: counted under their first name
        seen.add(id(value))
        start, length, flat, offset = _place(engine, value, stage)
        if length:
            inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
            yield name, _Share(value, flat, start, length, _state_of(inner, flat, create), offset)


def flats(engine) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each fp32 tensor that this rank's optimizer moves, with its state."""
    seen = set()
    for _, share in _shares(engine, create=True):
        if id(share.flat) not in seen:
            seen.add(id(share.flat))
            yield share.flat, share.state


def restart(engine, names: Collection[str]) -> None:
    """Sets AdamW's count of steps to 0 for these parameters. No others may share their groups."""
    for name, share in _shares(engine, create=True):
        if name in names:
            share.set_steps(0)


def read_average(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The whole average of each trained parameter, from the files of all ranks of a checkpoint; {} if the stage kept no
    average. `shapes`: the shapes on one device of all parameters. Raises ValueError if a part of a parameter is in none
    of the files."""
    with ExitStack() as opened:
        saved = _Saved(files, opened)
        average = {}
        for name in sorted({name for name, _ in saved.pieces if AVERAGE in saved.keys}):
            shape, split = shapes[name], saved.splits[name]
            if split is None:
                average[name] = saved.run(AVERAGE, name, 0, 0, math.prod(shape)).view(shape)
                continue
            padded = (saved.numbers(name) // math.prod(shape[1:]), *shape[1:]) if split == 0 else shape
            average[name] = saved.whole(AVERAGE, name, split, padded)[: shape[0]].contiguous()
        return average


def _place(engine, value: Any, stage: int) -> tuple[int, int, Any, int]:
    """(start, length) of this rank's run of a parameter, and the flat tensor and offset at which it lies."""
    zero = engine.optimizer
    if stage == 0:
        return 0, value.numel(), value, 0
    if stage == 3:
        group, offset, part = zero.grad_position[zero.get_param_id(value)]
        start = dist.get_rank(value.ds_process_group) * part
        return start, max(min(part, value.ds_numel - start), 0), zero.fp32_partitioned_groups_flat[group], offset
    mapping = value._hp_mapping
    if mapping is None:
        return 0, 0, None, 0
    # The second name is that of the pipeline's bf16 optimizer.
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return here.start, here.numel, flats[mapping.param_group_index], there.start


def _state_of(optimizer: torch.optim.Optimizer, flat: Tensor, create: bool) -> dict[str, Any]:
    """AdamW's state of one tensor, which does not exist before the first step; `create` makes it then."""
    state = optimizer.state[flat]
    if create and "exp_avg" not in state:
        step = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["step"] = step if isinstance(optimizer, torch.optim.AdamW) else 0  # DeepSpeed's Adam counts with an int
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.data)
    return state


def _writes(parameter: Any, engine, mesh: Mesh | None) -> bool:
    """Whether this rank writes the parameter's moments: the first of the ranks that hold the same values does."""
    first_copy = dist.get_rank() == 0 if mesh is None else mesh.copies.rank == 0
    if engine.zero_optimization_stage() == 0 and not first_copy:
        return False
    return mesh is None or split_dim(parameter) is not None or mesh.tensor.rank == 0


def write_moments(moments: Moments, file: Any) -> None:
    """Writes a safetensors file into `file` (anything with `write`), with one tensor in host memory at a time. (The
    format: 8 bytes of length, a JSON of types, shapes and offsets, then the numbers.)"""
    tensors = moments.tensors
    about: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(moments.header, sort_keys=True)}}
    end = 0
    for name, value in tensors.items():
        assert value.dtype == torch.float32, (name, value.dtype)
        about[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
        end += 4 * value.numel()
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for value in tensors.values():
        file.write(value.detach().to("cpu").contiguous().numpy().data)


class _Saved:
    """The moments of a checkpoint, whatever layout wrote them."""

    def __init__(self, files: list[Path], opened: ExitStack):
        # (name, tensor rank) -> [(start, end, file)], in numbers of the flattened parameter
        self.pieces: dict[tuple[str, int], list[tuple[int, int, Any]]] = defaultdict(list)
        self.splits: dict[str, int | None] = {}  # the dimension that was split over tensor ranks
        self.steps_of: dict[str, int] = {}  # AdamW's count for each parameter; checkpoints have it since 2026-11-29
        self.keys: set[str] = set()
        self.steps, self.tensor_size = 0, 1
        for path in files:
            file = opened.enter_context(open_safetensors(path))
            header = json.loads(file.metadata()[HEADER])
            self.keys |= {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118  it is no dict
            for name, place in header["places"].items():
                length = file.get_slice(f"{MOMENTS[0]}/{name}").get_shape()[0]
                index = 0 if place["split"] is None else header["tensor_rank"]
                self.splits[name] = place["split"]
                if "steps" in place:
                    self.steps_of[name] = place["steps"]
                self.pieces[name, index].append((place["start"], place["start"] + length, file))
            self.steps, self.tensor_size = max(self.steps, header["steps"]), header["tensor_size"]
        for run in self.pieces.values():
            run.sort(key=lambda piece: piece[:2])

    def run(self, key: str, name: str, index: int, start: int, end: int) -> Tensor:
        """The numbers start .. end - 1 of a flattened parameter's slice on tensor rank `index`."""
        parts, at = [], start
        for first, last, file in self.pieces[name, index]:
            if first <= at < min(last, end):
                parts.append(file.get_slice(f"{key}/{name}")[at - first : min(last, end) - first])
                at = min(last, end)
        if at < end:
            raise ValueError(
                f"the checkpoint holds only a part of {key} of {name}; remove it, and the one before it is used"
            )
        return torch.cat(parts)

    def numbers(self, name: str) -> int:
        """How many numbers of a parameter all tensor ranks hold together."""
        return sum(run[-1][1] for (each, _), run in self.pieces.items() if each == name)

    def vocabulary(self, key: str, name: str, wanted: _Vocabulary) -> Tensor:
        """A vocabulary's moment, flattened and padded as `wanted`, that was saved with other padding or, before
        2026-11-29, with none."""
        indices = sorted(index for each, index in self.pieces if each == name)
        parts = [self.run(key, name, index, 0, self.pieces[name, index][-1][1]) for index in indices]
        whole = torch.cat(parts)[: wanted.real]
        return torch.cat([whole, whole.new_zeros(wanted.padded - len(whole))])

    def whole(self, key: str, name: str, split: int, shape: tuple[int, ...]) -> Tensor:
        """The whole moment of a parameter of this `shape`, which tensor ranks had split along `split`."""
        own = [size // self.tensor_size if dim == split else size for dim, size in enumerate(shape)]
        parts = [self.run(key, name, index, 0, math.prod(own)).view(own) for index in range(self.tensor_size)]
        return torch.cat(parts, split)
