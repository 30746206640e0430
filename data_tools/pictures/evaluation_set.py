"""Reads an evaluation set as people have it: a folder of pictures with or without a file of captions, or shards.

Files of captions that are understood: COCO's captions_*.json, Karpathy's dataset_*.json, a table with a header (CSV,
TSV or with |), Flickr30K's NAME#0<tab>caption lines. Without one, a picture's captions are the lines of the .txt beside
it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.pictures.hashes import LEAST_CLEAR, caption_hash, hash_shards, look_at, mirrored_thumbnails
from pretrain.data.shards.indexing import map_in_order
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, BadSample
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS

MAX_ANNOTATIONS = 2**30  # bytes; COCO's have 20 to 60 MB
_PICTURES = ("image", "image_name", "filename", "file_name", "filepath", "image_path", "image_id")
_CAPTIONS = ("caption", "comment", "raw", "sentence", "text", "captions", "sentences")
_TOKEN = re.compile(r"(?P<name>[^\t]+?)#\d+\t(?P<caption>.*)")


@dataclass(frozen=True)
class EvaluationSet:
    """P usable pictures, each as it is and, from P on, in a mirror: 2 P hashes."""

    name: str
    pictures: int  # all of them
    damaged: tuple[str, ...]  # "NAME: why"
    flat: int  # compared by their bytes alone
    names: tuple[str, ...]  # [P]
    phash: np.ndarray  # uint64 [2 P]
    thumbnails: np.ndarray  # uint8 [2 P, 192]
    sha256: np.ndarray  # uint64 [pictures, 2]
    captions: np.ndarray  # uint64, sorted: hashes of those with enough words
    short: int  # captions that are too short to tell anything
    left_out: int = 0  # pictures of the set's own training split


def read_evaluation_set(
    name: str, path: Path, captions: Path | None, least_words: int, workers: int, folder: Path
) -> EvaluationSet:
    """`folder`: where hashes of shards are kept; nothing is written to `path`. Raises ValueError where there are no
    pictures, or captions that name none of them."""
    if not path.is_dir():
        raise ValueError(f"--against {name}={path}: there is no such directory; give a folder of pictures or of shards")
    if any(path.glob("*.tar")):
        if captions is not None:
            raise ValueError(f"--captions {name}={captions}: the shards in {path} hold their own; leave the option out")
        return _from_shards(name, path, least_words, workers, folder)
    return _from_pictures(name, path, captions, least_words, workers)


def _from_shards(name: str, path: Path, least_words: int, workers: int, folder: Path) -> EvaluationSet:
    hashes = hash_shards(path, workers, folder)
    if not (hashes.pictures.any() or hashes.words.any()):
        raise ValueError(f"--against {name}={path}: the shards hold neither pictures nor captions")
    usable = np.flatnonzero(hashes.usable)
    bad = np.flatnonzero(hashes.pictures & (hashes.pixels == 0))
    damaged = tuple(f"{shard}/{key}: cannot be decoded" for shard, key, _, _ in hashes.locate(bad))
    telling = hashes.words >= max(least_words, 1)
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
        np.unique(hashes.caption[telling]),
        int((hashes.words > 0).sum() - telling.sum()),
    )


def _from_pictures(name: str, path: Path, captions: Path | None, least_words: int, workers: int) -> EvaluationSet:
    files = sorted(_picture_files(path))
    if not files:
        raise ValueError(f"--against {name}={path}: there is no .{', .'.join(IMAGE_EXTENSIONS)} file in it")
    left_out, texts = 0, list(_sidecars(files))
    if captions is not None:
        texts, training = _annotated(captions, files)
        kept = [file for file in files if file.name not in training]
        left_out, files = len(files) - len(kept), kept
    hashed: list[tuple[bytes, tuple | None, str]] = []
    with map_in_order(_hash_file, files, workers) as results:
        hashed = list(tqdm(results, total=len(files), desc=f"hashing {name}", unit=" pictures", disable=None))
    looks = [(file, look) for file, (_, look, _) in zip(files, hashed, strict=True) if look and look[2] >= LEAST_CLEAR]
    damaged = tuple(f"{file}: {why}" for file, (_, _, why) in zip(files, hashed, strict=True) if why)
    if len(damaged) == len(files):
        raise ValueError(f"--against {name}={path}: none of its {len(files)} pictures can be decoded ({damaged[0]})")
    phash = np.array([look[:2] for _, look in looks], np.uint64).reshape(-1, 2)
    thumbnails = np.frombuffer(b"".join(look[3] for _, look in looks), np.uint8).reshape(len(looks), -1)
    counted = [caption_hash(text) for text in texts]
    return EvaluationSet(
        name,
        len(files),
        damaged,
        len(files) - len(damaged) - len(looks),
        tuple(os.path.relpath(file, path) for file, _ in looks),
        np.concatenate([phash[:, 0], phash[:, 1]]),
        np.concatenate([thumbnails, mirrored_thumbnails(thumbnails)]) if looks else np.zeros((0, 192), np.uint8),
        np.frombuffer(b"".join(digest[:16] for digest, _, _ in hashed if digest), np.uint64).reshape(-1, 2),
        np.unique(np.array([number for number, words in counted if words >= max(least_words, 1)], np.uint64)),
        sum(0 < words < least_words for _, words in counted),
        left_out,
    )


def _picture_files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):
        for name in names:
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                yield Path(folder, name)


def _hash_file(path: Path) -> tuple[bytes, tuple | None, str]:
    """(SHA-256, look, why there is none)."""
    try:
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            return b"", None, f"{size} bytes are more than the {MAX_IMAGE_BYTES} that are read"
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
            yield from filter(str.strip, beside.read_bytes().decode(errors="replace").splitlines())


def _annotated(path: Path, files: list[Path]) -> tuple[list[str], set[str]]:
    """(captions of the pictures that are there, names of pictures in a training split)."""
    if not path.is_file():
        raise ValueError(f"--captions {path}: there is no such file")
    if path.stat().st_size > MAX_ANNOTATIONS:
        raise ValueError(f"--captions {path} has {path.stat().st_size} bytes; at most {MAX_ANNOTATIONS} are read")
    try:
        data = path.read_bytes().decode("utf-8-sig")
        rows = list(_rows_of_json(json.loads(data)) if path.suffix.lower() == ".json" else _rows_of_text(data))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--captions {path} cannot be read ({reason}); give COCO's or Karpathy's JSON, or a table whose header "
            f"names the picture ({', '.join(_PICTURES)}) and the caption ({', '.join(_CAPTIONS)})"
        ) from None
    there = {file.name for file in files}
    training = {name for name, _, split in rows if split in ("train", "restval")}
    found = [caption for name, caption, _ in rows if name in there and name not in training]
    if not found:
        example = rows[0][0] if rows else "nothing"
        raise ValueError(f"--captions {path} names {example!r} and so on, none of the pictures such as {files[0].name}")
    return found, training


def _rows_of_json(content: dict) -> Iterator[tuple[str, str, str]]:
    """(file name, caption, split) of COCO's annotations, or of Karpathy's."""
    images = content["images"]
    if "annotations" in content:
        names = {image["id"]: Path(str(image["file_name"])).name for image in images}
        for annotation in content["annotations"]:
            yield names[annotation["image_id"]], str(annotation["caption"]), ""
        return
    for image in images:
        for sentence in image["sentences"]:
            yield Path(str(image["filename"])).name, str(sentence["raw"]), str(image.get("split", ""))


def _rows_of_text(data: str) -> Iterator[tuple[str, str, str]]:
    lines = data.splitlines()
    if not lines:
        raise ValueError("it is empty")
    if _TOKEN.fullmatch(lines[0]):
        for match in filter(None, map(_TOKEN.fullmatch, lines)):
            yield Path(match["name"]).name, match["caption"], ""
        return
    delimiter = max("\t|,;", key=lines[0].count)
    table = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    header = {str(name).strip().lower(): name for name in table.fieldnames or ()}
    picture, caption = (next((n for n in known if n in header), None) for known in (_PICTURES, _CAPTIONS))
    if picture is None or caption is None:
        raise ValueError(f"its columns are {', '.join(header)}")
    for row in table:
        texts, split = row.get(header[caption]) or "", row.get(header.get("split", ""), "") or ""
        for text in json.loads(texts) if texts.startswith('["') else [texts]:
            yield Path(str(row[header[picture]]).strip()).name, str(text), split.strip()
