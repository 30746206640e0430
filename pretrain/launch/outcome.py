"""What a job does after its ranks have failed: start them again in place, put itself back into the queue, or end.

    python -m pretrain.launch.outcome --logs runs/base/logs/JOB --code 69 --stage vision --run-dir runs/base

launch/stage.sbatch calls it; without --code it only names the error that came first. It prints what to do, and why on
stderr. A run is started again while it advances: at most MOST times in a row without a step that no life before had
reached, and not at all after a mistake of the user's. Each decision is a line of restarts.jsonl in the stage's
directory. A node that a check names, or that two failures in a row name, is left out, if the partition has others.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from pretrain.command import make_parser, run
from pretrain.files import Lines
from pretrain.json_files import parse_json, read_bytes, typed
from pretrain.launch.exclude import to_avoid
from pretrain.restarts import RESTARTS, Restart, read_restarts

METRICS = "metrics.jsonl"
MOST = 3  # starts without progress
PAUSES_S = (0, 15, 60)  # before each of them; what broke may need its time
DISK_PAUSES_S = (20, 60, 300)
# A disk that is full, gone or broken: somebody mends it. (Errors of saving have the words, and no number.)
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
DISK = re.compile(rf"error(?: on rank \d+)?: .*(?:{'|'.join(map(os.strerror, BROKEN))})")
# A process group that did not form is said as an error too, but it is no mistake of the user's.
MISTAKE = re.compile(r":(?:\d\d:){2}\d\d error(?: on rank \d+)?: (?!rank \d+ of \d+: the process group)")
NODE = re.compile(
    r"rank \d+ on (\S+) (?:gives no|does not|hangs in|is still in|was killed)|^srun: error: ([\w.-]+): tasks? "
)
LOST_NODE = re.compile(r"^srun: error: (?:Node failure on (\S+)|.*missing step on node (\d{1,6})$)")
REASON = re.compile(r"^(?:\d\d:){2}\d\d (error|bug on rank|rank \d+ o[fn])")
NONE = "none in the logs of the ranks; see above what srun said"
PREFLIGHT = "preflight00000.log"
BAD_NODE = re.compile(r"^(?:\d\d:){2}\d\d bad node (\S+): ")


class Failure(NamedTuple):
    """The error that came first: its line with its file's name, and the node that it names; "" where there is none."""

    first: str
    node: str

    @property
    def final(self) -> bool:
        """A user's mistake, which the next start would meet again."""
        mistake = re.search(
            r":(?:\d\d:){2}\d\d error(?: on rank \d+)?: (?!rank \d+ of \d+: the process group)", self.first
        )
        return mistake is not None and not self.disk

    @property
    def disk(self) -> bool:
        return DISK.search(self.first) is not None


def first_failure(logs: Path) -> Failure:
    """Of the ranks whose logs lie in `logs`: the first line in which one names a reason of its own, and not another
    rank's end; else what srun says of a task; else the last that a rank said."""
    bad = [found for line in _lines(logs / PREFLIGHT) if (found := BAD_NODE.match(line))]
    if bad:
        return Failure(f"{PREFLIGHT}:{bad[0].string}", bad[0][1])
    files = [*sorted(logs.glob("rank*.log")), *sorted(logs.glob("preflight*.log"))]
    told = [(path, _lines(path)) for path in files]
    reasons = [(line[:8], path, line) for path, lines in told for line in lines if REASON.match(line)]
    own = sorted((each for each in reasons if "another rank d" not in each[2]), key=lambda each: each[0])
    if own:
        _, path, line = own[0]
        if "bug on rank" in line:
            line += f": {next(reversed(_lines(path)))}"
        return _failure(f"{path.name}:{line}")
    if (failure := _srun_says(_lines(logs / "srun.log"))) is not None:
        return failure
    last = [f"{path.name}:{lines[-1]}" for path, lines in told if lines and path.name.startswith("rank")]
    return _failure(last[-1] if last else "")


def _srun_says(lines: list[str]) -> Failure | None:
    """Of a lost node, which srun numbers in the job, then of a task. What it kills itself comes after that."""
    names = os.environ.get("IMGLISH_NODES", "").split()
    for line in lines:
        if (found := LOST_NODE.match(line)) is not None:
            number = int(found[2] or 0)
            return Failure(line, found[1] or (names[number] if number < len(names) else ""))
    for line in lines:  # ranks that end with 69 say themselves that another one was lost
        if NODE.match(line) and "exit code 69" not in line:
            return _failure(line)
    return None


def _failure(line: str) -> Failure:
    found = NODE.search(line)
    return Failure(line, (found[1] or found[2]) if found else "")


def reached_step(stage: Path) -> int:
    """As metrics.last_step has it, but without torch, which takes longer to import than all else here."""
    for raw in reversed(_lines(stage / METRICS)):
        try:
            return typed(parse_json(raw), "step", int)
        except ValueError:
            continue
    return 0


def without_progress(before: Sequence[Restart], reached: int) -> int:
    """How many starts in a row, up to the one that failed now, reached no new step. One after which the job ended was
    somebody's decision, and what he started later counts anew."""
    count = 0
    for restart in reversed(before):
        if restart.action == "end" or restart.reached < reached:
            break
        count += 1
    return count


def decide(failure: Failure, before: Sequence[Restart], reached: int) -> tuple[str, str, float]:
    """-> again, requeue or end; why; and how many seconds to wait before."""
    if failure.final:
        return "end", "the next start would meet this again", 0.0
    stuck = without_progress(before, reached)
    most = 1 if "bug on rank" in failure.first else MOST
    if stuck >= most:
        return "end", f"step {reached} was reached before, and {stuck} starts in a row came no further", 0.0
    if failure.node and (failure.first.startswith(PREFLIGHT) or (before and before[-1].node == failure.node)):
        return "requeue", f"node {failure.node} is named again", 0.0
    pause = (DISK_PAUSES_S if failure.disk else PAUSES_S)[min(stuck, MOST - 1)]
    return "again", f"the ranks are started again at their newest checkpoint, {stuck + 1} of {most}", pause


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.launch.outcome", __doc__, "--logs runs/base/logs/imglish-base-vision-ab12cd-41")
    parser.add_argument("--logs", type=Path, required=True, help="of the ranks that failed")
    parser.add_argument("--code", type=int, help="with which srun ended")
    parser.add_argument("--life", type=int, default=0, help="how often this job started its ranks again before")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--stage", default="")
    args, _ = parser.parse_known_args(arguments)  # the other arguments of pretrain.train stand there too
    return run(lambda: _run(args), state="the job ends")


def _run(args: argparse.Namespace) -> None:
    failure = first_failure(args.logs)
    if args.code is None:
        print(f"first error: {failure.first or NONE}")
        return
    print(decide_and_note(failure, args.code, args.run_dir / args.stage, args.life))


def decide_and_note(failure: Failure, code: int, stage: Path, life: int, only: str = "") -> str:
    """What `decide` says, for a script: "again SECONDS", "requeue NODES" to avoid, or "end"; with a line of
    restarts.jsonl, and why on stderr. What is not the action `only`, if that is given, is left to somebody else to
    decide: nothing is noted, and "" returned."""
    before = read_restarts(stage)
    reached = max([reached_step(stage), *(restart.reached for restart in before)])
    action, why, pause = decide(failure, before, reached)
    job, nodes = os.environ.get("SLURM_JOB_ID", ""), ""
    if action == "requeue" and not (only and shutil.which("scontrol") is None):  # a rank may be in a container
        try:
            nodes = to_avoid(failure.node, job)
        except ValueError as error:
            action, why = "again", f"{why}, but cannot be left out: {error}"
    if only and action != only:
        return ""
    note = Restart(time.time(), job, code, reached, action, failure.node, failure.first[:500])
    if (problem := _note(stage, note)) and life >= MOST:
        action, why = "end", problem  # who does not know how often it was tried would try for ever
    print(f"first error: {failure.first or NONE}\n{action}: {why}", file=sys.stderr, flush=True)
    return {"again": f"again {pause:g}", "requeue": f"requeue {nodes}"}.get(action, action)


def _note(stage: Path, restart: Restart) -> str:
    """Why it could not be noted; "" where it is."""
    try:
        stage.mkdir(parents=True, exist_ok=True)
        file = Lines(stage / RESTARTS)
        try:
            file.write(json.dumps(asdict(restart)).encode() + b"\n")
        finally:
            file.close()
    except OSError as error:
        return f"{stage / RESTARTS} cannot be written: {error.strerror}"
    return ""


def _lines(path: Path) -> list[str]:
    """Those that are not empty; [] where there is no such file."""
    try:
        text = read_bytes(path).decode(errors="replace")
    except (OSError, ValueError):
        return []
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
