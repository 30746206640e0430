"""A run on the SLURM of this machine, through launch/submit.sh: what strikes it, and how much time that costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.slurm_runs.strike import STRIKES, Target
from pretrain.launch.outcome import reached_step
from pretrain.lives import read_lives
from pretrain.restarts import read_restarts
from tests.slurm.one_host import wait_for
from tests.small_run import ROOT, environment, tokenizer_of

STAGE = "fusion"
MORE = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
CLUSTER = """
GPU_JOB=(--partition=main --ntasks-per-node={ranks} --gpus-per-node={ranks} --cpus-per-task=1 --mem=0 --time=60)
SRUN=(--cpu-bind=none)
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
"""
FIRST_S, NEXT_S, END_S = 240.0, 300.0, 1800.0


class Measured(NamedTuple):
    """One fault. `seconds`: from the strike to the next step that was done; `by`: in place, requeue, or neither."""

    kind: str
    step: int
    seconds: float
    by: str
    steps_again: int


class Job:
    """A run in the directory `run`, with `nodes` of `ranks` each. Raises ValueError where it cannot be submitted."""

    def __init__(
        self, data: Path, run: Path, place: Path, slurm: Mapping[str, str], nodes: int, ranks: int, ds: str, *more: str
    ):
        shutil.copytree(data / "start", run, dirs_exist_ok=True)
        (place / f"{ranks}.env").write_text(CLUSTER.format(ranks=ranks))
        mine = {"IMGLISH_CLUSTER": str(place / f"{ranks}.env"), "IMGLISH_PYTHON": sys.executable, **slurm}
        base = {name: value for name, value in environment(data).items() if not name.startswith("SLURM_")} | mine
        settings = [tokenizer_of(data), *more]
        line = ["bash", "launch/submit.sh", f"--nodes={nodes}", "launch/stage.sbatch", "--stage", STAGE]
        line += ["--recipe", str(data / "recipe.py"), "--ds", f"ds_configs/{ds}", "--run-dir", str(run)]
        line += [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(line, cwd=ROOT, env=base, capture_output=True, text=True, timeout=200)
        if done.returncode:
            raise ValueError(f"{' '.join(line)} failed: {done.stderr.strip()}")
        self.stage, self.slurm = run / STAGE, slurm
        self.target = Target(done.stdout.split()[-1], run, place, slurm)

    @property
    def over(self) -> bool:
        return self.target.fact("JobState") not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")

    def wait_step(self, step: int, seconds: float = FIRST_S) -> bool:
        """Whether the run has done `step` in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if reached_step(self.stage) >= step:
                return True
            time.sleep(0.05)
        return False

    def strike(self, kind: str, victim: int) -> Measured:
        """Strikes the run and waits for its next step. Raises ValueError where none follows."""
        lives, step = len(read_lives(self.stage)), reached_step(self.stage)
        restarts, again = self.target.fact("Restarts"), len(read_restarts(self.stage))
        began = time.monotonic()
        STRIKES[kind](self.target, victim)
        while time.monotonic() < began + NEXT_S:
            now = read_lives(self.stage)
            if len(now) > lives and reached_step(self.stage) > now[-1].start:
                break
            if kind == "store stalled" and reached_step(self.stage) > step + 8:  # what was read ahead is done
                break
            if (self.stage / "weights.safetensors").exists():
                break
            time.sleep(0.05)
        else:
            raise ValueError(f"{kind} at step {step}: no step followed within {NEXT_S:.0f} s")
        seconds = time.monotonic() - began
        by = "neither"
        if self.target.fact("Restarts") != restarts:
            by = "requeue"
        elif len(read_restarts(self.stage)) > again:
            by = "in place"
        repeated = sum(life.repeated for life in read_lives(self.stage)[lives:])
        return Measured(kind, step, round(seconds, 1), by, repeated)

    def finish(self, seconds: float = END_S) -> str:
        return wait_for(self.target.job, dict(self.slurm), seconds)

    def said(self) -> str:
        """The job's own log."""
        logs = (self.stage.parent / "logs").glob(f"*-{self.target.job}.log")
        return "".join(log.read_text(errors="replace") for log in logs)


def sum_by_kind(faults: list[Measured]) -> dict[str, Any]:
    """For each kind of fault: how many, their median and longest seconds, and how many were mended in which way."""
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = sorted(fault.seconds for fault in faults if fault.kind == kind)
        by = [fault.by for fault in faults if fault.kind == kind]
        kinds[kind] = {
            "faults": len(own),
            "median_s": own[len(own) // 2],
            "longest_s": own[-1],
            **{name: by.count(name) for name in dict.fromkeys(by)},
        }
    return kinds
