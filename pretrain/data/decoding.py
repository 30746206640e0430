"""Bytes of a picture -> pixels: the header is judged before a pixel is decoded.

Decoding takes most of a loader's time. JPEGs go through simplejpeg if it is installed, else through OpenCV, and are
decoded at half, a quarter or an eighth of their size if enough pixels remain; everything unusual goes through Pillow.
Pictures are untrusted: only JPEG, PNG and WebP are opened at all.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from PIL import Image

from pretrain.data import damage
from pretrain.data.jpeg_header import ordinary_jpeg_size
from pretrain.data.shards.reader import BadSample

try:
    import simplejpeg
except ImportError:  # OpenCV gives the same pixels and takes a third longer
    simplejpeg = None

# Loaders run one process per core, so OpenCV's own threads would only compete for the cores.
cv2.setNumThreads(0)

# Larger pictures are decompression bombs, or useless for a crop of 224. A side is limited too (to what a JPEG's can
# be): Pillow keeps two pointers for each row, so that a column of 60M pixels takes 1.5 GB.
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 65535
# The memory that a decoder may take at its peak, the result included; and its bytes per pixel, measured for each kind.
MAX_BYTES = 12 * MAX_PIXELS
PLAIN_BYTES, OTHER_BYTES, TRANSPARENT_WEBP_BYTES = 12, 20, 26
FORMATS = ("JPEG", "PNG", "WEBP")
REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
EXIF_ORIENTATION = 0x0112
# Where Pillow stores what Image.getexif() reads; a picture with none of these is upright.
EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@dataclass(frozen=True)
class Header:
    """A picture's header; `width` and `height` are those after its EXIF rotation."""

    image: Image.Image  # opened, not decoded
    width: int
    height: int
    orientation: int  # EXIF's 1..8

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as they are stored."""
        return self.image.size

    @property
    def is_plain_jpeg(self) -> bool:
        return self.image.format in ("JPEG", "MPO") and self.image.mode in ("RGB", "L")

    @property
    def memory(self) -> int:
        """The bytes that decoding takes at its peak, at full size."""
        webp, plain = self.image.format == "WEBP", self.image.mode in ("RGB", "L", "1")
        if self.image.has_transparency_data:
            each = TRANSPARENT_WEBP_BYTES if webp else OTHER_BYTES
        else:
            each = PLAIN_BYTES if plain and not webp else OTHER_BYTES
        return each * self.width * self.height


@dataclass(frozen=True)
class OrdinaryJpeg:
    """The header of a JPEG, grey or RGB and upright, that Pillow need not open."""

    width: int
    height: int
    orientation: ClassVar[int] = 1
    is_plain_jpeg: ClassVar[bool] = True

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def judged_header(data: bytes) -> Header | OrdinaryJpeg:
    """As `read_header`, but at once for most JPEGs, by a header that says less."""
    width, height = ordinary_jpeg_size(data) or (0, 0)
    if 0 < width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE:  # which is below MAX_BYTES
        return OrdinaryJpeg(width, height)
    return read_header(data)


def read_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> Header:
    """Format, size and orientation, without decoding. Raises BadSample for other formats than `formats` (Pillow's
    names), for empty data, and for more than MAX_PIXELS, MAX_SIDE or MAX_BYTES."""
    if not data:
        raise BadSample("the picture has 0 bytes")
    try:
        with _without_warnings():
            image = Image.open(io.BytesIO(data), formats=formats)
    except MemoryError:
        raise
    except Exception as error:  # a parser of hostile bytes may raise anything
        raise BadSample(f"not a readable {_listed(formats)} header ({_reason(error)})") from None
    width, height = image.size
    judge_pixels(image, MAX_PIXELS)
    if max(width, height) > MAX_SIDE:
        raise BadSample(f"{width} x {height} pixels have a side above the limit of {MAX_SIDE}")
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    header = Header(image, width, height, orientation)
    if header.memory > MAX_BYTES:
        kind = f"{width} x {height} pixels of a {image.format} of mode {image.mode}"
        raise BadSample(f"{kind} take {header.memory >> 20} MiB to decode; the limit is {MAX_BYTES >> 20} MiB")
    return header


def judge_pixels(picture: Header | Image.Image, limit: int) -> None:
    """Raises BadSample for a picture of more than `limit` pixels."""
    if picture.width * picture.height > limit:
        raise BadSample(f"{picture.width} x {picture.height} pixels are more than the limit of {limit}")


def decode_image(data: bytes, min_side: int | None = None) -> np.ndarray:
    """The picture as uint8 [H, W, 3] RGB, rotated as its EXIF says. Raises BadSample.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side has at least `min_side` pixels;
    None: full size. Transparent pixels are composited onto white; 16 bits are scaled to 8.
    """
    return decode(data, judged_header(data), min_side)


def decode(data: bytes, header: Header | OrdinaryJpeg, min_side: int | None) -> np.ndarray:
    """`decode_image` of a picture whose header was read."""
    pixels = None
    # A JPEG without its end marker may be truncated. Many releases of OpenCV (not 4.14) then silently fill the rest
    # with grey; Pillow raises, but decodes a JPEG that lacks only the marker.
    if header.is_plain_jpeg and data.rstrip(b"\0").endswith(b"\xff\xd9"):
        reduction = _reduction(min(header.width, header.height), min_side)
        pixels = _decode_sound_jpeg(data, header.size, reduction)
        if pixels is None:
            pixels = _decode_jpeg(data, reduction)
    if pixels is None:
        opened = header if isinstance(header, Header) else read_header(data)
        pixels = _decode_any(data, opened.image)
    return np.ascontiguousarray(_upright(pixels, header.orientation))


def _decode_sound_jpeg(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """The picture by simplejpeg; None without it, and if libjpeg reports anything, which `_decode_jpeg` then judges."""
    if simplejpeg is None:
        return None
    width, height = (-(-side // reduction) for side in size)
    least = {} if reduction == 1 else {"min_width": width, "min_height": height}
    try:
        pixels = simplejpeg.decode_jpeg(data, strict=True, **least)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None  # of a tiny picture it may choose another reduction


def _decode_jpeg(data: bytes, reduction: int) -> np.ndarray | None:
    flags = (REDUCED[reduction] or cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
    pixels, missing = damage.imdecode(data, flags)
    if missing:
        raise BadSample(f"a part of the picture is missing ({missing})")
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _decode_any(data: bytes, image: Image.Image) -> np.ndarray:
    try:
        with _without_warnings():
            image.load()
        missing = damage.png_damage(data, image) if image.format == "PNG" else ""
        if image.format in ("JPEG", "MPO"):
            missing = damage.jpeg_damage(data)
        if missing:
            raise BadSample(f"a part of the picture is missing ({missing})")
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips
            grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
            grey += 128
            grey //= 257
            return cv2.merge([grey.astype(np.uint8)] * 3)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (MemoryError, BadSample):
        raise
    except Exception as error:  # a decoder of hostile bytes may raise anything
        raise BadSample(f"cannot decode the picture ({_reason(error)})") from None


def _reduction(side: int, min_side: int | None) -> int:
    if min_side is None:
        return 1
    return next(k for k in (8, 4, 2, 1) if k == 1 or side // k >= min_side)


def _orientation(image: Image.Image) -> int:
    if not any(name in image.info for name in EXIF_KEYS):
        return 1
    try:
        with _without_warnings():
            value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to lose a good picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the camera's rotation, which both decoders ignore."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Pillow's warnings about sloppy files, which are common, and about bombs, which are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _listed(formats: tuple[str, ...]) -> str:
    names = ["WebP" if name == "WEBP" else name for name in formats]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _reason(error: Exception) -> str:
    """Pillow's message without the memory address, which would make each one unique."""
    text = str(error).split(" <_io", 1)[0].strip()
    return text[:200] or type(error).__name__
