"""How many ranks share one copy of the model, and in which ways."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pretrain.settings import near


@dataclass(frozen=True)
class Parallel:
    """Sizes of the groups beside data parallelism; the world is their product times the data ranks.

    Family A: ZeRO-0 to 3 with `tensor` and `sequence`; family B: ZeRO-1 with `tensor` and `pipe`. They change where
    numbers are computed, and of the numbers only the rounding.
    """

    tensor: int = 1  # ranks that split each matrix (Megatron, arXiv 1909.08053, section 3)
    pipe: int = 1  # ranks that split the blocks (GPipe, arXiv 1811.06965; 1F1B by DeepSpeed)
    sequence: int = 1  # ranks that split the rows of a micro-batch (Ulysses, arXiv 2309.14509)

    def __post_init__(self) -> None:
        for f in fields(self):
            size = getattr(self, f.name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"parallel.{f.name}={size!r} is wrong; use a whole number of at least 1")
        if self.pipe > 1 and self.sequence > 1:
            raise ValueError(
                f"parallel.pipe={self.pipe} and parallel.sequence={self.sequence} do not go together; set one to 1"
            )

    def __str__(self) -> str:
        """The sizes that are not 1, as a user writes them."""
        return " and ".join(f"parallel.{name}={size}" for name, size in vars(self).items() if size > 1) or "one rank"

    @property
    def model(self) -> int:
        """How many ranks work together on one micro-batch."""
        return self.tensor * self.pipe * self.sequence


def world_problem(parallel: Parallel, world: int) -> str:
    """Why `world` ranks cannot be divided into copies of the model; "" if they can."""
    if world % parallel.model == 0:
        return ""
    sizes = " * ".join(f"parallel.{name}" for name, size in vars(parallel).items() if size > 1)
    return f"{world} ranks are not a multiple of {sizes}={parallel.model}; start {near(world, parallel.model)} ranks"
