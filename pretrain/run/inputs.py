"""What a stage reads: its loader, the one of its evaluations, and the text tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pretrain.batch import DROP_PATH
from pretrain.config import Recipe, Stage
from pretrain.contracts import Source
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.mixture import Mixture, View
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.parallel.mesh import Place
from pretrain.settings import fill_variables

SHARED_MEMORY = Path("/dev/shm")


def build_loader(recipe: Recipe, stage: Stage, stage_dir: Path | None, place: Place) -> Loader:
    """The stage's training batches for the rank at `place`. The first of the ranks that see the same batch writes the
    traces into `stage_dir`. Raises ValueError for data that cannot be read, and where this node has too little shared
    memory for it."""
    loader = open_data(recipe, stage, stage_dir, place)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of the launcher
    check_shared_memory(loader, max(here // (stage.parallel.tensor * stage.parallel.sequence), 1))
    return loader


def open_data(recipe: Recipe, stage: Stage, stage_dir: Path | None, place: Place) -> Loader:
    """The same, wherever the ranks will be."""
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


def check_shared_memory(loader: Loader, loaders: int) -> None:
    """Raises ValueError where the batches that `loaders` ranks of this node make ahead do not fit into shared memory:
    a worker that finds it full dies, or its batch never comes."""
    need = loader.bytes_ahead * loaders
    if not need or not SHARED_MEMORY.is_dir():
        return
    about = os.statvfs(SHARED_MEMORY)
    if (free := about.f_bavail * about.f_frsize) < need:
        raise ValueError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, but {loader.loading.workers} loading.workers * "
            f"{loader.loading.prefetch} loading.prefetch micro-batches of {loaders} ranks on this node need "
            f"{-(-need >> 20)} MiB; enlarge it (docker run --shm-size) or lower loading.prefetch or loading.workers"
        )


def evaluation_loader(
    recipe: Recipe, stage: Stage, mix: Mapping[str, Source], counts: Mapping[str, int], masking: Masking | None
) -> Loader:
    """Held-out batches: pictures as `transform.evaluation` says, one rank, the order and masks of a fixed seed."""
    look = replace(stage.transform, train=False)
    view = View(text_tokenizer(recipe, stage), look, masking, recipe.model_of(stage).patch_size, draws=stage.draws)
    return Loader(Mixture(mix, counts, seed=recipe.seed, loading=recipe.loading), view)


def text_tokenizer(recipe: Recipe, stage: Stage) -> TextTokenizer | None:
    """The recipe's, for a stage that reads texts. Raises ValueError where it is missing or too large for the model."""
    if not any(kind != "images" for kind in stage.mix):
        return None
    if recipe.text_tokenizer is None:
        raise ValueError("text_tokenizer is not set but the stage reads texts; give the path of a SentencePiece model")
    path = Path(fill_variables(recipe.text_tokenizer, "text_tokenizer")).expanduser()
    if not path.is_file():
        raise ValueError(
            f"text_tokenizer={path} does not exist; train one: python -m data_tools.train_text_tokenizer --help"
        )
    tokenizer, room = TextTokenizer(path), recipe.model_of(stage).vocab_size
    if tokenizer.vocab_size > room:
        raise ValueError(
            f"model.vocab_size={room} is smaller than the {tokenizer.vocab_size} ids of {path}; "
            f"use model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}"
        )
    return tokenizer
