"""All stages as a user runs them, one process each; and what a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.small_run import check_weights, evaluate, train_stage, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def run(data) -> Path:
    """A run directory with every stage finished and evaluated."""
    for stage in ("tokenizer", "vision", "language", "fusion", "retrieval"):
        init = ("init_from=language",) if stage == "fusion" else ()
        done = train_stage(data, data / "run", stage, *init)
        assert done.returncode == 0, done.stderr
        assert evaluate(data, data / "run", stage).returncode == 0
    return data / "run"


def names(run: Path, stage: str) -> set[str]:
    with safe_open(run / stage / "weights.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.slow
def test_every_stage_leaves_the_files_of_the_contract(run):
    for stage in ("tokenizer", "vision", "language", "fusion", "retrieval"):
        for name in ("recipe.json", "metrics.jsonl", "eval.json", "samples.json", "weights.safetensors", "config.json"):
            assert (run / stage / name).is_file(), (stage, name)
        assert list((run / stage / "tensorboard").iterdir())
    line = json.loads((run / "fusion" / "metrics.jsonl").read_text().splitlines()[-1])
    for key in (
        "step",
        "loss",
        "lr",
        "grad_norm",
        "skipped_steps",
        "samples_per_s",
        "tokens_per_s",
        "real_tokens_per_s",
        "mfu",
        "mfu_real",
        "mfu_executed",
        "data_wait",
        "data_wait/read",
        "data_wait/decode",
        "data_wait/transfer",
        "memory_gib",
    ):
        assert key in line
    assert line["samples_seen"] == 12 * 12
    for part in ("image", "pair_image", "pair_text", "text"):
        assert f"loss/{part}" in line and f"accuracy/{part}" in line
    found = json.loads((run / "retrieval" / "eval.json").read_text())
    assert found["retrieval/candidates"] == 30 and 0 <= found["retrieval/image_to_text/R@1"] <= 100
    assert "masked/pair_text/baseline" in json.loads((run / "fusion" / "eval.json").read_text())


@pytest.mark.slow
def test_the_language_stage_trains_only_its_own_and_hands_the_rest_on(run):
    before, after = (load_file(run / stage / "weights.safetensors") for stage in ("vision", "language"))
    frozen = [name for name in before if not name.startswith("encoder.norm.")]
    assert any("experts.vision" in name for name in frozen) and any("attention" in name for name in frozen)
    for name in frozen:
        assert (before[name] == after[name]).all(), f"{name} moved in the language stage"
    assert any("experts.language" in name for name in names(run, "language") - names(run, "vision"))


@pytest.mark.slow
def test_each_stage_builds_only_what_it_needs_and_the_hand_over_holds_everything(run):
    assert not any("language" in name or "text" in name for name in names(run, "vision"))
    assert names(run, "vision") <= names(run, "language") <= names(run, "fusion") <= names(run, "retrieval")
    assert any("experts.fusion" in name for name in names(run, "fusion"))


@pytest.mark.slow
def test_a_finished_stage_ends_at_once(data, run):
    before = (run / "vision" / "metrics.jsonl").read_text()
    again = train_stage(data, run, "vision")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert (run / "vision" / "metrics.jsonl").read_text() == before
    assert "nothing to do" in evaluate(data, run, "vision").stderr


@pytest.mark.slow
def test_an_evaluation_of_other_sizes_leaves_the_stages_own(data, run):
    own = {path: path.read_bytes() for path in (run / "vision").glob("eval.json")}
    own |= {path: path.read_bytes() for path in (run / "vision" / "samples").iterdir()}
    done = evaluate(data, run, "vision", None, "--set", "evals.0.samples=8", "--name", "few")
    assert done.returncode == 0 and "evals.0.samples=8 instead of 512" in done.stderr, done.stderr
    assert len(own) > 2 and {path: path.read_bytes() for path in own} == own
    few = json.loads((run / "vision" / "eval-few.json").read_text())
    assert few["differs"] == {"evals.0.samples": [512, 8]} and "masked/image/accuracy" in few
    assert (run / "vision" / "eval-few" / "samples.json").is_file()


@pytest.mark.slow
def test_a_finished_stage_needs_no_checkpoints_and_a_profile_changes_nothing(data, run, tmp_path):
    settings = (f"visual_tokenizer={run}/tokenizer",)
    profiled = train_stage(data, tmp_path, "vision", *settings, "profile_steps=2:9")
    assert profiled.returncode == 0 and profiled.stderr.count(" ms a step ") == 5, profiled.stderr
    assert [path.name for path in (tmp_path / "vision" / "profile").iterdir()] == ["trace_2_3.json.gz"]
    check_weights(tmp_path / "vision", run / "vision")
    shutil.rmtree(tmp_path / "vision" / "checkpoints")
    before = (tmp_path / "vision" / "metrics.jsonl").read_text()
    again = train_stage(data, tmp_path, "vision", *settings)
    assert again.returncode == 0 and "finished before" in again.stderr
    assert (tmp_path / "vision" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_kill_between_weights_and_their_config_is_mended_by_the_next_start(data, run, tmp_path):
    shutil.copytree(run / "vision", tmp_path / "vision")
    whole = json.loads((tmp_path / "vision" / "config.json").read_text())
    (tmp_path / "vision" / "config.json").unlink()
    again = train_stage(data, tmp_path, "vision")
    assert again.returncode == 0 and "nothing to do" in again.stderr, again.stderr
    assert json.loads((tmp_path / "vision" / "config.json").read_text()) == whole


@pytest.mark.slow
def test_a_stage_that_is_not_finished_is_evaluated_on_its_newest_checkpoint(data, run, tmp_path):
    assert train_stage(data, tmp_path, "vision", f"visual_tokenizer={run}/tokenizer").returncode == 0
    (tmp_path / "vision" / "weights.safetensors").unlink()
    done = evaluate(data, tmp_path, "vision")
    assert done.returncode == 0 and "checkpoint of step 3" in done.stderr, done.stderr
    got = json.loads((tmp_path / "vision" / "eval.json").read_text())
    want = json.loads((run / "vision" / "eval.json").read_text())
    assert got["masked/image/accuracy"] == want["masked/image/accuracy"] and got["step"] == 3


@pytest.mark.slow
def test_a_start_with_other_settings_is_refused_by_name_and_changes_nothing(data, run):
    before = {path: path.read_bytes() for path in (run / "vision").glob("*.json*")}
    again = train_stage(data, run, "vision", "optim.lr=0.5", "model.dim=64")
    assert again.returncode == 2
    assert "model.dim=32 (now 64)" in again.stderr and "optim.lr=0.001 (now 0.5)" in again.stderr
    assert {path: path.read_bytes() for path in (run / "vision").glob("*.json*")} == before
    assert train_stage(data, run, "vision", "log_every=7", "loading.workers=1").returncode == 0


@pytest.mark.slow
def test_frozen_weights_pass_through_a_bf16_stage_untouched(data, run, tmp_path):
    done = train_stage(data, tmp_path, "language", f"init_from={run}/vision", ds="zero3_bf16.json")
    assert done.returncode == 0, done.stderr
    before, after = (
        load_file(run / "vision" / "weights.safetensors"),
        load_file(tmp_path / "language/weights.safetensors"),
    )
    for name in (name for name in before if not name.startswith("encoder.norm.")):
        assert (before[name] == after[name]).all(), name


@pytest.mark.slow
def test_a_diverged_run_ends_before_it_replaces_a_good_checkpoint(data, run, tmp_path):
    done = train_stage(data, tmp_path, "vision", f"visual_tokenizer={run}/tokenizer", "optim.lr=1e30", "steps=20")
    assert done.returncode == 2 and "diverged" in done.stderr, done.stderr
    assert not (tmp_path / "vision" / "weights.safetensors").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(data, run, tmp_path):
    settings = ("steps=4", f"visual_tokenizer={run}/tokenizer")
    assert train_stage(data, tmp_path, "vision", *settings).returncode == 0
    want = (tmp_path / "vision" / "metrics.jsonl").read_text().splitlines()[-1]
    newest = tmp_path / "vision" / "checkpoints" / "step_00000004"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (tmp_path / "vision" / "weights.safetensors").unlink()  # with it the stage would be finished
    again = train_stage(data, tmp_path, "vision", *settings)
    assert again.returncode == 0, again.stderr
    assert f"checkpoint rejected: {victim}" in again.stderr or victim.name in again.stderr
    assert "resumed from" in again.stderr and "step_00000003" in again.stderr
    got = (tmp_path / "vision" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(got)["loss"] == json.loads(want)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings", "ds", "message"),
    [
        ("vision", ("optim.lrr=1",), None, "did you mean lr"),
        ("vision", ("steps=many",), None, "wanted int"),
        ("retrieval", (), None, "run the stage 'fusion' to its end first"),
        ("vision", ("visual_tokenizer=null",), None, "visual_tokenizer is not set"),
        ("vision", ("batch.images=0",), None, "batch asks for"),
        ("vision", ("mix.images.shards=$NOWHERE/x",), None, r"\$NOWHERE"),
        ("vision", ("mix.images.shards=/nowhere",), None, "nowhere"),
        ("vision", ("trainable=nothing.*",), None, "matches no parameter"),
        ("fusion", ("model.vocab_size=10",), None, "use model.vocab_size="),
        ("vision", ("transform.size=17",), None, "use 16 or 20"),
        ("vision", (), {"gradient_clipping": 1.0}, "optim.clip owns it"),
        ("vision", (), {"bf16": {"enabled": True}}, "bf16"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence_and_exit_code_2(data, tmp_path, stage, settings, ds, message):
    config = "zero0.json"
    if ds is not None:
        config = tmp_path / "mine.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": 0}} | ds))
    done = train_stage(data, tmp_path / "run", stage, *settings, ds=config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
