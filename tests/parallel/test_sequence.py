"""The rows of a pass shared among ranks, against one device: passes, training under DeepSpeed, a run by its command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.batch import Layout
from pretrain.metrics import read_metrics
from pretrain.parallel.mesh import Axis
from pretrain.parallel.sequence import Cut
from pretrain.parallel.sizes import Parallel
from tests.distributed import run_ranks
from tests.parallel.sequence_ranks import both_sides_of_an_exchange, kept_for_backward, passes
from tests.parallel.tensor_ranks import Case
from tests.parallel.test_tensor import check_training, contrast
from tests.small_run import Ranks, check_weights, command, tokenizer_of, train_stage
from tests.step_batches import PAPER, step_batch

CASES: list[Case] = [("paper", True, 0), ("released", False, 1), ("vlmo", False, 2)]
TOPOLOGIES = {
    "two": (2, Parallel(sequence=2)),
    "four": (4, Parallel(sequence=4)),
    "with tensor ranks": (4, Parallel(sequence=2, tensor=2)),
    "with data ranks": (4, Parallel(sequence=2)),
}


@pytest.mark.parametrize("ranks", [2, 3, 5, 40])
def test_every_row_has_one_rank_and_all_have_as_many_of_each_kind(ranks):
    layout = Layout(images=3, pairs=2, texts=1, patches=16, pair_len=7, text_len=5)
    cuts = [Cut.of(layout, Axis(None, rank, ranks), torch.device("cpu")) for rank in range(ranks)]
    places = torch.cat([cut.own.places for cut in cuts])
    assert torch.equal(places.sort().values, torch.arange(layout.rows))
    ends = torch.tensor(layout.counts).cumsum(0)
    for cut in cuts:
        assert torch.equal(cut.by_rank, places) and torch.equal(places[cut.back], torch.arange(layout.rows))
        assert cut.sizes == [len(other.own.places) for other in cuts]
        kinds = torch.bucketize(cut.own.places, ends, right=True)
        assert kinds.bincount(minlength=4).tolist() == list(cut.own.counts)
    for counts in zip(*(cut.own.counts for cut in cuts), strict=True):
        assert max(counts) - min(counts) <= 1
    assert max(cuts[0].sizes) - min(cuts[0].sizes) <= 4


def test_exchanges_are_each_others_adjoint():
    run_ranks(both_sides_of_an_exchange, 3)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_model_gives_the_losses_and_gradients_of_one_device(topology):
    ranks, parallel = TOPOLOGIES[topology]
    run_ranks(passes, ranks, CASES, parallel)


def test_contrast_is_over_data_ranks_and_not_over_sequence_ranks():
    run_ranks(contrast, 4, Parallel(sequence=2))


@pytest.mark.slow
@pytest.mark.parametrize("partitioned", [False, True], ids=["built whole", "built in parts"])
def test_zero_over_sequence_and_data_ranks_trains_as_one_device_does(partitioned):
    stages = ("3",) if partitioned else ("1", "3")
    names = [f"zero{stage}{kind}.json" for stage in stages for kind in ("", "_bf16")]
    check_training(names, partitioned, Parallel(sequence=2))


def test_a_rank_keeps_its_share_of_the_activations():
    model = replace(PAPER, dim=64, ffn_dim=256, heads=4)
    batch = step_batch((8, 8, 8), 1, 0, 1)
    blocks, besides = run_ranks(kept_for_backward, 1, 1, model, batch)[0]
    for ranks in (2, 4):
        for share, rest in run_ranks(kept_for_backward, ranks, ranks, model, batch):
            assert share == pytest.approx(blocks / ranks, rel=0.05)
            assert rest < besides


@pytest.mark.slow
def test_a_run_over_sequence_ranks_is_the_run_of_one_process(data, tmp_path):
    settings = ["steps=4", tokenizer_of(data), "activation_checkpointing=1"]
    done = train_stage(data, tmp_path / "alone", "fusion", *settings)
    assert done.returncode == 0, done.stderr
    line = command(data, tmp_path / "shared", "fusion", *settings, "parallel.sequence=2", ds="zero3.json")
    ranks = Ranks(line, data, 2, tmp_path / "log")
    assert ranks.wait(120) == [0, 0], (tmp_path / "log").read_text()
    got, want = (read_metrics(tmp_path / run / "fusion" / "metrics.jsonl") for run in ("shared", "alone"))
    assert [a["step"] for a in got] == [b["step"] for b in want] == [1, 2, 3, 4]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in (name for name in b if name.startswith(("loss", "accuracy")) or name in ("lr", "samples_seen")):
            assert a[name] == pytest.approx(b[name], abs=2e-6), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5), a["step"]
    check_weights(tmp_path / "shared" / "fusion", tmp_path / "alone" / "fusion", 5e-6)
