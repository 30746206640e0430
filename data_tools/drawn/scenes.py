"""The drawn scenes of the sample corpus: what a scene is, random scenes, and how to draw one.

A scene has one to three things in front of a background. Each thing has a colour, a shape, a size and a texture. Some
(colour, shape) combinations are held out: no training scene has them, and every held-out scene has at least one. Each
colour and each shape alone is common in training, so a model that composes can name combinations it has never seen.
"""

from __future__ import annotations

import io
import random
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from math import cos, pi, sin

from PIL import Image, ImageChops, ImageDraw, ImageFilter

COLOURS = {
    "red": (222, 36, 36),
    "orange": (250, 138, 16),
    "yellow": (246, 222, 40),
    "green": (38, 166, 62),
    "cyan": (48, 206, 222),
    "blue": (44, 84, 232),
    "purple": (136, 52, 186),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 16.5 / 64, "big": 26.5 / 64}  # the width of a thing, in widths of the picture
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {
    "white": (246, 246, 244),
    "black": (18, 18, 20),
    "grey": (134, 136, 138),
    "brown": (104, 66, 38),
    "navy": (16, 26, 84),
}
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}  # each with its converse
PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75), "middle": (0.5, 0.5)}

# One shape of each colour, each shape at least once: neither colour nor shape alone reveals a held-out thing.
HELD_OUT = frozenset((colour, SHAPES[(2 * i + i // 3) % 6]) for i, colour in enumerate(COLOURS))
COMBINATIONS = tuple(product(COLOURS, SHAPES))
TRAINING = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)
HELD_OUT_PAIRS = tuple(pair for pair in COMBINATIONS if pair in HELD_OUT)

SUPERSAMPLING = 4
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (20, 65, 15)  # things in a scene; percent of the scenes


@dataclass(frozen=True)
class Thing:
    """One drawn thing; x, y is its centre and `width` its width, in widths of the picture (y grows downwards)."""

    colour: str
    shape: str
    size: str
    texture: str
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Scene:
    """The things of a picture. Of two or three, things[0] has the `relation` to things[1]; of three, things[2] has the
    relation `third` to both. Of one, `relation` is its place (a key of PLACES)."""

    background: str
    things: tuple[Thing, ...]
    relation: str
    third: str | None = None

    def facts(self) -> dict:
        return asdict(self)


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """A training scene, or a held-out one (at least one thing is a held-out combination)."""
    count = rng.choices(COUNTS, COUNT_WEIGHTS)[0]
    pool = COMBINATIONS if held_out else TRAINING
    pairs = rng.sample(pool, count)
    if held_out and not any(pair in HELD_OUT for pair in pairs):
        pairs[rng.randrange(count)] = rng.choice(HELD_OUT_PAIRS)
    relation = rng.choice(tuple(PLACES if count == 1 else RELATIONS))
    # The third thing is off the line of the other two, so that its relation to both is clear.
    across = ("above", "below") if relation in ("left", "right") else ("left", "right")
    third = rng.choice(across) if count == 3 else None
    centres = _centres(rng, count, relation, third)
    things = []
    for (colour, shape), (x, y) in zip(pairs, centres, strict=True):
        size, texture = rng.choice(tuple(SIZES)), rng.choice(TEXTURES)
        width = SIZES[size] + rng.uniform(-1, 1) / 64
        things.append(Thing(colour, shape, size, texture, round(x, 4), round(y, 4), round(width, 4)))
    return Scene(rng.choice(tuple(BACKGROUNDS)), tuple(things), relation, third)


def _centres(rng: random.Random, count: int, relation: str, third: str | None) -> list[tuple[float, float]]:
    """Centres at which the things are apart (the biggest is 27.5/64 wide) and inside the picture."""

    def near(x: float, y: float, by: float = 2 / 64) -> tuple[float, float]:
        return x + rng.uniform(-by, by), y + rng.uniform(-by, by)

    if count == 1:
        return [near(*PLACES[relation], by=1.5 / 64)]
    low, high = 0.25, 0.75
    first, second = (low, high) if relation in ("left", "above") else (high, low)
    if third is None:
        level = rng.uniform(0.3, 0.7)
        spots = [(first, level), (second, level)]
    else:
        aside, level = (low, high) if third in ("left", "above") else (high, low)
        spots = [(first, level), (second, level), (rng.uniform(0.32, 0.68), aside)]
    if relation in ("above", "below"):
        spots = [(y, x) for x, y in spots]
    return [near(*spot, by=1 / 64) for spot in spots]


@cache
def _outline(shape: str, width: int) -> Image.Image:
    """The shape as a mask, `width` pixels wide."""
    mask = Image.new("L", (width, width), 0)
    draw, last, half = ImageDraw.Draw(mask), width - 1, (width - 1) / 2
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
    if shape == "ring":
        draw.ellipse((0.29 * last, 0.29 * last, 0.71 * last, 0.71 * last), fill=0)
    elif shape == "square":
        draw.rectangle((0.05 * last, 0.05 * last, 0.95 * last, 0.95 * last), fill=255)
    elif shape == "triangle":
        draw.polygon([(half, 0), (last, 0.94 * last), (0, 0.94 * last)], fill=255)
    elif shape == "cross":
        draw.rectangle((0.32 * last, 0, 0.68 * last, last), fill=255)
        draw.rectangle((0, 0.32 * last, last, 0.68 * last), fill=255)
    elif shape == "star":
        radii = (1.06, 0.46)
        angles = [(radii[i % 2], i * pi / 5) for i in range(10)]
        draw.polygon([(half + r * half * sin(a), 1.06 * half - r * half * cos(a)) for r, a in angles], fill=255)
    return mask


@cache
def _ink(texture: str, shape: str, width: int, pixel: int) -> Image.Image:
    """A mask of the texture's dark ink; `pixel` is 1/64 of the picture's width. A rim stays in the pure colour, so that
    the outline remains visible on a dark background."""
    ink, pitch = Image.new("L", (width, width), 0), 6 * pixel
    draw = ImageDraw.Draw(ink)
    if texture == "striped":
        for y in range(pitch // 2, width, pitch):
            draw.rectangle((0, y, width, y + int(0.42 * pitch)), fill=255)
    elif texture == "dotted":
        radius, first = 0.31 * pitch, width // 2 % pitch
        for row, y in enumerate(range(first, width, pitch)):
            for x in range(first - pitch // 2 * (row % 2), width + pitch, pitch):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    inside = Image.new("L", (width + 2 * pixel, width + 2 * pixel), 0)
    inside.paste(_outline(shape, width), (pixel, pixel))
    inside = inside.filter(ImageFilter.MinFilter(2 * pixel - 1))
    inside = inside.crop((pixel, pixel, pixel + width, pixel + width))
    return ImageChops.multiply(ink, inside)


def draw_scene(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """The scene as an antialiased picture of size x size pixels. `rng` varies only the shades of the colours."""

    def vary(rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
        shift = rng.randint(-by, by)
        red, green, blue = (min(255, max(0, value + shift)) for value in rgb)
        return red, green, blue

    fine = size * SUPERSAMPLING
    picture = Image.new("RGB", (fine, fine), vary(BACKGROUNDS[scene.background], 7))
    for thing in scene.things:
        width = round(thing.width * fine)
        paint = vary(COLOURS[thing.colour], 10)
        tile = Image.new("RGB", (width, width), paint)
        if thing.texture != "plain":
            red, green, blue = (int(0.45 * value) for value in paint)
            tile.paste((red, green, blue), (0, 0), _ink(thing.texture, thing.shape, width, max(1, fine // 64)))
        corner = round(thing.x * fine - width / 2), round(thing.y * fine - width / 2)
        picture.paste(tile, corner, _outline(thing.shape, width))
    return picture.reduce(SUPERSAMPLING)


def encode_jpeg(picture: Image.Image) -> bytes:
    """JPEG at quality 92 with full colour resolution: small things keep their colours."""
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=92, subsampling=0)
    return out.getvalue()
