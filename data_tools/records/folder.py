"""A folder of pictures as records: captions from the .txt beside each, labels and splits from the folders' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.inputs.text_stream import open_text
from data_tools.records.record import ENDINGS, SPLITS, Record, Unusable, captions_of, picture_files
from pretrain.data.shards.reader import MAX_TEXT_BYTES


def read_folder(root: Path, *, label_folders: bool) -> Iterator[Record | Unusable]:
    """`label_folders`: a picture's folder is its label, as in ImageNet's layout. Where all lie in folders of names such
    as train and val, these are their splits. ValueError where there is no picture."""
    files = list(picture_files(root))
    if not files:
        raise ValueError(f"{root} has no picture ({', '.join(sorted(ENDINGS))}); give another folder")
    parts = [path.relative_to(root).parts for path in files]
    split = all(len(part) > 1 and part[0].lower() in SPLITS for part in parts)
    for path, part in zip(files, parts, strict=True):
        name = "/".join(part)
        folders = part[1:-1] if split else part[:-1]
        if label_folders and not folders:
            yield Unusable(name, "no_label", "it lies in no folder that would be its label")
            continue
        try:
            captions = _beside(path)
        except (ValueError, OSError) as error:
            yield Unusable(name, "bad_caption", str(error))
            continue
        label = folders[-1] if label_folders else None
        yield Record(name, (path,), captions, label, part[0].lower() if split else "")


def _beside(path: Path) -> tuple[str, ...]:
    """The lines of the .txt with the picture's name, each a caption."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ()
    if beside.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{beside.name} has more than {MAX_TEXT_BYTES} bytes")
    with open_text(beside) as file:
        return captions_of(file.read().decode(errors="replace").splitlines())
