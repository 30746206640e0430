"""Which ranks share a node, and how the files of one node are sent to the next one while training goes on.

Each rank sends to a rank of the next node, on a thread of its own and over a process group of its own, so that the
collectives of the steps are not disturbed. Even if a disk fails, both ends send and receive everything that was
announced, so that the group is in a clean state for the next copy.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import gather_objects, rank
from pretrain.json_files import parse_json, typed
from pretrain.parallel.board import BEHIND, node_name

CHUNK = 2**24  # bytes in memory for each connection
MOST_HEADER = 2**24

Entries = dict[str, dict[str, Any]]  # of a manifest, by file name


class Nodes(NamedTuple):
    """On which node each rank is."""

    of_ranks: tuple[str, ...]  # the name of each rank's node

    @classmethod
    def gather(cls) -> Nodes:
        """The nodes of this world's ranks. A collective."""
        return cls(tuple(gather_objects(node_name())))

    @property
    def ranks(self) -> dict[str, list[int]]:
        """{node: its ranks}, in the order of the nodes' first ranks."""
        ranks: dict[str, list[int]] = {}
        for number, name in enumerate(self.of_ranks):
            ranks.setdefault(name, []).append(number)
        return ranks

    def place_on_node(self, number: int) -> tuple[int, int]:
        """A rank's place among the ranks of its node, and how many these are."""
        own = self.ranks[self.of_ranks[number]]
        return own.index(number), len(own)

    def is_first(self, number: int) -> bool:
        """Whether it is the first rank of its node."""
        return self.place_on_node(number)[0] == 0

    def neighbour(self, number: int) -> int | None:
        """The rank of the next node to which rank `number` sends; None if there is only one node."""
        ranks = self.ranks
        names = list(ranks)
        if len(names) == 1:
            return None
        following = ranks[names[(names.index(self.of_ranks[number]) + 1) % len(names)]]
        return following[self.place_on_node(number)[0] % len(following)]

    def senders(self, number: int) -> list[int]:
        """The ranks that send to rank `number`."""
        return [other for other in range(len(self.of_ranks)) if self.neighbour(other) == number]


class Exchange:
    """The connections between neighbours. Constructing it is a collective if there are several nodes."""

    def __init__(self, nodes: Nodes):
        self.to, self.sources = nodes.neighbour(rank()), nodes.senders(rank())
        self._group = None if self.to is None else dist.new_group(backend="gloo", group_desc=BEHIND)

    def run(self, place: Path, own: Entries, problem: str) -> None:
        """Sends the files `own` of the directory `place` to the next node, or the `problem` if they could not be
        written, and puts the files of the node before into `place`. Raises OSError, after both."""
        if self.to is None:
            return
        try:
            with ThreadPoolExecutor(1 + len(self.sources), "copies") as pool:
                jobs = [pool.submit(self._receive, source, place) for source in self.sources]
                jobs.append(pool.submit(self._send, self.to, place, own, problem))
            problems = [failure for job in jobs if (failure := job.result())]
        except (dist.DistError, RuntimeError) as error:
            raise OSError(errno.EIO, f"the connection to a neighbour was lost: {str(error).splitlines()[0]}") from error
        if problems:
            raise OSError(errno.EIO, problems[0])

    def _send(self, to: int, place: Path, own: Entries, problem: str) -> str:
        """-> what went wrong; "" if nothing did."""
        files = {} if problem else {name: (place / name).stat().st_size for name in own}
        header = json.dumps({"problem": problem, "files": files}).encode()
        self._send_tensor(torch.tensor([len(header)]), to)
        self._send_tensor(torch.frombuffer(bytearray(header), dtype=torch.uint8), to)
        failure = ""
        for name, size in files.items():
            for piece, wrong in _pieces(place / name, size):
                self._send_tensor(piece, to)
                failure = failure or wrong
        return failure

    def _receive(self, source: int, place: Path) -> str:
        """-> what went wrong on this rank; "" if nothing did. The sender reports its own failures."""
        length = self._receive_tensor(torch.zeros(1, dtype=torch.int64), source)
        if not 0 < (count := int(length)) <= MOST_HEADER:
            raise RuntimeError(f"rank {source} announced {count} bytes")
        header = parse_json(bytes(self._receive_tensor(torch.empty(count, dtype=torch.uint8), source).numpy()))
        failure = ""
        for name, size in typed(header, "files", dict).items():
            failure = self._receive_file(source, place / Path(name).name, size) or failure
        return failure

    def _receive_file(self, source: int, path: Path, size: int) -> str:
        failure, file = "", None
        try:
            file = open(path, "wb")  # noqa: SIM115  the bytes must be received, whether they can be written or not
        except OSError as error:
            failure = f"{path} cannot be written ({error.strerror})"
        for count in _counts(size):
            piece = self._receive_tensor(torch.empty(count, dtype=torch.uint8), source)
            try:
                if file is not None and not failure:
                    file.write(memoryview(piece.numpy()))
            except OSError as error:
                failure = f"{path} cannot be written ({error.strerror})"
        try:
            if file is not None:
                file.close()
        except OSError as error:
            failure = failure or f"{path} cannot be written ({error.strerror})"
        return failure

    def _send_tensor(self, value: Tensor, to: int) -> None:
        dist.send(value, to, group=self._group)

    def _receive_tensor(self, value: Tensor, source: int) -> Tensor:
        dist.recv(value, source, group=self._group)
        return value


def _counts(size: int) -> Iterator[int]:
    for start in range(0, size, CHUNK):
        yield min(CHUNK, size - start)


def _pieces(path: Path, size: int) -> Iterator[tuple[Tensor, str]]:
    """A file's bytes in chunks, each with what is wrong so far. If the file cannot be read, the chunks hold other
    bytes, as many as were announced."""
    buffer = bytearray(min(CHUNK, size) or 1)
    handle = -1
    wrong = ""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        wrong = f"{path} cannot be read ({error.strerror})"
    for count in _counts(size):
        view = memoryview(buffer)[:count]
        try:
            if not wrong and os.readv(handle, [view]) != count:
                wrong = f"{path} is shorter than it was"
        except OSError as error:
            wrong = f"{path} cannot be read ({error.strerror})"
        yield torch.frombuffer(view, dtype=torch.uint8), wrong
    if handle >= 0:
        os.close(handle)
