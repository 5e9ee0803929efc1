"""What `selective-ray plan` predicts beside what the run then takes: probe and run back to back.

    python benchmarks/plan.py --repeats 3 -- --images cifar10/ --budget 40 --encoder squeezenet1_1 \\
        --checkpoint squeezenet1_1.pth --set embed.image_size=96
    python benchmarks/plan.py --repeats 3 -- --embeddings x.npy --budget 1000
    python benchmarks/plan.py --repeats 1 --generated 20000 -- --budget 100 --encoder pca
    python benchmarks/plan.py --table jobs/configs/fifty_million.toml 50000000 g6e.12xlarge:2 g6e.12xlarge:16

The options after -- are those of `select`. --generated: so many small images of s3_server.py in place of
--images. Printed are the seconds of each stage, the ratio of what was predicted to what it took, the medians
over the repeats, and how far the predictions themselves lie apart, which is the noise of the probe and the
machine. Stages of at least a minute count; the others are in brackets.

--table prints, as Markdown, the plan of a configuration for so many photographs of 110 KB on fleets, by
`RATES`, those of this folder's README, and by what the table of prices assumes of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

TABLES = {
    "list": "images",
    "embed": "embeddings",
    "density": "density",
    "cluster": "clusters",
    "select": "selection",
}
COUNTS_FROM = 60.0
# Of the README, two cores: "A million images" (listing), "Ray's share of embedding" (starting encoders),
# "Decoding" (500 x 375), "Density by inverted lists" (a million rows, d = 128: lists, moving, writing 8.6 s,
# starting 10.5 s), "The rounds of the selection" (3.67 s). Encoders on CPUs play no part.
RATES = {
    "cpus": 2,
    "gpus": 0,
    "workers": 2,
    "ray_seconds": 10.5,
    "list_rows": 19_000,
    "encoder_seconds": 57.0,
    "embed_rows": 1.0,
    "decode_rows": 525.0,
    "encode_rows": 0.5,
    "pixel_bytes": 3 * 224 * 224,
    "holder_seconds": 10.5,
    "row_seconds": 2 * 8.6e-6,
    "cluster_seconds": 2 * 1e-6,
    "select_seconds": 2 * 3.67e-6,
    "iterations": 30,
}
PHOTOGRAPH_BYTES = 110_000
# d, and the weights whose description tells the operations.
NETWORKS = {
    "resnet50": (2048, "ResNet50_Weights.IMAGENET1K_V1"),
    "vit_b_16": (768, "ViT_B_16_Weights.IMAGENET1K_V1"),
}


@contextmanager
def generated(n: int | None):
    """Serve so many made-up images, if any; yields the options that name them."""
    if n is None:
        yield []
        return
    script = Path(__file__).with_name("s3_server.py")
    words = [sys.executable, str(script), "--port", "0", "--keys", str(n)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "access",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
        }
        try:
            yield ["--images", "s3://images"]
        finally:
            server.kill()


def ask(*words: str) -> dict:
    command = [sys.executable, "-m", "selective_ray", *words, "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{words[0]}: {answer.stdout}")
    return json.loads(answer.stdout)


def once(options: list[str]) -> dict[str, tuple[float, float]]:
    """Probe, then run; seconds of each stage as predicted, and as they were."""
    with tempfile.TemporaryDirectory() as folder:
        (planned,) = ask("plan", *options)["plans"]
        took = ask("select", *options, "--run", f"{folder}/run")["seconds"]
    predicted = {stage["name"]: stage["seconds"] for stage in planned["stages"]}
    return {
        name: (predicted[name], took[TABLES[name]])
        for name in TABLES
        if name in predicted and took.get(TABLES[name])
    }


def table(file: str, n: int, fleets: list[str]) -> None:
    """Print the plan of a configuration for n photographs on fleets."""
    from torchvision import models

    from selective_ray import config, machines, planning
    from selective_ray.survey import Survey

    settings, _ = config.load(file=file)
    d, weights = NETWORKS[settings.embed.encoder]
    # Multiplications and additions apart.
    operations = 2e9 * models.get_weight(weights).meta["_ops"]
    rates = planning.Rates(**RATES, d=d, encode_flops=operations)
    keys = dict(listed=n, seconds=0.0, whole=True, parts=True)
    source = Survey(n, n * PHOTOGRAPH_BYTES, -(-n // 1000), n, **keys)
    prices = machines.read_prices()
    head, kinds = machines.read_cluster(str(Path(__file__).parents[1] / "cluster.yaml"), prices)
    print("| on | stage | minutes | limit | machine-hours | workers | GB each | object store, GB | dollars |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for fleet in machines.chosen(fleets, head, kinds, prices):
        made = planning.plan(rates, settings, fleet, survey=source, requests=prices.requests)
        assert not made.refused, made.refused
        for stage in made.stages:
            hours = sum(stage.machine_seconds.values()) / 3600
            print(
                f"| {made.on} | {stage.name} | {stage.seconds / 60:.1f} | {stage.limit} | {hours:.1f} | "
                f"{stage.workers} | {stage.worker_bytes / 1e9:.1f} | {stage.store_bytes / 1e9:.0f} | "
                f"{stage.dollars:.0f} |"
            )
        print(f"| {made.on} | **all** | **{made.seconds / 60:.0f}** | | | | | | **{made.dollars:.0f}** |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generated", type=int)
    parser.add_argument("--table", metavar="CONFIG", help="with N and fleets in place of options")
    parser.add_argument("options", nargs="+", help="those of select, after --")
    given = parser.parse_args()
    if given.table:
        table(given.table, int(given.options[0]), given.options[1:])
        return
    seen: dict[str, list[tuple[float, float]]] = {}
    with generated(given.generated) as images:
        for repeat in range(given.repeats):
            for name, (predicted, took) in once([*given.options, *images]).items():
                seen.setdefault(name, []).append((predicted, took))
                print(f"{repeat} {name:<9} predicted {predicted:8.1f} s, took {took:8.1f} s", flush=True)
    print(f"{'stage':<10}{'predicted':>10}{'took':>8}{'ratio':>8}  ratios; spread of the predictions")
    for name, pairs in seen.items():
        predicted, took = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [p / t for p, t in pairs]
        spread = (max(p for p, _ in pairs) - min(p for p, _ in pairs)) / max(predicted, 0.1)
        shown = f"{statistics.median(ratios):.2f}"
        print(
            f"{name:<10}{predicted:>10.1f}{took:>8.1f}{shown if took >= COUNTS_FROM else f'[{shown}]':>8}  "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}; {spread:.0%}"
        )


if __name__ == "__main__":
    main()
