"""The annotation files of COCO, SBU and Visual Genome as tables of url and caption. They are large, so streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from data_tools.lists.formats import Row, TextTable, json_elements

_COLUMNS = ("url", "caption", "width", "height")
_LOOK_AT = 20


def coco_captions(path: Path) -> TextTable:
    """captions_train2017.json: a row per annotation; its URL is that of its image's id. 118,287 URLs in memory."""
    images: dict[Any, tuple[Any, ...]] = {}

    def read() -> Iterator[Row]:
        if not images:
            for _, image in _objects(path, "images"):
                url = image.get("coco_url") or image.get("flickr_url") or image.get("url")
                images[_id(image.get("id"))] = (url, image.get("width"), image.get("height"))
        if not images:
            raise ValueError(f"{path} has no images with an id and a coco_url; give a captions_*.json of COCO")
        for _, annotation in _objects(path, "annotations"):
            url, width, height = images.get(_id(annotation.get("image_id")), (None, None, None))
            yield url, annotation.get("caption"), width, height

    return TextTable(path, _COLUMNS, read)


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


def visual_genome(paths: Sequence[Path]) -> TextTable:
    """region_descriptions.json and image_data.json: a row per region; its URL is that of its image's id. Has all
    108,077 URLs in memory."""
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
                for region in value.get("regions") or ():
                    good = isinstance(region, dict)
                    yield (url, region.get("phrase"), width, height) if good else None

    if not any(row and row[0] for row in islice(read(), _LOOK_AT)):
        raise ValueError(f"{regions[0]} has only the numbers of pictures; give image_data.json too, for their URLs")
    return TextTable(regions[0], _COLUMNS, read)


def _objects(path: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in json_elements(path, (key,)):
        if isinstance(value, dict):
            yield name, value


def _id(value: Any) -> Any:
    return value if isinstance(value, int | str) else None
