"""Reads an evaluation set: a folder of pictures, with or without a file of captions, or shards.

Supported files of captions: COCO's captions_*.json, Karpathy's dataset_*.json, a table with a header (CSV, TSV or with
|; its captions may be lists), Flickr30K's NAME#0<tab>caption lines. Without one, a picture's captions are the lines of
the .txt beside it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.inputs.tables import BadRow, Table, texts_in
from data_tools.inputs.text_stream import check_regular, open_text
from data_tools.pictures.hashes import LEAST_CLEAR, caption_hash, hash_shards, look_at, mirrored_thumbnails
from pretrain.data.shards.indexing import map_in_order
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, BadSample
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS
from pretrain.json_files import parse_json
from pretrain.visible import visible

MAX_ANNOTATIONS = 2**30  # bytes; COCO's have 20 to 60 MB
_PICTURES = ("image", "image_name", "filename", "file_name", "filepath", "image_path", "image_id")
_CAPTIONS = ("caption", "comment", "raw", "sentence", "text", "captions", "sentences")
_Row = tuple[str, str, str]  # (file name, caption, split)
_TOKEN = re.compile(r"(?P<name>[^\t]+?)#\d+\t(?P<caption>.*)")


@dataclass(frozen=True)
class EvaluationSet:
    """P usable pictures and, from index P on, their mirror images: 2 P hashes."""

    name: str
    pictures: int  # all of them
    damaged: tuple[str, ...]  # "NAME: why"
    flat: int  # pictures without detail; only their bytes are compared
    names: tuple[str, ...]  # [P]
    phash: np.ndarray  # uint64 [2 P]
    thumbnails: np.ndarray  # uint8 [2 P, 192]
    sha256: np.ndarray  # uint64 [pictures, 2]
    captions: np.ndarray  # uint64, sorted: hashes of those with enough words
    short: int  # captions that are too short to compare
    excluded: int = 0  # pictures of the set's own training split
    bad_rows: tuple[str, ...] = ()  # of the file of captions: "line 3: why it cannot be read"


def read_evaluation_set(
    name: str, path: Path, captions: Path | None, least_words: int, workers: int, folder: Path
) -> EvaluationSet:
    """`folder`: the cache for hashes of shards; nothing is written to `path`. Raises ValueError if there are no
    pictures, or if the captions belong to none of them."""
    if not path.is_dir():
        raise ValueError(
            f"--against {name}={path}: the directory does not exist; give a folder of pictures or of shards"
        )
    if any(tar.is_file() for tar in path.glob("*.tar")):
        if captions is not None:
            raise ValueError(f"--captions {name}={captions}: the shards in {path} have their own; omit the option")
        return _from_shards(name, path, least_words, workers, folder)
    return _from_pictures(name, path, captions, least_words, workers)


def _from_shards(name: str, path: Path, least_words: int, workers: int, folder: Path) -> EvaluationSet:
    hashes = hash_shards(path, workers, folder)
    if not (hashes.pictures.any() or len(hashes.words)):
        raise ValueError(f"--against {name}={path}: the shards contain neither pictures nor captions; give others")
    usable = np.flatnonzero(hashes.usable)
    bad = np.flatnonzero(hashes.pictures & (hashes.pixels == 0))
    damaged = tuple(f"{shard}/{key}: cannot be decoded" for shard, key, _, _ in hashes.locate(bad))
    long_enough = hashes.words >= max(least_words, 1)
    thumbnails = hashes.thumbnails[usable]
    return EvaluationSet(
        name,
        int(hashes.pictures.sum()),
        damaged,
        int((hashes.pixels > 0).sum()) - len(usable),
        tuple(f"{shard}/{key}" for shard, key, _, _ in hashes.locate(usable)),
        np.concatenate([hashes.phash[usable], hashes.mirrored[usable]]),
        np.concatenate([thumbnails, mirrored_thumbnails(thumbnails)]),
        hashes.sha256[hashes.pictures],
        np.unique(hashes.captions[long_enough]),
        int((~long_enough).sum()),
    )


def _from_pictures(name: str, path: Path, captions: Path | None, least_words: int, workers: int) -> EvaluationSet:
    files = sorted(_picture_files(path))
    if not files:
        raise ValueError(
            f"--against {name}={path}: it contains no .{', .'.join(IMAGE_EXTENSIONS)} file; give another folder"
        )
    excluded, texts, bad_rows = 0, list(_sidecars(files)), tuple[BadRow, ...]()
    if captions is not None:
        texts, training, bad_rows = _read_captions(captions, files)
        evaluated = [file for file in files if file.name not in training]
        excluded, files = len(files) - len(evaluated), evaluated
    hashes: list[tuple[bytes, tuple | None, str]] = []
    with map_in_order(_hash_file, files, workers) as results:
        hashes = list(tqdm(results, total=len(files), desc=visible(f"hashing {name}"), unit=" pictures", disable=None))
    looks = [(file, look) for file, (_, look, _) in zip(files, hashes, strict=True) if look and look[2] >= LEAST_CLEAR]
    damaged = tuple(f"{file}: {why}" for file, (_, _, why) in zip(files, hashes, strict=True) if why)
    if len(damaged) == len(files):
        raise ValueError(f"--against {name}={path}: none of its {len(files)} pictures can be decoded ({damaged[0]})")
    phash = np.array([look[:2] for _, look in looks], np.uint64).reshape(-1, 2)
    thumbnails = np.frombuffer(b"".join(look[3] for _, look in looks), np.uint8).reshape(len(looks), -1)
    caption_hashes = [caption_hash(text) for text in texts]
    return EvaluationSet(
        name,
        len(files),
        damaged,
        len(files) - len(damaged) - len(looks),
        tuple(os.path.relpath(file, path) for file, _ in looks),
        np.concatenate([phash[:, 0], phash[:, 1]]),
        np.concatenate([thumbnails, mirrored_thumbnails(thumbnails)]) if looks else np.zeros((0, 192), np.uint8),
        np.frombuffer(b"".join(digest[:16] for digest, _, _ in hashes if digest), np.uint64).reshape(-1, 2),
        np.unique(np.array([number for number, words in caption_hashes if words >= max(least_words, 1)], np.uint64)),
        sum(0 < words < least_words for _, words in caption_hashes),
        excluded,
        bad_rows,
    )


def _picture_files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):
        for name in names:
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                yield Path(folder, name)


def _hash_file(path: Path) -> tuple[bytes, tuple | None, str]:
    """(SHA-256, look, why it has none)."""
    try:
        if not path.is_file():
            return b"", None, "is no file"
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            return b"", None, f"{size} bytes are more than the limit of {MAX_IMAGE_BYTES}"
        data = path.read_bytes()
    except OSError as error:
        return b"", None, f"cannot be read ({error.strerror})"
    try:
        return hashlib.sha256(data).digest(), tuple(look_at(data)), ""
    except BadSample as error:
        return hashlib.sha256(data).digest(), None, str(error)


def _sidecars(files: list[Path]) -> Iterator[str]:
    for file in files:
        beside = file.with_suffix(".txt")
        if beside.is_file() and beside.stat().st_size <= MAX_TEXT_BYTES:
            with open_text(beside) as text:
                yield from filter(str.strip, text.read().decode(errors="replace").split("\n"))


def _read_captions(path: Path, files: list[Path]) -> tuple[list[str], set[str], tuple[BadRow, ...]]:
    """(captions of the existing pictures, names of pictures in a training split, rows that cannot be read)."""
    if not path.exists():
        raise ValueError(f"--captions {path}: the file does not exist; check the path")
    check_regular(path, f"--captions {path}")
    try:
        found = list(_rows_of_json(path) if path.suffix.lower() == ".json" else _rows_of_text(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, OSError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"cannot read --captions {path} ({reason}); give COCO's or Karpathy's JSON, or a table whose header "
            f"names the picture ({', '.join(_PICTURES)}) and the caption ({', '.join(_CAPTIONS)})"
        ) from None
    rows = [row for row in found if not isinstance(row, BadRow)]
    names = {file.name for file in files}
    training = {name for name, _, split in rows if split in ("train", "restval")}
    captions = [caption for name, caption, _ in rows if name in names and name not in training]
    if not captions:
        example = rows[0][0] if rows else "nothing"
        raise ValueError(
            f"--captions {path} has captions of other pictures, such as {example!r}; the set has {files[0].name} ...; "
            "give the file of this set"
        )
    return captions, training, tuple(row for row in found if isinstance(row, BadRow))


def _rows_of_json(path: Path) -> Iterator[_Row]:
    """COCO's annotations, or Karpathy's."""
    with open_text(path) as file:
        data = file.read(MAX_ANNOTATIONS + 1)
    if len(data) > MAX_ANNOTATIONS:
        raise ValueError(f"it has more than {MAX_ANNOTATIONS} bytes")
    content = parse_json(data)
    images = content["images"]
    if "annotations" in content:
        names = {image["id"]: Path(str(image["file_name"])).name for image in images}
        for annotation in content["annotations"]:
            yield names[annotation["image_id"]], str(annotation["caption"]), ""
        return
    for image in images:
        for sentence in image["sentences"]:
            yield Path(str(image["filename"])).name, str(sentence["raw"]), str(image.get("split", ""))


def _rows_of_text(path: Path) -> Iterator[_Row | BadRow]:
    with open_text(path) as file:
        if _TOKEN.match(file.readline(MAX_TEXT_BYTES).decode(errors="replace")):
            yield from _rows_of_token(path)
            return
    table = Table(path, b"\t" if path.suffix.lower() == ".tsv" else b",")
    header: dict[str, int] = {}
    for place, name in enumerate(table.columns):
        header.setdefault(name.lower(), place)
    picture, caption = (next((n for n in names if n in header), None) for names in (_PICTURES, _CAPTIONS))
    if picture is None or caption is None:
        raise ValueError(f"its columns are {', '.join(header)}")
    for row in table.rows():
        if isinstance(row, BadRow):
            yield row
            continue
        cells = [cell.decode(errors="replace").strip() for cell in row]
        name, split = Path(cells[header[picture]]).name, cells[header["split"]] if "split" in header else ""
        text = cells[header[caption]]
        for each in texts_in(text) or [text]:
            yield name, each, split


def _rows_of_token(path: Path) -> Iterator[_Row | BadRow]:
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES), b""), 1):
            text = line.decode(errors="replace").rstrip("\r\n")
            if match := _TOKEN.fullmatch(text):
                yield Path(match["name"]).name, match["caption"], ""
            elif text.strip():
                yield BadRow(f"line {number}: it is not NAME#0<tab>caption")
