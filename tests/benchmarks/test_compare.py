"""benchmarks.compare compares the same work: torchscale's loss is ours, whatever rows its heads see."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.attention import QUICKSTART
from benchmarks.bars import bars_svg
from benchmarks.compare.__main__ import CODES, EXPERTS, OBJECTIVE, main, make_one
from benchmarks.compare.contestants import Bf16Weights, check_equal, ours, theirs
from pretrain.batch import Layout
from tests.toys import refused

CFG = replace(
    QUICKSTART, dim=32, depth=2, heads=2, ffn_dim=64, vocab_size=5000, attention="per_modality", fusion_layers=0,
    sub_norm=True,
)  # fmt: skip
LAYOUT = Layout(2, 2, 2, CFG.patches, 50, 12)


@pytest.mark.parametrize("full", [False, True])
def test_torchscale_has_our_loss_and_gradients(full):
    batch = make_one(CFG, LAYOUT, full_length=False)
    mine = ours(CFG, OBJECTIVE, EXPERTS, bf16=False)
    other = theirs("torchscale", CFG, mine, CODES, bf16=False)
    other.model.full = full
    losses = [one.forward(batch) for one in (mine, other)]
    torch.testing.assert_close(*losses, atol=2e-6, rtol=2e-6)
    for loss in losses:
        loss.backward()
    down = [
        mine.model.get_parameter("encoder.blocks.0.experts.language.down.weight"),
        other.model.get_parameter("beit3.encoder.layers.0.ffn.B.fc2.weight"),
    ]
    torch.testing.assert_close(down[0].grad, down[1].grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        down[0].mul_(2)
    with pytest.raises(ValueError, match="different work"):
        check_equal(mine, other, batch)


def test_weights_in_bf16_take_the_step_of_autocast():
    batch = make_one(CFG, LAYOUT, full_length=False)
    autocast, low = (ours(CFG, OBJECTIVE, EXPERTS, bf16=True) for _ in range(2))
    low = Bf16Weights(low.model, low.loss)
    before = {name: value.detach().clone() for name, value in autocast.model.named_parameters()}
    check_equal(low, autocast, batch)
    for one in (autocast, low):
        one.step(batch)
    for name, weight in low.model.named_parameters():
        copy, other = low.copies[weight].detach(), autocast.model.get_parameter(name).detach()
        assert weight.dtype == torch.bfloat16 and torch.equal(weight.detach(), copy.bfloat16())
        # AdamW's first step is the rate, whatever the gradient: the bf16 form starts from the same fp32 weights.
        moved, by_other = copy - before[name], other - before[name]
        assert (moved - by_other).abs().median() <= 0.05 * by_other.abs().median(), name


def test_every_other_system_takes_a_step_and_the_plot_has_its_bars(tmp_path, capsys):
    out = tmp_path / "compare.json"
    sizes = ["--size", "quickstart", "--depth", "1", "--images", "1", "--pairs", "1", "--texts", "1", "--rounds", "1"]
    sizes += ["--pair-len", "10", "--text-len", "9", "--precisions", "fp32", "--ours", "eager"]
    assert main([*sizes, "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert set(results) == {"torchscale fp32, ours eager", "transformers fp32, ours eager"}
    for cell in results.values():
        assert cell["masked"]["times"] > 0 and 0 < cell["efficiency"] < 1
    plot = out.with_suffix(".svg").read_text()
    assert "torchscale fp32, ours eager, full heads" in plot and "transformers fp32, ours eager, masked heads" in plot
    assert "--rounds=0" in refused(capsys, main, "--rounds", 0)


def test_bars_keep_names_and_values_apart_from_markup():
    plot = bars_svg("a < b", {"x & y": 2.0, "z": None}, mark=1.0, note="python -m <x>")
    assert bars_svg("a", {"b": 1.0}, note="word " * 60).count("word word") > 1 and "NaN" not in plot
    assert "a &lt; b" in plot and "x &amp; y" in plot and "no figure" in plot and "<x>" not in plot
