"""The table of smaller forms: its recall is the evaluation's, and a form's size leaves out what nobody reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compress import Form, _used, recalls, times
from benchmarks.compress_fusion import measure
from pretrain.batch import Layout
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CODES, PAPER, PATCHES, random_batch
from tests.toys import refused


def form(images, texts) -> Form:
    return Form("x", images, texts, 0, 0, 0)


def test_recall_counts_equal_captions_and_leaves_out_what_fills_the_last_batch():
    vectors = torch.eye(4)
    ids = torch.tensor([[0, 5, 2], [0, 6, 2], [0, 5, 2], [0, 7, 2]])  # the first and the third are one caption
    batches: Any = [SimpleNamespace(images=vectors[:2], text_tokens=ids[:2])]
    batches += [SimpleNamespace(images=vectors[[2, 3, 0]], text_tokens=ids[[2, 3, 0]])]
    by_id = {5: vectors[0], 6: vectors[1], 7: vectors[2]}
    own = form(lambda pixels: pixels, lambda words: torch.stack([by_id[int(word)] for word in words[:, 1]]))
    # Texts 1 and 3 tie at the first picture, which has both; the third picture finds the fourth's text.
    assert recalls(own, batches, 4) == {"image_to_text R@1": 50.0, "text_to_image R@1": 75.0}


def test_forms_take_turns():
    seen = list[str]()
    made = [form(lambda pixels, name=name: seen.append(name), None) for name in "ab"]
    took = times(made, torch.zeros(2, 3, 4, 4), rounds=2)
    assert seen == list("ababab") and len(took) == 2 and min(took) >= 0


def test_a_form_weighs_what_pictures_and_texts_pass_through():
    names = ("encoder.blocks.0.experts.vision.up.weight", "objectives.contrastive.vision.weight")
    others = ("encoder.blocks.3.experts.fusion.up.weight", "objectives.masked.text.weight")
    assert all(map(_used, names)) and not any(map(_used, others))


def test_a_missing_quickstart_is_named(tmp_path, capsys):
    from benchmarks.compress import main

    said = refused(capsys, main, "--quickstart", tmp_path, "--work", tmp_path / "work")
    assert "has no finished retrieval; run bash launch/quickstart.sh first" in said


def test_fused_words_are_scored_by_the_stages_own_head():
    torch.manual_seed(0)
    task = PretrainTask(PAPER, ("vision", "language", "fusion"), [MaskedData(image_codes=CODES)]).eval()
    batch = random_batch(Layout(pairs=6, patches=PATCHES, pair_len=7)).indexed()

    def noisy(batch):
        kinds = task.encoder(batch)
        return kinds._replace(pair_texts=kinds.pair_texts + 10 * torch.randn_like(kinds.pair_texts))

    own, same, other = measure(task, {"fp32": task.encoder, "same": task.encoder, "noisy": noisy}, [batch] * 2, 1)
    said, right = task.objectives["masked"].predict(task.encoder(batch), batch)["pair_text"]
    assert own["words_in_pairs_percent"] == round(100 * (said == right).double().mean().item(), 1)
    assert own["words"] == 2 * len(right) and own["rows_off"] == same["rows_off"] == 0 < other["rows_off"]
    assert own["words_in_pairs_percent"] == same["words_in_pairs_percent"] and own["baseline"] == other["baseline"]
