"""Describes drawn scenes: captions with their claims, short documents, and whether a claim is true of a scene.

A caption always names every thing's colour and shape, their relation and the background; sometimes size and texture.
Its `Claim` says the same as data, so that the corpus can check which other pictures a caption would also fit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import permutations

from data_tools.drawn.scenes import PLACES, RELATIONS, Scene, Thing

WORDS_AT_MOST = (16, 16, 18)  # for one, two and three things

SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
TEXTURE_WORDS = {"plain": ("plain", "solid"), "striped": ("striped",), "dotted": ("dotted", "spotted")}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
PLACE_WORDS = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the centre"),
}
ON_BACKGROUND = (
    "on a {} background",
    "against a {} background",
    "on a {} backdrop",
    "in front of a {} wall",
    "on {}",
)
SCENES = ("{} scene", "{} picture", "{} image")
ONE = (
    "{a} {place} {on}",
    "there is {a} {place} {on}",
    "{on}, {a} {place}",
    "{a} is {place} {on}",
    "a picture of {a} {place} {on}",
    "a single {a_bare} {place} {on}",
    "{scene} with {a} {place}",
)
TWO = (
    "{a} {rel} {b} {on}",
    "{a} is {rel} {b} {on}",
    "{on}, {a} is {rel} {b}",
    "{on} there is {a} {rel} {b}",
    "a drawing of {a} {rel} {b} {on}",
    "{scene} with {a} {rel} {b}",
    "{scene} of {a} that is {rel} {b}",
    "{a} and {b} {on}, the {a_short} {rel} the {b_short}",
    "{a} can be seen {rel} {b} {on}",
)
THREE = (
    "{a} {rel} {b}, with {c} {rel3} them, {on}",
    "{on}, {a} is {rel} {b} and {c} is {rel3} both",
    "{scene} with {a} {rel} {b} and {c} {rel3} both",
    "{c} {rel3} both {a} and {b} {on}, the {a_short} {rel} the {b_short}",
)
SHAPE_FACTS = {
    "circle": ("a circle is round and has no corners", "every circle is round"),
    "square": ("a square has four equal sides", "a square has four corners"),
    "triangle": ("a triangle has three corners", "a triangle has three sides and no round part"),
    "star": ("a star has five points", "the five points of a star are sharp"),
    "cross": ("a cross has four arms", "the four arms of a cross are equal"),
    "ring": ("a ring is a circle with a hole in the middle", "a ring is round and has a hole"),
}


@dataclass(frozen=True)
class Description:
    """What a caption says about one thing; None where it says nothing."""

    colour: str
    shape: str
    size: str | None
    texture: str | None

    def fits(self, thing: Thing) -> bool:
        return (
            self.colour == thing.colour
            and self.shape == thing.shape
            and self.size in (None, thing.size)
            and self.texture in (None, thing.texture)
        )


@dataclass(frozen=True)
class Claim:
    """Everything a caption says: `relations` are (i, relation, j) over `things`, `place` is that of a single thing."""

    background: str
    things: tuple[Description, ...]
    relations: tuple[tuple[int, str, int], ...]
    place: str | None


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the claim could describe the scene. Generous where words are vague: "left of" fits any thing whose centre
    is further left, and a scene may contain more than is claimed."""
    if claim.background != scene.background or len(claim.things) > len(scene.things):
        return False
    return any(
        all(description.fits(thing) for description, thing in zip(claim.things, things, strict=True))
        and all(_is_related(things[i], relation, things[j]) for i, relation, j in claim.relations)
        and (claim.place is None or _is_at(things[0], claim.place))
        for things in permutations(scene.things, len(claim.things))
    )


def _is_related(a: Thing, relation: str, b: Thing) -> bool:
    return {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]


def _is_at(thing: Thing, place: str) -> bool:
    x, y = PLACES[place]
    return (x == 0.5 or abs(thing.x - x) < 0.2) and (y == 0.5 or abs(thing.y - y) < 0.2)


def describe(scene: Scene, rng: random.Random) -> tuple[str, Claim]:
    """A caption of about 8 to 16 words, and what it claims."""
    while True:
        caption, claim = _describe(scene, rng)
        if len(caption.split()) <= WORDS_AT_MOST[len(scene.things) - 1]:
            return caption, claim


def _describe(scene: Scene, rng: random.Random) -> tuple[str, Claim]:
    descriptions = tuple(_name(thing, rng, chance=(0.8, 0.4, 0.12)[len(scene.things) - 1]) for thing in scene.things)
    background = scene.background
    words = {
        "on": rng.choice(ON_BACKGROUND).format(background),
        "scene": article(rng.choice(SCENES).format(background)),
        "a_bare": (phrases := [phrase(thing, rng) for thing in descriptions])[0],
        **{letter: article(text) for letter, text in zip("abc", phrases, strict=False)},
    }
    if len(descriptions) == 1:
        words["place"] = rng.choice(PLACE_WORDS[scene.relation])
        return rng.choice(ONE).format(**words), Claim(background, descriptions, (), scene.relation)
    words["a_short"], words["b_short"] = short_names(scene.things[0], scene.things[1])
    words["rel"] = rng.choice(RELATION_WORDS[scene.relation])
    relations = [(0, scene.relation, 1)]
    if scene.third:
        words["rel3"] = rng.choice(RELATION_WORDS[scene.third])
        relations += [(2, scene.third, 0), (2, scene.third, 1)]
    template = rng.choice(THREE if scene.third else TWO)
    return template.format(**words), Claim(background, descriptions, tuple(relations), None)


def _name(thing: Thing, rng: random.Random, chance: float) -> Description:
    size = thing.size if rng.random() < chance else None
    # "plain" is rarely worth saying.
    texture = thing.texture if rng.random() < chance * (0.3 if thing.texture == "plain" else 1) else None
    return Description(thing.colour, thing.shape, size, texture)


def phrase(description: Description, rng: random.Random) -> str:
    """The thing's name without an article: "big striped red circle"."""
    words = [description.colour, description.shape]
    if description.texture:
        words.insert(0, rng.choice(TEXTURE_WORDS[description.texture]))
    if description.size:
        words.insert(0, rng.choice(SIZE_WORDS[description.size]))
    return " ".join(words)


def article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def short_names(a: Thing, b: Thing) -> tuple[str, str]:
    """Names that tell the two apart: "circle" and "square", or "red one" and "blue one"."""
    if a.shape != b.shape:
        return a.shape, b.shape
    return f"{a.colour} one", f"{b.colour} one"


def write_document(scenes: tuple[Scene, ...], rng: random.Random) -> str:
    """A few sentences about each scene, and perhaps a fact about a shape in it. They repeat and rephrase the scene's
    facts, so that a masked word can be inferred from another sentence."""
    ordinals = ("first", "second", "third")
    sentences = []
    for number, scene in enumerate(scenes):
        caption = describe(scene, rng)[0]
        lead = f"in the {ordinals[number]} picture, " if len(scenes) > 1 else ""
        sentences.append(lead + caption)
        extra = [_converse, _attributes, _comparison, _background, _shape_fact]
        for write in rng.sample(extra, 2 if len(scenes) == 1 else 1):
            sentences.append(write(scene, rng))
    return " ".join(text[0].upper() + text[1:] + "." for text in sentences)


def _full(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _converse(scene: Scene, rng: random.Random) -> str:
    if len(scene.things) == 1:
        place = rng.choice(PLACE_WORDS[scene.relation])
        return f"only one thing is there, and the {_full(scene.things[0])} is {place}"
    a, b = scene.things[:2]
    there, back = (rng.choice(RELATION_WORDS[r]) for r in (scene.relation, RELATIONS[scene.relation]))
    forms = (
        f"the {_full(b)} is {back} the {_full(a)}",
        f"the {_full(a)} is {there} the {_full(b)}, so the {_full(b)} is {back} the {_full(a)}",
        f"what is {back} the {_full(a)}? The {_full(b)}",
    )
    return rng.choice(forms)


def _attributes(scene: Scene, rng: random.Random) -> str:
    thing = rng.choice(scene.things)
    size, texture = rng.choice(SIZE_WORDS[thing.size]), rng.choice(TEXTURE_WORDS[thing.texture])
    return f"the {thing.shape} that is {thing.colour} is {size} and {texture}"


def _comparison(scene: Scene, rng: random.Random) -> str:
    if len(scene.things) == 1:
        return _attributes(scene, rng)
    a, b = scene.things[:2]
    if a.size == b.size:
        return f"the {_full(a)} and the {_full(b)} are both {rng.choice(SIZE_WORDS[a.size])}"
    return f"the {_full(a)} is {'bigger' if a.size == 'big' else 'smaller'} than the {_full(b)}"


def _background(scene: Scene, rng: random.Random) -> str:
    count = ("one thing", "two things", "three things")[len(scene.things) - 1]
    verb = "is" if len(scene.things) == 1 else "are"
    return f"there {verb} {count} and the background is {scene.background}"


def _shape_fact(scene: Scene, rng: random.Random) -> str:
    return rng.choice(SHAPE_FACTS[rng.choice(scene.things).shape])
