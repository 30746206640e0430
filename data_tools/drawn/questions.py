"""Questions about drawn scenes with their answers, and sentences about two of them that are true or not."""

from __future__ import annotations

import random

from data_tools.drawn.captions import article
from data_tools.drawn.scenes import RELATIONS, SHAPES, Scene


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question that the scene answers: a colour, a number from 1 to 3, or yes or no, these two as often as each
    other."""
    kinds = ["colour", "number"] + (["place"] if len(scene.things) > 1 else [])
    kind = rng.choice(kinds)
    if kind == "number":
        return "how many things are there?", str(len(scene.things))
    if kind == "place":
        a, b = scene.things[:2]
        right = rng.random() < 0.5
        relation = scene.relation if right else RELATIONS[scene.relation]
        words = f"{relation} of" if relation in ("left", "right") else relation
        return f"is the {a.colour} {a.shape} {words} the {b.colour} {b.shape}?", "yes" if right else "no"
    shapes = [thing.shape for thing in scene.things]
    alone = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not alone:
        return "how many things are there?", str(len(scene.things))
    thing = rng.choice(alone)
    return f"what colour is the {thing.shape}?", thing.colour


def sentence(scenes: tuple[Scene, Scene], rng: random.Random) -> tuple[str, bool]:
    """A sentence about a left and a right picture and whether it is true, which is so for about half of them."""
    shapes = [{thing.shape for thing in scene.things} for scene in scenes]
    both, one = shapes[0] & shapes[1], shapes[0] ^ shapes[1]
    neither = set(SHAPES) - shapes[0] - shapes[1]
    right = rng.random() < 0.5
    if rng.random() < 0.5:  # in one of them, whichever
        wrong = sorted(both | neither) or sorted(one)
        pool = sorted(one) if right and one else wrong
        shape = rng.choice(pool)
        return f"exactly one picture has {article(shape)}", shape in one
    pool = sorted(shapes[0]) if right else sorted(set(SHAPES) - shapes[0])
    shape = rng.choice(pool)
    return f"the left picture has {article(shape)}", shape in shapes[0]
