"""A trained stage as the evaluations see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.batch import Batch


@dataclass(frozen=True)
class Trained:
    """The task, and everything that evaluations need beside it."""

    task: nn.Module
    device: torch.device
    directory: Path  # pictures are written into its samples/
    loader: Callable[..., Any]  # (mix, counts, masking) -> the Loader of held-out batches, for one rank, a fixed seed
    with_codes: Callable[[Batch], Batch]  # adds the visual tokenizer's codes
    draw_codes: Callable[[Tensor], Tensor] | None  # codes [N, P] -> uint8 [N, 3, H, W]; None: codes cannot be drawn
    samples_of: Callable[[Any], int]  # how many samples a source has
    masking: Any  # the masked objective, or None
    text: Any  # the text tokenizer, or None

    def head(self, name: str) -> Any:
        """The head of the objective `name`; see `missing_head`."""
        task: Any = self.task
        return task.objectives[name]

    def batches(self, mix: dict, size: int, samples: int, masking: Any = None) -> Iterator[Batch]:
        """Batches of `size` of each kind that cover the first `samples` of every source; the last one may be filled
        up from the start of the source."""
        loader = self.loader(mix, dict.fromkeys(mix, size), masking)
        for (batch,) in loader.batches(0, -(-samples // size)):
            yield self.with_codes(batch.to(self.device))

    def save_picture(self, image: Tensor, name: str) -> str:
        """Writes uint8 [3, H, W] as a PNG -> its path as samples.json names it."""
        path = self.directory / "samples" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(path)
        return f"samples/{path.name}"


def missing_head(stage: Any, name: str) -> list[str]:
    """Evaluation.problems of one that reads the head of the objective `name`."""
    names = [objective.name for objective in stage.objectives]
    if name in names:
        return []
    return [
        f"evals: one of them needs the objective {name}, and this stage has {', '.join(names) or 'none'}; take it out "
        "of the stage's evals"
    ]


def check_counts(**counts: int) -> None:
    """ValueError for a count in an evaluation's config that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"evals: {name}={count} is below 1; use 1 or more")


def uint8_pictures(images: Tensor) -> Tensor:
    """The pictures of a batch as uint8 [N, 3, H, W], whatever form the encoder reads."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
