"""The pairs of the sample corpus by number, and the held-out pairs that their captions can tell apart."""

from __future__ import annotations

import random

from data_tools.drawn.captions import Claim, describe, is_true
from data_tools.drawn.scenes import Scene, random_scene

MAX_CLASHES = 200  # held-out pairs in a row that clash with earlier ones, before giving up


def sample_rng(seed: int, *names: str | int) -> random.Random:
    """One sample's own generator, so that it does not matter which process draws it, and when."""
    return random.Random("/".join(map(str, (seed, *names))))


def pair(seed: int, split: str, number: int) -> tuple[Scene, str, Claim, random.Random]:
    """Pair `number`: its scene, its caption, the caption's claim, and the generator with which to draw it."""
    rng = sample_rng(seed, "pairs", split, number)
    scene = random_scene(rng, held_out=split == "heldout")
    caption, claim = describe(scene, rng)
    return scene, caption, claim, rng


def distinguishable(seed: int, count: int) -> list[int]:
    """Numbers of `count` held-out pairs such that no caption is true of another's picture, so that R@1 is well defined.
    Raises ValueError if there are not that many."""
    numbers: list[int] = []
    # Both indexed by background and a thing's colour and shape: a claim can only be true of scenes under its own key.
    scenes: dict[tuple, list[Scene]] = {}
    claims: dict[tuple, list[Claim]] = {}
    number = clashes = 0
    while len(numbers) < count and clashes < MAX_CLASHES:
        scene, _, claim, _ = pair(seed, "heldout", number)
        scene_keys = [(scene.background, thing.colour, thing.shape) for thing in scene.things]
        claim_key = (claim.background, claim.things[0].colour, claim.things[0].shape)
        clash = any(is_true(claim, other) for other in scenes.get(claim_key, ())) or any(
            is_true(other_claim, scene) for key in scene_keys for other_claim in claims.get(key, ())
        )
        clashes = clashes + 1 if clash else 0
        if not clash:
            numbers.append(number)
            claims.setdefault(claim_key, []).append(claim)
            for key in scene_keys:
                scenes.setdefault(key, []).append(scene)
        number += 1
    if len(numbers) < count:
        raise ValueError(
            f"held_out={count} is too large because only {len(numbers)} drawn scenes can be told apart by their "
            "captions; use fewer"
        )
    return numbers
