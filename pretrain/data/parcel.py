"""A data worker's result in a file in memory, which the main process maps, so that nothing is copied.

The file begins with the pictures, which the worker writes in place; then come all other arrays, and a pickle that
describes them. It has no name and takes no place in /dev/shm: it disappears with its last mapping, also if a process is
killed. It is filled again once no part of its content is referenced any more, because the kernel takes longer to find
and clear new pages than a worker to write pictures into old ones (256 px: 60 against 6 us a picture).
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 64  # bytes
# Spare bytes behind the content, so that a file that grows by a few bytes need not be mapped again.
_ROOM = 2**16
ONCE = 0  # the number of a parcel that will not be filled again


class Parcel:
    """A worker's side of a file: the worker fills `array`, and `close_with` adds the rest. `number`: among its worker's
    parcels."""

    def __init__(self, shape: tuple[int, ...], number: int = ONCE):
        """`shape`: the shape of `array`, which is uint8."""
        self.number, self._pictures = number, int(np.prod(shape))
        self._size = self._length = self._pictures
        self.fd = os.memfd_create("batch")
        os.ftruncate(self.fd, self._size)
        # All pages at once: a page fault for each would cost more than the saved copy.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._memory = mmap.mmap(self.fd, self._size, flags) if self._size else b""
        self.array = np.frombuffer(self._memory, np.uint8).reshape(shape) if self._size else np.zeros(shape, np.uint8)

    def close_with(self, value: Any) -> tuple[int, int]:
        """Adds `value`, whose tensors and arrays may lie in `array` -> (where the pickle begins, where it ends). Raises
        pickle's errors for a value that cannot be sent."""
        self._size = self._pictures
        parts: list[pickle.PickleBuffer] = []
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=5, buffer_callback=parts.append).dump(value)
        places = [self._place(part.raw()) for part in parts]
        start = self._append(pickle.dumps((pickled.getvalue(), places)))
        if self._size > self._length:
            self._length = self._size + _ROOM
            os.ftruncate(self.fd, self._length)
        return start, self._size

    def _place(self, part: memoryview) -> tuple[int, int]:
        """(place in the file, bytes) of an array, which is written unless it lies in the file already."""
        first = self.array.__array_interface__["data"][0]
        offset = np.frombuffer(part, np.uint8).__array_interface__["data"][0] - first if part.nbytes else 0
        if part.nbytes and offset >= 0 and offset + part.nbytes <= self.array.nbytes:
            return offset, part.nbytes
        return self._append(part), part.nbytes

    def _append(self, data: bytes | memoryview) -> int:
        start = -(-self._size // _ALIGNED) * _ALIGNED
        done, whole = 0, memoryview(data)
        while done < len(whole):
            done += os.pwrite(self.fd, whole[done:], start + done)
        self._size = start + len(whole)
        return start


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose bytes stay out of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.is_contiguous():
            return NotImplemented
        try:
            return torch.from_numpy, (value.numpy(),)
        except (TypeError, RuntimeError):  # a type that numpy lacks, such as bfloat16; a tensor that has a gradient
            return NotImplemented


class Opened:
    """The main process's side of one worker's parcels. `freed`: the numbers of parcels that may be filled again, since
    no part of their values is referenced any more; the garbage collector adds to it, in any thread."""

    def __init__(self) -> None:
        self.freed = deque[int]()
        self._memory: dict[int, mmap.mmap] = {}

    def open(self, fd: int, number: int, start: int, size: int) -> Any:
        """The value of a parcel, whose tensors are views of the file; `fd` stays open. It unpickles, so the file must
        come from one of our own workers."""
        memory = self._memory.get(number)
        if memory is None or len(memory) < size:
            memory = mmap.mmap(fd, os.fstat(fd).st_size)
            if number != ONCE:
                self._memory[number] = memory
        # All views in the value refer to this one array, which is collected with the last of them.
        whole = np.frombuffer(memory, np.uint8)
        if number != ONCE:
            weakref.finalize(whole, self.freed.append, number).atexit = False
        view = whole.data
        pickled, places = pickle.loads(view[start:size])
        return pickle.loads(pickled, buffers=[view[place : place + length] for place, length in places])
