"""FLOPs that are executed: against torch's own counter of products, and for the papers' stages."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.batch import PAD, Kinds, Layout
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.plan.model import micro_batch_layout, planned
from pretrain.recipes import load_recipe
from tests.toy_models import CONFIGS, EXPERTS, ROUTES, encoder, random_batch

PRODUCTS = {"aten.mm", "aten.addmm"}  # all but those of attention, which CPU kernels count in their own way
TRAINED = {
    "all": ("*",),
    "VLMo's second stage": ("text_embed.*", "blocks.*.experts.language.*", "norm.*"),
    "the top block": ("blocks.2.*", "norm.*"),
    "one expert": ("blocks.1.experts.vision.up.*",),
    "nothing but norms": ("blocks.0.norm.*", "blocks.1.experts.*.norm.*"),
    "patches": ("vision_embed.proj.*",),
    "an output": ("blocks.0.attention.out.*",),
    "biases": ("blocks.1.attention.q.*.bias", "blocks.1.experts.*.up.bias"),  # as adapters, beside weights that stay
}


def attention_flops(cfg: MultiwayConfig, layout: Layout) -> float:
    """Of the forward pass, by setting everything else to nothing."""
    lengths = [(layout.images, layout.image_len), (layout.texts, layout.text_len)]
    lengths.append((layout.pairs, layout.image_len + layout.pair_len))
    return cfg.depth * sum(4 * n * length**2 * cfg.dim for n, length in lengths)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("route", ["masked data", "language", "dual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_executed_flops_are_those_of_torchs_counter(name, route, trained):
    cfg, batch = CONFIGS[name], random_batch(ROUTES[route], padded=False)
    model, layout = encoder(cfg), batch.layout
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch(key, pattern) for pattern in TRAINED[trained]))
    opened = frozenset(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    if not opened:
        pytest.skip("this model has no such weight")
    needed = torch.ones(layout.rows, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        rows = model(batch, Kinds.split(needed, layout)).pack()
        if rows.requires_grad:
            rows.square().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if str(op) in PRODUCTS)
    executed = cfg.executed_flops(layout, EXPERTS, layout.rows, opened)
    attention = attention_flops(cfg, layout) / cfg.depth
    rest = (executed - counted) / attention
    # What is left are whole attentions, one forward and two backward for each block that gradients reach.
    assert rest == pytest.approx(round(rest), abs=1e-6) and cfg.depth <= round(rest) <= 3 * cfg.depth, counts
    if trained == "all":
        assert round(rest) == 3 * cfg.depth


@pytest.mark.parametrize("read", [0, 5, 17])
def test_rows_that_nobody_reads_are_left_out(read):
    cfg, batch = CONFIGS["paper"], random_batch(ROUTES["language"], padded=False)
    model, layout = encoder(cfg), batch.layout
    needed = torch.arange(layout.rows) < read
    with FlopCounterMode(display=False) as counter:
        model(batch, Kinds.split(needed, layout)).pack().square().sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in PRODUCTS)
    trained = frozenset(key for key, _ in model.named_parameters())
    assert cfg.executed_flops(layout, EXPERTS, read, trained) == counted + 3 * attention_flops(cfg, layout)


@pytest.mark.parametrize(
    ("recipe", "stage", "more"),
    [
        ("beit3_base", "pretrain", 0.040),
        ("beit3_base", "retrieval", 0.065),
        ("beit3_base", "language", 0.168),
        ("beit3_giant", "pretrain", 0.012),
    ],
)
def test_what_mfu_credits_beyond_them(recipe, stage, more):
    plan = planned(*load_recipe(recipe, stage))
    layout = micro_batch_layout(plan, 1)
    trained = frozenset(p.name for p in plan.parameters if p.group is not None)
    executed = plan.stage.task.executed_flops(plan.model, plan.stage, layout, trained)
    assert plan.stage.task.flops(plan.model, plan.stage, layout) / executed - 1 == pytest.approx(more, abs=0.0005)


def test_without_padding_they_are_those_of_the_rows_that_exist():
    """Of texts whose lengths fill up their shape, so that the pass has no row of padding."""
    cfg, batch = CONFIGS["paper"], random_batch(Layout(texts=6, text_len=12), padded=False)
    batch.text_inputs[:3, 4:] = PAD  # lengths of 4, and of 12: 48 rows of 72
    model, real = encoder(cfg), batch.real_layout
    assert (real.text_len, real.rows) == (8, 48) and len(batch.indexed().index.real.places) == 48
    with FlopCounterMode(display=False) as counter:
        model(batch).pack().square().sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in PRODUCTS)
    trained = frozenset(key for key, _ in model.named_parameters())
    assert cfg.executed_flops(real, EXPERTS, real.rows, trained) == counted + 3 * attention_flops(cfg, real)
