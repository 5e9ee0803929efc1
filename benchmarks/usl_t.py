"""USL-T beside USL, prototypes and random draws, on the same features: figures of evaluate, and FixMatch.

    selective-ray pretrain --images cifar10/ --run runs/encoder --set pretrain.network=small-resnet …
    selective-ray embed --images cifar10/ --run runs/cifar10 --encoder ./runs/encoder
    python benchmarks/usl_t.py runs/cifar10 --encoder ./runs/encoder --budget 40 --into runs/usl-t \\
        --set usl_t.steps=300 --train train.network=small-resnet train.image_size=32 train.steps=200

The images are in a folder for each class. For every method and seed a run of its own selects by the
embeddings of the given one; what is there already is not made again. `selective-ray evaluate` judges all of
them; with --train FixMatch learns from each selection's labels and all other images, with the seed's
schedule and first weights for all methods, and tells the labels of all others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from selective_ray import config, truth
from selective_ray.store import Run
from selective_ray.trial import Trial

METHODS = ("random", "usl", "prototypes", "usl-t")


def select(arguments: argparse.Namespace, method: str, seed: int) -> str:
    run = str(Path(arguments.into) / f"{method}-{seed}")
    words = ["select", "--embeddings", arguments.run, "--run", run, "--budget", str(arguments.budget)]
    words += ["--method", method, "--seed", str(seed)]
    if method == "usl-t":
        words += ["--encoder", arguments.encoder]
        words += [word for one in arguments.set for word in ("--set", one)]
    run_command(*words)
    return run


def run_command(*words: str) -> str:
    command = [sys.executable, "-m", "selective_ray", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def trained(arguments: argparse.Namespace, runs: dict[str, list[str]]) -> None:
    settings, _ = config.load(assignments=arguments.train)
    base = Run(arguments.run)
    ids = np.arange(base.manifest("images").rows)
    labels = truth.read([base], "folders").of(base, ids)
    trial = Trial(base, ids, labels, settings.train, settings.resources.cache * 2**30)
    for method, made in runs.items():
        found = []
        for seed, run in enumerate(made):
            kept = Path(run) / "fixmatch.json"
            if not kept.exists():
                picks = Run(run).read_shard("selection", 0)["image_id"].to_numpy()
                kept.write_text(json.dumps(trial.accuracy(picks, seed, lambda: None)))
            found.append(100 * json.loads(kept.read_text()))
        spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
        each = " ".join(f"{share:.1f}" for share in found)
        print(f"FixMatch {method:<11} {np.mean(found):.1f}{spread} ({each})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run with images and embeddings")
    parser.add_argument("--encoder", required=True, help="the one that made them")
    parser.add_argument("--into", required=True, help="folder of the runs that select")
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], help="usl_t.key=value")
    parser.add_argument("--train", nargs="*", help="train.key=value; without it FixMatch is left out")
    arguments = parser.parse_args()
    runs = {m: [select(arguments, m, seed) for seed in range(arguments.seeds)] for m in arguments.methods}
    judged = [word for made in runs.values() for run in made for word in ("--run", run)]
    print(run_command("evaluate", *judged, "--labels", "folders", "--draws", "20"), flush=True)
    if arguments.train is not None:
        trained(arguments, runs)


if __name__ == "__main__":
    main()
