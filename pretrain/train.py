"""One stage of pretraining, top to bottom. Also the same line under torchrun, `deepspeed --module` and srun.

python -m pretrain.train --recipe tiny --stage vision --ds ds_configs/zero1.json --run-dir runs/tiny
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from pretrain.batch import Batch, Layout
from pretrain.checkpoint.save import newest, resume, save, together
from pretrain.checkpoint.weights import WEIGHTS, carry_over, write_weights
from pretrain.config import Recipe, Stage, load_recipe, stage_hash
from pretrain.data.loader import Loader
from pretrain.distributed import any_rank, device, rank, reduce_mean, world_size
from pretrain.metrics import MetricsLog, Throughput, flops_per_batch
from pretrain.models.multiway.compiled import compile_blocks
from pretrain.optim import build_optimizer, learning_rate, schedule
from pretrain.parallel.ds_config import precision_name
from pretrain.parallel.engine import adopt_slurm, build_engine, gradient_norm, init_distributed, partitioned_init
from pretrain.parallel.faults import LOST, Watch, leave
from pretrain.parallel.mesh import Mesh, create_mesh, mpu_of, place_of
from pretrain.parallel.pipeline import build_pipeline_engine, pipeline_step
from pretrain.parallel.share_batches import share_batches
from pretrain.parallel.state import full_state
from pretrain.parallel.tensor import parallel_layers
from pretrain.run.build import (
    build_loader,
    build_part,
    build_task,
    check_task,
    frozen_names,
    load_start,
    stage_ds_config,
    weights_config,
)
from pretrain.run.directory import check_same_settings, finished, inputs_digest, note_recipe
from pretrain.run.image_targets import image_targets

log = logging.getLogger("pretrain")

# EX_TEMPFAIL of sysexits.h: stopped by a signal with everything saved; a launcher may start the same line again.
STOPPED = 75
PLAIN_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """-> 0 finished, 1 a bug (its traceback), 2 a user's mistake (one sentence on stderr), 69 another rank or a data
    worker died or did not answer within timeout_s (one sentence), 75 stopped by a signal after saving, 130 Ctrl-C."""
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    watch = Watch()
    try:
        adopt_slurm()  # before anyone asks for the rank
        log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
        return leave(run(args, watch))
    except (ValueError, OSError) as error:
        if rank() == 0 or world_size() == 1:
            log.error("error: %s", error)
        else:
            log.error("error on rank %d: %s", rank(), error)
        return leave(LOST if isinstance(error, TimeoutError) else 2)
    except KeyboardInterrupt:
        log.info("stopped; what was saved is kept, the same line goes on from there")
        return leave(130)
    except Exception as error:
        told = watch.explain(error)
        if told is None and world_size() == 1:
            raise
        log.error(told or f"bug on rank {rank()}", exc_info=told is None)
        return leave(LOST if told else 1)
    finally:
        watch.stop()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.train",
        description="Run one stage of a recipe; a second call resumes it, or finishes at once.",
        epilog="example: python -m pretrain.train --recipe tiny --stage vision --ds ds_configs/zero1.json "
        "--run-dir runs/tiny --set optim.lr=1e-3 --set steps=100",
    )
    parser.add_argument("--recipe", required=True, help="a name in pretrain/recipes, or a .py file with RECIPE = ...")
    parser.add_argument("--stage", required=True, help="a stage of the recipe, such as vision")
    parser.add_argument("--ds", required=True, help="a DeepSpeed JSON: ZeRO stage, offload, precision, communication")
    parser.add_argument("--run-dir", required=True, type=Path, help="everything is written to RUN_DIR/STAGE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args(argv)


def run(args: argparse.Namespace, watch: Watch) -> int:
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    place = place_of(stage.parallel, rank(), world_size())
    ds_config = stage_ds_config(args.ds, recipe, stage)
    directory = args.run_dir / args.stage
    check_same_settings(directory, recipe, stage)
    if finished(directory, recipe, stage):
        log.info("%s: finished before; nothing to do", args.stage)
        return 0
    stop = StopSignals()
    loader = build_loader(recipe, stage, directory, place)
    check_task(recipe, stage)
    identity: dict[str, Any] = {
        "recipe_hash": stage_hash(recipe, stage),
        "data_digest": inputs_digest(recipe, stage, args.run_dir, loader.digests),
    }
    add_targets = image_targets(recipe, stage, args.run_dir, device())
    # From here on the ranks talk: what a user can get wrong has been said.
    watch.start(recipe.timeout_s)
    init_distributed(watch.outlast_s)
    mesh = create_mesh(stage.parallel, watch.outlast_s)
    found = newest(directory / "checkpoints", precision=precision_name(ds_config), **identity)
    layers = parallel_layers(mesh)
    task: Any = (
        build_part(recipe, stage, mesh, layers, loader.layout)
        if mesh.pipe.size > 1
        else build_task(recipe, stage, args.run_dir, layers, partitioned_init(ds_config, mpu_of(mesh)))
    )
    begun = load_start(task, stage, args.run_dir, found, mesh)
    if stage.compile:
        compile_blocks(task.encoder)
    make_optimizer = partial(build_optimizer, optim=stage.optim)
    if stage.tokenizer is None:
        depth = recipe.model.depth
        make_optimizer = partial(make_optimizer, layer_of=layer_of(depth), top=depth + 1)
    factor = schedule(stage.optim, stage.steps)
    engine = (
        build_pipeline_engine(task, stage.parallel, make_optimizer, factor, ds_config)
        if mesh.pipe.size > 1
        else build_engine(task, make_optimizer(task), factor, ds_config, mpu_of(mesh))
    )
    if found:
        resume(engine, found, mesh)
    command = {"recipe": _findable(args.recipe), "set": args.set, "ds": ds_config, "world": world_size()}
    together(lambda: note_recipe(directory, recipe, stage, command) if rank() == 0 else None)
    start = found.step if found else 0
    watch.outlast_all()
    done = train(engine, loader, add_targets, Run(recipe, stage, directory, identity, mesh), start, stop, watch)
    if done < stage.steps:
        log.info("%s: stopped by a signal and saved at step %d; start the same line again", args.stage, done)
        return STOPPED
    hand_over(engine, mesh, begun.init, directory / WEIGHTS, recipe, stage)
    log.info("%s: finished at step %d; wrote %s", args.stage, done, directory / WEIGHTS)
    return 0


def hand_over(engine, mesh: Mesh, init_file: Path | None, path: Path, recipe: Recipe, stage: Stage) -> None:
    """Write the whole model for the next stage: what was trained, and untouched what was frozen or not built."""
    state, config = full_state(engine, mesh), weights_config(recipe, stage, path.parent.name)
    frozen = frozen_names(recipe, stage)
    together(lambda: write_weights(carry_over(state, init_file, frozen), path, config) if rank() == 0 else None)


class Run(NamedTuple):
    """What a run is: `identity` names its settings and inputs, for checkpoints."""

    recipe: Recipe
    stage: Stage
    directory: Path
    identity: dict[str, Any]
    mesh: Mesh


def train(
    engine,
    loader: Loader,
    add_targets: Callable[[Batch], Batch],
    run: Run,
    start: int,
    stop: StopSignals,
    watch: Watch,
) -> int:
    """Steps start + 1 to stage.steps; returns the last one done, an earlier one only after SIGTERM or SIGUSR1.

    Raises ValueError when the loss is no number any more, before it could reach a checkpoint; OSError on every rank
    when one of them cannot write.
    """
    recipe, stage, directory, identity, mesh = run
    logs: list[MetricsLog] = []
    together(lambda: logs.append(MetricsLog(directory, resume_step=start)))
    meter = Throughput(device(), mesh.data.size)
    batches = share_batches(partial(loader.batches, start, stage.steps), mesh, watch)
    display = Display(directory.name, start, stage.steps)
    step = start
    for step in range(start + 1, stage.steps + 1):
        # The first one compiles, and fills caches.
        watch.enter(f"the reading of step {step}", patient=step == start + 1)
        waited = time.perf_counter()
        micro_batches = next(batches)
        meter.wait(time.perf_counter() - waited)
        watch.enter(f"step {step}", patient=step == start + 1)
        if mesh.pipe.size > 1:
            report = pipeline_step(engine, micro_batches, add_targets)
        else:
            report = train_step(engine, micro_batches, add_targets, first=step == 1)
        meter.tick(
            samples=stage.batch.total,
            tokens=loader.layout.rows * stage.batch.accumulation,
            flops=layout_flops(recipe, stage, loader.layout) * stage.batch.accumulation / stage.parallel.model,
        )
        stopping = any_rank(stop.asked, device())
        saving = step % recipe.save_every == 0 or step == stage.steps or stopping
        if step % recipe.log_every == 0 or saving:
            line: dict = reduce_mean(report) | {"lr": learning_rate(stage.optim, step, stage.steps)}
            line |= {"grad_norm": gradient_norm(engine), "samples_seen": step * stage.batch.total}
            check_finite(step, line, directory)
            if step % recipe.log_every == 0 or step == stage.steps:
                line |= meter.read()
                together(partial(logs[0].write, step, line))
                display.show(step, line)
        display.bar.update()
        if saving:
            watch.enter(f"the save of step {step}", patient=True)
            weights = full_state(engine, mesh), weights_config(recipe, stage, directory.name)
            save(engine, directory / "checkpoints", step, weights=weights, mesh=mesh, keep=recipe.keep, **identity)
            meter.skip()
        if stopping:
            break
    watch.enter("the end", patient=True)
    display.bar.close()
    logs[0].close()
    return step


def check_finite(step: int, line: dict[str, float], directory: Path) -> None:
    """Every rank has the same numbers, so all of them end here together."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(line[name]):
            raise ValueError(
                f"step {step}: the {name} is {line[name]}, the run has diverged; its checkpoints in "
                f"{directory / 'checkpoints'} are from before: use a lower optim.lr or a longer optim.warmup_steps"
            )


def train_step(
    engine, micro_batches: list[Batch], add_targets: Callable[[Batch], Batch], *, first: bool = False
) -> dict[str, Tensor]:
    """One optimizer step; returns this rank's mean of what the task reported. A benchmark calls this very function."""
    if first:
        engine.module.before_training(micro_batches)
    total: dict[str, Tensor] = {}
    for batch in micro_batches:
        report = engine(add_targets(batch))
        engine.backward(report["loss"])
        engine.step()  # moves the weights after the last micro-step
        for name, value in report.items():
            total[name] = total.get(name, 0) + value.detach() / len(micro_batches)
    engine.module.after_step()
    return total


class StopSignals:
    """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) ask for a stop at the next step boundary."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


def layer_of(depth: int) -> Callable[[str], int]:
    """For layer decay: 0 the embeddings, 1 .. depth the blocks, depth + 1 the final norm and the heads."""

    def of(name: str) -> int:
        if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
            return int(block[1]) + 1
        return 0 if name.startswith(("encoder.vision_embed.", "encoder.text_embed.")) else depth + 1

    return of


def layout_flops(recipe: Recipe, stage: Stage, layout: Layout) -> float:
    """Model FLOPs of one micro-batch on this rank; for the tokenizer those of its encoder and decoder."""
    if stage.tokenizer is not None:
        size = stage.tokenizer
        depth, inputs = size.depth + size.decoder_depth, 3 * size.patch_size**2
        return flops_per_batch(layout, dim=size.dim, depth=depth, ffn_dim=4 * size.dim, patch_inputs=inputs)
    model = recipe.model
    heads = [rows for objective in stage.objectives for rows in objective.head_rows(layout, model)]
    return flops_per_batch(
        layout,
        dim=model.dim,
        depth=model.depth,
        ffn_dim=model.ffn_dim,
        patch_inputs=3 * model.patch_size**2,
        heads=heads,
    )


def _findable(recipe: str) -> str:
    """A recipe's file by its full path, so that an evaluation finds it from anywhere; a name as it is."""
    return str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe


class Display:
    """The numbers one watches: a bar where there is a terminal, elsewhere a plain line every few seconds."""

    def __init__(self, name: str, start: int, steps: int):
        self.steps, self.shown = steps, 0.0
        quiet = rank() != 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=quiet)

    def show(self, step: int, line: dict) -> None:
        accuracy = " ".join(f"{k.removeprefix('accuracy/')} {v:.1%}" for k, v in line.items() if k[:9] == "accuracy/")
        text = f"loss {line['loss']:.4f} {accuracy} {line['samples_per_s']:.0f}/s wait {line['data_wait']:.0%}"
        self.bar.set_postfix_str(text)
        if self.bar.disable and (step == self.steps or time.monotonic() - self.shown > PLAIN_SECONDS):
            log.info("step %d/%d %s", step, self.steps, text)
            self.shown = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
