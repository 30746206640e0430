"""Importing this makes `import torchvision` work beside a CPU build of torch, which open_clip, timm, mteb, and
transformers where they find it, do. Its wheel asks torch for its own operators, which do not load there; nothing in the
tests calls them. Where they load, they stay as they are: an operator defined twice ends the process."""

from __future__ import annotations

import importlib.util
import sys

import torch

OPERATORS = ("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def lacks_operators() -> bool:
    """Whether torchvision is here, and cannot be imported beside this torch."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except (AttributeError, ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half of it
        return True
    return False


if lacks_operators():
    for operator in OPERATORS:
        for name in (operator, f"_{operator}_backward"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
