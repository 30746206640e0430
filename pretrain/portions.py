"""Pictures from indexed shards or from a folder, portion by portion, as pretrain.embed and pretrain.caption go through
them: a portion becomes one file, finished files stay, and several processes share the portions."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from pretrain.checkpoint.weights import WEIGHTS, weights_digest
from pretrain.command import add_workers, part_of
from pretrain.data.shards.manifest import MANIFEST, load_manifest
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader
from pretrain.data.sources import picture
from pretrain.files import sha256_of, write_json
from pretrain.hub.read import is_directory
from pretrain.hub.write import WEIGHTS as HUGGING_FACE
from pretrain.json_files import read_object
from pretrain.pretrained import Pretrained, load
from pretrain.visible import say

PER_FILE = 2048  # pictures of a folder in one file
ENDINGS = tuple(f".{ending}" for ending in IMAGE_EXTENSIONS)


class Item(NamedTuple):
    """A picture that could be read, though perhaps not decoded."""

    sample: int  # its number in the portion
    key: str
    picture: bytes | Path
    caption: str | None


class Portion(NamedTuple):
    """The pictures whose results become one file."""

    name: str  # the file's, without its ending
    samples: int
    place: Any  # the number of the shard, or the paths of the pictures


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
        paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        if not paths:
            raise ValueError(
                f"{directory} has neither a {MANIFEST} nor a picture ({', '.join(ENDINGS)}); give a folder with some, "
                f"or shards, after: python -m data_tools.index {directory}"
            )
        self.digest = hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
        starts = range(0, len(paths), PER_FILE)
        self.portions = [
            Portion(f"{n:05d}", len(some), some) for n, s in enumerate(starts) for some in (paths[s : s + PER_FILE],)
        ]

    def items(self, portion: Portion) -> Iterator[Item | BadSample]:
        for sample, path in enumerate(portion.place):
            yield Item(sample, str(path.relative_to(self.directory)), path, None)


# Pictures that could be decoded, each with what `Pretrained.look` made of it: uint8 [3, S, S].
Good = list[tuple[Item, torch.Tensor]]


def looks(
    model: Pretrained,
    source: Shards | Folder,
    portion: Portion,
    batch: int,
    threads: ThreadPoolExecutor,
    left_out: list[str],
) -> Iterator[Good]:
    """Up to `batch` pictures of the portion at a time, decoded by `threads`. The keys of the others are added to
    `left_out`, with the reason."""
    items = source.items(portion)
    with tqdm(total=portion.samples, desc=portion.name, unit=" pictures", disable=None) as bar:
        while some := list(islice(items, batch)):
            good: Good = []
            for item, look in zip(some, threads.map(lambda item: _look(model, item), some), strict=True):
                if isinstance(item, Item) and isinstance(look, torch.Tensor):
                    good.append((item, look))
                else:
                    left_out.append(f"{item.key if isinstance(item, Item) else portion.name}: {look}")
            if good:
                yield good
            bar.update(len(some))


def _look(model: Pretrained, item: Item | BadSample) -> torch.Tensor | Exception:
    if not isinstance(item, Item):
        return item
    try:
        return model.look(item.picture)
    except (BadSample, OSError) as error:
        return error


class Job(NamedTuple):
    """What a command was asked to do, and how much of it is left."""

    model: Pretrained
    source: Shards | Folder
    mine: list[Portion]  # those that --part leaves to this process
    todo: list[Portion]  # those of them whose files are not there yet


def add_arguments(parser: argparse.ArgumentParser, batch: int, out: str) -> None:
    """Adds the arguments that both commands take; `batch` is the default of --batch, `out` the help of --out."""
    parser.add_argument("weights", type=Path, help="whatever pretrain.load reads, such as a stage's directory")
    parser.add_argument("input", type=Path, help="a directory of indexed shards, or a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    parser.add_argument("--batch", type=int, default=batch, help="pictures in one pass (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th file from the I-th on (%(default)s)")
    add_workers(parser)


def start(
    args: argparse.Namespace,
    about: str,
    ending: str,
    settings: dict[str, Any],
    check: Callable[[Pretrained], Any],
) -> Job:
    """The model and what is left to do in --out. The file `about` there notes what the results come from: the weights,
    the input and `settings`; `ending` is that of a portion's file. ValueError for wrong arguments, for a model that
    `check` refuses, and where --out holds the results of other weights, input or settings."""
    if not args.input.is_dir():
        raise ValueError(f"{args.input} is not a directory; give shards, or a folder of pictures")
    if args.batch < 1 or args.workers < 1:
        raise ValueError(f"--batch {args.batch} and --workers {args.workers} must be 1 or more")
    part, parts = part_of(args.part)
    source = Shards(args.input) if (args.input / MANIFEST).is_file() else Folder(args.input)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = load(args.weights, text_tokenizer=args.text_tokenizer, dtype=dtype)
    check(model)
    origin = {"weights": weights_name(args.weights), "input": str(args.input.resolve()), "digest": source.digest}
    agree(args.out, about, origin | settings)
    mine = source.portions[part::parts]
    return Job(model, source, mine, [p for p in mine if not (args.out / f"{p.name}{ending}").is_file()])


def finish(args: argparse.Namespace, job: Job, done: int, left_out: list[str]) -> None:
    """Says what was done. ValueError where there were pictures and none could be used."""
    for line in left_out:
        say(f"left out: {line}", error=True)
    before = len(job.mine) - len(job.todo)
    print(
        f"{args.out}: {done:,} pictures in {len(job.todo)} files, {len(left_out)} left out; {before} files were there"
    )
    if job.todo and not done and left_out:
        raise ValueError(f"none of the {len(left_out)} pictures of {args.input} could be used; give others")


def agree(out: Path, name: str, about: dict[str, Any]) -> None:
    """Notes `about`, what the results come from, in OUT/NAME. ValueError where that file notes something else."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / name
    try:
        before = read_object(path)
    except FileNotFoundError:
        write_json(path, about)
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); take another --out") from None
    changed = [name for name, value in about.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"{out} has the results of other {' and '.join(changed)}; take another --out, or remove it")


def weights_name(weights: Path) -> str:
    """A hash that names the weights, as embed.json and caption.json note it."""
    if weights.is_dir() and is_directory(weights) and not (weights / WEIGHTS).is_file():
        weights = weights / HUGGING_FACE
    return weights_digest(weights) if weights.is_dir() or weights.suffix == ".safetensors" else sha256_of(weights)
