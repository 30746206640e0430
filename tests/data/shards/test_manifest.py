"""Patterns of shards and their manifests, local and remote, good and damaged."""

from __future__ import annotations

import json

import pytest

from pretrain.data.shards.manifest import Manifest, Shard, load_manifest
from pretrain.data.shards.reader import ShardReader
from tests.toys import index_source, write_tar


def test_patterns_name_shards(source, monkeypatch):
    monkeypatch.setenv("SOURCES", str(source.parent))
    names = ["00000.tar", "00001.tar", "00002.tar"]
    for pattern in (
        str(source),
        f"{source}/",
        f"{source}/*.tar",
        f"{source}/{{00000..00002}}.tar",
        f"{source.parent}/sour*/",
        "$SOURCES/source",
        "${SOURCES}/source/0000[0-2].tar",
        f"file://{source}/0000?.tar",
    ):
        assert [shard.name for shard in load_manifest(pattern).shards] == names, pattern
    picked = load_manifest((f"{source}/00002.tar", f"{source}/0000{{1,0}}.tar"))
    assert [shard.name for shard in picked.shards] == ["00002.tar", "00001.tar", "00000.tar"]
    assert (picked.samples, picked.counts) == (6, [3, 2, 1])


def test_several_directories_are_joined_in_their_order(source, tmp_path):
    second = tmp_path / "another"
    second.mkdir()
    write_tar(second / "00000.tar", {"z.txt": b"z"})
    both = load_manifest((str(source), str(index_source(second))))
    assert both.counts == [1, 2, 3, 1]
    assert ShardReader(both).read(3, 0) == {"__key__": b"z", "txt": b"z"}
    assert both.digest != load_manifest((str(second), str(source))).digest


def test_the_digest_moves_with_content_and_not_with_the_place(source, tmp_path):
    before = load_manifest(str(source)).digest
    moved = source.rename(tmp_path / "moved")
    assert load_manifest(str(moved)).digest == before
    write_tar(moved / "00002.tar", {"z.txt": b"z"})
    assert load_manifest(str(index_source(moved))).digest != before


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("$NOT_SET_ANYWHERE/x", r"uses \$NOT_SET_ANYWHERE, which is not set"),
        ("{source}/nothing_here", "nothing matches"),
        ("{source}/x*.tar", "nothing matches"),
        ("{source}/00009.tar", r"00009.tar is not in .*run: python -m data_tools.index"),
        ("{parent}", r"has no manifest.json; run: python -m data_tools.index"),
        ("{source}/{{00000..00001.tar", "braces"),
        ("s3://bucket/directory", "names no shard"),
    ],
)
def test_a_pattern_that_names_nothing_says_the_way_out(source, pattern, words):
    with pytest.raises(ValueError, match=words):
        load_manifest(pattern.format(source=source, parent=source.parent))


def test_a_shard_named_twice_is_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for patterns in ((str(source), f"{source}/00000.tar"), (str(source), str(tmp_path / "link"))):
        with pytest.raises(ValueError, match=r"00000.tar twice"):
            load_manifest(patterns)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=9),
        lambda content: content.pop("shards"),
        lambda content: content["shards"][0].update(name="../../x.tar"),
        lambda content: content["shards"][0].update(samples=-1),
        lambda content: content["shards"][0].update(samples="many"),
        lambda content: content["shards"][0].update(samples=99),
        lambda content: content["shards"].pop(),
    ],
)
def test_a_damaged_manifest_is_refused(source, change):
    content = json.loads((source / "manifest.json").read_bytes())
    change(content)
    (source / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot use .*manifest.json .*run: python -m data_tools.index"):
        load_manifest(str(source))
    (source / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot use"):
        load_manifest(str(source))


def test_a_remote_manifest_cannot_smuggle_a_command(tmp_path):
    manifest = Manifest((Shard("x;touch hacked;.tar", 1, 10),))
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(ValueError, match="not a valid shard name"):
        load_manifest(f"pipe:cat {tmp_path}/*.tar")


def test_a_local_manifest_cannot_name_a_pipe(source, monkeypatch):
    """A relative pattern puts nothing before the name, so that "pipe:..." would be a command."""
    content = json.loads((source / "manifest.json").read_text())
    content["shards"][0]["name"] = "pipe:cd${IFS}..;id>PWNED;#'.tar"
    (source / "manifest.json").write_text(json.dumps(content))
    monkeypatch.chdir(source)
    with pytest.raises(ValueError, match="not a valid shard name"):
        load_manifest("*.tar")
