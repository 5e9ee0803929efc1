"""The regularized selection: pruned and not, beside an iteration of K-Means; and what weight and scale do.

    python benchmarks/selection.py rounds mixture 1000000 --clusters 1000
    python benchmarks/selection.py rounds embeddings.npy --clusters 1000
    python benchmarks/selection.py spread embeddings.npy --clusters 40
    python benchmarks/selection.py scale cifar10.npy --clusters 40

rounds: ten rounds on Ray with two actors, pruned and not; K-Means is stopped after three iterations, and one
with all products is timed on the same actors. spread: mean distance of a pick to the nearest other pick over
20 seeds, at a preset's weight and at weight 0. scale: the share of picks that the regularizer changes on
subsets of 5,000, 15,000 and all rows, in the published unit and scaled.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

# One thread a process: actors work side by side.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import density as rows_of
import numpy as np
import ray

import selective_ray
from selective_ray import config
from selective_ray.actors import pipeline
from selective_ray.actors.session import Session
from selective_ray.actors.shards import Pool
from selective_ray.progress import Reporter
from selective_ray.store import Run

VARIANTS = {
    "defaults": {},
    "all picks": {"selection.horizon_picks": 0},
    "usl-cifar100": {"preset": "usl-cifar100"},
    "usl-imagenet-clip": {"preset": "usl-imagenet-clip"},
}


def select(run: Path, source: Path | str, clusters: int, upto: str, variant: dict, **options) -> Run:
    """Bring a run up to a table, with the density and K-Means of the defaults."""
    preset = config.PRESETS.get(variant.get("preset"), {}).get("selection", {})
    options = {
        **{f"selection.{key}": value for key, value in preset.items()},
        **{key: value for key, value in variant.items() if key != "preset"},
        "selection.budget": clusters,
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
        pool = Pool(run, 2, session)
        pool.start()
        pool.all(lambda actor: actor.rows_at.remote(np.arange(2)))
        taken = []
        for seed in range(3):
            rows = np.random.default_rng(seed).choice(
                run.manifest("embeddings").rows, clusters, replace=False
            )
            centroids = ray.put(pool.rows_at(rows)[1])
            start = time.perf_counter()
            pool.all(lambda actor, sent=centroids: actor.kmeans_step.remote(sent, 0))
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


def apart(x: np.ndarray) -> float:
    """Mean distance of a row to the nearest other."""
    products = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(products, -1)
    return float(np.sqrt(np.maximum(2 - 2 * products.max(axis=1), 0)).mean())


def spread(x: np.ndarray, clusters: int, preset: str) -> None:
    found = {}
    for weight in (None, 0.0):
        settings = {} if weight is None else {"selection.weight": weight}
        found[weight] = []
        for seed in range(20):
            chosen = selective_ray.select(x, clusters, preset=preset, seed=seed, settings=settings)
            found[weight].append(apart(x[chosen.rows]))
    ours, none = np.array(found[None]), np.array(found[0.0])
    print(
        f"{preset}, {len(x)} rows, {clusters} picks, 20 seeds: nearest other pick at {ours.mean():.4f} "
        f"± {ours.std(ddof=1):.4f}, at weight 0 {none.mean():.4f} ± {none.std(ddof=1):.4f}; farther in "
        f"{(ours > none).sum()} of 20"
    )


def scale(x: np.ndarray, clusters: int, presets: list[str]) -> None:
    x = x[np.random.default_rng(0).permutation(len(x))]
    for n in (5_000, 15_000, len(x)):
        for name in presets:
            for scaled in ("none", "median"):
                changed, distances = [], []
                for seed in range(3):
                    settings = {"selection.scale": scaled, "density.k": 20}
                    some = selective_ray.select(x[:n], clusters, preset=name, seed=seed, settings=settings)
                    settings["selection.weight"] = 0.0
                    plain = selective_ray.select(x[:n], clusters, preset=name, seed=seed, settings=settings)
                    changed.append(np.mean(some.rows != plain.rows))
                    distances.append(apart(x[some.rows]) / apart(x[plain.rows]))
                share = 100 * np.mean(changed)
                print(
                    f"{name or 'defaults':<14} n = {n:6} scale {scaled:<7} picks changed {share:5.1f} "
                    f"%, nearest other pick {np.mean(distances):.3f} times as far",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rounds", "spread", "scale"))
    parser.add_argument("rows", help="mixture, overlapping, or a .npy file of unit rows")
    parser.add_argument("n", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--variants", nargs="+", default=["defaults"], choices=list(VARIANTS))
    parser.add_argument("--preset", default="usl-cifar10")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.rows)
        if not file.exists():
            file = Path(folder) / "x.npy"
            np.save(file, rows_of.rows(options.rows, options.n))
        if options.what == "rounds":
            rounds(file, options.clusters, options.variants)
        elif options.what == "spread":
            spread(np.load(file), options.clusters, options.preset)
        else:
            scale(np.load(file), options.clusters, [None, options.preset])


if __name__ == "__main__":
    main()
