"""Decode an image to pixels of one size, or refuse it with a reason."""

import contextlib
import ctypes
import io
import logging
import warnings

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError, _imaging

# Formats that Pillow decodes by itself and that announce themselves by a magic number. EPS would start
# Ghostscript, and TGA and its like accept almost any bytes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
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
ORIENTATION = 0x0112  # the EXIF tag


class Rejected(Exception):
    """An image that cannot be used; the message is the reason in a few words."""


def decode(data: bytes, *, size: int, crop: float) -> np.ndarray:
    """Decode an image, resize its shorter side to size / crop and cut out the center, as torchvision does.

    Returns uint8 [size, size, 3], RGB, upright, transparency on white. Raises Rejected.
    """
    image = _decoded(data)
    width, height = image.size
    shorter = round(size / crop)
    wide = max(shorter, shorter * width // height)
    high = max(shorter, shorter * height // width)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    # Only the part that stays is resized: the whole of a very long image would not fit in memory.
    box = (
        left * width / wide,
        top * height / high,
        (left + size) * width / wide,
        (top + size) * height / high,
    )
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))


def thumbnail(data: bytes, *, size: int) -> bytes:
    """Shrink an image to a JPEG with no side longer than size; raises Rejected."""
    image = _decoded(data)
    image.thumbnail((size, size))
    image.info.clear()  # no comment, profile or position of the photographer in what is passed on
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return out.getvalue()


def _decoded(data: bytes) -> Image.Image:
    """Decode the first frame to an upright RGB image; raises Rejected."""
    if not data:
        raise Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(*image.size)
            image.load()
            return _upright(_rgb(image), image)
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
        return image.convert("RGB")
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


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says; an EXIF block that is broken says nothing."""
    try:
        method = TRANSPOSE.get(original.getexif().get(ORIENTATION))
    except Exception:  # broken EXIF raises as many kinds of errors as broken pixels do
        method = None
    return image if method is None else image.transpose(method)
