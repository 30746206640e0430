"""The constants of pretrain.plan.__main__, all of them: what GPUs and links can do, and which share of it is reached.

A line with a source repeats it; a line that says "assumption" is a judgement, to be replaced by a measurement of your
machine (benchmarks/throughput.py). Nothing here was measured by this project.
"""

from __future__ import annotations

from typing import NamedTuple

from pretrain.flops import PEAKS

GB, GIB = 1e9, 2**30


class Gpu(NamedTuple):
    """One GPU and its links; rates in bytes/s of one direction."""

    peak: float  # dense bf16 FLOP/s
    memory: float  # bytes that torch can see
    memory_rate: float
    node_rate: float  # to the other GPUs of the node
    network_rate: float  # to other nodes
    host_rate: float  # to the host's memory
    matmul: float  # share of the peak that large matrix products reach
    attention: float  # share of the peak that the attention kernel reaches on these short sequences
    fp32: float  # FLOP/s of fp32 without TF32


# peak: pretrain.flops.PEAKS (NVIDIA's data sheets). memory: "total capacity" in torch's out-of-memory messages
# (39.5 and 79.1 GiB; H100 as A100-80G; H200 139.8). memory_rate, node_rate (NVLink 3: 600 GB/s, NVLink 4: 900 GB/s,
# both directions together), host_rate (PCIe 4 and 5, 16 lanes): the same data sheets. network_rate: one adapter per
# GPU, 200 Gb/s HDR in a DGX A100 and 400 Gb/s NDR in a DGX H100 (NVIDIA's user guides).
# B200: as NVIDIA's HGX B200 of 1000 W (NVLink 5: 1800 GB/s); nvidia-smi shows 179 GiB of it, of which torch sees a
# little less. fp32: the same data sheets; 1/16 of bf16's peak on A100, 1/15 on H100, 1/28 on B200.
# matmul: assumption, from end-to-end MFU: the largest of llm-foundry's table is 64 % on A100 and 46 % on H100, which a
# product alone must exceed. attention: assumption; FlashAttention-2 reaches 50-73 % of an A100 on sequences of 2k and
# more (arXiv 2307.08691), ours have 196 to 321 rows; on Hopper its share is lower, as FlashAttention-3 reports.
GPUS = {
    "a100-40g": Gpu(PEAKS["A100"], 39.5 * GIB, 1555 * GB, 300 * GB, 25 * GB, 32 * GB, 0.75, 0.30, 19.5e12),
    "a100-80g": Gpu(PEAKS["A100"], 79.1 * GIB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, 0.75, 0.30, 19.5e12),
    "h100": Gpu(PEAKS["H100"], 79.1 * GIB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, 0.60, 0.20, 67e12),
    "h200": Gpu(PEAKS["H200"], 139.8 * GIB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, 0.60, 0.20, 67e12),
    "b200": Gpu(PEAKS["B200"], 178 * GIB, 8000 * GB, 900 * GB, 50 * GB, 64 * GB, 0.60, 0.20, 80e12),
}

TF32_SHARE = 0.5  # of the bf16 peak (data sheets: 156 of 312, 495 of 989, 1100 of 2250)
# A product whose narrowest side is w reaches matmul * w / (w + HALF_WIDTH): assumption; tiles and waves are not full.
HALF_WIDTH = 96
HALF_ROWS = 256  # the same for the rows of a micro-batch: assumption
MEMORY_SHARE = 0.80  # of memory_rate, by elementwise kernels: assumption
LINK_SHARE = 0.75  # of node_rate and network_rate, by large collectives: assumption (nccl-tests report 70 to 90 %)
HOST_SHARE = 0.75  # of host_rate, from pinned memory: assumption
HOST_ADAM_RATE = 150 * GB  # bytes/s of a host's memory that all ranks of a node share in DeepSpeedCPUAdam: assumption
# Kernel launches of DeepSpeed's step of ZeRO-1 for each parameter that a rank has, with two micro-steps: counted
# (benchmarks/results/step_calls.json, 2736 for 295 parameters).
STEP_LAUNCHES = 9.3
ZERO3_HOST = 2.0  # how much longer the host needs for a block that ZeRO-3 fetches: assumption
# Pictures a second that one core reads, decodes and crops, of 256 pixels: this project's loader on a CPU of 2026
# (benchmarks.loader); and how fast a rank writes its part of a checkpoint, in bytes/s: assumption.
CORE_PICTURES, WRITE_RATE = 700.0, 1 * GB
KERNEL_S = 5e-6  # seconds in which the host launches a kernel: assumption
BLOCK_KERNELS = 130  # launches of a block, forward and backward, counted by hand for shared attention, two experts
LATENCY_S = 20e-6  # seconds before one collective sends anything: assumption

# Which share of the computation can hide communication: assumption. ZeRO-1 and 2 reduce behind the backward pass with
# our JSONs (no overlap_comm); ZeRO-3 fetches and reduces beside it. Tensor, sequence and pipe collectives wait.
OVERLAP = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.7}

# Bytes that Adam moves for each element it owns: master, two moments (read and written, fp32), gradient and weight.
ADAM_BYTES = 32

# Bytes of an fp32 element, and of each optimizer state.
FP32 = 4
# Outside torch's allocator: CUDA context, NCCL's buffers, cuBLAS workspaces. Assumption.
OUTSIDE = 2.0 * GIB
# The share of the rest that the allocator loses to fragments: assumption; expandable segments keep it small.
FRAGMENTS = 0.05
# DeepSpeed's defaults for keys that a JSON leaves out (deepspeed 0.19.8, runtime/zero/config.py).
BUCKET, PREFETCH, PERSISTENCE = 500_000_000, 50_000_000, 100_000
LIVE, REUSE, SUB_GROUP = 1_000_000_000, 1_000_000_000, 1_000_000_000
