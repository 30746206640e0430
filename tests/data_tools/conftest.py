"""What the tests of several tools share: the hostile server, and a disk that is nearly full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data_tools.hostile_server import HostileServer


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """mount("2m") -> a disk of its own, of that size."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(line, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small disk here")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)
