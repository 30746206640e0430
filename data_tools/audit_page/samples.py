"""The sections of the audit page that show samples: a wall of random ones, and examples of dropped ones by reason.

Pictures are re-encoded as thumbnails, so that no byte of an untrusted file gets into the page.
"""

from __future__ import annotations

import base64
from collections import Counter
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.audit_page.facts import DropExample, Facts
from data_tools.audit_page.sections import Section
from data_tools.audit_page.shard import Place
from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, BadSample

SIDE, QUALITY = 224, 80  # 4 to 12 KB each


class Card(NamedTuple):
    frames: list[tuple[str, str]]  # (data URI of a picture, or what is wrong with it)
    caption: str | None
    why: str
    name: str
    size: str  # of the first picture


def wall(facts: Facts, seed: int) -> Section | None:
    places = facts.wall.items()
    if not places:
        return None
    about = f"{len(places)} of {facts.samples:,}, at random (--seed {seed})"
    cards = [_card([place], place.caption, "", _shard(place), place.key) for place in places]
    return {"title": "Samples", "about": about, "cards": cards}


def dropped(facts: Facts) -> Section | None:
    """The samples that drops files name, with examples, as far as these are still in the shards."""
    counts = sum(facts.dropped.values(), Counter[str]())
    if not counts:
        return None
    files = ", ".join(f"{name} {counter.total():,}" for name, counter in facts.dropped.items())
    repeats = facts.dropped_samples.count()
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "title": "Dropped",
        "about": f"named in drops files: {files}" + (f"; {repeats:,} more than once" if repeats else ""),
        "reasons": [(reason, n, [_example(each) for each in facts.examples.get(reason, [])]) for reason, n in reasons],
    }


def _example(example: DropExample) -> Card:
    places = [place for place in (example.place, example.twin) if place is not None]
    caption = example.place.caption if example.place is not None else None
    return _card(places, caption, example.detail, example.shard, example.key)


def _card(places: list[Place], caption: str | None, why: str, shard: str, key: str) -> Card:
    frames, size = [], ""
    for place in places:
        picture, problem, of_picture = _frame(place)
        frames.append((picture, problem))
        size = size or of_picture
    name = key if key.startswith(shard) else f"{shard}/{key}"  # img2dataset's keys begin with the shard
    return Card(frames or [("", "no longer in these shards")], caption, why, name, size)


def _frame(place: Place) -> tuple[str, str, str]:
    """(data URI of the picture, or what is wrong with it, "512 x 384")."""
    if not place.size:
        return "", "no picture", ""
    try:
        url, size = thumbnail(place)
    except BadSample:
        return "", "cannot be decoded", ""
    except OSError:
        return "", "its tar is missing", ""
    return url, "", size


def thumbnail(place: Place) -> tuple[str, str]:
    """(the picture as a data: URL, "512 x 384"). Raises BadSample if it cannot be decoded, OSError if the tar is
    missing."""
    if place.size > MAX_IMAGE_BYTES:
        raise BadSample(f"{place.size:,} bytes are above the limit")
    with open(place.tar, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.size)
    header = read_header(data)
    pixels = decode_image(data, SIDE)
    scale = SIDE / max(pixels.shape[:2])
    if scale < 1:
        size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR)
    done, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode(), f"{header.width} x {header.height}"


def _shard(place: Place) -> str:
    return place.tar.rsplit("/", 1)[-1].removesuffix(".tar")
