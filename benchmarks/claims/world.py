"""The world of benchmarks.claims: boards of 4 x 4 cells. One half of a board holds things of one kind, the other half
those of another.

The words that describe a board describe other boards too: "many red circles are left of few blue squares" is wrong of a
picture with few red circles, with blue circles and red squares, or with the circles on the right, though every word
fits. So words must be bound to places, and a bag of words is at chance. The same holds inside a modality: what a hidden
cell holds follows from the cells of its own half, a hidden word of a document from another sentence about the same
thing.

HELD_OUT of the boards are in no training picture, pair or text. The wrong captions of pairs/noisy are those of other
pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.drawn.scenes import BACKGROUNDS, Scene, Thing, draw_scene, encode_jpeg
from data_tools.shards.writer import ShardWriter
from data_tools.train_text_tokenizer import train as train_tokenizer
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.manifest import MANIFEST
from pretrain.files import write_json

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("circle", "square", "triangle", "ring")
AXES = {"across": ("left", "right"), "down": ("above", "below")}  # where the first half lies, where the second
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ANSWERS = (*COLOURS, *SHAPES, "yes", "no")
COUNTS = {True: ("many", "lots of"), False: ("few", "some")}
CELLS = {True: (6, 8), False: (2, 3)}  # fewest and most of a half's eight cells that hold a thing
CAPTIONS = ("{a} {rel} {b}", "{a} are {rel} {b}", "there are {a} {rel} {b}")
SIDE, SIZE = 4, 48  # cells and pixels along a board's side
HELD_OUT, LOOKS = 192, 4  # boards, and pictures of each
NOISE, WORDS = 0.3, 128  # the share of wrong captions, the vocabulary
SEED = 0


class Group(NamedTuple):
    """The things of one half."""

    colour: str
    shape: str
    many: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}s"


@dataclass(frozen=True)
class Board:
    """`first` lies left of `second`, or above it."""

    axis: str
    first: Group
    second: Group


class Statement(NamedTuple):
    """What a caption says: `a` stands in this relation to `b`."""

    a: Group
    relation: str
    b: Group

    @property
    def board(self) -> Board:
        axis = next(name for name, sides in AXES.items() if self.relation in sides)
        return Board(axis, self.a, self.b) if self.relation == AXES[axis][0] else Board(axis, self.b, self.a)


@dataclass(frozen=True)
class Sizes:
    """How many samples of each kind. `clean`: pairs that stand for those which somebody has checked by hand."""

    pairs: int = 4000
    questions: int = 4000
    images: int = 6000
    texts: int = 6000
    clean: int = 400


def boards() -> tuple[list[Board], list[Board]]:
    """-> those to train on, and the held-out ones, in an order that SEED gives."""
    kinds = list(product(COLOURS, SHAPES))
    every = [
        Board(axis, Group(*one, many), Group(*other, more))
        for axis, (one, other), many, more in product(AXES, permutations(kinds, 2), (True, False), (True, False))
    ]
    random.Random(SEED).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def describe(board: Board, rng: random.Random) -> Statement:
    """The board, seen from one of its halves."""
    low, high = AXES[board.axis]
    return rng.choice((Statement(board.first, low, board.second), Statement(board.second, high, board.first)))


def caption(said: Statement, rng: random.Random) -> str:
    """The statement in at most 14 words."""
    names = {letter: f"{rng.choice(COUNTS[each.many])} {each.name}" for letter, each in (("a", said.a), ("b", said.b))}
    return rng.choice(CAPTIONS).format(**names, rel=rng.choice(RELATIONS[said.relation]))


def foil(said: Statement, rng: random.Random) -> Statement:
    """The statement with one of its facts changed, so that it is not true of its board: the relation, or what is said
    of one of the halves."""
    wrong = [said._replace(relation=CONVERSE[said.relation])]
    wrong += [said._replace(a=other) for other in _others(said.a, rng)]
    wrong += [said._replace(b=other) for other in _others(said.b, rng)]
    return rng.choice(wrong)


def _others(group: Group, rng: random.Random) -> list[Group]:
    """The group with another colour, with another shape, and as many as it has not."""
    colour = rng.choice([each for each in COLOURS if each != group.colour])
    shape = rng.choice([each for each in SHAPES if each != group.shape])
    return [group._replace(colour=colour), group._replace(shape=shape), group._replace(many=not group.many)]


def document(board: Board, rng: random.Random) -> str:
    """Three sentences that repeat the board's facts in other words."""
    said = describe(board, rng)
    back = Statement(said.b, CONVERSE[said.relation], said.a)
    relation = rng.choice(RELATIONS[back.relation])
    sentences = [f"the {back.a.name} are {relation} the {back.b.name}"]
    for each in (board.first, board.second):
        sentences.append(f"there are {rng.choice(COUNTS[each.many])} {each.name}")
    if board.first.shape != board.second.shape:
        each = rng.choice((board.first, board.second))
        sentences.append(f"the {each.shape}s are {each.colour}")
    chosen = [caption(said, rng), *rng.sample(sentences, 2)]
    rng.shuffle(chosen)
    return " . ".join(chosen) + " ."


def question(board: Board, rng: random.Random) -> tuple[str, str]:
    """A question about one half of the board, and its answer, one of ANSWERS."""
    asked, relation, other = describe(board, rng)
    word = rng.choice(RELATIONS[relation])
    if rng.random() < 1 / 3:
        return f"are there many {asked.name}", "yes" if asked.many else "no"
    name = rng.choice(("colour", "shape"))
    return f"what {name} is {word} the {other.name}", getattr(asked, name)


def draw(board: Board, rng: random.Random) -> bytes:
    """The board as a JPEG. Backgrounds and places within the halves are random, and captions don't mention them."""
    things = []
    for number, group in enumerate((board.first, board.second)):
        half = list(product(range(SIDE // 2), range(SIDE)))
        for along, across in rng.sample(half, rng.randint(*CELLS[group.many])):
            spot = along + number * SIDE // 2, across
            column, row = spot if board.axis == "across" else spot[::-1]
            x, y = ((place + 0.5 + rng.uniform(-0.06, 0.06)) / SIDE for place in (column, row))
            things.append(Thing(group.colour, group.shape, "small", "plain", x, y, rng.uniform(0.8, 0.95) / SIDE))
    background = rng.choice([name for name in BACKGROUNDS if name != "navy"])
    scene = Scene(background, tuple(things), AXES[board.axis][0])
    return encode_jpeg(draw_scene(scene, SIZE, rng))


def make_corpus(out: Path, sizes: Sizes) -> None:
    """Writes what is missing of OUT/{pairs,images,texts,questions}/{train,heldout}, OUT/pairs/{noisy,clean}, and
    OUT/{text.model,answers.json}. A pair's JSON has its caption, and under `foil` a wrong one like it."""
    train, held = boards()
    counts = {"pairs": sizes.pairs, "images": sizes.images, "texts": sizes.texts, "questions": sizes.questions}
    for kind, count in counts.items():
        for split, some, wanted in (("train", train, count), ("heldout", held, HELD_OUT * LOOKS)):
            _write(out / kind / split, _samples(kind, split, some, wanted))
    _write(out / "pairs/clean", _samples("pairs", "clean", train, sizes.clean))
    _write(out / "pairs/noisy", _with_noise(_samples("pairs", "train", train, sizes.pairs)))
    if not (out / "text.model").is_file():
        texts = [str(out / kind / "train") for kind in ("pairs", "texts", "questions")]
        train_tokenizer(texts, out / "text.model", WORDS, model_type="bpe")
    write_json(out / "answers.json", ANSWERS)


class Sample(NamedTuple):
    """What stands in a shard, and what its JSON says."""

    picture: bytes | None
    text: str | None
    facts: dict[str, Any] | None = None


def _samples(kind: str, split: str, some: list[Board], count: int) -> Iterator[Sample]:
    return (_sample(kind, split, some, number) for number in range(count))


def _sample(kind: str, split: str, some: list[Board], number: int) -> Sample:
    """Held-out boards one after the other, so that no two candidates of a retrieval are the same; else at random."""
    rng = random.Random(f"{SEED}/{kind}/{split}/{number}")
    board = some[number % len(some)] if split == "heldout" else rng.choice(some)
    if kind == "texts":
        return Sample(None, document(board, rng))
    if kind == "questions":
        asked, answer = question(board, rng)
        return Sample(draw(board, rng), asked, {"answers": [answer] * 10})
    said = describe(board, rng)
    text, other = caption(said, rng), caption(foil(said, rng), rng)
    picture = draw(board, rng)
    return Sample(picture, text, {"captions": [text], "foil": other}) if kind == "pairs" else Sample(picture, None)


def _with_noise(samples: Iterable[Sample]) -> Iterator[Sample]:
    """A share NOISE of them get each other's captions, passed on in a circle."""
    rng, clean = random.Random(f"{SEED}/noise"), list(samples)
    places = rng.sample(range(len(clean)), round(NOISE * len(clean)))
    other = dict(zip(places, places[1:] + places[:1], strict=True))
    for place, sample in enumerate(clean):
        if place in other:
            text = clean[other[place]].text
            sample = Sample(sample.picture, text, {"captions": [text], "wrong": True})
        yield sample


def _write(directory: Path, samples: Iterable[Sample]) -> None:
    if (directory / MANIFEST).is_file():
        return
    with ShardWriter(directory, samples_per_shard=1000) as shard:
        for number, sample in enumerate(samples):
            members = {"jpg": sample.picture, "txt": sample.text and sample.text.encode(),
                       "json": sample.facts and json.dumps(sample.facts).encode()}  # fmt: skip
            shard.write(f"{number:06d}", {name: data for name, data in members.items() if data})
    index_directory(directory)
