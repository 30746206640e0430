"""The DeepSpeed JSON: read, checked, and completed with the keys that the recipe owns. Does not import deepspeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pretrain.json_files import parse_json, read_bytes
from pretrain.settings import nearest

# Keys that the JSON owns, and (for its sections) what may stand in them. ds_configs/README.md explains them.
OFFLOAD = {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read"} | {
    "pipeline_write",
    "fast_init",
    "ratio",
}
ZERO = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "offload_param"),
    *("offload_optimizer", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *("round_robin_gradients", "log_trace_cache_warnings", "ignore_unused_parameters", "leaf_module"),
}
SECTIONS: dict[str, set[str] | None] = {
    "zero_optimization": ZERO,
    "bf16": {"enabled", "immediate_grad_update"},
    "data_types": {"grad_accum_dtype", "buffer_dtype"},
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "comms_logger": None,
    "flops_profiler": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "aio": None,
    "pipeline": {"pipe_partitioned", "grad_partitioned", "use_reentrant"},
    "timers": None,
    "compile": {"deepcompile"},
}
# DeepSpeed's keys that must not stand in the JSON, and what to use instead.
OWNED_ELSEWHERE = {
    "train_batch_size": "the recipe's batch (images, pairs, texts, dual) owns it",
    "train_micro_batch_size_per_gpu": "the recipe's batch and batch.accumulation own it",
    "gradient_accumulation_steps": "the recipe's batch.accumulation owns it",
    "gradient_clipping": "the recipe's optim.clip owns it",
    "optimizer": "the recipe's optim owns it",
    "scheduler": "the recipe's optim.schedule, optim.warmup_steps and optim.min_lr own it",
    "steps_per_print": "the recipe's log_every owns it",
    "activation_checkpointing": "the recipe's activation_checkpointing owns it",
    "zero_allow_untested_optimizer": "it is derived",
    "zero_force_ds_cpu_optimizer": "it is derived",
    "seed": "the recipe's seed owns it",
    "tensorboard": "every run writes tensorboard/ beside its metrics.jsonl",
    "csv_monitor": "every run writes metrics.jsonl",
    "wandb": "every run writes metrics.jsonl",
    "tensor_parallel": "the recipe's parallel sizes own it",
    "mics_shard_size": "deepspeed 0.19 has no MiCS; use zero_optimization.zero_hpz_partition_size",
    "sequence_parallel_size": "the recipe's parallel sizes own it",
    "curriculum_learning": "the recipe's stages own it",
    "data_efficiency": "the recipe's mix owns it",
    "elasticity": "the recipe's batch owns it, and it is the same on any number of ranks",
    "amp": 'use {"bf16": {"enabled": true}}',
    "torch_autocast": 'use {"bf16": {"enabled": true}}',
}

# The same for keys inside a section.
OWNED_INSIDE = {
    ("bf16", "check_grad_overflow"): "it is derived, and the recipe's max_skipped_steps says what may be skipped",
    ("pipeline", "stages"): "the recipe's parallel.pipe owns it",
    ("pipeline", "partition"): "the stages are cut by FLOPs",
    ("pipeline", "seed_layers"): "the recipe's seed owns it",
    ("pipeline", "activation_checkpoint_interval"): "the recipe's activation_checkpointing owns it",
}

# Switched off unless the JSON asks for them: DeepSpeed's defaults would cost time in each step. Its throughput timer
# waits for the device twice a micro-step, and pretrain/metrics.py measures the same.
PINNED = {"timers": {"throughput": {"enabled": False}}, "wall_clock_breakdown": False, "memory_breakdown": False}


def load_ds_config(
    path: str | Path, *, micro: int, accumulation: int, world: int, clip: float, **derived: Any
) -> dict[str, Any]:
    """The JSON at `path`, completed with the batch (`micro` sequences in a rank's micro-step, `accumulation`
    micro-steps, `world` data ranks), `clip` and any other `derived` keys, as deepspeed.initialize takes it.

    Raises ValueError that names the file, the key and the way out for: a missing or broken file, an unknown key, a key
    that the recipe owns, fp16, bf16 without ZeRO, and offload that its ZeRO stage does not have.
    """
    config = _read(Path(path))
    for key in config:
        if key in OWNED_ELSEWHERE:
            raise ValueError(f"{path}: {key} must not stand here: {OWNED_ELSEWHERE[key]}; remove it from the JSON")
        if key != "fp16":
            _known(path, key, list(SECTIONS))
        if (inside := SECTIONS.get(key)) is not None:
            _section(path, key, config[key], inside)
    _check_zero(path, config)
    _check_precision(path, config)
    _check_deepcompile(path, config)
    config.pop("fp16", None)
    return (
        PINNED
        | config
        | _bf16(config)
        | {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro * accumulation * world,
            # ZeRO-0 computes the norm, which metrics.jsonl holds, only if it clips: without clipping, at a bound that
            # no norm reaches.
            "gradient_clipping": clip if clip > 0 else 1e30,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            # torch's AdamW is correct under offload too; engine.build_engine uses DeepSpeed's where that is faster.
            "zero_force_ds_cpu_optimizer": False,
        }
        | derived
    )


def _bf16(config: dict[str, Any]) -> dict[str, Any]:
    """The section `bf16` of a bf16 run; {} in fp32. DeepSpeed's check for gradients that are not finite makes more than
    half of a step's calls, waits for the device and stops the schedule; pretrain/parallel/skipping.py replaces
    it. It stays on under offload, where DeepSpeed's optimizer on the host waits for every gradient anyway."""
    if precision(config) == torch.float32:
        return {}
    return {"bf16": config["bf16"] | {"check_grad_overflow": offloads(config)}}


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3, that a DeepSpeed JSON asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> torch.dtype:
    """The parameters' dtype while training; the optimizer keeps fp32 masters."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled", False) else torch.float32


def precision_name(config: dict[str, Any]) -> str:
    """ "fp32" or "bf16", as checkpoints note it."""
    return "fp32" if precision(config) == torch.float32 else "bf16"


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer runs on the host."""
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def deepcompiles(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's DeepCompile (arXiv 2504.09983) compiles the whole task and puts the collectives into its
    graphs."""
    return bool(config.get("compile", {}).get("deepcompile", False))


def _read(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{twice[0]} stands there twice")
        return dict(pairs)

    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ValueError(f"--ds {path}: there is no such file; use one of {', '.join(beside) or 'ds_configs/*.json'}")
    data = read_bytes(path)
    try:
        config = parse_json(data, unique)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct it, or give a JSON such as ds_configs/zero1.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}; a DeepSpeed config is one {{...}} object")
    return config


def _known(path: str | Path, key: str, known: list[str], inside: str = "") -> None:
    """ValueError, with the nearest known key, for one that is not `known`."""
    if key not in known:
        raise ValueError(f"{path}: unknown key {inside}{key}{nearest(key, known)}")


def _section(path: str | Path, name: str, section: Any, known: set[str]) -> None:
    """ValueError for a section that is no object, and for a key that is unknown or belongs to the recipe."""
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name}={json.dumps(section)} must be an object {{...}}")
    for key, value in section.items():
        if key in OWNED_ELSEWHERE or (name, key) in OWNED_INSIDE:
            reason = OWNED_INSIDE.get((name, key)) or OWNED_ELSEWHERE[key]
            raise ValueError(f"{path}: {name}.{key} must not stand here: {reason}; remove it from the JSON")
        _known(path, key, sorted(known), f"{name}.")
        if key in ("offload_optimizer", "offload_param"):
            _section(path, f"{name}.{key}", value, OFFLOAD)


def _check_precision(path: str | Path, config: dict[str, Any]) -> None:
    if config.get("fp16", {"enabled": False}) != {"enabled": False}:
        # open_clip's larger runs diverged in fp16 half-way, and bf16 cured them (LAION's large-openclip report).
        raise ValueError(f"{path}: fp16 is not supported, it diverges on large models; use bf16 or leave fp32")
    enabled = config.get("bf16", {}).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError(f"{path}: bf16.enabled={json.dumps(enabled)} must be true or false")
    if enabled and zero_stage(config) == 0:
        raise ValueError(
            f"{path}: bf16 with zero_optimization.stage=0 keeps no fp32 master weights and loses small updates; "
            "set the stage to 1, 2 or 3, or bf16.enabled to false"
        )


def _check_deepcompile(path: str | Path, config: dict[str, Any]) -> None:
    asked = config.get("compile", {}).get("deepcompile", False)
    if not isinstance(asked, bool):
        raise ValueError(f"{path}: compile.deepcompile={json.dumps(asked)} must be true or false")
    if not asked:
        return
    if zero_stage(config) == 0:
        # DeepSpeed itself would only log this, and go on with torch's compiler.
        raise ValueError(
            f"{path}: compile.deepcompile=true needs zero_optimization.stage 1, 2 or 3, not 0; set one, or remove "
            "compile"
        )
    for key in ("offload_optimizer", "offload_param"):
        if config["zero_optimization"].get(key, {}).get("device", "none") != "none":
            raise ValueError(
                f"{path}: compile.deepcompile=true does not go with zero_optimization.{key}: its graphs move tensors "
                "to the host by a schedule of their own; remove one of the two"
            )


def _check_zero(path: str | Path, config: dict[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage={json.dumps(stage)} is wrong; use 0, 1, 2 or 3")
    if zero.get("round_robin_gradients"):
        # DeepSpeed's functions that read a parameter's master and moments assume the order without round robin.
        raise ValueError(f"{path}: zero_optimization.round_robin_gradients=true mixes up checkpoints; remove it")
    group = zero.get("zero_hpz_partition_size", 1)
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(
            f"{path}: zero_optimization.zero_hpz_partition_size={json.dumps(group)} is wrong; use 1 or more ranks, "
            "such as those of a node"
        )
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise ValueError(f"{path}: zero_optimization.{key}.device={json.dumps(device)}; use none, cpu or nvme")
        if device != "none" and stage < lowest:
            raise ValueError(f"{path}: zero_optimization.{key} needs stage {lowest} or above, not {stage}")
        if device == "nvme" and stage < 3:
            raise ValueError(f"{path}: zero_optimization.{key}.device=nvme needs stage 3, not {stage}; use cpu")
