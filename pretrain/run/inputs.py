"""What a stage reads: its loader, the one of its evaluations, and the text tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pretrain.batch import DROP_PATH
from pretrain.config import Recipe, Stage
from pretrain.contracts import Source
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.mixture import Mixture, View, cpus_of_rank
from pretrain.data.text_tokenizer import AnyTokenizer, open_tokenizer
from pretrain.parallel.mesh import Place
from pretrain.settings import fill_variables

log = logging.getLogger("pretrain")

MEMORY, OWN_GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def build_loader(recipe: Recipe, stage: Stage, stage_dir: Path | None, place: Place) -> Loader:
    """The stage's training batches for the rank at `place`. The first of the ranks that see the same batch writes the
    traces into `stage_dir`. Raises ValueError for data that cannot be read, and where this node has too little memory
    for it."""
    loader = open_data(recipe, stage, stage_dir, place)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this node; the launcher sets it
    if recipe.loading.workers is None:
        log.info("data workers: %d, a CPU each (loading.workers)", recipe.loading.processes)
        if "SLURM_PROCID" in os.environ and cpus_of_rank() == 1 and (os.cpu_count() or 1) > 2:
            log.warning(
                "this rank may use 1 of %d CPUs, which its data worker shares; since SLURM 22.05 srun must be told "
                "again how many: srun --cpus-per-task=N",
                os.cpu_count(),
            )
    check_memory(loader, max(here // (stage.parallel.tensor * stage.parallel.sequence), 1))
    return loader


def open_data(recipe: Recipe, stage: Stage, stage_dir: Path | None, place: Place) -> Loader:
    """As `build_loader`, without the check of memory: for a rank that may be on another machine."""
    if place.tensor or place.sequence or place.pipe:
        stage_dir = None
    model = recipe.model_of(stage)
    drop_path = {DROP_PATH: model.draws} if stage.drop_path else {}
    view = View(
        text_tokenizer(recipe, stage), stage.transform, stage.masking, model.patch_size, draws=drop_path | stage.draws
    )
    return Loader(
        Mixture(stage.mix, stage.batch.counts(), stage.batch.accumulation, recipe.seed, recipe.loading),
        view,
        rank=place.data,
        ranks=place.data_size,
        trace=stage_dir if recipe.trace_samples else None,
        quarantine=stage_dir / "quarantine.jsonl" if stage_dir else None,
    )


def check_memory(loader: Loader, loaders: int) -> None:
    """Raises ValueError if the batches that `loaders` ranks of this node prefetch do not fit into its memory: the
    kernel would kill one worker after another."""
    need = loader.bytes_ahead * loaders
    if need > (free := free_memory()):
        raise ValueError(
            f"this node has {free >> 20} MiB of free memory, but {loader.loading.processes} loading.workers * "
            f"{loader.loading.prefetch} loading.prefetch micro-batches of {loaders} ranks need {-(-need >> 20)} MiB; "
            "lower loading.prefetch or loading.workers"
        )


def free_memory() -> int:
    """Bytes of memory that this node has available and that this process's control group may use; 2**63 if neither is
    known."""
    free = 2**63
    with suppress(OSError, StopIteration):
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    with suppress(OSError, StopIteration):
        place = next(line for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))[3:].strip("/")
        for group in (GROUPS / place, *(GROUPS / place).parents):
            with suppress(OSError, ValueError):  # "max"
                free = min(free, int((group / "memory.max").read_text()))
    return free


def evaluation_loader(
    recipe: Recipe, stage: Stage, mix: Mapping[str, Source], counts: Mapping[str, int], masking: Masking | None
) -> Loader:
    """Held-out batches for one rank, with pictures prepared as `transform.evaluation` says, and the order and masks of
    the recipe's seed."""
    look = replace(stage.transform, train=False)
    view = View(text_tokenizer(recipe, stage), look, masking, recipe.model_of(stage).patch_size, draws=stage.draws)
    return Loader(Mixture(mix, counts, seed=recipe.seed, loading=recipe.loading), view)


def text_tokenizer(recipe: Recipe, stage: Stage) -> AnyTokenizer | None:
    """The recipe's text tokenizer; None for a stage that reads no texts. Raises ValueError if it is missing, or has
    more ids than the model."""
    if not any(kind != "images" for kind in stage.mix):
        return None
    if recipe.text_tokenizer is None:
        raise ValueError(
            "text_tokenizer is not set but the stage reads texts; give the path of a SentencePiece model or "
            "a tokenizer.json"
        )
    path = Path(fill_variables(recipe.text_tokenizer, "text_tokenizer")).expanduser()
    if not path.is_file():
        raise ValueError(
            f"text_tokenizer={path} does not exist; train one: python -m data_tools.train_text_tokenizer --help"
        )
    tokenizer, model = open_tokenizer(path), recipe.model_of(stage)
    wanted, more = tokenizer.vocab_size + model.reserved_ids, ""
    if model.reserved_ids:
        more = f" and {model.reserved_ids} of the model's own"
    if wanted > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of {path}{more}; "
            f"use model.vocab_size={-(-wanted // 64) * 64}"
        )
    return tokenizer
