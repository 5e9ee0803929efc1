"""The demo: 40 of 1,797 handwritten digits, and what a classifier learns from them against random draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from selective_ray import config
from selective_ray.actors import pipeline
from selective_ray.errors import UserError
from selective_ray.evaluation import nearest
from selective_ray.progress import Reporter
from selective_ray.store import Run

BUDGET = 40
# Principal components of the 8x8 pixels: the digits need no network.
ASKED = {"selection.budget": BUDGET, "embed.encoder": "pca", "embed.image_size": 8}


def tell(folder: Path, *, seeds: int, draws: int, as_json: bool) -> None:
    """Select with several seeds, compare with random draws of the same size, and print what came out.

    The labels are used for this comparison only; no stage reads them.
    """
    labels = paint(folder / "images")
    reporter = Reporter(quiet=as_json)
    first = Run(str(folder / "run"))
    picks = []
    for seed in range(seeds):
        run = first if seed == 0 else Run(str(folder / f"seed-{seed}"))
        settings, asked = config.load(options={**ASKED, "seed": seed}, own_embeddings=seed > 0)
        source = (
            pipeline.Source(embeddings=first.uri) if seed else pipeline.Source(images=str(folder / "images"))
        )
        pipeline.advance(run, source, settings, asked, reporter, upto="selection")
        picks.append(run.read_shard("selection", 0)["image_id"].to_numpy())
    shards = range(len(first.finished_shards("embeddings")))
    x = np.concatenate([first.read_embeddings(shard)[1] for shard in shards])
    rng = np.random.default_rng(0)
    random = [rng.choice(len(x), BUDGET, replace=False) for _ in range(draws)]
    ours = {"counts": _counts(labels, picks[0]), "accuracy": [_accuracy(x, labels, rows) for rows in picks]}
    chance = {
        "counts": _counts(labels, random[0]),
        "accuracy": [_accuracy(x, labels, rows) for rows in random],
    }
    report = first.path("report", "index.html")
    if as_json:
        print(json.dumps({"selected": ours, "random": chance, "report": report}))  # noqa: T201
        return
    print(f"{BUDGET} of {len(x):,} handwritten digits, chosen without labels\n")  # noqa: T201
    print("class             " + "".join(f"{digit:>4}" for digit in range(10)))  # noqa: T201
    for name, found in (("selective_ray", ours), ("one random draw", chance)):
        print(f"{name:<18}" + "".join(f"{count:>4}" for count in found["counts"]))  # noqa: T201
    print("\naccuracy of a nearest-neighbor classifier that knows the labels of these 40")  # noqa: T201
    for name, found, unit in (("selective_ray", ours, "seeds"), ("random", chance, "draws")):
        accuracy = 100 * np.array(found["accuracy"])
        print(  # noqa: T201
            f"{name:<18}{accuracy.mean():.1f} % ± {accuracy.std(ddof=1):.1f} over {len(accuracy)} {unit}, "
            f"{accuracy.min():.1f} to {accuracy.max():.1f}"
        )
    print(f"\nreport            {report}")  # noqa: T201


def paint(folder: Path) -> np.ndarray:
    """Write scikit-learn's digits as PNG files, unless they are there; return the labels, int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the demo needs scikit-learn; install it with `pip install selective-ray[demo]`"
        ) from None
    digits = load_digits()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(digits.images):
            path = folder / f"{i:04d}.png"
            if not path.exists():
                # 16 gray levels, of which 16 is white.
                temporary = path.with_suffix(".tmp")
                Image.fromarray(np.minimum(pixels * 16, 255).astype(np.uint8)).save(temporary, "PNG")
                temporary.replace(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --folder") from None
    return digits.target


def _counts(labels: np.ndarray, rows: np.ndarray) -> list[int]:
    return np.bincount(labels[rows], minlength=10).tolist()


def _accuracy(x: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> float:
    """Share of all other images whose nearest labeled image has their label."""
    rest = np.setdiff1d(np.arange(len(x)), rows)
    told = labels[rows][nearest(x[rest], x[rows], 1).image_ids[:, 0]]
    return float((told == labels[rest]).mean())
