"""Images of every kind, sound and broken, painted for the tests."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops


def picture(width: int = 96, height: int = 64, seed: int = 0) -> np.ndarray:
    """Four flat quadrants of random colors under a soft gradient, uint8 [height, width, 3]."""
    colors = np.random.default_rng(seed).integers(40, 200, (2, 2, 3))
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    gradient = np.linspace(0, 40, width)[None, :, None] + np.linspace(0, 15, height)[:, None, None]
    return (colors[rows][:, columns] + gradient).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    return _bytes(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0, **options)


def png(pixels: np.ndarray, **options: object) -> bytes:
    return _bytes(Image.fromarray(pixels), "PNG", **options)


def cmyk(inks: tuple[int, int, int, int], *, adobe: bool = True) -> bytes:
    """A flat CMYK JPEG; Adobe's store inverted ink and say so by a marker."""
    image = Image.new("CMYK", (32, 32), inks)
    if adobe:
        return _bytes(image, "JPEG", quality=95)
    data = _bytes(ImageChops.invert(image), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[start + 2 : start + 4])
    return data[:start] + data[start + 2 + length :]


def oriented(pixels: np.ndarray, orientation: int) -> bytes:
    """A JPEG stored turned, with the EXIF orientation that turns it back to the pixels."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the camera applied
    image = Image.fromarray(pixels)
    if orientation > 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _bytes(image, "JPEG", quality=95, subsampling=0, exif=exif)


def bomb(width: int = 10_000, height: int = 10_001) -> bytes:
    """A PNG of a few hundred kilobytes that would unpack to width x height gray pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer, row = zlib.compressobj(1), bytes(width + 1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def kinds(folder: Path) -> dict[str, Path]:
    """Write one sound image of each kind; returns the paths by file name."""
    pixels = picture()
    rgb = Image.fromarray(pixels)
    gray = rgb.convert("L")
    half = rgb.convert("RGBA")
    half.putalpha(128)
    palette = rgb.quantize(16)
    frames = [rgb, ImageChops.invert(rgb)]
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    written = {
        "rgb.jpg": jpeg(pixels),
        "rgb.png": png(pixels),
        "rgb.bmp": _bytes(rgb, "BMP"),
        "rgb.tif": _bytes(rgb, "TIFF"),
        "rgb.webp": _bytes(rgb, "WEBP", lossless=True),
        "cmyk.jpg": _bytes(rgb.convert("CMYK"), "JPEG", quality=95),
        "gray.png": _bytes(gray, "PNG"),
        "gray16.png": _bytes(deep, "PNG"),
        "gray16.tif": _bytes(deep, "TIFF"),
        "la.png": _bytes(half.convert("LA"), "PNG"),
        "rgba.png": _bytes(half, "PNG"),
        "palette.png": _bytes(palette, "PNG", transparency=0),
        "bilevel.png": _bytes(gray.convert("1"), "PNG"),
        "animated.gif": _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": _bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "animated.png": _bytes(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        **{f"orientation{n}.jpg": oriented(pixels, n) for n in range(1, 9)},
    }
    return _write(folder, written)


def broken(folder: Path) -> dict[str, Path]:
    """Write one image of each kind that must be refused; returns the paths by file name."""
    pixels = picture()
    return _write(
        folder,
        {
            "empty.jpg": b"",
            "text.jpg": b"these are words, not an image\n",
            "truncated.jpg": jpeg(pixels)[:-400],
            "truncated.png": png(pixels)[:-60],
            "damaged.tif": _damaged_tiff(pixels),
            "bomb.png": bomb(),
        },
    )


def _damaged_tiff(pixels: np.ndarray) -> bytes:
    data = bytearray(_bytes(Image.fromarray(pixels), "TIFF", compression="tiff_adobe_deflate"))
    data[8:24] = bytes(range(240, 256))  # the first strip
    return bytes(data)


def _write(folder: Path, contents: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
