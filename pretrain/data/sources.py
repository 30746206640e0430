"""The sources of a recipe's mix (shards of pictures, of pairs, of texts) and how their raw members are decoded.

Only jpg, jpeg, png, webp, txt and json members are read, and only by our own decoders: shards are untrusted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.random import Generator

from pretrain.batch import BOS, EOS, PAD
from pretrain.contracts import Source
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, MOST_CAPTIONS, BadSample
from pretrain.data.text_noise import TextNoise, files_of, noisy
from pretrain.data.text_tokenizer import AnyTokenizer

TEXT, METADATA, CAPTIONS = "txt", "json", "captions"
# Only a stretch of a long document is tokenised: four times as long as English needs for a window (4 letters per id).
WINDOW_CHARACTERS_PER_ID = 16

# (encoded picture, the sample's generator) -> uint8 [3, size, size]: a transforms.ImageTransform.
Transform = Callable[[bytes, Generator], np.ndarray]


class Raw(NamedTuple):
    """One decoded sample, before masking."""

    image: np.ndarray | None  # uint8 [3, size, size]
    ids: np.ndarray | None  # int64 [text_len], padded with PAD after EOS
    extra: Mapping[str, Any] = {}  # labels, answers, several captions ...: see Batch.extra


@dataclass(frozen=True)
class ImageShards(Source):
    """Pictures only; captions beside them are not read.

    `crops`: the number of fixed looks at each picture, one per epoch, so that their codes can be stored; 0: a new crop
    in every epoch. `codes`: the ending of the files of stored codes (pretrain.encode_images --name), which training
    then reads instead of running the visual tokenizer; see codes.py. `weights`: one for each pattern of `shards`, how
    often an epoch looks at each of its samples, on average (see weighted.py); (): once.
    """

    shards: str | tuple[str, ...]
    crops: int = 0
    codes: str | None = None
    weights: tuple[float, ...] = ()
    slots = ("images",)
    text_len: ClassVar[int] = 0  # type: ignore[misc]  # it has no text

    def __post_init__(self) -> None:
        _check_codes("images", self.crops, self.codes)
        _check_weights("images", self.shards, self.weights)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The extensions of the members to read."""
        return IMAGE_EXTENSIONS

    def decode(self, members: Mapping, transform: Transform | None, tokenizer, rng: Generator) -> Raw:
        assert transform is not None
        return Raw(transform(picture(members), rng), None)


@dataclass(frozen=True)
class PairShards(Source):
    """Pictures with captions. A caption longer than `text_len` ids (with BOS and EOS) is truncated. `crops`, `codes`
    and `weights` as for ImageShards. `noise` changes the text before it is cut; see text_noise.py."""

    shards: str | tuple[str, ...]
    text_len: int = 64
    crops: int = 0
    codes: str | None = None
    weights: tuple[float, ...] = ()
    noise: TextNoise | None = None
    slots = ("pairs", "dual")

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*IMAGE_EXTENSIONS, TEXT)

    def __post_init__(self) -> None:
        _check_length("pairs", self.text_len)
        _check_codes("pairs", self.crops, self.codes)
        _check_weights("pairs", self.shards, self.weights)

    @property
    def files(self) -> tuple[str, ...]:
        """Other files that it reads; a run notes a digest of their content."""
        return files_of(self.noise)

    def decode(
        self, members: Mapping, transform: Transform | None, tokenizer: AnyTokenizer | None, rng: Generator
    ) -> Raw:
        assert transform is not None and tokenizer is not None
        ids = caption_ids(
            noisy(text_of(members), self.noise, rng), tokenizer, self.text_len
        )  # before the picture, because a bad caption is cheaper to detect
        return Raw(transform(picture(members), rng), ids)


@dataclass(frozen=True)
class CaptionShards(PairShards):
    """Pictures with several captions each, as COCO and Flickr30k have them: a sample's JSON holds `captions`, a list of
    texts, and its txt is not read. For a picture of Karpathy's dataset_coco.json or dataset_flickr30k.json that list is
    `[sentence["raw"] for sentence in picture["sentences"]]`.

    The first caption is the pair's text, or with `draw` one that the sample's generator draws anew in each epoch;
    `extra["captions"]` has all of them, int64 [captions, text_len].
    """

    draw: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*IMAGE_EXTENSIONS, METADATA)

    def decode(
        self, members: Mapping, transform: Transform | None, tokenizer: AnyTokenizer | None, rng: Generator
    ) -> Raw:
        assert transform is not None and tokenizer is not None
        texts = [noisy(text, self.noise, rng) for text in captions_of(members)]
        ids = np.stack([caption_ids(text, tokenizer, self.text_len) for text in texts])
        number = int(rng.integers(len(ids))) if self.draw else 0
        return Raw(transform(picture(members), rng), ids[number], {CAPTIONS: ids})


@dataclass(frozen=True)
class TextShards(Source):
    """Documents. Of one longer than `text_len` ids, each epoch takes another stretch. `weights` and `noise` as for
    PairShards."""

    shards: str | tuple[str, ...]
    text_len: int = 196
    weights: tuple[float, ...] = ()
    noise: TextNoise | None = None
    slots = ("texts",)

    @property
    def wanted(self) -> tuple[str, ...]:
        return (TEXT,)

    def __post_init__(self) -> None:
        _check_length("texts", self.text_len)
        _check_weights("texts", self.shards, self.weights)

    @property
    def files(self) -> tuple[str, ...]:
        return files_of(self.noise)

    def decode(self, members: Mapping, transform, tokenizer: AnyTokenizer | None, rng: Generator) -> Raw:
        assert tokenizer is not None
        text = noisy(text_of(members), self.noise, rng)
        return Raw(None, window_ids(text, tokenizer, self.text_len, rng))


def picture(members: Mapping) -> bytes:
    """The sample's picture, still encoded. BadSample if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise BadSample(f"no picture ({', '.join(IMAGE_EXTENSIONS)}) among its members: {_names(members)}")


def text_of(members: Mapping) -> str:
    """The sample's caption or document. BadSample if it is missing, blank or not UTF-8."""
    if TEXT not in members:
        raise BadSample(f"no text (txt) among its members: {_names(members)}")
    try:
        text = members[TEXT].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"its text is not UTF-8 (byte {error.start} of {len(members[TEXT])})") from None
    if not text.strip():
        raise BadSample("its text is empty")
    return text


def check_count(captions: list) -> None:
    """BadSample for more captions of a picture than are read."""
    if len(captions) > MOST_CAPTIONS:
        raise BadSample(f"it has {len(captions)} captions; at most {MOST_CAPTIONS} are read")


def captions_of(members: Mapping) -> list[str]:
    """The sample's list of captions. BadSample if there is none, or if one of them is no text or blank."""
    if METADATA not in members:
        raise BadSample(f"no json among its members: {_names(members)}")
    try:
        content = json.loads(members[METADATA])
    except (ValueError, RecursionError):
        raise BadSample("its json cannot be read") from None
    captions = content.get(CAPTIONS) if isinstance(content, dict) else None
    if not isinstance(captions, list) or not captions:
        raise BadSample(f'its json has no list "{CAPTIONS}"')
    check_count(captions)
    if not all(isinstance(text, str) and text.strip() for text in captions):
        raise BadSample("one of its captions is empty or no text")
    return captions


def caption_ids(text: str, tokenizer: AnyTokenizer, length: int) -> np.ndarray:
    """int64 [length]: BOS, the beginning of the text, EOS, PAD. BadSample if the text has no ids."""
    return _pad(tokenizer.encode(text, max_len=length), length)


def window_ids(text: str, tokenizer: AnyTokenizer, length: int, rng: Generator) -> np.ndarray:
    """int64 [length]: BOS, the text or a random stretch of it, EOS, PAD. BadSample if the text has no ids."""
    where, within = rng.random(2).tolist()
    stretch = length * WINDOW_CHARACTERS_PER_ID
    if len(text) > stretch:
        start = int(where * (len(text) - stretch + 1))
        # Start at a word boundary if there is one nearby.
        space = text.find(" ", start, start + WINDOW_CHARACTERS_PER_ID) if start else -1
        text = text[max(space, start) : start + stretch]
    pieces, room = tokenizer.pieces(text), length - 2
    first = int(within * (len(pieces) - room + 1)) if len(pieces) > room else 0
    return _pad([BOS, *pieces[first : first + room], EOS], length)


def _pad(ids: list[int], length: int) -> np.ndarray:
    if len(ids) < 3:
        raise BadSample("its text has nothing that the tokenizer encodes")
    padded = np.full(length, PAD, dtype=np.int64)
    padded[: len(ids)] = ids
    return padded


def _names(members: Mapping) -> str:
    return ", ".join(sorted(str(name) for name in members if not str(name).startswith("__"))) or "none"


def _check_codes(kind: str, crops: int, codes: str | None) -> None:
    if crops < 0:
        raise ValueError(f"{kind}.crops={crops} is negative; use 0 for a new crop in every epoch")
    if codes is not None and not re.fullmatch(r"codes[\w-]*", codes):
        raise ValueError(f"{kind}.codes={codes!r} is not a valid name of stored codes; use the --name of encode_images")
    if codes is not None and not crops:
        raise ValueError(f"{kind}.codes={codes!r} but crops=0; set crops to the --crops of encode_images")


def _check_weights(kind: str, shards: str | tuple[str, ...], weights: tuple[float, ...]) -> None:
    patterns = (shards,) if isinstance(shards, str) else shards
    if weights and len(weights) != len(patterns):
        raise ValueError(f"{kind}.weights={weights} are not one for each of the {len(patterns)} patterns of shards")
    if weights and not (all(math.isfinite(weight) and weight >= 0 for weight in weights) and any(weights)):
        raise ValueError(f"{kind}.weights={weights} must be numbers of at least 0, not all 0; 1 is one look an epoch")


def _check_length(kind: str, length: int) -> None:
    if length < 3:
        raise ValueError(f"{kind}.text_len={length} is wrong because BOS, one word and EOS need 3; use 64")
