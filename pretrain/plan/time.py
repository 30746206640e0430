"""How long a step takes on paper: computation, memory traffic, communication by kind, the pipeline's bubble, Adam.

Every constant is in hardware.py. The result ranks layouts; it is no measurement and no promise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

from pretrain.batch import Layout
from pretrain.flops import Product, encoder_flops, product_flops
from pretrain.plan.hardware import (
    ADAM_BYTES,
    BLOCK_KERNELS,
    CORE_PICTURES,
    FP32,
    HALF_ROWS,
    HALF_WIDTH,
    HOST_ADAM_RATE,
    HOST_SHARE,
    KERNEL_S,
    LATENCY_S,
    LINK_SHARE,
    MEMORY_SHARE,
    OVERLAP,
    PERSISTENCE,
    STEP_LAUNCHES,
    TF32_SHARE,
    WRITE_RATE,
    ZERO3_HOST,
    Gpu,
)
from pretrain.plan.memory import Cell
from pretrain.plan.model import Planned, parameters_of, stage_runs, target_flops, teacher_flops
from pretrain.tasks.pretrain import all_passes

KINDS = ("data all-reduce", "all-gather", "reduce-scatter", "tensor all-reduce", "pipeline send", "all-to-all")


class Cluster(NamedTuple):
    """The GPUs that a stage is planned for: their kind and how many there are."""

    gpu: Gpu
    gpus: int
    node: int  # GPUs of one node


class Lengths(NamedTuple):
    """The mean number of ids in a pair's text and in a text seen alone, BOS and EOS included; None: all texts are full,
    without padding."""

    pair: float | None = None
    text: float | None = None

    def real(self, layout: Layout) -> Layout:
        """The layout without padding: see Batch.real_layout."""
        full = layout.pair_len, layout.text_len
        pair, text = (min(mean or most, most) for mean, most in zip(self, full, strict=True))
        return replace(layout, pair_len=cast(int, pair), text_len=cast(int, text))


FULL = Lengths()


class Time(NamedTuple):
    """Seconds of one optimizer step on paper, and what one GPU sends for it."""

    compute: float
    communication: float  # as far as computation does not hide it
    bubble: float  # in which a pipeline stage waits for others
    optimizer: float
    sent: dict[str, float]  # bytes by kind
    flops: float  # model FLOPs of the step over all GPUs, padding included, as MFU counts them
    real: float  # the same without padding
    executed: float  # those of the real ones that are computed

    @property
    def step(self) -> float:
        return self.compute + self.communication + self.bubble + self.optimizer

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.step

    def mfu(self, cluster: Cluster) -> float:
        return self.flops / self.step / cluster.gpus / cluster.gpu.peak

    def mfu_real(self, cluster: Cluster) -> float:
        return self.real / self.step / cluster.gpus / cluster.gpu.peak

    def mfu_executed(self, cluster: Cluster) -> float:
        return self.executed / self.step / cluster.gpus / cluster.gpu.peak


def step_time(planned: Planned, cell: Cell, cluster: Cluster, lengths: Lengths = FULL) -> Time:
    """The time of a step, by the slowest pipeline stage, for which the others wait. Padding goes through no block;
    `lengths` says how much of the texts it is."""
    counted = micro_flops(planned, cell) * cell.accumulation * cell.data
    cell = replace(cell, layout=lengths.real(cell.layout))
    micro = max(_micro_step(planned, cell, cluster, parts) for parts in stage_runs(planned, cell.layout, _pipe(cell)))
    frozen = teacher_flops(planned, cell.layout) + (target_flops(planned, cell.layout) if cell.targets else 0.0)
    micro += frozen / (cluster.gpu.peak * cluster.gpu.matmul)
    compute = micro * cell.accumulation
    bubble = micro * (_pipe(cell) - 1)
    sent, waits, hidden = _communication(planned, cell, cluster)
    shown = waits + max(hidden - OVERLAP[cell.stage] * compute, (1 - OVERLAP[cell.stage]) * hidden)
    real = micro_flops(planned, cell) * cell.accumulation * cell.data
    executed = executed_micro_flops(planned, cell) * cell.accumulation * cell.data
    return Time(compute, shown, bubble, _adam(planned, cell, cluster), sent, counted, real, executed)


class Totals(NamedTuple):
    """What the whole stage needs, with all its steps and saves."""

    hours: float
    gpu_hours: float
    saving: float  # the share of the time, 0 to 1, in which checkpoints are written
    checkpoint: float  # bytes: the weights in fp32, Adam's two moments, and the running average if there is one
    pictures: float  # that a node has to read each second
    cores: float  # that each node needs to read them


def whole_stage(planned: Planned, cell: Cell, cluster: Cluster, step: float) -> Totals:
    """`step`: the seconds of one step."""
    recipe, stage = planned.recipe, planned.stage
    trained = sum(p.real for p in planned.parameters if p.group is not None)
    moments = 2 + (stage.ema is not None)
    checkpoint = trained * moments * FP32 + sum(p.real for p in planned.parameters) * FP32
    writers = cell.shards if cell.stage else 1
    save = checkpoint / writers / WRITE_RATE
    seconds = stage.steps * step + stage.steps // recipe.save_every * save
    pictures = (stage.batch.total - stage.batch.texts) / step / max(cluster.gpus / cluster.node, 1)
    hours = seconds / 3600
    share = (seconds - stage.steps * step) / seconds
    return Totals(hours, hours * cluster.gpus, share, checkpoint, pictures, pictures / CORE_PICTURES)


def micro_flops(planned: Planned, cell: Cell) -> float:
    """Model FLOPs of a micro-batch, forward and backward, as pretrain.train reports them."""
    return planned.stage.task.flops(planned.model, planned.stage, cell.layout)


def executed_micro_flops(planned: Planned, cell: Cell) -> float:
    """The part of `micro_flops` that is computed: without gradients of frozen weights and without unread rows."""
    trained = frozenset(p.name for p in planned.parameters if p.group is not None)
    return planned.stage.task.executed_flops(planned.model, planned.stage, cell.layout, trained)


def _pipe(cell: Cell) -> int:
    return cell.parallel.pipe


def _micro_step(planned: Planned, cell: Cell, cluster: Cluster, parts: range) -> float:
    """Seconds of one micro-batch in these parts, forward and backward."""
    seconds = 0.0
    for each in all_passes(planned.stage.objectives, cell.layout):
        own = _pass(planned, replace(cell, layout=each.layout), cluster, parts)
        seconds += own if each.backward else own / 3
    if planned.model.depth + 1 not in parts:
        return seconds
    matmul, split = _matmul_rate(planned, cell, cluster), cell.parallel.tensor * cell.parallel.sequence
    for product in planned.products(cell.layout):
        seconds += product_flops([product]) / matmul / split
        # Logits in their own dtype and in fp32, their softmax and its gradient.
        moved = product.rows * product.outputs * (3 * cell.width + 16) / split
        seconds += moved / (cluster.gpu.memory_rate * MEMORY_SHARE)
    return seconds


def _matmul_rate(planned: Planned, cell: Cell, cluster: Cluster) -> float:
    """FLOP/s of products whose narrowest side is a head group's or an expert's width on this rank."""
    rows, width = cell.layout.rows / cell.parallel.sequence, planned.model.dim / cell.parallel.tensor
    filled = _filled(width, HALF_WIDTH) * _filled(rows, HALF_ROWS)
    return _peak(planned, cell, cluster.gpu) * cluster.gpu.matmul * filled


def _peak(planned: Planned, cell: Cell, gpu: Gpu) -> float:
    """FLOP/s of the GPU's data sheet in the precision of the cell."""
    return gpu.peak if cell.width == 2 else gpu.peak * TF32_SHARE if planned.recipe.tf32 else gpu.fp32


def _pass(planned: Planned, cell: Cell, cluster: Cluster, parts: range) -> float:
    """Seconds of these parts' blocks and patches in a pass of the cell's layout, forward and backward."""
    gpu, m, layout = cluster.gpu, planned.model, cell.layout
    split = cell.parallel.tensor * cell.parallel.sequence
    blocks = sum(1 for part in parts if 1 <= part <= m.depth)
    again = 4 / 3 if cell.checkpointing else 1.0  # the forward pass twice
    matmul = _matmul_rate(planned, cell, cluster)
    products = 3 * 2 * layout.rows * (4 * m.attention_dim + 2 * m.ffn_dim) * m.dim / split
    whole = encoder_flops(layout, dim=m.dim, depth=1, ffn_dim=m.ffn_dim, attention_dim=m.attention_dim) / split
    attention = (whole - products) / (_peak(planned, cell, gpu) * gpu.attention)
    # Elementwise: norms, gelu, sums and joins read and write; the backward pass moves twice as much.
    moved = 3 * layout.rows * cell.width * (14 * m.dim / cell.parallel.sequence + 4 * m.ffn_dim / split)
    block = products / matmul + attention + moved / (gpu.memory_rate * MEMORY_SHARE)
    host = BLOCK_KERNELS * KERNEL_S * (ZERO3_HOST if cell.stage == 3 else 1.0)
    seconds = blocks * again * max(block, host)
    if 0 in parts:
        patches = Product((layout.images + layout.pairs) * layout.patches, 3 * m.patch_size**2, m.dim)
        seconds += product_flops([patches]) / matmul / cell.parallel.sequence
    return seconds


def _filled(size: float, half: float) -> float:
    """The share of its best rate, 0 to 1, that a product of this size reaches; it is 1/2 at `half`."""
    return size / (size + half)


def _communication(planned: Planned, cell: Cell, cluster: Cluster) -> tuple[dict[str, float], float, float]:
    """(bytes that one GPU sends in a step by kind, seconds that wait, seconds that may hide behind computation)."""
    sent, waits = dict.fromkeys(KINDS, 0.0), 0.0
    for each in all_passes(planned.stage.objectives, cell.layout):
        share = 1.0 if each.backward else 0.5
        for kind, size, seconds in _inside(planned, replace(cell, layout=each.layout), cluster):
            sent[kind] += share * size
            waits += share * seconds
    hidden = 0.0
    for kind, size, seconds in _over_data(planned, cell, cluster):
        sent[kind] += size
        hidden += seconds
    return sent, waits, hidden


def _inside(planned: Planned, cell: Cell, cluster: Cluster):
    """Collectives of the ranks that share one micro-batch: (kind, bytes sent by a GPU, seconds) of a step's passes."""
    m, sizes, layout = planned.model, cell.parallel, cell.layout
    rows = layout.rows / sizes.sequence * m.dim * cell.width
    blocks = -(-m.depth // sizes.pipe)
    passes = 3 if cell.checkpointing else 2  # forward, forward again, backward
    if sizes.tensor > 1:
        # Two sums forward and two backward in each block (Megatron-LM, section 3).
        count = 2 * passes * blocks * cell.accumulation
        size = 2 * (sizes.tensor - 1) / sizes.tensor * rows
        rate = _rate(cluster, span=sizes.tensor)
        yield "tensor all-reduce", count * size, count * (size / rate + LATENCY_S)
    if sizes.sequence > 1:
        # An all-to-all each of queries, keys, values and the result in each pass (Ulysses, arXiv 2309.14509).
        count = 4 * passes * blocks * cell.accumulation
        size = (sizes.sequence - 1) / sizes.sequence * rows * m.attention_dim / m.dim / sizes.tensor
        rate = _rate(cluster, span=sizes.tensor * sizes.sequence)
        yield "all-to-all", count * size, count * (size / rate + LATENCY_S)
    if sizes.pipe > 1:
        count = 2 * cell.accumulation
        rate = _rate(cluster, span=cluster.gpus, ranks=sizes.pipe)  # pipe is the outermost axis
        yield "pipeline send", count * rows, count * (rows / rate + LATENCY_S)


def _over_data(planned: Planned, cell: Cell, cluster: Cluster):
    """Gradients and weights over the ranks that ZeRO splits over: (kind, bytes sent by a GPU, seconds) of a step."""
    ranks = cell.shards
    if ranks == 1:
        return
    runs = stage_runs(planned, cell.layout, cell.parallel.pipe)
    own = max(
        (parameters_of(planned, run) for run in runs), key=lambda ps: sum(p.elements(cell.parallel.tensor) for p in ps)
    )
    sizes = [(p.elements(cell.parallel.tensor), p) for p in own]
    trained = sum(numel for numel, p in sizes if p.group is not None) * cell.width
    part = (ranks - 1) / ranks
    rate = _rate(cluster, span=ranks * cell.parallel.tensor, ranks=ranks)
    if cell.stage < 3:
        # deepspeed's stage_1_and_2.py sums buckets over all ranks, ZeRO-2 after each micro-step, and gathers weights
        # after Adam.
        times = cell.accumulation if cell.stage == 2 else 1
        size = 2 * part * trained * times
        yield "data all-reduce", size, size / rate + times * len(sizes) * LATENCY_S / 8
        if cell.stage:
            yield "all-gather", part * trained, part * trained / rate
        return
    threshold = cell.zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    fetched = [numel for numel, _ in sizes if numel > threshold]
    whole = sum(fetched) * cell.width
    near = cell.zero.get("zero_hpz_partition_size", 1)
    near_rate, near_part = (_rate(cluster, span=near), (near - 1) / near) if near > 1 else (rate, part)
    count = cell.accumulation
    # Weights for the forward pass from all, for the backward pass from the second copy where there is one (hpZ).
    size = count * whole * (part + near_part)
    seconds = count * whole * (part / rate + near_part / near_rate) + 2 * count * len(fetched) * LATENCY_S
    if cell.offload_param:
        seconds += 2 * count * whole / ranks / (cluster.gpu.host_rate * HOST_SHARE)
    yield "all-gather", size, seconds
    yield "reduce-scatter", count * part * trained, count * (part * trained / rate + len(sizes) * LATENCY_S / 8)


def _rate(cluster: Cluster, *, span: int, ranks: int | None = None) -> float:
    """Bytes/s of each GPU in a ring of `ranks` whose members lie within `span` neighbouring GPUs: over the links of a
    node, or over the network where they lie in several. A ring over whole nodes uses the adapters of all their GPUs."""
    if span <= cluster.node:
        return cluster.gpu.node_rate * LINK_SHARE
    # Rings of other tensor ranks share the node's adapters: each GPU has its own.
    inside = max(min(cluster.node * (ranks or span) // span, cluster.node), 1)
    return min(cluster.gpu.network_rate * inside, cluster.gpu.node_rate) * LINK_SHARE


def _adam(planned: Planned, cell: Cell, cluster: Cluster) -> float:
    """Seconds of the optimizer's step on the rank that owns most; DeepSpeed looks at every parameter."""
    runs = stage_runs(planned, cell.layout, cell.parallel.pipe)
    most = max(
        (
            [p.elements(cell.parallel.tensor) for p in parameters_of(planned, run) if p.group is not None]
            for run in runs
        ),
        key=sum,
    )
    trained, launches = sum(most), STEP_LAUNCHES * len(most) * KERNEL_S if cell.stage else 0.0
    own = trained / (cell.shards if cell.stage else 1)
    if not cell.offload:
        return launches + own * ADAM_BYTES / (cluster.gpu.memory_rate * MEMORY_SHARE)
    moved = 2 * own * cell.width / (cluster.gpu.host_rate * HOST_SHARE)
    return launches + moved + own * ADAM_BYTES * min(cluster.node, cluster.gpus) / HOST_ADAM_RATE
