"""Metrics: FLOPs against known numbers, the meter against a fake clock, the log against kills and resumes."""

from __future__ import annotations

import json
import math
import struct

import pytest

from pretrain import metrics
from pretrain.batch import Layout
from pretrain.metrics import MetricsLog, Throughput, flops_per_batch, flops_per_sequence, peak_flops, read_metrics

BASE = {"dim": 768, "depth": 12, "ffn_dim": 3072}


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock.perf_counter)
    return clock


def test_flops_of_a_sequence_are_counted_product_by_product():
    # length 5, dim 4, ffn 8: q, k, v, out; two of the feed-forward; scores and values of 5 x 5.
    products = 4 * (5 * 4 * 4) + 2 * (5 * 4 * 8) + 2 * (5 * 5 * 4)
    assert flops_per_sequence(5, dim=4, depth=3, ffn_dim=8) == 3 * 3 * 2 * products


def test_flops_of_vit_base_are_the_published_17_5_gflops():
    # DeiT and timm: ViT-B/16 at 224, 17.6 G multiply-adds forward (the head of 1000 classes is 0.0008 of it).
    layout = Layout(images=1, patches=197)
    forward = flops_per_batch(layout, **BASE, patch_inputs=768, heads=[(1, 1000)]) / 3
    assert forward / 2 == pytest.approx(17.56e9, rel=0.005)


def test_flops_of_a_beit3_base_step_are_0_72_petaflop():
    """The paper's batch, 2048 of each kind; the number was derived independently of this code."""
    layout = Layout(images=2048, pairs=2048, texts=2048, patches=197, pair_len=64, text_len=196)
    assert flops_per_batch(layout, **BASE, patch_inputs=768) == pytest.approx(0.72e15, rel=0.01)


def test_flops_add_up_over_kinds_and_heads():
    mixed = flops_per_batch(
        Layout(images=2, pairs=3, texts=4, patches=10, pair_len=6, text_len=16), **BASE, heads=[(7, 9)]
    )
    images = flops_per_batch(Layout(images=2, patches=10), **BASE)
    # A pair is as long as a text here: neither may swallow the other.
    rest = 7 * flops_per_sequence(16, **BASE)
    assert mixed == images + rest + 3 * 2 * 7 * 768 * 9
    assert flops_per_batch(Layout(texts=4, text_len=16), **BASE) == 4 * flops_per_sequence(16, **BASE)
    assert flops_per_batch(Layout(), **BASE) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some future card", None),
    ],
)
def test_peak_is_that_of_the_data_sheet(name, peak):
    assert metrics._peak_of(name) == peak
    assert peak_flops("cpu") is None


def test_throughput_is_the_mean_since_the_last_reading(clock):
    meter = Throughput("cpu", data_ranks=2)
    meter.peak = 1e12
    for _ in range(4):
        clock.now += 0.5
        meter.wait(0.1)
        meter.tick(samples=32, tokens=100, flops=2.5e11)
    read = meter.read()
    assert read["samples_per_s"] == pytest.approx(64)
    assert read["tokens_per_s"] == pytest.approx(400)
    assert read["mfu"] == pytest.approx(0.5)
    assert read["data_wait"] == pytest.approx(0.2)
    assert 0.01 < read["memory_gib"] < 1000
    clock.now += 30  # saving a checkpoint
    meter.skip()
    clock.now += 1
    meter.tick(samples=10, tokens=1, flops=0)
    assert meter.read()["samples_per_s"] == pytest.approx(10)


def test_mfu_is_null_where_the_peak_is_unknown(clock):
    meter = Throughput("cpu")
    assert meter.read()["mfu"] is None  # nor does an empty reading divide by zero


def write_steps(directory, start, stop, offset=0.0):
    with MetricsLog(directory, resume_step=start) as log:
        for step in range(start + 1, stop + 1):
            log.write(step, {"loss": math.sin(step) + offset, "lr": 1e-3 / 3, "mfu": None})


def test_floats_read_back_to_the_same_bits(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-310, "c": struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\x07\x40")[0], "d": -0.0}
    with MetricsLog(tmp_path) as log:
        log.write(1, values)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(line) == ["step", *values]
    assert all(struct.pack("<d", line[name]) == struct.pack("<d", value) for name, value in values.items())


def test_a_resumed_log_equals_one_that_was_left_alone(tmp_path):
    write_steps(tmp_path / "alone", 0, 20)
    write_steps(tmp_path / "killed", 0, 13)
    path = tmp_path / "killed" / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 14, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 14))
    write_steps(tmp_path / "killed", 10, 20)
    assert path.read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    write_steps(tmp_path / "killed", 0, 20)  # from scratch
    assert path.read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 0, 6, offset=5.0)
    write_steps(tmp_path, 3, 5)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in board.Scalars("loss")}
    assert losses == pytest.approx({s: math.sin(s) + (5.0 if s <= 3 else 0.0) for s in range(1, 6)}, rel=1e-6)


def test_a_cut_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_steps(tmp_path, 0, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_nan_becomes_null_and_says_so(tmp_path, caplog):
    with MetricsLog(tmp_path) as log:
        log.write(7, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 7,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }
    assert "step 7: loss is nan" in caplog.text and "grad_norm is inf" in caplog.text


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with MetricsLog(tmp_path / "run") as log:
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_program_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")
