"""The runs of benchmarks.claims: each stage of the recipe, for each seed, trained and evaluated once and then read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.config import Recipe, to_json
from pretrain.files import write_json
from pretrain.json_files import read_object
from pretrain.recipes import find_recipe

ROOT, RECIPE = Path(__file__).parents[2], Path(__file__).with_name("recipe.py")
DONE = "claims.json"  # in a stage's directory, written last
CAPFILT, CAPTIONER = "capfilt", "noisy_tuned"  # directory of the pairs that this stage has captioned and filtered
CAPFILTERED = "filtered"  # the stage that is trained on them
FEWEST = 4  # steps, however small the scale


@dataclass(frozen=True)
class Runs:
    """The runs of one run directory. `scale` is the share of the recipe's steps that they take."""

    directory: Path
    scale: float = 1.0

    @property
    def corpus(self) -> Path:
        return self.directory / "corpus"

    def place(self, seed: int) -> Path:
        return self.directory / f"seed{seed}"

    @cached_property
    def recipe(self) -> Recipe:
        return find_recipe(str(RECIPE))

    def needs(self, stage: str) -> set[str]:
        """The stages that must be there before this one begins."""
        own = self.recipe.stages[stage]
        named = {own.init_from, own.visual_tokenizer} | ({CAPTIONER} if stage == CAPFILTERED else set())
        return {name for name in named if name is not None}

    def chain(self, stages: Iterable[str]) -> list[str]:
        """These stages and all that they need, each after what it needs."""
        chain: list[str] = []
        for stage in stages:
            chain += [name for name in [*self.chain(sorted(self.needs(stage))), stage] if name not in chain]
        return chain

    def steps(self, stage: str) -> int:
        return max(round(self.recipe.stages[stage].steps * self.scale), FEWEST)

    def settings_hash(self, stage: str) -> str:
        """The hash of what decides a stage's scores, except its seed and the weights that it begins with."""
        said = json.dumps([to_json(self.recipe.stages[stage]), self.steps(stage)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def done(self, seed: int, stage: str) -> dict[str, Any] | None:
        """What a finished run noted; None where it is not finished. ValueError if it had other settings."""
        path = self.place(seed) / stage / DONE
        if not path.is_file():
            return None
        noted = read_object(path)
        if noted.get("settings") != self.settings_hash(stage):
            raise ValueError(f"{path.parent} was trained with other settings or another --scale; use a new --run-dir")
        return noted

    def scores(self, seeds: Iterable[int]) -> dict[int, dict[str, dict[str, Any]]]:
        """{seed: {stage: eval.json}} of the finished runs."""
        return {
            seed: {
                stage: read_object(self.place(seed) / stage / "eval.json")
                for stage in self.recipe.stages
                if self.done(seed, stage) is not None
            }
            for seed in seeds
        }

    def run(self, seed: int, stage: str) -> None:
        """Trains and evaluates a stage whose needs are finished. ValueError where a part of that fails."""
        place = self.place(seed)
        common = ["--recipe", str(RECIPE), "--stage", stage, "--run-dir", str(place)]
        settings = [word for each in (f"steps={self.steps(stage)}", f"seed={seed}") for word in ("--set", each)]
        if stage == CAPFILTERED:
            weights = str(place / CAPTIONER)
            line = [str(self.corpus / "pairs/noisy"), "--captioner", weights, "--filter", weights]
            line += ["--out", str(place / CAPFILT), "--seed", str(seed), "--batch", "128", "--workers", "1"]
            self._start(seed, CAPFILT, "data_tools.capfilt", *line)
        ds = str(ROOT / "ds_configs/zero0.json")
        seconds = self._start(seed, stage, "pretrain.train", *common, "--ds", ds, *settings)
        self._start(seed, stage, "pretrain.evaluate", *common)
        noted = {"settings": self.settings_hash(stage), "steps": self.steps(stage), "cpu_s": round(seconds, 1)}
        write_json(place / stage / DONE, noted)

    def _start(self, seed: int, name: str, module: str, *words: str) -> float:
        """Runs a command of this repository on one thread -> its seconds of CPU. Its output goes to a log."""
        place = self.place(seed)
        log = place / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self.variables(seed)
        with log.open("ab") as out:
            process = subprocess.Popen([sys.executable, "-m", module, *words], env=environment, stdout=out, stderr=out)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            raise ValueError(f"{module} of {name}, seed {seed}, ended with exit code {process.returncode}: {last}; "
                             f"see {log}, and start the same line again")  # fmt: skip
        return usage.ru_utime + usage.ru_stime

    def variables(self, seed: int) -> dict[str, str]:
        """The environment variables in the recipe's paths."""
        return {"CLAIMS_CORPUS": str(self.corpus), "CLAIMS_RUN": str(self.place(seed))}


def run_all(runs: Runs, wanted: list[tuple[int, str]], jobs: int, tell: Callable[[int, str], None]) -> None:
    """Runs what is not finished, `jobs` at a time, in the order of `wanted` as far as needs allow; `tell` is called in
    this thread after each. After a failure nothing new begins: what is under way comes to its end, and then the first
    error is raised."""
    finished = {run for run in wanted if runs.done(*run) is not None}
    todo = [run for run in wanted if run not in finished]
    going: dict[Future[None], tuple[int, str]] = {}
    failed: Exception | None = None
    with ThreadPoolExecutor(jobs) as pool:
        while todo or going:
            ready = [(seed, stage) for seed, stage in todo if {(seed, need) for need in runs.needs(stage)} <= finished]
            for run in ready[: jobs - len(going)]:
                todo.remove(run)
                going[pool.submit(runs.run, *run)] = run
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                if isinstance(error := future.exception(), Exception):
                    failed, todo = failed or error, []
                    continue
                finished.add(run)
                tell(*run)
    if failed is not None:
        raise failed


def order(runs: Runs, arms: Mapping[str, list[str]], seeds: Iterable[int]) -> list[tuple[int, str]]:
    """Every (seed, stage) that the claims need, claim by claim, so that the first claims have their results early."""
    every = [(seed, stage) for stages in arms.values() for seed in seeds for stage in runs.chain(stages)]
    return list(dict.fromkeys(every))
