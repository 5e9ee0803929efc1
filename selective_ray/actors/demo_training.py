"""The long demo: an encoder learned from digits, picks by USL and USL-T, and FixMatch on their labels."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from selective_ray import config, held_out, labeling
from selective_ray.actors import fixmatch, pipeline
from selective_ray.actors.demo import paint
from selective_ray.actors.pretraining import pretrain
from selective_ray.evaluation import nearest
from selective_ray.progress import Reporter
from selective_ray.store import Run

BUDGET, DRAWS = 40, 20
SIZE = 16
LEARN = {
    "pretrain.network": "small-resnet",
    "pretrain.image_size": SIZE,
    "pretrain.steps": 300,
    "pretrain.batch": 128,
    # A mirrored or gray digit is another or the same: boxes alone make the views.
    "pretrain.colors": 0.0,
    "pretrain.gray": 0.0,
    "pretrain.smallest": 0.4,
    "pretrain.evaluate_every": 100,
    "pretrain.checkpoint_every": 100,
}
TRAIN = {
    "train.network": "wrn-10-1",
    "train.image_size": 8,
    "train.steps": 400,
    "train.batch": 32,
    "train.unlabeled_ratio": 4,
    "train.average": 0.99,
    "train.evaluate_every": 200,
    "train.checkpoint_every": 200,
}
TRAINED = {"selection.method": "usl-t", "usl_t.steps": 150, "usl_t.batch": 256, "usl_t.lr": 1e-3}


def tell(folder: Path, *, as_json: bool) -> None:
    """Learn an encoder, select 40 digits in three ways, train on each, and print what came out.

    A third of the digits is held out. The labels are used for the 40 and for the comparison only.
    """
    began = time.monotonic()
    reporter = Reporter(quiet=as_json)
    images, others = _divided(folder)
    encoder = Run(str(folder / "encoder"))
    learned, _ = pretrain(encoder, str(images), _settings(LEARN), "pretrain", reporter, truth="folders")
    runs = {}
    for name, options in (("usl", {"selection.method": "usl"}), ("usl-t", TRAINED)):
        settings, asked = config.load(
            options={**options, "selection.budget": BUDGET, "embed.encoder": f"{folder}/encoder"}
        )
        runs[name] = Run(str(folder / name))
        pipeline.advance(
            runs[name], pipeline.Source(str(images)), settings, asked, reporter, upto="selection"
        )
    x, uris = _embedded(runs["usl"])
    classes = np.array([int(uri.split("/")[-2]) for uri in uris])
    rng = np.random.default_rng(0)
    draws = [np.sort(rng.choice(len(x), BUDGET, replace=False)) for _ in range(DRAWS)]
    picks = {name: run.read_shard("selection", 0)["image_id"].to_numpy() for name, run in runs.items()}
    picks["random"] = draws[0]
    told: dict[str, Any] = {}
    for name, ids in picks.items():
        run = runs.get(name, runs["usl"])
        training = f"on-{name}"
        done = run.manifest(f"training/{training}")
        if done is None:
            _label(run, ids, classes, folder)
            done, _ = fixmatch.train(run, _settings(TRAIN), training, reporter, held_out=others)
        told[name] = {
            **_judged(x, classes, ids),
            "fixmatch": done.summary["accuracy"],
            "report": run.path("report", f"training-{training}.html"),
        }
    chance = [_judged(x, classes, ids) for ids in draws]
    told["random draws"] = {key: float(np.mean([one[key] for one in chance])) for key in chance[0]}
    seconds = time.monotonic() - began
    if as_json:
        answer = {"encoder": learned.summary, "seconds": round(seconds, 1), "picks": told}
        print(json.dumps(answer))  # noqa: T201
        return
    share = 100 * learned.summary["neighbors_accuracy"]
    lines = [
        f"an encoder of {len(x):,} digits, learned without labels: {share:.1f} % have mostly neighbors of",
        f"their class\n\n{BUDGET} labels {'classes':>16}{'spread':>9}{'neighbor':>11}{'FixMatch':>11}",
    ]
    for name, one in told.items():
        shown = f"mean of {DRAWS} draws" if name == "random draws" else name
        trained = f"{100 * one['fixmatch']:>9.1f} %" if "fixmatch" in one else ""
        judged = f"{one['classes']:>7.1f}{one['spread']:>9.2f}{100 * one['neighbor']:>9.1f} %"
        lines.append(f"{shown:<18}{judged}{trained}")
    lines += [
        "\nspread: of the counts of the ten classes; neighbor: accuracy of a nearest-neighbor classifier",
        f"that knows the {BUDGET}; FixMatch: of one training each, on {len(others.labels):,} digits that no",
        "training saw",
        f"{seconds:.0f} s in all\n",
        *(f"{name:<18}{told[name]['report']}" for name in picks),
    ]
    print("\n".join(lines))  # noqa: T201


def _divided(folder: Path) -> tuple[Path, held_out.HeldOut]:
    """Lay the digits into a folder for each class, two thirds to select from and one third held out."""
    labels = paint(folder / "digits")
    for i, (file, label) in enumerate(zip(sorted((folder / "digits").glob("*.png")), labels, strict=True)):
        into = folder / ("held-out" if i % 3 == 0 else "images") / str(label)
        into.mkdir(parents=True, exist_ok=True)
        if not (into / file.name).exists():
            # A new file has a new time of modification, which would be another image to a run that is there.
            shutil.copy2(file, into / file.name)
    return folder / "images", held_out.read(str(folder / "held-out"))


def _settings(options: dict[str, Any]) -> config.Config:
    return config.load(options={**options, "resources.workers": 1})[0]


def _embedded(run: Run) -> tuple[np.ndarray, list[str]]:
    shards = range(len(run.manifest("embeddings").shards))
    ids, x = zip(*(run.read_embeddings(shard) for shard in shards), strict=True)
    return np.concatenate(x), run.listed(np.concatenate(ids))["uri"].to_pylist()


def _label(run: Run, ids: np.ndarray, classes: np.ndarray, folder: Path) -> None:
    """Bring the labels of some images into a run, in place of those there."""
    file = folder / "labels.csv"
    lines = ["image_id,label", *(f"{i},{classes[i]}" for i in ids.tolist())]
    file.write_text("\n".join(lines) + "\n")
    run.delete_folder("labels")
    labeling.bring_labels(run, str(file), replace=True, reporter=Reporter(quiet=True))


def _judged(x: np.ndarray, classes: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    counts = np.bincount(classes[ids], minlength=10)
    rest = np.setdiff1d(np.arange(len(x)), ids)
    told = classes[ids][nearest(x[rest], x[ids], 1).image_ids[:, 0]]
    return {
        "classes": float((counts > 0).sum()),
        "spread": float(counts.std()),
        "neighbor": float((told == classes[rest]).mean()),
    }
