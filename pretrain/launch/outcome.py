"""Decides what a job does after its ranks have failed: start them again in place, put itself back into the queue, or
end.

    python -m pretrain.launch.outcome --logs runs/base/logs/JOB --code 69 --stage vision --run-dir runs/base

launch/stage.sbatch calls it; without --code it only names the error that came first. It prints the decision, and the
reason on stderr. A run is started again while it advances: at most MOST times in a row without reaching a new step, and
not at all after a mistake of the user's. Each decision is a line of restarts.jsonl in the stage's directory. A node
that a check names, or that two failures in a row name, is left out, if the partition has others.
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
MOST = 3  # starts in a row without progress
PAUSES_S = (0, 15, 60)  # before each of them, since what broke may need time
DISK_PAUSES_S = (20, 60, 300)  # the same after an error of a disk
# Errors of a disk that is full, gone or broken, which somebody will mend. Errors of saving have only their words.
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
DISK = re.compile(rf"error(?: on rank \d+)?: .*(?:{'|'.join(map(os.strerror, BROKEN))})")
# An error that is a mistake of the user's. A process group that did not form is logged as an error too, but is none.
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
    """The error that came first. `first`: its log line, behind the name of its file; `node`: the node that it names; ""
    where there is none."""

    first: str
    node: str

    @property
    def final(self) -> bool:
        """Whether it is a mistake of the user's, which the next start would meet again."""
        return MISTAKE.search(self.first) is not None and not self.disk

    @property
    def disk(self) -> bool:
        """Whether it is an error of a disk."""
        return DISK.search(self.first) is not None


def first_failure(logs: Path) -> Failure:
    """The failure in the logs of the ranks: a bad node that the preflight names; else the first line in which a rank
    names a reason of its own, and not another rank's end; else what srun says of a task; else the last line of a
    rank."""
    bad = [match for line in _lines(logs / PREFLIGHT) if (match := BAD_NODE.match(line))]
    if bad:
        return Failure(f"{PREFLIGHT}:{bad[0].string}", bad[0][1])
    files = [*sorted(logs.glob("rank*.log")), *sorted(logs.glob("preflight*.log"))]
    contents = [(path, _lines(path)) for path in files]
    reasons = [(line[:8], path, line) for path, lines in contents for line in lines if REASON.match(line)]
    own = sorted((each for each in reasons if "another rank d" not in each[2]), key=lambda each: each[0])
    if own:
        _, path, line = own[0]
        if "bug on rank" in line:
            line += f": {next(reversed(_lines(path)))}"
        return _failure(f"{path.name}:{line}")
    if (failure := _srun_says(_lines(logs / "srun.log"))) is not None:
        return failure
    last = [f"{path.name}:{lines[-1]}" for path, lines in contents if lines and path.name.startswith("rank")]
    return _failure(last[-1] if last else "")


def _srun_says(lines: list[str]) -> Failure | None:
    """What srun says of a lost node, which it may call by its number in the job, or else of a task; None where it says
    neither. It names the tasks that it killed itself later."""
    names = os.environ.get("IMGLISH_NODES", "").split()
    for line in lines:
        if (match := LOST_NODE.match(line)) is not None:
            number = int(match[2] or 0)
            return Failure(line, match[1] or (names[number] if number < len(names) else ""))
    for line in lines:  # ranks that end with 69 say themselves that another one was lost
        if NODE.match(line) and "exit code 69" not in line:
            return _failure(line)
    return None


def _failure(line: str) -> Failure:
    match = NODE.search(line)
    return Failure(line, (match[1] or match[2]) if match else "")


def reached_step(stage: Path) -> int:
    """The last step in the stage's metrics, as metrics.last_step finds it, but without torch, which takes longer to
    import than all else here."""
    for raw in reversed(_lines(stage / METRICS)):
        try:
            return typed(parse_json(raw), "step", int)
        except ValueError:
            continue
    return 0


def without_progress(before: Sequence[Restart], reached: int) -> int:
    """How many starts in a row before the one that failed now reached no new step. Counting begins anew after a job
    that ended, since somebody decided to start the next one."""
    count = 0
    for restart in reversed(before):
        if restart.action == "end" or restart.reached < reached:
            break
        count += 1
    return count


def decide(failure: Failure, before: Sequence[Restart], reached: int) -> tuple[str, str, float]:
    """-> ("again", "requeue" or "end"; why; how many seconds to wait before). `reached`: the last step that any life
    reached."""
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
    """The decision for a script: "again SECONDS", "requeue NODES" with the nodes to avoid, or "end". Writes it into
    restarts.jsonl, and its reason on stderr. Where `only` is given and the action is another, the caller leaves it to
    somebody else: nothing is written, and "" is returned."""
    before = read_restarts(stage)
    reached = max([reached_step(stage), *(restart.reached for restart in before)])
    action, why, pause = decide(failure, before, reached)
    job, nodes = os.environ.get("SLURM_JOB_ID", ""), ""
    if action == "requeue" and not (
        only and shutil.which("scontrol") is None
    ):  # in a rank's container scontrol may be missing
        try:
            nodes = to_avoid(failure.node, job)
        except ValueError as error:
            action, why = "again", f"{why}, but cannot be left out: {error}"
    if only and action != only:
        return ""
    note = Restart(time.time(), job, code, reached, action, failure.node, failure.first[:500])
    if (problem := _note(stage, note)) and life >= MOST:
        action, why = "end", problem  # without notes nobody would know how often it was tried
    print(f"first error: {failure.first or NONE}\n{action}: {why}", file=sys.stderr, flush=True)
    return {"again": f"again {pause:g}", "requeue": f"requeue {nodes}"}.get(action, action)


def _note(stage: Path, restart: Restart) -> str:
    """Appends the decision to restarts.jsonl -> why that failed; "" where it did not."""
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
    """The lines of a file that are not empty; [] where it cannot be read."""
    try:
        text = read_bytes(path).decode(errors="replace")
    except (OSError, ValueError):
        return []
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
