"""The loader on real small tars: one order for all ranks, workers and restarts; traces, workers and signals."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batch import BOS, EOS, PAD, Batch
from pretrain.data import sources
from pretrain.data.loader import shard_names
from pretrain.data.masking import Masking
from pretrain.data.shards.reader import ShardReader
from pretrain.data.sources import ImageShards, window_ids
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform, sample_rng
from tests.toys import COUNTS, SIZE, encoded, full_beyond, index_source, picture

PARTS = {
    "images": ("images", "image_masks"),
    "pair": ("pair_tokens", "pair_inputs", "pair_masked"),
    "text": ("text_tokens", "text_inputs", "text_masked"),
}


def by_key(batches: list[Batch]) -> list[tuple]:
    """The global batch as (key, tensors) of each sample, kind by kind, in the order of ranks and micro-steps."""
    kinds: dict[str, list[tuple]] = {"images": [], "pairs": [], "texts": []}
    for batch in batches:
        layout = batch.layout
        for i, key in enumerate(batch.keys):
            kind = key.split("/")[0]
            if kind == "images":
                tensors = [getattr(batch, name)[i] for name in PARTS["images"]]
            elif kind == "pairs":
                tensors = [getattr(batch, name)[i] for name in PARTS["images"]]
                tensors += [getattr(batch, name)[i - layout.images] for name in PARTS["pair"]]
            else:
                tensors = [getattr(batch, name)[i - layout.images - layout.pairs] for name in PARTS["text"]]
            tensors.append(batch.draws["drop_path"][i])  # keys and sequences have the same order
            kinds[kind].append((key, *[t.numpy().tobytes() for t in tensors]))
    return [sample for samples in kinds.values() for sample in samples]


def steps(
    build, start: int, stop: int, world: int, accumulation: int, workers: int = 0, passed: tuple = ()
) -> list[list[tuple]]:
    ranks = []
    for rank in range(world):
        loader = build(rank=rank, ranks=world, accumulation=accumulation, loading={"workers": workers})
        loader.pass_over(passed)
        ranks.append(list(loader.batches(start, stop)))
    return [by_key([batch for rank in ranks for batch in rank[step]]) for step in range(stop - start)]


@pytest.fixture(scope="module")
def reference() -> dict:
    return {}


def expected(reference: dict, build) -> list[list[tuple]]:
    if "steps" not in reference:
        reference["steps"] = steps(build, 0, 6, 1, 1)  # across the end of an epoch
    return reference["steps"]


@pytest.mark.parametrize(
    ("world", "accumulation", "workers"),
    [(1, 1, 1), (1, 2, 2), (2, 1, 0), (2, 2, 1), (3, 1, 0), (3, 2, 0), (4, 1, 2), (4, 3, 0), (1, 12, 0)],
)
def test_ranks_workers_and_accumulation_leave_the_global_batch_as_it_is(
    build, reference, world: int, accumulation: int, workers: int
) -> None:
    assert steps(build, 0, 6, world, accumulation, workers) == expected(reference, build)


@pytest.mark.parametrize("start", range(6))
def test_a_restart_at_any_step_changes_nothing(build, reference, start: int) -> None:
    world = start % 3 + 1
    assert steps(build, start, 6, world, 1, workers=start % 2) == expected(reference, build)[start:]


@pytest.mark.parametrize(("start", "world", "workers"), [(0, 1, 0), (1, 2, 0), (2, 3, 1)])
def test_batches_that_are_passed_over_leave_the_others_as_they_are(build, reference, start, world, workers) -> None:
    taken = [expected(reference, build)[number - 1] for number in (1, 3, 6)]
    assert steps(build, start, 3, world, 1, workers, ((2, 2), (4, 5))) == taken[start:]


def test_every_sample_comes_once_per_epoch(build) -> None:
    keys = [key for step in build().batches(0, 24) for batch in step for key in batch.keys]
    for kind, epoch in build().samples.items():
        seen = [key for key in keys if key.startswith(kind)]
        assert len(seen) == 24 * COUNTS[kind]
        # A step sorts its samples, also across the end of an epoch, so count them over all steps.
        counts = Counter(seen)
        assert len(counts) == epoch and max(counts.values()) - min(counts.values()) <= 1
    assert len(keys) == 24 * sum(COUNTS.values())


def test_epochs_and_seeds_differ(build) -> None:
    first = next(build().batches(0, 1))[0]
    other = next(build(seed=6).batches(0, 1))[0]
    assert first.keys != other.keys
    same_key, images = first.keys[0], []
    for step in build().batches(0, 30):
        if same_key in step[0].keys:
            images.append(step[0].images[step[0].keys.index(same_key)])
    assert len(images) > 10 and all((image != images[0]).any() for image in images[1:])


def test_a_batch_holds_what_its_layout_says(build, tokenizer: TextTokenizer) -> None:
    (batch,) = next(build(accumulation=1, ranks=2, rank=1).batches(0, 1))
    layout = batch.layout
    assert (layout.images, layout.pairs, layout.texts) == (6, 6, 12)
    assert (layout.patches, layout.pair_len, layout.text_len) == (16, 24, 16)
    assert batch.images.shape == (12, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert batch.image_masks.shape == (12, 16) and (batch.image_masks.sum(1) == round(0.4 * 16)).all()
    for kind, length, count in (("pair", 24, 6), ("text", 16, 12)):
        tokens, inputs, masked = (getattr(batch, f"{kind}_{part}") for part in ("tokens", "inputs", "masked"))
        assert tokens.shape == inputs.shape == masked.shape == (count, length)
        assert tokens.dtype == inputs.dtype == torch.int64 and masked.dtype == torch.bool
        assert (tokens[:, 0] == BOS).all() and ((tokens == EOS).sum(1) == 1).all()
        assert (masked.sum(1) >= 1).all() and (tokens[masked] > 3).all() and (inputs[~masked] == tokens[~masked]).all()
    text = tokenizer.decode(batch.pair_tokens[0].tolist())
    assert text.startswith("picture number")
    assert [key.split("/")[0] for key in batch.keys] == ["images"] * 6 + ["pairs"] * 6 + ["texts"] * 12


def test_without_masking_nothing_is_masked(build) -> None:
    (batch,) = next(build(masking=None).batches(0, 1))
    assert not batch.image_masks.any() and not batch.pair_masked.any() and not batch.text_masked.any()
    assert (batch.pair_inputs == batch.pair_tokens).all() and (batch.text_inputs == batch.text_tokens).all()


def test_pairs_have_their_own_ratios(build) -> None:
    masking = Masking(image_ratio=0.25, pair_image_ratio=0, text_ratio=0, pair_text_ratio=1)
    (batch,) = next(build(masking=masking).batches(0, 1))
    assert (batch.image_masks[:12].sum(1) == 4).all() and not batch.image_masks[12:].any()
    assert not batch.text_masked.any() and (batch.pair_masked == (batch.pair_tokens > 3)).all()


def test_the_end_of_a_text_is_hidden_where_masking_says_so(build) -> None:
    masking = Masking(text_ratio=1, pair_text_ratio=1, mask_eos=True)
    (batch,) = next(build(masking=masking).batches(0, 1))
    for tokens, masked in ((batch.pair_tokens, batch.pair_masked), (batch.text_tokens, batch.text_masked)):
        assert (masked == (tokens > 3) | (tokens == EOS)).all()


def test_dual_batches_hold_image_i_beside_text_i(build, mix: dict, tokenizer: TextTokenizer) -> None:
    loader = build(
        mix={"dual": mix["pairs"]}, counts={"dual": 6}, masking=None, transform=ImageTransform(SIZE, train=False)
    )
    (batch,) = next(loader.batches(0, 1))
    assert (batch.layout.images, batch.layout.pairs, batch.layout.texts) == (6, 0, 6)
    assert batch.layout.text_len == 24 and batch.layout.pair_len == 0 and len(batch.keys) == 6
    for key, image, ids in zip(batch.keys, batch.images, batch.text_tokens, strict=True):
        number = int(key.rsplit("/", 1)[1])
        assert tokenizer.decode(ids.tolist()) == f"picture number {number}"
        same = ImageTransform(SIZE, train=False)(encoded(picture(number)))
        assert (image.numpy() == same).all()


@pytest.mark.parametrize("kind", ["images", "pairs", "texts"])
def test_one_kind_alone(build, mix: dict, kind: str) -> None:
    (batch,) = next(build(mix={kind: mix[kind]}, counts={kind: 4}).batches(0, 1))
    assert len(batch.keys) == 4 and batch.images.shape[1:] == (3, SIZE, SIZE)
    assert batch.image_masks.shape == (batch.images.shape[0], 16)


def test_texts_alone_need_no_transform_and_images_no_tokenizer(build, mix: dict) -> None:
    (batch,) = next(build(mix={"texts": mix["texts"]}, counts={"texts": 4}, transform=None).batches(0, 1))
    assert batch.layout.patches == 0 and batch.image_masks.shape == (0, 0)
    next(build(mix={"images": mix["images"]}, counts={"images": 4}, tokenizer=None).batches(0, 1))


def test_long_documents_give_another_stretch_each_time(tokenizer: TextTokenizer) -> None:
    text = " ".join(f"number {n}" for n in range(3000))
    windows = [window_ids(text, tokenizer, 16, sample_rng(0, 0, n)) for n in range(50)]
    assert all(w[0] == BOS and w[-1] == EOS and PAD not in w for w in windows)
    assert len({w.tobytes() for w in windows}) > 45
    assert (window_ids(text, tokenizer, 16, sample_rng(0, 0, 7)) == windows[7]).all()
    short = window_ids("many words", tokenizer, 16, sample_rng(0, 0, 0))
    assert short[0] == BOS and short[-1] == PAD and tokenizer.decode(short) == "many words"


def trace_of(directory: Path) -> dict[str, list[dict]]:
    files = sorted(directory.glob("*.jsonl"))
    return {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def test_the_trace_lists_the_steps_so_far_and_survives_a_restart(build, tmp_path: Path) -> None:
    def run(start: int, stop: int, world: int, directory: Path, workers: int = 1) -> None:
        for rank in range(world):
            loader = build(ranks=world, rank=rank, trace=directory, accumulation=2, loading={"workers": workers})
            for _ in loader.batches(start, stop):
                pass

    run(0, 5, 2, tmp_path / "whole")
    whole = trace_of(tmp_path / "whole")
    assert list(whole) == ["samples.rank00000.jsonl", "samples.rank00001.jsonl"]
    assert [line["step"] for line in whole["samples.rank00001.jsonl"]] == [1, 2, 3, 4, 5]
    assert all(len(line["keys"]) == sum(COUNTS.values()) // 2 for line in whole["samples.rank00000.jsonl"])

    run(0, 4, 2, tmp_path / "resumed", workers=0)
    with (tmp_path / "resumed" / "samples.rank00000.jsonl").open("a") as file:
        file.write('{"step": 2, "ke')  # killed while writing
    run(2, 5, 2, tmp_path / "resumed")
    assert trace_of(tmp_path / "resumed") == whole
    # With fewer ranks, the other ranks' lines after the restart are removed too.
    run(3, 5, 1, tmp_path / "resumed")
    traces = trace_of(tmp_path / "resumed")
    assert [line["step"] for line in traces["samples.rank00001.jsonl"]] == [1, 2, 3]
    for step in (4, 5):
        (line,) = [line for lines in traces.values() for line in lines if line["step"] == step]
        both = [key for lines in whole.values() for line in lines if line["step"] == step for key in line["keys"]]
        assert sorted(line["keys"]) == sorted(both)


def test_a_disk_that_takes_half_a_line_of_the_trace_is_an_error_at_once(build, tmp_path: Path) -> None:
    batches = build(trace=tmp_path).batches(0, 3)
    next(batches)
    path = tmp_path / "samples.rank00000.jsonl"
    with full_beyond(path.stat().st_size + 10), pytest.raises(OSError, match=r"File too large: '.*rank00000\.jsonl'"):
        next(batches)
    next(resumed := build(trace=tmp_path).batches(1, 3))
    resumed.close()
    assert [line["step"] for line in trace_of(tmp_path)[path.name]] == [1, 2]


def test_only_steps_that_were_used_are_traced(build, tmp_path: Path) -> None:
    batches = build(trace=tmp_path, loading={"workers": 2}).batches(0, 100)
    next(batches), next(batches)
    assert [line["step"] for line in trace_of(tmp_path)["samples.rank00000.jsonl"]] == [1, 2]
    batches.close()


def test_all_workers_end_with_the_loader(build) -> None:
    batches = build(loading={"workers": 2}).batches(0, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    gc.collect()
    assert not multiprocessing.active_children()


def test_workers_ignore_the_signals_that_ask_a_job_to_save(build) -> None:
    batches = build(loading={"workers": 2}).batches(0, 8)
    next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
        # Like a scheduler: a SIGTERM that does not come from the worker's parent.
        assert os.system(f"kill -TERM {worker.pid}") == 0
    time.sleep(0.2)
    assert len(multiprocessing.active_children()) == 2 and len(list(batches)) == 7


def test_a_worker_still_obeys_its_parent(build) -> None:
    batches = build(loading={"workers": 1}).batches(0, 1000)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    batches.close()


def test_loading_does_not_touch_the_global_generators(build) -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        list(build(loading={"workers": workers}).batches(0, 2))
    assert (torch.get_rng_state() == before).all() and (np.random.get_state()[1] == numpy_before).all()


def test_a_batch_can_be_indexed_again_without_changing_what_was_read(build, mix: dict) -> None:
    digests = build().digests
    index_source(Path(mix["images"].shards))
    assert build().digests == digests and set(digests) == {"images", "pairs", "texts"}


def test_shards_with_the_same_name_get_different_keys() -> None:
    assert shard_names(["00000.tar", "00001.tar"]) == ("00000", "00001")
    assert len(set(shard_names(["00000.tar", "00001.tar", "00000.tar"]))) == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("slow", ["read", "decode"])
def test_a_wait_for_data_names_its_cause(build, mix: dict, monkeypatch, workers: int, slow: str) -> None:
    where, name = (ShardReader, "read") if slow == "read" else (sources, "window_ids")
    fast = getattr(where, name)
    loader = build(mix={"texts": mix["texts"]}, counts={"texts": 4}, transform=None, loading={"workers": workers})
    monkeypatch.setattr(where, name, lambda *a: time.sleep(0.05) or fast(*a))
    list(loader.batches(0, 3))
    waited = {"read": loader.waited_read_s, "decode": loader.waited_decode_s}
    assert waited.pop(slow) > 0.3 and waited.popitem()[1] > 0
    assert getattr(loader, f"waited_{slow}_s") > 0.5 * (loader.waited_read_s + loader.waited_decode_s)


class Looks(ImageShards):
    """Looks several times at a picture; the image is the look that `chosen` says, -1: what the source made of it."""

    chosen = 0

    def decode(self, members, transform, tokenizer, rng):
        data = sources.picture(members)
        looks = [transform(data, rng) for _ in range(3)]
        assert transform.size == SIZE
        image = 255 - looks[0] if self.chosen < 0 else looks[self.chosen]
        return sources.Raw(image, None, {"looks": np.stack(looks)})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("chosen", [0, 1, -1])
def test_a_source_may_look_several_times_at_a_picture(build, mix, monkeypatch, chosen: int, workers: int) -> None:
    monkeypatch.setattr(Looks, "chosen", chosen)
    images = {"images": Looks(mix["images"].shards)}
    for (batch,) in build(mix=images, counts={"images": 6}, loading={"workers": workers}).batches(0, 2):
        looks = batch.extra["looks"]
        assert looks.shape == (6, 3, 3, SIZE, SIZE) and (looks[:, 0] != looks[:, 1]).any()
        assert torch.equal(batch.images, 255 - looks[:, 0] if chosen < 0 else looks[:, chosen])
