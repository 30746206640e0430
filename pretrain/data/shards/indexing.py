"""Writes the manifest.json and the .idx files of a directory of shards, and says which of its shards are complete."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pretrain.data.shards.content import with_checksums
from pretrain.data.shards.left_out import in_words
from pretrain.data.shards.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, Shard, read_manifest
from pretrain.data.shards.overlooked import no_tar, overlooked
from pretrain.data.shards.tar_index import EXTENSIONS, scan_shard
from pretrain.files import sha256_of, write_file
from pretrain.json_files import read_bytes
from pretrain.visible import visible
from pretrain.workers import worker_pool

_SHOWN = 5  # reasons in one sentence


@dataclass(frozen=True)
class IndexResult:
    """The result for one directory."""

    manifest: Manifest
    scanned: int  # shards that were indexed; the others were up to date
    skipped: list[str] = field(default_factory=list)  # "NAME: why"

    @property
    def left_out(self) -> Counter[str]:
        """Members that belong to no sample, by reason (left_out.py)."""
        return sum((Counter(dict(shard.left_out or ())) for shard in self.manifest.shards), Counter[str]())


def complete_shards(directory: Path) -> tuple[list[Path], list[Path]]:
    """(complete, partial) tars of a directory, sorted by name. ValueError, with the way out, if none is complete.

    A tar is partial, left by a killed download of img2dataset, if it lacks the _stats.json that others of its numbering
    have. A .tar that cannot be read at all, such as a dangling link, counts as complete, so that reading it raises an
    error.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the one that contains 00000.tar, 00001.tar, ...")
    tars = sorted(path for path in directory.glob("*.tar") if not (path.name.startswith(".") or path.is_dir()))
    if not tars:
        raise ValueError(no_tar(directory))
    downloaded = {_numbering(path) for path in tars if stats_path(path).exists()}
    partial = {p for p in tars if p.is_file() and _numbering(p) in downloaded and not stats_path(p).exists()}
    return [path for path in tars if path not in partial], sorted(partial)


def _numbering(tar: Path) -> str:
    """The part of a tar's name before its number: "" for 00000.tar, "train-" for train-00000.tar."""
    return tar.stem.rstrip("0123456789")


def check_writable(directory: Path) -> None:
    """Raises ValueError, with the way out, if nothing can be written beside the shards of a directory."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(
            f"{directory} cannot be written to, but files about shards are stored beside them; work in a directory of "
            f"links to them: mkdir links && ln -s {directory.resolve()}/* links/"
        )


def write_beside(path: Path, data: bytes) -> None:
    """Writes a file beside shards, unless it has this content already; then the directory may be read-only."""
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    check_writable(path.parent)
    write_file(path, data)


def stats_path(tar: Path) -> Path:
    """The file that img2dataset writes when a shard is complete."""
    return tar.with_name(f"{tar.stem}_stats.json")


def index_directory(directory: Path, workers: int = 1, skip_broken: bool = False) -> IndexResult:
    """Writes DIRECTORY/manifest.json and one .idx per shard. ShardError, naming the shard, for a broken one unless
    `skip_broken`. Each file is replaced atomically."""
    complete, partial = complete_shards(directory)
    skipped = [f"{path.name}: partial, it has no {stats_path(path).name}" for path in partial]
    skipped += [f"{name}: {why}" for name, why in overlooked(directory)]
    previous = _previous_shards(directory)
    jobs = [(path, previous.get(path.name), skip_broken) for path in complete]
    shards, scanned = [], 0
    with map_in_order(_index_one, jobs, workers) as results:
        bar = tqdm(results, total=len(jobs), desc=visible(f"indexing {directory}"), unit=" shards", disable=None)
        for path, result in zip(complete, bar, strict=True):
            if isinstance(result, str):
                skipped.append(f"{path.name}: {result}")
                continue
            shard, fresh = result
            shards.append(shard)
            scanned += fresh
    result = IndexResult(Manifest(tuple(shards)), scanned, skipped)
    if not result.manifest.samples:
        names = (
            f"no member is called KEY.EXTENSION, with one of {', '.join(EXTENSIONS)} after the first dot of its name"
        )
        reasons = [*in_words(result.left_out).values(), *skipped][:_SHOWN]
        raise ValueError(
            f"the {len(shards)} shards of {directory} contain no sample: {names}"
            + (f" (left out: {'; '.join(reasons)})" if reasons else "")
        )
    write_beside(directory / MANIFEST, result.manifest.to_json())
    return result


def _previous_shards(directory: Path) -> dict[str, Shard]:
    try:
        content = read_bytes(directory / MANIFEST, MAX_MANIFEST_BYTES)
        return {shard.name: shard for shard in read_manifest(content, os.path.join(directory, "")).shards}
    except (FileNotFoundError, ValueError):  # a damaged manifest is about to be replaced
        return {}


def _index_one(job: tuple[Path, Shard | None, bool]) -> tuple[Shard, bool] | str:
    """(shard, whether it had to be scanned), or why a broken one is skipped."""
    path, previous, skip_broken = job
    if _up_to_date(path, previous):
        assert previous is not None
        return previous, False
    check_writable(path.parent)
    try:
        size = path.stat().st_size if path.is_file() else 0  # scan_shard refuses anything but a file
        index, left_out = scan_shard(path)
        index, sha256 = with_checksums(path, index)
        if path.stat().st_size != size:
            raise ValueError(f"{path} changed while it was indexed; wait until the download is done")
    except ValueError as error:
        if skip_broken:
            return str(error)
        raise ValueError(f"{error}; or skip broken shards with --skip-broken") from None
    write_file(path.with_suffix(".idx"), index.data)
    hashes = {"sha256": sha256, "index_sha256": hashlib.sha256(index.data).hexdigest()}
    return Shard(str(path), index.samples, size, left_out=tuple(sorted(left_out.items())), **hashes), True


def _up_to_date(path: Path, previous: Shard | None) -> bool:
    """Whether a shard and its index are those that the manifest lists; reads the shard only if times cannot tell."""
    index = path.with_suffix(".idx")
    try:
        tar, idx = path.stat(), index.stat()
        if previous is None or not previous.sha256 or previous.left_out is None or previous.bytes != tar.st_size:
            return False
        if sha256_of(index) != previous.index_sha256:
            return False
        # rsync and cp -p set a shard's mtime, but not its ctime. If both times are equal, the tar may have been changed
        # right after its index was written.
        if idx.st_mtime_ns > tar.st_ctime_ns:
            return True
        if sha256_of(path) != previous.sha256:
            return False
    except (FileNotFoundError, ValueError):
        return False
    with suppress(OSError):  # this only saves the next call the reading
        os.utime(index)
    return True


@contextmanager
def map_in_order(function, jobs: list, workers: int) -> Iterator[Iterable]:
    """`map` in `workers` processes, with the results in the order of the jobs."""
    if workers <= 1 or len(jobs) <= 1:
        yield map(function, jobs)
        return
    with worker_pool(min(workers, len(jobs))) as pool:
        yield pool.map(function, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
