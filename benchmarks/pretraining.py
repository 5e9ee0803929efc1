"""Encoders that are learned: how well neighbors share a class, beside PCA and random weights; and speed.

    python benchmarks/pretraining.py learning cifar10/ --methods simclr moco cld --seeds 3
    python benchmarks/pretraining.py speed --network small-resnet --size 32 --batch 256

learning: 10,000 images, drawn by the seed, of a folder with a folder for each class; small-resnet at 32
pixels learns for `--steps` steps in this process, by the settings of the defaults but for what is given. The
accuracy is of the 20 nearest neighbors of every image among the others. speed: images a second of steps, and
of forward and backward of the same network on as many random views, in pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from selective_ray import batches, classifiers, config, contrastive, images, views
from selective_ray.contrastive import Learner, Recipe
from selective_ray.views import Views

SETTINGS = {"pretrain.network": "small-resnet", "pretrain.image_size": 32}


def learner(settings: config.Pretrain, seed: int, device: str) -> Learner:
    torch.manual_seed(seed)
    network = contrastive.projected(
        settings.method, *classifiers.trunk(settings.network, settings.image_size)
    )
    how = Recipe(**settings.recipe()), Views(**settings.views())
    return Learner(network, *how, device=device, precision=settings.precision)


def drawn(seed: int, t: int, batch: int, method: str) -> list[np.ndarray]:
    return [
        batches.draws(seed, t, batch, views.DRAWS, batches.VIEWS + view)
        for view in range(contrastive.VIEWS[method])
    ]


def accuracy(x: np.ndarray, classes: np.ndarray, k: int = 20) -> float:
    """Share of unit rows [n, d] whose k nearest others are mostly of their class."""
    votes = np.zeros((len(x), classes.max() + 1), np.int64)
    for start in range(0, len(x), 1000):
        here = np.arange(start, min(start + 1000, len(x)))
        cosines = x[here] @ x.T
        cosines[np.arange(len(here)), here] = -np.inf
        near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        np.add.at(votes, (here[:, None], classes[near]), 1)
    return float((votes.argmax(axis=1) == classes).mean())


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def features(one: Learner, pixels: np.ndarray) -> np.ndarray:
    parts = [
        one.features(one.on_device(pixels[start : start + 500]).float() / 255)
        for start in range(0, len(pixels), 500)
    ]
    return torch.cat(parts).cpu().numpy()


def learning(arguments: argparse.Namespace) -> None:
    files = np.array(sorted(Path(arguments.images).glob("*/*")))
    found: dict[str, list[float]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        chosen = files[np.sort(np.random.default_rng(seed).choice(len(files), arguments.used, replace=False))]
        names = sorted({file.parent.name for file in chosen})
        classes = np.array([names.index(file.parent.name) for file in chosen])
        pixels = np.stack([images.decode(file.read_bytes(), size=32, crop=1.0) for file in chosen])
        one = None
        for method in ("PCA", "random weights", *arguments.methods):
            begun = time.perf_counter()
            if method == "PCA":
                x = pixels.reshape(len(pixels), -1) / np.float32(255)
                x -= x.mean(axis=0)
                _, components = np.linalg.eigh(x.T @ x)
                found.setdefault(method, []).append(accuracy(unit(x @ components[:, -160:]), classes))
            else:
                options = {"pretrain.method": "simclr" if method == "random weights" else method}
                options |= {"pretrain.steps": arguments.steps, "pretrain.batch": arguments.batch}
                settings, _ = config.load(options={**SETTINGS, **options}, assignments=arguments.set)
                one = learner(settings.pretrain, seed, arguments.device)
                plan = batches.Plan(
                    *(np.empty(0, np.int64), len(pixels), np.empty(0, np.int64), 0, arguments.batch, seed)
                )
                for t in range(0 if method == "random weights" else arguments.steps):
                    ids = plan.step(t)
                    told = one.step(t, pixels[ids], drawn(seed, t, len(ids), method), len(ids))
                    if (t + 1) % arguments.every == 0:
                        now = accuracy(features(one, pixels), classes)
                        print(
                            f"  {method} step {t + 1}: loss {float(told['instance'] + told['group']):.3f}, "
                            f"found {int(told['found'])} of {len(ids)}, neighbors {100 * now:.2f} %, "
                            f"{time.perf_counter() - begun:.0f} s",
                            flush=True,
                        )
                found.setdefault(method, []).append(accuracy(features(one, pixels), classes))
            seconds = time.perf_counter() - begun
            print(f"seed {seed} {method:<15} {100 * found[method][-1]:.2f} %  {seconds:.0f} s", flush=True)
    for method, values in found.items():
        shown = 100 * np.array(values)
        spread = f" ± {shown.std(ddof=1):.1f}" if len(shown) > 1 else ""
        print(f"{method:<15} {shown.mean():.1f}{spread} over {len(shown)} seeds")


def speed(arguments: argparse.Namespace) -> None:
    """Steps beside forward and backward on random tensors of the same shape."""
    size, batch = arguments.size, arguments.batch
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)

    def timed(step, count: int) -> float:
        for t in range(2):
            step(t)
        _wait(arguments.device)
        begun = time.perf_counter()
        for t in range(count):
            step(t)
        _wait(arguments.device)
        return count * batch / (time.perf_counter() - begun)

    for method in arguments.methods:
        options = {"pretrain.method": method, "pretrain.batch": batch, "pretrain.steps": 10**6}
        options |= {"pretrain.network": arguments.network, "pretrain.image_size": size}
        settings, _ = config.load(options=options, assignments=arguments.set)
        one = learner(settings.pretrain, 0, arguments.device)
        seen = 1 if method == "moco" else 2
        x = torch.rand((seen * batch, 3, size, size), device=arguments.device)
        x = x.contiguous(memory_format=torch.channels_last)

        def plain(t: int, one: Learner = one, x: torch.Tensor = x) -> None:
            one.network.zero_grad(set_to_none=True)
            with torch.autocast(one.device.type, one.dtype, enabled=one.dtype is not None):
                out, _ = one.network(x)
            F.mse_loss(out.float(), torch.zeros_like(out, dtype=torch.float32)).backward()

        ratios = []
        for _ in range(arguments.pairs):
            rates = {
                "random tensors": timed(plain, arguments.steps),
                "steps": timed(
                    lambda t, one=one, method=method: one.step(t, pixels, drawn(0, t, batch, method), batch),
                    arguments.steps,
                ),
            }
            ratios.append(rates["steps"] / rates["random tensors"])
            print(method, json.dumps({name: round(rate, 1) for name, rate in rates.items()}), flush=True)
        print(f"{method} median share {np.median(ratios):.3f}", flush=True)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("learning", "speed"))
    parser.add_argument("images", nargs="?", help="a folder with a folder for each class")
    parser.add_argument("--methods", nargs="*", default=list(contrastive.VIEWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--used", type=int, default=10_000, help="images")
    parser.add_argument("--every", type=int, default=10**9, help="steps from one look to the next")
    parser.add_argument("--set", nargs="*", default=[], help="pretrain.key=value")
    parser.add_argument("--network", default="small-resnet")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    {"learning": learning, "speed": speed}[arguments.what](arguments)
