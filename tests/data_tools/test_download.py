"""data_tools.download with the real img2dataset and a hostile server: every row is accounted for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import download
from data_tools.fetch.guarded_fetch import Limits
from data_tools.fetch.reasons import reason_of
from data_tools.fetch.run_img2dataset import ROOT, Run, download_slice
from data_tools.fetch.slices import Slice, write_list
from data_tools.lists.reading import open_list
from data_tools.shards.steps import Step, read_steps, write_step
from pretrain.data.shards.reader import load_manifest
from tests.data_tools.hostile_server import GOOD, KINDS, HostileServer, caption
from tests.toys import needs, read_members, wait_for

needs("img2dataset")

QUICK = ("--workers", "2", "--threads", "16", "--allow-address", "127.0.0.1/32", "--deadline", "5", "--timeout", "4")


def write_rows(path: Path, server: HostileServer, kinds: list[str]) -> Path:
    table = {
        "URL": [server.url(kind, number) for number, kind in enumerate(kinds)],
        "TEXT": [caption(number) for number in range(len(kinds))],
        "similarity": [number / len(kinds) for number in range(len(kinds))],
        "WIDTH": [640.0] * len(kinds),
    }
    pq.write_table(pa.table(table), path)
    return path


def command(rows: Path, out: Path, *more: str) -> list[str]:
    return ["--list", str(rows), "--preset", "laion", "--out", str(out), *QUICK, *more]


def outcomes(out: Path) -> dict[int, str]:
    """Row of the list -> success, or the reason; each row occurs once."""
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: reason_of(row["error_message"]) for row in rows}


@pytest.mark.slow
def test_every_kind_of_picture_ends_as_it_should(server, tmp_path, capsys):
    kinds = [kind for kind in KINDS for _ in range(2)]
    rows = write_rows(tmp_path / "list.parquet", server, kinds)
    write_step(tmp_path, "filter_list", Step("data_tools.filter_list", len(kinds) + 1, len(kinds), {"junk": 1}))
    before = len(server.requests)
    assert download.main(command(rows, tmp_path / "out", "--samples-per-shard", "40")) == 0
    out = tmp_path / "out"
    assert outcomes(out) == {number: KINDS[kind] for number, kind in enumerate(kinds)}
    asked = server.requests[before:]
    steps = read_steps(out)
    assert list(steps) == ["filter_list", "list", "download"]
    assert steps["list"].rows == steps["list"].kept == steps["download"].rows == len(kinds)
    expected = Counter(KINDS[kind] for kind in kinds)
    assert steps["download"].kept == expected.pop("success") == load_manifest(str(out)).samples
    assert steps["download"].dropped == expected
    members = read_members(out)
    texts = {
        json.loads(data)["row"]: members[name[:-4] + "txt"] for name, data in members.items() if name.endswith("json")
    }
    assert texts == {n: caption(n).encode() for n, kind in enumerate(kinds) if kind in GOOD}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert f"{2 * len(GOOD)} of {len(kinds)} pictures" in capsys.readouterr().out
    # Again: there is nothing to do.
    assert download.main(command(rows, out, "--samples-per-shard", "40")) == 0
    assert server.requests[before:] == asked and read_members(out) == members


@pytest.mark.slow
def test_good_pictures_are_what_img2dataset_alone_writes(server, tmp_path):
    # All but those that it decodes in another way than training: see test_fetched_pictures.
    kinds = ["jpg", "png", "webp", "gif", "rgba", "big", "redirect", "wrong_type"]
    rows = write_rows(tmp_path / "list.parquet", server, kinds)
    assert download.main(command(rows, tmp_path / "guarded", "--samples-per-shard", "40")) == 0
    alone = (
        "img2dataset.download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format='parquet', url_col='URL'"
    )
    alone += ", caption_col='TEXT', output_format='webdataset', image_size=256, resize_mode='keep_ratio'"
    alone += ", resize_only_if_bigger=True, skip_reencode=True, number_sample_per_shard=40)"
    script = tmp_path / "alone.py"
    script.write_text(f"import sys, img2dataset\nif __name__ == '__main__':\n    {alone}\n")
    line = [download.find_python(), script, rows, tmp_path / "alone"]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    pictures = [{k: v for k, v in read_members(tmp_path / p).items() if k[-4:] != "json"} for p in ("guarded", "alone")]
    assert len(pictures[0]) == 2 * len(kinds) and pictures[0] == pictures[1]


@pytest.mark.slow
def test_refused_rows_are_tried_again_when_the_options_allow_them(server, tmp_path, capsys):
    """As with a mirror in an intranet: at first the guard refuses it."""
    rows = write_rows(tmp_path / "list.parquet", server, ["jpg", "private", "not_found", "jpg", "private", "private"])
    out, guard = tmp_path / "out", QUICK.index("--allow-address")
    line = [*command(rows, out, "--samples-per-shard", "3")]
    closed = [word for word in line if word not in QUICK[guard : guard + 2]]
    assert download.main(closed) == 2
    error = capsys.readouterr().err
    assert "none of 6 pictures could be downloaded" in error and "run the same command with --allow-address" in error
    asked = len(server.requests)
    assert download.main(line) == 0
    said = capsys.readouterr().out
    assert "2 shards are made again" in said and "2 of 6 pictures" in said
    assert "not_public_address 3, http_404 1; to fetch from addresses that are not public" in said
    assert outcomes(out) == dict(
        enumerate(["success", "not_public_address", "http_404", "success", *["not_public_address"] * 2])
    )
    assert load_manifest(str(out)).samples == 2 and len(server.requests) == asked + 3
    # Nothing is asked again: the other rows' addresses are still refused.
    assert download.main([*line, "--refuse-address", "127.0.0.1/32"]) == 0
    assert len(server.requests) == asked + 3


def start(rows: Path, out: Path, *more: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "data_tools.download", *command(rows, out, *more)]
    # As from a terminal: tests in the background may ignore Ctrl-C, and their children inherit that.
    as_ever = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=as_ever)


def descendants(pid: int) -> list[int]:
    """The descendants of a process, on Linux: children before grandchildren."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]


def workers(pid: int) -> list[int]:
    processes = []
    for process in descendants(pid):
        try:
            if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                processes.append(process)
        except OSError:
            continue
    return processes


@pytest.mark.slow
def test_repeated_kills_do_not_change_the_result(server, tmp_path):
    kinds = [("late", "png", "not_found", "late", "html", "late")[number % 6] for number in range(120)]
    rows = write_rows(tmp_path / "list.parquet", server, kinds)
    small = ("--samples-per-shard", "8", "--threads", "2")
    assert download.main(command(rows, tmp_path / "whole", *small)) == 0
    out = tmp_path / "killed"
    for shards, later in ((0, 0.5), (0, 1.7), (1, 0), (4, 0.05), (7, 0.1), (11, 0)):
        process = start(rows, out, *small)
        wait_for(lambda shards=shards: len(list(out.glob("*.tar"))) >= shards)
        time.sleep(later)
        everyone = descendants(process.pid)
        process.kill()
        process.communicate()
        # No process continues to write beside the next one.
        wait_for(lambda everyone=everyone: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in everyone), 10)
    assert len(list(out.glob("*.tar"))) < 15
    process = start(rows, out, *small)
    assert process.wait(120) == 0, process.stderr.read()
    assert read_members(out) == read_members(tmp_path / "whole")
    assert outcomes(out) == outcomes(tmp_path / "whole")
    assert read_steps(out)["download"].dropped == read_steps(tmp_path / "whole")["download"].dropped
    assert not list((out / "download").rglob("attempt-*"))


@pytest.mark.slow
def test_the_shard_of_a_killed_worker_is_made_again(server, tmp_path):
    kinds = ["slow_drip" if number % 10 == 9 else "jpg" for number in range(60)]
    rows = write_rows(tmp_path / "list.parquet", server, kinds)
    process = start(rows, tmp_path / "out", "--samples-per-shard", "10", "--threads", "2", "--deadline", "2")
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")))
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    assert process.wait(120) == 0, process.stderr.read()
    assert "a worker ended with code -9" in process.stderr.read()
    assert Counter(outcomes(tmp_path / "out").values()) == {"success": 54, "deadline": 6}


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_ends_all_processes(server, tmp_path):
    rows = write_rows(tmp_path / "list.parquet", server, ["slow_drip"] * 40)
    process = start(rows, tmp_path / "out", "--threads", "1")
    wait_for(lambda: workers(process.pid))
    everyone = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run the same command to continue" in error and "Traceback" not in error
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in everyone), 10)


@pytest.mark.slow
def test_a_stall_is_an_error(server, tmp_path):
    rows = write_rows(tmp_path / "list.parquet", server, ["jpg", "slow_drip", "slow_drip"])
    arguments = {"input_format": "parquet", "output_format": "webdataset", "caption_col": "caption"}
    limits, before = Limits(deadline=600, allow=("127.0.0.1/32",)), len(server.requests)
    for seconds in (6, 30, 120):  # under load img2dataset may not even start within the first
        part = Slice(tmp_path / f"out{seconds}", 0, 1, 10)
        part.work.mkdir(parents=True)
        run = Run(download.find_python(), arguments, limits, 2**26, stall_seconds=seconds, attempts=1)
        message = rf"1 of 1 shards are missing \(0\): no picture was fetched for {seconds} s \(--stall"
        with pytest.raises(OSError, match=message):
            download_slice(run, write_list(open_list([rows], "laion"), part))
        if "/jpg/0" in server.requests[before:]:
            break
    assert {"/jpg/0", "/slow_drip/1"} <= {*server.requests[before:]}


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_finished_shards_stay(server, mount, tmp_path, capsys):
    out = mount("3m") / "out"
    rows = write_rows(tmp_path / "list.parquet", server, ["big"] * 300)
    assert download.main(command(rows, out, "--samples-per-shard", "20")) == 2
    error = capsys.readouterr().err
    assert "is full; free some space and run the same command to continue" in error and "Traceback" not in error
    assert all((out / f"{path.stem}_stats.json").exists() for path in out.glob("*.tar"))


@pytest.mark.slow
def test_slices_make_what_one_run_makes(server, tmp_path, capsys):
    rows = write_rows(tmp_path / "list.parquet", server, ["jpg", "not_found", "png"] * 15)
    small = ("--samples-per-shard", "10", "--workers", "1")
    out = tmp_path / "out"
    assert download.main(command(rows, out, *small, "--slice", "1/2")) == 0
    assert "will be merged when the other slices are done (0)" in capsys.readouterr().out
    assert download.main(["--merge", "--out", str(out)]) == 2
    assert "slices 0 are not done" in capsys.readouterr().err
    assert download.main(command(rows, out, *small, "--slice", "0/2")) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == [f"{number:05d}.tar" for number in range(5)]
    assert outcomes(out) == {number: ("success", "http_404", "success")[number % 3] for number in range(45)}
    assert read_steps(out)["download"].rows == 45 and load_manifest(str(out)).samples == 30
    assert download.main(["--merge", "--out", str(out)]) == 0
    assert download.main(command(rows, out, *small, "--slice", "0/3")) == 2
    assert "was started with slices=2 (now 3)" in capsys.readouterr().err
