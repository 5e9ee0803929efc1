"""Ray's share: images per second of the embed stage against a plain loop over the same files.

    python benchmarks/embed.py FOLDER --checkpoint squeezenet1_1.pth --size 96 --images 20000

The loop decodes, encodes and writes in one process, with all threads for the network, as one would write it
by hand. The stage does the same through Ray Data, assembles shards, and counts. Both take the same images,
in turn in one run. Rates leave start-up out: for the loop the imports and the network; for the stage what
comes before its first batch. The steady rate is that between 10 and 90 % of the images; the whole rate counts
from the first batch, itself left out, to the manifest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Embed through the pipeline; when how many images were done, and the peak memory."""
    started = time.monotonic()
    from selective_ray import config
    from selective_ray.actors import pipeline
    from selective_ray.progress import Reporter, Watch
    from selective_ray.store import Run

    done = [(0.0, 0)]

    class Noting(Watch):
        def advance(self, units: float) -> None:
            done.append((time.monotonic() - started, done[-1][1] + int(units)))

    class Clock(Reporter):
        @contextmanager
        def stage(self, name: str, total: float, unit: str, so_far: float = 0) -> Iterator[Watch]:
            yield Noting(None, None) if name == "embed" else Watch(None, None)

    options = {
        "embed.encoder": ENCODER,
        "embed.checkpoint": checkpoint,
        "embed.image_size": size,
        "embed.batch": batch,
    }
    settings, asked = config.load(options=options)
    where = Run(str(run))
    pipeline.advance(where, pipeline.Source(images=str(folder)), settings, asked, Clock(), upto="embeddings")
    manifest = where.manifest("embeddings")
    done.append((time.monotonic() - started, manifest.rows))
    results.put((done[1:], manifest.peak_memory_bytes))


def rate(done: list[tuple[float, int]], low: float, high: float) -> float:
    """Images per second between two shares of all images."""
    n = done[-1][1]
    first = next(moment for moment in done if moment[1] >= low * n)
    last = next(moment for moment in done if moment[1] >= high * n)
    return (last[1] - first[1]) / (last[0] - first[0])


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
        many = Path(scratch) / "many"
        many.mkdir()
        for i, uri in enumerate(uris):
            shutil.copyfile(uri, many / f"{i:06d}{Path(uri).suffix}")
        uris = list_images(str(many))["uri"].to_pylist()
        common = (checkpoint, options.size, options.batch)
        threads = multiprocessing.cpu_count()
        for repeat in range(options.repeats):
            plain, imports = timed(plain_loop, uris, *common, threads, str(Path(scratch) / "x.npy"))
            done, memory = timed(stage, many, *common, Path(scratch) / f"run{repeat}")
            loop, steady = len(uris) / plain, rate(done, 0.1, 0.9)
            end, first = done[-1], done[0]
            whole = (end[1] - first[1]) / (end[0] - first[0])
            print(
                f"plain loop, {threads} threads: {loop:.0f} images/s, start-up {imports:.1f} s\n"
                f"embed stage: {steady:.0f} images/s steady, {whole:.0f} whole, start-up {first[0]:.1f} s, "
                f"peak memory in MiB: driver {memory['driver'] / 2**20:.0f}, "
                f"largest worker {memory['largest_worker'] / 2**20:.0f}\n"
                f"ratio {steady / loop:.2f} steady, {whole / loop:.2f} whole",
                flush=True,
            )


if __name__ == "__main__":
    main()
