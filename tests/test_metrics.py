"""Metrics: the meter against a fake clock, the log against kills and resumes."""

from __future__ import annotations

import errno
import json
import math
import struct
from types import SimpleNamespace

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from pretrain import metrics
from pretrain.flops import StepFlops
from pretrain.metrics import MetricsLog, Throughput, read_metrics
from tests.toys import full_beyond


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def test_throughput_is_the_mean_since_the_last_reading(clock):
    meter = Throughput("cpu", data_ranks=2)
    meter.peak = 1e12
    for _ in range(4):
        clock.now += 0.5
        meter.wait(0.1, 0.02, 0.05)
        meter.tick(samples=32, tokens=100, real=70, flops=StepFlops(2.5e11, 2.25e11, 2e11))
    read = meter.read()
    assert read["samples_per_s"] == pytest.approx(64)
    assert read["tokens_per_s"] == pytest.approx(400)
    assert read["real_tokens_per_s"] == pytest.approx(280)
    assert read["mfu"] == pytest.approx(0.5) and read["mfu_real"] == pytest.approx(0.45)
    assert read["mfu_executed"] == pytest.approx(0.4)
    assert read["data_wait"] == pytest.approx(0.2)
    causes = [read[f"data_wait/{cause}"] for cause in ("read", "decode", "transfer")]
    assert causes == pytest.approx([0.04, 0.1, 0.06])
    assert 0.01 < read["memory_gib"] < 1000
    clock.now += 30  # saving a checkpoint
    meter.skip()
    clock.now += 1
    meter.tick(samples=10, tokens=1, real=1, flops=StepFlops())
    assert meter.read()["samples_per_s"] == pytest.approx(10)


def test_mfu_is_null_where_the_peak_is_unknown(clock):
    meter = Throughput("cpu")
    read = meter.read()
    assert read["mfu"] is None and read["mfu_executed"] is None  # nor does an empty reading divide by zero


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


def test_a_disk_that_takes_half_a_line_is_an_error_at_once(tmp_path):
    """Else the step is saved without its line, which the next start cuts off."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        whole = path.stat().st_size
        with full_beyond(whole + 10), pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
            log.write(2, {"loss": 2.0})
    assert path.stat().st_size == whole + 10
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.write(2, {"loss": 2.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("records", [0, 1, 2, 3])
def test_a_board_that_cannot_be_written_is_one_log_line(tmp_path, monkeypatch, caplog, records):
    """TensorBoard writes in a thread of its own, whose traceback nobody shall see. 0: of its very first record; 3: of
    the last, which no later write could tell."""
    untold: list[object] = []
    monkeypatch.setattr("threading.excepthook", untold.append)
    write, left = RecordWriter.write, [records]

    def failing(self, data):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "Input/output error", b"events.out")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", failing)
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0] and not untold
    (said,) = [record.message for record in caplog.records]
    assert "tensorboard cannot be written: " in said and "metrics.jsonl has all of it" in said


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


@pytest.mark.parametrize(
    ("steps", "resume", "every", "hole"),
    [
        ([1, 2, 3, 7, 8, 9, 10], 10, 1, "the steps 4 to 6:"),
        ([1, 2, 3], 10, 1, "the steps 4 to 10:"),
        ([1, 2, 6, 7, 8], 10, 1, "the steps 9 to 10 and 1 other places:"),
        ([5, 10, 20], 22, 5, "the steps 11 to 19:"),
        ([], 4, 1, "the steps 1 to 4:"),
        (range(1, 11), 10, 1, None),
        ([5, 10], 14, 5, None),
        ([10, 20, 30], 35, 5, None),  # log_every was 10
        ([5, 10, 15, 20], 40, 50, None),  # and 5
    ],
)
def test_a_hole_before_the_step_that_a_run_goes_on_from_is_one_log_line(tmp_path, caplog, steps, resume, every, hole):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    with MetricsLog(tmp_path, resume, every=every):
        pass
    told = [record.message for record in caplog.records if "has no line of" in record.message]
    assert len(told) == (hole is not None)
    assert hole is None or hole in told[0]
