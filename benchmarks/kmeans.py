"""The cluster stage against FAISS and scikit-learn, on the same rows, start, iterations, cores and machine.

    python benchmarks/kmeans.py peers mixture 1000000 --clusters 1000 --iterations 100
    python benchmarks/kmeans.py peers mixture 1000000 --clusters 10000 --iterations 20
    python benchmarks/kmeans.py peers embeddings.npy --clusters 1000 --iterations 100 --scikit
    python benchmarks/kmeans.py levels mixture 300000 --clusters 5000
    python benchmarks/kmeans.py growth mixture 1000000 3000000 --clusters 2000 --iterations 5 --half
    python benchmarks/kmeans.py gpu random 5000000 --clusters 10000

mixture: 3,000 blobs of equal size, noise 0.9 in every direction; overlapping: `density.py` says. No
subsampling on either side. The stage counts from before Ray's start to its manifest; the others from rows in
memory on, and without a last assignment. `faiss.SuperKmeans` takes no start, so it draws its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from density import alone, product_rate, rows

from selective_ray import config, kmeans
from selective_ray.actors import pipeline
from selective_ray.progress import Reporter
from selective_ray.store import Run

THREADS = 2


def stage(file: Path, m: int, **how) -> dict:
    """Run the whole stage in a Ray of its own; returns its figures, and its seconds with Ray's start.

    In two processes, so that the peak memory of the second is that of the stage's driver.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        alone(advance, file, folder, m, "embeddings", **how)
        return alone(advance, file, folder, m, "clusters", **how)


def advance(file: Path, folder: str, m: int, upto: str, *, half: bool = False, **cluster) -> dict:
    """Bring a run as far as a table; returns figures, with the seconds of this call."""
    options = {"selection.budget": m, **{f"cluster.{key}": value for key, value in cluster.items()}}
    options |= {"embed.dtype": "float16"} if half else {}
    settings, asked = config.load(options=options, own_embeddings=True)
    run, source = Run(folder + "/run"), pipeline.Source(embeddings=str(file))
    start = time.perf_counter()
    pipeline.advance(run, source, settings, asked, Reporter(quiet=True), upto=upto)
    seconds = time.perf_counter() - start
    manifest = run.manifest(upto)
    peaks = {name: round(value / 2**20) for name, value in manifest.peak_memory_bytes.items()}
    return {"seconds": round(seconds, 1), "peak_mib": peaks, **manifest.summary}


def shown(found: dict) -> str:
    history = found["history"]
    short = {key: value for key, value in found.items() if key != "history"}
    some = {key: [float(f"{value:.3g}") for value in values[:8]] for key, values in history.items()}
    return json.dumps({**short, "first": some})


def by_faiss(x: np.ndarray, start: np.ndarray, iterations: int, kind: type = faiss.Kmeans) -> dict:
    faiss.omp_set_num_threads(THREADS)
    whole = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}
    found = kind(x.shape[1], len(start), niter=iterations, **whole)
    begun = time.perf_counter()
    found.train(x, **({"init_centroids": start} if kind is faiss.Kmeans else {}))
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 1),
        "iterations": len(found.obj),
        "mean_sq_dist_to_centroid": float(found.obj[-1]) / len(x),
    }


def by_scikit(x: np.ndarray, start: np.ndarray, iterations: int) -> dict:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    begun = time.perf_counter()
    with threadpool_limits(THREADS):
        found = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 1),
        "iterations": found.n_iter_,
        "mean_sq_dist_to_centroid": found.inertia_ / len(x),
    }


def read(kind: str, n: int | None) -> np.ndarray:
    if not kind.endswith(".npy"):
        return rows(kind, n)
    x = np.load(kind, mmap_mode="r")[:n].astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def peers(arguments: argparse.Namespace, folder: Path) -> None:
    x = read(arguments.kind, arguments.rows[0] if arguments.rows else None)
    n, m, iterations = len(x), arguments.clusters, arguments.iterations
    np.save(folder / "x.npy", x)
    rate = product_rate() * 128 / x.shape[1]
    print(f"products of {x.shape[1]} numbers a second: {rate:.3g}", flush=True)
    ours = stage(folder / "x.npy", m, iterations=iterations, tolerance=0.0, final_assignment=False)
    print("the stage", shown(ours), flush=True)
    first = n * m / ours["history"]["seconds"][0] / rate
    print(f"first iteration: {first:.2f} of the rate of products", flush=True)
    start = x[kmeans.initial_rows(n, m, 0)]
    others = {"faiss.Kmeans": lambda: by_faiss(x, start, iterations)}
    if arguments.super:
        others["faiss.SuperKmeans"] = lambda: by_faiss(x, start, iterations, faiss.SuperKmeans)
    if arguments.scikit:
        others["scikit-learn"] = lambda: by_scikit(x, start, iterations)
    for name, run in others.items():
        found = run()
        ratio = found["seconds"] / ours["seconds"]
        print(name, json.dumps(found), f"ratio {ratio:.2f}", flush=True)


def levels(arguments: argparse.Namespace, folder: Path) -> None:
    """Two levels and Lloyd's loop alone, where both are possible."""
    (n,) = arguments.rows
    np.save(folder / "x.npy", read(arguments.kind, n))
    m = arguments.clusters
    two = stage(folder / "x.npy", m, two_level=2)
    plain = stage(folder / "x.npy", m, iterations=arguments.iterations)
    print("two levels", shown(two))
    print("one", shown(plain))
    ratio = two["mean_sq_dist_to_centroid"] / plain["mean_sq_dist_to_centroid"]
    print(f"objective {ratio:.4f} of that of Lloyd's loop, seconds {two['seconds'] / plain['seconds']:.2f}")


def growth(arguments: argparse.Namespace, folder: Path) -> None:
    how = {"iterations": arguments.iterations, "tolerance": 0.0, "half": arguments.half}
    for n in arguments.rows:
        np.save(folder / "x.npy", read(arguments.kind, n))
        found = stage(folder / "x.npy", arguments.clusters, **how)
        seconds = found["history"]["seconds"]
        print(n, "seconds an iteration", [round(one, 1) for one in seconds], shown(found), flush=True)


def gpu(arguments: argparse.Namespace, folder: Path) -> None:
    """One full iteration's assignment on a GPU, as a share of its rate of matrix products (TF32)."""
    import torch

    from selective_ray.assignment_torch import AssignmentOnDevice

    (n,), m, d = arguments.rows, arguments.clusters, arguments.dimensions
    torch.set_float32_matmul_precision("high")
    a, b = (torch.randn(16384, d, device="cuda") for _ in range(2))
    rates = []
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b.T
        torch.cuda.synchronize()
        rates.append(16384**2 / (time.perf_counter() - begun))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assignment = AssignmentOnDevice(x, "cuda")
    # A first one, so that libraries are loaded.
    assignment.assign(x[:m])
    begun = time.perf_counter()
    assignment.assign(-x[:m])
    seconds = time.perf_counter() - begun
    print(f"{seconds:.2f} s, {n * m / seconds / max(rates):.2f} of {max(rates):.3g} products of {d} a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("peers", "levels", "growth", "gpu"))
    parser.add_argument("kind", help="mixture, overlapping, or a .npy file")
    parser.add_argument("rows", type=int, nargs="*")
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--dimensions", type=int, default=512, help="of gpu")
    parser.add_argument("--half", action="store_true", help="embeddings as float16")
    parser.add_argument("--super", action="store_true", help="faiss.SuperKmeans, too")
    parser.add_argument("--scikit", action="store_true", help="scikit-learn's KMeans, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ways = {"peers": peers, "levels": levels, "growth": growth, "gpu": gpu}
        ways[arguments.what](arguments, Path(place))
