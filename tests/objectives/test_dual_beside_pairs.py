"""A contrast over dual pairs beside masked images, texts and pairs in one batch: each objective sees its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.batch import Batch, Layout
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CODES, EXPERTS, PAPER, PATCHES, part_of, random_batch

MODEL = replace(PAPER, init_std=0.2)
MASKED = MaskedData(image_codes=CODES, dual=False)
LAYOUT = Layout(images=5, pairs=2, texts=4, patches=PATCHES, pair_len=6, text_len=6, dual=3)
ALONE, DUAL = slice(0, 2), slice(2, 5)  # images


def batch() -> Batch:
    """Two images alone and three dual ones, two pairs, three dual texts and one alone; dual ones are whole."""
    made = random_batch(LAYOUT, 3)
    made.image_masks[DUAL], made.text_masked[:3] = False, False
    made.text_inputs[:3] = made.text_tokens[:3]
    return made


def test_each_objective_sees_its_own_sequences():
    torch.manual_seed(0)
    both = PretrainTask(MODEL, EXPERTS, (Contrastive(), MASKED))
    whole = batch()
    report = both(whole)
    dual, masked = part_of(whole, DUAL, texts=slice(3), dual=3), part_of(whole, ALONE, slice(None), slice(3, 4))
    contrast, hidden = (PretrainTask(MODEL, EXPERTS, (objective,)) for objective in (Contrastive(), MASKED))
    for task in (contrast, hidden):
        task.load_state_dict({name: value for name, value in both.state_dict().items() if name in task.state_dict()})
    torch.testing.assert_close(report["loss/contrastive"], contrast(dual)["loss"].detach())
    torch.testing.assert_close(report["loss/masked"], hidden(masked)["loss"].detach())
    torch.testing.assert_close(report["loss"], contrast(dual)["loss"] + hidden(masked)["loss"])
    assert report["loss/image"] > 0 and report["loss/text"] > 0 and report["loss/pair_text"] > 0


def test_with_dual_the_masked_objective_counts_dual_pairs_too():
    torch.manual_seed(0)
    task = PretrainTask(MODEL, EXPERTS, (replace(MASKED, dual=True),))
    whole = batch()
    shared, alone = (task(one)["loss/image"] for one in (whole, part_of(whole, ALONE)))
    torch.testing.assert_close(shared, alone * 2 / 5)  # three of five images have no target
