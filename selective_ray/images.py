"""List a folder into the image table; read and decode an image, or refuse it with a reason."""

import contextlib
import ctypes
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, UnidentifiedImageError, _imaging

from selective_ray.errors import UsageError, UserError

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


def list_images(source: str) -> pa.Table:
    """List the images in a folder and the folders in it, hidden ones aside.

    Returns uri string, size int64, version string ("<mtime_ns>-<size>"), sorted by uri. A uri is the absolute
    path, or a percent-encoded `file://` URI where the path is not valid UTF-8. Raises UsageError for
    sources that are not local, UserError for folders that cannot be listed or hold no image.
    """
    root = _folder(source)
    rows, others = [], 0
    for entry in _files(root):
        if not entry.name.lower().endswith(EXTENSIONS):
            others += 1
        elif (status := _status(entry)) is not None:
            rows.append((_uri(entry.path), status.st_size, f"{status.st_mtime_ns}-{status.st_size}"))
    if not rows and not others:
        raise UserError(f"the folder {_uri(root)} is empty; give one that holds images")
    if not rows:
        raise UserError(
            f"none of the {others:,} files in {_uri(root)} is an image; files count as images by their "
            f"extension ({' '.join(EXTENSIONS)}): rename them, or give the folder that holds the images"
        )
    rows.sort()
    uris, sizes, versions = zip(*rows, strict=True)
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "size": pa.array(sizes, pa.int64()),
            "version": pa.array(versions, pa.string()),
        }
    )


def read(uri: str) -> bytes:
    """Read the bytes of a listed uri; raises OSError where that fails."""
    return Path(_path(uri)).read_bytes()


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


def read_batch(
    uris: list[str], *, size: int, crop: float, read: Callable[[str], bytes] = read
) -> tuple[np.ndarray, dict[int, str]]:
    """Read and decode images; returns uint8 [len(uris), size, size, 3] and the reasons of rejected slots.

    The pixels of a rejected slot are zeros.
    """
    pixels = np.zeros((len(uris), size, size, 3), np.uint8)
    reasons = {}
    for slot, uri in enumerate(uris):
        try:
            pixels[slot] = decode(read(uri), size=size, crop=crop)
        except Rejected as rejected:
            reasons[slot] = str(rejected)
        except FileNotFoundError:
            reasons[slot] = "file not found"
        except PermissionError:
            reasons[slot] = "permission denied"
        except OSError as error:
            reasons[slot] = f"cannot be read: {error.strerror or type(error).__name__}"
    return pixels, reasons


def thumbnail(data: bytes, *, size: int) -> bytes:
    """Shrink an image to a JPEG with no side longer than size; raises Rejected."""
    image = _decoded(data)
    image.thumbnail((size, size))
    image.info.clear()  # no comment, profile or position of the photographer in what is passed on
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return out.getvalue()


def _folder(source: str) -> str:
    """Return the absolute path of a folder that exists; raises UsageError or UserError."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)", source)
    local = scheme is None or (scheme[1].lower() == "file" and scheme[2] in ("", "localhost"))
    if not (source and local):
        raise UsageError(
            f"cannot read images from {source!r}: this version reads local folders only; copy them to one"
        )
    # resolve() would put what a link points to on this machine into every uri, absolute() would keep "..".
    root = os.path.abspath(_path(source))  # noqa: PTH100
    try:
        mode = Path(root).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no folder {_uri(root)}; check the path") from None
    except OSError as error:
        raise _unreadable(root, error) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{_uri(root)} is a file, not a folder; give the folder that holds the images")
    return root


def _files(root: str) -> Iterator[os.DirEntry]:
    """Yield the files under a folder; every folder is visited once, linked ones after all others."""
    visited = {_identity(str(parent)) for parent in Path(root).parents}
    folders, links = [root], []
    while folders or links:
        # Smallest link first, so that the path of a folder linked twice does not depend on the disk's order.
        folder = folders.pop() if folders else links.pop(links.index(min(links)))
        if (identity := _identity(folder)) in visited:
            continue
        visited.add(identity)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(entry.path)
                    elif entry.is_file() or entry.is_symlink():
                        yield entry
        except OSError as error:
            raise _unreadable(folder, error) from None


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = Path(folder).stat()
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _status(entry: os.DirEntry) -> os.stat_result | None:
    """Return the status of a file, of the link itself where it is broken, None where it went away."""
    for follow in (True, False):
        try:
            return entry.stat(follow_symlinks=follow)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(entry.path, error) from None
    return None


def _unreadable(path: str, error: OSError) -> UserError:
    why = (error.strerror or type(error).__name__).lower()
    return UserError(
        f"cannot list {_uri(path)}: {why}; make it readable for this user, or give another folder"
    )


def _uri(path: str) -> str:
    """Name an absolute path in valid UTF-8; `_path` is the inverse."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def _path(uri: str) -> str:
    # An absolute path begins with a slash, so it cannot be taken for a URI.
    if uri[:7].lower() == "file://":
        return os.fsdecode(unquote_to_bytes(uri[7:].removeprefix("localhost")))
    return uri


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
