"""Ray's share: images per second of the embed stage against a plain loop over the same files.

    python benchmarks/embed.py FOLDER --checkpoint squeezenet1_1.pth --size 96 --images 20000

The loop decodes, encodes and writes in one process, with all threads for the network, as one would write it
by hand. The stage does the same through Ray Data, assembles shards, and counts. Both use the first images
of the folder, in one run after each other, twice. Rates leave start-up out: for the loop the imports and the
network, for the stage everything before its first batch, which is reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

ENCODER = "squeezenet1_1"


def plain_loop(uris: list[str], checkpoint: str, size: int, batch: int, threads: int, out: str) -> None:
    """Decode, encode and write in this process."""
    started = time.monotonic()
    import torch

    from selective_ray import encoders, images

    torch.set_num_threads(threads)
    size, crop = encoders.transform(ENCODER, size)
    encoder = encoders.load(ENCODER, checkpoint=checkpoint, image_size=size)
    encoder.encode(np.zeros((batch, size, size, 3), np.uint8))
    ready = time.monotonic()
    embeddings = np.empty((len(uris), encoder.dimension), np.float32)
    for start in range(0, len(uris), batch):
        pixels, _ = images.read_batch(uris[start : start + batch], size=size, crop=crop)
        embeddings[start : start + batch] = encoder.encode(pixels)
    np.save(out, embeddings)
    done = time.monotonic()
    print(
        f"plain loop, {threads} threads: {len(uris) / (done - ready):.0f} images/s, "
        f"start-up {ready - started:.1f} s",
        flush=True,
    )


def stage(folder: Path, checkpoint: str, size: int, batch: int, run: Path) -> None:
    """Embed through the pipeline, timing its first and last batch."""
    started = time.monotonic()
    from selective_ray import config
    from selective_ray.actors import embeddings, pipeline
    from selective_ray.progress import Reporter
    from selective_ray.store import Run

    moments: list[tuple[float, int]] = []
    events = embeddings._WaveRun.events

    def watched(self, stall_seconds):
        for kind, value in events(self, stall_seconds):
            if kind == "batch":
                moments.append((time.monotonic(), value))
            yield kind, value

    embeddings._WaveRun.events = watched
    options = {
        "embed.encoder": ENCODER,
        "embed.checkpoint": checkpoint,
        "embed.image_size": size,
        "embed.batch": batch,
    }
    settings, asked = config.load(options=options)
    where = Run(str(run))
    pipeline.advance(
        where, pipeline.Source(images=str(folder)), settings, asked, Reporter(), upto="embeddings"
    )
    done = time.monotonic()
    manifest = where.manifest("embeddings")
    # From the first batch that came out to the manifest; the images of that batch are not counted.
    first, early = moments[0]
    rate = (manifest.rows - early) / (done - first)
    print(
        f"embed stage: {rate:.0f} images/s, start-up {first - started:.1f} s, "
        f"peak memory driver {manifest.peak_memory_bytes['driver'] / 2**20:.0f} MiB, "
        f"largest worker {manifest.peak_memory_bytes['largest_worker'] / 2**20:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    checkpoint = str(Path(options.checkpoint).absolute())
    from selective_ray.images import list_images

    uris = list_images(str(options.folder))["uri"].to_pylist()
    uris = [uris[i] for i in np.linspace(0, len(uris) - 1, options.images).astype(int)]
    with tempfile.TemporaryDirectory() as scratch:
        some = Path(scratch) / "images"
        some.mkdir()
        for i, uri in enumerate(uris):
            shutil.copyfile(uri, some / f"{i:06d}{Path(uri).suffix}")
        uris = list_images(str(some))["uri"].to_pylist()
        spawn = multiprocessing.get_context("spawn")
        for repeat in range(options.repeats):
            common = (checkpoint, options.size, options.batch)
            for target, arguments in (
                (plain_loop, (uris, *common, multiprocessing.cpu_count(), str(Path(scratch) / "x.npy"))),
                (stage, (some, *common, Path(scratch) / f"run{repeat}")),
            ):
                process = spawn.Process(target=target, args=arguments)
                process.start()
                process.join()


if __name__ == "__main__":
    main()
