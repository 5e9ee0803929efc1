"""Which method is best over several sets of images: what `selective-ray compare` found on each, together.

    python benchmarks/comparison.py tail x.npy x.csv --out tail
    python benchmarks/comparison.py duplicates x.npy x.csv --out duplicates
    selective-ray embed --embeddings tail.npy --run runs/tail
    selective-ray compare --run runs/tail --labels tail.csv --budgets 10,20,40,100 --methods usl,prototypes
    python benchmarks/comparison.py table runs/tail runs/duplicates …

tail: keeps fewer and fewer of each class, in a drawn order: of the last one of `--ratio`. duplicates: a tenth
of the rows are there ten times more, at a cosine of about 0.98. Both take embeddings [n, d] and a CSV file
with image_id and label, and write such a pair. table: the mean of linear probe and label propagation, in
percent, for every run, budget and method; and what one method is ahead of the others over all of them, with
an interval from drawing the seeds anew, and one from drawing the settings (run and budget) anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from selective_ray.comparison import MAIN
from selective_ray.paired import difference


def read(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    x, table = np.load(arguments.embeddings), pa.csv.read_csv(arguments.labels)
    order = np.argsort(table["image_id"].to_numpy())
    return x, np.array(table["label"].cast(pa.string()).to_pylist())[order]


def write(out: str, x: np.ndarray, labels: np.ndarray) -> None:
    np.save(f"{out}.npy", x)
    table = pa.table({"image_id": np.arange(len(x)), "label": pa.array(labels.tolist())})
    pa.csv.write_csv(table, f"{out}.csv")
    print(f"{out}.npy and {out}.csv: {len(x):,} images, classes {np.unique(labels, return_counts=True)[1]}")


def tail(arguments: argparse.Namespace) -> None:
    x, labels = read(arguments)
    rng = np.random.default_rng(0)
    names = rng.permutation(np.unique(labels))
    kept = []
    for rank, name in enumerate(names):
        of_class = rng.permutation(np.flatnonzero(labels == name))
        kept.append(of_class[: max(1, round(len(of_class) * arguments.ratio ** (-rank / (len(names) - 1))))])
    rows = np.sort(np.concatenate(kept))
    write(arguments.out, x[rows], labels[rows])


def duplicates(arguments: argparse.Namespace) -> None:
    x, labels = read(arguments)
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.choice(len(x), len(x) // 10, replace=False), 10)
    lengths = np.linalg.norm(x[rows], axis=1, keepdims=True)
    noise = 0.2 * lengths * rng.normal(size=(len(rows), x.shape[1])) / np.sqrt(x.shape[1])
    both = np.concatenate([x, (x[rows] + noise).astype(x.dtype)])
    write(arguments.out, both, np.concatenate([labels, labels[rows]]))


def scores(run: str) -> dict[tuple[int, str], np.ndarray]:
    """Return the mean of both accuracies in percent by budget and method, float64 [seeds]."""
    files = sorted(Path(run, "comparison").glob("*.parquet"))
    found: dict[tuple[int, str], dict[int, list[float]]] = {}
    for row in pa.concat_tables(map(pq.read_table, files)).to_pylist():
        if row["figure"] in MAIN:
            seeds = found.setdefault((row["budget"], row["method"]), {})
            seeds.setdefault(row["seed"], []).append(100 * row["value"])
    return {key: np.array([np.mean(seeds[s]) for s in sorted(seeds)]) for key, seeds in found.items()}


def table(arguments: argparse.Namespace) -> None:
    cells, methods = {}, None
    for run in arguments.runs:
        here = scores(run)
        known = [method for _, method in here]
        methods = set(known) if methods is None else methods & set(known)
        # Random picks are also judged at larger budgets.
        asked = sorted({budget for budget, method in here if method == arguments.method})
        cells |= {(Path(run).name, budget): (here, budget) for budget in asked}
    names = sorted(methods, key=lambda name: np.mean([here[b, name].mean() for here, b in cells.values()]))
    print("| set, budget | " + " | ".join(names) + " |")
    print("| --- " + "| ---: " * len(names) + "|")
    rows = {}
    for (name, budget), (here, _) in cells.items():
        rows[name, budget] = np.stack([here[budget, method] for method in names])
        means = rows[name, budget].mean(axis=1)
        shown = [f"**{mean:.1f}**" if mean == means.max() else f"{mean:.1f}" for mean in means]
        spreads = rows[name, budget].std(axis=1, ddof=1)
        shown = [f"{mean} ± {spread:.1f}" for mean, spread in zip(shown, spreads, strict=True)]
        print(f"| {name}, {budget} | " + " | ".join(shown) + " |")
    every = np.stack(list(rows.values()))
    print("| mean | " + " | ".join(f"{mean:.1f}" for mean in every.mean(axis=(0, 2))) + " |")
    ours = every[:, names.index(arguments.method)]
    sets = [name for name, _ in rows]
    for at, name in enumerate(names):
        if name == arguments.method:
            continue
        ahead = ours - every[:, at]
        seeds, settings = difference(ahead.mean(axis=0), 0 * ahead[0]), ahead.mean(axis=1)
        among = difference(settings, 0 * settings)
        by_set = {one: settings[[other == one for other in sets]].mean() for one in dict.fromkeys(sets)}
        least = min(by_set, key=by_set.get)
        print(
            f"{arguments.method} to {name}: {seeds.mean:+.2f} (other seeds {seeds.low:+.2f} to "
            f"{seeds.high:+.2f}; other settings {among.low:+.2f} to {among.high:+.2f}), above in "
            f"{among.wins} of {len(settings)}; by set at least {by_set[least]:+.2f} ({least})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whats = parser.add_subparsers(dest="what", required=True)
    for made in (tail, duplicates):
        one = whats.add_parser(made.__name__)
        one.add_argument("embeddings")
        one.add_argument("labels")
        one.add_argument("--out", required=True)
        one.add_argument("--ratio", type=float, default=30.0)
    one = whats.add_parser("table")
    one.add_argument("runs", nargs="+")
    one.add_argument("--method", default="prototypes")
    arguments = parser.parse_args()
    {"tail": tail, "duplicates": duplicates, "table": table}[arguments.what](arguments)
