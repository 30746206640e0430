"""data_tools.pack_text: documents become chunks that training reads whole; every document is accounted for."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.pack_text import main
from data_tools.shards.steps import read_drops, read_steps
from data_tools.text import blocks as text_blocks
from data_tools.text import packing as text_packing
from data_tools.text.documents import read_blocks
from pretrain.data.sources import TextShards
from pretrain.data.text_tokenizer import TextTokenizer
from tests.data_tools.test_text_chunks import make_tokenizer
from tests.small_run import RECIPE, ROOT, train_stage
from tests.toys import needs, read_all, refused

WORDS = ["the", "small", "river", "of", "stone", "and", "long", "house", "to", "water", "red", "near", "goes", "with"]


def document(number: int, length: int = 120) -> str:
    rng = random.Random(number)
    # Random word endings make every document different, so that the only near duplicates are planted ones.
    drawn = [rng.choice(WORDS) + "aeiou"[rng.randrange(5)] * rng.randrange(3) for _ in range(length)]
    return "".join(word + (". The " if n % 12 == 11 else " ") for n, word in enumerate(drawn)).strip() + "."


def near(text: str) -> str:
    words = text.split()
    return " ".join([*words[:60], "other", *words[61:]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("spm") / "text.model").path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in three formats; of them 36 are good."""
    root = tmp_path_factory.mktemp("corpus")
    rows = [{"text": document(n)} for n in range(20)]
    rows += [{"text": "too short"}, {"text": None}, {"text": document(3).upper() + "!"}, {"text": near(document(4))}]
    (root / "a.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"broken\n\xff\xfe\n")
    texts = [document(n) for n in range(20, 36)] + [document(n) for n in range(16)] + ["", "\0\0 \0", "12 " * 99]
    pq.write_table(pa.table({"text": texts}), root / "b.parquet")
    return root


def command(corpus: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    line = [str(corpus), "--tokenizer", str(tokenizer), "--out", str(out), "--chunk-tokens", "48"]
    return [*line, "--samples-per-shard", "100", "--rule", "max_repeated_runs=off", "--workers", "1", *more]


def content(out: Path) -> dict[str, bytes]:
    """Everything but times."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    steps = {
        name: json.loads(data) | {"time": 0}
        for name, data in files.items()
        if name.startswith("steps/pack") and name.endswith("json")
    }
    return {name: data for name, data in files.items() if not name.endswith(".json") or name == "manifest.json"} | steps


def samples(out: Path) -> list[tuple[str, dict]]:
    return [(members["txt"].decode(), json.loads(members["json"])) for members in read_all(out)]


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "texts"
    assert main(command(corpus, tokenizer, out)) == 0
    return out


def test_every_document_is_accounted_for(packed):
    steps = read_steps(packed)
    documents, chunks = steps["pack_text"], steps["pack_text_chunks"]
    assert (documents.rows, documents.kept, documents.unit) == (61, 36, "documents")
    assert documents.dropped == {
        **{"duplicate": 17, "empty": 2, "near_duplicate": 1, "no_text": 1, "not_json": 1, "not_utf8": 1},
        **{"too_short": 1, "word_length": 1},
    }
    drops = list(read_drops([packed / "steps" / "pack_text_dropped.parquet"]))
    assert len(drops) == 25
    assert [(d.shard, d.key, d.detail) for d in drops if d.reason == "near_duplicate"] == [
        ("a.jsonl", "23", "a.jsonl 4")
    ]
    assert ("b.parquet", "16", "a.jsonl 0") in [(d.shard, d.key, d.detail) for d in drops if d.reason == "duplicate"]
    assert chunks.unit == "chunks" and chunks.rows == chunks.kept == len(samples(packed))
    assert chunks.settings["tokens"] == sum(about["tokens"] for _, about in samples(packed))


def test_the_chunks_of_a_document_are_its_cleaned_text(packed):
    texts: dict[tuple, str] = {}
    for text, about in samples(packed):
        texts[about["source"], about["document"]] = texts.get((about["source"], about["document"]), "") + text
    assert texts["a.jsonl", 5] == document(5)
    assert list(texts.values()) == [document(n) for n in range(36)]


def test_training_takes_every_chunk_whole(packed, tokenizer):
    source, text_tokenizer = TextShards("unused", text_len=48), TextTokenizer(tokenizer)
    for text, about in samples(packed):
        raw = source.decode({"txt": text.encode()}, None, text_tokenizer, np.random.default_rng(0))
        assert raw.ids is not None
        assert raw.ids[1 : about["tokens"] + 1].tolist() == text_tokenizer.pieces(text)
        assert about["tokens"] <= 46


def test_the_table_has_the_outcome_of_the_documents(corpus, tokenizer, packed, capsys):
    before = content(packed)
    assert main(command(corpus, tokenizer, packed)) == 0  # and a second call has nothing to do
    out = capsys.readouterr().out
    assert content(packed) == before
    assert "documents read" in out and "dropped: near_duplicate" in out and "% full" in out
    fill = float(out.rsplit("chunks ", 1)[1].split(" %")[0])
    assert fill > 80


@pytest.mark.parametrize("workers", ["2"])
def test_the_shards_are_the_same_for_any_number_of_workers(corpus, tokenizer, packed, tmp_path, workers):
    out = tmp_path / "texts"
    assert main(command(corpus, tokenizer, out, "--workers", workers)) == 0
    assert content(out) == content(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_the_budget_is_never_exceeded_and_used_up_to_a_chunk(corpus, tokenizer, tmp_path, packed, capsys):
    all_tokens = [about["tokens"] for _, about in samples(packed)]
    budget = sum(all_tokens[:40]) + 1
    out = tmp_path / "texts"
    assert main(command(corpus, tokenizer, out, "--budget", str(budget))) == 0
    assert "the budget is exhausted" in capsys.readouterr().out
    assert [about["tokens"] for _, about in samples(out)] == all_tokens[:40]
    chunks = read_steps(out)["pack_text_chunks"]
    assert chunks.kept == 40 and chunks.dropped["over_budget"] >= 1
    assert main(command(corpus, tokenizer, tmp_path / "more", "--budget", "1B")) == 0
    assert [about["tokens"] for _, about in samples(tmp_path / "more")] == all_tokens


def test_a_seed_takes_the_files_in_another_order(corpus, tokenizer, tmp_path):
    first = set()
    for seed in range(6):
        out = tmp_path / str(seed)
        assert main(command(corpus, tokenizer, out, "--shuffle-seed", str(seed), "--budget", "500")) == 0
        first.add(samples(out)[0][1]["source"])
    assert first == {"a.jsonl", "b.parquet"}


def test_language_drops_the_others(tokenizer, tmp_path):
    needs("py3langid")
    german = "Der alte Mann geht am Morgen zum Fluss und sieht die Kinder, die mit dem Hund spielen und lachen. " * 3
    english = (
        "The old man walks to the river in the morning and sees the children who play with the dog and laugh. " * 3
    )
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (german, english)))
    line = command(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", "--language", "EN")
    assert main([*line, "--rule", "max_repeated_characters=off"]) == 0
    assert read_steps(tmp_path / "out")["pack_text"].dropped == {"language": 1}


def finished_blocks(out: Path) -> int:
    return len(list(out.with_name(f".{out.name}.packing").glob("blocks/*.parquet")))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [("1", 3), ("2", 1)])
def test_after_a_kill_at_any_moment_the_same_command_continues(corpus, tokenizer, tmp_path, packed, workers, kills):
    out, worked, rng = tmp_path / "texts", [], random.Random(0)
    # Blocks of four documents, and a pause after each written one, so that kills hit every part of the work.
    code = (
        "import functools, sys, time; from data_tools import pack_text; "
        "from data_tools.text import packing as t, documents as d; "
        "t.read_blocks = functools.partial(d.read_blocks, most_documents=4); w = t._write_document; "
        "t._write_document = lambda *a: (time.sleep(0.02), w(*a)); sys.exit(pack_text.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, *command(corpus, tokenizer, out, "--workers", workers)]
    for _ in range(kills):
        process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        enough = finished_blocks(out) + rng.randint(1, 5)
        while process.poll() is None and finished_blocks(out) < enough:
            time.sleep(0.005)
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        worked.append(finished_blocks(out))
        assert not psutil.wait_procs(children, timeout=20)[1]  # workers do not outlive their parent
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert content(out) == content(packed)
    assert 0 < worked[0] < 17 and not list(tmp_path.glob(".*"))


def test_blocks_of_other_settings_are_not_reused(corpus, tokenizer, tmp_path, packed, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_packing, "index_directory", stop)
        assert (
            main(command(corpus, tokenizer, tmp_path / "texts", "--rule", "min_words=500")) == 2
        )  # no document remains
        assert main(command(corpus, tokenizer, tmp_path / "texts", "--rule", "min_words=60")) == 130
    assert not (tmp_path / "texts").exists()
    assert main(command(corpus, tokenizer, tmp_path / "texts")) == 0
    assert content(tmp_path / "texts") == content(packed)


def test_a_full_disk_is_named_and_finished_blocks_stay(corpus, tokenizer, tmp_path, packed, monkeypatch, capsys):
    calls, write = [], text_blocks.write_file

    def full(path, data):
        calls.append(path)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "could not be written: No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(text_packing, "read_blocks", partial(read_blocks, most_documents=4))
    monkeypatch.setattr(text_blocks, "write_file", full)
    assert main(command(corpus, tokenizer, tmp_path / "texts")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert finished_blocks(tmp_path / "texts") == 4 and not (tmp_path / "texts").exists()
    assert main(command(corpus, tokenizer, tmp_path / "texts")) == 0
    assert content(tmp_path / "texts") == content(packed) and len(calls) == len(set(calls)) + 1


def test_a_killed_worker_is_named(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(text_packing, "_rows", killed)
    assert main(command(corpus, tokenizer, tmp_path / "texts")) == 2
    assert "a worker process was killed" in capsys.readouterr().err


def test_a_second_process_is_refused(corpus, tokenizer, tmp_path, capsys):
    with text_packing._work_directory(tmp_path / "texts", {"near": 1.0}):
        assert main(command(corpus, tokenizer, tmp_path / "texts")) == 2
    assert "is writing to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        ("{tmp}/nothing.txt", [], "does not exist"),
        ("{tmp}/in", [], "contains no documents"),
        ("{tmp}/short.txt", [], "all 1 documents are dropped (too_short 1)"),
        (None, ["--out", "{tmp}/taken"], "contains other files"),
        (None, ["--out", "{tmp}/taken/00000.tar"], "is a file"),
        ("{tmp}", [], "lies in the input"),
        (None, ["--text-col", "body"], "columns are text"),
        (None, ["--tokenizer", "none.model"], "does not exist"),
        (None, ["--budget", "lots"], "--budget=lots"),
        (None, ["--budget", "0"], "--budget=0"),
        (None, ["--chunk-tokens", "4"], "--chunk-tokens=4"),
        (None, ["--workers", "0"], "--workers=0"),
        (None, ["--samples-per-shard", "0"], "--samples-per-shard=0"),
        (None, ["--near", "80"], "--near=80"),
        (None, ["--language", "english"], "--language=english"),
        (None, ["--rule", "max_cats=3"], "there is no rule 'max_cats'"),
        (None, ["--rule", "min_words=many"], "is not a number"),
        (None, ["--rule", "min_words=-1"], "is not a valid limit"),
    ],
)
def test_mistakes_are_one_sentence(corpus, tokenizer, tmp_path, capsys, inputs, more, message):
    for name, text in (("in/.hidden/a.txt", "hidden"), ("short.txt", "too short"), ("taken/00000.tar", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    line = [inputs or str(corpus), "--tokenizer", str(tokenizer), "--out", "{tmp}/out", "--workers", "1", *more]
    assert message in refused(capsys, main, *(word.format(tmp=tmp_path) for word in line))
    assert not list(tmp_path.glob("out/*.parquet"))


def test_an_out_of_other_settings_is_not_touched(corpus, tokenizer, packed, capsys):
    before = content(packed)
    assert main(command(corpus, tokenizer, packed, "--near", "1", "--budget", "1M")) == 2
    assert "packed with budget=None (now 1000000), near=0.8 (now 1.0); remove it" in capsys.readouterr().err
    assert content(packed) == before


def test_a_file_of_many_documents_gets_a_hint(tokenizer, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "all.txt").write_text("\n\n".join([document(n) for n in range(10)] * 1300))
    assert main(command(texts / "all.txt", tokenizer, tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert "too_long 1" in err and "use --txt blank" in err
    (texts / "good.txt").write_text(document(0))
    assert main(command(texts, tokenizer, tmp_path / "out")) == 0
    assert "use --txt blank" in capsys.readouterr().out


@pytest.mark.slow
def test_a_language_stage_trains_on_the_shards(corpus, tokenizer, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.model").write_bytes(tokenizer.read_bytes())
    assert main(command(corpus, tokenizer, data / "texts")) == 0
    recipe = RECIPE.replace("text_len=10", "text_len=48").replace("max_text_len=16", "max_text_len=48")
    recipe = recipe.replace("vocab_size=64", f"vocab_size={TextTokenizer(tokenizer).vocab_size}")
    (data / "recipe.py").write_text(recipe)
    done = train_stage(data, tmp_path / "run", "language", "init_from=None")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "run" / "language" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 3 and np.isfinite(json.loads(lines[-1])["loss"])
