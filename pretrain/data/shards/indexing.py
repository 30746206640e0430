"""Makes the manifest.json and the .idx files of a directory of shards, and tells which of its shards are whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pretrain.data.shards.manifest import MANIFEST, Manifest, Shard, read_manifest
from pretrain.data.shards.tar_index import EXTENSIONS, ShardIndex, index_shard
from pretrain.files import write_file


@dataclass(frozen=True)
class Indexed:
    """What came of one directory."""

    manifest: Manifest
    scanned: int  # shards whose headers were read; the others were up to date
    left_out: list[str] = field(default_factory=list)  # "NAME: why"


def complete_shards(directory: Path) -> tuple[list[Path], list[Path]]:
    """(complete, partial) tars of a directory, sorted by name. ValueError if there is none that is complete."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the one that holds 00000.tar, 00001.tar, ...")
    tars = sorted(path for path in directory.glob("*.tar") if path.is_file())
    if not tars:
        raise ValueError(f"{directory} holds no .tar file; give the directory that img2dataset wrote to")
    if not any(directory.glob("*_stats.json")):
        return tars, []
    complete = [path for path in tars if stats_path(path).exists()]
    if not complete:
        raise ValueError(
            f"none of the tars in {directory} has its _stats.json, so all are partial; download them again"
        )
    return complete, [path for path in tars if path not in set(complete)]


def stats_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def index_directory(directory: Path, workers: int = 1, skip_broken: bool = False) -> Indexed:
    """Writes DIRECTORY/manifest.json and one .idx per shard. ShardError for a broken shard, naming it, unless
    `skip_broken` leaves it out; nothing is written over until its successor is whole."""
    complete, partial = complete_shards(directory)
    left_out = [f"{path.name}: partial, it has no {stats_path(path).name}" for path in partial]
    known = _known(directory)
    jobs = [(path, known.get(path.name), skip_broken) for path in complete]
    shards, scanned = [], 0
    with map_in_order(_index_one, jobs, workers) as results:
        bar = tqdm(results, total=len(jobs), desc=f"indexing {directory}", unit=" shards", disable=None)
        for path, result in zip(complete, bar, strict=True):
            if isinstance(result, str):
                left_out.append(f"{path.name}: {result}")
                continue
            shard, fresh = result
            shards.append(shard)
            scanned += fresh
    if not any(shard.samples for shard in shards):
        raise ValueError(
            f"the {len(shards)} shards of {directory} hold no sample: no member is called KEY.EXTENSION with an "
            f"extension of {', '.join(EXTENSIONS)} after the first dot of its name"
        )
    manifest = Manifest(tuple(shards))
    write_file(directory / MANIFEST, manifest.to_json())
    return Indexed(manifest, scanned, left_out)


def _known(directory: Path) -> dict[str, Shard]:
    try:
        content = (directory / MANIFEST).read_bytes()
        return {shard.name: shard for shard in read_manifest(content, os.path.join(directory, "")).shards}
    except (FileNotFoundError, ValueError):  # a damaged manifest is what this tool is to replace
        return {}


def _index_one(job: tuple[Path, Shard | None, bool]) -> tuple[Shard, bool] | str:
    """(shard, whether it had to be scanned), or why a broken one is left out."""
    path, known, skip_broken = job
    if _up_to_date(path, known):
        assert known is not None
        return known, False
    try:
        size = path.stat().st_size
        index = index_shard(path)
        if path.stat().st_size != size:
            raise ValueError(f"{path} grew while it was indexed; wait until the download is done")
    except ValueError as error:
        if skip_broken:
            return str(error)
        raise ValueError(f"{error}; or leave broken shards out with --skip-broken") from None
    write_file(path.with_suffix(".idx"), index.data)
    return Shard(str(path), index.samples, size), True


def _up_to_date(path: Path, known: Shard | None) -> bool:
    index = path.with_suffix(".idx")
    try:
        tar, idx = path.stat(), index.stat()
        if known is None or known.bytes != tar.st_size or idx.st_mtime_ns < tar.st_mtime_ns:
            return False
        return ShardIndex(index.read_bytes(), str(index)).samples == known.samples
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def map_in_order(function, jobs: list, workers: int) -> Iterator[Iterable]:
    """`map` in the order of the jobs, in `workers` processes."""
    if workers <= 1 or len(jobs) <= 1:
        yield map(function, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        try:
            yield pool.map(function, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
