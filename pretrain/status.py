"""One look at a run: each stage's state, speed, newest checkpoint, lives and effective training time.

    python -m pretrain.status runs/base

It only reads what the run wrote, and works on any node that sees the directory. The effective training time is the
share of the time since the first start that went into steps which count: not into starting, saving, waiting in a queue,
or repeating steps that a fault had lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.checkpoint.directory import place_of
from pretrain.command import make_parser, run
from pretrain.lives import KILLED, Life
from pretrain.lock import BEAT_S, BEATS, LOCK
from pretrain.report.checkpoints import checkpoints
from pretrain.report.rows import StageRun, finite, load_run
from pretrain.restarts import count_restarts
from pretrain.visible import visible

WORTH_A_WORD = 0.05  # the share of the time waiting for data from which its cause is named
SHOWN_RESTARTS = 3
RECENT = 20  # the last lines of metrics.jsonl, whose mean is shown as the present rate


@dataclass(frozen=True)
class Status:
    """The status of one stage. Times are in seconds; None: not known."""

    stage: str
    state: str
    step: int
    steps: int | None
    eta_s: float | None = None
    samples_per_s: float | None = None
    mfu: float | None = None
    data_wait: float | None = None
    data_wait_for: str = ""  # its main cause; "" if it is short
    loss: float | None = None
    saved_step: int | None = None
    saved_age_s: float | None = None
    checkpoints: tuple[str, ...] = ()  # the step of each, newest first, and why it is kept
    lives: int = 0
    repeated_steps: int = 0
    effective: float | None = None  # effective training time, 0 to 1; see the top of this file
    slow: str = ""  # the ranks for which the others wait
    went_back: str = ""  # how often it diverged and went back, and how many batches it passed over
    restarted: str = ""  # how often its jobs started its ranks again, and how
    restarts: tuple[str, ...] = ()  # each of these times, and each end of a job: the error that came first
    reasons: tuple[str, ...] = ()  # why its lives ended, those that are over


def status_of(stage: StageRun, now: float) -> Status:
    """The status of a stage; `now`: seconds since 1970."""
    running = _running(stage.directory, now)
    state = "finished" if stage.finished else "running" if running else "not running" if stage.step else "not begun"
    entries = checkpoints(stage)
    newest = place_of(stage.directory / "checkpoints", entries[0].step) if entries else None
    rate = _mean(stage, "samples_per_s")
    lives = stage.lives
    ended = lives if stage.finished or not running else lives[:-1]
    return Status(
        stage.name,
        state,
        stage.step,
        stage.steps,
        _eta(stage, rate) if running else None,
        rate,
        _mean(stage, "mfu"),
        _mean(stage, "data_wait"),
        _wait_for(stage),
        finite(stage.lines[-1].get("loss")) if stage.lines else None,
        entries[0].step if entries else None,
        max(now - newest.stat().st_mtime, 0) if newest else None,
        tuple(map(str, entries)),
        len(lives),
        sum(life.repeated for life in lives),
        stage.effective(now if running else None),
        lives[-1].slow if lives and running else "",
        stage.went_back,
        count_restarts(stage.restarts),
        tuple(map(str, stage.restarts)),
        tuple(dict.fromkeys(_reason(life) for life in ended)),
    )


def _running(directory: Path, now: float) -> bool:
    """Whether a job holds the directory: it writes into its lock every BEAT_S, and empties it at its end."""
    try:
        lock = (directory / LOCK).stat()
    except OSError:
        return False
    return lock.st_size > 0 and now - lock.st_mtime < BEATS * BEAT_S


def _reason(life: Life) -> str:
    return life.reason if life.ended is not None else KILLED


def _mean(stage: StageRun, key: str) -> float | None:
    values = [value for line in stage.lines[-RECENT:] if (value := finite(line.get(key))) is not None]
    return sum(values) / len(values) if values else None


def _wait_for(stage: StageRun) -> str:
    if (_mean(stage, "data_wait") or 0) < WORTH_A_WORD:
        return ""
    shares = {cause: _mean(stage, f"data_wait/{cause}") or 0 for cause in ("read", "decode", "transfer")}
    most = max(shares, key=lambda cause: shares[cause])
    return most if shares[most] else ""  # runs by earlier versions have none of these figures


def _eta(stage: StageRun, rate: float | None) -> float | None:
    seen = finite(stage.lines[-1].get("samples_seen")) if stage.lines else None
    if not rate or not seen or not stage.steps or not stage.step:
        return None
    return (stage.steps - stage.step) * seen / stage.step / rate


def lines_of(status: Status) -> list[str]:
    """The lines about one stage for the terminal."""
    of = f" of {status.steps:,}" if status.steps else ""
    share = f" ({100 * status.step / status.steps:.0f} %)" if status.steps else ""
    lines = [f"{status.stage:<12} {status.state}, step {status.step:,}{of}{share}"]
    now = [
        f"{_duration(status.eta_s)} to go" if status.eta_s is not None else "",
        f"{status.samples_per_s:,.1f} samples/s" if status.samples_per_s else "",
        f"MFU {status.mfu:.1%}" if status.mfu else "",
        f"waits for data {status.data_wait:.0%}{status.data_wait_for and f' ({status.data_wait_for})'}"
        if status.data_wait is not None
        else "",
        f"loss {status.loss:.4f}" if status.loss is not None else "",
    ]
    past = [
        f"checkpoint of step {status.saved_step:,}, {_duration(status.saved_age_s)} old" if status.saved_age_s else "",
        f"{status.lives} {'life' if status.lives == 1 else 'lives'}" if status.lives else "",
        f"{status.repeated_steps:,} steps done again" if status.repeated_steps else "",
        status.restarted,
        status.went_back,
        f"effective training time {status.effective:.1%}" if status.effective is not None else "",
    ]
    for parts in (now, past):
        if text := ", ".join(part for part in parts if part):
            lines.append(f"{'':<13}{text}")
    if any(" " in checkpoint for checkpoint in status.checkpoints):  # one is kept for another reason than being new
        lines.append(f"{'':<13}checkpoints of step {'; '.join(status.checkpoints)}")
    if status.slow:
        lines.append(f"{'':<13}slow: {status.slow}")
    if len(status.restarts) > SHOWN_RESTARTS:
        lines.append(f"{'':<13}(the last {SHOWN_RESTARTS} of {len(status.restarts)} failures; all by --json)")
    lines += [f"{'':<13}{restart}" for restart in status.restarts[-SHOWN_RESTARTS:]]
    lines += [f"{'':<13}ended: {reason}" for reason in status.reasons if reason != "finished"]
    return [visible(line) for line in lines]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.status", __doc__, "runs/base --json")
    parser.add_argument("run_dir", type=Path, help="the --run-dir of pretrain.train")
    parser.add_argument("--json", action="store_true", help="the same as JSON, a list with an object for each stage")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="nothing was changed")


def _run(args: argparse.Namespace) -> None:
    all_of_them = [status_of(stage, time.time()) for stage in load_run(args.run_dir)]
    if args.json:
        print(json.dumps([asdict(status) for status in all_of_them], indent=1))
    else:
        print("\n".join(line for status in all_of_them for line in lines_of(status)))


if __name__ == "__main__":
    sys.exit(main())
