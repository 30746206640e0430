"""Bytes on one GPU by part, at the two moments of a step that need most: the backward pass and the optimizer's step.

Parameters, gradients and optimizer state are counted as deepspeed 0.19.8 holds them (runtime/zero/stage_1_and_2.py,
stage3.py), activations as autograd saves them in pretrain/models/multiway/encoder.py. tests/plan/test_memory.py
compares the sums with the bytes of a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pretrain.batch import Layout
from pretrain.cross_entropy import CHUNK
from pretrain.parallel.ds_config import offloads, precision, zero_stage
from pretrain.parallel.sizes import Parallel
from pretrain.plan.hardware import BUCKET, FP32, LIVE, PERSISTENCE, PREFETCH, REUSE, SUB_GROUP
from pretrain.plan.model import (
    Parameter,
    Planned,
    parameters_of,
    read_rows,
    stage_runs,
    target_elements,
    teacher_elements,
)
from pretrain.tasks.pretrain import all_passes


@dataclass(frozen=True)
class Cell:
    """One way to spread a stage over GPUs: DeepSpeed JSON, sizes, accumulation, checkpointing every n blocks."""

    config: dict[str, Any]
    parallel: Parallel
    data: int  # ranks that work on different data
    layout: Layout  # of a micro-batch
    accumulation: int = 1
    checkpointing: int = 0
    packed: bool = True  # the variable-length kernel runs: on GPUs in bf16
    targets: bool = True  # the frozen visual tokenizer runs in every micro-step
    zero: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero", self.config.get("zero_optimization", {}))

    @property
    def stage(self) -> int:
        return zero_stage(self.config)

    @property
    def width(self) -> int:
        """Bytes of a parameter, gradient or activation."""
        return precision(self.config).itemsize

    @property
    def shards(self) -> int:
        """Ranks that ZeRO splits over: sequence ranks hold the same weights, and share them out too."""
        return self.data * self.parallel.sequence

    @property
    def offload(self) -> bool:
        return offloads(self.config)

    @property
    def offload_param(self) -> bool:
        return self.zero.get("offload_param", {}).get("device", "none") != "none"


class Memory(NamedTuple):
    """Bytes of one rank at one moment."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float  # saved for the backward pass
    buffers: float  # communication buckets, and the parameters that ZeRO-3 has gathered
    working: float = 0.0  # temporary tensors of one operation
    host: float = 0.0  # in the host's memory, not the GPU's
    moment: str = "backward"

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.working


def peak_memory(planned: Planned, cell: Cell) -> Memory:
    """The memory of the rank that needs most, at its worst moment."""
    each = [memory for stage in range(cell.parallel.pipe) for memory in moments(planned, cell, stage)]
    return max(each, key=lambda memory: memory.total)


def moments(planned: Planned, cell: Cell, stage: int = 0) -> tuple[Memory, Memory]:
    """The memory of a rank of this pipeline stage: (in the backward pass, in the optimizer's step)."""
    pipe = cell.parallel.pipe
    parts = stage_runs(planned, cell.layout, pipe)[stage]
    backward, step = _states(parameters_of(planned, parts), cell, averages=int(planned.stage.ema is not None))
    # 1F1B: a stage has as many micro-batches under way as there are stages from it on.
    under_way = min(cell.accumulation, pipe - stage) if pipe > 1 else 1
    saved = 0.0
    for each in all_passes(planned.stage.objectives, cell.layout):  # one under a pipeline
        saved += activations(planned, replace(cell, layout=each.layout), parts) * under_way if each.backward else 0
    saved += sum(each.saves(cell.layout, planned.model, cell.width) for each in planned.stage.objectives)
    boundary = 0.0
    if pipe > 1:
        # The rows that each micro-batch under way sends on, and the gradient that comes back (PipelineEngine's
        # buffers).
        boundary = (under_way + 1) * cell.layout.rows * planned.model.dim * cell.width
    frozen = planned.kept + teacher_elements(planned) * FP32
    if cell.targets and stage == pipe - 1:
        frozen += target_elements(planned) * FP32
    backward, step = (m._replace(parameters=m.parameters + frozen) for m in (backward, step))
    return (
        backward._replace(
            activations=saved, working=working_bytes(planned, cell, parts), buffers=backward.buffers + boundary
        ),
        step._replace(buffers=step.buffers + boundary),
    )


def _states(own: Sequence[Parameter], cell: Cell, averages: int) -> tuple[Memory, Memory]:
    """(in the backward pass, in the optimizer's step), all but activations, of a rank with the parameters `own`.
    `averages`: how many numbers a running average holds for each weight, beside two moments and, under ZeRO, the
    master."""
    if cell.stage == 3:
        return _partitioned(own, cell, averages)
    tensor, width = cell.parallel.tensor, cell.width
    frozen = sum(p.elements(tensor) for p in own if p.group is None)
    groups = _group_sizes(own, tensor, 1 if cell.stage == 0 else 2 * cell.shards)
    trained, largest = sum(groups), max(groups, default=0)
    weights = float((frozen + trained) * width)
    if cell.stage == 0:
        grads, moments_ = float(trained * width), (2.0 + averages) * FP32 * trained
        # Each all-reduce works on a flat copy of up to DeepSpeed's default bucket.
        flat = min(trained, BUCKET) * width if cell.shards > 1 else 0
        return (
            Memory(weights, grads, moments_, 0, 0),
            Memory(weights, grads, moments_, 0, flat, moment="step"),
        )
    own_part = trained / cell.shards
    overlap = bool(cell.zero.get("overlap_comm"))
    bucket = cell.zero.get("reduce_bucket_size", BUCKET) * width * (2 if overlap else 1)
    # ZeRO-1 keeps all gradients until the last micro-step's backward is over, and reduces them then.
    # ZeRO-2 adds each micro-step's share to the sum of those before.
    gradients = own_part * min(cell.accumulation, 2)
    if cell.stage == 1:
        gradients = trained if not overlap or cell.accumulation > 1 else own_part
    state, part_fp32 = (3 + averages) * FP32 * own_part, FP32 * largest / cell.shards
    if cell.offload:
        # The largest parameter's gradient on its way to the host (temp_grad_buffer_for_gpu_offload).
        copy = max((p.elements(tensor) for p in own), default=0) * width
        host = state + (FP32 + width) * own_part
        gradients = trained if cell.stage == 1 else 0
        backward = Memory(weights, gradients * width, 0, 0, bucket + copy, host=host)
        return backward, Memory(weights, 0, 0, 0, copy, host=host, moment="step")
    return (
        Memory(weights, gradients * width, state, 0, bucket),
        # The rank's gradients in their own dtype, and those of one parameter group in fp32.
        Memory(weights, own_part * width + part_fp32, state, 0, 0, moment="step"),
    )


def _partitioned(own: Sequence[Parameter], cell: Cell, averages: int) -> tuple[Memory, Memory]:
    """`_states` under ZeRO-3: each parameter is cut into equal parts, and small ones are kept whole too."""
    tensor, width, shards = cell.parallel.tensor, cell.width, cell.shards
    sizes = [(p.elements(tensor), p) for p in own]
    parts = sum(-(-numel // shards) for numel, _ in sizes)
    trained = sum(-(-numel // shards) for numel, p in sizes if p.group is not None)
    threshold = cell.zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    persistent = sum(numel for numel, _ in sizes if numel <= threshold) if shards > 1 else 0
    group = cell.zero.get("zero_hpz_partition_size", 1)
    second = sum(numel for numel, _ in sizes) / group * width if group > 1 else 0.0
    bucket: float = cell.zero.get("reduce_bucket_size", BUCKET) * width
    gathered = gathered_elements(own, cell) * width
    weights = parts * width + persistent * width + second
    state = (3.0 + averages) * FP32 * trained
    at_work = FP32 * min(
        max(_group_sizes(own, tensor, 1, shards), default=0), cell.zero.get("sub_group_size", SUB_GROUP)
    )
    grads, host = float(trained * width), 0.0
    if cell.offload:
        grads, state, host = 0.0, 0.0, state + trained * (width + FP32)
        at_work = 0
    if cell.offload_param:
        weights, host = persistent * width + second, host + parts * width
    return (
        Memory(weights, grads, state, 0, bucket + gathered, host=host),
        Memory(weights, grads + at_work, state, 0, bucket, host=host, moment="step"),
    )


def gathered_elements(own: Sequence[Parameter], cell: Cell) -> float:
    """Elements of the parameters that are whole at the worst moment under ZeRO-3, beside the small ones that always
    are.

    A parameter that was used stays until its next use is further away than stage3_max_reuse_distance. Between the
    forward and the backward pass that distance is twice the weights behind it. Each module that runs fetches up to a
    prefetch bucket more, so the prefetch soon runs ahead until stage3_max_live_parameters are there, however small its
    bucket (partitioned_param_coordinator.py, fetch_sub_module and __params_to_release).
    """
    threshold = cell.zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    sizes = [numel for p in own if (numel := p.elements(cell.parallel.tensor)) > threshold]
    if cell.shards == 1:
        return 0  # a part is the whole
    if not cell.zero.get("memory_efficient_linear", True) and not cell.checkpointing:
        return sum(sizes)  # torch's own linear layer keeps a view of its gathered weight for the backward pass
    live = cell.zero.get("stage3_max_reuse_distance", REUSE) / 2
    if cell.zero.get("stage3_prefetch_bucket_size", PREFETCH):
        live = max(live, cell.zero.get("stage3_max_live_parameters", LIVE))
    # The worst moment is between the passes: the last weights are whole, up to `live` elements.
    whole = 0
    for size in reversed(sizes):
        if whole >= live:
            break
        whole += size
    return whole


def _group_sizes(own: Sequence[Parameter], tensor: int, align: int, shards: int = 1) -> list[int]:
    """Elements of each of the optimizer's groups, or of one of its `shards` equal parts, padded to a multiple of
    `align`."""
    sizes: dict[int, int] = {}
    for p in own:
        if p.group is not None:
            sizes[p.group] = sizes.get(p.group, 0) + -(-p.elements(tensor) // shards)
    return [-(-size // align) * align for size in sizes.values()]


def activations(planned: Planned, cell: Cell, parts: range) -> float:
    """Bytes that autograd keeps of one micro-batch for the backward pass, on a rank with these parts of the model."""
    depth = planned.model.depth
    blocks = [part for part in parts if 1 <= part <= depth]
    total = _embedding(planned, cell) if 0 in parts else 0.0
    if depth + 1 in parts:
        total += _heads(planned, cell)
    every = cell.checkpointing
    if not every:
        return total + sum(block_bytes(planned, cell, block) for block in blocks)
    rows = cell.layout.rows / cell.parallel.sequence
    runs = [blocks[first : first + every] for first in range(0, len(blocks), every)]
    inputs = len(runs) * rows * planned.model.dim * cell.width
    # In the backward pass one run at a time is computed again; its first input is counted already.
    again = max((sum(block_bytes(planned, cell, block) for block in run) for run in runs), default=0.0)
    return total + inputs + max(again - rows * planned.model.dim * cell.width, 0)


def block_bytes(planned: Planned, cell: Cell, block: int) -> float:
    """Bytes of the tensors that one block saves, in the order of MultiwayBlock.forward."""
    m, width = planned.model, cell.width
    split, sequence = cell.parallel.tensor * cell.parallel.sequence, cell.parallel.sequence
    rows, d, f, a = cell.layout.rows, m.dim, m.ffn_dim, m.attention_dim
    after = min(read_rows(planned, cell.layout), rows) if block == m.depth else rows
    stats = 2 * (width if not cell.packed else FP32)  # mean and 1 / standard deviation of a norm's row
    whole: float = rows * (2 * d * width + stats)  # the block's input, its norm
    whole += after * (2 * d * width + stats)  # the sum after attention, its norm
    kinds = _kinds(cell.layout)
    inner: float = (4 * rows + 3 * _copied(cell)) * a * width  # q, k, v, the result; copies of joined kinds
    if kinds > 1 or block == m.depth:
        inner += after * a * width  # joined, or the rows that heads read
    inner += 2 * after * f * width  # gelu's input and its output
    inner += rows * m.heads * FP32  # the softmax's normaliser
    if m.sub_norm:
        inner += after * ((a + f) * width + 2 * stats)
    if m.layer_scale is not None:
        whole += 2 * after * d * width
    if planned.stage.drop_path and block > 1:
        whole += 2 * after * width
    if m.relative_position:
        inner += _biased_scores(planned, cell)
    return whole / sequence + inner / split


def _kinds(layout: Layout) -> int:
    """How many pieces attention's result is joined from."""
    return bool(layout.images) + 2 * bool(layout.pairs) + bool(layout.texts)


def _copied(cell: Cell) -> int:
    """Rows of q, k and v that attention copies to join or pack sequences. 0 where it would copy all rows, since the
    original is then not kept."""
    layout = cell.layout
    pairs = layout.pair_image_rows + layout.pair_text_rows
    copied = pairs + layout.text_rows if cell.packed and layout.language_rows else pairs
    return copied if copied < layout.rows else 0


def _biased_scores(planned: Planned, cell: Cell) -> float:
    """Bytes of the scores after the softmax, which are kept where a learned bias rules out the flash kernels. The bias
    itself, one for all sequences of a length, is not counted."""
    layout, heads = cell.layout, planned.model.heads
    lengths = (
        (layout.images, layout.image_len),
        (layout.pairs, layout.image_len + layout.pair_len),
        (layout.texts, layout.text_len),
    )
    return sum(count * heads * length**2 for count, length in lengths) * cell.width


def _embedding(planned: Planned, cell: Cell) -> float:
    """Bytes that the embeddings save."""
    layout, m = cell.layout, planned.model
    pictures = layout.images + layout.pairs
    patches = pictures * layout.patches
    texts = layout.language_rows
    total = patches * (3 * m.patch_size**2 * cell.width + 1)  # the projection's input; where mask tokens stand
    total += texts * (8 + 1)  # ids, padding
    if m.text_norm:
        total += texts * (m.dim * cell.width + 2 * FP32)
    return total / cell.parallel.sequence


def _heads(planned: Planned, cell: Cell) -> float:
    """Bytes that the final norm saves, and for each head the gradients that its forward pass makes: of its rows, its
    matrix and its bias; see pretrain/cross_entropy.py."""
    m, products = planned.model, planned.products(cell.layout)
    read = min(read_rows(planned, cell.layout), cell.layout.rows)
    total: float = read * (m.dim * cell.width + 2 * FP32 + 8)
    matrices = 0.0  # every sequence rank has the whole head
    for product in products:
        total += product.rows * (product.inputs * cell.width + 16)
        if product.classes:
            matrices += (product.inputs + 1) * product.outputs * cell.width / cell.parallel.tensor
    return total / cell.parallel.sequence + matrices


def working_bytes(planned: Planned, cell: Cell, parts: range) -> float:
    """The most bytes that one operation holds beside the saved tensors: the gradients of a block's inner rows; or a
    chunk of logits in their own dtype and in fp32 with their gradient, and what the chunk adds to the matrix's
    gradient, in its own dtype and in fp32."""
    m, split = planned.model, cell.parallel.tensor * cell.parallel.sequence
    block = cell.layout.rows * (2 * m.ffn_dim + 2 * m.dim) * cell.width / split
    products = planned.products(cell.layout) if m.depth + 1 in parts else []
    heads = [
        min(product.rows * product.outputs / split, CHUNK) * (2 * cell.width + FP32)
        + product.inputs * product.outputs / cell.parallel.tensor * (cell.width + FP32)
        for product in products
        if product.classes
    ]
    return max(block, *heads, 0.0)
