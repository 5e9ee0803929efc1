"""Ray's share: images per second of the embed stage against a plain loop over the same files.

    python benchmarks/embed.py FOLDER --checkpoint squeezenet1_1.pth --size 96 --images 20000

The loop decodes, encodes and writes in one process, with all threads for the network, as one would write it
by hand. The stage does the same through Ray Data, assembles shards, and counts. Both take the same images,
in turn in one run. Rates leave start-up out: for the loop the imports and the network; for the stage what two
batches take in all, from the import to the manifest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

ENCODER = "squeezenet1_1"


def plain_loop(
    uris: list[str], checkpoint: str, size: int, batch: int, threads: int, out: str, results: Queue
) -> None:
    """Decode, encode and write in this process; the seconds of that, and of what comes before."""
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
    results.put((time.monotonic() - ready, ready - started))


def stage(folder: Path, checkpoint: str, size: int, batch: int, run: Path, results: Queue) -> None:
    """Embed through the pipeline, from the import to the manifest."""
    started = time.monotonic()
    from selective_ray import config
    from selective_ray.actors import pipeline
    from selective_ray.progress import Reporter
    from selective_ray.store import Run

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
    manifest = where.manifest("embeddings")
    results.put((time.monotonic() - started, manifest.rows, manifest.peak_memory_bytes))


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
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()

    def timed(target, *arguments):
        process = spawn.Process(target=target, args=(*arguments, results))
        process.start()
        answer = results.get()
        process.join()
        return answer

    with tempfile.TemporaryDirectory() as scratch:
        many, few = Path(scratch) / "many", Path(scratch) / "few"
        many.mkdir()
        few.mkdir()
        for i, uri in enumerate(uris):
            shutil.copyfile(uri, many / f"{i:06d}{Path(uri).suffix}")
            if i < 2 * options.batch:
                shutil.copyfile(uri, few / f"{i:06d}{Path(uri).suffix}")
        uris = list_images(str(many))["uri"].to_pylist()
        common = (checkpoint, options.size, options.batch)
        threads = multiprocessing.cpu_count()
        for repeat in range(options.repeats):
            plain, imports = timed(plain_loop, uris, *common, threads, str(Path(scratch) / "x.npy"))
            start_up, rows, _ = timed(stage, few, *common, Path(scratch) / f"few{repeat}")
            total, n, memory = timed(stage, many, *common, Path(scratch) / f"many{repeat}")
            loop, ours = len(uris) / plain, (n - rows) / (total - start_up)
            print(
                f"plain loop, {threads} threads: {loop:.0f} images/s, start-up {imports:.1f} s\n"
                f"embed stage: {ours:.0f} images/s, start-up {start_up:.1f} s, peak memory in MiB: driver "
                f"{memory['driver'] / 2**20:.0f}, largest worker {memory['largest_worker'] / 2**20:.0f}\n"
                f"ratio {ours / loop:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
