"""One rank of a node compiles a C++ extension while the others wait, and a killed compilation blocks no later start.

torch's own lock is a file in the build directory. A process that is killed while it compiles leaves it there, and then
every later start waits for ever, without a word.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.lock import this_process

RECORD, TORCHS = "imglish.lock", "lock"


@contextmanager
def one_compiles(extension: str) -> Iterator[None]:
    """Inside, no other process of ours builds `extension` into the same directory (TORCH_EXTENSIONS_DIR). A lock of
    torch's that a killed process of ours left there is removed; another program's stays, as it may be compiling."""
    from torch.utils import cpp_extension  # it imports setuptools

    folder = Path(cpp_extension._get_build_directory(extension, verbose=False))
    handle = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel's: it ends with its process
        except OSError:  # a file system without locks: only torch's lock protects the build
            yield
            return
        if os.pread(handle, 1, 0):  # a process of ours was killed before it could empty the file
            (folder / TORCHS).unlink(missing_ok=True)
        os.pwrite(handle, this_process().encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)
