"""A million images: seconds a stage and peak memory, of listing and of embedding tiny images with pca.

    python benchmarks/scale.py keys 10000 1000000      list so many keys of an S3 server
    python benchmarks/scale.py loose 10000 100000      list and embed so many objects of it
    python benchmarks/scale.py archives 10000 1000000  the same images in WebDataset archives, from disk

The server is s3_server.py, whose images follow from their numbers. Each size is a run of its own in a process
of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

PER_ARCHIVE = 10_000
KINDS = 997


def tiny(number: int) -> bytes:
    """A PNG of 8 x 8 pixels, of one of many kinds."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_archives(folder: Path, n: int) -> None:
    bodies = [tiny(number) for number in range(KINDS)]
    for start in range(0, n, PER_ARCHIVE):
        with tarfile.open(folder / f"{start // PER_ARCHIVE:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(start, min(n, start + PER_ARCHIVE)):
                info = tarfile.TarInfo(f"{number:09d}.png")
                info.size = len(bodies[number % KINDS])
                tar.addfile(info, io.BytesIO(bodies[number % KINDS]))


def work(kind: str, source: str, run: str) -> None:
    """List, and unless `keys` embed, in this process; prints what the manifests say."""
    from selective_ray import config, listing
    from selective_ray.actors import images, pipeline
    from selective_ray.actors.session import Session, peak_memory
    from selective_ray.progress import Reporter
    from selective_ray.store import Run

    options = {"embed.encoder": "pca", "embed.image_size": 8, "embed.batch": 256}
    settings, asked = config.load(options=options)
    where, started = Run(run), time.monotonic()
    if kind == "keys":
        where.prepare()
        with Session() as session:
            images.list_source(where, listing.Source(source), settings, session, Reporter())
    else:
        pipeline.advance(
            where, pipeline.Source(images=source), settings, asked, Reporter(), upto="embeddings"
        )
    for table in ("images", "embeddings", "duplicates"):
        if manifest := where.manifest(table):
            memory = {name: round(size / 2**20) for name, size in manifest.peak_memory_bytes.items()}
            print(
                f"  {table}: {manifest.rows:,} rows in {manifest.seconds:.1f} s, "
                f"{manifest.rows / manifest.seconds:,.0f} a second; peak MiB {memory}; "
                f"{json.dumps(manifest.summary)}",
                flush=True,
            )
    print(
        f"  all: {time.monotonic() - started:.1f} s, peak of the driver {peak_memory() / 2**20:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("keys", "loose", "archives"))
    parser.add_argument("sizes", type=int, nargs="+")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for n in options.sizes:
        print(f"{options.kind}, {n:,}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            server = None
            if options.kind == "archives":
                source = f"{scratch}/archives"
                Path(source).mkdir()
                make_archives(Path(source), n)
            else:
                script = Path(__file__).with_name("s3_server.py")
                command = [sys.executable, script, "--port", "0", "--keys", str(n)]
                server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                os.environ |= {
                    "AWS_ACCESS_KEY_ID": "access",
                    "AWS_SECRET_ACCESS_KEY": "secret",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
                }
                source = "s3://images"
            try:
                process = spawn.Process(target=work, args=(options.kind, source, f"{scratch}/run"))
                process.start()
                process.join()
            finally:
                if server:
                    server.kill()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
