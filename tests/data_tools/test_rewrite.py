"""Rewritten shards: dropped samples are counted, all others occur once, in a reproducible order."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.pictures.recode import Recode
from data_tools.rewrite import Settings, main, rewrite
from data_tools.shards.steps import Drop, Step, read_drops, read_steps, write_drops, write_step
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, load_manifest
from tests.small_run import ROOT
from tests.toys import encoded, image_sample, pair_sample, picture, read_all, refused, write_source


def source(directory: Path, shards: int = 3, samples: int = 7, **size: int) -> Path:
    """Shards with rows, not in the order of the keys."""
    keys = [[f"{shard:05d}{i:04d}" for i in range(samples)] for shard in range(shards)]
    for number, row in enumerate(keys):
        random.Random(number).shuffle(row)
    write_source(directory, [[pair_sample(key, int(key), **size) for key in row] for row in keys])
    for number, row in enumerate(keys):
        rows = [{"key": key, "url": f"http://x/{key}", "width": 48, "height": 40, "status": "success"} for key in row]
        rows.append({"key": "failed", "url": "http://x/404", "status": "failed_to_download"})
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{number:05d}.parquet")
    return directory


def contents(directory: Path) -> dict[str, dict[str, bytes]]:
    samples = read_all(directory)
    keys = [sample.pop("__key__").decode() for sample in samples]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, samples, strict=True))


def digests(directory: Path) -> dict[str, str]:
    names = [p for p in directory.iterdir() if p.suffix in (".tar", ".parquet", ".idx") or p.name == "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.large_string()])
def test_rows_of_a_table_whose_keys_another_tool_has_read_as_numbers(tmp_path, kind):
    old = source(tmp_path / "old", shards=1)
    table = pq.read_table(old / "00000.parquet").slice(0, 7)
    keys = [key if kind == pa.large_string() else int(key) for key in table["key"].to_pylist()]
    pq.write_table(table.set_column(0, "key", pa.array(keys, kind)), old / "00000.parquet")
    rewrite([old], tmp_path / "new", Settings(), [])
    rows = pq.read_table(tmp_path / "new" / "00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(7)]
    assert all(row["url"] == f"http://x/{row['key']}" for row in rows)


def test_all_samples_stand_in_order_of_their_keys_in_even_shards(tmp_path):
    old = source(tmp_path / "old")
    done = rewrite([old], tmp_path / "new", Settings(samples_per_shard=8), [])
    assert load_manifest(str(tmp_path / "new")).counts == [7, 7, 7]
    new = contents(tmp_path / "new")
    assert list(new) == sorted(contents(old)) and new == contents(old)
    assert (done.step.rows, done.step.kept, done.step.dropped) == (21, 21, {})
    rows = pq.read_table(tmp_path / "new" / "00001.parquet").to_pylist()
    assert [row["url"] for row in rows] == [f"http://x/{key}" for key in list(new)[7:14]]
    assert not (tmp_path / "new" / ".rewrite").exists()


@pytest.mark.parametrize("seed", [None, 3])
def test_bytes_are_equal_for_any_number_of_workers(tmp_path, seed):
    old = source(tmp_path / "old")
    settings = Settings(samples_per_shard=4, shuffle_seed=seed, max_side=32)
    for workers in (1, 3):
        rewrite([old], tmp_path / str(workers), settings, [], workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def test_a_seed_shuffles_over_all_shards(tmp_path):
    old = source(tmp_path / "old")
    orders = []
    for seed in (1, 2):
        rewrite([old], tmp_path / str(seed), Settings(samples_per_shard=7, shuffle_seed=seed), [])
        orders.append(list(contents(tmp_path / str(seed))))
        assert contents(tmp_path / str(seed)) == contents(old)
        assert len({key[:5] for key in orders[-1][:7]}) > 1
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0] != orders[1]


def test_shards_by_bytes(tmp_path):
    old = source(tmp_path / "old")
    size = load_manifest(str(old)).shards[0].bytes
    rewrite([old], tmp_path / "new", Settings(None, int(size * 1.2)), [])
    shards = load_manifest(str(tmp_path / "new")).shards
    assert len(shards) == 3 and sum(shard.samples for shard in shards) == 21
    assert all(shard.bytes < size * 1.4 for shard in shards)


def test_drops_are_not_written_but_counted(tmp_path):
    old = source(tmp_path / "old")
    first, second = old / "drops" / "a.parquet", old / "drops" / "b.parquet"
    write_drops(first, [Drop("00000", "000000001", "blank"), Drop("00001", "000010002", "near_duplicate")])
    write_drops(second, [Drop("00000", "000000001", "leak:coco"), Drop("00001", "000000003", "leak:coco")])
    write_step(old, "download", Step("download", 30, 21, {"failed_to_download": 9}))
    done = rewrite([old], tmp_path / "new", Settings(samples_per_shard=100), [first, second])
    assert done.step.dropped == {"blank": 1, "near_duplicate": 1} and done.step.kept == 19
    assert done.notes == ["1 drops match no sample of these shards"]  # 000000003 is not in shard 00001
    assert contents(old).keys() - contents(tmp_path / "new").keys() == {"000000001", "000010002"}
    assert list(read_steps(tmp_path / "new")) == ["download", "rewrite"]
    # Once more: the record of the first rewrite is copied too.
    rewrite([tmp_path / "new"], tmp_path / "newer", Settings(), [])
    assert list(read_steps(tmp_path / "newer")) == ["download", "rewrite", "rewrite-2"]


def test_two_directories_with_equal_keys_lose_nothing(tmp_path):
    one, two = source(tmp_path / "one", 2, 3), source(tmp_path / "two", 1, 3, height=50)
    extra = write_source(tmp_path / "three", [[image_sample("000000001-1", 5), image_sample("000000001", 6)]])
    drops = two / "drops" / "d.parquet"
    write_drops(drops, [Drop("00000", "000000002", "blank")])
    done = rewrite([one, two, extra], tmp_path / "new", Settings(samples_per_shard=4), [drops])
    new = contents(tmp_path / "new")
    assert done.step.rows == 11 and done.step.kept == len(new) == 10 and "called KEY--1" in done.notes[0]
    assert new["000000000--1"]["jpg"] == contents(two)["000000000"]["jpg"] != new["000000000"]["jpg"]
    assert new["000000001--2"]["jpg"] == contents(extra)["000000001"]["jpg"]
    assert "000000002" in new and "000000002--1" not in new
    rows = [row for path in sorted((tmp_path / "new").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["key"] for row in rows] == list(new)
    stray = tmp_path / "stray.parquet"
    write_drops(stray, [Drop("00000", "000000002", "blank")])
    with pytest.raises(ValueError, match="lies in none of the directories"):
        rewrite([one, two], tmp_path / "other", Settings(), [stray])


def test_hidden_duplicates_and_unknown_members_are_reported(tmp_path):
    samples = [pair_sample("a", 1), pair_sample("b", 2), pair_sample("a", 3), {"key": "b", "cls": b"7"}]
    write_source(tmp_path / "old", [samples])
    done = rewrite([tmp_path / "old"], tmp_path / "new", Settings(), [])
    assert done.step.rows == 3 and done.step.kept == 2 and done.step.dropped == {"duplicate_key": 1}
    assert done.notes == ["left out: 1 member: .cls, an ending that is not read"]
    (drop,) = read_drops([tmp_path / "new" / "steps" / "rewrite.parquet"])
    assert drop[:3] == ("00000", "a", "duplicate_key")
    assert contents(tmp_path / "new")["a"]["jpg"] == pair_sample("a", 3)["jpg"]


def test_pictures_are_shrunk_and_re_encoded(tmp_path):
    facts = json.dumps({"key": "big", "width": 90, "height": 60, "url": "u"}).encode()
    turned = Image.fromarray(picture(1, 60, 90)).getexif()
    turned[0x0112] = 6
    samples = [
        pair_sample("big", 1, height=60, width=90) | {"json": facts},
        pair_sample("small", 2, height=20, width=30),
        {"key": "png", "png": encoded(picture(3, 20, 30), "PNG"), "txt": b"x"},
        {"key": "turned", "jpeg": encoded(picture(4, 60, 90), exif=turned), "txt": b"x"},
        {"key": "broken", "jpg": encoded(picture(5, 60, 90))[:-200], "txt": b"x"},
    ]
    old = write_source(tmp_path / "old", [samples])
    done = rewrite([old], tmp_path / "keep", Settings(max_side=45), [])
    new = contents(tmp_path / "keep")
    sizes = {
        key: Image.open(io.BytesIO(next(data for name, data in sample.items() if name in IMAGE_EXTENSIONS))).size
        for key, sample in new.items()
    }
    assert sizes == {"big": (45, 30), "small": (30, 20), "png": (30, 20), "turned": (30, 45)}
    assert new["small"] == contents(old)["small"] and new["png"] == contents(old)["png"]
    assert json.loads(new["big"]["json"]) == {"key": "big", "width": 45, "height": 30, "url": "u"}
    assert done.step.dropped == {"undecodable": 1}
    (drop,) = read_drops([tmp_path / "keep" / "steps" / "rewrite.parquet"])
    assert drop.key == "broken" and "cannot decode" in drop.detail
    rewrite([old], tmp_path / "webp", Settings(format="webp", quality=80), [])
    kinds = {Image.open(io.BytesIO(sample["webp"])).format for sample in contents(tmp_path / "webp").values()}
    assert kinds == {"WEBP"}


@pytest.mark.parametrize(("first", "second"), [("png", "PNG"), ("png", "JPEG"), ("jpg", "JPEG")])
@pytest.mark.parametrize("format", ["keep", "jpg", "webp"])
def test_the_second_picture_of_a_sample_is_shrunk_and_stays_the_second(first, second, format):
    """As NLVR2's: its ending, jpe, says which it is and not its format."""
    red, blue = Image.new("RGB", (60, 90), "red"), Image.new("RGB", (90, 60), "blue")
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    members = {first: encoded(red, kinds[first]), "jpe": encoded(blue, second), "txt": b"x"}
    new, facts = Recode(max_side=45, format=format).members(members)
    expected = first if format == "keep" else format
    assert list(new) == [expected, "jpe", "txt"] and facts == {"width": 30, "height": 45}
    pictures = [Image.open(io.BytesIO(new[name])) for name in (expected, "jpe")]
    assert [each.size for each in pictures] == [(30, 45), (45, 30)]
    assert [each.format for each in pictures] == ([kinds[first], second] if format == "keep" else [kinds[format]] * 2)
    assert pictures[1].convert("RGB").getpixel((5, 5))[2] > 200


@pytest.mark.slow
def test_kills_at_random_moments_do_not_change_the_bytes(tmp_path):
    old = source(tmp_path / "old", 4, 40, height=300, width=400)
    line = [str(old), "--samples-per-shard", "8", "--max-side", "200", "--shuffle-seed", "1", "--workers", "2"]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    rng, out, killed = random.Random(7), tmp_path / "killed", 0
    command = [sys.executable, "-m", "data_tools.rewrite", *line, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(10):
        before = len(list(out.glob("*_stats.json"))) if out.exists() else 0
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30  # wait for one more shard, so that each start gets somewhere
        while process.poll() is None and time.monotonic() < deadline and len(list(out.glob("*_stats.json"))) <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(tmp_path / "whole") and contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*")) and read_steps(out)["rewrite"].kept == 160


KILLED_BY_A_WORKER = """
import os, sys, time
from data_tools import rewrite
from data_tools.shards import rewrite_plan

plan = rewrite_plan._scan
master = os.getpid()

def scan(job):
    if os.getpid() != master:
        os.kill(master, 9)
    return plan(job)

rewrite_plan._scan = scan
rewrite.main(sys.argv[1:])
"""


def test_a_run_killed_before_its_first_shard_continues(tmp_path):
    """Its workers end with it: they have inherited its lock, and would hold it for ever."""
    line = [str(source(tmp_path / "old")), "--out", str(tmp_path / "new"), "--workers", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BY_A_WORKER, *line], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL and not list((tmp_path / "new").glob("*.tar"))
    assert main(line) == 0 and contents(tmp_path / "new") == contents(tmp_path / "old")


def test_a_second_call_does_nothing(tmp_path, capsys):
    old = source(tmp_path / "old")
    line = [str(old), "--out", str(tmp_path / "new"), "--samples-per-shard", "5", "--workers", "1"]
    assert main(line) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert main(line) == 0 and "complete already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "new").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--samples-per-shard", "6"],
            "was started with samples_per_shard=10000 (now 6); continue with the same settings",
        ),
        (["--shuffle-seed", "0"], "shuffle_seed=None (now 0)"),
        (["--drop", "{drops}"], "drops=[] (now ["),
        (["--samples-per-shard", "0"], "--samples-per-shard 0 is below 1"),
        (["--max-side", "0"], "--max-side 0 is below 1"),
        (["--quality", "101"], "--quality 101 lies outside 1 to 100"),
        (["--bytes-per-shard", "1e6", "--max-side", "9"], "use --samples-per-shard"),
        (["--bytes-per-shard", "inf"], "--bytes-per-shard inf is no size"),
        (["--bytes-per-shard", "nan"], "--bytes-per-shard nan is no size"),
        (["--out", "{old}"], "is one of the inputs"),
        (["--out", "{old}/drops"], "contains other files"),
        (["--drop", "{old}/00000.tar"], "is not a drops file"),
        (["--drop", "nowhere.parquet"], "nowhere.parquet"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, change, message):
    old = source(tmp_path / "old", 1, 3)
    drops = old / "drops" / "d.parquet"
    write_drops(drops, [Drop("00000", "000000001", "blank")])
    assert main([str(old), "--out", str(tmp_path / "new")]) == 0
    if message.endswith("drops file") or "nowhere" in message or "is below" in message or "lies outside" in message:
        change = [*change, "--out", str(tmp_path / "fresh")]
    words = [word.format(old=old, drops=drops) for word in change]
    assert message in refused(capsys, main, old, "--out", tmp_path / "new", *words)


def test_drops_that_match_nothing_or_everything_are_refused(tmp_path):
    old = source(tmp_path / "old", 1, 2)
    strange, everything = tmp_path / "s.parquet", tmp_path / "e.parquet"
    write_drops(strange, [Drop("00009", "k", "blank")])
    write_drops(everything, [Drop("00000", f"00000000{i}", "blank") for i in range(2)])
    with pytest.raises(ValueError, match="none of the 1 drops names a sample"):
        rewrite([old], tmp_path / "new", Settings(), [strange])
    with pytest.raises(ValueError, match="no sample remains: all 2 are dropped"):
        rewrite([old], tmp_path / "new", Settings(), [everything])
    assert rewrite([old], tmp_path / "new", Settings(), []).step.kept == 2  # the directory can still be used


@pytest.mark.parametrize("name", ["00000.parquet", "drops/d.parquet"])
def test_a_named_pipe_in_the_place_of_a_table_is_not_waited_for(tmp_path, capsys, name):
    old = source(tmp_path / "old", 1, 2)
    (old / "drops").mkdir()
    (old / name).unlink(missing_ok=True)
    os.mkfifo(old / name)
    drops = ["--drop", old / name] if name.startswith("drops") else []
    error = refused(capsys, main, old, "--out", tmp_path / "new", *drops)
    assert f"{old / name} is a named pipe, not a regular file" in error
