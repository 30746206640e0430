"""pretrain.launch: what training would refuse is refused before submission, and nothing is submitted twice."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from pretrain import encode_images
from pretrain.launch.__main__ import main
from pretrain.launch.checks import Line, Ranks, check_stages, unevaluated
from pretrain.recipes import load_recipe
from tests.small_run import ROOT
from tests.toys import pair_sample, write_source

HERE = socket.gethostname()
JOB = ["--option=--partition=gpu", "--option=--ntasks-per-node=2", "--option=--gpus-per-node=2", "--option=--nodes=2"]
STAGE = str(ROOT / "launch" / "stage.sbatch")
SINFO = """
if [ "$3" = "%R|%P" ]; then echo "gpu|gpu*"; exit; fi
for i in 1 2; do echo "g$i|$HOST|4|16000|idle|1-00:00:00|gpu:a100:2"; done
"""
SBATCH = """
[ "$1" = --test-only ] && exit
echo "$@" >>"$CALLS"
echo "10$(wc -l <"$CALLS");cluster" # --parsable, with several clusters
"""


@pytest.fixture
def launch(data, tmp_path, monkeypatch, capsys):
    """-> launch(words) on a copy of the run whose tokenizer is trained: exit code, output, and sbatch's calls."""
    shutil.copytree(data / "start", tmp_path / "run")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (("sinfo", SINFO), ("sbatch", SBATCH), ("squeue", 'cat "$QUEUE"')):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (commands / name).chmod(0o755)
    calls, queue = tmp_path / "calls", tmp_path / "queue"
    calls.touch()
    queue.touch()
    for name, value in {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": calls, "QUEUE": queue, "HOST": HERE}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DATA", str(data))

    def call(*words: str, options: tuple[str, ...] = (), run: str = "run", ds: str = "zero1.json", recipe: str = ""):
        line = ["--recipe", recipe or str(data / "recipe.py"), "--ds", str(ROOT / "ds_configs" / ds)]
        code = main([*JOB, *options, STAGE, *line, "--run-dir", str(tmp_path / run), *words])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err, calls.read_text().splitlines()

    return call


def chain(launch, stages: str, *words: str, **more):
    return launch(*words, options=(*more.pop("options", ()), f"--chain={stages}"), **more)


@pytest.mark.parametrize(
    ("stages", "words", "says"),
    [
        ("tokenizer visoin", [], "--stage visoin is not in recipe small; did you mean vision"),
        ("vision vision", [], "stage vision is named twice"),
        ("", [], "the chain names no stage"),
        ("vision", ["--stage", "vision"], "--stage vision stands beside the chain's stages"),
        ("vision", ["--nodes=2"], "--nodes=2 is no argument of pretrain.train; sbatch's options stand before"),
        ("vision", ["--set", "batch.images=6"], "stage vision: batch.images=6 is not a multiple of data ranks"),
        ("vision", ["--set", "parallel.tensor=4"], "stage vision: model.heads=2 is not a multiple"),
        ("vision language", ["--set", "optim.lrr=1"], "--set optim.lrr"),
        ("tokenizer", ["--set", "optim.lr=2"], "stage tokenizer: .* other settings: optim.lr=0.001 .now 2.0."),
        ("language", [], "stage language: init_from=vision is a stage that is neither finished in .* nor one of those"),
        ("vision", ["--set", "visual_tokenizer=/no/weights"], "visual_tokenizer=/no/weights: .* does not exist"),
        ("vision", ["--set", "mix.images.shards=/nowhere"], "stage vision: .*/nowhere"),
        ("vision", ["--set", "text_tokenizer=/none.model"], "stage language, which comes later: text_tokenizer=/none"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_submitted(launch, stages, words, says):
    code, out, error, calls = chain(launch, stages, *words)
    assert (code, out, calls) == (2, [], []), error
    assert re.search(says, error) and error.count("\n") == 1, error


def test_the_json_and_the_recipe_must_be_there_and_fit_the_nodes(launch):
    code, _, error, _ = launch("--stage", "vision", ds="zero9.json")
    assert code == 2 and "zero9.json: there is no such file" in error
    code, _, error, _ = launch("--stage", "vision", ds="zero3_hpz_bf16.json")
    assert code == 2 and "zero_hpz_partition_size=8 is more than a node's 2 ranks" in error
    code, _, error, _ = launch("--stage", "vision", recipe="tinny")
    assert code == 2 and "--recipe tinny is neither a recipe nor a .py file; did you mean tiny" in error


def test_a_run_directory_must_be_writable_and_shared(launch, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, _, error, _ = launch("--stage", "tokenizer", run="file")
    assert code == 2 and "cannot be written" in error
    monkeypatch.setenv("HOST", "node7")  # the nodes are other machines than this one
    monkeypatch.setenv("IMGLISH_SHARED", "")
    # A file system that is not local cannot be had here.
    (tmp_path / "bin" / "stat").write_text('#!/usr/bin/env bash\necho "$KIND"\n')
    (tmp_path / "bin" / "stat").chmod(0o755)
    for kind, code in (("tmpfs", 2), ("nfs", 0), ("lustre", 0)):
        monkeypatch.setenv("KIND", kind)
        got, _, error, _ = launch("--stage", "tokenizer")
        assert got == code and ("is on tmpfs, a file system of this machine" in error) == bool(code)


def test_copies_on_the_nodes_need_a_place_there(launch, tmp_path, monkeypatch):
    monkeypatch.delenv("IMGLISH_LOCAL", raising=False)
    code, out, error, calls = launch("--stage", "vision", "--set", "copy_every=2")
    assert (code, out, calls, error.count("\n")) == (2, [], [], 1)
    assert "stage vision: copy_every needs a directory on each node" in error and "IMGLISH_LOCAL names none" in error
    assert launch("--stage", "vision")[0] == 0
    (tmp_path / "calls").write_text("")
    monkeypatch.setenv("IMGLISH_LOCAL", str(tmp_path / "not there"))  # nor on the login node, perhaps
    assert launch("--stage", "vision", "--set", "copy_every=2")[0] == 0 and not (tmp_path / "not there").exists()


def test_checkpoints_of_an_unknown_recipe_are_refused(launch, tmp_path):
    (tmp_path / "run" / "tokenizer" / "recipe.json").unlink()
    (tmp_path / "run" / "tokenizer" / "weights.safetensors").unlink()
    code, _, error, _ = launch("--stage", "tokenizer", "--set", "optim.lr=2")
    assert code == 2 and "has checkpoints of another recipe" in error


def test_a_model_that_does_not_fit_a_gpu_is_refused(launch, tmp_path):
    words = ("--stage", "pretrain", "--set", "model.vocab_size=64064")
    giant = {"recipe": "beit3_giant", "ds": "zero1_bf16.json", "options": ("--gpu", "a100-40g")}
    code, _, error, _ = launch(*words, "--set", "batch.images=3072", "--set", "batch.pairs=3072", **giant)
    assert (
        code == 2 and "stage pretrain: a rank needs about " in error and "pretrain.plan --recipe beit3_giant" in error
    )
    code, _, error, _ = launch(*words, options=("--gpu", "a100"))
    assert code == 2 and "GPU=a100 is not known to pretrain.plan; known: a100-40g" in error


def test_a_chain_leaves_out_what_is_finished_and_each_stage_waits_for_the_one_before(launch, tmp_path):
    before = sorted((tmp_path / "run").rglob("*"))
    code, out, error, calls = chain(launch, "tokenizer vision language", options=("--dry-run",))
    assert code == 0 and not calls and "memory of a GPU was not checked" in error
    assert out[0] == "tokenizer: finished" and "--dependency" not in out[1]
    assert "--dependency=afterok:JOB_OF_vision" in out[2] and "--stage language" in out[2]
    assert sorted((tmp_path / "run").rglob("*")) == before, "a dry run wrote something"
    code, out, error, calls = chain(launch, "tokenizer vision language")
    assert code == 0 and out == ["tokenizer: finished", "vision: job 101", "language: job 102"], error
    assert "--dependency" not in calls[0] and "--dependency=afterok:101 --kill-on-invalid-dep=yes" in calls[1]
    assert (
        calls[1].endswith(calls[0][calls[0].index("--recipe") :]) and f"{STAGE} --stage language --recipe" in calls[1]
    )


def test_what_is_in_the_queue_is_not_submitted_again(launch, tmp_path):
    _, _, _, (vision, language) = chain(launch, "vision language")
    name = vision.split("--job-name=")[1].split()[0]
    assert name != language.split("--job-name=")[1].split()[0]
    (tmp_path / "queue").write_text(f"55 RUNNING {name}\n56 PENDING imglish-other-language-000000\n")
    _, out, _, calls = chain(launch, "vision language")
    assert out == ["vision: in the queue already, job 55", "language: job 103"]
    assert "--dependency=afterok:55" in calls[2]
    code, _, error, _ = chain(launch, "vision", options=("--option=-J", "--option=mine"))
    assert code == 2 and "--job-name=mine" in error


def test_a_stage_in_the_queue_that_would_wait_for_no_new_job_is_said(launch, tmp_path):
    _, _, _, (_, language) = chain(launch, "vision language")
    (tmp_path / "queue").write_text(f"56 PENDING {language.split('--job-name=')[1].split()[0]}\n")
    code, _, error, calls = chain(launch, "vision language")
    assert code == 2 and len(calls) == 2
    assert "stage language is in the queue as job 56, and vision, which comes before it, is not; scancel 56" in error


def test_logs_get_a_directory_in_the_run(launch, tmp_path):
    _, _, _, (call,) = launch("--stage", "vision")
    assert f"--output={tmp_path}/run/logs/%x-%j.log" in call and (tmp_path / "run" / "logs").is_dir()
    code, _, error, calls = launch("--stage", "vision", options=("--option=-o", "--option=/nowhere/x.log"))
    assert code == 2 and "there is no directory /nowhere" in error and len(calls) == 1


def test_ranks_with_one_cpu_of_many_are_noted(launch, tmp_path):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text(sinfo.read_text().replace("$HOST|4|", "$HOST|96|"))
    quiet = ("--dry-run", "--gpu", "h100")
    code, _, said, _ = launch("--stage", "vision", options=quiet)
    assert code == 0 and "note: --cpus-per-task is 1" in said and "--cpus-per-task=48 in GPU_JOB" in said
    assert launch("--stage", "vision", options=(*quiet, "--option=--cpus-per-task=12"))[2] == ""


def test_a_job_that_waits_for_broken_nodes_says_so(launch, tmp_path):
    quiet = ("--dry-run", "--gpu", "h100")
    code, out, error, _ = launch("--stage", "vision", options=quiet)
    assert code == 0 and not error
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text(sinfo.read_text().replace("idle", "drain*"))
    code, out, error, _ = launch("--stage", "vision", options=quiet)
    assert code == 0 and out and error == "note: 0 of the 2 nodes are up, so the job will wait for 2\n"


def test_on_this_machine_it_only_checks(launch, data, capsys):
    line = ["--recipe", str(data / "recipe.py"), "--ds", str(ROOT / "ds_configs" / "zero0.json"), "--run-dir", "none"]
    assert main(["--local", "3", "--", *line, "--stage", "tokenizer"]) == 2
    assert "batch.images=8 is not a multiple" in capsys.readouterr().err
    assert main(["--local", "2", "--", *line, "--stage", "tokenizer"]) == 0
    assert capsys.readouterr().out == "tokenizer: ready\n" and not Path("none").exists()


@pytest.mark.parametrize(
    ("script", "options", "words", "says"),
    [
        ("prepare", [], ["--list", "/nowhere"], "--list /nowhere does not exist"),
        ("prepare", [], ["--list", "/tmp"], "give --array=0-15 before it, or --merge"),
        ("prepare", ["--option=--array=0-3"], ["--list", "/tmp", "--out", "/proc/x"], "/proc/x cannot be written"),
        ("prepare", [], ["data_tools.capfit", "x"], "data_tools.capfit is no command of this checkout"),
        (
            "prepare",
            ["--option=-a", "--option=0-3"],
            ["data_tools.dedup", "x"],
            "--array: data_tools.dedup does all",
        ),
        ("prepare", [], ["data_tools.capfilt", "x", "--out", "/proc/x"], "/proc/x cannot be written"),
        ("bench", [], ["--stage", "nothing"], "--stage nothing is not in recipe beit3_base"),
        ("bench", ["--option=--nodes=1"], ["--set", "batch.images=7"], "batch.images=7 is not a multiple"),
        ("nothing", [], [], "nothing.sbatch is no batch script"),
    ],
)
def test_other_jobs_are_checked_too(launch, capsys, script, options, words, says):
    assert main([*JOB, *options, str(ROOT / "launch" / f"{script}.sbatch"), *words]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("script", ["stage", "bench"])
def test_the_ranks_of_a_node_are_not_guessed(launch, capsys, script):
    assert main(["--option=-pgpu", str(ROOT / "launch" / f"{script}.sbatch"), "--stage", "x"]) == 2
    assert "--ntasks-per-node is not given; set it in GPU_JOB of cluster.env" in capsys.readouterr().err


def test_the_identity_in_recipe_json_is_what_the_settings_are_compared_with(launch, tmp_path):
    path = tmp_path / "run" / "tokenizer" / "recipe.json"
    noted = json.loads(path.read_text())
    noted["identity"]["optim"]["lr"] = 0.5
    path.write_text(json.dumps(noted))
    code, _, error, _ = launch("--stage", "tokenizer")
    assert code == 2 and "optim.lr=0.5 (now 0.001)" in error


def test_codes_in_a_chain_are_a_job_and_settings_of_the_stages_behind_it(launch, data, tmp_path, monkeypatch, capsys):
    """The whole way: submitted, stored by what the job is called with, and then read by the stages."""
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("start"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    code, out, error, calls = chain(launch, "tokenizer vision codes:2 language fusion", "--set", "save_every=9")
    assert code == 0 and out[2] == "codes: job 102", error
    assert "note: vision will run the visual tokenizer in each step; the word codes before vision" in error
    (vision, codes, language, fusion), settings = calls, "--set mix.images.crops=2 --set mix.images.codes=codes"
    assert "codes.sbatch" in codes and "afterok:101" in codes and "afterok:102" in language
    assert settings not in vision and "mix." not in language
    assert f"{settings} --set mix.pairs.crops=2 --set mix.pairs.codes=codes" in fusion

    arguments = codes.split("codes.sbatch ")[1].split()
    assert arguments[:2] == [f"{tmp_path}/data/images", f"{tmp_path}/data/pairs"]
    for rank in "01":  # of two, as srun starts them
        monkeypatch.setenv("RANK", rank)
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        assert encode_images.main([*arguments, "--workers", "0"]) == 0
    assert "now set crops=2, codes='codes'" in capsys.readouterr().out
    dry = {"options": ("--dry-run",)}
    code, out, error, calls = chain(launch, "tokenizer codes:2 fusion", **dry)
    assert (code, out[:2]) == (0, ["codes: stored", "tokenizer: finished"]) and settings in out[2], error
    assert "the visual tokenizer in each step" not in error
    # With other looks they are other codes.
    assert "codes.sbatch" in chain(launch, "tokenizer codes fusion", **dry)[1][1]


@pytest.mark.parametrize(
    ("stages", "words", "says"),
    [
        ("codes language", [], "codes stands in the chain, but no stage behind it hides pictures"),
        ("vision codes", [], "codes stands in the chain, but no stage behind it hides pictures"),
        ("codes vision codes:2", [], "codes is named twice"),
        ("codes:x vision", [], "codes:x in the chain is wrong; write codes, or codes:N"),
        ("codes vision", ["--set", "mix.images.shards=/nowhere"], "mix.images.shards=/nowhere is no directory"),
        ("codes fusion", ["--set", "mix.pairs.shards=s3://b/x"], "mix.pairs.shards=s3://b/x is no directory"),
    ],
)
def test_codes_that_cannot_be_stored_are_one_sentence(launch, stages, words, says):
    code, _, error, calls = chain(launch, stages, *words)
    assert code == 2 and not calls and says in error and error.count("\n") == 1


def test_codes_are_planned_before_their_tokenizer_exists(launch, tmp_path):
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    code, out, error, calls = chain(launch, "tokenizer codes:2 vision")
    assert code == 0 and out[1] == "codes: job 102", error
    _, codes, vision = calls
    assert "codes.sbatch" in codes and "afterok:101" in codes
    assert "afterok:102" in vision and "--set mix.images.codes=codes" in vision


def test_a_stage_that_has_begun_without_codes_goes_on_without(launch, tmp_path):
    code, _, error, _ = chain(launch, "codes vision", options=("--dry-run",))
    assert code == 0, error
    shutil.copytree(tmp_path / "run" / "tokenizer", tmp_path / "run" / "vision")
    noted = json.loads((tmp_path / "run" / "tokenizer" / "recipe.json").read_text())
    noted["identity"]["mix"] = {"images": {"codes": None, "crops": 0}}
    (tmp_path / "run" / "vision" / "recipe.json").write_text(json.dumps(noted))
    code, _, error, _ = chain(launch, "codes vision", options=("--dry-run",))
    assert code == 2 and "no stage behind it hides pictures and has yet to begin" in error


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "clip holds no config.json; download a CLIP there first: hf download openai/clip-vit-base-patch16"),
        ((), "clip holds no config.json"),
        (("config.json", "pytorch_model.bin"), "clip holds no .*safetensors, and pickled weights are not read"),
    ],
)
def test_a_tokenizers_teacher_that_is_no_clip_is_not_for_the_nodes_to_see(tmp_path, monkeypatch, files, says):
    monkeypatch.setenv("CLIP", str(tmp_path / "clip"))
    if files is not None:
        (tmp_path / "clip").mkdir()
        for name in files:
            (tmp_path / "clip" / name).touch()
    line = Line("beit3_base", str(ROOT / "ds_configs" / "zero1.json"), tmp_path / "run", [])
    with pytest.raises(ValueError, match=says):
        check_stages(line, ["tokenizer"], Ranks(1, 1, None))


def test_data_of_evaluations_that_is_missing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    _, stage = load_recipe("tiny", "retrieval")
    assert "pairs/heldout" in unevaluated(stage)
    write_source(tmp_path / "pairs/heldout", [[pair_sample("a", 0, "a red circle")]])
    assert unevaluated(stage) == ""
