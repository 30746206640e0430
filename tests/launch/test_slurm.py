"""What a job asks for against what SLURM offers; its commands are stand-ins with the answers of a small cluster."""

from __future__ import annotations

import pytest

from pretrain.launch.slurm import check_job, check_with_sbatch, read_job, waiting_jobs
from tests.small_run import ROOT

STAGE = ROOT / "launch" / "stage.sbatch"
WHOLE = ["--partition=gpu", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0", "--time=60"]
SINFO = """
if [ "$3" = "%R|%P" ]; then echo "cpu|cpu"; echo "gpu|gpu*"; exit; fi
case "$*" in
    *"-p cpu -o"*) echo "c1|c1|64|256000|idle|infinite|(null)" ;;
    *) for i in 1 2 3; do echo "g$i|host$i|128|1000000+|alloc|1-00:00:00|gpu:a100:8(S:0-1),shard:4"; done
       echo "g4|host4|64|500000|down*|1-00:00:00|gpu:h100:4" ;;
esac
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """-> add(name, body): a stand-in on the PATH."""

    def add(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    add("sinfo", SINFO)
    return add


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        (WHOLE, {"partition": "gpu", "nodes": 1, "tasks": 8, "gpus": 8, "cpus": 12, "memory": 0, "minutes": 60}),
        (["-N", "4", "-n", "32", "-p", "cpu"], {"nodes": 4, "tasks": 8, "partition": "cpu", "gpus": 0}),
        (["--gres=gpu:a100:4,shard:1"], {"gpus": 4, "gpu_type": "a100"}),
        (["--gres", "gpu"], {"gpus": 1, "gpu_type": ""}),
        (["--gpus-per-node=h100:2", "--nodes=1", "--nodes=2"], {"gpus": 2, "gpu_type": "h100", "nodes": 2}),
        (["--mem=1T", "-t", "1-12"], {"memory": 1024**2, "minutes": 36 * 60}),
        (["--mem=500M", "-t", "90:30"], {"memory": 500, "minutes": 90.5}),
        (["--account", "x", "--exclusive", "--time=1-02:03:00"], {"minutes": 26 * 60 + 3, "tasks": None}),
    ],
)
def test_options_are_read_as_sbatch_reads_them(options, asks):
    job = read_job(options, STAGE, {})
    assert {name: getattr(job, name) for name in asks} == asks


@pytest.mark.parametrize(
    ("options", "variables", "says"),
    [
        (["--nodes=2-4"], {}, "--nodes=2-4 is wrong; use one whole number"),
        (["--nodes=0"], {}, "--nodes=0 is wrong"),
        (["-N", "3", "-n", "8"], {}, "--ntasks=8 is not a multiple of --nodes=3"),
        (["--gpus-per-node=a100:x"], {}, "--gpus-per-node=x is wrong"),
        (["--mem=much"], {}, "--mem=much is wrong"),
        (["--time=2h"], {}, "--time=2h is no time"),
        (["--nodes"], {}, "options of sbatch: .*expected one argument"),
        (["-p", "gpu"], {"SBATCH_PARTITION": "cpu"}, "SBATCH_PARTITION=cpu and --partition=gpu .* say two things"),
    ],
)
def test_options_that_cannot_be_read_are_one_sentence(options, variables, says):
    with pytest.raises(ValueError, match=says):
        read_job(options, STAGE, variables)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-p", "gup"], "--partition=gup is no partition of this cluster; did you mean gpu"),
        (["-p", "cpu,what"], "--partition=what is no partition"),
        (["--nodes=5"], "--nodes=5 is more than the 4 nodes of partition gpu; use 4"),
        (["--nodes=4"], "--nodes=4 with 8 GPUs each are asked for, and 3 of the 4 nodes of partition gpu have them"),
        (["--gpus-per-node=16", "--ntasks-per-node=16"], "--nodes=1 with 16 GPUs each .* --gpus-per-node=8 or less"),
        (["--gpus-per-node=h100:8"], "h100:8 GPUs"),
        (["-p", "cpu"], r"a node has 0 \(no kind is named\)"),
        (["--ntasks-per-node=4"], "--ntasks-per-node=4 but --gpus-per-node=8"),
        (["--cpus-per-task=32"], "--cpus-per-task=32 is more than the 128 CPUs .* use --cpus-per-task=16"),
        (["--mem=2T"], "--mem=2097152M is more than the 1000000 MiB of a node"),
        (["--time=2-0"], "--time=2880 minutes is over the limit of partition gpu, 1440 minutes"),
    ],
)
def test_what_could_never_start_is_refused_with_the_way_out(commands, options, says):
    with pytest.raises(ValueError, match=says) as refused:
        check_job(read_job([*WHOLE, *options], STAGE, {}))
    assert "\n" not in str(refused.value)


def test_what_can_start_passes_also_on_the_default_partition(commands):
    nodes = check_job(read_job([*WHOLE, "--nodes=3"], STAGE, {}))
    assert [node.host for node in nodes] == ["host1", "host2", "host3", "host4"]
    assert len(check_job(read_job(["--gpus-per-node=h100:4"], STAGE, {}))) == 4
    assert len(check_job(read_job(["-p", "cpu,gpu"], STAGE, {}))) == 4


def test_sbatch_has_the_last_word(commands):
    commands("sbatch", 'echo "allocation failure: Invalid account or account/partition combination" >&2; exit 1')
    with pytest.raises(ValueError, match="sbatch would refuse this job: Invalid account or account/partition combinat"):
        check_with_sbatch(["-A", "x"], STAGE, [])


def test_a_job_that_ends_is_waited_for_as_it_may_come_back(commands, tmp_path):
    commands(
        "squeue", f'f={tmp_path}/seen; if [ -e $f ]; then echo "7 PENDING a"; else touch $f; echo "7 COMPLETING a"; fi'
    )
    assert waiting_jobs() == {"a": "7"}


@pytest.mark.parametrize(
    ("body", "says"),
    [(None, "sinfo is not on the PATH, so there is no SLURM here"), ("echo gone >&2; exit 1", "sinfo failed: gone")],
)
def test_no_slurm_is_one_sentence(commands, tmp_path, monkeypatch, body, says):
    if body is None:
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    else:
        commands("sinfo", body)
    with pytest.raises(ValueError, match=says):
        check_job(read_job(WHOLE, STAGE, {}))
