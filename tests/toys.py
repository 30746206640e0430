"""Small pictures, samples, tars, shards and tokenizers, good and bad, and what many tests ask of a command.

A sample is a dict: "key", and one entry per member (None: it has none), as img2dataset lays them out.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import ShardReader, load_manifest

# What the loader's tests ask for: pixels of a crop and of a patch, sequences of a global batch.
SIZE, PATCH = 32, 8
COUNTS = {"images": 12, "pairs": 12, "texts": 24}

Sample = dict  # {"key": str, "jpg": bytes, "txt": bytes or str, ...}
Members = Iterable[tuple[str | tarfile.TarInfo, bytes | None]]


def picture(seed: int = 0, height: int = 40, width: int = 48) -> np.ndarray:
    """A smooth random picture uint8 [height, width, 3]: noise would not survive JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def black_png(width: int, height: int, rows: int, bits: int = 8) -> bytes:
    """A few bytes that promise width x height pixels, of which only some rows are there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + width * bits // 8)
    data = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """900 Mpx in 900 kB."""
    return black_png(width, height, rows=height // 30)


def image_sample(key: str, seed: int = 0, **size: int) -> Sample:
    return {"key": key, "jpg": encoded(picture(seed, **size)), "json": b"{}"}


def pair_sample(key: str, seed: int = 0, text: str | None = None, **size: int) -> Sample:
    return image_sample(key, seed, **size) | {"txt": (text or f"picture number {seed}").encode()}


def text_sample(key: str, text: str) -> Sample:
    return {"key": key, "txt": text.encode(), "json": b"{}"}


def numbered_samples(shard: int, stop: int, start: int = 0) -> list[Sample]:
    """Samples whose members repeat their key, which says the shard and the number."""
    keys = [f"{shard:05d}{number:04d}" for number in range(start, stop)]
    return [{"key": key, "jpg": f"picture {key}".encode() * 300, "txt": key, "json": b"{}"} for key in keys]


def write_tar(path: Path, members: dict[str, bytes] | Members, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def write_shard(directory: Path, number: int, samples: Sequence[Sample], stats: bool = True) -> Path:
    """The tar, and what img2dataset writes beside it when the shard is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    members = [
        (f"{sample['key']}.{ending}", data.encode() if isinstance(data, str) else data)
        for sample in samples
        for ending, data in sample.items()
        if ending != "key" and data is not None
    ]
    path = write_tar(directory / f"{number:05d}.tar", members, format=tarfile.GNU_FORMAT)
    if stats:
        text = json.dumps({"count": len(samples), "successes": len({sample["key"] for sample in samples})})
        path.with_name(f"{path.stem}_stats.json").write_text(text)
    return path


def write_source(directory: Path, shards: Sequence[Sequence[Sample]]) -> Path:
    """Tars, `_stats.json`, `.idx` and `manifest.json`; returns the directory: a recipe's `shards`."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        write_shard(directory, number, samples)
    return index_source(directory)


def numbered_source(directory: Path) -> Path:
    """Three shards of 1, 2 and 3 numbered samples."""
    return write_source(directory, [numbered_samples(shard, shard + 1) for shard in range(3)])


def index_source(directory: Path) -> Path:
    index_directory(directory)
    return directory


def read_all(source: Path | ShardReader) -> list[dict[str, bytes]]:
    """Every sample, as training reads it."""
    reader = source if isinstance(source, ShardReader) else ShardReader(load_manifest(str(source)))
    return [reader.read(shard, i) for shard, count in enumerate(reader.manifest.counts) for i in range(count)]


def read_members(directory: Path) -> dict[str, bytes]:
    """Name -> content of the members of all tars; a name that comes twice is an error."""
    members: dict[str, bytes] = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return members


def write_text_model(path: Path, lines: Iterable[str], vocab_size: int) -> Path:
    """A SentencePiece model of these lines."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_writer=data, vocab_size=vocab_size, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(data.getvalue())
    return path


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, and as on a full disk the write that comes there is only done in part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def refused(capsys: pytest.CaptureFixture, main: Callable[[list[str]], int], *arguments: object) -> str:
    """The one sentence with which a command refuses its arguments; asserts that it does, with exit code 2."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def needs(package: str) -> None:
    """Skips the test, or the whole module, where a package is missing that the environment scripts install. With CI
    set it fails: there the scripts have run, and nobody reads the list of what was skipped."""
    try:
        if package == "img2dataset":
            from data_tools import download  # it needs pyarrow, which the tests of a GPU do without

            download.find_python()  # it has an environment of its own
        elif importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; run bash tests/run.sh, which installs it")
    except ValueError as error:
        missing = str(error)
    else:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and {missing}", pytrace=False)
    pytest.skip(missing, allow_module_level=True)
