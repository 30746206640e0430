"""Records -> shards: every picture is decoded once, so that none in them is broken; what cannot be used is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.pictures.recode import ENDINGS, Recode, encode_picture
from data_tools.records.cells import cell_bytes
from data_tools.records.record import Cell, Record
from data_tools.shards.steps import Drop, write_drops
from data_tools.shards.writer import ShardWriter
from pretrain.data.decoding import decode, read_header
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.data.shards.tar_index import SECOND_PICTURE
from pretrain.files import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # what is read; the last three are written anew


@dataclass(frozen=True)
class NewShard:
    """`first`: the number of its first record in the split, which makes the keys."""

    out: Path
    number: int
    first: int
    records: tuple[Record, ...]
    names: tuple[str, ...]  # of the labels
    recode: Recode
    drops: Path  # written last: the shard is done

    @property
    def is_done(self) -> bool:
        return self.drops.is_file()


def write_shard(job: NewShard) -> int:
    """Writes the shard -> how many records it holds."""
    drops: list[Drop] = []
    with ShardWriter(job.out, samples_per_shard=len(job.records), first=job.number) as writer:
        for number, record in enumerate(job.records, job.first):
            try:
                members, row = _members(record, job)
            except (BadSample, OSError, ValueError) as error:
                drops.append(Drop("", record.name, "bad_picture", str(error)))
                continue
            writer.write(f"{number:09d}", members, row)
    write_drops(job.drops, drops)
    return len(job.records) - len(drops)


def _members(record: Record, job: NewShard) -> tuple[dict[str, bytes], dict[str, Any]]:
    pictures = [_picture(source, job.recode) for source in record.pictures]
    data, ending, width, height = pictures[0]
    members = {ending: data}
    if len(pictures) > 1:
        members[SECOND_PICTURE] = pictures[1][0]
    if record.captions:
        members["txt"] = record.captions[0].encode()
    facts: dict[str, Any] = {"name": record.name, "captions": list(record.captions)}
    if record.label is not None:
        facts |= _label(record.label, job.names)
    members["json"] = json.dumps(facts | record.facts, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    row = {"url": record.name, "caption": record.captions[0] if record.captions else None, "status": "success"}
    sha256 = hashlib.sha256(data).hexdigest()
    return members, row | {"error_message": None, "width": width, "height": height, "sha256": sha256}


def _label(label: str | int, names: Sequence[str]) -> dict[str, Any]:
    number = names.index(label) if isinstance(label, str) else label
    return {"label": number, "label_name": names[number]}


def _picture(source: Path | Cell, recode: Recode) -> tuple[bytes, str, int, int]:
    """(bytes, ending, width, height), decoded once. BadSample, OSError."""
    if isinstance(source, Path):
        with open_regular(source) as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    else:
        data = cell_bytes(source)
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample(f"it has more than {MAX_IMAGE_BYTES} bytes")
    header = read_header(data, FORMATS)
    if str(header.image.format) not in ENDINGS:
        data = encode_picture(decode(data, header, min_side=None), "png", 100)
    if (changed := recode.picture(data)) is not None:
        return changed
    header = read_header(data)
    decode(data, header, min_side=None)
    return data, ENDINGS[str(header.image.format)], header.width, header.height
