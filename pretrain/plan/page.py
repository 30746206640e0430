"""The plan as text for a terminal."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

WIDTH = 118
PARTS = ("parameters", "gradients", "optimizer", "activations", "working", "buffers")


def page(facts: dict[str, Any], args: argparse.Namespace) -> str:
    """`facts`: what plan.__main__.report returned; `args`: the arguments of the command."""
    head = f"{args.recipe} {args.stage}: {facts['parameters'] / 1e6:,.0f} M parameters on {args.gpus} x {args.gpu}"
    lines = [head, "memory is counted, time is a model (pretrain/plan/hardware.py); nothing here was measured", ""]
    rows, step = facts["layouts"], facts["rows"]
    padding = f"{step['padding']:.1%} are padding" if step["padding"] else "texts are full (--pair-ids, --text-ids)"
    lines[-1:] = [f"a step has {step['exist']:,} rows, of which {step['computed']:,} are computed: {padding}", ""]
    for sentence in facts["not_counted"]:
        lines[-1:] = [*textwrap.wrap(f"not counted: {sentence}", WIDTH), ""]
    if rows:
        lines += [*_table(rows), "", *_detail(rows[0], args)]
    else:
        lines.append("no legal layout fits into memory")
    if facts["too_large"]:
        near = facts["nearest_too_large"][0]
        memory = near["memory_gib"]
        worst = max(PARTS, key=lambda part: memory[part])
        lines += [
            "",
            f"too large: {facts['too_large']} layouts; nearest {_name(near)}",
            f"       with {memory['total']:.1f} GiB, most of it {worst} ({memory[worst]:.1f} GiB)",
        ]
    if facts["illegal"]:
        lines += ["", "illegal:"]
        for reason in facts["illegal"]:
            text = f"{reason['layouts']:>6}  {reason['example']}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 10)
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':3} {'DeepSpeed JSON':18} {'T':>2} {'P':>2} {'S':>2} {'data':>4} {'acc':>4} {'ckpt':>4}"
        f" {'step s':>7} {'samples/s':>9} {'MFU':>5} {'real':>5} {'done':>5} {'bubble':>6}"
        f" {'GiB':>6} = {'par':>5} {'grad':>5} {'opt':>5} {'act':>5} {'work':>5} {'buf':>5}"
    ]
    for number, row in enumerate(rows, 1):
        memory, name = row["memory_gib"], row["ds"].removeprefix("ds_configs/").removesuffix(".json")
        shares = " ".join(f"{row[share]:5.0%}" for share in ("mfu", "mfu_real", "mfu_executed"))
        parts = " ".join(f"{memory[part]:5.1f}" for part in PARTS)
        lines.append(
            f"{number:3} {name:18} {row['tensor']:2} {row['pipe']:2} {row['sequence']:2} {row['data']:4} "
            f"{row['accumulation']:4} {row['checkpointing']:4} {row['step_s']:7.3f} "
            f"{row['samples_per_s']:9.0f} {shares} {row['bubble']:6.1%} "
            f"{memory['total']:6.1f} = {parts}"
        )
    return [
        *lines,
        "T, P, S: tensor, pipe and sequence ranks; ckpt: blocks between saved inputs, 0 saves everything",
        "MFU counts all model FLOPs, real those of rows that are no padding, done those of them that are computed: not",
        "gradients of frozen weights, nor unread rows",
    ]


def _detail(row: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Lines about the fastest layout, with the command that trains with it."""
    sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in row["sent_bytes"].items()) or "nothing"
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["seconds"].items())
    settings = [f"--set {setting}" for setting in args.set]
    settings += [f"--set parallel.{n}={row[n]}" for n in ("tensor", "pipe", "sequence") if row[n] > 1]
    settings += [f"--set batch.accumulation={row['accumulation']}"]
    settings += [f"--set activation_checkpointing={row['checkpointing']}"]
    host = row["memory_gib"]["host"]
    lines = [f"first: seconds {parts}", f"       a GPU sends in a step: {sent}"]
    if host:
        lines.append(f"       each rank also holds {host:.1f} GiB of the host's memory")
    stage = row["stage"]
    lines += [
        f"       whole stage: {stage['hours'] / 24:,.1f} days, {stage['gpu_hours']:,.0f} GPU-hours, "
        f"{stage['saving']:.2%} of it to write checkpoints of {stage['checkpoint'] / 1e9:.1f} GB",
        f"       a node reads {stage['pictures']:,.0f} pictures/s, {stage['cores']:.1f} cores' work",
    ]
    command = (
        f"python -m pretrain.train --recipe {args.recipe} --stage {args.stage} --ds {row['ds']} {' '.join(settings)}"
    )
    return [
        *lines,
        *textwrap.wrap(f"{command} --run-dir ...", WIDTH, initial_indent="       ", subsequent_indent=" " * 11),
    ]


def _name(row: dict[str, Any]) -> str:
    """A layout in one line: its DeepSpeed JSON and its sizes."""
    sizes = " ".join(f"{name}={row[name]}" for name in ("tensor", "pipe", "sequence", "accumulation", "checkpointing"))
    return f"{row['ds']} {sizes}"
