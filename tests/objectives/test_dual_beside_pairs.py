"""A contrast over dual pairs beside masked images, texts and pairs in one batch: each objective sees its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.batch import Batch, Layout, make_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask

MODEL = MultiwayConfig(
    dim=16, depth=2, heads=2, ffn_dim=32, image_size=8, patch_size=4, vocab_size=40, max_text_len=6, fusion_layers=1,
    init_std=0.2,
)  # fmt: skip
EXPERTS = ("vision", "language", "fusion")
MASKED = MaskedData(image_codes=10, dual=False)
LAYOUT = Layout(images=5, pairs=2, texts=4, patches=4, pair_len=6, text_len=6, dual=3)


def batch() -> Batch:
    """Two images alone and three dual ones, two pairs, three dual texts and one alone; dual ones are whole."""
    made = torch.Generator().manual_seed(3)
    masks = {
        "image_masks": torch.rand(7, 4, generator=made) < 0.5,
        "pair_masked": torch.rand(2, 6, generator=made) < 0.5,
        "text_masked": torch.rand(4, 6, generator=made) < 0.5,
    }
    masks["image_masks"][2:5] = False
    masks["text_masked"][:3] = False
    return make_batch(
        LAYOUT,
        images=torch.randint(256, (7, 3, 8, 8), generator=made, dtype=torch.uint8),
        pair_tokens=torch.randint(4, 40, (2, 6), generator=made),
        text_tokens=torch.randint(4, 40, (4, 6), generator=made),
        image_codes=torch.randint(10, (7, 4), generator=made),
        **masks,
    )


def only(whole: Batch, images: slice, pairs: slice, texts: slice, dual: int) -> Batch:
    pictures = [*range(7)[images], *range(5, 7)[pairs]]
    pick = {"pair": pairs, "text": texts}
    layout = replace(
        LAYOUT, images=len(range(7)[images]), pairs=len(range(2)[pairs]), texts=len(range(4)[texts]), dual=dual
    )
    named = {f"{k}_{part}": getattr(whole, f"{k}_{part}")[s] for k, s in pick.items() for part in ("tokens", "masked")}
    of_pictures = {name: getattr(whole, name)[pictures] for name in ("images", "image_masks", "image_codes")}
    return make_batch(layout, **of_pictures, **named)


def test_each_objective_sees_its_own_sequences():
    torch.manual_seed(0)
    both = PretrainTask(MODEL, EXPERTS, (Contrastive(), MASKED))
    whole = batch()
    report = both(whole)
    nothing = slice(0, 0)
    dual, masked = (
        only(whole, slice(2, 5), nothing, slice(0, 3), 3),
        only(whole, slice(0, 2), slice(0, 2), slice(3, 4), 0),
    )
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
    shared = task(whole)["loss/image"]
    alone = task(only(whole, slice(0, 2), slice(0, 0), slice(0, 0), 0))["loss/image"]
    torch.testing.assert_close(shared, alone * 2 / 5)  # three of five images have no target
