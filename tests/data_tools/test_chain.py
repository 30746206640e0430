"""The whole way as README describes it: from a list of strangers' URLs to training, every row accounted for, and the
same samples however often it was killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_tools.fetch.reasons import reason_of
from data_tools.shards.samples import samples_of
from data_tools.shards.steps import read_drops, read_steps
from tests.data_tools.hostile_list import KEPT, LIST_OPTIONS, MOST_ASPECT, MOST_REPEATS, Planted, make_list
from tests.small_run import RECIPE, ROOT, environment, train_stage
from tests.toys import needs, read_members

needs("img2dataset")

# How often each command is killed.
KILLS = {"filter_list": 1, "download": 4, "filter_shards": 1, "dedup": 1, "leaks": 1, "rewrite": 2}
BATCH = 64


def commands(planted: Planted, place: Path) -> dict[str, list[str]]:
    """The commands from the list to clean shards, in their order."""
    kept, shards, clean = place / "kept" / "kept.parquet", place / "shards", place / "clean"
    blocked = planted.directory.parent / "blocked.txt"
    blocked.write_text("blocked.example  # and what is below it\n")
    guard = "--allow-address 127.0.0.1/32 --deadline 4 --timeout 4 --max-bytes 2000000 --workers 2 --threads 32"
    drops = " ".join(f"{shards}/drops/{name}.parquet" for name in ("dedup", "filter_shards", "leaks"))
    heldout = planted.evaluation
    lines = {
        "filter_list": f"--list {planted.directory} --preset laion --blocked-domains {blocked} {LIST_OPTIONS} "
        f"--out {kept}",
        "download": f"--list {kept} --preset canonical --out {shards} --samples-per-shard 100 {guard}",
        "filter_shards": f"{shards} --max-aspect {MOST_ASPECT} --max-caption-repeats {MOST_REPEATS}",
        "dedup": f"{shards}",
        "leaks": f"{shards} --against heldout={heldout} --captions heldout={heldout}/coco.json",
        "rewrite": f"{shards} --drop {drops} --out {clean} --samples-per-shard 120",
    }
    return {name: [sys.executable, "-m", f"data_tools.{name}", *line.split()] for name, line in lines.items()}


def run(line: list[str], data: Path = ROOT) -> str:
    done = subprocess.run(line, cwd=ROOT, env=environment(data), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (line[2], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def planted(server, tmp_path_factory) -> Planted:
    return make_list(tmp_path_factory.mktemp("list"), server)


@pytest.fixture(scope="module")
def alone(planted, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Where the undisturbed chain ran, and the seconds that each command took."""
    place, seconds = tmp_path_factory.mktemp("alone"), {}
    for name, line in commands(planted, place).items():
        start = time.monotonic()
        run(line)
        seconds[name] = time.monotonic() - start
    return place, seconds


def fates(place: Path) -> dict[int, tuple[str, str]]:
    """Row of the list -> (the step that dropped it, its reason), or KEPT, as the files of the chain tell. Each row
    once."""
    found: list[tuple[int, tuple[str, str]]] = []
    for row in pq.read_table(place / "kept" / "dropped" / "kept.parquet").to_pylist():
        found.append((row["row"], ("filter_list", row["reason"])))
    rows = {}
    for path in sorted((place / "shards").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if (reason := reason_of(row["error_message"])) == "success":
                rows[path.stem, row["key"]] = row["row"]
            else:
                found.append((row["row"], ("download", reason)))
    for path in sorted((place / "shards" / "drops").glob("*.parquet")):
        found += [(rows[drop.shard, drop.key], (path.stem, drop.reason)) for drop in read_drops([path])]
    clean = read_members(place / "clean")
    found += [(json.loads(data)["row"], KEPT) for name, data in clean.items() if name.endswith(".json")]
    assert len(dict(found)) == len(found), Counter(row for row, _ in found).most_common(3)
    return dict(found)


@pytest.mark.slow
def test_every_row_ends_where_it_should(server, planted, alone):
    place, _ = alone
    wanted = {number: row.fate for number, row in enumerate(planted.rows)}
    found = fates(place)
    wrong = [n for n in wanted if wanted[n] != found.get(n)]
    assert not wrong, [(str(planted.rows[n].url)[:60], wanted[n], found.get(n)) for n in wrong[:20]]
    assert found.keys() == wanted.keys()
    # The records say the same: what one step kept is what the next was given.
    steps, counts = read_steps(place / "clean"), Counter(wanted.values())
    assert list(steps) == ["filter_list", "list", "download", "filter_shards", "dedup", "leaks", "rewrite"]
    for name in ("filter_list", "download", "filter_shards", "dedup", "leaks"):
        assert steps[name].dropped == {reason: n for (step, reason), n in counts.items() if step == name}, name
    dropped = sum(count for (step, _), count in counts.items() if step in ("filter_shards", "dedup", "leaks"))
    assert steps["filter_list"].rows == len(wanted) and steps["rewrite"].kept == counts[KEPT]
    assert steps["filter_list"].kept == steps["list"].rows == steps["list"].kept == steps["download"].rows
    assert steps["download"].kept == steps["filter_shards"].rows == steps["leaks"].rows == steps["rewrite"].rows
    assert sum(steps["rewrite"].dropped.values()) == dropped
    assert len(server.requests) > 1000 < counts[KEPT] + dropped


@pytest.mark.slow
def test_no_attack_reaches_a_shard(server, planted, alone):
    place, _ = alone
    clean = read_members(place / "clean")
    rows = {json.loads(data)["row"]: name[:-5] for name, data in clean.items() if name.endswith(".json")}
    for row, key in rows.items():
        assert clean[f"{key}.txt"] == planted.rows[row].caption
        assert row not in planted.pictures or clean[f"{key}.jpg"] == planted.pictures[row]
    assert {name.rsplit(".", 1)[1] for name in clean} == {"jpg", "txt", "json"} and len(clean) == 3 * len(rows)
    # What is not public was not even asked for, though these addresses lead to this very server.
    asked = Counter(server.requests)
    for row in planted.rows:
        if row.fate[1] in ("credentials_in_url", "not_public_address") and str(server.port) in row.url.split("/")[2]:
            path = "/" + row.url.split("/", 3)[3]
            assert path.startswith("/redirect") or not asked[path], row.url
    for secret in (b"root:x:0:0", b"meta-data"):
        assert not any(secret in data for data in clean.values())


@pytest.mark.slow
def test_the_page_and_the_checks(planted, alone, tmp_path):
    place, _ = alone
    clean = str(place / "clean")
    assert "clean" in run([sys.executable, "-m", "data_tools.verify", clean, "--decode"])
    run([sys.executable, "-m", "data_tools.audit", clean, "--out", str(tmp_path / "audit.html")])
    html = (tmp_path / "audit.html").read_text()
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']?([^\"'>\s]+)", html)
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert "<script" not in html and "url(" not in html and "@import" not in html
    funnel = html[: html.index('<section class="stage" id="pictures"')]
    for name, step in read_steps(place / "clean").items():
        if name == "list":  # it dropped nothing
            continue
        assert f">{name}<" in funnel and f"{step.kept:,}<small>of {step.rows:,}" in funnel, name
    for reason, count in read_steps(place / "clean")["rewrite"].dropped.items():
        assert f"{reason} <b>{count:,}</b>" in funnel, reason


@pytest.fixture
def recipe(alone, tmp_path) -> Path:
    """The small recipe with every kind read from the clean shards, and codes stored in them."""
    clean = alone[0] / "clean"
    (tmp_path / "data").mkdir()
    for name in ("images", "pairs", "texts"):
        (tmp_path / "data" / name).symlink_to(clean)
    text = RECIPE.replace('/images")', '/images", crops=2, codes="codes")')
    text = text.replace("text_len=8)", 'text_len=8, crops=2, codes="codes")')
    text = text.replace("images=4, pairs=4, texts=4", f"images={BATCH}, pairs={BATCH}, texts={BATCH}")
    (tmp_path / "data" / "recipe.py").write_text(text)
    line = [sys.executable, "-m", "data_tools.train_text_tokenizer", str(clean), "--vocab-size", "60"]
    run([*line, "--out", str(tmp_path / "data" / "text.model")])
    return tmp_path / "data"


@pytest.mark.slow
def test_training_takes_exactly_these_samples(alone, recipe, tmp_path):
    clean, runs = alone[0] / "clean", tmp_path / "runs"
    done = train_stage(recipe, runs, "tokenizer")
    assert done.returncode == 0, done.stderr
    line = [sys.executable, "-m", "pretrain.encode_images", str(clean), "--tokenizer", str(runs / "tokenizer")]
    line += ["--crops", "2", "--recipe", str(recipe / "recipe.py"), "--stage", "fusion", "--workers", "0"]
    assert "cannot be decoded" not in run(line, recipe)
    keys = {f"{shard.stem}/{sample.key}" for shard in clean.glob("*.tar") for sample in samples_of(shard)}
    steps, rest = divmod(len(keys), BATCH)
    done = train_stage(recipe, runs, "fusion", f"steps={steps + bool(rest)}")
    assert done.returncode == 0, done.stderr
    lines = (runs / "fusion" / "samples.rank00000.jsonl").read_text().splitlines()
    batches = [json.loads(line)["keys"] for line in lines]
    for kind in ("images", "pairs", "texts"):
        taken = [key.removeprefix(f"{kind}/") for batch in batches for key in batch if key.startswith(kind)]
        assert set(taken) == keys and len(set(taken[: len(keys)])) == len(keys), "an epoch is every sample once"
    assert not (runs / "fusion" / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_killed_at_random_moments_the_samples_are_the_same(planted, alone, tmp_path):
    place, seconds = alone
    rng, killed = random.Random(11), 0
    for name, line in commands(planted, tmp_path).items():
        before = {*tmp_path.rglob("*")}
        shards = sorted(rng.sample(range(10), KILLS[name]))  # of the 12 that a download makes
        longest = 0.9 * seconds[name]
        for number in range(KILLS[name]):
            least = shards[number] if name == "download" else 0
            later = rng.uniform(0, 0.5 if name == "download" else longest)
            while not killed_after(line, tmp_path / "shards", least, later):
                # It was faster than when it was left alone: once more from where it began, and killed sooner.
                for path in sorted({*tmp_path.rglob("*")} - before, reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                least, later = least // 2, later / 2
            killed += 1
        run(line)
    assert killed == 10
    assert read_members(tmp_path / "clean") == read_members(place / "clean")
    assert fates(tmp_path) == fates(place)
    for name, step in read_steps(place / "clean").items():
        again = read_steps(tmp_path / "clean")[name]
        assert (again.rows, again.kept, again.dropped) == (step.rows, step.kept, step.dropped)
    assert not [*(tmp_path / "clean").rglob(".*"), *tmp_path.rglob("attempt-*")]


def killed_after(line: list[str], shards: Path, least: int, later: float) -> bool:
    """kill -9 of a command and all of its group, when there are so many shards and a moment has passed; False if it
    had ended before."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(line, cwd=ROOT, env=environment(ROOT), start_new_session=True, **quiet)
    while process.poll() is None and len(list(shards.glob("*_stats.json"))) < least:
        time.sleep(0.01)
    try:
        assert process.wait(later) == 0, line[2]
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
