"""Files in a directory of shards that look like shards but are not, and what to do about them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pretrain.data.shards.tar_index import EXTENSIONS, split_name

# The endings of compressed shards, and the command that makes plain tars of them.
_COMPRESSED = {
    (".tar.gz", ".tgz"): "gunzip",
    (".tar.bz2", ".tbz2", ".tbz"): "bunzip2",
    (".tar.xz", ".txz"): "unxz",
    (".tar.zst", ".tzst"): "unzstd --rm",
}


def overlooked(directory: Path) -> list[tuple[str, str]]:
    """(name, why) of each file that looks like a shard, or like a part of one, but is not one."""
    names = sorted(path.name for path in directory.iterdir())
    present = set(names)
    reasons = []
    for name in names:
        plain, command = _decompressed(name)
        if plain and plain not in present:
            why = f"compressed, and only plain tars can be read; run: {command} {shlex.quote(str(directory / name))}"
        elif name.endswith(".tar") and name.startswith("."):
            why = "its name begins with a dot"
        elif name.endswith(".tar") and (directory / name).is_dir():
            why = "it is a directory"
        elif name.lower().endswith(".tar") and not name.endswith(".tar"):
            why = "its name does not end in .tar in small letters; rename it"
        elif re.search(r"\d_stats\.json$", name) and f"{name.removesuffix('_stats.json')}.tar" not in present:
            why = f"its tar is missing; restore {name.removesuffix('_stats.json')}.tar, or remove this file too"
        else:
            continue
        reasons.append((name, why))
    return reasons


def _decompressed(name: str) -> tuple[str, str]:
    """The name of the plain tar that a compressed shard becomes, and the command for that; ("", "") for other files."""
    for endings, command in _COMPRESSED.items():
        for ending in endings:
            if name.lower().endswith(ending) and not name.startswith("."):
                return f"{name[: -len(ending)]}.tar", command
    return "", ""


def no_tar(directory: Path) -> str:
    """Why a directory has no .tar in it, and what to do about that."""
    nothing, folder = f"{directory} contains no .tar file", shlex.quote(str(directory))
    packed = [name for name, why in overlooked(directory) if why.startswith("compressed")]
    if packed:
        plain, command = _decompressed(packed[0])
        ending = packed[0][len(plain.removesuffix(".tar")) :]
        return f"{nothing}, but {packed[0]}, and only plain tars can be read; run: {command} {folder}/*{ending}"
    if unpacked := next(directory.glob("*.tar/"), None):
        return f"{unpacked} is a directory, not a tar; give it as DIR if it contains shards, or pack it"
    if below := sorted({path.parent for path in directory.glob("*/*.tar")}):
        return f"{nothing}, but {below[0]} does; give that directory"
    loose = next((path for path in directory.rglob("*.*") if split_name(path.name)[1] in EXTENSIONS), None)
    if loose is not None:
        tar = shlex.quote(str(directory.with_name(f"{directory.name}.tar")))
        make = f"tar --sort=name -cf {tar} -C {folder} . && mv {tar} {folder}"
        return f"{nothing}, but files that are in none ({loose.name}); run: {make}"
    return f"{nothing}; give the directory that img2dataset wrote to"
