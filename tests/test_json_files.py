"""JSON from files: whatever stands in one, its reader takes it or says in one sentence why not."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools import download
from data_tools.fetch.slices import Slice, write_list
from data_tools.lists.parts import Parts
from data_tools.ownership import owned
from data_tools.shards.steps import Step, read_steps, write_step
from pretrain.checkpoint.directory import _hash_json, complete, damage
from pretrain.data.shards.manifest import load_manifest
from pretrain.files import write_json
from pretrain.json_files import MAX_BYTES, parse_json, read_object, typed
from pretrain.models.visual_tokenizer.teachers import _clip_statistics
from pretrain.parallel.ds_config import load_ds_config
from pretrain.report.__main__ import write_report
from pretrain.run.directory import read_recipe
from pretrain.settings import set_values
from tests.toys import numbered_source

DIGITS = "9" * 400
HOSTILE = {
    "nested": b'{"a": ' * 100_000,
    "closed": b'{"version": ' * 900 + b"1" + b"}" * 900,
    "digits": b'{"version": %s, "step": %s}' % (DIGITS.encode(), DIGITS.encode()),
    "more digits": b'{"version": %s}' % (b"9" * 5000),
    "infinite": b'{"version": 1e999, "step": 1e999}',
    "list": b"[1]",
    "null": b"null",
    "text": b'"version"',
    "latin": b"\xff\xfe{",
    "empty": b"",
    "torn": b'{"version": 1, "sha',
}
WRONG = (None, True, -1, 1.5, 1e300, float("inf"), float("nan"), 10**39, 2**63, "", "x", "1", [], [1], {}, {"x": 1})


def wrong(content: Any) -> Iterator[Any]:
    """`content` with another value in each place, one at a time, and without it."""
    yield from WRONG
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            for part in wrong(content[key]):
                changed = copy.copy(content)
                changed[key] = part
                yield changed
        for key in content if isinstance(content, dict) else ():
            yield {name: part for name, part in content.items() if name != key}


def a_manifest(place: Path) -> tuple[Path, Callable]:
    source = numbered_source(place / "source")
    return source / "manifest.json", lambda: load_manifest(str(source))


def a_step(place: Path) -> tuple[Path, Callable]:
    path = write_step(place, "dedup", Step("dedup", 3, 2, {"near": 1}, {"max_distance": 4}, ["in"]))
    return path, lambda: read_steps(place)


def a_ds_config(place: Path) -> tuple[Path, Callable]:
    path = place / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": True}}))
    return path, lambda: load_ds_config(path, micro=1, accumulation=1, world=1, clip=1.0)


def a_stamp(place: Path) -> tuple[Path, Callable]:
    path = place / "stamp.json"
    path.write_text(json.dumps({"size": 8, "done": {}}))

    def read() -> None:
        with owned(place, {"size": 7}, stamp=path, work=place / "work"):
            raise AssertionError("it was started with other settings")

    return path, read


def a_checkpoint(place: Path) -> tuple[Path, Callable]:
    path = place / "step_00000001" / "MANIFEST.json"
    path.parent.mkdir()
    entry = {"bytes": 1, "sha256": "x"}
    body = {"version": 3, "step": 1, "world": 1, "layout": {"zero": 1}, "extra": {}, "files": {"a": entry}}
    path.write_text(json.dumps(body))

    def read() -> None:
        """With the right checksum, where it is an object."""
        if path.is_file() and path.stat().st_size < 10_000 and path.read_bytes().startswith(b"{"):
            try:
                content = json.loads(path.read_bytes())
                path.write_text(json.dumps(content | {"sha256": _hash_json(content)}))
            except (ValueError, RecursionError):
                pass
        for name, manifest in complete(place):
            damage(place / name, manifest["files"])

    return path, read


def a_teacher(place: Path) -> tuple[Path, Callable]:
    path = place / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}))
    return path, lambda: _clip_statistics(place)


def a_slice(place: Path) -> tuple[Path, Callable]:
    """What a slice of a download listed; the slice is not done."""
    part = Slice(place, 0, 1, 10)
    part.list.mkdir(parents=True)
    path = part.list / "list.json"
    write_json(path, {"rows": 3, "kept": 2, "dropped": {"no_url": 1}, "first": 0, "digits": 5})
    return path, lambda: write_list(None, part)  # type: ignore[arg-type]


def a_plan(place: Path) -> tuple[Path, Callable]:
    """A download of which nothing is done."""
    path = place / "download" / "plan.json"
    path.parent.mkdir()
    plan = {"list": ["a.parquet"], "fingerprint": "x", "preset": "laion", "slices": 2, "samples_per_shard": 10}
    write_json(path, plan | {"url_col": None, "caption_col": None})
    return path, lambda: download.merge(place)


def a_done_slice(place: Path) -> tuple[Path, Callable]:
    """A download of one slice, which has no picture."""
    a_plan(place)
    write_json(
        place / "download" / "plan.json", json.loads((place / "download" / "plan.json").read_text()) | {"slices": 1}
    )
    path = Slice(place, 0, 1, 10).done
    path.parent.mkdir()
    content = {"list": {"rows": 3, "kept": 2, "dropped": {"no_url": 1}}}
    write_json(path, content | {"download": {"rows": 2, "kept": 0, "dropped": {"http_404": 2}}})
    return path, lambda: download.merge(place)


def a_part(place: Path) -> tuple[Path, Callable]:
    parts = Parts(place / "kept.parquet")
    path = parts._path(0, "json")
    path.parent.mkdir()
    write_json(path, {"rows": 2, "kept": 1, "no_url": 1})
    return path, parts.done


READERS = [a_slice, a_plan, a_done_slice, a_part, a_manifest, a_step, a_ds_config, a_stamp, a_checkpoint, a_teacher]


def is_taken_or_refused(read: Callable, what: object) -> str:
    """The sentence of the refusal, "" if there is none."""
    try:
        read()
    except ValueError as error:
        sentence = str(error)
    else:
        return ""
    assert "\n" not in sentence, what
    return sentence


@pytest.mark.parametrize("make", READERS)
def test_a_hostile_file_is_one_sentence(tmp_path, make):
    path, read = make(tmp_path)
    for name, data in HOSTILE.items():
        path.write_bytes(data)
        sentence = is_taken_or_refused(read, name)
        assert len(sentence) < 1000 and (sentence or make is a_checkpoint), (name, sentence)
    path.unlink()
    os.mkfifo(path)
    is_taken_or_refused(read, "a named pipe")  # without waiting for its other end
    path.unlink()
    path.touch()
    os.truncate(path, MAX_BYTES * 100)
    is_taken_or_refused(read, "too large")


@pytest.mark.parametrize("make", READERS)
def test_a_value_of_another_type_is_one_sentence(tmp_path, make):
    path, read = make(tmp_path)
    content = json.loads(path.read_text())
    for changed in wrong(content):
        path.write_text(json.dumps(changed))
        is_taken_or_refused(read, changed)


def filled(content: Any, value: Any) -> Any:
    """`content` with one value in all places but the number of the step."""
    if isinstance(content, dict):
        return {key: part if key == "step" else filled(part, value) for key, part in content.items()}
    return [filled(part, value) for part in content] if isinstance(content, list) else value


def test_the_report_and_a_start_survive_any_file(tmp_path):
    stage, line = (
        tmp_path / "run" / "vision",
        {"step": 1, "loss": 2.5, "lr": 0.1, "samples_per_s": 9.5, "samples_seen": 10},
    )
    whole = {
        "recipe.json": {"name": "tiny", "stages": {"vision": {"steps": 5}}, "command": {"recipe": "tiny", "set": []}},
        "eval.json": {"retrieval/image_to_text/R@1": 50, "retrieval/candidates": 256, "masked/image/accuracy": 5},
        "samples.json": {"masked": [{"input": "a.png", "caption": "x"}]},
        "metrics.jsonl": line,
    }
    cases: list[dict[str, bytes]] = [dict.fromkeys(whole, data + b"\n") for data in HOSTILE.values()]
    for value in WRONG:
        changed = {name: json.dumps(filled(content, value)).encode() + b"\n" for name, content in whole.items()}
        cases.append(changed | {"metrics.jsonl": changed["metrics.jsonl"] * 2})
    for value in WRONG[::4]:
        cases.append({name: json.dumps(dict.fromkeys(content, value)).encode() for name, content in whole.items()})
    stage.mkdir(parents=True)
    for files in cases:
        for name, data in files.items():
            (stage / name).write_bytes(data)
        is_taken_or_refused(lambda: (write_report(tmp_path / "run"), read_recipe(stage)), files)


@pytest.mark.parametrize("value", ["[" * 100_000, DIGITS, "9" * 5000, "1e300", "1e999", "[1e300]", "{" * 2000])
def test_a_hostile_setting_is_one_sentence(value):
    """For each type of a knob."""
    from pretrain.recipes.tiny import RECIPE

    for knob in ("seed", "save_every", "optim.lr", "optim.betas"):
        sentence = is_taken_or_refused(lambda knob=knob: set_values(RECIPE, {knob: value}), (knob, value))
        assert len(sentence) < 1000


def test_what_is_read_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"[" * 64 + b"]" * 64)
    with pytest.raises(ValueError, match=r"a holds a list, not a JSON object"):
        read_object(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a has 128 bytes, and at most 100 are read"):
        read_object(tmp_path / "a", limit=100)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse_json(b"[" * 65 + b"]" * 65)
    with pytest.raises(ValueError, match="a number of 400 digits"):
        parse_json(DIGITS)
    assert parse_json("[" * 64 + "]" * 64) and parse_json(b"9" * 40) and parse_json('{"a": "[[["}') == {"a": "[[["}
    assert typed({"a": 1}, "a", int) == 1 and typed({"a": 1}, "a", float) == 1.0
    for content, kind in (({"a": True}, int), ({"a": 2**63}, int), ({"a": None}, str), ({}, int), ([], int)):
        with pytest.raises(ValueError, match="a"):
            typed(content, "a", kind)
