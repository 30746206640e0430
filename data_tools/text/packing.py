"""The work of `data_tools.pack_text`: documents -> blocks of cut documents (by workers) -> shards (in order).

A block's result is a parquet file in the work directory, so a killed run continues after the last one. What depends on
earlier documents (duplicates and the budget) is decided afterwards, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_tools.lists.languages import language_code
from data_tools.ownership import differences, owned
from data_tools.shards.steps import Drop, Step, read_steps, write_drops, write_step
from data_tools.shards.writer import ShardWriter
from data_tools.text.blocks import BlockWork, cut_block, start_worker
from data_tools.text.chunks import limits_of
from data_tools.text.clean import TextRules
from data_tools.text.documents import MAX_BYTES, TEXT, Block, Input, find_inputs, read_blocks, total_bytes
from data_tools.text.duplicates import KeptTexts
from pretrain.data.shards.indexing import index_directory
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.files import move
from pretrain.workers import worker_pool

VERSION = 1  # increase it when a change of the code changes the shards
NAME, CHUNKS = "pack_text", "pack_text_chunks"
_DOCUMENT_BITS = 40  # of a number that combines input and document


@dataclass(frozen=True)
class Packing:
    """The settings that determine the shards."""

    paths: tuple[Path, ...]
    tokenizer: Path
    out: Path
    column: str = "text"
    split: str = "file"
    chunk_tokens: int = 196
    budget: int | None = None
    language: str | None = None
    near: float = 0.8
    rules: TextRules = field(default_factory=TextRules)
    samples_per_shard: int = 10_000
    seed: int | None = None


@dataclass(frozen=True)
class Result:
    documents: Step
    chunks: Step
    shards: int
    tokens: int  # of the kept chunks, without BOS and EOS
    fill: float  # tokens / what the chunks could hold
    at_budget: bool
    kinds: frozenset[str]  # of the inputs


@dataclass
class _Tally:
    documents: int = 0
    kept: int = 0
    chunks: int = 0
    tokens: int = 0
    over_budget: int = 0  # chunks


def pack(packing: Packing, workers: int = 1) -> Result:
    """Writes `packing.out`, unless it is complete. Raises ValueError for invalid settings, unreadable inputs, an `out`
    that contains something else, and if no document remains; OSError."""
    if workers < 1:
        raise ValueError(f"--workers={workers} is below 1; use 1 or more")
    if packing.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard={packing.samples_per_shard} is below 1; use 10000")
    limits_of(packing.chunk_tokens)
    TextTokenizer(packing.tokenizer)
    KeptTexts(packing.near)
    out = packing.out.resolve()
    for path in packing.paths:
        if path.is_dir() and out.is_relative_to(path.resolve()):
            raise ValueError(
                f"--out={out} lies in the input {path} and would be read as documents; choose another place"
            )
    inputs = find_inputs(list(packing.paths), packing.column, packing.split)
    if packing.seed is not None:
        random.Random(packing.seed).shuffle(inputs)
    work = BlockWork(
        tuple(inputs), packing.tokenizer, packing.chunk_tokens, packing.language, packing.near < 1, packing.rules
    )
    work.check()
    settings = _settings(packing, inputs)
    if (result := _finished(out, settings, inputs)) is not None:
        shutil.rmtree(_beside(out), ignore_errors=True)  # of a run that was killed at the very end
        return result
    with _work_directory(out, settings) as directory:
        result = _pack(packing, settings, work, directory, workers)
        move(directory / "shards", out)  # synced before the blocks are removed
        shutil.rmtree(directory)
    return result


def _pack(packing: Packing, settings: dict[str, Any], work: BlockWork, directory: Path, workers: int) -> Result:
    shards = directory / "shards"
    shutil.rmtree(shards, ignore_errors=True)  # of a killed run; they are written again from the blocks
    room, tally = limits_of(packing.chunk_tokens).tokens, _Tally()
    with ShardWriter(shards, samples_per_shard=packing.samples_per_shard) as writer:
        drops = _write_chunks(packing, work, directory, workers, writer, tally)
        dropped = dict(sorted(write_drops(shards / "steps" / f"{NAME}_dropped.parquet", drops).items()))
    if not tally.chunks:
        why = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "the inputs are empty"
        kinds = frozenset(source.kind for source in work.inputs)
        hint = too_long_hint(dropped, packing, kinds) or "loosen the rules by --rule, or give other documents"
        raise ValueError(f"all {tally.documents:,} documents are dropped ({why}); {hint}")
    index_directory(shards, workers)
    names = [source.name for source in work.inputs]
    documents = Step(NAME, tally.documents, tally.kept, dropped, settings, names, "documents")
    fill = tally.tokens / (tally.chunks * room)
    over = {"over_budget": tally.over_budget} if tally.over_budget else {}
    results = {"tokens": tally.tokens, "fill": round(fill, 4), "shards": len(writer.paths)}
    chunks = Step(NAME, tally.chunks + tally.over_budget, tally.chunks, over, results, names, "chunks")
    write_step(shards, CHUNKS, chunks)
    write_step(shards, NAME, documents)
    return _result(documents, chunks, work.inputs)


def too_long_hint(dropped: dict[str, int], packing: Packing, kinds: frozenset[str]) -> str:
    """A hint for the user if whole .txt files are too long for one document; "" otherwise."""
    if not dropped.get("too_long") or packing.split != "file" or TEXT not in kinds:
        return ""
    return (
        f"documents over {MAX_BYTES >> 20} MiB are dropped; if a .txt file has many, separate them by blank lines and "
        "use --txt blank"
    )


def _write_chunks(
    packing: Packing, work: BlockWork, directory: Path, workers: int, writer: ShardWriter, tally: _Tally
) -> Iterator[Drop]:
    """Writes the chunks of the kept documents, and yields the drops."""
    kept_texts = KeptTexts(packing.near)
    bar = tqdm(total=total_bytes(list(work.inputs)), unit="B", unit_scale=True, desc="packing", disable=None)
    with bar, _cut_blocks(work, directory, workers) as blocks:
        for block, rows in blocks:
            for row in rows:
                tally.documents += 1
                name = work.inputs[row["source"]].name
                drop = partial(Drop, name, str(row["number"]))
                if row["reason"]:
                    yield drop(row["reason"], row["detail"])
                    continue
                number = row["source"] << _DOCUMENT_BITS | row["number"]
                if earlier := kept_texts.add(number, row["digest"], row["signature"]):
                    first = work.inputs[earlier[1] >> _DOCUMENT_BITS].name
                    yield drop(earlier[0], f"{first} {earlier[1] & (1 << _DOCUMENT_BITS) - 1}")
                    continue
                fits = _count_fitting(row["tokens"], packing.budget, tally.tokens)
                _write_document(writer, name, row, fits, tally)
                if fits < len(row["tokens"]):
                    tally.over_budget += len(row["tokens"]) - fits
                    if fits == 0:
                        yield drop("over_budget", f"{sum(row['tokens'])} tokens")
                    return
            bar.update(block.position - bar.n)
            bar.set_postfix(kept=tally.kept, tokens=f"{tally.tokens:.3g}", refresh=False)


def _count_fitting(tokens: list[int], budget: int | None, before: int) -> int:
    """How many of a document's chunks are within the budget."""
    for number, count in enumerate(tokens):
        before += count
        if budget is not None and before > budget:
            return number
    return len(tokens)


def _write_document(writer: ShardWriter, name: str, row: dict[str, Any], chunks: int, tally: _Tally) -> None:
    tally.kept += chunks > 0
    for number in range(chunks):
        tokens = row["tokens"][number]
        facts = {"source": name, "document": row["number"], "chunk": number, "tokens": tokens}
        members = {"txt": row["chunks"][number].encode(), "json": json.dumps(facts).encode()}
        writer.write(f"{tally.chunks:09d}", members, {"status": "success", "error_message": None, **facts})
        tally.chunks += 1
        tally.tokens += tokens


@contextmanager
def _cut_blocks(work: BlockWork, directory: Path, workers: int) -> Iterator[Iterator[tuple[Block, list[dict]]]]:
    """(block, its rows) in order; the workers are at most a few blocks ahead."""
    if workers == 1:
        start_worker(work, directory)
        yield ((block, _rows(cut_block(block))) for block in read_blocks(list(work.inputs)))
        return
    # Not forked, because pyarrow has started threads.
    with worker_pool(workers, get_context("spawn"), start_worker, (work, directory)) as pool:
        yield _ahead(pool, work, 2 * workers)


def _ahead(pool: ProcessPoolExecutor, work: BlockWork, most: int) -> Iterator[tuple[Block, list[dict]]]:
    pending: deque = deque()
    for block in read_blocks(list(work.inputs)):
        future = pool.submit(cut_block, block)
        pending.append((Block(block.number, [], block.position), future))
        if len(pending) > most:
            block, future = pending.popleft()
            yield block, _rows(future.result())
    for block, future in pending:
        yield block, _rows(future.result())


def _rows(path: Path) -> list[dict]:
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0]}); remove {path.parent.parent} and start again"
        ) from None


def _settings(packing: Packing, inputs: list[Input]) -> dict[str, Any]:
    """The settings that determine the shards, as in the step record."""
    files = hashlib.sha256()
    for source in inputs:
        stat = source.path.stat()
        files.update(f"{source.name}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return {
        "version": VERSION,
        "files": files.hexdigest(),  # names, sizes and times of the inputs
        "tokenizer": hashlib.sha256(packing.tokenizer.read_bytes()).hexdigest(),
        "text_col": packing.column,
        "txt": packing.split,
        "chunk_tokens": packing.chunk_tokens,
        "language": None if packing.language is None else language_code(packing.language),
        "rules": asdict(packing.rules),
        "near": packing.near,
        "budget": packing.budget,
        "samples_per_shard": packing.samples_per_shard,
        "seed": packing.seed,
    }


def _finished(out: Path, settings: dict[str, Any], inputs: list[Input]) -> Result | None:
    """The result of an earlier run with the same settings. Raises ValueError if `out` contains anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"--out={out} is a file; give a directory that does not exist yet")
    if os.path.ismount(out):
        raise ValueError(f"--out={out} is a mount point, which cannot be replaced; give a directory in it")
    if not any(out.iterdir()):
        return None
    steps = read_steps(out)
    if NAME not in steps or CHUNKS not in steps:
        raise ValueError(f"--out={out} contains other files; give a directory that does not exist yet")
    if changed := differences(steps[NAME].settings, settings):
        raise ValueError(f"--out={out} contains shards that were packed with {changed}; remove it, or choose another")
    return _result(steps[NAME], steps[CHUNKS], tuple(inputs))


def _result(documents: Step, chunks: Step, inputs: tuple[Input, ...]) -> Result:
    results = chunks.settings
    kinds = frozenset(source.kind for source in inputs)
    return Result(
        documents, chunks, results["shards"], results["tokens"], results["fill"], "over_budget" in chunks.dropped, kinds
    )


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.packing")


@contextmanager
def _work_directory(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """.OUT.packing, reserved for this process, with the blocks of a killed run if they have the same settings."""
    directory = _beside(out)
    # Settings that do not affect the blocks may change without making the blocks again.
    block_settings = {name: value for name, value in settings.items() if name not in ("budget", "samples_per_shard")}
    block_settings["near"] = settings["near"] < 1
    with owned(out, block_settings, stamp=directory / "settings.json", work=directory, restart=lambda: True):
        (directory / "blocks").mkdir(exist_ok=True)
        yield directory
