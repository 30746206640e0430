"""Calls sbatch after checks: a mistake that the nodes would meet in hours is one sentence now.

    python -m pretrain.launch --dry-run --option=--nodes=2 launch/stage.sbatch --recipe beit3_base --stage vision ...

launch/submit.sh and launch/chain.sh call it with the options of launch/cluster.env. It checks SLURM's partition, nodes,
GPUs, CPUs, memory and time limit, then everything that pretrain.train would refuse: recipe, stages, settings of a run
that began before, DeepSpeed JSON, layout, weights and data that it reads, memory of a GPU, run directory. It does not
submit stages again that are finished or in the queue.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pretrain.command import make_parser, run
from pretrain.launch.checks import (
    Line,
    Ranks,
    check_layout,
    check_shared,
    check_stages,
    check_tool,
    check_writable,
    job_name,
    unevaluated,
)
from pretrain.launch.codes import SCRIPT, WORD, Storing, crops_of, is_stored, online, plan_codes
from pretrain.launch.slurm import (
    Job,
    WordParser,
    check_job,
    check_with_sbatch,
    command_line,
    read_job,
    submit,
    waiting_jobs,
)
from pretrain.lock import Lock
from pretrain.plan.hardware import GPUS
from pretrain.recipes import find_recipe, load_recipe

LOGS = "logs"  # in the run directory; for jobs other than stages, in the checkout


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args), state="run it again: what was submitted is not submitted twice")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = (
        "--dry-run --option=--nodes=2 launch/stage.sbatch --recipe beit3_base --stage vision --ds ... --run-dir ..."
    )
    parser = make_parser("pretrain.launch", __doc__, example)
    parser.allow_abbrev = False
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be submitted")
    parser.add_argument(
        "--option", action="append", default=[], metavar="OPTION", help="one word for sbatch; repeatable"
    )
    parser.add_argument("--gpu", metavar="KIND", help="of pretrain.plan: check the memory of a GPU of this kind")
    parser.add_argument(
        "--chain",
        metavar="STAGES",
        help="submit these stages, each after the one before; the word codes among them stores the visual tokenizer's "
        "codes for those behind it (codes:N: of N looks at each picture)",
    )
    parser.add_argument("--local", type=int, metavar="N", help="check only, for N ranks on this machine; no SCRIPT")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="SCRIPT ARGUMENTS", help="a batch script, its arguments"
    )
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    args.gpu = args.gpu or None
    args.words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if args.gpu and args.gpu not in GPUS:
        raise ValueError(f"GPU={args.gpu} is not known to pretrain.plan; known: {', '.join(sorted(GPUS))}")
    if args.local is not None:
        return _check_here(args)
    if not args.words or not Path(args.words[0]).is_file():
        given = args.words[0] if args.words else "(nothing)"
        raise ValueError(f"{given} is no batch script; use launch/stage.sbatch, launch/bench.sbatch or prepare.sbatch")
    script, words = Path(args.words[0]), args.words[1:]
    job = read_job(args.option, script, os.environ)
    if job.output is not None and not (folder := Path(job.output).parent).is_dir() and "%" not in str(folder):
        raise ValueError(
            f"--output={job.output}: there is no directory {folder}, and SLURM would drop the log; make it"
        )
    if job.tasks is None and script.name != "prepare.sbatch":
        raise ValueError("--ntasks-per-node is not given; set it in GPU_JOB of cluster.env to the GPUs of a node")
    nodes = check_job(job)
    if (up := sum(node.up and node.has(job) for node in nodes)) < job.nodes:
        print(f"note: {up} of the {len(nodes)} nodes are up, so the job will wait for {job.nodes}", file=sys.stderr)
    share = max(node.cpus for node in nodes) // job.ranks
    if job.gpus and job.cpus == 1 and share > 2:
        print(
            f"note: --cpus-per-task is 1, so a rank shares one CPU with its only data worker; a node has {share} for "
            f"each rank: set --cpus-per-task={share} in GPU_JOB of cluster.env",
            file=sys.stderr,
        )
    hosts = {node.host for node in nodes}
    if script.name == "stage.sbatch":
        _stages(args, script, words, job, hosts)
    else:
        _check_other(script, words, job, Ranks(job.nodes, job.ranks, args.gpu), args.option)
        _submit_one(args, script, words, job)


def _check_here(args: argparse.Namespace) -> None:
    """--local: checks a stage for this machine."""
    line, stages = _train_arguments(args.words)
    ready = check_stages(line, stages, Ranks(1, args.local, args.gpu))
    _say_unevaluated(line, ready)
    print(f"{stages[0]}: ready" if ready else f"{stages[0]}: finished before; nothing to do")


def _stages(args: argparse.Namespace, script: Path, words: list[str], job: Job, hosts: set[str]) -> None:
    """Checks and submits one stage, or a chain of them."""
    chain = args.chain.split() if args.chain is not None else None
    line, stages = _train_arguments(words, chain)
    if job.name is not None:
        raise ValueError(f"--job-name={job.name}: the queue knows a stage by its job's name; leave it out")
    check_shared(line.run_dir, hosts)
    line, stages, storing = _with_codes(line, stages)
    names = [name for name in stages if name != WORD or storing is None]
    ready = check_stages(line, names, Ranks(job.nodes, job.ranks, args.gpu), stored=storing is None)
    if storing is not None and not set(ready).isdisjoint(
        line.of_stage
    ):  # else the stages that would read the codes are finished
        ready = [name for name in stages if name in ready or name == WORD]
    if chain:
        _say_online(line, ready)
    _say_unevaluated(line, ready)
    logs = line.run_dir.absolute() / LOGS
    options = [*args.option] if job.output else [*args.option, f"--output={logs}/%x-%j.log"]
    if ready:
        check_with_sbatch(options, script, [*words, "--stage", ready[0]] if chain else words)
    if job.gpus and args.gpu is None:
        print("note: GPU is not set in cluster.env, so the memory of a GPU was not checked", file=sys.stderr)
    if not args.dry_run:
        logs.mkdir(parents=True, exist_ok=True)
    with nullcontext() if args.dry_run else Lock(logs):  # else two calls at the same time would both submit
        queue, before = waiting_jobs(), ""
        _check_order({name: queue.get(job_name(line.run_dir, name)) for name in ready})
        for name in stages:
            own = job_name(line.run_dir, name)
            if name not in ready:
                print(f"{name}: finished")
                continue
            if own in queue:
                before = queue[own]
                print(f"{name}: in the queue already, job {before}")
                continue
            # --kill-on-invalid-dep: if a stage fails, the later ones are removed; they would wait for ever.
            after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
            whole = [*options, f"--job-name={own}", *after]
            more = [word for setting in line.of_stage.get(name, ()) for word in ("--set", setting)]
            its, arguments = script, ["--stage", name, *words, *more] if chain else words
            if name == WORD and storing is not None:
                its, arguments = script.with_name(SCRIPT), list(storing.arguments)
            if args.dry_run:
                print(command_line(whole, its, arguments))
                before = f"JOB_OF_{name}"
            else:
                before = submit(whole, its, arguments, IMGLISH_LOGS=str(logs))
                print(f"{name}: job {before}", flush=True)


def _with_codes(line: Line, stages: list[str]) -> tuple[Line, list[str], Storing | None]:
    """-> (`line` with the settings that `codes` in the chain means for the stages behind it, the stages with the plain
    word for it, the job that stores the codes). Without the word and the job where they are stored already, and
    unchanged where the chain does not name them."""
    places = [place for place, word in enumerate(stages) if crops_of(word)]
    if not places or WORD in find_recipe(line.recipe).stages:
        return line, stages, None
    if len(places) > 1:
        raise ValueError(f"{WORD} is named twice; name it once")
    place, crops = places[0], crops_of(stages[places[0]])
    settings, storing = plan_codes(line.recipe, line.settings, line.run_dir, stages[place + 1 :], crops)
    line = line._replace(of_stage=settings)
    if is_stored(storing, crops):
        print(f"{WORD}: stored")
        return line, [*stages[:place], *stages[place + 1 :]], None
    return line, [*stages[:place], WORD, *stages[place + 1 :]], storing


def _say_online(line: Line, ready: list[str]) -> None:
    """Names on stderr the stages of a chain that will run the visual tokenizer in each step."""
    names = [name for name in ready if name != WORD]
    names = [name for name in names if online(load_recipe(line.recipe, name, _settings(line, name))[1])]
    if names:
        print(
            f"note: {', '.join(names)} will run the visual tokenizer in each step; the word {WORD} before {names[0]} "
            "in the chain stores what it makes, once",
            file=sys.stderr,
        )


def _say_unevaluated(line: Line, ready: list[str]) -> None:
    """One sentence for each stage whose evaluations lack data, which nobody would see before days of training."""
    for name in ready:
        if name != WORD and (reason := unevaluated(load_recipe(line.recipe, name, _settings(line, name))[1])):
            print(
                f"note: stage {name} will train, but its evaluations will not find their data: {reason}",
                file=sys.stderr,
            )


def _settings(line: Line, name: str) -> list[str]:
    """The settings of one stage."""
    return [*line.settings, *line.of_stage.get(name, ())]


def _check_order(jobs: dict[str, str | None]) -> None:
    """`jobs`: for each stage that is not finished, in their order, its job in the queue or None. Raises ValueError
    where a stage is in the queue and one before it is not: it would not wait for the job that is submitted now."""
    missing = ""
    for name, job in jobs.items():
        if job is None:
            missing = missing or name
        elif missing:
            raise ValueError(
                f"stage {name} is in the queue as job {job}, and {missing}, which comes before it, is not; scancel "
                f"{job}, then call this again"
            )


def _train_arguments(words: Sequence[str], chain: list[str] | None = None) -> tuple[Line, list[str]]:
    """(pretrain.train's arguments, the stages that they name, or those of `chain`). Raises ValueError for arguments
    that it would not take."""
    parser = WordParser(prog="arguments of pretrain.train", add_help=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--stage", required=chain is None)
    parser.add_argument("--ds", required=True)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[])
    given, rest = parser.parse_known_args(list(words))
    if rest:
        raise ValueError(f"{rest[0]} is no argument of pretrain.train; sbatch's options stand before the script")
    if chain is not None and given.stage is not None:
        raise ValueError(f"--stage {given.stage} stands beside the chain's stages; name stages in one place")
    if chain is not None and not chain:
        raise ValueError('the chain names no stage; write bash launch/chain.sh "tokenizer vision ..." ...')
    return Line(given.recipe, given.ds, given.run_dir, given.set), chain or [given.stage]


def _check_other(script: Path, words: list[str], job: Job, ranks: Ranks, options: list[str]) -> None:
    """Raises ValueError for what is wrong with the arguments of prepare.sbatch, bench.sbatch or another script."""
    parser = WordParser(prog=f"arguments of {script}", add_help=False)
    for name, default in (("--recipe", "beit3_base"), ("--stage", "pretrain"), ("--ds", "ds_configs/zero3_bf16.json")):
        parser.add_argument(name, default=default)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--list", type=Path)
    parser.add_argument("--out", type=Path)
    given, _ = parser.parse_known_args(words)
    if given.out is not None:
        check_writable(given.out)
    if script.name == "prepare.sbatch":
        if given.list is not None and not given.list.exists():
            raise ValueError(f"--list {given.list} does not exist; give a file or a directory of the list")
        check_tool(words, array=any(word.startswith(("--array", "-a")) for word in options))
    elif script.name == "bench.sbatch":
        check_layout(Line(given.recipe, given.ds, Path(), given.set), given.stage, ranks)
    check_with_sbatch(options, script, words)


def _submit_one(args: argparse.Namespace, script: Path, words: list[str], job: Job) -> None:
    logs = Path(LOGS).absolute()
    array = any(word.startswith(("--array", "-a")) for word in args.option)
    options = [*args.option]
    options += [] if job.output else [f"--output={logs}/%x-{'%A_%a' if array else '%j'}.log"]
    options += [] if job.name else [f"--job-name=imglish-{script.stem}"]
    if args.dry_run:
        print(command_line(options, script, words))
        return
    logs.mkdir(exist_ok=True)
    print(f"{script.stem}: job {submit(options, script, words, IMGLISH_LOGS=str(logs))}")


if __name__ == "__main__":
    sys.exit(main())
