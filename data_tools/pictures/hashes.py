"""The hashes by which samples are compared: perceptual hash and SHA-256 of the picture, hash of the caption.

The perceptual hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010,
3.2.1): shrink to 32 x 32 grey levels, take the DCT, keep one bit for each of 64 low waves; similar pictures differ in
few bits. There are two changes, because they measured better on drawings and on noise with a photo's spectrum: we use
the 64 waves of the lowest frequencies instead of a square of 8 x 8, and a bit says whether its wave is above CLEAR
instead of the median. So an absent wave has the same bit whatever noise a codec adds, and distances need not be even.

A shard's hashes are stored in DIR/hashes/NAME.parquet and computed again if the tar's size or time changes.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from data_tools.shards.samples import make_table, samples_of
from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.indexing import complete_shards, map_in_order
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.data.shards.tar_index import Member
from pretrain.visible import visible

FOLDER, VERSION = "hashes", 2
SIDE, BITS, THUMB = 32, 64, 8
# Coefficient of an orthonormal 32 x 32 DCT: a wave of a quarter of a grey level. Recoding changes waves by less.
CLEAR = 4.0
# A picture with fewer clear waves (blank, a gradient, shapes as bright as their ground) has no meaningful hash: only
# its bytes are compared. Photos have 56 or more of 64, 99 % of drawn scenes 19 or more.
LEAST_CLEAR = 12
# The shorter side when decoded: twice what the hash needs, so that a reduced JPEG has the same hash as a full one.
MIN_SIDE = 64
# Close hashes are only a hint; the thumbnails decide. Largest allowed difference (of 255) in any of the 8 x 8 fields:
# of the grey levels with normalised brightness and contrast, of Cr and Cb, and of the raw grey levels. Measured:
# recoded pictures and pictures of other brightness (0.8 to 1.3) or contrast (0.7) stay below 23, 29 and 52, crops of 1
# and 2 % below 25, 17 and 25; 90 % of different drawn scenes with close hashes differ by more than 35 in Cr or Cb.
MOST_GREY, MOST_COLOUR, MOST_LIGHT = 26, 30, 56
_BATCH = 2**13

_BY_FREQUENCY = sorted(((u, v) for u in range(BITS) for v in range(BITS) if u + v), key=lambda w: (sum(w), w))[:BITS]
_ROWS, _COLUMNS = (np.array(waves) for waves in zip(*_BY_FREQUENCY, strict=True))
_MIRROR = np.where(_COLUMNS % 2, -1, 1).astype(np.float32)  # odd waves along x change their sign
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the picture's bytes in the tar; null if the sample has no picture
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),
        ("phash", pa.uint64()),  # null if the picture cannot be decoded
        ("mirrored", pa.uint64()),  # the hash of the mirror image
        ("clear", pa.uint8()),
        ("thumbnail", pa.binary(3 * THUMB**2)),
        ("captions", pa.list_(pa.uint64())),  # of each of its texts that has words
        ("words", pa.list_(pa.int32())),
        ("problem", pa.string()),  # why the picture cannot be decoded
    ]
)
# A CJK character counts as a word, because those scripts put no blanks between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class Look(NamedTuple):
    """What a picture looks like, in 217 bytes."""

    phash: int
    mirrored: int
    clear: int  # how many of the 64 waves are above CLEAR
    thumbnail: bytes  # 8 x 8 fields of Y, Cr, Cb: the hash ignores colours, and most of small things
    width: int
    height: int


def picture_hash(image: Image.Image | np.ndarray) -> int:
    """64 bits of a picture, uint8 [H, W, 3] RGB or a PIL image."""
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
    return _bits(_waves(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)))


def look_at(data: bytes) -> Look:
    """The look of an encoded picture. Raises BadSample if it cannot be decoded."""
    header = read_header(data)
    small = cv2.resize(decode_image(data, MIN_SIDE), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    waves = _waves(small)
    fields = cv2.resize(small, (THUMB, THUMB), interpolation=cv2.INTER_AREA)
    thumbnail = cv2.cvtColor(fields, cv2.COLOR_RGB2YCrCb).tobytes()
    clear = int((np.abs(waves) > CLEAR).sum())
    return Look(_bits(waves), _bits(waves * _MIRROR), clear, thumbnail, header.width, header.height)


def mirrored_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [N, 192] of pictures -> those of their mirror images."""
    fields = thumbnails.reshape(-1, THUMB, THUMB, 3)
    return np.ascontiguousarray(fields[:, :, ::-1]).reshape(thumbnails.shape)


def look_alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [N]: which pairs of thumbnails, uint8 [N, 192] each, may show the same picture."""
    good = np.zeros(len(one), bool)
    for at in range(0, len(one), _BATCH):
        fields = np.stack([part[at : at + _BATCH] for part in (one, other)])
        fields = fields.reshape(2, -1, THUMB**2, 3).astype(np.float32)
        grey = fields[..., 0] - fields[..., 0].mean(axis=2, keepdims=True)
        spread = np.sqrt((grey**2).mean(axis=2, keepdims=True)) + 1
        unlike = np.abs(np.diff(grey / spread, axis=0)[0]).max(axis=1) * np.sqrt(spread.prod(axis=0))[:, 0]
        colours = np.abs(np.diff(fields[..., 1:], axis=0)[0]).max(axis=(1, 2))
        light = np.abs(np.diff(fields[..., 0], axis=0)[0]).max(axis=1)
        fits = (unlike <= MOST_GREY) & (colours <= MOST_COLOUR) & (light <= MOST_LIGHT)
        good[at : at + _BATCH] = fits
    return good


def caption_hash(text: str) -> tuple[int, int]:
    """(64 bits, number of words) of a caption; ignores case, punctuation, blanks and compatible forms of letters."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    digest = hashlib.blake2b(" ".join(words).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little"), len(words)


def _waves(small: np.ndarray) -> np.ndarray:
    """float32 [64]: the lowest waves, without the mean, of a picture uint8 [32, 32, 3]."""
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.dct(grey)[_ROWS, _COLUMNS]


def _bits(waves: np.ndarray) -> int:
    return int.from_bytes(np.packbits(waves > CLEAR).tobytes(), "big")


@dataclass(frozen=True)
class Hashes:
    """The hashes of one directory's N samples, with C texts, in the order of (shard, key), whatever their order in the
    tars. 230 bytes of memory for a sample and 20 for a text; the keys stay on disk."""

    directory: Path
    files: tuple[Path, ...]  # the file of hashes of each shard, sorted by name
    starts: np.ndarray  # [shards + 1], the number of each shard's first sample
    pictures: np.ndarray  # bool [N]: has one, decodable or not
    usable: np.ndarray  # bool [N]: the perceptual hash is meaningful
    pixels: np.ndarray  # int64 [N], 0 if the picture cannot be decoded
    sha256: np.ndarray  # uint64 [N, 2], the first half of it
    phash: np.ndarray  # uint64 [N]
    mirrored: np.ndarray  # uint64 [N]
    thumbnails: np.ndarray  # uint8 [N, 192]
    captions: np.ndarray  # uint64 [C]
    words: np.ndarray  # int32 [C], above 0
    sample: np.ndarray  # int64 [C], the sample of each text

    def __len__(self) -> int:
        return len(self.phash)

    @cached_property
    def damaged(self) -> int:
        """Pictures that cannot be decoded."""
        return int((self.pictures & (self.pixels == 0)).sum())

    def locate(self, rows: np.ndarray) -> list[tuple[str, str, int, int]]:
        """(shard, key, offset and size of the picture in the tar) of each row. Reads one shard's file at a time."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        samples: list = [None] * len(rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            table = pq.read_table(self.files[shard], columns=["key", "offset", "size"])
            shard_rows = table.take(rows[places] - self.starts[shard]).to_pylist()
            for place, row in zip(places.tolist(), shard_rows, strict=True):
                samples[place] = self.files[shard].stem, row["key"], row["offset"] or 0, row["size"] or 0
        return samples


def hash_shards(directory: Path, workers: int = 1, folder: Path | None = None) -> Hashes:
    """The hashes of all complete shards. Files in `folder` (None: DIRECTORY/hashes) that are up to date are not
    computed again, so a killed run continues. Raises ValueError if there is no shard, ShardError for a broken one."""
    tars = complete_shards(directory)[0]
    folder = directory / FOLDER if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    with map_in_order(_up_to_date, [(tar, folder / f"{tar.stem}.parquet") for tar in tars], workers) as results:
        bar = tqdm(results, total=len(tars), desc=visible(f"hashing {directory}"), unit=" shards", disable=None)
        files = tuple(bar)
    parts: list[dict[str, np.ndarray]] = [_columns(pq.read_table(file)) for file in files]
    starts = np.cumsum([0, *(len(part["phash"]) for part in parts)])
    for part, start in zip(parts, starts, strict=False):
        part["sample"] += start
    return Hashes(directory, files, starts, **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    def numbers(name: str) -> np.ndarray:
        return pc.fill_null(table[name], 0).to_numpy()

    def fixed(name: str) -> np.ndarray:
        """uint8 [N, bytes], 0 for null."""
        column = table[name].combine_chunks()
        width, start = column.type.byte_width, column.offset
        flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)[: (start + len(column)) * width].reshape(-1, width)
        return np.where(column.is_valid().to_numpy(zero_copy_only=False)[:, None], flat[start:], 0)

    return {
        "pictures": table["offset"].is_valid().to_numpy(),
        "usable": numbers("clear") >= LEAST_CLEAR,
        "pixels": numbers("width").astype(np.int64) * numbers("height"),
        "sha256": np.ascontiguousarray(fixed("sha256")[:, :16]).view(np.uint64),
        "thumbnails": fixed("thumbnail"),
        **{name: numbers(name) for name in ("phash", "mirrored")},
        **{name: pc.list_flatten(table[name]).to_numpy() for name in ("captions", "words")},
        "sample": np.repeat(np.arange(len(table)), pc.fill_null(pc.list_value_length(table["words"]), 0).to_numpy()),
    }


def _up_to_date(job: tuple[Path, Path]) -> Path:
    make_table(*job, _SCHEMA, VERSION, _hash_shard)
    return job[1]


def _hash_shard(tar: Path) -> Iterator[dict]:
    with open(tar, "rb") as file:
        for sample in samples_of(tar):
            row: dict = {"key": sample.key}
            if sample.picture is not None:
                row |= _hash_picture(file, sample.picture)
            texts = [each for each in map(caption_hash, sample.texts(file)) if each[1]]
            yield row | {"captions": [digest for digest, _ in texts], "words": [words for _, words in texts]}


def _hash_picture(file: BinaryIO, picture: Member) -> dict:
    row: dict = {"offset": picture.offset, "size": picture.size}
    if picture.size > MAX_IMAGE_BYTES:
        return row | {"problem": f"{picture.size} bytes are more than the limit of {MAX_IMAGE_BYTES}"}
    file.seek(picture.offset)
    data = file.read(picture.size)
    row["sha256"] = hashlib.sha256(data).digest()
    try:
        return row | look_at(data)._asdict()
    except BadSample as error:
        return row | {"problem": str(error)}
