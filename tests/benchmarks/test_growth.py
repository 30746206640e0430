"""benchmarks.growth counts what grows, and measures the same cells."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.growth import main, measure
from pretrain.models.multiway.sizes import BEIT3_BASE
from tests.toys import refused

TOY = replace(BEIT3_BASE, dim=16, depth=6, heads=2, ffn_dim=32, patch_size=64, image_size=64, vocab_size=300)


def test_every_cell_grows_as_what_it_changes(capsys):
    cells = measure(TOY, 1, 1)
    base = cells["base"]
    assert base["counted_times"] == base["times"] == 1 and all(cell["seconds"] > 0 for cell in cells.values())
    assert 1 < cells["384 pixels"]["counted_times"] < cells["768 pixels"]["counted_times"]
    assert cells["128000 words"]["counted_times"] > 3 * cells["8000 words"]["counted_times"] > 0
    # A word more has a row in the embedding, and a row and a bias in the head; in memory both are padded to 128.
    assert cells["128000 words"]["parameters"] - cells["8000 words"]["parameters"] == (128_000 - 8064) * 33
    many, few = (cells[name]["parameters"] for name in ("fusion experts in every block", "no fusion experts"))
    assert many > base["parameters"] == few + 3 * (many - few) // TOY.depth
    assert "--depth=0" in refused(capsys, main, "--depth", 0)
