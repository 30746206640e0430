"""A text, or a picture -> the pictures that come nearest to it, among those that pretrain.embed has embedded.

    python -m pretrain.search vectors/mine --weights runs/base/retrieval "a red bus" --html hits.html

Prints the key, the cosine and the caption of the best pictures; --html writes a page that shows them too.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.command import make_parser, run
from pretrain.data.decoding import decode_image
from pretrain.data.shards.manifest import MANIFEST, load_manifest
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader
from pretrain.data.sources import picture
from pretrain.embed import ABOUT, read_vectors
from pretrain.files import write_file
from pretrain.json_files import read_object
from pretrain.portions import weights_name
from pretrain.pretrained import load
from pretrain.report.html import TEMPLATES, render
from pretrain.visible import say

SIDE = 224  # the longer side of a picture on the page, in pixels


class Hit(NamedTuple):
    """A picture that came near to a query."""

    key: str
    score: float  # cosine
    caption: str | None
    picture: str | None  # a data URI; None: no page was asked for, or the picture is not there any more


class Result(NamedTuple):
    """A query, as the user wrote it, and its hits, best first."""

    query: str
    hits: list[Hit]


class Pictures:
    """Reads the pictures that were embedded from where they lay then; `about` is the content of embed.json."""

    def __init__(self, about: dict):
        self.place = Path(str(about.get("input")))
        self.reader = ShardReader(load_manifest(str(self.place))) if (self.place / MANIFEST).is_file() else None
        shards = self.reader.manifest.shards if self.reader else ()
        self.numbers = {shard.name.removesuffix(".tar"): number for number, shard in enumerate(shards)}

    def uri(self, key: str, file: str, sample: int) -> str | None:
        """A small copy of the picture as a data URI; None where the picture is not there any more."""
        try:
            pixels = decode_image(self._read(key, file, sample))
        except (OSError, ValueError):
            return None
        image, data = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.save(data, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"

    def _read(self, key: str, file: str, sample: int) -> bytes:
        """The encoded picture. BadSample, a ValueError, or OSError where it cannot be read."""
        if self.reader is not None:
            if file not in self.numbers or not 0 <= sample < self.reader.manifest.shards[self.numbers[file]].samples:
                raise BadSample("its shard is not there any more")
            return picture(self.reader.read(self.numbers[file], sample, IMAGE_EXTENSIONS))
        path = (self.place / key).resolve()
        if not path.is_relative_to(self.place.resolve()):  # the key comes from a file
            raise BadSample("it lies outside the folder")
        return path.read_bytes()


def search(out: Path, queries: np.ndarray, k: int) -> tuple[int, list[list[dict]]]:
    """Unit vectors [Q, E] -> (how many pictures there are, and for each query the k best, best first: their row of the
    table with its `score`). ValueError where `out` has no vectors, or those of another width."""
    table, vectors = read_vectors(out)
    if vectors.shape[1] != queries.shape[1]:
        raise ValueError(f"{out} has vectors of {vectors.shape[1]} numbers, the weights make {queries.shape[1]}")
    best = []
    for scores in queries @ vectors.T:
        rows = np.argpartition(-scores, min(k, len(scores)) - 1)[:k]
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        hits = table.select(["key", "caption", "file", "sample"]).take(rows).to_pylist()
        best.append([row | {"score": float(score)} for row, score in zip(hits, scores[rows], strict=True)])
    return table.num_rows, best


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.search", __doc__, 'vectors/mine --weights runs/quickstart/retrieval "a red circle"')
    parser.add_argument("vectors", type=Path, help="the --out of pretrain.embed")
    parser.add_argument("queries", nargs="*", metavar="TEXT", help="what to look for")
    parser.add_argument("--picture", action="append", default=[], type=Path, metavar="FILE", help="look for its like")
    parser.add_argument("--weights", type=Path, required=True, help="those that embedded the pictures")
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    parser.add_argument("-k", type=int, default=12, help="pictures per query (%(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures")
    args = parser.parse_intermixed_args(arguments)
    return run(lambda: _run(args), state="nothing was changed")


def _run(args: argparse.Namespace) -> None:
    if not args.queries and not args.picture:
        raise ValueError('there is nothing to look for; give a text, such as "a red bus", or --picture FILE')
    if args.k < 1:
        raise ValueError(f"-k {args.k} is below 1; use 12")
    about = _about(args.vectors)
    if about.get("weights") != weights_name(args.weights):
        raise ValueError(f"{args.vectors} was embedded by other weights than {args.weights}; give those")
    model = load(args.weights, text_tokenizer=args.text_tokenizer)
    vectors = []
    if args.queries:
        vectors.append(model.embed_texts(args.queries).numpy())
    if args.picture:
        vectors.append(model.embed_images(args.picture).numpy())
    count, best = search(args.vectors, np.concatenate(vectors), args.k)
    pictures = Pictures(about) if args.html else None
    results = []
    for query, rows in zip([*args.queries, *map(str, args.picture)], best, strict=True):
        uris = [pictures.uri(row["key"], row["file"], row["sample"]) if pictures else None for row in rows]
        hits = [Hit(row["key"], row["score"], row["caption"], uri) for row, uri in zip(rows, uris, strict=True)]
        results.append(Result(query, hits))
        say(query)
        for hit in hits:
            say(f"  {hit.score:.3f}  {hit.key}  {hit.caption or ''}".rstrip())
    if args.html:
        write_file(args.html, _page(results, count).encode())
        print(f"wrote {args.html}", file=sys.stderr)


def _about(out: Path) -> dict:
    """The content of embed.json. ValueError where `out` has none that can be read."""
    if not (out / ABOUT).is_file():
        raise ValueError(f"{out} has no {ABOUT}; give the --out of pretrain.embed")
    try:
        return read_object(out / ABOUT)
    except (OSError, ValueError) as error:
        raise ValueError(f"{out / ABOUT} cannot be read ({error}); give the --out of pretrain.embed") from None


def _page(results: list[Result], pictures: int) -> str:
    """The HTML page of the results; `pictures`: how many were searched."""
    return render(
        TEMPLATES / "search.html",
        kind="Imglish search",
        title=", ".join(result.query for result in results),
        series="Imglish",
        about=f"nearest of {pictures:,} pictures, by cosine",
        contents="Queries",
        links=[(f"query-{number}", result.query) for number, result in enumerate(results)],
        tiles=[],
        queries=results,
    )


if __name__ == "__main__":
    sys.exit(main())
