"""The process group, DeepSpeed's engine, and parameters that ZeRO-3 splits as they are made. With pipeline.py and
state.py one of the files that use deepspeed."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import device, rank, world_size
from pretrain.parallel.compile_once import one_compiles
from pretrain.parallel.ds_config import deepcompiles, offloads, precision, zero_stage
from pretrain.parallel.launcher import adopt_launcher
from pretrain.parallel.meeting import limit_s, meet
from pretrain.parallel.skipping import skip_on_device
from pretrain.parallel.state import zero3_part
from pretrain.parallel.unfreezing import rates

log = logging.getLogger(__name__)


def init_distributed(timeout_s: float = 1800.0) -> None:
    """Joins the process group that torchrun, deepspeed or srun describes (NCCL on GPUs, gloo elsewhere). A process
    alone makes a group of one, which opens no port. Collectives fail after `timeout_s`. Raises TimeoutError if another
    rank does not come (meeting.py), or if the group does not form."""
    adopt_launcher()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        _take_device()
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        try:
            if alone:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                bind = {"device_id": device()} if backend == "nccl" else {}
                place = {"rank": rank(), "world_size": world_size()}
                store = meet(rank(), world_size(), min(limit_s(), timeout_s))
                store.set_timeout(timeout)
                store = dist.PrefixStore("group", store)
                dist.init_process_group(backend, store=store, timeout=timeout, **place, **bind)
        except (dist.DistError, ValueError) as error:
            raise TimeoutError(
                f"rank {rank()} of {world_size()}: the process group did not form within {timeout_s:.0f} s "
                f"({str(error).splitlines()[0]}); see that all ranks started and reach "
                f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
            ) from error
    os.environ.setdefault("LOCAL_RANK", "0")
    _deepspeed().init_distributed(backend, verbose=False)


def _take_device() -> None:
    """Selects this rank's GPU, also for DeepSpeed, which takes the GPU with the number LOCAL_RANK. Where a launcher
    shows each rank only its own GPU (srun --gpus-per-task=1, --gpu-bind=single:1), that must be 0 on every rank."""
    own = device()
    torch.cuda.set_device(own)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name == "LOCAL_RANK" or name in os.environ:  # DeepSpeed requires mpirun's to be the same
            os.environ[name] = str(own.index)


def build_engine(
    task: nn.Module, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], config: dict[str, Any], mpu=None
):
    """DeepSpeed's engine around `task`, on this rank's device.

    `factor(steps done)` times a group's lr is the rate of the next step; `config` is load_ds_config's. Weights must be
    loaded into `task` before this call. Every `engine.backward(loss)` is followed by `engine.step()`; every
    `gradient_accumulation_steps` of them the optimizer moves, and losses are averaged over those and over the ranks. A
    step whose gradients are not finite moves nothing; see skipping.py.
    """
    scalars = [name for name, value in task.named_parameters() if value.ndim == 0]
    assert not scalars, f"DeepSpeed cannot broadcast 0-d parameters; give {scalars} the shape (1,)"
    init_distributed()
    factors = rates(optimizer.param_groups, factor)
    if offloads(config) and torch.cuda.is_available():
        optimizer = _host_adam(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    exact = _exact_weights(task) if precision(config) != torch.float32 else {}
    engine, _, _, _ = _deepspeed().initialize(
        model=task, optimizer=optimizer, lr_scheduler=schedule, config=config, mpu=mpu, dist_init_required=False
    )
    if zero_stage(config) == 0:
        engine.clip_fp32_gradients = lambda: _clip(engine)
    skip_on_device(engine)
    _restore_masters(engine, exact)
    if deepcompiles(config):
        engine.compile()
    return engine


def check_deepcompile(config: dict[str, Any]) -> None:
    """Raises ValueError if the JSON asks for DeepCompile and this machine, or its DeepSpeed, lacks it: DeepSpeed itself
    would end with a traceback, or go on without it. Builds its extension, which takes a minute at first use."""
    if not deepcompiles(config):
        return
    asked, way_out = "compile.deepcompile=true in the JSON", "remove compile from the JSON"
    if not torch.cuda.is_available():
        raise ValueError(f"{asked} needs a GPU, and there is none here; {way_out}")
    version = _deepspeed().__version__
    try:
        builder = importlib.import_module("deepspeed.ops.op_builder.dc").DeepCompileBuilder()
    except (ImportError, AttributeError):
        raise ValueError(f"{asked}: deepspeed {version} has no DeepCompile; {way_out}") from None
    try:
        with one_compiles("dc"):
            builder.load()
    except Exception as error:  # a compiler, or the lack of one, may raise anything
        reason = f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
        raise ValueError(
            f"{asked}: deepspeed {version} could not build its extension, which takes ninja, a C++ compiler and CUDA's "
            f"headers ({reason}); install them, or {way_out}"
        ) from error


def _exact_weights(task: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable weights, on the host, before they are rounded to bf16. Of a parameter that zero.Init has
    split, this rank's part is copied, and then rounded here, since DeepSpeed takes such parts as they are."""
    exact = {}
    for name, value in task.named_parameters():
        own: Any = getattr(value, "ds_tensor", value)
        if value.requires_grad and own.numel():
            exact[name] = own.detach().to("cpu", torch.float32, copy=True)
        if hasattr(value, "ds_tensor"):
            own.data, value.data = own.data.bfloat16(), value.data.bfloat16()
    return exact


def _restore_masters(engine, exact: dict[str, Tensor]) -> None:
    """Sets DeepSpeed's fp32 master weights to the `exact` ones. DeepSpeed makes them from weights that it has rounded
    to bf16, so that a stage would begin with less than the stage before handed over."""
    if not exact:
        return
    fragment = importlib.import_module("deepspeed.utils.tensor_fragment")
    with torch.no_grad():
        for name, value in engine.module.named_parameters():
            if name not in exact:
                continue
            weight = exact.pop(name).to(device())
            if not hasattr(value, "ds_id"):
                fragment.safe_set_full_fp32_param(value, weight)
                continue
            was_whole = weight.shape == value.ds_shape  # it was split by the engine, not by zero.Init
            fragment.safe_set_local_fp32_param(value, zero3_part(value, weight) if was_whole else weight)


def set_progress(engine, step: int) -> None:
    """Sets the engine's counters and learning rates to what they are after `step` optimizer steps."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.lr_scheduler.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no optimizer step came before
        engine.lr_scheduler.step()


@contextmanager
def partitioned_init(config: dict[str, Any], mpu=None) -> Iterator[None]:
    """Under ZeRO-3, each parameter that is made inside is split over the ranks at once, so that no rank ever holds the
    whole model; it is fp32 and has the numbers that one process would draw. Otherwise this does nothing."""
    if zero_stage(config) < 3:
        yield
        return
    init_distributed()
    # With its overrides DeepSpeed would draw in bf16, or on the GPU, and so draw other numbers.
    options: dict[str, Any] = {"tensor_overrides": []}
    if mpu is not None:  # by default it splits over the whole world
        options |= {"mpu": mpu, "data_parallel_group": mpu.get_data_parallel_group()}
    with _deepspeed().zero.Init(config_dict_or_path=config, **options):
        yield


def preload() -> None:
    """Imports what the first engine of this process will need, which takes longer than the rest of a start; for a
    process that forks ranks. It touches no GPU."""
    _deepspeed()
    if not torch.version.cuda:
        # deepspeed.initialize imports torch's compiler, which would start a pool of processes.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextmanager
def whole_init() -> Iterator[None]:
    """Suspends `partitioned_init`: what is built inside is whole until the engine splits it; see Layers.whole."""
    zero = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()


def gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """See Layers.gathered: under ZeRO-3 each rank holds a part of every parameter."""
    parts = [value for value in parameters if hasattr(value, "ds_id")]
    return _deepspeed().zero.GatheredParameters(parts) if parts else nullcontext()


def _deepspeed():
    """The package, imported quietly and without a compiler run."""
    if not torch.cuda.is_available():
        # So that DeepSpeed neither guesses nor warns that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed = importlib.import_module("deepspeed")
    # By its module name: `deepspeed.comm.torch` as an attribute is torch itself.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    # A C++ shared-memory all-reduce that only inference calls; building it takes 20 to 50 s of the first start, and a
    # killed rank leaves 69 MB of it in /dev/shm.
    comm.build_shm_op = lambda: None
    # `initialize` imports DeepSpeed's Muon, which nothing here uses and which compiles a function when it is imported.
    # That would import torch's compiler, a second of every start.
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compiler.compile = lambda: compiler.dummy_decorator
    logger = logging.getLogger("DeepSpeed")
    if logger.handlers:  # it writes to stdout by a handler of its own; let the run's logging have it
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    return deepspeed


def _clip(engine) -> None:
    """DeepSpeed's own clipping without ZeRO, but it stores the norm, which DeepSpeed discards."""
    clip = importlib.import_module("deepspeed.runtime.utils").clip_grad_norm_
    engine._global_grad_norm = clip(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)


def _host_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's vectorised AdamW for parameters that live on the host; it is compiled at first use (100 s)."""
    adam = importlib.import_module("deepspeed.ops.adam")
    names = ("params", "lr", "weight_decay")
    groups = [{name: group[name] for name in names} for group in optimizer.param_groups]
    first = optimizer.param_groups[0]
    with one_compiles("cpu_adam"):
        return adam.DeepSpeedCPUAdam(groups, lr=first["lr"], betas=first["betas"], eps=first["eps"], adamw_mode=True)
