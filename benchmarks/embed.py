"""Ray's share: images per second of the embed stage against a plain loop and a torch DataLoader.

    python benchmarks/embed.py FOLDER --checkpoint squeezenet1_1.pth --size 96 --images 20000
    python benchmarks/embed.py FOLDER … --from loose       the same as objects of an S3 server (s3_server.py)
    python benchmarks/embed.py FOLDER … --from archives    the same as WebDataset archives on it

The loop reads, decodes and encodes in one process, with all threads for the network, as one would write it by
hand; the DataLoader reads and decodes in two workers beside it. The stage does the same through Ray Data,
assembles shards, and counts. All take the same images, in turn in one run, with the same code to read and to
decode. Rates leave start-up out: for the peers the imports, the network and the first batch, for the stage
what comes before its first batch. The steady rate is that between 10 and 90 % of the images; the whole rate
counts from the first batch, itself left out, to the manifest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

ENCODER = "squeezenet1_1"
PER_ARCHIVE = 1_000
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "access",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def rows_of(source: str):
    """List a source in this process."""
    import pyarrow as pa

    from selective_ray import listing

    chosen = listing.Source(source)
    tasks, parts = [listing.first_task(chosen)], []
    while tasks:
        for found in listing.expand(tasks.pop(), chosen):
            tasks += found.tasks
            parts += [found.rows] if found.rows else []
    return pa.concat_tables(parts).sort_by("uri")


def encoder_of(checkpoint: str, size: int, batch: int, threads: int):
    import torch

    from selective_ray import encoders

    torch.set_num_threads(threads)
    encoder = encoders.load(ENCODER, checkpoint=checkpoint, image_size=size)
    encoder.encode(np.zeros((batch, size, size, 3), np.uint8))
    return encoder


class Noted:
    """Embeddings as they come, and when how many were done."""

    def __init__(self, n: int, dimension: int) -> None:
        self.x = np.empty((n, dimension), np.float32)
        self.done: list[tuple[float, int]] = []

    def add(self, x: np.ndarray) -> None:
        start = self.done[-1][1] if self.done else 0
        self.x[start : start + len(x)] = x
        self.done.append((time.monotonic(), start + len(x)))


class Decoded:
    """Batches of images, read and decoded as they are asked for."""

    def __init__(self, rows, size: int, crop: float, batch: int) -> None:
        self.rows, self.size, self.crop, self.batch = rows, size, crop, batch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, i: int) -> np.ndarray:
        from selective_ray import images, reading

        bodies = reading.fetch(self.rows.slice(i * self.batch, self.batch))
        return np.stack([images.decode(data, size=self.size, crop=self.crop) for data in bodies])


def by_hand(
    source: str,
    checkpoint: str,
    size: int,
    batch: int,
    threads: int,
    workers: int,
    out: str,
    results: Queue,
) -> None:
    """Encode and write in this process what it reads and decodes itself, or workers of a DataLoader do."""
    started = time.monotonic()
    from torch.utils.data import DataLoader

    from selective_ray import encoders

    rows = rows_of(source)
    encoder = encoder_of(checkpoint, size, batch, threads)
    noted = Noted(len(rows), encoder.dimension)
    batches = Decoded(rows, size, encoders.transform(ENCODER, size).crop, batch)
    if workers:
        # Batched by the dataset; its arrays come as tensors through shared memory.
        loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="spawn")
    else:
        loader = (batches[i] for i in range(len(batches)))
    for pixels in loader:
        noted.add(encoder.encode(np.asarray(pixels)))
    np.save(out, noted.x)
    noted.done.append((time.monotonic(), len(rows)))
    results.put([(moment - started, n) for moment, n in noted.done])


def stage(source: str, checkpoint: str, size: int, batch: int, run: str, results: Queue) -> None:
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
    where = Run(run)
    pipeline.advance(where, pipeline.Source(images=source), settings, asked, Clock(), upto="embeddings")
    manifest = where.manifest("embeddings")
    done.append((time.monotonic() - started, manifest.rows))
    results.put((done[1:], manifest.peak_memory_bytes))


def rate(done: list[tuple[float, int]], low: float, high: float) -> float:
    """Images per second between two shares of all images."""
    n = done[-1][1]
    first = next(moment for moment in done if moment[1] >= low * n)
    last = next(moment for moment in reversed(done) if moment[1] <= high * n) if high < 1 else done[-1]
    return (last[1] - first[1]) / (last[0] - first[0])


def lay_out(files: list[str], folder: Path, archives: bool) -> None:
    """Copy images into a folder, a thousand a subfolder, or pack them a thousand an archive."""
    for start in range(0, len(files), PER_ARCHIVE):
        some = files[start : start + PER_ARCHIVE]
        name = f"{start // PER_ARCHIVE:04d}"
        if archives:
            with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
                for i, file in enumerate(some):
                    tar.add(file, f"{i:06d}{Path(file).suffix}")
            continue
        (folder / name).mkdir()
        for i, file in enumerate(some):
            shutil.copyfile(file, folder / name / f"{i:06d}{Path(file).suffix}")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as a bucket; yields its URI."""
    command = [sys.executable, Path(__file__).with_name("s3_server.py"), "--port", "0", "--folder", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": process.stdout.readline().strip()}
            yield "s3://images"
        finally:
            process.kill()


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
    parser.add_argument("--from", dest="place", choices=("folder", "loose", "archives"), default="folder")
    options = parser.parse_args()
    checkpoint = str(Path(options.checkpoint).absolute())
    files = rows_of(str(options.folder))["uri"].to_pylist()
    files = [files[i] for i in np.linspace(0, len(files) - 1, options.images).astype(int)]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()

    def timed(target, *arguments):
        process = spawn.Process(target=target, args=(*arguments, results))
        process.start()
        answer = results.get()
        process.join()
        return answer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        lay_out(files, folder, options.place == "archives")
        remote = (
            served(folder) if options.place != "folder" else contextmanager(lambda: iter([str(folder)]))()
        )
        with remote as source:
            common = (source, checkpoint, options.size, options.batch)
            threads = multiprocessing.cpu_count()
            for repeat in range(options.repeats):
                rates = {}
                for peer, workers in (("plain loop", 0), ("DataLoader, 2 workers", 2)):
                    done = timed(by_hand, *common, threads, workers, str(Path(scratch) / "x.npy"))
                    rates[peer] = rate(done, 0.1, 0.9)
                    print(
                        f"{peer}, {threads} threads: {rates[peer]:.0f} images/s steady, "
                        f"{rate(done, 0, 1):.0f} whole, start-up {done[0][0]:.1f} s",
                        flush=True,
                    )
                done, memory = timed(stage, *common, str(Path(scratch) / f"run{repeat}"))
                steady, whole = rate(done, 0.1, 0.9), rate(done, 0, 1)
                best = max(rates.values())
                print(
                    f"embed stage: {steady:.0f} images/s steady, {whole:.0f} whole, "
                    f"start-up {done[0][0]:.1f} s, "
                    f"peak memory in MiB: driver {memory['driver'] / 2**20:.0f}, "
                    f"largest worker {memory['largest_worker'] / 2**20:.0f}\n"
                    f"ratio to the better one {steady / best:.2f} steady",
                    flush=True,
                )


if __name__ == "__main__":
    main()
