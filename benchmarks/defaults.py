"""Why the defaults of [selection] are what they are: labels that picks give, for weights, exponents, windows.

    python benchmarks/defaults.py RUN [RUN …] --rows 8000 --seeds 10

A RUN is a finished one over images whose folder names their class (the labels are used here only). For each
budget and variant: accuracy of a nearest-neighbor classifier on the picks, classes found, and the spread of
class counts, as mean and standard deviation over seeds of K-Means; random draws of the same size beside.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import faiss
import numpy as np

from selective_ray import assignment, density, kmeans, neighbors, selection
from selective_ray.repulsion import PickedVectors, Repulsion, repulsion_unit
from selective_ray.selection import Candidates
from selective_ray.store import Run


def load(uri: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a seeded sample of a run's embeddings, and the classes that their folders name."""
    run = Run(uri)
    shards = range(len(run.manifest("embeddings").shards))
    x = np.concatenate([run.read_embeddings(shard)[1] for shard in shards])
    names: list[str] = []
    for shard in shards:
        out = set(run.read_shard("rejected", shard)["image_id"].to_pylist())
        images = run.read_shard("images", shard, ["image_id", "uri"]).to_pylist()
        names += [Path(image["uri"]).parent.name for image in images if image["image_id"] not in out]
    chosen = np.random.default_rng(0).permutation(len(x))[:rows]
    return x[chosen], np.unique(names, return_inverse=True)[1][chosen]


def judge(x: np.ndarray, labels: np.ndarray, picks: np.ndarray) -> tuple[float, int, float]:
    rest = np.setdiff1d(np.arange(len(x)), picks)
    _, nearest = faiss.knn(x[rest], np.ascontiguousarray(x[picks]), 1)
    accuracy = 100 * (labels[picks][nearest[:, 0]] == labels[rest]).mean()
    counts = np.bincount(labels[picks], minlength=labels.max() + 1)
    return accuracy, np.count_nonzero(counts), counts.std()


def say(name: str, results: list[tuple[float, int, float]]) -> None:
    accuracy, classes, spread = np.array(results).T
    print(
        f"  {name:<28} accuracy {accuracy.mean():5.2f} ± {accuracy.std(ddof=1):4.2f}  "
        f"classes {classes.mean():4.1f}  spread {spread.mean():4.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budgets", type=int, nargs="+", default=[20, 40, 100])
    options = parser.parse_args()
    variants = [(0.0, 1.0, 0), *itertools.product((0.5, 1.0, 2.0, 3.0, 5.0), (0.5, 1.0), (0, 8, 16, 32))]
    for uri in options.runs:
        x, labels = load(uri, options.rows)
        n = len(x)
        ids = np.arange(n)
        sq_dists = density.sq_dists_of(neighbors.neighbors(x, [(ids, x)], 20), k=20, estimator="mean")
        densities = density.relative(sq_dists, unit=float(np.median(sq_dists)), floor=1e-6)
        for m in options.budgets:
            print(f"{Path(uri).name}, {n} images, budget {m}")
            draws = [np.random.default_rng(seed).choice(n, m, replace=False) for seed in range(40)]
            say("random", [judge(x, labels, draw) for draw in draws])
            results: dict[tuple, list] = {variant: [] for variant in variants}
            for seed in range(options.seeds):
                clustering = kmeans.lloyd(
                    kmeans.Rows(x, ids, n).step,
                    x[kmeans.initial_rows(n, m, seed)],
                    n=n,
                    iterations=100,
                    tolerance=1e-4,
                    final_assignment=True,
                )
                clusters = assignment.assign(x, clustering.assigned_by)
                for weight, alpha, window in variants:
                    repulsion = Repulsion(alpha, 0.0, window, True)
                    candidates = Candidates(x, ids, clusters, densities, momentum=0.9, parameters=repulsion)
                    picks = selection.rounds(
                        candidates.nominate,
                        lambda picks, x=x: PickedVectors(
                            picks.cluster_ids, picks.image_ids, x[picks.image_ids]
                        ),
                        candidates.repel,
                        n_rounds=10,
                        weight=weight,
                        unit=lambda picked, repulsion=repulsion: repulsion_unit(picked, repulsion),
                    )
                    results[weight, alpha, window].append(judge(x, labels, picks.image_ids))
            for (weight, alpha, window), found in results.items():
                say(f"weight {weight:g} alpha {alpha:g} window {window}", found)


if __name__ == "__main__":
    main()
