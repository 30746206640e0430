"""The end of a stage: the file that the next one begins with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.save import average_in, read_trained
from pretrain.checkpoint.weights import (
    ADAPTERS,
    LAST,
    LORA,
    read_apart,
    weights_digest,
    write_tensors,
    write_weights,
)
from pretrain.distributed import fail_together, rank
from pretrain.files import write_file
from pretrain.models.lora import merged
from pretrain.run.build import Run
from pretrain.run.inputs import text_tokenizer
from pretrain.run.parameters import frozen_names
from pretrain.run.progress import Progress


def hand_over(run: Run, path: Path, progress: Progress) -> None:
    """Writes the whole model for the next stage to `path`, a weights.safetensors.

    It holds the trained weights, or their average if the stage keeps one (then the last step's go into LAST); of a
    stage that ended early, those of its best checkpoint. Adapters are added to their layers, and also written by
    themselves into ADAPTERS. Weights that were frozen or not built are passed on unchanged. The text tokenizer is
    copied beside it, so that the directory can be used by itself. Every rank must call it."""
    best = progress.best_checkpoint() if progress.ended else None
    state, config = {} if best else run.whole_state(), run.weights_config(path.parent.name)
    last = run.whole_state(last=True) if run.stage.ema is not None else {}
    frozen, text = frozen_names(run.recipe, run.stage), text_tokenizer(run.recipe, run.stage)

    def write() -> None:
        if text is not None:
            write_file(path.with_name(text.file_name), text.path.read_bytes())
        trained = read_apart(best)[0] | average_in(best) if best else state
        whole, plain = carry_over(trained, run.init_file, frozen), config
        if last:
            write_tensors(carry_over(last, run.init_file, frozen), path.with_name(LAST), config)
        if lora := config.get(LORA):
            base = {} if run.init_file is None else {"base_sha256": weights_digest(run.init_file)}
            opened = {name: value for name, value in trained.items() if name not in frozen}
            write_tensors(opened, path.with_name(ADAPTERS), config | base)
            whole, plain = merged(whole, lora), {name: value for name, value in config.items() if name != LORA}
        write_weights(whole, path, plain)

    fail_together(lambda: write() if rank() == 0 else None)


def carry_over(state: dict[str, Tensor], path: Path | None, frozen: Collection[str] = ()) -> dict[str, Tensor]:
    """`state` plus the other tensors of `path`, the file with which the stage began, so that experts and heads that
    this stage did not build reach the next one unchanged. Of a head that it built nothing else of the file stays: a
    bias that this head does without would be taken for its own. Of `frozen` tensors the file's are taken, since in bf16
    those in memory are rounded."""
    if path is None:
        return state
    initial = read_trained(path)[0]
    both = {name for name in frozen if name in initial and name in state}
    unchanged = {name for name in both if initial[name].shape == state[name].shape}
    built = {_head_of(name) for name in state}
    others = {name: value for name, value in initial.items() if name in unchanged or _head_of(name) not in built}
    return others | {name: value for name, value in state.items() if name not in unchanged}


def _head_of(name: str) -> tuple[str, ...]:
    """What a tensor is a part of: its head, or, outside of heads, itself. The objective masked has two heads, of which
    a stage may build one: that of codes, and that of words with its transform."""
    parts = name.split(".")
    return (*parts[:2], *(part for part in parts[2:3] if part == "image")) if parts[0] == "objectives" else (name,)
