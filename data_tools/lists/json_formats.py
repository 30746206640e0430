"""The annotation files of COCO, SBU and Visual Genome as tables of url and caption. They are large, so streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from data_tools.inputs.tables import BadRow
from data_tools.lists.formats import Row, TextTable, json_elements

_COLUMNS = ("url", "caption", "width", "height")
_LOOK_AT = 20


def coco_captions(path: Path, *, together: bool = False) -> TextTable:
    """captions_train2017.json: a row per annotation, or with `together` a row per image with the list of its captions;
    its URL is that of its image's id. 118,287 URLs in memory, and with `together` all captions."""
    images: dict[Any, tuple[Any, ...]] = {}

    def read() -> Iterator[Row]:
        if not images:
            for _, image in _objects(path, "images"):
                url = image.get("coco_url") or image.get("flickr_url") or image.get("url")
                images[_id(image.get("id"))] = (url, image.get("width"), image.get("height"))
        if not images:
            raise ValueError(f"{path} has no images with an id and a coco_url; give a captions_*.json of COCO")
        annotations = ((_id(note.get("image_id")), note.get("caption")) for _, note in _objects(path, "annotations"))
        for number, caption in _grouped(annotations) if together else annotations:
            url, width, height = images.get(number, (None, None, None))
            yield url, caption, width, height

    return TextTable(path, _COLUMNS, read)


def _grouped(captions: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, list[Any]]]:
    """(an image's id, the list of its captions), in the order of their first ones."""
    groups: dict[Any, list[Any]] = {}
    for number, caption in captions:
        groups.setdefault(number, []).append(caption if isinstance(caption, str) else None)
    yield from groups.items()


def sbu_captions(path: Path) -> TextTable:
    """sbu-captions-all.json: two arrays of the same length, image_urls and captions."""

    def read() -> Iterator[Row]:
        missing = object()
        urls = (value for _, value in json_elements(path, ("image_urls",)))
        captions = (value for _, value in json_elements(path, ("captions",)))
        for url, caption in zip_longest(urls, captions, fillvalue=missing):
            if url is missing or caption is missing:
                raise ValueError(f"{path} has different numbers of captions and image_urls; get it again")
            yield url, caption

    return TextTable(path, ("url", "caption"), read)


def visual_genome(paths: Sequence[Path], *, together: bool = False) -> TextTable:
    """region_descriptions.json and image_data.json: a row per region, or with `together` a row per image with the list
    of its phrases; its URL is that of its image's id. Has all 108,077 URLs in memory."""
    regions = [path for path in paths if any("regions" in value for _, value in islice(_objects(path), _LOOK_AT))]
    images: dict[Any, tuple[Any, ...]] = {}
    if not regions:
        raise ValueError(f"none of {', '.join(map(str, paths))} has regions; give region_descriptions.json too")

    def read() -> Iterator[Row]:
        if not images:
            for path in paths:
                if path in regions:
                    continue
                for _, image in _objects(path):
                    number = _id(image.get("image_id", image.get("id")))
                    images[number] = (image.get("url"), image.get("width"), image.get("height"))
        for path in regions:
            for _, value in _objects(path):
                number = _id(value.get("image_id", value.get("id")))
                url, width, height = images.get(number, (value.get("url"), None, None))
                phrases = []
                for phrase in _phrases(value.get("regions")):
                    if isinstance(phrase, BadRow):
                        yield phrase
                    elif together:
                        phrases.append(phrase if isinstance(phrase, str) else None)
                    else:
                        yield url, phrase, width, height
                if together:
                    yield url, phrases, width, height

    if not any(row[0] for row in islice(read(), _LOOK_AT) if not isinstance(row, BadRow)):
        raise ValueError(f"{regions[0]} has only the numbers of pictures; give image_data.json too, for their URLs")
    return TextTable(regions[0], _COLUMNS, read)


def _phrases(regions: Any) -> Iterator[Any]:
    if not isinstance(regions, list | None):
        yield BadRow("its regions are no list")
        return
    for region in regions or ():
        yield region.get("phrase") if isinstance(region, dict) else BadRow("one of its regions is no object")


def _objects(path: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in json_elements(path, (key,)):
        if isinstance(value, dict):
            yield name, value


def _id(value: Any) -> Any:
    return value if isinstance(value, int | str) else None
