"""What a loader reads, in which order, and how samples become tensors; with the checks of a user's mistakes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pretrain.batch import Layout, batch_problem
from pretrain.contracts import Source
from pretrain.data.masking import Masking
from pretrain.data.text_tokenizer import AnyTokenizer
from pretrain.data.transforms import ImageTransform

# A kind's index here is also the number of its random stream.
KINDS = ("images", "pairs", "dual", "texts")


# A rank gets more workers only if a recipe says so: each holds `prefetch` micro-batches.
MOST_WORKERS = 16


@dataclass(frozen=True)
class Loading:
    """How samples are fetched. Only `streams`, `block_shards` (the order) and `skip_bad_shards` change what a step
    sees.

    `jitter_on_device`: workers leave flip and jitter to the device, which uses the same random numbers; the pictures
    are equal to rounding (rarely one level of 255). This saves a worker a fifth of its time on a small picture, and
    costs the device some; it is for runs whose data_wait is mostly decoding. If RandAugment or mixing follow, workers
    do everything. A source of your own must not look at the pixels that the transform returns to it; if it changes the
    picture, its sample is decoded again with flip and jitter.
    """

    workers: int | None = None  # None: one fewer than this rank's CPUs; 0: the run's own process loads
    streams: int = 64
    block_shards: int = 8
    cache_dir: str | None = None
    cache_gib: float = 50.0
    skip_bad_shards: bool = False
    prefetch: int = 4  # micro-batches that each worker prepares in advance
    jitter_on_device: bool = False

    def __post_init__(self) -> None:
        for name, least in {"workers": 0, "streams": 1, "block_shards": 1, "prefetch": 1}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(
                    f"loading.{name}={getattr(self, name)} is wrong because it is below {least}; use {least}"
                )

    @property
    def processes(self) -> int:
        """The number of workers."""
        return min(max(cpus_of_rank() - 1, 1), MOST_WORKERS) if self.workers is None else self.workers


def cpus_of_rank() -> int:
    """The number of CPUs that this rank may use. Ranks that are not SLURM tasks of their own, as under torchrun, share
    those of their node or task."""
    cpus, here = len(os.sched_getaffinity(0)), _number("LOCAL_WORLD_SIZE", 1)
    tasks, ranks = _number("SLURM_NTASKS", 1), _number("WORLD_SIZE", 1)
    if given := _number("SLURM_CPUS_PER_TASK", 0):
        return max(min(given, cpus) if tasks == ranks else min(given, cpus) // here, 1)
    return max(cpus // here, 1)


def _number(name: str, default: int) -> int:
    """A number from the environment. Anything else counts as the default: parallel/launcher.py reports it."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) else default


@dataclass(frozen=True)
class Mixture:
    """What is read, in which order. `counts` are the sequences of each kind in one global batch, over all data ranks
    and micro-steps; `mix` has the same keys."""

    mix: Mapping[str, Source]
    counts: Mapping[str, int]
    accumulation: int = 1
    seed: int = 0
    loading: Loading = field(default_factory=Loading)


@dataclass(frozen=True)
class View:
    """How samples are turned into tensors: the tokenizer, the transform, and what is hidden."""

    tokenizer: AnyTokenizer | None = None
    transform: ImageTransform | None = None
    masking: Masking | None = None
    patch_size: int = 1
    draws: Mapping[str, int] = field(default_factory=dict)  # random numbers per sequence, by their user: Batch.draws

    @property
    def grid(self) -> int:
        return self.transform.size // self.patch_size if self.transform else 0


def check_mixture(mixture: Mixture, view: View, ranks: int) -> None:
    """Raises ValueError for a user's mistake in a mixture, its view, or its batch for so many data ranks."""
    mix, counts, transform = mixture.mix, mixture.counts, view.transform
    if unknown := sorted(set(mix) - set(KINDS)):
        raise ValueError(f"mix.{unknown[0]} is wrong because there is no such kind; use {', '.join(KINDS)}")
    if not mix:
        raise ValueError(f"mix={{}} is empty; give a source for one or more of {', '.join(KINDS)}")
    if set(mix) != set(counts):
        raise ValueError(f"batch has {sorted(counts)} but mix has {sorted(mix)}; give each kind of the mix a count")
    for kind in mix:
        problem = slot_problem(kind, mix[kind]) or batch_problem(kind, counts[kind], ranks, mixture.accumulation)
        if problem:
            raise ValueError(problem)
        if getattr(mix[kind], "mixing", None) and (each := counts[kind] // (ranks * mixture.accumulation)) % 2:
            raise ValueError(
                f"mix.{kind}.mixing blends pictures in pairs, but batch.{kind}={counts[kind]} gives {each} to each of "
                f"{ranks} data ranks and {mixture.accumulation} micro-steps; use an even number for each"
            )
        if kind != "texts" and transform is None:
            raise ValueError(f"mix.{kind} has pictures but the stage has no transform; set the stage's transform")
        if kind != "images" and view.tokenizer is None:
            raise ValueError(f"mix.{kind} has texts but there is no text tokenizer; set text_tokenizer")
    if len({mix[kind].text_len for kind in ("texts", "dual") if kind in mix}) > 1:
        raise ValueError(
            f"mix.texts.text_len={mix['texts'].text_len} and mix.dual.text_len={mix['dual'].text_len} differ, but all "
            "texts of a batch have one length; set both to the same value"
        )
    if transform is not None and transform.size % view.patch_size:
        size = transform.size // view.patch_size * view.patch_size or view.patch_size
        raise ValueError(
            f"transform.size={transform.size} is not a multiple of patch_size={view.patch_size}; "
            f"use {size} or {size + view.patch_size}"
        )


def layout_of(mixture: Mixture, view: View, parts: int) -> Layout:
    """The layout of one micro-batch of one rank; a global batch has `parts` of them."""
    return micro_layout(mixture.mix, mixture.counts, view.grid**2, parts)


def slot_problem(kind: str, source: Source) -> str:
    """Why a source cannot fill this kind of a mix; "" if it can."""
    if kind in source.slots:
        return ""
    name = f"mix.{kind}={type(source).__name__}(...)"
    return f"{name} is wrong because such a source fills {' or '.join(source.slots)}; use it there"


def micro_layout(mix: Mapping[str, Source], counts: Mapping[str, int], patches: int, parts: int) -> Layout:
    """The layout of one micro-batch; a global batch has `parts` of them (data ranks * accumulation)."""
    each = {kind: counts[kind] // parts for kind in mix}
    text_source = mix.get("texts") or mix.get("dual")
    return Layout(
        images=each.get("images", 0) + each.get("dual", 0),
        pairs=each.get("pairs", 0),
        texts=each.get("texts", 0) + each.get("dual", 0),
        patches=patches,
        pair_len=mix["pairs"].text_len if "pairs" in mix else 0,
        text_len=text_source.text_len if text_source else 0,
        dual=each.get("dual", 0),
    )
