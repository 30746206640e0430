"""Whether parallel sizes, model, batch, JSON and world fit together: one sentence for each reason why they do not,
before any process group is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pretrain.batch import batch_problem
from pretrain.contracts import ModelSizes
from pretrain.layers import padded
from pretrain.parallel.ds_config import deepcompiles, zero_stage
from pretrain.parallel.sizes import Parallel, world_problem

# Suggested vocabulary sizes are multiples of this, which tensor cores prefer.
VOCABULARY_MULTIPLE = 8


def check_legal(parallel: Parallel, **facts: Any) -> None:
    """Raises ValueError with the first of `problems`."""
    if reasons := problems(parallel, **facts):
        raise ValueError(reasons[0])


def problems(
    parallel: Parallel,
    *,
    world: int,
    config: Mapping[str, Any],
    counts: Mapping[str, int],
    accumulation: int = 1,
    model: ModelSizes | None = None,
    classes: Mapping[str, int] | None = None,
    compiled: bool = False,
    node: int | None = None,
) -> list[str]:
    """Every reason why this run is not possible, each a sentence with the knob, its value and the way out.

    `config`: the DeepSpeed JSON, as in a file or completed; `counts`: the sequences of each kind in one optimizer step
    over all ranks; `model`: None for one that cannot be split over tensor, sequence and pipe ranks; `classes`: the
    sizes of heads by the names of their fields; `node`: the number of ranks on a node, if known; `compiled`: the
    stage's `compile`.
    """
    misfit = world_problem(parallel, world)
    reasons = [misfit] if misfit else []
    if model is None:
        reasons += _data_parallel_only(parallel)
    else:
        reasons += [*_splits(parallel, model, classes or {}), *_pipe_stages(parallel, model)]
    reasons += _zero(parallel, config)
    reasons += _json(parallel, config, world, node)
    reasons += _compiled(config) if compiled else []
    if not misfit:
        each = [batch_problem(kind, count, world // parallel.model, accumulation) for kind, count in counts.items()]
        reasons += [problem for problem in each if problem]
    return reasons


def _data_parallel_only(parallel: Parallel) -> list[str]:
    return [
        f"parallel.{name}={size} does not go with this stage's model, which is split over data ranks only; "
        f"set parallel.{name}=1"
        for name, size in vars(parallel).items()
        if size > 1
    ]


def _splits(parallel: Parallel, model: ModelSizes, classes: Mapping[str, int]) -> list[str]:
    """Sizes that do not divide over the tensor and sequence ranks."""
    reasons, split = [], parallel.tensor * parallel.sequence
    if model.heads % parallel.tensor:
        reasons.append(
            f"model.heads={model.heads} is not a multiple of parallel.tensor={parallel.tensor}, and a head "
            f"lives on one rank; {_use('parallel.tensor', _divisors(model.heads))}"
        )
    elif model.heads % split:
        reasons.append(
            f"model.heads={model.heads} is not a multiple of parallel.tensor * parallel.sequence="
            f"{parallel.tensor} * {parallel.sequence}={split}; "
            f"{_use('parallel.sequence', _divisors(model.heads // parallel.tensor))}"
        )
    sizes = {"model.ffn_dim": model.ffn_dim, "model.vocab_size": model.vocab_size, **classes}
    for name, size in sizes.items():
        if (size if name == "model.ffn_dim" else padded(size)) % parallel.tensor:
            multiple = parallel.tensor if name == "model.ffn_dim" else math.lcm(VOCABULARY_MULTIPLE, parallel.tensor)
            above = -(-size // multiple) * multiple
            reasons.append(
                f"{name}={size} is not a multiple of parallel.tensor={parallel.tensor}; "
                f"set {name}={above}" + (" (the added ids are never used)" if name != "model.ffn_dim" else "")
            )
    return reasons


def _pipe_stages(parallel: Parallel, model: ModelSizes) -> list[str]:
    if parallel.pipe <= model.depth:
        return []
    return [
        f"parallel.pipe={parallel.pipe} stages are more than the model's {model.depth} blocks, and each stage needs "
        f"one; use parallel.pipe={model.depth} or less"
    ]


def _zero(parallel: Parallel, config: Mapping[str, Any]) -> list[str]:
    """ZeRO stages and offload that a pipeline rules out."""
    reasons: list[str] = []
    stage = zero_stage(dict(config))
    if parallel.pipe == 1:
        return reasons
    if stage in (2, 3):
        reasons.append(
            f"parallel.pipe={parallel.pipe} does not go with zero_optimization.stage={stage}: DeepSpeed splits "
            "gradients and parameters over data ranks only without a pipeline; use ds_configs/zero1.json or "
            "zero1_bf16.json, or parallel.pipe=1"
        )
    if stage == 0:
        # It counts weights that two stages share twice in the norm (measured: off by 1.3e-4 with tied weights).
        reasons.append(
            f"parallel.pipe={parallel.pipe} with zero_optimization.stage=0 clips by a wrong gradient norm; "
            "use ds_configs/zero1.json or zero1_bf16.json"
        )
    for knob in ("offload_param", "offload_optimizer"):
        device = config.get("zero_optimization", {}).get(knob, {}).get("device", "none")
        if device != "none":
            reasons.append(
                f"parallel.pipe={parallel.pipe} does not go with zero_optimization.{knob}.device={device}: a pipeline "
                "keeps its stage on the GPU; remove it from the JSON, or set parallel.pipe=1"
            )
    return reasons


def _compiled(config: Mapping[str, Any]) -> list[str]:
    if deepcompiles(config):
        return [
            "compile=true in the recipe and compile.deepcompile=true in the JSON would both compile the blocks; set "
            "compile=false, or remove compile from the JSON"
        ]
    if zero_stage(dict(config)) < 3:
        return []
    # Measured with three blocks: the numbers are right, but there are 98 graphs instead of 2, and torch gives up at its
    # limit of recompilations.
    return [
        "compile=true does not go with zero_optimization.stage=3, whose hooks at every layer cut a block into small "
        "pieces that gain nothing; use ds_configs/zero2.json or zero2_bf16.json, or set compile=false"
    ]


def _json(parallel: Parallel, config: Mapping[str, Any], world: int, node: int | None) -> list[str]:
    """Keys of the JSON that do not go with the run's sizes."""
    reasons, zero = [], config.get("zero_optimization", {})
    if "pipeline" in config and parallel.pipe == 1:
        reasons.append(
            "the JSON's section pipeline has no effect with parallel.pipe=1; remove it, or set parallel.pipe"
        )
    if deepcompiles(config) and parallel.model > 1:
        name, size = next((name, size) for name, size in vars(parallel).items() if size > 1)
        reasons.append(
            f"compile.deepcompile=true does not go with parallel.{name}={size}; remove it from the JSON or set "
            f"parallel.{name}=1"
        )
    group = zero.get("zero_hpz_partition_size", 1)
    return reasons if group <= 1 else [*reasons, *_second_copy(parallel, zero.get("stage", 0), group, world, node)]


def _second_copy(parallel: Parallel, stage: int, group: int, world: int, node: int | None) -> list[str]:
    """What is wrong with hpZ (ZeRO++, arXiv 2306.10209), by which each `group` of consecutive ranks holds a second copy
    of the parameters."""
    name, reasons = f"zero_optimization.zero_hpz_partition_size={group}", []
    if stage != 3:
        reasons.append(f"{name} needs zero_optimization.stage=3, not {stage}; remove it from the JSON")
    if parallel.tensor > 1:
        # DeepSpeed's groups._create_zero_param_parallel_group counts the ranks of the world and knows no mpu.
        reasons.append(
            f"{name} would mix the slices of parallel.tensor={parallel.tensor} ranks, because DeepSpeed groups "
            "neighbouring ranks; remove it from the JSON or set parallel.tensor=1"
        )
    sizes = [size for size in _divisors(world) if size > 1 and (node is None or node % size == 0)]
    way_out = f"use {_or(sizes)}" if sizes else "remove it from the JSON"
    if node is not None and group > node:
        reasons.append(f"{name} is more than a node's {node} ranks, and its copy is for their fast links; {way_out}")
    elif world % group or (node is not None and node % group):
        whole = f"{world} ranks" if world % group else f"the {node} ranks of a node"
        reasons.append(f"{name} does not divide {whole}; {way_out}")
    return reasons


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _use(knob: str, sizes: list[int]) -> str:
    return f"use {knob}={_or(sizes)}"


def _or(sizes: list[int]) -> str:
    *rest, last = (str(size) for size in sizes)
    return f"{', '.join(rest)} or {last}" if rest else last
