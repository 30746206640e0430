"""The pairs of the sample corpus by their number, and the held-out ones that captions can tell apart."""

from __future__ import annotations

import random

from data_tools.drawn.captions import Claim, describe, is_true
from data_tools.drawn.scenes import Scene, random_scene

REFUSED_AT_MOST = 200  # held-out pairs in a row, before the drawn world counts as full


def sample_rng(seed: int, *names: str | int) -> random.Random:
    """A generator of one sample's own: who draws it, and when, changes nothing."""
    return random.Random("/".join(map(str, (seed, *names))))


def pair(seed: int, split: str, number: int) -> tuple[Scene, str, Claim, random.Random]:
    """Pair `number`: its scene, its caption, what the caption claims, and the generator that goes on to draw it."""
    rng = sample_rng(seed, "pairs", split, number)
    scene = random_scene(rng, held_out=split == "heldout")
    caption, claim = describe(scene, rng)
    return scene, caption, claim, rng


def distinguishable(seed: int, count: int) -> list[int]:
    """Numbers of `count` held-out pairs of which no caption is true of another's picture, so that R@1 is well defined.
    Raises ValueError when the drawn world has no room for so many."""
    chosen: list[int] = []
    # By what a scene has and a claim asks first: another background, or a scene without that thing, never fits.
    scenes: dict[tuple, list[Scene]] = {}
    claims: dict[tuple, list[Claim]] = {}
    number = refused = 0
    while len(chosen) < count and refused < REFUSED_AT_MOST:
        scene, _, claim, _ = pair(seed, "heldout", number)
        has = [(scene.background, thing.colour, thing.shape) for thing in scene.things]
        asks = (claim.background, claim.things[0].colour, claim.things[0].shape)
        clash = any(is_true(claim, other) for other in scenes.get(asks, ())) or any(
            is_true(their, scene) for key in has for their in claims.get(key, ())
        )
        refused = refused + 1 if clash else 0
        if not clash:
            chosen.append(number)
            claims.setdefault(asks, []).append(claim)
            for key in has:
                scenes.setdefault(key, []).append(scene)
        number += 1
    if len(chosen) < count:
        raise ValueError(
            f"held_out={count} is too large because only {len(chosen)} drawn scenes can be told apart by their "
            "captions; use fewer"
        )
    return chosen
