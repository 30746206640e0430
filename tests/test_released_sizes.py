"""The released sizes, by names and shapes alone: every head's checkpoint becomes ours, loads, and goes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.contracts import Objective
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.sizes import BEIT3_BASE_RELEASED, BEIT3_LARGE_RELEASED
from pretrain.objectives.answering import Answering
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.masked_captioning import MaskedCaptioning
from pretrain.objectives.reasoning import Reasoning
from pretrain.parallel.state import dense_shape, named_state
from pretrain.released_weights import from_released, to_released
from pretrain.stored_model import experts_in, fill_task, objectives_in
from pretrain.tasks.pretrain import PretrainTask

EXPERTS = ("vision", "language")
# unilm's beit3/modeling_finetune.py: the picture's size, whether there is a final norm, the head.
CHECKPOINTS: dict[str, tuple[int, bool, Objective]] = {
    "pretrained": (224, True, MaskedData()),
    "coco_retrieval": (384, True, Contrastive()),
    "coco_captioning": (480, True, MaskedCaptioning()),
    "vqa": (480, False, Answering(3129)),
    "in1k": (224, False, ImageClassification(1000)),
    "nlvr2": (224, True, Reasoning()),
}


def meta_task(cfg: MultiwayConfig, objectives: list[Objective]) -> PretrainTask:
    """Names and shapes, without numbers."""
    with torch.device("meta"):
        return PretrainTask(cfg, EXPERTS, objectives)


def files_state(task: PretrainTask) -> dict[str, Tensor]:
    """As files have it: vocabularies without their padding."""
    return {name: torch.empty(dense_shape(value), device="meta") for name, value in named_state(task).items()}


@pytest.mark.parametrize("size", [BEIT3_BASE_RELEASED, BEIT3_LARGE_RELEASED], ids=["base", "large"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_checkpoint_becomes_ours_and_goes_back(size, name, tmp_path):
    side, final_norm, objective = CHECKPOINTS[name]
    cfg = replace(size, image_size=side, final_norm=final_norm)
    state = files_state(meta_task(cfg, [objective]))
    released = to_released(state, cfg)
    assert released["beit3.text_embed.weight"].shape == (64010, size.dim)
    assert released["beit3.encoder.embed_positions.A.weight"].shape == ((side // 16) ** 2 + 3, size.dim)
    back, same = from_released(released)
    assert same == cfg and {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in state.items()}
    assert experts_in(back) == EXPERTS
    loaded = meta_task(cfg, objectives_in(back, cfg))
    fill_task(loaded, back, tmp_path)  # ValueError for anything that is missing or of another shape
    kept = {n for n in back if n.startswith("objectives.") and ".image." not in n}
    assert {n for n in named_state(loaded) if n.startswith("objectives.")} == kept
    if (name, size.depth) in MILLIONS:
        assert sum(value.numel() for value in back.values()) / 1e6 == pytest.approx(MILLIONS[name, size.depth], abs=1)


# unilm's beit3/README.md.
MILLIONS = {("pretrained", 12): 276, ("coco_retrieval", 12): 222, ("coco_captioning", 12): 271, ("vqa", 12): 228}
MILLIONS |= {("pretrained", 24): 746, ("coco_retrieval", 24): 675, ("coco_captioning", 24): 739, ("vqa", 24): 683}
MILLIONS |= {("nlvr2", 12): 226, ("nlvr2", 24): 681}


@pytest.mark.parametrize(("size", "millions"), [(BEIT3_BASE_RELEASED, 87), (BEIT3_LARGE_RELEASED, 305)])
def test_a_classifier_may_come_without_the_parts_of_texts(size, millions, tmp_path):
    """As unilm's README counts its parameters."""
    cfg = replace(size, final_norm=False)
    released = to_released(files_state(meta_task(cfg, [ImageClassification(1000)])), cfg)
    pictures = {name: value for name, value in released.items() if ".B." not in name and "text_embed" not in name}
    state, same = from_released(pictures)
    assert same == cfg and experts_in(state) == ("vision",)
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=1)
    with torch.device("meta"):
        task = PretrainTask(cfg, ("vision",), objectives_in(state, cfg))
    fill_task(task, state, tmp_path)
    with pytest.raises(ValueError, match=r"no beit3\.text_embed\.weight"):
        from_released({name: value for name, value in pictures.items() if "fc_norm" not in name})
