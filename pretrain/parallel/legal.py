"""Why sizes, model, batch, JSON and world do not fit together: one sentence each, before any process group is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.parallel.ds_config import precision, zero_stage
from pretrain.parallel.sizes import Parallel

# What Megatron pads vocabularies to at least; tensor cores like multiples of 8 as well.
VOCABULARY_MULTIPLE = 8


class ModelSizes(NamedTuple):
    """The numbers of a model that its splitting depends on; 0 where a stage builds no such part."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    vocab_size: int = 0
    image_codes: int = 0


def check_legal(parallel: Parallel, **facts: Any) -> None:
    """Raises ValueError with the first of `problems`."""
    if found := problems(parallel, **facts):
        raise ValueError(found[0])


def problems(
    parallel: Parallel,
    *,
    world: int,
    config: Mapping[str, Any],
    counts: Mapping[str, int],
    accumulation: int = 1,
    model: ModelSizes | None = None,
    objectives: Sequence[str] = (),
    compiled: bool = False,
    node: int | None = None,
) -> list[str]:
    """Every reason against this run, each a sentence with the knob, its value and the way out; [] if there is none.

    `config` is the DeepSpeed JSON (as a file holds it, or completed), `counts` the sequences of each kind in one
    optimizer step over all ranks, `model` None for a stage that trains a visual tokenizer, `node` the ranks of a node
    where that is known, `objectives` their names, `compiled` the stage's `compile`.
    """
    found = _world(parallel, world)
    found += _tokenizer(parallel) if model is None else [*_splits(parallel, model), *_stages(parallel, model)]
    found += _zero(parallel, config, objectives)
    found += _json(parallel, config, world, node)
    found += _compiled(config, tokenizer=model is None) if compiled else []
    return found + ([] if _world(parallel, world) else _batch(counts, accumulation, world // parallel.model))


def _world(parallel: Parallel, world: int) -> list[str]:
    if world % parallel.model == 0:
        return []
    sizes = " * ".join(f"parallel.{name}" for name, size in vars(parallel).items() if size > 1)
    return [f"{world} ranks are not a multiple of {sizes}={parallel.model}; start {_near(world, parallel.model)} ranks"]


def _tokenizer(parallel: Parallel) -> list[str]:
    return [
        f"parallel.{name}={size} does not go with a tokenizer stage, which is split over data ranks only; "
        f"set parallel.{name}=1"
        for name, size in vars(parallel).items()
        if size > 1
    ]


def _splits(parallel: Parallel, model: ModelSizes) -> list[str]:
    """What the tensor and sequence ranks divide among them."""
    found, split = [], parallel.tensor * parallel.sequence
    if model.heads % parallel.tensor:
        found.append(
            f"model.heads={model.heads} is not a multiple of parallel.tensor={parallel.tensor}, and a head "
            f"lives on one rank; {_use('parallel.tensor', _divisors(model.heads))}"
        )
    elif model.heads % split:
        found.append(
            f"model.heads={model.heads} is not a multiple of parallel.tensor * parallel.sequence="
            f"{parallel.tensor} * {parallel.sequence}={split}; "
            f"{_use('parallel.sequence', _divisors(model.heads // parallel.tensor))}"
        )
    for name in ("ffn_dim", "vocab_size", "image_codes"):
        size = getattr(model, name)
        if size % parallel.tensor:
            multiple = parallel.tensor if name == "ffn_dim" else math.lcm(VOCABULARY_MULTIPLE, parallel.tensor)
            above = -(-size // multiple) * multiple
            found.append(
                f"model.{name}={size} is not a multiple of parallel.tensor={parallel.tensor}; "
                f"set model.{name}={above}" + (" (the added ids are never used)" if name != "ffn_dim" else "")
            )
    return found


def _stages(parallel: Parallel, model: ModelSizes) -> list[str]:
    if parallel.pipe <= model.depth:
        return []
    return [
        f"parallel.pipe={parallel.pipe} stages are more than the model's {model.depth} blocks, and each stage needs "
        f"one; use parallel.pipe={model.depth} or less"
    ]


def _zero(parallel: Parallel, config: Mapping[str, Any], objectives: Sequence[str]) -> list[str]:
    """What the ZeRO stage and the objectives rule out."""
    found, stage = [], zero_stage(dict(config))
    if stage == 0 and precision(dict(config)).itemsize < 4:
        found.append(
            "bf16.enabled=true with zero_optimization.stage=0 keeps no fp32 master weights and loses small updates; "
            "use ds_configs/zero1_bf16.json"
        )
    if parallel.pipe == 1:
        return found
    if stage in (2, 3):
        found.append(
            f"parallel.pipe={parallel.pipe} does not go with zero_optimization.stage={stage}: DeepSpeed splits "
            "gradients and parameters over data ranks only without a pipeline; use ds_configs/zero1.json or "
            "zero1_bf16.json, or parallel.pipe=1"
        )
    if stage == 0:
        # Measured (1.3e-4 with tied weights): it counts weights that two stages share twice in the norm.
        found.append(
            f"parallel.pipe={parallel.pipe} with zero_optimization.stage=0 clips by a wrong gradient norm; "
            "use ds_configs/zero1.json or zero1_bf16.json"
        )
    if "contrastive" in objectives:
        found.append(
            f"parallel.pipe={parallel.pipe} does not go with the objective contrastive, whose negatives are the whole "
            "step's batch and not one micro-step's; set parallel.pipe=1 and split by parallel.tensor or ZeRO-3"
        )
    for knob in ("offload_param", "offload_optimizer"):
        device = config.get("zero_optimization", {}).get(knob, {}).get("device", "none")
        if device != "none":
            found.append(
                f"parallel.pipe={parallel.pipe} does not go with zero_optimization.{knob}.device={device}: a pipeline "
                "keeps its stage on the GPU; remove it from the JSON, or set parallel.pipe=1"
            )
    return found


def _compiled(config: Mapping[str, Any], *, tokenizer: bool) -> list[str]:
    if tokenizer:
        return ["compile=true has no blocks to compile in a tokenizer stage; set compile=false"]
    if zero_stage(dict(config)) < 3:
        return []
    # Measured with three blocks: the same numbers, but 98 pieces and not 2, and torch stops at its limit of them.
    return [
        "compile=true does not go with zero_optimization.stage=3, whose hooks at every layer cut a block into small "
        "pieces that gain nothing; use ds_configs/zero2.json or zero2_bf16.json, or set compile=false"
    ]


def _json(parallel: Parallel, config: Mapping[str, Any], world: int, node: int | None) -> list[str]:
    """Keys of the JSON that other sizes of the run contradict."""
    found, zero = [], config.get("zero_optimization", {})
    if "pipeline" in config and parallel.pipe == 1:
        found.append(
            "the JSON's section pipeline has nothing to say with parallel.pipe=1; remove it, or set parallel.pipe"
        )
    if config.get("compile", {}).get("deepcompile") and parallel.model > 1:
        name, size = next((name, size) for name, size in vars(parallel).items() if size > 1)
        found.append(
            f"compile.deepcompile=true does not go with parallel.{name}={size}; remove it from the JSON or set "
            f"parallel.{name}=1"
        )
    group = zero.get("zero_hpz_partition_size", 1)
    return found if group <= 1 else [*found, *_second_copy(parallel, zero.get("stage", 0), group, world, node)]


def _second_copy(parallel: Parallel, stage: int, group: int, world: int, node: int | None) -> list[str]:
    """hpZ (ZeRO++, arXiv 2306.10209): consecutive ranks of the world hold a second copy of the parameters."""
    name, found = f"zero_optimization.zero_hpz_partition_size={group}", []
    if stage != 3:
        found.append(f"{name} needs zero_optimization.stage=3, not {stage}; remove it from the JSON")
    if parallel.tensor > 1:
        # DeepSpeed's groups._create_zero_param_parallel_group counts the ranks of the world and knows no mpu.
        found.append(
            f"{name} would mix the slices of parallel.tensor={parallel.tensor} ranks, because DeepSpeed groups "
            "neighbouring ranks; remove it from the JSON or set parallel.tensor=1"
        )
    sizes = [size for size in _divisors(world) if size > 1 and (node is None or node % size == 0)]
    way_out = f"use {_or(sizes)}" if sizes else "remove it from the JSON"
    if node is not None and group > node:
        found.append(f"{name} is more than the {node} ranks of a node, and its copy is for their fast links; {way_out}")
    elif world % group or (node is not None and node % group):
        whole = f"{world} ranks" if world % group else f"the {node} ranks of a node"
        found.append(f"{name} does not divide {whole}; {way_out}")
    return found


def _batch(counts: Mapping[str, int], accumulation: int, data: int) -> list[str]:
    parts = data * accumulation
    return [
        f"batch.{kind}={count} is not a multiple of data ranks * batch.accumulation={data} * {accumulation}={parts}; "
        f"use batch.{kind}={_near(count, parts)}"
        for kind, count in counts.items()
        if count % parts
    ]


def _near(count: int, multiple: int) -> str:
    """The multiples around `count`: "12 or 16", or the one above where there is none below."""
    below = count // multiple * multiple
    return _or([size for size in (below, below + multiple) if size])


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _use(knob: str, sizes: list[int]) -> str:
    return f"use {knob}={_or(sizes)}"


def _or(sizes: list[int]) -> str:
    *rest, last = (str(size) for size in sizes)
    return f"{', '.join(rest)} or {last}" if rest else last
