"""Questions about drawn scenes with their answers, sentences about two of them that are true or not, and sentences
about one that it entails, contradicts or leaves open."""

from __future__ import annotations

import random

from data_tools.drawn.captions import article
from data_tools.drawn.scenes import BACKGROUNDS, COLOURS, COUNTS, RELATIONS, SHAPES, Scene

# What a scene shows or not, kind by kind.
FACTS: dict[str, tuple[str, ...]] = {
    "number": ("one thing", "two things", "three things"),
    "colour": tuple(f"something {colour}" for colour in COLOURS),
    "background": tuple(f"a {colour} background" for colour in BACKGROUNDS),
    "shape": tuple(article(shape) for shape in SHAPES),
}
UNSEEN = ("it is cold outside", "a bird sings", "somebody likes it")


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question that the scene answers, and the answer: a colour, a number from 1 to 3, or yes or no, these two
    equally often."""
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
    """A sentence about a left and a right picture, and whether it is true, as about half of them are."""
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


def shown(scene: Scene) -> set[str]:
    """The FACTS that are true of the scene."""
    things = scene.things
    number = FACTS["number"][COUNTS.index(len(things))]
    return {number, f"a {scene.background} background"}.union(
        *({f"something {thing.colour}", article(thing.shape)} for thing in things)
    )


def _fact(scene: Scene, rng: random.Random, *, right: bool) -> str:
    kind = rng.choice(tuple(FACTS))
    return rng.choice([fact for fact in FACTS[kind] if (fact in shown(scene)) == right])


def side_sentence(scenes: tuple[Scene, Scene], rng: random.Random) -> tuple[str, bool]:
    """A sentence about what one of two pictures shows, a number, a colour, a background or a shape, and whether it is
    true, as about half of them are. Easier than `sentence`, which is about shapes alone."""
    side, right = rng.randrange(2), rng.random() < 0.5
    return f"the {('left', 'right')[side]} picture has {_fact(scenes[side], rng, right=right)}", right


def hypothesis(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A sentence and SNLI-VE's word for it, each as often as the others: `entailment` for what the picture shows,
    `neutral` for that and something which no picture shows, `contradiction` for what it does not show, half of the
    time with such an addition. Two thirds can be guessed without the picture."""
    label = rng.choice(("entailment", "neutral", "contradiction"))
    fact = _fact(scene, rng, right=label != "contradiction")
    more = label == "neutral" or (label == "contradiction" and rng.random() < 0.5)
    return f"the picture has {fact}" + (f" and {rng.choice(UNSEEN)}" if more else ""), label
