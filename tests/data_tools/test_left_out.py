"""Shards as users make them: each works, or is named with what mends it; what belongs to no sample is counted."""

from __future__ import annotations

import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_tools import filter_shards, index, rewrite, verify
from tests.toys import encoded, pair_sample, picture, read_all, refused, write_shard, write_tar

IMAGE = encoded(picture())


def linked(name: str, kind: bytes) -> tuple[tarfile.TarInfo, None]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "good.jpg"
    return info, None


def counted(text: str) -> dict[str, int]:
    """The reasons by their first word, and how many members each has."""
    return {word: int(number) for number, word in re.findall(r"(\d+) members?: ([\w.]+)", text)}


def test_every_member_that_is_left_out_is_counted_by_its_reason(tmp_path, capsys):
    """`index` counts them, also where it reads nothing again; `verify` finds them; `rewrite` notes them."""
    source = tmp_path / "source"
    source.mkdir()
    members = [linked("folder", tarfile.DIRTYPE), ("good.jpg", IMAGE), ("older.jfif", IMAGE), ("oldest.JPE", IMAGE)]
    members += [linked("hard.jpg", tarfile.LNKTYPE), linked("soft.jpg", tarfile.SYMTYPE)]
    members += [("photo.2021.05.jpg", IMAGE), ("photo.2021.06.jpg", IMAGE), ("x/._good.jpg", b"x"), ("README", b"x")]
    members += [(f"{n}.{ending}", b"x") for n, ending in enumerate(("gif", "tiff", "bmp", "avif", "heic", "cls"))]
    members += [("GOOD.jpg", IMAGE), ("GOOD.JPG", IMAGE)]
    with write_tar(source / "00000.tar", members).open("ab") as file:
        file.write(write_tar(tmp_path / "second.tar", {"behind.jpg": IMAGE, "behind.txt": b"x"}).read_bytes())
        file.write(write_tar(tmp_path / "third.tar", {"last.jpg": IMAGE}).read_bytes())
    expected = {"behind": 3, "hard": 2, "names": 2, "hidden": 1, "without": 1, "followed": 1}
    expected |= {f".{ending}": 1 for ending in ("gif", "tiff", "bmp", "avif", "heic", "cls")}
    for read in (1, 0):
        assert index.main([str(source)]) == 0
        said = capsys.readouterr()
        assert f"1 shards ({read} read" in said.out and ", 4 samples," in said.out
        assert counted(said.err) == expected, said.err
    assert verify.main([str(source)]) == 1
    assert "00000.tar\tleaves out 2 members: hard and symbolic links" in capsys.readouterr().out
    assert rewrite.main([str(source), "--out", str(tmp_path / "new")]) == 0
    assert "2 members: hard and symbolic" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two pairs as files, and a directory for shards."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "shards").mkdir()
    for name, data in {"a.jpg": IMAGE, "b.jpg": IMAGE, "a.txt": b"one", "b.txt": b"two"}.items():
        (tmp_path / "folder" / name).write_bytes(data)
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "make",
    [
        "tar cf shards/set.tar folder/",
        "tar cf shards/set.tar -C folder .",
        "tar cf 'shards/my set (1).tar' folder/*.jpg folder/*.txt",
        "tar cf shards/train-000000.tar folder/a.* && tar cf shards/train-000001.tar folder/b.*",
        "tar --format=pax -cf shards/a.b.tar folder/",
    ],
)
def test_shards_as_users_make_them_work(folder, make, capsys):
    shards = folder.parent / "shards"
    subprocess.run(make, shell=True, check=True, cwd=folder.parent)
    assert index.main([str(shards)]) == 0 and "left out" not in capsys.readouterr().err
    assert verify.main([str(shards), "--decode", "--kind", "pairs"]) == 0
    assert filter_shards.main([str(shards)]) == 0
    assert rewrite.main([str(shards), "--out", str(folder.parent / "new")]) == 0
    for source in (shards, folder.parent / "new"):
        samples = sorted(read_all(source), key=lambda sample: sample["txt"])
        assert [(sample["__key__"][-1:], sample["txt"]) for sample in samples] == [(b"a", b"one"), (b"b", b"two")]


@pytest.mark.parametrize(
    "make",
    [
        "tar czf shards/set.tar.gz folder/",
        "tar cjf shards/set.tbz2 folder/",
        "tar cJf shards/set.tar.xz folder/",
        "tar czf shards/set.tar folder/",
        "cp folder/* shards/",
    ],
)
def test_the_command_in_the_sentence_mends_it(folder, make, capsys):
    shards = folder.parent / "shards"
    subprocess.run(make, shell=True, check=True, cwd=folder.parent)
    error = refused(capsys, index.main, shards)
    command = re.split(r"run: |plain tar of it: ", error)[1].partition("; or skip")[0]
    subprocess.run(command, shell=True, check=True)
    assert index.main([str(shards)]) == 0
    assert sorted(sample["txt"] for sample in read_all(shards)) == [b"one", b"two"]


def test_shards_that_are_overlooked_are_named(folder, capsys):
    shards = folder.parent / "shards"
    write_shard(shards, 0, [pair_sample("good")], stats=False)
    (shards / "3.tar").mkdir()
    for name in ("1.tar.gz", "0.tgz", "._00000.tar", "2.TAR", "00000.tar.gz"):
        (shards / name).touch()
    assert index.main([str(shards)]) == 0
    skipped = re.findall("^skipped: ([^:]*): ", capsys.readouterr().err, re.MULTILINE)
    assert skipped == ["._00000.tar", "0.tgz", "1.tar.gz", "2.TAR", "3.tar"]  # 00000.tar is there
    assert [finding.shard for finding in verify.verify_directory(shards).findings] == skipped
    assert f"contains no .tar file, but {shards} does" in refused(capsys, index.main, shards.parent)


def test_pictures_and_texts_with_different_keys_are_one_finding(tmp_path):
    pictures, texts = {f"i/{n}.jpg": IMAGE for n in range(3)}, {f"t/{n}.txt": b"text" for n in range(3)}
    write_tar(tmp_path / "0.tar", pictures | texts)
    index.main([str(tmp_path)])
    (finding,) = verify.verify_directory(tmp_path).findings
    assert "i/0 and t/0 differ" in finding.what


def test_a_shard_of_chained_headers_is_skipped_and_found(tmp_path, capsys):
    write_shard(tmp_path, 0, [pair_sample("good")], stats=False)
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "00001.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 3000 + bytes(1024))
    assert "00001.tar is damaged at byte 0: more than 16 headers" in refused(capsys, index.main, tmp_path)
    assert index.main([str(tmp_path), "--skip-broken"]) == 0
    assert "skipped: 00001.tar: " in capsys.readouterr().err
    assert verify.main([str(tmp_path)]) == 1
    assert "00001.tar\tis damaged at byte 0: more than 16 headers" in capsys.readouterr().out


def test_any_number_of_endings_is_few_lines(tmp_path):
    write_tar(tmp_path / "0.tar", {"good.jpg": IMAGE} | {f"{n}.e{n}": b"" for n in range(300)})
    result = index.index_directory(tmp_path)
    assert len(result.left_out) <= 60 and result.left_out.total() == 300
    findings = verify.verify_directory(tmp_path).findings
    assert len(findings) == len(result.left_out) and any("other endings (such as " in f.what for f in findings)
