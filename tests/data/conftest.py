"""Fixtures of the loader's tests: a tokenizer, a small source of each kind, and a Loader for them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform
from tests.toys import COUNTS, PATCH, SIZE, image_sample, pair_sample, text_sample, write_source, write_text_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    words = (f"picture number {n} long document of many words" for n in range(400))
    return TextTokenizer(write_text_model(tmp_path_factory.mktemp("spm") / "text.model", words, 60))


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Shards of unequal length, one of them empty."""
    root = tmp_path_factory.mktemp("shards")
    numbers = iter(range(10_000))
    lengths = {"images": [7, 0, 12, 5], "pairs": [9, 4, 10], "texts": [11, 6, 13, 1]}
    for kind, counts in lengths.items():
        shards = []
        for count in counts:
            make = {
                "images": lambda n: image_sample(f"{n:05d}", n),
                "pairs": lambda n: pair_sample(f"{n:05d}", n),
                "texts": lambda n: text_sample(f"{n:05d}", f"document {n} of many words " * (n % 9 + 1)),
            }[kind]
            shards.append([make(next(numbers)) for _ in range(count)])
        write_source(root / kind, shards)
    return {
        "images": ImageShards(str(root / "images")),
        "pairs": PairShards(str(root / "pairs"), text_len=24),
        "texts": TextShards(str(root / "texts"), text_len=16),
    }


@pytest.fixture
def build(mix: dict, tokenizer: TextTokenizer):
    def build(**options) -> Loader:
        loading = options.pop("loading", {})
        defaults = {
            **{"mix": mix, "counts": COUNTS, "seed": 5},
            **{"tokenizer": tokenizer, "transform": ImageTransform(size=SIZE), "masking": Masking()},
            **{"patch_size": PATCH, "draws": {"drop_path": 4}},
        }
        options = defaults | options
        options["loading"] = Loading(**({"workers": 0, "streams": 4, "block_shards": 2} | loading))
        mixture, view = (
            kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options}) for kind in (Mixture, View)
        )
        return Loader(mixture, view, **options)

    return build
