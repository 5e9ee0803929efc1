"""The density stage against FAISS, on the same rows, cores and machine.

    python benchmarks/density.py peers mixture 1000000          # FAISS IVFFlat at its best, and brute force
    python benchmarks/density.py peers overlapping 1000000
    python benchmarks/density.py growth mixture 100000 300000 1000000 3000000
    python benchmarks/density.py growth mixture 10000000 --half
    python benchmarks/density.py exact embeddings.npy --k 400    # beside FAISS's brute force; or --mode ivf
    python benchmarks/density.py plan 512 50000000 1000000000

mixture: 3,000 blobs of equal size, noise 0.9 in every direction. overlapping: 300 blobs of 16 dimensions
each, sizes by Zipf's law, closer to embeddings of images. d = 128, k = 20. FAISS's lists and probes are those
of a sweep with the shortest time in all (training, adding, searching all rows) at a recall of 0.99 or more.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np

from selective_ray import config, ivf
from selective_ray.actors import pipeline
from selective_ray.progress import Reporter
from selective_ray.store import Run

D, K, THREADS = 128, 20, 2
SWEEP = (1024, 2048, 4096)
# Queries by which a setting of FAISS is judged; the best one then searches all rows.
TRIED = 20_000


def rows(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.empty((n, D), np.float32)
    if kind == "mixture":
        centers = rng.standard_normal((3000, D), dtype=np.float32)
    else:
        centers = rng.standard_normal((300, D), dtype=np.float32) * np.float32(0.7)
        bases = rng.standard_normal((300, 16, D), dtype=np.float32) / 4
        share = 1 / np.arange(1, 301)
        share /= share.sum()
    for start in range(0, n, 100_000):
        part = x[start : start + 100_000]
        if kind == "mixture":
            part[:] = centers[rng.integers(0, 3000, len(part))]
            part += np.float32(0.9) * rng.standard_normal(part.shape, dtype=np.float32)
        else:
            blob = rng.choice(300, len(part), p=share)
            inside = rng.standard_normal((len(part), 16), dtype=np.float32)
            for b in np.unique(blob):
                part[blob == b] = centers[b] + inside[blob == b] @ bases[b]
            part += np.float32(0.1) * rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return x


def product_rate() -> float:
    """Products of D numbers a second, by one matrix product of all threads that numpy has."""
    a, b = (np.random.default_rng(i).random((2048, D), np.float32) for i in range(2))
    out = np.empty((2048, 2048), np.float32)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        np.matmul(a, b.T, out=out)
        best = min(best, time.perf_counter() - start)
    return out.size / best


def stage(file: Path, **options) -> dict:
    """Run the whole stage in a process and a Ray of its own, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        alone(advance, file, folder, "embeddings", **options)
        return alone(advance, file, folder, "density", **options)


def alone(function, *arguments, **options):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(function, *arguments, **options).result()


def advance(file: Path, folder: str, upto: str, *, k: int = K, half: bool = False, **options) -> dict:
    """Bring a run as far as a table here; returns its figures, and its seconds with Ray's start."""
    options = {"density.k": k, **{key.replace("__", "."): value for key, value in options.items()}}
    options |= {"embed.dtype": "float16"} if half else {}
    settings, asked = config.load(options=options, own_embeddings=True)
    run, source = Run(folder + "/run"), pipeline.Source(embeddings=str(file))
    start = time.perf_counter()
    pipeline.advance(run, source, settings, asked, Reporter(quiet=True), upto=upto)
    seconds = time.perf_counter() - start
    manifest = run.manifest(upto)
    peaks = {name: round(value / 2**20) for name, value in manifest.peak_memory_bytes.items()}
    return {
        "seconds": round(seconds, 1),
        "stage": round(manifest.seconds, 1),
        "peak_mib": peaks,
        **manifest.summary,
    }


def faiss_at_its_best(x: np.ndarray) -> dict:
    faiss.omp_set_num_threads(THREADS)
    n = len(x)
    chosen = np.random.default_rng(1).choice(n, 2000, replace=False)
    start = time.perf_counter()
    exact = faiss.knn(x[chosen], x, K)[0]
    brute = (time.perf_counter() - start) * n / len(chosen)
    tried = []
    for lists in SWEEP:
        start = time.perf_counter()
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, lists)
        index.train(x)
        index.add(x)
        built = time.perf_counter() - start
        for probes in (1, 2, 4, 8, 16, 32, 64, 128):
            index.nprobe = probes
            found = index.search(x[chosen], K)[0]
            recall = float((found[:, 1:] <= exact[:, -1:] + 1e-6).mean())
            start = time.perf_counter()
            index.search(x[:TRIED], K)
            seconds = built + (time.perf_counter() - start) * n / TRIED
            tried.append(
                {"lists": lists, "probes": probes, "recall": round(recall, 4), "built": round(built, 1)}
            )
            tried[-1]["in_all"] = round(seconds, 1)
            print(json.dumps(tried[-1]), flush=True)
            if recall >= 0.99 or seconds > 4 * min(
                [t["in_all"] for t in tried if t["recall"] >= 0.99] or [1e9]
            ):
                break
    best = min((t for t in tried if t["recall"] >= 0.99), key=lambda t: t["in_all"])
    return {**best, "brute_force_in_all": round(brute)}


def peers(arguments: argparse.Namespace, folder: Path) -> None:
    (n,) = arguments.rows
    x = rows(arguments.kind, n)
    np.save(folder / "x.npy", x)
    print("products of 128 numbers a second:", f"{(rate := product_rate()):.3g}")
    ours = stage(folder / "x.npy")
    print("ours", json.dumps(ours), flush=True)
    best = faiss_at_its_best(x)
    print("faiss", json.dumps(best))
    share = ours["products"] / ours["phases"]["joining"] / rate
    print(
        f"ratio {best['in_all'] / ours['seconds']:.2f} to FAISS IVFFlat, "
        f"{best['brute_force_in_all'] / ours['seconds']:.1f} to brute force; "
        f"{share:.2f} of the machine's rate of products while joining"
    )


def growth(arguments: argparse.Namespace, folder: Path) -> None:
    seconds = []
    for n in arguments.rows:
        np.save(folder / "x.npy", rows(arguments.kind, n))
        found = stage(folder / "x.npy", half=arguments.half)
        seconds.append(found["seconds"])
        print(n, json.dumps(found), flush=True)
    if len(seconds) > 1:
        slope = np.polyfit(np.log(arguments.rows), np.log(seconds), 1)[0]
        print(f"seconds grow as n^{slope:.2f}")


def plan(arguments: argparse.Namespace, folder: Path) -> None:
    """What a plan says of sizes that no run here reaches, as a table; float32, GPUs and networks as told."""
    d = int(arguments.kind)
    print(
        "| images | GPUs | lists | probes | groups | GB a worker | products, min "
        "| network, min, rows fetched once | rows fetched for each group |"
    )
    print("| ---: " * 9 + "|")
    for n in arguments.rows:
        for workers in arguments.workers:
            made = replace(ivf.plan(n, d, K), workers=workers)
            fetched, moved = made.fetched_bytes(4), made.moved_bytes(4)
            seconds = made.products / (workers * arguments.rate)
            wires = workers * arguments.network
            held = made.holder_bytes(-(-n // workers), workers)
            print(
                f"| {n:,} | {workers} | {made.lists:,} | {made.probes} | {made.groups} | {held / 1e9:.1f} "
                f"| {seconds / 60:.1f} | {moved * (1 + workers) / wires / 60:.1f} "
                f"| {fetched / wires / 60:.0f} ({fetched / 1e12:.1f} TB) |"
            )


def exact(arguments: argparse.Namespace, folder: Path) -> None:
    x = np.load(arguments.kind).astype(np.float32)
    np.save(folder / "x.npy", x)
    faiss.omp_set_num_threads(THREADS)
    ours = stage(folder / "x.npy", k=arguments.k, density__mode=arguments.mode)
    start = time.perf_counter()
    faiss.knn(x, x, arguments.k)
    peer = time.perf_counter() - start
    print(json.dumps(ours))
    print(
        f"FAISS brute force {peer:.1f} s; the stage {ours['seconds']} s, of which joining "
        f"{ours['phases']['joining']} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("peers", "growth", "exact", "plan"))
    parser.add_argument("kind", help="mixture, overlapping, a .npy file, or for a plan d")
    parser.add_argument("rows", type=int, nargs="*")
    parser.add_argument("--half", action="store_true", help="embeddings as float16")
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--mode", default="exact", help="that of the stage, beside FAISS's brute force")
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 64], help="of a plan")
    parser.add_argument("--rate", type=float, default=3e10, help="products a second of a worker")
    parser.add_argument("--network", type=float, default=1.25e9, help="bytes a second of a worker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        modes = {"peers": peers, "growth": growth, "exact": exact, "plan": plan}
        modes[arguments.what](arguments, Path(place))
