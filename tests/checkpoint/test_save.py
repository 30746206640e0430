"""Checkpoints under faults (with a stand-in engine, one process), and bit-equal resume (DeepSpeed, two ranks)."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import save as saving
from pretrain.checkpoint import saver
from pretrain.checkpoint.directory import Retention, place_of, shutil
from pretrain.checkpoint.save import SaveError, newest, resume
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.weights import load_handover
from pretrain.parallel.faults import Watch
from tests.checkpoint.stand_in import StandIn, restored_value
from tests.distributed import run_ranks
from tests.parallel.test_engine import CONFIGS, OPTIM, Toy, layer_of, micro_batches
from tests.toys import full_beyond

pytestmark = pytest.mark.usefixtures("stand_ins")
PRECISION = {"precision": "fp32"}
FILES = ("moments_rank00000.safetensors", "random_rank00000.pt", "weights.safetensors")


def save(engine, directory: Path, step: int, **rest) -> None:
    saving.save(engine, directory, step, weights=({"weight": torch.full((3,), float(step))}, {}), **rest)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_comes_back_with_its_extra_and_old_ones_go(tmp_path):
    for step in (5, 10, 100):
        save(StandIn(step), tmp_path, step, retention=Retention(2), extra={"stage": "vision"})
    assert names(tmp_path) == ["step_00000010", "step_00000100"]
    assert restored_value(tmp_path) == (100, 100.0)
    assert newest(tmp_path, **PRECISION).extra == {"stage": "vision"}
    manifest = json.loads((tmp_path / "step_00000100" / "MANIFEST.json").read_text())
    assert {"step", "world", "recipe_hash", "data_digest", "files", "sha256"} <= set(manifest)
    assert set(manifest["files"]) == set(FILES)


def test_a_directory_moves_and_still_restores(tmp_path):
    save(StandIn(7), tmp_path / "a", 7)
    (tmp_path / "a").rename(tmp_path / "b")
    assert restored_value(tmp_path / "b") == (7, 7.0)
    assert restored_value(tmp_path) is None and restored_value(tmp_path / "a") is None, "nothing to restore"


def test_every_generator_comes_back(tmp_path):
    save(StandIn(), tmp_path, 1)
    numbers = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)
    restored_value(tmp_path)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == numbers


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("fault", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, caplog, name, fault):
    save(StandIn(1), tmp_path, 1)
    save(StandIn(2), tmp_path, 2)
    victim = tmp_path / "step_00000002" / name
    content = bytearray(victim.read_bytes())
    if fault == "flip":
        at = content.index(b'"step"') + 8 if name == "MANIFEST.json" else len(content) // 2
        content[at] ^= 1
        victim.write_bytes(content)
    elif fault == "cut":
        victim.write_bytes(content[:-3])
    else:
        victim.unlink()
    assert restored_value(tmp_path) == (1, 1.0)
    warnings = [record.message for record in caplog.records if "rejected" in record.message]
    assert len(warnings) == 1 and name in warnings[0] and "step_00000002" in warnings[0]
    # The run goes on from step 1 and comes to step 2 again: a good copy takes the damaged one's place.
    save(StandIn(3), tmp_path, 2)
    assert restored_value(tmp_path) == (2, 3.0)


@pytest.mark.parametrize("name", ["moments_rank00000.aaa.safetensors", "moments_rank00001.safetensors"])
def test_a_file_that_no_manifest_lists_is_neither_read_nor_in_the_way(tmp_path, monkeypatch, name):
    """As a copy that somebody laid beside the real one, or the damaged remains of one."""
    read: list[str] = []
    monkeypatch.setattr(saving, "read_moments", lambda engine, mesh, files: read.extend(path.name for path in files))
    for step in (1, 2):
        save(StandIn(step), tmp_path, step)
        (tmp_path / f"step_{step:08d}" / name).write_bytes(b"garbage")
    checkpoint = newest(tmp_path, **PRECISION)
    assert checkpoint.step == 2
    resume(StandIn(), checkpoint)
    assert read == ["moments_rank00000.safetensors"]
    # With the newest damaged, the one before is taken in spite of its own garbage.
    (tmp_path / "step_00000002" / "moments_rank00000.safetensors").write_bytes(b"damaged")
    checkpoint = newest(tmp_path, **PRECISION)
    assert checkpoint.step == 1
    resume(StandIn(), checkpoint)
    assert read == ["moments_rank00000.safetensors"] * 2


class Killed(BaseException):
    """As kill -9: no cleanup of ours may depend on it."""


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch, call):
    save(StandIn(1), tmp_path, 1)
    real, calls, moments = getattr(os, call), [0], 0

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] > moments:
            raise Killed
        return real(*args, **kwargs)

    for moments in range(20):
        calls[0] = 0
        monkeypatch.setattr(os, call, dying)
        try:
            save(StandIn(2), tmp_path, 2, retention=Retention(1))
            ended = True
        except Killed:
            ended = False
        monkeypatch.setattr(os, call, real)
        restored = restored_value(tmp_path)
        assert restored in ([(2, 2.0)] if ended else [(1, 1.0), (2, 2.0)]), moments
        assert not [name for name in names(tmp_path) if name.startswith(".")], "leftovers are removed at the next start"
        if ended:
            break
        if restored == (2, 2.0):  # died after the new one was complete: begin again from 1
            shutil.rmtree(tmp_path / "step_00000002")
            save(StandIn(1), tmp_path, 1)
    assert ended and moments > 0


def test_a_full_disk_leaves_the_old_one(tmp_path):
    save(StandIn(1), tmp_path, 1)
    with full_beyond(2000), pytest.raises(SaveError, match=r"step 2 .*moments_rank00000.*intact") as error:
        save(StandIn(2), tmp_path, 2, retention=Retention(1))
    assert error.value.errno == errno.EFBIG and "\n" not in str(error.value)
    assert names(tmp_path) == ["step_00000001"]
    assert restored_value(tmp_path) == (1, 1.0)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({"recipe_hash": "a"}, {"recipe_hash": "b"}, "recipe_hash=a.*--run-dir"),
        ({"data_digest": "a"}, {"data_digest": "b"}, "data_digest=a.*put the same ones back"),
        ({}, {"precision": "bf16"}, "precision=fp32 .* has bf16"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_the_way_out(tmp_path, before, now, says):
    save(StandIn(1), tmp_path, 1, **before)
    with pytest.raises(ValueError, match=says):
        newest(tmp_path, **PRECISION | now)


def test_a_checkpoint_of_before_shards_had_hashes_is_resumed(tmp_path):
    now = {"data_digest": "images:content text:t", "names_digest": "images:names text:t"}
    save(StandIn(1), tmp_path, 1, data_digest="images:names text:t")
    assert newest(tmp_path, **PRECISION | now).step == 1
    save(StandIn(1), tmp_path, 2, data_digest="images:content text:t")
    assert newest(tmp_path, **PRECISION | now).step == 2
    with pytest.raises(ValueError, match="data_digest=images:content text:t and this run has images:other"):
        newest(tmp_path, **PRECISION | now | {"data_digest": "images:other text:t"})


def test_a_run_whose_start_had_no_digest_goes_on(tmp_path):
    save(StandIn(1), tmp_path, 1, data_digest="images:a init_from: x:")
    assert newest(tmp_path, **PRECISION, data_digest="images:a init_from:b x:c").step == 1
    with pytest.raises(ValueError, match="data_digest"):
        newest(tmp_path, **PRECISION, data_digest="images:b init_from:b x:c")


def test_another_layout_is_not_refused(tmp_path, monkeypatch, caplog):
    save(StandIn(1), tmp_path, 1)
    monkeypatch.setattr(saving, "world_size", lambda: 4)
    checkpoint = newest(tmp_path, **PRECISION)
    with caplog.at_level("INFO"):
        resume(StandIn(stage=3), checkpoint)
    assert "saved on 1 ranks (zero 1), on 4 ranks (zero 3)" in caplog.text


# ---- DeepSpeed on two ranks

STEPS, HALF = 6, 3


def make_engine(name: str, seed: int, checkpoint=None):
    from pretrain.optim import build_optimizer, schedule
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine

    config = load_ds_config(CONFIGS / name, micro=4, accumulation=2, world=2, clip=OPTIM.clip)
    task = Toy(dropout=0.3)
    with torch.no_grad():
        for value in (*task.parameters(), task.mean):
            value += seed  # nothing may be right by itself after a restore
    if checkpoint is not None:
        load_handover(task, checkpoint.weights)
    engine = build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, STEPS), config)
    if checkpoint is not None:
        resume(engine, checkpoint)
    return engine


def whole_save(engine, directory: Path, step: int, **rest) -> None:
    from pretrain.parallel.state import full_state

    saving.save(engine, directory, step, weights=(full_state(engine), {}), **rest)


def run_steps(engine, first: int, last: int) -> list[float]:
    from pretrain.distributed import rank

    losses = []
    for step in range(first, last + 1):
        for batch in micro_batches(step)[rank() * 2 : rank() * 2 + 2]:
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def interrupted_and_not(configs: list[str], root: str) -> dict:
    from pretrain.distributed import rank
    from pretrain.parallel.state import full_state

    results, done, write = {}, threading.Event(), saver.write_snapshot
    # The write begins when training is over.
    saver.write_snapshot = lambda *args: done.wait() and write(*args)
    for name in configs:
        directory = Path(root) / name
        torch.manual_seed(10 + rank())
        engine = make_engine(name, 0)
        losses = run_steps(engine, 1, HALF)
        whole_save(engine, directory / "plain", HALF, recipe_hash="r")
        done.clear()
        directory = directory / "background"
        with Saver(engine, directory, Watch(), identity={"recipe_hash": "r"}) as background:
            background.save(HALF, {}, Retention())
            losses += run_steps(engine, HALF + 1, STEPS)
            done.set()
        whole = full_state(engine), losses

        torch.manual_seed(77)
        checkpoint = newest(directory, precision="bf16" if "bf16" in name else "fp32", recipe_hash="r")
        engine = make_engine(name, 1, checkpoint)
        halves = losses[: 2 * HALF] + run_steps(engine, HALF + 1, STEPS)
        manifests = [directory.with_name(kind) / place_of(directory, HALF).name for kind in ("plain", "background")]
        files = [json.loads((path / "MANIFEST.json").read_text())["files"] for path in manifests]
        results[name] = whole, (full_state(engine), halves), files
    return results


def test_a_run_that_resumes_from_a_save_in_the_background_is_bit_equal(tmp_path):
    configs = [f"zero{stage}.json" for stage in range(4)] + [f"zero{stage}_bf16.json" for stage in (1, 2, 3)]
    ranks = run_ranks(interrupted_and_not, 2, configs, str(tmp_path), timeout=60)
    for number, results in enumerate(ranks):
        for name, ((state, losses), (again, losses_again), (plain, background)) in results.items():
            assert len(plain) == 5 and plain == background, "what was written meanwhile is what a plain save writes"
            assert losses == losses_again, (name, number)
            assert list(state) == list(again)
            for key, value in state.items():
                assert torch.equal(value, again[key]), (name, key)
    (_, first), (_, second) = ranks[0]["zero1.json"][0], ranks[1]["zero1.json"][0]
    assert first != second, "ranks draw their own dropout"


def disk_full_on_rank_1(config: str, root: str) -> tuple[str, list[str], int, int]:
    from pretrain.distributed import barrier, rank

    engine = make_engine(config, 0)
    run_steps(engine, 1, 1)
    whole_save(engine, Path(root), 1)
    with full_beyond(1000) if rank() == 1 else nullcontext():
        run_steps(engine, 2, 2)
        with pytest.raises(SaveError) as error:
            whole_save(engine, Path(root), 2)
    message = str(error.value)
    run_steps(engine, 3, 3)  # the engine is whole: training could go on
    whole_save(engine, Path(root), 3)
    remaining, step = names(Path(root)), newest(Path(root), **PRECISION).step
    barrier()
    if rank() == 0:  # one file is hurt, one rank sees it, both refuse
        next(Path(root).glob("step_00000003/moments_rank00001*")).write_bytes(b"")
    barrier()
    return message, remaining, step, newest(Path(root), **PRECISION).step


def test_a_disk_full_on_one_rank_is_learnt_by_all(tmp_path):
    for message, remaining, step, before in run_ranks(disk_full_on_rank_1, 2, "zero3.json", str(tmp_path), timeout=60):
        assert "step 2" in message and "rank 1" in message and "moments_rank00001" in message
        assert remaining == ["step_00000001", "step_00000003"]
        assert (step, before) == (3, 1)
