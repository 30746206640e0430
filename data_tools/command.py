"""What the commands here have in common with those of pretrain: how they are asked, and how they end."""

from __future__ import annotations

import argparse

from pretrain import command
from pretrain.command import add_directories as add_directories  # as the commands here import them
from pretrain.command import add_workers as add_workers
from pretrain.command import run as run


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Of `python -m data_tools.NAME`."""
    return command.make_parser(f"data_tools.{name}", description, example)
