"""What strangers bring, by the documented way from a list to trained weights: a table with quotes, a byte order mark,
several captions and a quote that never closes; pictures of every kind that once went wrong; a tar of one's own."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.fetch.reasons import reason_of
from data_tools.shards.steps import read_steps
from pretrain.data.decoding import decode_image
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.data.sources import captions_of
from tests.data.test_missing_pixels import DAMAGED
from tests.data_tools.hostile_server import HostileServer, picture
from tests.data_tools.test_chain import run
from tests.small_run import RECIPE, train_stage
from tests.toys import black_png, encoded, needs, pair_sample, read_all, write_tar

needs("img2dataset")

KEPT = "kept"


def turned(size: tuple[int, int]) -> bytes:
    """A picture that is stored lying: its EXIF says to turn it by 90 degrees."""
    image, data, exif = Image.open(io.BytesIO(picture(901, size=size))), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(data, "JPEG", quality=95, exif=exif)
    return data.getvalue()


def deep(mode: str) -> bytes:
    """16 bits for each grey, from dark to light; in the mode "transparent" the left half is invisible."""
    grey = np.linspace(0, 65535, 80 * 90).astype(np.uint16).reshape(80, 90)
    image, data = Image.fromarray(grey), io.BytesIO()
    image.save(data, "PNG", **({"transparency": 0} if mode == "transparent" else {}))
    return data.getvalue()


def table(server: HostileServer) -> tuple[bytes, list[tuple[str, str, str]]]:
    """The CSV, in UTF-16, and what is expected of each row: (caption as it stands in the shard, fate, kind)."""
    pictures = {
        "turned, small": (turned((120, 90)), KEPT),
        "turned, large": (turned((640, 480)), KEPT),
        "16 bits": (deep("grey"), KEPT),
        "16 bits and transparent": (deep("transparent"), KEPT),
        "gif": (encoded(Image.open(io.BytesIO(picture(902))), "GIF"), KEPT),
        "bmp": (encoded(Image.open(io.BytesIO(picture(903))), "BMP"), KEPT),
        "a column of 60M pixels": (black_png(1, 60_000_000, rows=1), "download"),
        **{name: (data, "download") for name, data in DAMAGED.items()},
    }
    rows, expected = [], []
    for number, (name, (data, fate)) in enumerate(pictures.items()):
        url = server.serve(f"strange%20{number}", data).replace("%20", " ")  # as it stands in many a list
        text = f'a "{name}" picture, number {number}'
        cell = json.dumps([text, f"the same once more, {number}"]) if number % 2 else text
        rows.append(f'{url},"{cell.replace(chr(34), chr(34) * 2)}"')
        expected.append((text, fate, name))
    for number in range(40):
        text = f"picture {number},\nin two lines, drawn by hand"
        rows.append(f'{server.url("jpg", 910 + number)},"{text}"')
        expected.append((text, KEPT, "plain"))
    rows.insert(30, f'{server.url("jpg", 990)},"a quote that nobody closes')
    expected.insert(30, ("", "filter_list", "open quote"))
    return ("\ufeffurl,caption\n" + "\n".join(rows) + "\n").encode("utf-16-le"), expected


@pytest.fixture(scope="module")
def chain(server, tmp_path_factory) -> tuple[Path, list[tuple[str, str, str]]]:
    """The commands of README over the table and over a tar of one's own -> the shards, and what was expected."""
    place = tmp_path_factory.mktemp("strangers")
    data, expected = table(server)
    (place / "list.csv").write_bytes(data)
    own = {f"folder/{n:03d}.jpg": pair_sample("", 500 + n, width=80, height=80)["jpg"] for n in range(12)}
    own |= {f"folder/{n:03d}.txt": b"one of my own pictures, %d" % n for n in range(12)}
    own |= {"folder/photo.2021.05.jpg": own["folder/000.jpg"], "folder/notes.gif": b"GIF89a"}
    (place / "own").mkdir()
    write_tar(place / "own" / "set.tar", own)
    kept, columns = place / "kept.parquet", "--preset generic --url-col url --caption-col caption"
    guard = "--allow-address 127.0.0.1/32 --deadline 8 --timeout 8 --workers 1 --threads 16 --samples-per-shard 100"
    for line in (
        f"filter_list --list {place}/list.csv {columns} --captions all --out {kept}",
        f"download --list {kept} --preset canonical --out {place}/web {guard}",
        f"index {place}/own",
        f"rewrite {place}/web {place}/own --out {place}/clean --samples-per-shard 30",
    ):
        name, *rest = line.split()
        run([sys.executable, "-m", f"data_tools.{name}", *rest])
    assert "clean" in run([sys.executable, "-m", "data_tools.verify", str(place / "clean"), "--decode"])
    return place, expected


@pytest.mark.slow
def test_every_row_of_the_table_is_accounted_for(chain):
    place, expected = chain
    assert read_steps(place / "clean")["filter_list"].dropped == {"bad_row": 1}
    (dropped,) = pq.read_table(place / "dropped" / "kept.parquet").to_pylist()
    assert expected[dropped["row"]][2] == "open quote" and "list.csv" in dropped["detail"]
    fates = {dropped["row"]: "filter_list"}
    reasons: Counter[str] = Counter()
    for path in sorted((place / "web").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            reason = reason_of(row["error_message"])
            fates[row["row"]] = KEPT if reason == "success" else "download"
            reasons[reason] += reason != "success"
    assert {number: fate for number, (_, fate, _) in enumerate(expected)} == fates
    assert +reasons == {"not_an_image": len(DAMAGED), "too_many_pixels": 1}


@pytest.mark.slow
def test_captions_and_pictures_are_what_they_were(chain):
    place, expected = chain
    wanted = {text: name for text, fate, name in expected if fate == KEPT}
    samples = {sample["txt"].decode(): sample for sample in read_all(place / "clean")}
    own = {f"one of my own pictures, {n}" for n in range(12)}
    assert samples.keys() == wanted.keys() | own
    for text, sample in samples.items():
        number = text.rpartition("number ")[2]
        if text in wanted and wanted[text] != "plain" and int(number) % 2:
            assert captions_of(sample) == [text, f"the same once more, {number}"]
    by_name = {wanted[text]: decode_image(sample["jpg"]) for text, sample in samples.items() if text in wanted}
    for name in ("turned, small", "turned, large"):
        height, width, _ = by_name[name].shape
        assert height > width, f"{name}: it lies"
    grey = by_name["16 bits"].astype(int)
    assert grey[:8].mean() < 20 and grey[-8:].mean() > 235, "16 bits are stored white"
    assert by_name["16 bits and transparent"][-8:].mean() > 235 and by_name["16 bits and transparent"].mean() > 100


@pytest.mark.slow
def test_they_are_trained_on_to_the_end(chain, tmp_path):
    place, _ = chain
    (tmp_path / "data").mkdir()
    for name in ("images", "pairs", "texts"):
        (tmp_path / "data" / name).symlink_to(place / "clean")
    (tmp_path / "data" / "recipe.py").write_text(RECIPE)
    text = [sys.executable, "-m", "data_tools.train_text_tokenizer", str(place / "clean"), "--vocab-size", "48"]
    run([*text, "--out", str(tmp_path / "data" / "text.model")])
    for stage, settings in (("tokenizer", ()), ("fusion", ("steps=15",))):
        done = train_stage(tmp_path / "data", tmp_path / "runs", stage, *settings)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "fusion" / "weights.safetensors").is_file()
    lines = (tmp_path / "runs" / "fusion" / "samples.rank00000.jsonl").read_text().splitlines()
    taken = Counter(key for line in lines for key in json.loads(line)["keys"] if key.startswith("pairs/"))
    reader = ShardReader(load_manifest(str(place / "clean")))
    assert len(taken) == reader.manifest.samples and set(taken.values()) <= {1, 2}
    assert not (tmp_path / "runs" / "fusion" / "quarantine.jsonl").exists()
