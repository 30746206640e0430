"""A list like LAION's with every kind of row and picture, and the expected outcome of each row.

`make_list` uses a HostileServer with: all of its kinds; copies of pictures under other URLs; pictures and captions of
an evaluation set; blank, tiny and narrow pictures; a caption with many pictures; and rows that cannot be used.
"""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from tests.data_tools.hostile_server import ATTACKS, BAD, GOOD, HostileServer, picture
from tests.toys import encoded

KEPT = ("kept", "")
# The options of filter_list, filter_shards, dedup and leaks with which the fates below come true.
LIST_OPTIONS = (
    "--min-similarity 0.28 --max-punsafe 0.5 --max-pwatermark 0.8 --min-side 64 --max-aspect 3 --min-caption-words 3 "
    "--language en --unique-urls"
)
MOST_REPEATS, MOST_ASPECT = 20, 3.2
_PER_GOOD, _PER_BAD, _PER_ATTACK, _EVALUATION = 64, 10, 3, 12
_NOT_HTTP = ("file", "data", "ftp")
_SALE = "everything in our shop is on sale today"
# Reason of filter_list -> captions.
_CAPTIONS: dict[str, list[bytes | None]] = {
    "long_caption": [b"x" * 10_000_000, b"all work and no play " * 4000],
    "not_utf8": [b"a photo of \xff\xfe\xfd in the garden"],
    "nul_byte": [b"a cat\0on the roof of a house", b"\0"],
    "empty_caption": [b"", b"  \t ", None],
    "caption_too_long": [b"a long walk along the river in the evening light " * 60],
    "caption_is_url": [b"https://shop.example/red-shoes", b"www.shop.example"],
    "caption_is_filename": [b"IMG_1234.jpg", b"DSC 0042"],
    "caption_without_letters": [b"12345", b"2019-04-03 12:00"],
    "caption_few_letters": [b"12x18cm 3/4 (004)"],
    "caption_boilerplate": [b"Click to view larger image", b"stock photo"],
    "caption_markup": [b"<b>sale</b> of shoes", b"{{ product.title }} shoe"],
    "caption_same_character": [b"what a daaaaaaaaaaaaay in the mountains"],
    "caption_repeats_words": [b"buy now buy now buy now"],
    "caption_long_token": [b"cat " + b"a1b2" * 10],
    "caption_too_short": [b"two words"],
    "other_language": [
        b"Ein alter Mann sitzt mit seinem Hund auf einer Bank vor dem Haus",
        "Старый дом у реки и красная лодка на берегу".encode(),  # noqa: RUF001
        "一只猫坐在屋顶上看着月亮和星星".encode(),
    ],
}
_NUMBERS: dict[str, list[dict[str, float | None]]] = {
    "low_similarity": [{"similarity": 0.1}, {"similarity": None}, {"similarity": float("nan")}],
    "unsafe": [{"punsafe": 0.9}, {"punsafe": None}],
    "watermark": [{"pwatermark": 0.95}],
    "too_small": [{"width": 63.0}, {"height": 1.0}],
    "extreme_aspect": [{"width": 2000.0, "height": 400.0}],
}


@dataclass(frozen=True)
class Row:
    url: str | None
    caption: bytes | None
    fate: tuple[str, str]  # (the step that drops it, its reason), or KEPT
    similarity: float | None = 0.35
    punsafe: float | None = 0.01
    pwatermark: float | None = 0.1
    width: float | None = 640.0
    height: float | None = 480.0
    group: str = ""  # of each group the first row is kept


@dataclass(frozen=True)
class Planted:
    directory: Path  # of the list
    evaluation: Path  # a folder of pictures with coco.json
    rows: list[Row]
    pictures: dict[int, bytes]  # row -> its expected bytes in the shards, if known


def make_list(place: Path, server: HostileServer, seed: int = 0) -> Planted:
    """Writes PLACE/list/part-0000*.parquet and PLACE/evaluation."""
    numbers = iter(range(1_000_000))
    rows = [
        *_of_the_server(server, numbers),
        *_copies(server, numbers),
        *_dull(server, numbers),
        *_leaks(place / "evaluation", server, numbers),
        *_that_no_list_should_hold(server, numbers),
    ]
    random.Random(seed).shuffle(rows)
    # A shard takes as long as its slowest picture, so slow ones are next to each other.
    rows.sort(key=lambda row: row.fate != ("download", "deadline"))
    rows = _settled(rows)
    _write(place / "list", rows)
    raw = {n: picture(int(row.url.rsplit("/", 1)[1])) for n, row in enumerate(rows) if row.url and "/jpg/" in row.url}
    return Planted(place / "list", place / "evaluation", rows, raw)


def _words(number: int) -> bytes:
    return b"picture number %d of a thousand, painted by a machine" % number


def _of_the_server(server: HostileServer, numbers: Iterator[int]) -> Iterator[Row]:
    for kinds, count in ((GOOD, _PER_GOOD), (BAD, _PER_BAD), (ATTACKS, _PER_ATTACK)):
        for kind, reason in kinds.items():
            fate = KEPT if reason == "success" else ("download", reason)
            for number in (next(numbers) for _ in range(count)):
                at = ("filter_list", "bad_url") if kind in _NOT_HTTP else fate
                yield Row(server.url(kind, number), _words(number), at)


def _copies(server: HostileServer, numbers: Iterator[int]) -> Iterator[Row]:
    """Groups of the same picture: the same URL, the same bytes, recoded and resized."""
    for n in (next(numbers) for _ in range(10)):
        for copy in (b" once", b" twice", b" thrice"):
            yield Row(server.url("jpg", n), _words(n) + copy, ("filter_list", "duplicate_url"), group=f"url{n}")
    for n in (next(numbers) for _ in range(10)):
        for kind in ("jpg", "wrong_type", "redirect"):
            yield Row(server.url(kind, n), _words(n) + kind.encode(), ("dedup", "exact_duplicate"), group=f"exact{n}")
    for n in (next(numbers) for _ in range(10)):
        for kind in ("jpg", "png", "webp", "cmyk"):
            yield Row(server.url(kind, n), _words(n) + kind.encode(), ("dedup", "near_duplicate"), group=f"near{n}")
    for n in (next(numbers) for _ in range(5)):
        # The one with the most pixels is kept, whatever the order.
        large = _open_picture(n).resize((240, 180), Image.Resampling.BICUBIC)
        yield Row(server.serve(f"{n}/large", encoded(large, quality=95)), _words(n) + b" large", KEPT)
        small = encoded(large.resize((120, 90)), quality=50)
        yield Row(server.serve(f"{n}/small", small), _words(n) + b" small", ("dedup", "near_duplicate"))


def _dull(server: HostileServer, numbers: Iterator[int]) -> Iterator[Row]:
    random = np.random.default_rng(0)
    square = np.full((160, 160, 3), 255, np.uint8)
    square[40:50, 40:50] = 0
    speckled = random.integers(123, 134, (160, 160, 3)).astype(np.uint8)
    speckled[20:36, 20:36] = 0
    flat = {f"blank{level}": np.full((90, 120, 3), level, np.uint8) for level in (0, 128, 255)}
    for name, pixels, reason in (
        *((name, pixels, "blank") for name, pixels in flat.items()),
        ("square", square, "low_entropy"),
        ("speckled", speckled, "one_colour"),
    ):
        data = encoded(Image.fromarray(pixels), quality=95)
        yield Row(server.serve(name, data), _words(next(numbers)), ("filter_shards", reason))
    for size, reason in (((40, 100), "too_small"), ((280, 70), "extreme_aspect")):
        for n in (next(numbers) for _ in range(3)):
            yield Row(server.serve(f"{n}", picture(n, size=size)), _words(n), ("filter_shards", reason))
    cut = next(numbers)
    half = picture(cut)[: len(picture(cut)) // 2]
    yield Row(server.serve(f"{cut}/half", half), _words(cut), ("download", "not_an_image"))
    for n in (next(numbers) for _ in range(MOST_REPEATS + 10)):
        yield Row(server.url("png", n), _SALE.encode(), ("filter_shards", "caption_repeats"), group="sale")


def _leaks(folder: Path, server: HostileServer, numbers: Iterator[int]) -> Iterator[Row]:
    """Copies of evaluation pictures as on the web, and another picture with one of the set's captions."""
    folder.mkdir(parents=True)
    captions = []
    for place in range(_EVALUATION):
        n = next(numbers)
        image = _open_picture(n)
        (folder / f"{n}.jpg").write_bytes(data := encoded(image, quality=92))
        captions.append((f"{n}.jpg", f"evaluation caption number {n} about a place far away"))
        forms = (
            data,
            encoded(image, quality=40),
            encoded(image.resize((image.width * 2, image.height * 2)), quality=80),
            encoded(ImageOps.mirror(image), quality=80),
        )
        yield Row(server.serve(f"{n}/leak", forms[place % 4]), _words(n), ("leaks", "leak:heldout:picture"))
    images = [{"id": number, "file_name": name} for number, (name, _) in enumerate(captions)]
    texts = [{"image_id": number, "caption": text} for number, (_, text) in enumerate(captions)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": texts}))
    leaked = captions[0][1].upper().encode()
    yield Row(server.url("jpg", next(numbers)), leaked, ("leaks", "leak:heldout:caption"))


def _that_no_list_should_hold(server: HostileServer, numbers: Iterator[int]) -> Iterator[Row]:
    for reason, texts in _CAPTIONS.items():
        for text in texts:
            yield Row(server.url("jpg", next(numbers)), text, ("filter_list", reason))
    for reason, changes in _NUMBERS.items():
        for change in changes:
            n = next(numbers)
            yield replace(Row(server.url("jpg", n), _words(n), ("filter_list", reason)), **change)
    for url, reason in (
        (None, "empty_url"),
        ("  ", "empty_url"),
        ("http://a.example/" + "a" * 9000, "long_url"),
        ("http://a.example/\0", "nul_byte"),
        ("http:///jpg/1", "bad_url"),
        ("//cdn.example/1.jpg", "bad_url"),
        ("http://blocked.example/1.jpg", "blocked_domain"),
        ("https://img.cdn.blocked.example:8443/1.jpg", "blocked_domain"),
    ):
        yield Row(url, _words(next(numbers)), ("filter_list", reason))


def _settled(rows: list[Row]) -> list[Row]:
    """The first row of each group, in the list's order, is kept; of the repeated caption the first MOST_REPEATS."""
    counts: defaultdict[str, int] = defaultdict(int)
    settled = []
    for row in rows:
        counts[row.group] += bool(row.group)
        most = MOST_REPEATS if row.group == "sale" else 1
        settled.append(replace(row, fate=KEPT) if row.group and counts[row.group] <= most else row)
    return settled


def _write(directory: Path, rows: list[Row]) -> None:
    """Writes two files like LAION's; the captions of the second are binary, as in some lists."""
    directory.mkdir(parents=True)
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        captions = pa.array([row.caption for row in part], pa.binary())
        table = {
            "SAMPLE_ID": pa.array(range(len(part))),
            "URL": pa.array([row.url for row in part], pa.string()),
            "TEXT": captions if number else captions.view(pa.string()),  # a string column with invalid UTF-8
            "WIDTH": pa.array([row.width for row in part], pa.float64()),
            "HEIGHT": pa.array([row.height for row in part], pa.float64()),
            "SIMILARITY": pa.array([row.similarity for row in part], pa.float64()),
            "PUNSAFE": pa.array([row.punsafe for row in part], pa.float64()),
            "PWATERMARK": pa.array([row.pwatermark for row in part], pa.float64()),
        }
        pq.write_table(pa.table(table), directory / f"part-{number:05d}.parquet", row_group_size=500)


def _open_picture(number: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(number, "PNG"))).convert("RGB")
