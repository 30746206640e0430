"""Files that stay open between reads, so that reading a sample costs one `pread` and no `open`."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from pretrain.files import regular_descriptor

# Per process and cache: most systems allow 1024 descriptors, and the index of 10,000 samples takes 1 MB.
MOST = 256

Key = TypeVar("Key")
Opened = TypeVar("Opened")


class Descriptor:
    """An open file that closes itself. ValueError for what is no regular file."""

    def __init__(self, file: str | int):
        self.fd = regular_descriptor(file) if isinstance(file, str) else file

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class OpenFiles(OrderedDict[Key, Opened]):
    """The open file of each key; beyond MOST, the least recently used is closed. Pickling gives an empty one, because
    descriptors mean nothing in another process."""

    def get_or_open(self, key: Key, open_it: Callable[[], Opened]) -> Opened:
        if key not in self:
            self[key] = open_it()
            if len(self) > MOST:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple]:
        return OpenFiles, ()
