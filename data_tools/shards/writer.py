"""Writes samples to shards as img2dataset does: 00000.tar, 00000.parquet (a row per sample), 00000_stats.json.

A shard is visible only when it is complete: its tar grows under a name that begins with a dot, and _stats.json is
written last. The bytes of tars and parquets depend only on the samples, so equal samples make equal shards on any
machine.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.shards.indexing import stats_path
from pretrain.data.shards.tar_index import split_name
from pretrain.files import beside, move, write_file

_BUFFER = 2**20


class ShardWriter:
    """A context manager: `write` each sample; full shards are finished automatically, the last one by `close`.

    A shard is full at `samples_per_shard`, or when the next sample would make its tar larger than `bytes_per_shard` (a
    larger sample gets a shard of its own). `first` is the first shard's number. After an exception the current shard is
    removed, and earlier ones are complete. Raises ValueError for a key that readers cannot parse, OSError naming the
    file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        samples_per_shard: int | None,
        bytes_per_shard: int | None = None,
        first: int = 0,
        schema: pa.Schema | None = None,  # of the rows; None: inferred for each shard
    ):
        for name, value in {"samples_per_shard": samples_per_shard, "bytes_per_shard": bytes_per_shard}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; use 1 or more")
        if samples_per_shard is None and bytes_per_shard is None:
            raise ValueError("neither samples_per_shard nor bytes_per_shard is set; set one of them")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.samples, self.paths = directory, 0, list[Path]()  # samples, paths: of finished shards
        self._samples_per_shard, self._bytes_per_shard, self._first, self._schema = (
            samples_per_shard,
            bytes_per_shard,
            first,
            schema,
        )
        self._open: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def write(self, key: str, members: Mapping[str, bytes], row: Mapping[str, Any] | None = None) -> None:
        """Writes one sample: extension -> content, in the order of the tar. `row` is its line of the parquet, to which
        the key is added; None: only a status "success". A key must be unique in its shard."""
        if not members:
            raise ValueError(f"sample {key!r} has no members; write at least one, such as {key}.txt")
        for extension in members:
            if not key or split_name(f"{key}.{extension}") != (key, extension):
                raise ValueError(
                    f"{key}.{extension} cannot be the name of key {key!r} and extension {extension!r}; use a key "
                    "without dots and an extension in lower case"
                )
        if self._open is not None and self._full(sum(tar_bytes(len(content)) for content in members.values())):
            self._finish()
        if self._open is None:
            self._open = _OpenShard(self.directory / f"{self._first + len(self.paths):05d}.tar")
        try:
            self._open.add(key, members, {"status": "success", "error_message": None} if row is None else row)
        except OSError as error:
            raise self._with_name(error, self._open.path) from None

    def close(self) -> None:
        """Finishes the current shard; then all samples are in the directory."""
        if self._open is not None:
            self._finish()

    def _full(self, more: int) -> bool:
        assert self._open is not None
        if self._samples_per_shard is not None and len(self._open.rows) >= self._samples_per_shard:
            return True
        return self._bytes_per_shard is not None and self._open.bytes + more > self._bytes_per_shard

    def _finish(self) -> None:
        assert self._open is not None
        shard = self._open
        try:
            shard.finish(self._schema)
        except OSError as error:
            raise self._with_name(error, shard.path) from None
        finally:
            self._abandon()
        self.paths.append(shard.path)
        self.samples += len(shard.rows)

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _with_name(self, error: OSError, path: Path) -> OSError:
        if error.filename is not None:
            return error
        return OSError(error.errno, f"cannot be written: {error.strerror}", str(path))


class _OpenShard:
    """The current, unfinished shard."""

    def __init__(self, path: Path):
        self.path, self.rows, self.bytes, self.started = path, list[dict[str, Any]](), 0, time.time()
        self._keys = set[str]()
        # The process id in the name, because a worker of a killed parent may still write to the same shard.
        self._growing = beside(path, str(os.getpid()))
        self._file: BinaryIO = open(self._growing, "wb", buffering=_BUFFER)  # noqa: SIM115 (closed in finish, abandon)
        # PAX is plain ustar except for names that do not fit ustar.
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, key: str, members: Mapping[str, bytes], row: Mapping[str, Any]) -> None:
        if key in self._keys:
            raise ValueError(f"key {key!r} occurs twice in {self.path}; rename or remove one of the two")
        self._keys.add(key)
        for extension, content in members.items():
            member = tarfile.TarInfo(
                f"{key}.{extension}"
            )  # time and owner are 0, so that the bytes are always the same
            member.size, member.mode = len(content), 0o444
            self._tar.addfile(member, io.BytesIO(content))
            self.bytes += tar_bytes(len(content))
        self.rows.append({**row, "key": key})

    def finish(self, schema: pa.Schema | None) -> None:
        self._tar.close()
        self._file.close()
        table = rows_table(self.rows) if schema is None else pa.Table.from_pylist(self.rows, schema=schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_file(self.path.with_suffix(".parquet"), buffer.getvalue())
        move(self._growing, self.path)
        write_file(stats_path(self.path), _stats(len(self.rows), self.started))

    def abandon(self) -> None:
        with suppress(OSError):  # it flushes its buffer, and a full disk was reported before
            self._file.close()
        self._growing.unlink(missing_ok=True)


def rows_table(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of rows with any columns: columns in the order of their first occurrence, missing values null, nested
    ones JSON, and a column of numbers and strings as strings."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    plain = [json.dumps(value) if isinstance(value, dict | list) else value for value in values]
    try:
        return pa.array(plain)
    except (pa.ArrowException, OverflowError):  # rows come from untrusted files
        return pa.array([None if value is None else str(value) for value in plain], pa.string())


def _stats(samples: int, started: float) -> bytes:
    ended = time.time()
    stats = {
        "count": samples,
        "successes": samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": ended - started,
        "start_time": started,
        "end_time": ended,
        "status_dict": {"success": samples},
    }
    return json.dumps(stats, indent=4).encode()


def tar_bytes(content: int) -> int:
    """The bytes of a member in a tar: a header and whole blocks."""
    return tarfile.BLOCKSIZE * (1 - -content // tarfile.BLOCKSIZE)
