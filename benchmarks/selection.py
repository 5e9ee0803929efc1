"""The regularized selection: pruned and not, beside an iteration of K-Means; and what weight and scale do.

    python benchmarks/selection.py rounds mixture 1000000 --clusters 1000
    python benchmarks/selection.py rounds embeddings.npy --clusters 1000
    python benchmarks/selection.py growth mixture 10000000 --half --clusters 2000
    python benchmarks/selection.py methods mixture 1000000 --clusters 1000
    python benchmarks/selection.py spread embeddings.npy --clusters 40
    python benchmarks/selection.py scale cifar10.npy --clusters 40

rounds: ten rounds on Ray with two actors, pruned and not; K-Means is stopped after three iterations, and one
with all products is timed on the same actors. spread: mean distance of a pick to the nearest other pick over
20 seeds, at a preset's weight and at weight 0. scale: the share of picks that the regularizer changes on
subsets of 5,000, 15,000 and all rows, in the published unit and scaled. growth: seconds of the rounds and
peak memory where rows are many; densities are then of one probe, and K-Means stops after one iteration.
methods: seconds of usl, k-medoid and prototypes from the same densities and the same clusters.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import tempfile
import time
from pathlib import Path

# One thread a process: actors work side by side.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np
import ray

from selective_ray import assignment, config, density, kmeans, selection
from selective_ray.actors import pipeline
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import Session
from selective_ray.presets import PRESETS
from selective_ray.progress import Reporter
from selective_ray.repulsion import PickedVectors, repulsion_unit
from selective_ray.selection import Candidates
from selective_ray.store import Run

VARIANTS = {
    "defaults": {},
    "all picks": {"selection.horizon_picks": 0},
    "usl-cifar100": {"preset": "usl-cifar100"},
    "usl-imagenet-clip": {"preset": "usl-imagenet-clip"},
}


def select(run: Path, source: Path | str, clusters: int, upto: str, variant: dict, **options) -> Run:
    """Bring a run up to a table, with the density and K-Means of the defaults."""
    preset = PRESETS.get(variant.get("preset"), {}).get("selection", {})
    options = {
        **{f"selection.{key}": value for key, value in preset.items()},
        **{key: value for key, value in variant.items() if key != "preset"},
        "selection.budget": clusters,
        "selection.method": "usl",
        "cluster.iterations": 3,
        "resources.workers": 2,
        **options,
    }
    settings, asked = config.load(options=options, own_embeddings=True)
    where = Run(str(run))
    source = pipeline.Source(embeddings=str(source))
    pipeline.advance(where, source, settings, asked, Reporter(quiet=True), upto=upto)
    return where


def iteration(run: Run, clusters: int) -> float:
    """Seconds of one K-Means iteration with all products, on two actors that hold the rows."""
    with Session(None) as session:
        pool = Pool(run, config.Resources(workers=2), session)
        pool.start()
        pool.all(lambda actor: actor.rows_at.remote(np.arange(2)))
        taken = []
        for seed in range(3):
            rows = np.random.default_rng(seed).choice(
                run.manifest("embeddings").rows, clusters, replace=False
            )
            centroids = ray.put(pool.rows_at(rows)[1])
            start = time.perf_counter()
            pool.all(lambda actor, sent=centroids: actor.kmeans_step.remote(sent, 0, slice(None)))
            taken.append(time.perf_counter() - start)
        pool.stop()
    return min(taken)


def rounds(file: Path, clusters: int, only: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        base = select(Path(folder) / "base", file, clusters, "density", {})
        base = select(Path(folder) / "base", file, clusters, "clusters", {})
        seconds = iteration(base, clusters)
        print(f"one K-Means iteration {seconds:.2f} s", flush=True)
        for name in only:
            for keep in (False, True):
                run = select(
                    *(Path(folder) / f"{name} {keep}", base.uri, clusters, "selection", VARIANTS[name]),
                    **{"selection.keep_utilities": keep},
                )
                noted = run.manifest("selection").summary
                share, taken = noted["distances_computed"], noted["seconds_of_rounds"]
                print(
                    f"{name:<18} pruning {'off' if keep else 'on '} {taken:6.2f} s, {taken / seconds:5.2f} "
                    f"iterations; distances computed {100 * np.mean(share):.2f} %, at most "
                    f"{100 * max(share):.2f} % in a round",
                    flush=True,
                )


def growth(file: Path, clusters: int, half: bool) -> None:
    """Select in a process of its own, so that its peak memory is that of the stage's driver."""
    alone = importlib.import_module("density").alone
    options = {"cluster.iterations": 1, "density.lists": 8192, "density.probes": 1, "density.recall": 0.01}
    options |= {"embed.dtype": "float16"} if half else {}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        for upto in ("density", "clusters", "selection"):
            run = alone(select, Path(folder) / "run", file, clusters, upto, {}, **options)
            manifest = run.manifest(upto)
            peaks = {name: round(value / 2**20) for name, value in manifest.peak_memory_bytes.items()}
            print(upto, f"{manifest.seconds:.1f} s, peak memory in MiB {peaks}", flush=True)
        noted = run.manifest("selection").summary
        share, taken = noted["distances_computed"], noted["seconds_of_rounds"]
        print(
            f"{manifest.rows:,} picks of {run.manifest('embeddings').rows:,} rows: {len(share)} rounds in "
            f"{taken:.2f} s; distances computed {100 * np.mean(share):.2f} %"
        )


def methods(file: Path, clusters: int) -> None:
    """Select by each method in a process of its own; K-Means is run to its end."""
    alone = importlib.import_module("density").alone
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        path, options = Path(folder) / "run", {"cluster.iterations": config.Cluster().iterations}
        # Each stage in a process of its own, so that the seconds of all have Ray's start in them.
        alone(select, path, file, clusters, "density", {}, **options)
        before = alone(select, path, file, clusters, "clusters", {}, **options).manifest("clusters").seconds
        for method in ("usl", "k-medoid", "prototypes"):
            options["selection.method"] = method
            run = alone(select, path, file, clusters, "selection", {}, **options)
            made = run.manifest("selection")
            peaks = {name: round(value / 2**20) for name, value in made.peak_memory_bytes.items()}
            noted = {
                key: made.summary[key] for key in ("passes", "swapped", "mean_cost") if key in made.summary
            }
            print(
                f"{method:<12} clusters {before:.1f} s, select {made.seconds:.1f} s, in all "
                f"{before + made.seconds:.1f} s; peak memory in MiB {peaks} {noted}",
                flush=True,
            )
            shutil.rmtree(path / "selection")


def apart(x: np.ndarray) -> float:
    """Mean distance of a row to the nearest other."""
    products = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(products, -1)
    return float(np.sqrt(np.maximum(2 - 2 * products.max(axis=1), 0)).mean())


def measured(x: np.ndarray, k: int) -> np.ndarray:
    """Mean squared distance of the k nearest, the row itself among them."""
    return np.maximum(faiss.knn(x, x, k)[0], 0).mean(axis=1)


def clustered(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    centroids = x[kmeans.initial_rows(len(x), clusters, seed)]
    how = {"n": len(x), "iterations": 200, "tolerance": 1e-4, "final_assignment": True}
    clustering = kmeans.lloyd(kmeans.Rows(x, np.arange(len(x)), len(x)).step, centroids, **how)
    return assignment.assign(x, clustering.assigned_by)


def picks(x: np.ndarray, sq_dists: np.ndarray, labels: np.ndarray, settings: config.Selection) -> np.ndarray:
    """Rows that are selected."""
    scaled, repulsion = settings.scale == "median", settings.repulsion()
    densities = density.relative(sq_dists, unit=float(np.median(sq_dists)) if scaled else 1.0, floor=1e-6)
    how = {"momentum": settings.momentum, "parameters": repulsion}
    candidates = Candidates(x, np.arange(len(x)), labels, densities, **how)
    return selection.rounds(
        candidates.nominate,
        lambda chosen: PickedVectors(chosen.cluster_ids, chosen.image_ids, x[chosen.image_ids]),
        candidates.repel,
        n_rounds=settings.rounds,
        weight=settings.weight,
        unit=lambda picked: repulsion_unit(picked, repulsion) if scaled else 1.0,
    ).image_ids


def spread(x: np.ndarray, clusters: int, preset: str) -> None:
    values = PRESETS[preset]
    settings = config.Selection(**values["selection"])
    sq_dists = measured(x, values["density"]["k"])
    ours, plain = [], []
    for seed in range(20):
        labels = clustered(x, clusters, seed)
        ours.append(apart(x[picks(x, sq_dists, labels, settings)]))
        plain.append(apart(x[picks(x, sq_dists, labels, settings.model_copy(update={"weight": 0.0}))]))
    ours, plain = np.array(ours), np.array(plain)
    print(
        f"{preset}, {len(x)} rows, {clusters} picks, 20 seeds: nearest other pick at {ours.mean():.4f} "
        f"± {ours.std(ddof=1):.4f}, at weight 0 {plain.mean():.4f} ± {plain.std(ddof=1):.4f}; farther in "
        f"{(ours > plain).sum()} of 20, as far in {(ours == plain).sum()}"
    )


def scale(x: np.ndarray, clusters: int, preset: str) -> None:
    """One weight on growing subsets: that of a preset in its own unit, and that of the defaults."""
    x = x[np.random.default_rng(0).permutation(len(x))]
    published = config.Selection(**PRESETS[preset]["selection"])
    for n in (5_000, 15_000, len(x)):
        sq_dists = measured(x[:n], 20)
        for name, settings in ((preset, published), ("defaults", config.Selection())):
            for unit in ("none", "median"):
                changed, farther = [], []
                for seed in range(5):
                    labels = clustered(x[:n], clusters, seed)
                    used = settings.model_copy(update={"scale": unit})
                    some = picks(x[:n], sq_dists, labels, used)
                    plain = picks(x[:n], sq_dists, labels, used.model_copy(update={"weight": 0.0}))
                    changed.append(100 * np.mean(some != plain))
                    farther.append(apart(x[some]) / apart(x[plain]))
                print(
                    f"{name:<14} n = {n:6} scale {unit:<7} picks changed {np.mean(changed):5.1f} %, nearest "
                    f"other pick {np.mean(farther):.3f} times as far",
                    flush=True,
                )


def rows_of(kind: str, n: int) -> np.ndarray:
    """Rows of the density benchmark, which lies beside this one and is named like a module of the package."""
    return importlib.import_module("density").rows(kind, n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rounds", "growth", "methods", "spread", "scale"))
    parser.add_argument("rows", help="mixture, overlapping, or a .npy file of unit rows")
    parser.add_argument("n", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--variants", nargs="+", default=["defaults"], choices=list(VARIANTS))
    parser.add_argument("--preset", default="usl-cifar10")
    parser.add_argument("--half", action="store_true", help="embeddings as float16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.rows)
        if not file.exists():
            file = Path(folder) / "x.npy"
            np.save(file, rows_of(options.rows, options.n))
        if options.what == "rounds":
            rounds(file, options.clusters, options.variants)
        elif options.what == "growth":
            growth(file, options.clusters, options.half)
        elif options.what == "methods":
            methods(file, options.clusters)
        elif options.what == "spread":
            spread(np.load(file), options.clusters, options.preset)
        else:
            scale(np.load(file), options.clusters, options.preset)


if __name__ == "__main__":
    main()
