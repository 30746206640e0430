"""Pictures, and captions where there are some -> vectors in parquet files, which pretrain.search and others read.

    python -m pretrain.embed runs/base/retrieval data/cc12m --out vectors/cc12m
    python -m pretrain.embed runs/base/retrieval ~/Pictures --out vectors/mine

The input is a directory of indexed shards, or a folder of pictures (subfolders included). A file of --out has the
columns `key`, `caption` (null where there is none), `file` and `sample` (the portion's name, and the picture's number
in it), `image` and `text`: float32 lists, unit vectors of the dual encoder, so that a product of two is their cosine.
Finished files stay: after a kill, run the same command to continue. Several processes share the work with --part 0/8,
1/8, ... Pictures that cannot be decoded are left out, counted and named.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pretrain.command import make_parser, run
from pretrain.files import write_file
from pretrain.portions import Folder, Good, Portion, Shards, add_arguments, finish, looks, start
from pretrain.pretrained import Pretrained

ABOUT = "embed.json"


def embed(
    model: Pretrained, source: Shards | Folder, out: Path, portions: Iterable[Portion], batch: int, workers: int
) -> tuple[int, list[str]]:
    """Writes OUT/NAME.parquet for each portion -> (pictures embedded, [what was left out and why])."""
    done, left_out = 0, list[str]()
    with ThreadPoolExecutor(workers) as threads:
        for portion in portions:
            schema = _schema(model.head.width)
            rows: dict[str, list] = {name: [] for name in schema.names}
            for good in looks(model, source, portion, batch, threads, left_out):
                _add(model, good, rows)
            data = io.BytesIO()
            rows["file"] = [portion.name] * len(rows["key"])
            pq.write_table(pa.table(rows, schema=schema), data)
            write_file(out / f"{portion.name}.parquet", data.getvalue())
            done += len(rows["key"])
    return done, left_out


def _add(model: Pretrained, good: Good, rows: dict[str, list]) -> None:
    """Appends the pictures' values to each column of `rows`, except `file`."""
    captions = [item.caption for item, _ in good]
    texts = iter(model.embed_texts([c for c in captions if c is not None], len(good)).numpy()) if model.text else None
    rows["key"] += [item.key for item, _ in good]
    rows["caption"] += captions
    rows["sample"] += [item.sample for item, _ in good]
    rows["image"] += list(model.embed_looks(torch.stack([look for _, look in good])).numpy())
    rows["text"] += [None if c is None or texts is None else next(texts) for c in captions]


def _schema(width: int) -> pa.Schema:
    """The columns of a file, with vectors of `width` numbers."""
    vector = pa.list_(pa.float32(), width)
    place = [("key", pa.string()), ("caption", pa.string()), ("file", pa.string()), ("sample", pa.int64())]
    return pa.schema([*place, ("image", vector), ("text", vector)])


def read_vectors(out: Path) -> tuple[pa.Table, np.ndarray]:
    """What `embed` has written so far: (the table of N rows, its pictures' vectors as float32 [N, E]). ValueError where
    there is no file, or one that `embed` did not write."""
    paths = sorted(out.glob("*.parquet"))
    if not paths:
        raise ValueError(f"{out} has no .parquet of pretrain.embed; write it with python -m pretrain.embed")
    try:
        table = pa.concat_tables(pq.read_table(path) for path in paths)
        flat = table.column("image").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table, flat.reshape(table.num_rows, -1).astype(np.float32, copy=False)
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{out} has a .parquet that is not pretrain.embed's ({error}); write it again") from None


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.embed", __doc__, "runs/quickstart/retrieval ~/Pictures --out vectors/mine")
    add_arguments(parser, 64, "directory of the parquet files")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished files stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    job = start(args, ABOUT, ".parquet", {}, lambda model: model.head)
    done, left_out = embed(job.model, job.source, args.out, job.todo, args.batch, args.workers)
    finish(args, job, done, left_out)


if __name__ == "__main__":
    sys.exit(main())
