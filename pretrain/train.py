"""One stage of pretraining, top to bottom. The same command works under torchrun, `deepspeed --module` and srun.

python -m pretrain.train --recipe tiny --stage scratch --ds ds_configs/zero1.json --run-dir runs/tiny
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.batch import Batch
from pretrain.checkpoint.directory import Retention
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.weights import WEIGHTS
from pretrain.command import make_parser
from pretrain.config import Recipe, Stage
from pretrain.data.loader import Loader
from pretrain.data.order import batch_number
from pretrain.data.shards.transfer import Unreachable
from pretrain.distributed import device, fail_together, highest, rank, reduce_mean, world_size
from pretrain.interrupt import imported
from pretrain.lives import ThisLife
from pretrain.metrics import MetricsLog, Throughput, last_step
from pretrain.optim import learning_rate
from pretrain.parallel.faults import LOST, STOPPED, WAY_OUT, Watch, leave, place
from pretrain.parallel.launcher import adopt_launcher
from pretrain.parallel.share_batches import share_batches
from pretrain.parallel.skipping import gradient_norm, skipped_steps
from pretrain.recipes import load_recipe
from pretrain.rollbacks import passed_batches
from pretrain.run.build import Run, build_run, stage_ds_config
from pretrain.run.continuation import inputs_dir, start_identity
from pretrain.run.directory import finished, note_recipe
from pretrain.run.hand_over import hand_over
from pretrain.run.identity import as_begun
from pretrain.run.memory import memory_suffices
from pretrain.run.progress import Progress
from pretrain.run.record import Record
from pretrain.run.rollback import RolledBack, roll_back
from pretrain.run.signals import Stopped, StopSignals
from pretrain.run.step import Diverged, Judge, way_out
from pretrain.run.whole_recipe import check_other_stages
from pretrain.tasks.balance import with_shares
from pretrain.visible import start_logging
from pretrain.weights_and_biases import chosen_mode

log = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """-> the exit code: 0 finished; 1 a bug (with its traceback); 2 a user's mistake (one sentence on stderr); 69
    another rank or a data worker died or did not answer within timeout_s, or a store did not deliver its shards (one
    sentence), or the run rolls back; 75 stopped by a signal after saving (without saving if one of several ranks waits
    for its data); 130 Ctrl-C."""
    args = parse_args(argv)
    start_logging()
    try:
        adopt_launcher()  # before `rank()` is used
    except ValueError as error:
        log.error("error: %s", error)
        return 2
    imported()
    stop = StopSignals()
    watch = Watch(stop.seconds)
    try:
        log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
        return leave(run(args, stop, watch))
    except (TimeoutError, Unreachable) as error:
        log.error(str(error) if str(error).startswith("rank ") else f"{place()}: {error}; {WAY_OUT}")
        return leave(LOST)
    except (ValueError, OSError) as error:
        if rank() == 0 or world_size() == 1:
            log.error("error: %s", error)
        else:
            log.error("error on rank %d: %s", rank(), error)
        return leave(2)
    except Stopped:
        log.info("stopped by a signal before the first step; start the same line again")
        return leave(STOPPED)
    except RolledBack as back:
        log.warning("%s: %s; start the same line again", place(), back)
        return leave(LOST)  # for this code launchers start a run again in place; for a signal's they do not
    except KeyboardInterrupt:
        log.info("stopped; checkpoints are intact, start the same line again to go on from the newest")
        return leave(130)
    except Exception as error:
        sentence = watch.explain(error)
        if sentence is None and world_size() == 1:
            raise
        log.error(sentence or f"bug on rank {rank()}", exc_info=sentence is None)
        return leave(LOST if sentence else 1)
    finally:
        watch.stop()
        stop.restore()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "pretrain.train",
        "Runs one stage of a recipe; a second call resumes it, or finishes at once. launch/README.md: on several GPUs\n"
        "and nodes, what a run directory holds, what the exit codes mean. The example wants $DATA, such as\n"
        "runs/quickstart/corpus.",
        "--recipe tiny --stage scratch --ds ds_configs/zero1.json --run-dir runs/tiny --set steps=100",
    )
    parser.add_argument("--recipe", required=True, help="a name in pretrain/recipes, or a .py file with RECIPE = ...")
    parser.add_argument("--stage", required=True, help="a stage of the recipe, such as vision")
    parser.add_argument("--ds", required=True, help="a DeepSpeed JSON: ZeRO stage, offload, precision, communication")
    parser.add_argument("--run-dir", required=True, type=Path, help="everything is written to RUN_DIR/STAGE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="RUN_DIR/STAGE",
        help="begin at the last step of that run (or at its checkpoints/step_N), with more steps or another optim; "
        "see optim.schedule=constant and wsd",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args(argv)


def run(args: argparse.Namespace, stop: StopSignals, watch: Watch) -> int:
    chosen_mode()  # raises here, on every rank, for a wrong setting of Weights & Biases
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    directory = args.run_dir / args.stage
    identity = start_identity(directory, recipe, stage, args.continue_from)
    stage = as_begun(stage, identity)
    if finished(directory, identity):
        log.info("%s: finished before; nothing to do", args.stage)
        return 0
    stage_ds_config(args.ds, recipe, stage)  # so that this stage's mistakes are reported before other stages'
    check_other_stages(recipe, args.stage, args.run_dir, changed=bool(args.set))
    with memory_suffices(stage):
        done, ended = run_stage(args, recipe, stage, directory, identity, stop, watch)
    if not ended:
        log.info("%s: stopped by a signal and saved at step %d; start the same line again", args.stage, done)
        return STOPPED
    early = "" if done == stage.steps else f" of {stage.steps}, early"
    log.info("%s: finished at step %d%s; wrote %s", args.stage, done, early, directory / WEIGHTS)
    return 0


def run_stage(
    args: argparse.Namespace,
    recipe: Recipe,
    stage: Stage,
    directory: Path,
    identity: dict[str, Any],
    stop: StopSignals,
    watch: Watch,
) -> tuple[int, bool]:
    """Builds, trains and hands over -> the last step that was done, and whether the stage is finished. Raises
    RolledBack if the run diverges and the recipe lets it go back."""
    inputs = inputs_dir(args.run_dir, identity)
    run = build_run(recipe, stage, args.ds, inputs, watch, directory=directory, settings=identity)
    command = {"recipe": _findable(args.recipe), "set": args.set, "ds": run.ds_config, "world": world_size()}
    fail_together(lambda: note_recipe(directory, recipe, identity, command) if rank() == 0 else None)
    reached = last_step(directory)  # before the lines of steps that were not saved are cut off
    with run.lock or nullcontext(), fail_together(lambda: ThisLife(directory, run.done, reached)) as life:
        progress = Progress(run, inputs, directory)
        try:
            with _saver(run, directory, watch) as saver:
                done = train(run, directory, stop, watch, saver, progress)
        except Diverged as error:
            roll_back(directory, run.begun, recipe.rollback, run.rollbacks, error)
        if ended := done == stage.steps or progress.ended:
            hand_over(run, directory / WEIGHTS, progress)
            if run.copies is not None:
                run.copies.remove()
            life.reason = f"ended early, {progress.why}" if done < stage.steps else life.reason
        else:
            life.reason = "stopped by a signal, after saving"
    return done, ended


def train(run: Run, directory: Path, stop: StopSignals, watch: Watch, saver: Saver, progress: Progress) -> int:
    """Trains steps run.done + 1 to stage.steps -> the last step that was done, which is an earlier one after SIGTERM or
    SIGUSR1, or if `progress` ended the stage.

    Raises Diverged if the loss or the gradients are not finite, or spike (see run/step.Judge), before a checkpoint
    could hold their effect; OSError on every rank if one of them cannot write.
    """
    recipe, stage, start, step = run.recipe, run.stage, run.done, run.done
    stop.begin()
    record = Record(run, directory)
    batches = share_batches(partial(run.loader.batches, start, stage.steps), run.mesh, watch)
    judge = Judge(recipe.max_skipped_steps, recipe.rollback, way_out(recipe.rollback, directory), run.norms)
    progress.catch_up(record.metrics)
    saved = start
    for step in range(start + 1, 0 if progress.ended else stage.steps + 1):
        # The first step of a life compiles, and fills caches.
        watch.enter(f"the reading of step {step}", patient=step == start + 1)
        if (micro_batches := next_batches(batches, run.loader, record.meter, stop)) is None:
            watch.enter("the save after a signal", patient=True)
            step -= 1
            judge.settle()
            if step > saved and judge.calm:
                save_checkpoint(run, saver, step, record.metrics, progress)
                saved = step
            if (step := saved) == 0:
                raise Stopped
            break
        watch.enter(f"step {step}", patient=step == start + 1)
        with record.profile.step(step):
            report = run.step(micro_batches, first=step == 1)
        judge.note(step, gradient_norm(run.engine), report)
        real = sum(batch.real_rows() for batch in micro_batches)
        record.meter.tick(samples=stage.batch.total, tokens=run.rows, real=real, flops=run.flops(micro_batches))
        stopping, saves = highest([stop.asked, saver.state], device())
        saver.advance(saves)
        logging_step, last = step % recipe.log_every == 0, step == stage.steps
        saving, copying = step % recipe.save_every == 0 or stopping, recipe.copies_at(step)
        evaluating = progress.due(step) and not stopping  # after a stop, the next start evaluates
        if logging_step or saving or copying or last or evaluating:
            judge.settle()
            line = metrics_line(run, step, report, directory, skipped=judge.in_a_row > 0)
            if logging_step or last:
                record.write(step, line)
        record.display.bar.update()
        if evaluating and judge.calm:
            saving |= evaluate(progress, step, record, watch)
            last |= progress.ended
        # After a skipped step, state outside the optimizer (a codebook) may not be finite, so a later step is saved.
        if saving := (saving and judge.calm) or last:
            save_checkpoint(run, saver, step, record.metrics, progress)
            saved = step
            record.meter.skip()
        elif copying and judge.calm:
            saver.copy(step, *to_save(run, record.metrics, progress))
        if (stopping and saving) or progress.ended:
            break
    saver.finish()
    watch.enter("the end", patient=True)
    record.close()
    return step


def next_batches(
    batches: Iterator[list[Batch]], loader: Loader, meter: Throughput, stop: StopSignals
) -> list[Batch] | None:
    """This rank's micro-batches of a step; None if a signal came before they did. One of several ranks never returns
    None, since it must go on to the step's end with the others."""
    waited, read, decode = time.perf_counter(), loader.waited_read_s, loader.waited_decode_s
    try:
        with stop.at_once(world_size() == 1):
            micro_batches = next(batches)
    except Stopped:
        return None
    seconds = time.perf_counter() - waited
    meter.wait(seconds, loader.waited_read_s - read, loader.waited_decode_s - decode)
    return micro_batches


def metrics_line(run: Run, step: int, report: dict[str, Tensor], directory: Path, *, skipped: bool) -> dict[str, Any]:
    """The means over the ranks of the step's report, with learning rate, gradient norm, samples and the number of steps
    skipped so far. Raises Diverged if the loss of a step that was not `skipped` is not finite; every rank has the same
    numbers, so that all of them raise together."""
    stage = run.stage
    line: dict[str, Any] = with_shares(reduce_mean(report)) | {"lr": learning_rate(stage.optim, step, stage.steps)}
    line |= {"grad_norm": float(gradient_norm(run.engine)), "samples_seen": step * stage.batch.total}
    line["skipped_steps"] = skipped_steps(run.engine, step)
    if run.rollbacks:
        line["passed_batches"] = batch_number(step, passed_batches(run.rollbacks)) - step
    if not skipped and not math.isfinite(line["loss"]):
        raise Diverged(step, step, f"the loss is {line['loss']}", way_out(run.recipe.rollback, directory))
    return line


def evaluate(progress: Progress, step: int, record: Record, watch: Watch) -> bool:
    """Evaluates the model after `step` -> whether a checkpoint of it is to be saved."""
    watch.enter(f"the evaluation after step {step}", patient=True)
    wanted = progress.evaluate(step, record.metrics)
    record.meter.skip()
    return wanted


def _saver(run: Run, directory: Path, watch: Watch) -> Saver:
    background = run.recipe.save_in_background
    path, identity = directory / "checkpoints", run.identity
    return Saver(run.engine, path, watch, mesh=run.mesh, identity=identity, background=background, copies=run.copies)


def save_checkpoint(run: Run, saver: Saver, step: int, metrics: MetricsLog, progress: Progress) -> None:
    """Begins to save `step`, and decides which checkpoints stay."""
    best = frozenset() if progress.best is None else frozenset([progress.best])
    retention = Retention(run.recipe.keep, run.recipe.keep_every, best)
    config, first, extra = to_save(run, metrics, progress)
    saver.save(step, config, retention, first, extra)
    progress.check()


def to_save(run: Run, metrics: MetricsLog, progress: Progress) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The arguments `config`, `before` and `extra` of Saver.save. Metrics and traces are synced before a checkpoint is
    written: if a node is lost later, lines of steps that are never done again must not be lost with it."""
    extra = {"norms": list(run.norms)} if run.norms else {}
    return run.weights_config(progress.directory.name), (metrics.sync, run.loader.sync), extra


def _findable(recipe: str) -> str:
    """A recipe's file by its full path, so that an evaluation finds it from anywhere; a built-in recipe's name
    unchanged."""
    return str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe


if __name__ == "__main__":
    sys.exit(main())
