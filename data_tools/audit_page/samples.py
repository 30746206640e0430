"""The sections of the audit page that show samples: a wall drawn at random, and what was dropped, reason by reason.

Pictures are made anew and small, so that no byte of a stranger's file gets into the page.
"""

from __future__ import annotations

import base64
from collections import Counter

import cv2
import numpy as np

from data_tools.audit_page.charts import clean, isolated
from data_tools.audit_page.facts import DropExample, Facts
from data_tools.audit_page.sections import heading
from data_tools.audit_page.shard import Place
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.data.transforms import decode_image, read_header

SIDE, QUALITY = 224, 80  # 4 to 12 KB each


def wall(facts: Facts, seed: int) -> str:
    places = facts.wall.things()
    if not places:
        return ""
    about = f"{len(places)} of {facts.samples:,}, drawn at random (--seed {seed})"
    cards = "".join(_card([place], isolated(place.caption), _shard(place), place.key) for place in places)
    return heading("Samples", about) + f'<div class="wall">{cards}</div>'


def dropped(facts: Facts) -> str:
    """The samples that drops files name, with examples that are still in the shards."""
    counts = sum(facts.dropped.values(), Counter[str]())
    if not counts:
        return ""
    blocks = ""
    for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        examples = facts.examples.get(reason, [])
        cards = "".join(map(_example, examples))
        more = f", {len(examples)} are shown" if n > len(examples) else ""
        blocks += f'<h3 class="reason">{clean(reason)} <span>{n:,}{more}</span></h3><div class="wall">{cards}</div>'
    files = ", ".join(f"{name} {found.total():,}" for name, found in facts.dropped.items())
    twice = facts.dropped_samples.again()
    about = f"named in drops files: {clean(files)}" + (f"; {twice:,} more than once" if twice else "")
    return heading("Dropped", about) + blocks


def _example(example: DropExample) -> str:
    places = [place for place in (example.place, example.twin) if place is not None]
    caption = isolated(example.place.caption) if example.place is not None else ""
    why = f'<span class="why">{clean(example.detail)}</span>' if example.detail else ""
    return _card(places, caption + why, example.shard, example.key)


def _card(places: list[Place], text: str, shard: str, key: str) -> str:
    """`text` is HTML."""
    frames, size = "", ""
    for place in places:
        frame, found = _frame(place)
        frames, size = frames + frame, size or found
    frames = frames or '<div class="gone">no longer in these shards</div>'
    name = clean(key if key.startswith(shard) else f"{shard}/{key}")  # img2dataset's keys begin with the shard
    return (
        f'<figure class="sample"><div class="frames">{frames}</div><figcaption>{text}'
        f'<small class="facts"><span>{name}</span><span>{size}</span></small></figcaption></figure>'
    )


def _frame(place: Place) -> tuple[str, str]:
    """(HTML of the picture or of what is wrong with it, "512 x 384")."""
    if not place.size:
        return '<div class="gone">no picture</div>', ""
    try:
        url, size = thumbnail(place)
    except BadSample:
        return '<div class="gone">cannot be decoded</div>', ""
    except OSError:
        return '<div class="gone">its tar is gone</div>', ""
    return f'<img src="{url}" alt="" loading="lazy">', size


def thumbnail(place: Place) -> tuple[str, str]:
    """(the picture as a data: URL, "512 x 384"). Raises BadSample for one that cannot be decoded, OSError for a tar
    that is gone."""
    if place.size > MAX_IMAGE_BYTES:
        raise BadSample(f"{place.size:,} bytes are too many to read")
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
