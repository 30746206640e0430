"""What the commands here have in common: how they are asked. How they end is pretrain/command.py's."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pretrain import command
from pretrain.command import run as run  # as the commands here import it


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Of `python -m data_tools.NAME`."""
    return command.make_parser(f"data_tools.{name}", description, example)


def add_directories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="holds 00000.tar, 00001.tar, ...")


def add_workers(parser: argparse._ActionsContainer, most: int = 8) -> None:
    """`most`: the default on a machine of many cores."""
    cores = min(most, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")
