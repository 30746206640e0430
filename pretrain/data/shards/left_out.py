"""The reasons why members of a tar belong to no sample, as a manifest stores them and as a user reads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from pretrain.data.shards.tar_members import BEHIND, LINK, SPARSE, SPECIAL, TarMember

HIDDEN, NO_ENDING, DOTS, REPLACED, OTHER_ENDING = "hidden", "no ending", "dots", "replaced", "other endings"
# Formats of pictures that training does not open: every further decoder would be exposed to hostile bytes.
OTHER_PICTURES = frozenset(
    ("avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "pgm", "ppm", "svg", "tga", "tif", "tiff")
)
_WORDS = {
    LINK: "hard and symbolic links, which have no content; make the tar with tar --dereference --hard-dereference",
    SPARSE: "files stored with their holes left out; make the tar without --sparse",
    SPECIAL: "neither files nor folders (devices, pipes, volume labels)",
    BEHIND: "behind the end mark, where readers of tars stop; unpack it with tar --ignore-zeros and make it again",
    HIDDEN: "hidden files, whose names begin with a dot",
    NO_ENDING: "without an ending",
    DOTS: "names such as photo.2021.05.jpg: a key ends at the first dot, as in webdataset; rename them where the dots "
    "belong to the key",
    REPLACED: "followed by another of the same key and ending, which is used",
    OTHER_ENDING: "other endings",
}
# Endings are untrusted: only plain ones are counted by themselves, up to MOST_ENDINGS of them in a shard.
_PLAIN = re.compile(r"[a-z0-9_-]{1,16}(\.[a-z0-9_-]{1,16})?", re.ASCII)
MOST_ENDINGS = 50


def why_left_out(member: TarMember, key: str, extension: str, usable: Collection[str]) -> str:
    """One of the reasons above, or an ending with its dot; "" for a member of a sample. `usable`: the extensions that
    training reads."""
    if member.kind in _WORDS:
        return member.kind
    if key and extension in usable:
        return ""
    if member.name.rpartition("/")[2].startswith("."):
        return HIDDEN
    if not extension:
        return NO_ENDING
    if extension.rpartition(".")[2] in {*usable, *OTHER_PICTURES} and "." in extension:
        return DOTS
    return f".{extension}" if _PLAIN.fullmatch(extension) else OTHER_ENDING


def count(left_out: Counter[str], reason: str) -> str:
    """Counts one more member -> the reason under which it is counted. The number of reasons is bounded, whatever a tar
    contains."""
    known = reason in left_out or reason in _WORDS or len(left_out) < MOST_ENDINGS
    counted = reason if known else OTHER_ENDING
    left_out[counted] += 1
    return counted


def is_reason(text: object) -> bool:
    """Whether `why_left_out` can return this text."""
    return isinstance(text, str) and (text in _WORDS or (text[:1] == "." and bool(_PLAIN.fullmatch(text[1:]))))


def in_words(left_out: Mapping[str, int]) -> dict[str, str]:
    """Reason -> a line for the user, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return {reason: f"{n:,} {'member' if n == 1 else 'members'}: {_words(reason)}" for reason, n in ordered}


def _words(reason: str) -> str:
    if reason.removeprefix(".") in OTHER_PICTURES:
        return f"{reason}, a picture that is not read; convert it to JPEG, PNG or WebP"
    return _WORDS.get(reason, f"{reason}, an ending that is not read")
