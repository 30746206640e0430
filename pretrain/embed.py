"""Pictures, and captions where there are some -> vectors in parquet files, which pretrain.search and others read.

    python -m pretrain.embed runs/base/retrieval data/cc12m --out vectors/cc12m
    python -m pretrain.embed runs/base/retrieval ~/Pictures --out vectors/mine

The input is a directory of indexed shards, or a folder of pictures (with what lies in its folders). A file of --out has
the columns `key`, `caption` (null where there is none), `file` and `sample` (its name, and the number there), `image`
and `text`: float32 lists, unit vectors of the dual encoder, so that a product of two is their cosine. Finished files
stay: after a kill, run the same command to continue. Several processes share the work with --part 0/8, 1/8, ... What
cannot be decoded is left out, counted and named.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from pretrain.checkpoint.weights import weights_digest
from pretrain.command import add_workers, make_parser, part_of, run
from pretrain.data.shards.manifest import MANIFEST, load_manifest
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader
from pretrain.data.sources import picture
from pretrain.files import sha256_of, write_file, write_json
from pretrain.json_files import read_object
from pretrain.pretrained import Pretrained, load
from pretrain.visible import say

ABOUT = "embed.json"
PER_FILE = 2048  # pictures of a folder in one file
ENDINGS = tuple(f".{ending}" for ending in IMAGE_EXTENSIONS)


class Item(NamedTuple):
    sample: int  # its number in the portion
    key: str
    picture: bytes | Path
    caption: str | None


class Portion(NamedTuple):
    """What becomes one file."""

    name: str
    samples: int
    place: Any  # number of the shard, or the paths


class Shards:
    """A directory of indexed shards: a portion is a shard."""

    def __init__(self, directory: Path):
        self.reader = ShardReader(load_manifest(str(directory)))
        self.digest = self.reader.manifest.digest
        shards = self.reader.manifest.shards
        self.portions = [Portion(s.name.removesuffix(".tar"), s.samples, n) for n, s in enumerate(shards)]

    def items(self, portion: Portion) -> Iterator[Item | BadSample]:
        for sample in range(portion.samples):
            try:
                members = self.reader.read(portion.place, sample, (*IMAGE_EXTENSIONS, "txt"))
                text = members.get("txt")
                caption = None if text is None else text.decode("utf-8", "replace").strip()
                yield Item(sample, members["__key__"].decode(), picture(members), caption)
            except BadSample as error:
                yield error


class Folder:
    """A folder of pictures: a portion is PER_FILE of them, in the order of their paths."""

    def __init__(self, directory: Path):
        self.directory = directory
        found = sorted(path for path in directory.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        if not found:
            raise ValueError(
                f"{directory} has neither a {MANIFEST} nor a picture ({', '.join(ENDINGS)}); give a folder with some, "
                f"or shards, after: python -m data_tools.index {directory}"
            )
        self.digest = hashlib.sha256("\n".join(map(str, found)).encode(errors="surrogateescape")).hexdigest()
        starts = range(0, len(found), PER_FILE)
        self.portions = [
            Portion(f"{n:05d}", len(some), some) for n, s in enumerate(starts) for some in (found[s : s + PER_FILE],)
        ]

    def items(self, portion: Portion) -> Iterator[Item | BadSample]:
        for sample, path in enumerate(portion.place):
            yield Item(sample, str(path.relative_to(self.directory)), path, None)


def embed(
    model: Pretrained, source: Shards | Folder, out: Path, portions: Iterable[Portion], batch: int, workers: int
) -> tuple[int, list[str]]:
    """Writes OUT/NAME.parquet for each portion -> (pictures embedded, [what was left out and why])."""
    done, left_out = 0, list[str]()
    with ThreadPoolExecutor(workers) as threads:
        for portion in portions:
            schema = _schema(model.head.width)
            rows: dict[str, list] = {name: [] for name in schema.names}
            items = source.items(portion)
            with tqdm(total=portion.samples, desc=portion.name, unit=" pictures", disable=None) as bar:
                while some := list(islice(items, batch)):
                    good = list[tuple[Item, torch.Tensor]]()
                    for item, look in zip(some, threads.map(lambda item: _look(model, item), some), strict=True):
                        if isinstance(item, Item) and isinstance(look, torch.Tensor):
                            good.append((item, look))
                        else:
                            left_out.append(f"{item.key if isinstance(item, Item) else portion.name}: {look}")
                    _add(model, good, rows)
                    bar.update(len(some))
            data = io.BytesIO()
            rows["file"] = [portion.name] * len(rows["key"])
            pq.write_table(pa.table(rows, schema=schema), data)
            write_file(out / f"{portion.name}.parquet", data.getvalue())
            done += len(rows["key"])
    return done, left_out


def _look(model: Pretrained, item: Item | BadSample) -> torch.Tensor | Exception:
    if not isinstance(item, Item):
        return item
    try:
        return model.look(item.picture)
    except (BadSample, OSError) as error:
        return error


def _add(model: Pretrained, good: list[tuple[Item, torch.Tensor]], rows: dict[str, list]) -> None:
    if not good:
        return
    captions = [item.caption for item, _ in good]
    texts = iter(model.embed_texts([c for c in captions if c is not None], len(good)).numpy()) if model.text else None
    rows["key"] += [item.key for item, _ in good]
    rows["caption"] += captions
    rows["sample"] += [item.sample for item, _ in good]
    rows["image"] += list(model.embed_looks(torch.stack([look for _, look in good])).numpy())
    rows["text"] += [None if c is None or texts is None else next(texts) for c in captions]


def _schema(width: int) -> pa.Schema:
    vector = pa.list_(pa.float32(), width)
    place = [("key", pa.string()), ("caption", pa.string()), ("file", pa.string()), ("sample", pa.int64())]
    return pa.schema([*place, ("image", vector), ("text", vector)])


def read_vectors(out: Path) -> tuple[pa.Table, np.ndarray]:
    """What `embed` wrote so far: (the table, its pictures' vectors as float32 [N, E]). ValueError if there is none."""
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
    parser.add_argument("weights", type=Path, help="a stage's directory, a weights.safetensors or a released .pth")
    parser.add_argument("input", type=Path, help="a directory of indexed shards, or a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="directory of the parquet files")
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    parser.add_argument("--batch", type=int, default=64, help="pictures in one pass (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th file from the I-th on (%(default)s)")
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished files stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    if not args.input.is_dir():
        raise ValueError(f"{args.input} is not a directory; give shards, or a folder of pictures")
    if args.batch < 1 or args.workers < 1:
        raise ValueError(f"--batch {args.batch} and --workers {args.workers} must be 1 or more")
    part, parts = part_of(args.part)
    source = Shards(args.input) if (args.input / MANIFEST).is_file() else Folder(args.input)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = load(args.weights, text_tokenizer=args.text_tokenizer, dtype=dtype)
    about = {"weights": weights_name(args.weights), "input": str(args.input.resolve()), "digest": source.digest}
    _agree(args.out, about)
    todo = [p for p in source.portions[part::parts] if not (args.out / f"{p.name}.parquet").is_file()]
    done, left_out = embed(model, source, args.out, todo, args.batch, args.workers)
    for line in left_out:
        say(f"left out: {line}", error=True)
    before = len(source.portions[part::parts]) - len(todo)
    print(f"{args.out}: {done:,} pictures in {len(todo)} files, {len(left_out)} left out; {before} files were there")
    if todo and not done and left_out:
        raise ValueError(f"none of the {len(left_out)} pictures of {args.input} could be used; give others")


def _agree(out: Path, about: dict[str, str]) -> None:
    """Notes what the vectors are of; ValueError where --out holds those of something else."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ABOUT
    try:
        before = read_object(path)
    except FileNotFoundError:
        write_json(path, about)
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); take another --out") from None
    changed = [name for name, value in about.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"{out} has the vectors of other {' and '.join(changed)}; take another --out, or remove it")


def weights_name(weights: Path) -> str:
    """A hash that names weights: what embed.json says."""
    return weights_digest(weights) if weights.is_dir() or weights.suffix == ".safetensors" else sha256_of(weights)


if __name__ == "__main__":
    sys.exit(main())
