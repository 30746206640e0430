"""Pictures that would take too much memory, and pictures of which a part is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from pretrain.data import decoding
from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.reader import BadSample
from tests.toys import black_png, encoded


@pytest.mark.parametrize(("width", "height"), [(1, 60_000_000), (60_000_000, 1), (70_000, 100), (100, 70_000)])
def test_a_side_beyond_all_use_is_refused_before_it_is_decoded(monkeypatch, width: int, height: int) -> None:
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadSample, match=f"{width} x {height} pixels have a side above the limit of"):
        decode_image(black_png(width, height, rows=0, bits=1))


def test_pixels_that_take_more_memory_have_a_lower_limit() -> None:
    """64 Mpx of grey are decoded, but not of what is laid on white in steps."""
    deep = black_png(8000, 8000, rows=0)
    assert read_header(deep).memory == 12 * 64_000_000
    data = encoded(Image.new("RGBA", (8000, 8000)), "PNG", compress_level=1)
    with pytest.raises(BadSample, match=r"8000 x 8000 pixels of a PNG of mode RGBA take 1220 MiB .* limit is 768 MiB"):
        decode_image(data)


MEASURED = """
import resource, sys
from pathlib import Path
from pretrain.data import decoding
from pretrain.data.decoding import decode_image, read_header

data = Path(sys.argv[1]).read_bytes()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
decode_image(data)
print(peak() - before, read_header(data).memory)
"""


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {"method": 0}),
        ("WEBP", "RGBA", {"method": 0}),
    ],
)
def test_decoding_takes_no_more_memory_than_the_header_lets_expect(
    tmp_path, kind: str, mode: str, options: dict
) -> None:
    (tmp_path / "picture").write_bytes(encoded(Image.new(mode, (4000, 3000)), kind, **options))
    line = [sys.executable, "-c", MEASURED, str(tmp_path / "picture")]
    took, promised = map(int, subprocess.run(line, capture_output=True, check=True, text=True).stdout.split())
    assert took < promised + 16 * 2**20
