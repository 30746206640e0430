"""Importing this makes `import torchvision` work beside a CPU build of torch, which open_clip, timm, mteb, and
transformers where they find it, do. Its wheel asks torch for its own operators, which do not load there; nothing in the
tests calls them."""

from __future__ import annotations

import importlib.util

import torch

OPERATORS = ("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")

if importlib.util.find_spec("torchvision") is not None:
    for operator in OPERATORS:
        for name in (operator, f"_{operator}_backward"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
