"""Training: the speed of a worker beside a plain PyTorch loop, and what is learned from which labels.

    python benchmarks/training.py speed cifar10/ --steps 6 --pairs 5
    python benchmarks/training.py learning digits --steps 600
    python benchmarks/training.py learning cifar10/ --steps 600 --size 16 --encoder squeezenet1_1 \\
        --checkpoint squeezenet1_1.pth --embed-size 96

speed: WRN-28-2 with 64 + 448 images of 32 pixels a step. The plain loop is one process with a DataLoader
over decoded images in memory, the same network and the same views; both have all threads. Start-up is left
out: the rate of a pair is that of its steps after the first two. cifar10/ has a folder for each class.

learning: for each seed, 40 images chosen by selective_ray (`usl`) and at random, and on each of these
FixMatch and supervised training of the same network for the same steps; accuracy of the averaged network on a
third of the images, which no training sees.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from selective_ray import augment, batches, classifiers, config, fixmatch, held_out, labeling, optimization
from selective_ray.actors import demo, pipeline
from selective_ray.actors.fixmatch import train
from selective_ray.actors.session import Session
from selective_ray.pixels import Pixels
from selective_ray.progress import Reporter
from selective_ray.store import Run
from selective_ray.training import Training

QUIET = Reporter(quiet=True)


def embedded(images: Path, run: Path, **options) -> Run:
    settings, asked = config.load(options=options)
    where = Run(str(run))
    pipeline.advance(where, pipeline.Source(str(images)), settings, asked, QUIET, upto="embeddings")
    return where


def labeled(run: Run, images: list[int], labels: list[str], folder: Path) -> None:
    file = folder / "labels.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("image_id", "label"), *zip(images, labels, strict=True)])
    labeling.bring_labels(run, str(file), replace=True, reporter=QUIET)


def classes_of(run: Run) -> list[str]:
    """The folder of each image."""
    shards = run.manifest("images").shards
    uris = [uri for s in shards for uri in run.read_shard("images", s.index, ["uri"])["uri"].to_pylist()]
    return [uri.split("/")[-2] for uri in uris]


# Speed


class Decoded(Dataset):
    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int):
        return torch.from_numpy(self.pixels[i]), self.labels[i]


def plain(pixels: np.ndarray, labels: np.ndarray, labeled: np.ndarray, steps: int) -> float:
    """FixMatch as one would write it down: steps a second after the first two."""
    torch.manual_seed(0)
    network = classifiers.build("wrn-28-2", 10)
    average = copy.deepcopy(network).eval()
    recipe = fixmatch.Recipe(average_statistics=False)
    optimizer = optimization.optimizer(network, recipe)
    mean, std = (torch.tensor(values)[:, None, None] for values in (fixmatch.MEAN, fixmatch.STD))
    few = Decoded(pixels[labeled].repeat(20, 0), labels[labeled].repeat(20))
    loaders = [
        DataLoader(few, 64, shuffle=True, drop_last=True),
        DataLoader(Decoded(pixels, labels), 448, shuffle=True, drop_last=True),
    ]
    rng = np.random.default_rng(0)
    endless = [iter(loader) for loader in loaders]
    for step in range(steps + 2):
        if step == 2:
            begun = time.perf_counter()
        for i, loader in enumerate(loaders):
            if step and step % len(loader) == 0:
                endless[i] = iter(loader)
        (x, y), (u, _) = (next(batches) for batches in endless)
        x, u = x.permute(0, 3, 1, 2), u.permute(0, 3, 1, 2)
        views = [
            augment.weak(x, rng.random((len(x), augment.WEAK_DRAWS))),
            augment.weak(u, rng.random((len(u), augment.WEAK_DRAWS))),
            augment.strong(u, rng.random((len(u), augment.STRONG_DRAWS))),
        ]
        logits = network((torch.cat(views).float() / 255 - mean) / std)
        known, seen, hard = logits.split([len(x), len(u), len(u)])
        confidence, targets = torch.softmax(seen.detach(), 1).max(1)
        mask = (confidence >= 0.95).float()
        loss = F.cross_entropy(known, y) + (F.cross_entropy(hard, targets, reduction="none") * mask).mean()
        for group in optimizer.param_groups:
            group["lr"] = optimization.learning_rate(recipe, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.mul_(0.999).add_(theirs, alpha=0.001)
            for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
                mine.copy_(theirs)
    return steps / (time.perf_counter() - begun)


def ours(run: Run, name: str, steps: int) -> float:
    # A line of the metrics for every two steps, of which the first is left out.
    options = {"train.checkpoint_every": 2, "train.evaluate_every": 10**6, "resources.workers": 1}
    settings, _ = config.load(preset="fixmatch-cifar10", options=options, own_embeddings=True)
    train(run, settings, name, QUIET, until=2 + steps)
    lines = Training(run, name).metrics()[1:]
    return steps / sum(line["steps"] / line["steps_per_second"] for line in lines)


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    run = embedded(Path(arguments.images), folder / "run", **{"embed.encoder": "pca", "embed.image_size": 8})
    names = sorted(set(classes_of(run)))
    labels = np.array([names.index(name) for name in classes_of(run)], np.int64)
    chosen = np.random.default_rng(0).choice(len(labels), 40, replace=False)
    labeled(run, sorted(chosen.tolist()), [names[labels[i]] for i in sorted(chosen)], folder)
    pixels = Pixels.of_run(run, size=32, limit=2**40).get(np.arange(len(labels)))
    ratios = []
    for pair in range(arguments.pairs):
        rates = {}
        for which in ("plain", "ours") if pair % 2 == 0 else ("ours", "plain"):
            rates[which] = (
                plain(pixels, labels, chosen, arguments.steps)
                if which == "plain"
                else ours(run, f"speed-{pair}", arguments.steps)
            )
        ratios.append(rates["ours"] / rates["plain"])
        print(json.dumps({**rates, "ratio": ratios[-1]}), flush=True)
    print(f"median ratio {np.median(ratios):.3f}")


# Learning


def learned(
    settings: config.Config,
    pixels: np.ndarray,
    names: list[str],
    rows: list[int],
    others: np.ndarray,
    truth: list[str],
) -> float:
    """Accuracy after the steps that `train` takes on labeled rows, in this process."""
    plan = batches.Plan(
        labeled_ids=np.array(rows),
        images=len(pixels),
        rejected=np.empty(0, np.int64),
        labeled=settings.train.batch,
        unlabeled=settings.train.batch * settings.train.unlabeled_ratio,
        seed=settings.seed,
    )
    classes = sorted({names[row] for row in rows})
    torch.manual_seed(settings.seed)
    network = classifiers.build(settings.train.network, len(classes))
    learner = fixmatch.Learner(network, fixmatch.Recipe(**settings.train.recipe()))
    fixmatch.fit(learner, pixels, np.array([classes.index(names[row]) for row in rows]), plan)
    answers = learner.probabilities(others).argmax(axis=1)
    return float(np.mean([classes[a] == true for a, true in zip(answers, truth, strict=True)]))


def learning(arguments: argparse.Namespace, folder: Path) -> None:
    images = folder / "images"
    if arguments.images == "digits":
        truth = demo.paint(folder / "digits")
        files = sorted((folder / "digits").iterdir())
        classes = [f"d{label}" for label in truth]
    else:
        files = sorted(Path(arguments.images).glob("*/*"))
        files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[: arguments.images_used]]
        classes = [file.parent.name for file in files]
    for i, (file, name) in enumerate(zip(files, classes, strict=True)):
        into = folder / ("held-out" if i % 3 == 0 else "images") / name
        into.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, into / file.name)
    listed = held_out.read(str(folder / "held-out"))
    options = {"embed.encoder": arguments.encoder, "embed.image_size": arguments.embed_size}
    options |= {"embed.checkpoint": arguments.checkpoint} if arguments.checkpoint else {}
    base = embedded(images, folder / "base", **options)
    names, truth = classes_of(base), listed.labels
    pixels = Pixels.of_run(base, size=arguments.size, limit=2**40).get(np.arange(len(names)))
    size = np.array([len(truth)], np.int64)
    others = Pixels(folder / "cache", size, lambda shard: listed.rows, size=arguments.size, limit=2**40)
    others = others.get(np.arange(len(truth)))
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(arguments.seeds):
        for picked in ("usl", "random"):
            if picked == "usl":
                run = Run(str(folder / f"usl-{seed}"))
                choose = {
                    **{"selection.budget": arguments.budget, "selection.method": "usl"},
                    "seed": seed,
                }
                settings, asked = config.load(options=choose, own_embeddings=True)
                source = pipeline.Source(embeddings=base.uri)
                pipeline.advance(run, source, settings, asked, QUIET, upto="selection")
                rows = run.read_shard("selection", 0)["image_id"].to_pylist()
            else:
                rng = np.random.default_rng(seed)
                rows = rng.choice(len(names), arguments.budget, replace=False).tolist()
            for method, ratio in (("FixMatch", arguments.ratio), ("supervised", 0)):
                asked = {
                    "train.network": arguments.network,
                    "train.image_size": arguments.size,
                    "train.steps": arguments.steps,
                    "train.batch": arguments.batch,
                    "train.unlabeled_ratio": ratio,
                    "train.average": 0.99,
                    "seed": seed,
                }
                settings, _ = config.load(options=asked, own_embeddings=True)
                accuracy = learned(settings, pixels, names, sorted(rows), others, truth)
                found.setdefault((picked, method), []).append(accuracy)
                print(seed, picked, method, f"{100 * accuracy:.2f}", flush=True)
    for (picked, method), values in found.items():
        shown = 100 * np.array(values)
        print(
            f"{picked:<8} {method:<12} {shown.mean():.1f} ± {shown.std(ddof=1):.1f} over {len(shown)} seeds"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "learning"))
    parser.add_argument("images", help="a folder with a folder for each class, or digits")
    parser.add_argument("--steps", type=int, default=6, help="an even number for speed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--network", default="wrn-10-1")
    parser.add_argument("--size", type=int, default=8, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--encoder", default="pca")
    parser.add_argument("--checkpoint")
    parser.add_argument("--embed-size", type=int, default=8)
    parser.add_argument("--images-used", type=int, default=4000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, Session() as session:
        # One Ray for all of them.
        session.start()
        {"speed": speed, "learning": learning}[arguments.what](arguments, Path(place))
