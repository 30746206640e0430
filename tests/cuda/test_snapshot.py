"""The copies of a GPU's tensors from which checkpoints are written."""

from __future__ import annotations

import pytest
import torch

from pretrain.checkpoint.snapshot import HostCopies

pytestmark = pytest.mark.cuda


def test_copies_are_pinned_whole_and_of_the_moment():
    copies, there = HostCopies(), torch.arange(2**22, dtype=torch.float32, device="cuda")
    here = copies.copy("a", there)
    there += 1  # queued behind the copy, as the next step is
    copies.wait()
    assert here.is_pinned() and torch.equal(here, torch.arange(2**22, dtype=torch.float32))
    assert copies.copy("a", there).data_ptr() == here.data_ptr(), "the memory is used again"
    copies.wait()
    assert here[0] == 1
