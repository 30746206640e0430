"""Your pictures -> shards that training reads: a folder, a table, or a public set's annotations, by one command.

    python -m data_tools.from_table ~/Pictures --out data/mine              # captions in NAME.txt beside NAME.jpg
    python -m data_tools.from_table imagenet/ --label-folders --out data/imagenet      # train/CLASS/NAME.jpg, val/...
    python -m data_tools.from_table pairs.csv --pictures img/ --held-out 0.05 --out data/pairs
    python -m data_tools.from_table dataset_coco.json --pictures coco/ --max-side 480 --out data/coco
    python -m data_tools.from_table v2_OpenEnded_mscoco_val2014_questions.json --pictures val2014/ \\
        --answers v2_mscoco_val2014_annotations.json --out data/vqa
    python -m data_tools.from_table cifar10/ --out data/cifar10             # a directory of Hugging Face `datasets`

Reads CSV, TSV, JSON lines, JSON arrays and parquet (columns such as image, caption or captions, label, split; others
by --picture-col and the like), COCO's and Karpathy's captions, VQAv2's questions, NLVR2's sentences about two pictures,
SNLI-VE's about one (.jsonl), and arrow or parquet files of `datasets`, which may hold the pictures themselves. Rows of
one picture become one sample with all its captions; its JSON has them and the label, and OUT/labels.json has the
labels' names.

    OUT/train/00000.tar ...   KEY.jpg, KEY.txt (the first caption), KEY.json; indexed. Without splits OUT/00000.tar ...
    OUT/steps/                from_table.json: kept + dropped by reason = records; from_table.parquet: what was dropped

Every picture is decoded once; what is broken or missing, or is not text, is left out, counted and named. Finished
shards stay: after a kill, run the same command to continue. The shards are the same for any number of --workers. All
records but their pictures are in memory, about 1 GB a million.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.ownership import DONE, owned
from data_tools.pictures.recode import Recode
from data_tools.records.plan import Plan, Settings, make_plan
from data_tools.records.write_records import NewShard, write_shard
from data_tools.shards.steps import STEPS, Drop, Step, read_drops, write_drops, write_step
from pretrain.command import add_workers, make_parser, run
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.manifest import MANIFEST
from pretrain.files import WRITING, sweep, write_json
from pretrain.visible import say, visible
from pretrain.workers import worker_pool

VERSION = 1
STAMP, WORK = "from_table.json", ".from_table"  # in OUT: the settings, and the directory for unfinished files
LABELS = "labels.json"
LOCK_SECONDS = 10.0
SHOWN = 5  # of what is left out, with the reason


def write(settings: Settings, out: Path, workers: int) -> dict[str, Any]:
    """Writes OUT -> {"records", "kept", "dropped": {reason: count}, "splits": {name: samples}, "labels"}. ValueError
    for input that cannot be read, and where nothing remains."""
    if workers < 1:
        raise ValueError(f"--workers {workers} is below 1; use 1 or more")
    plan = make_plan(settings)
    stamp = {"version": VERSION, **settings.as_json(), "records": plan.digest}
    with owned(
        out,
        stamp,
        stamp=out / STAMP,
        work=out / WORK,
        has_other_files=lambda: (
            out.exists() and any(not path.name.endswith(WRITING) and path.name != WORK for path in out.iterdir())
        ),
        patience=LOCK_SECONDS,
    ) as done:
        if done is None:
            sweep(out)
            _write_shards(plan, settings, out, workers)
            done = _finish(plan, settings, out)
            write_json(out / STAMP, stamp | {DONE: done})
    return done


def _write_shards(plan: Plan, settings: Settings, out: Path, workers: int) -> None:
    size, jobs = settings.samples_per_shard, list[NewShard]()
    recode = Recode(settings.max_side, quality=settings.quality)
    for split, records in plan.splits.items():
        for number, first in enumerate(range(0, len(records), size)):
            drops = out / WORK / f"{split or 'all'}-{number:05d}.parquet"
            some = tuple(records[first : first + size])
            jobs.append(NewShard(out / split, number, first, some, plan.names, recode, drops))
    todo = [job for job in jobs if not job.is_done]
    whole = sum(len(job.records) for job in jobs)
    with tqdm(total=whole, desc=visible(f"writing {out}"), unit=" pictures", disable=None) as bar:
        bar.update(whole - sum(len(job.records) for job in todo))
        if min(workers, len(todo)) <= 1:
            for job in todo:
                write_shard(job)
                bar.update(len(job.records))
            return
        with worker_pool(min(workers, len(todo))) as pool:
            futures = {pool.submit(write_shard, job): job for job in todo}
            for future in as_completed(futures):
                future.result()
                bar.update(len(futures[future].records))


def _finish(plan: Plan, settings: Settings, out: Path) -> dict[str, Any]:
    pieces = sorted((out / WORK).glob("*.parquet"))
    drops = [Drop("", one.name, one.reason, one.detail) for one in plan.unusable] + list(read_drops(pieces))
    dropped = write_drops(out / STEPS / "from_table.parquet", drops)
    records = sum(map(len, plan.splits.values())) + len(plan.unusable)
    kept = records - dropped.total()
    if not kept:
        first = f"{drops[0].key}: {drops[0].detail}" if drops else "there is none"
        raise ValueError(
            f"none of the {records} records of {settings.input} can be used ({first}); mend them, or give others"
        )
    samples = {}
    for split in plan.splits:
        if any((out / split).glob("*.tar")):
            samples[split] = index_directory(out / split).manifest.samples
    if plan.names:
        write_json(out / LABELS, list(plan.names))
    step = Step("from_table", records, kept, dict(dropped), settings.as_json(), [str(settings.input)], "records")
    write_step(out, "from_table", step)
    shown = [f"{drop.key}: {drop.detail}" for drop in drops[:SHOWN]]
    labels, several = len(plan.names), sum(len(r.captions) > 1 for rs in plan.splits.values() for r in rs)
    return {
        "records": records, "kept": kept, "dropped": dict(Counter(dropped)), "splits": samples, "labels": labels,
        "several": several, "shown": shown,
    }  # fmt: skip


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("data_tools.from_table", __doc__, "~/Pictures --out data/mine")
    parser.add_argument("input", type=Path, help="a folder, a table, an annotation file, a directory of `datasets`")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new directory")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="where the pictures of a table are (beside it)")
    parser.add_argument("--picture-col", default="", metavar="NAME", help="of pictures (image, file_name ...)")
    parser.add_argument("--caption-col", action="append", default=[], metavar="NAME", help="of captions; repeatable")
    parser.add_argument("--label-col", default="", metavar="NAME", help="of labels (label, class, category ...)")
    parser.add_argument("--split-col", default="", metavar="NAME", help="of splits (split)")
    parser.add_argument("--label-folders", action="store_true", help="a picture's folder is its label")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels.json of another set: take its numbers")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="VQAv2's annotations, for its questions")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="make a split heldout (0)")
    parser.add_argument("--seed", type=int, default=0, help="of --held-out and of the order (%(default)s)")
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink larger pictures")
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of shrunk pictures (%(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="maximum (%(default)s)")
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), state="finished shards stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    values = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    done = write(Settings(**values | {"caption_col": tuple(args.caption_col)}), args.out, args.workers)
    for line in done["shown"]:
        say(f"left out: {line}", error=True)
    dropped = ", ".join(f"{name} {count:,}" for name, count in sorted(done["dropped"].items()))
    if dropped:
        say(f"left out: {dropped}; {args.out / STEPS / 'from_table.parquet'} names each", error=True)
    for split, samples in done["splits"].items():
        say(f"{args.out / split / MANIFEST}: {samples:,} samples")
    labels = f", {done['labels']} labels in {args.out / LABELS}" if done["labels"] else ""
    several = f", {done['several']:,} with several captions" if done["several"] else ""
    say(f"{args.out}: {done['kept']:,} of {done['records']:,} records{several}{labels}")


if __name__ == "__main__":
    sys.exit(main())
