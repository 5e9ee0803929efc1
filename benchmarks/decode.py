"""Decoding against plain Pillow: images per second of one thread, and how close the embeddings are.

    python benchmarks/decode.py FOLDER_OR_TAR_OR_PARQUET --checkpoint squeezenet1_1.pth

The plain loop decodes every pixel, converts to RGB, resizes the shorter side and cuts out the center. Both
take the same JPEGs from memory, in turn: as they are, and enlarged here to 500 x 375 and to 12 megapixels at
quality 90. Enlarged images are smooth, and so quicker to unpack than photographs of that size: the third kind
has grain, as cameras give. With a checkpoint the embeddings of both are compared by their cosines. `--margin`
tries other margins than the one in `images.py`; 0 stands for no scaled decoding at all.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from selective_ray import encoders, images

ENCODER = "squeezenet1_1"
ENLARGED = {  # width, height, standard deviation of the grain
    "500 x 375": (500, 375, 0),
    "4000 x 3000": (4000, 3000, 0),
    "4000 x 3000 with grain": (4000, 3000, 5),
}
NEVER = 1e9  # a margin that no image has


def photographs(source: Path) -> Iterator[bytes]:
    """The images in a folder, a tar file, or the binary column of a Parquet file."""
    if source.is_dir():
        yield from map(images.read, images.list_images(str(source))["uri"].to_pylist())
    elif source.suffix == ".tar":
        with tarfile.open(source) as tar:
            for member in tar:
                if member.name.lower().endswith(images.EXTENSIONS):
                    yield tar.extractfile(member).read()
    else:
        for batch in pq.ParquetFile(source).iter_batches(64):
            table = pa.Table.from_batches([batch]).flatten()  # image: {bytes, path} is usual
            column = next(
                field.name for field in table.schema if field.type in (pa.binary(), pa.large_binary())
            )
            yield from table[column].to_pylist()


def enlarged(data: bytes, width: int, height: int, grain: float) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if grain:
        noise = np.random.default_rng(0).normal(0, grain, (height, width, 3)).astype(np.float32)
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def plain(data: bytes, size: int, crop: float) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    shorter = round(size / crop)
    width, height = image.size
    wide, high = max(shorter, shorter * width // height), max(shorter, shorter * height // width)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def timed(decoders: dict[str, Callable[[bytes], np.ndarray]], data: list[bytes], repeats: int) -> dict:
    """Seconds for all images, the least of the repeats, and the pixels of the last."""
    best, pixels = dict.fromkeys(decoders, float("inf")), {}
    for _ in range(repeats):
        for name, decode in decoders.items():
            started = time.perf_counter()
            pixels[name] = [decode(image) for image in data]
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: (best[name], np.stack(pixels[name])) for name in decoders}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--checkpoint", help=f"weights of {ENCODER}")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--large", type=int, default=40, help="how many at 12 megapixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--margin", type=float, nargs="*", default=[images.MARGIN])
    options = parser.parse_args()
    originals = list(islice(photographs(options.source), options.images))
    transform = encoders.transform(ENCODER, options.size)
    size, crop = transform.size, transform.crop
    encode = None
    if options.checkpoint:
        encode = encoders.load(ENCODER, checkpoint=options.checkpoint, image_size=size).encode

    def ours(margin: float) -> Callable[[bytes], np.ndarray]:
        def decode(data: bytes) -> np.ndarray:
            images.MARGIN = margin or NEVER
            return images.decode(data, size=size, crop=crop)

        return decode

    decoders = {"plain": lambda data: plain(data, size, crop)}
    decoders |= {f"margin {margin:g}": ours(margin) for margin in options.margin}
    for title, made in {"as they are": None, **ENLARGED}.items():
        data = originals[: options.large if made and made[0] > 1000 else None]
        if made:
            data = [enlarged(image, *made) for image in data]
        results = timed(decoders, data, options.repeats)
        base, expected = results.pop("plain")
        size_kb, rate = np.mean([len(image) for image in data]) / 1000, len(data) / base
        print(
            f"{title}: {len(data)} images of {size_kb:.0f} KB, plain Pillow {rate:.1f} images/s", flush=True
        )
        reference = encode(expected) if encode else None
        for name, (seconds, pixels) in results.items():
            line = f"  {name}: {len(data) / seconds:.1f} images/s, ratio {base / seconds:.2f}"
            line += f", mean difference {np.abs(pixels.astype(int) - expected).mean():.2f} of 255"
            if encode:
                cosines = (encode(pixels) * reference).sum(axis=1)
                line += f", cosine mean {cosines.mean():.5f}, minimum {cosines.min():.5f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
