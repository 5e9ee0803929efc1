"""Decode an image to pixels of one size, or refuse it with a reason."""

import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError, _imaging

# Formats that Pillow decodes by itself and that announce themselves by a magic number. EPS would start
# Ghostscript, and TGA and its like accept almost any bytes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
# Of bytes that have no name: what their format is mostly called.
EXTENSION_OF = {
    **{"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"},
    **{"PPM": ".ppm", "JPEG2000": ".jp2", "AVIF": ".avif"},
}
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte of RGB

# What is wrong with a broken TIFF is a reason in a table; Pillow's logger and the libtiff inside Pillow
# would write it to the terminal as well, from every worker. Where libtiff is hidden it stays chatty.
logging.getLogger("PIL.TiffImagePlugin").addHandler(logging.NullHandler())
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LEFT_IS_RIGHT, TOP_IS_BOTTOM, ASIDE = (2, 3, 6, 7), (3, 4, 7, 8), (5, 6, 7, 8)  # of what is stored
ORIENTATION = 0x0112  # the EXIF tag

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves this many times the pixels a side that
# are needed. Embeddings by SqueezeNet of photographs that just reach it have a mean cosine of 0.998 to those
# of whole decoding; with a margin of 1 it is 0.988, with 2 0.999 (`benchmarks/decode.py --margin`).
MARGIN = 1.5


class Rejected(Exception):
    """An image that cannot be used; the message is the reason in a few words."""


class Scaled(NamedTuple):
    """An upright RGB image at 1/scale of its width and height, which begins at (x, y) of the decoded pixels.

    Scaled sizes are rounded up, so one row and one column of the pixels may reach beyond the original.
    """

    image: Image.Image
    width: int
    height: int
    scale: int = 1
    x: float = 0
    y: float = 0


def decode(data: bytes, *, size: int, crop: float, interpolation: str = "bilinear") -> np.ndarray:
    """Decode an image, resize its shorter side to size / crop and cut out the center, as torchvision does.

    interpolation is "bilinear" or "bicubic". Returns uint8 [size, size, 3], RGB, upright, transparency on
    white. Raises Rejected.
    """
    shorter = round(size / crop)
    image, width, height, scale, x, y = _decoded(data, lambda sides: min(sides) / shorter)
    wide = max(shorter, shorter * width // height)
    high = max(shorter, shorter * height // width)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    # Only the part that stays is resized: the whole of a very long image would not fit in memory.
    box = (
        x + left * width / (wide * scale),
        y + top * height / (high * scale),
        x + (left + size) * width / (wide * scale),
        y + (top + size) * height / (high * scale),
    )
    return np.array(image.resize((size, size), Image.Resampling[interpolation.upper()], box))


def thumbnail(data: bytes, *, size: int) -> bytes:
    """Shrink an image to a JPEG with no side longer than size; raises Rejected."""
    image = _decoded(data, lambda sides: max(sides) / size).image
    image.thumbnail((size, size))
    image.info.clear()  # no comment, profile or position of the photographer in what is passed on
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return out.getvalue()


def extent(data: bytes) -> tuple[int, int, str]:
    """Return width and height of an image as it is seen, and the extension of its format; raises Rejected.

    Of a JPEG, the first bytes are enough where they hold its headers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            _check_pixels(width, height)
            if _orientation(image) in ASIDE:
                width, height = height, width
            return width, height, EXTENSION_OF[image.format]
    except Rejected:
        raise
    except Exception:  # Pillow's openers raise whatever the broken bytes lead them to
        raise Rejected("not an image, or damaged") from None


def _decoded(data: bytes, excess: Callable[[tuple[int, int]], float]) -> Scaled:
    """Decode the first frame to an upright RGB image; raises Rejected.

    excess: width and height to how many times the pixels a side are there that the caller needs.
    """
    if not data:
        raise Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            original = image.size
            _check_pixels(*original)
            scale = _draft(image, excess(original) / MARGIN)
            image.load()
            return _upright(_rgb(image), original, scale, _orientation(image))
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except Image.DecompressionBombError:
        raise Rejected(f"too many pixels: more than {2 * MAX_PIXELS}") from None
    except MemoryError:
        raise Rejected("not enough memory") from None
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        raise Rejected("truncated" if "truncated" in str(error).lower() else "damaged") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"too many pixels: {width} x {height}")
    if width * height < 1:
        raise Rejected("no pixels")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image), 65535)
    if image.mode == "I":
        return _gray(np.asarray(image), _top(image, (65535,)))
    if image.mode == "F":
        return _gray(np.asarray(image), _top(image, (1, 255, 65535)))
    if image.mode == "LAB":
        raise Rejected("unsupported colors: LAB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's, which store inverted ink; the marker says which do.
        image = ImageChops.invert(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if image.mode == "La":  # Pillow knows no direct way from premultiplied gray
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _top(image: Image.Image, tops: tuple[int, ...]) -> float | None:
    """Return the usual white that holds all values, None where none does."""
    low, high = image.getextrema()
    return next((top for top in tops if low >= 0 and high <= top), None)


def _gray(values: np.ndarray, top: float | None) -> Image.Image:
    """Scale 0..top, or the smallest to the largest value where top is None, to 0..255."""
    if values.dtype == np.uint16:
        table = np.round(np.arange(65536) / 257).astype(np.uint8)
        return Image.fromarray(table[values]).convert("RGB")
    values = np.nan_to_num(values.astype(np.float64), copy=False, posinf=0, neginf=0)
    low, high = (0, top) if top else (values.min(), values.max())
    values -= low
    values *= 255 / max(float(high) - float(low), 1e-30)
    return Image.fromarray(np.round(values, out=values).clip(0, 255).astype(np.uint8)).convert("RGB")


def _draft(image: Image.Image, most: float) -> int:
    """Let a JPEG decode at 1/scale, the smallest of libjpeg's sizes that `most` allows; returns scale."""
    width, height = image.size
    for scale in (8, 4, 2):
        if scale <= most:
            drafted = image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
            # Other formats do not draft, and Pillow takes a larger size for sides of a few pixels.
            return 1 if drafted is None else round(width / drafted[1][2])
    return 1


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation; an EXIF block that is broken says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION)
        return orientation if orientation in TRANSPOSE else None
    except Exception:  # broken EXIF raises as many kinds of errors as broken pixels do
        return None


def _upright(image: Image.Image, original: tuple[int, int], scale: int, orientation: int | None) -> Scaled:
    """Turn the image as its EXIF orientation says, and find where it begins then."""
    width, height = original
    beyond, below = image.width - width / scale, image.height - height / scale
    if orientation in ASIDE:
        width, height, beyond, below = height, width, below, beyond
    if orientation is not None:
        image = image.transpose(TRANSPOSE[orientation])
    x = beyond if orientation in LEFT_IS_RIGHT else 0
    y = below if orientation in TOP_IS_BOTTOM else 0
    return Scaled(image, width, height, scale, x, y)
