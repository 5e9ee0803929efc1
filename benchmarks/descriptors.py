"""Rows of real data for the other scripts: local descriptors of images, from inside SqueezeNet.

    python benchmarks/descriptors.py cifar10/ --checkpoint squeezenet1_1.pth --to rows.npy

Of every image, enlarged to 96 pixels, what the second fire module (128 channels, 23 x 23 places) says at 20
places that a seed draws: float32 rows of unit length, 1,000,000 of 50,000 images. Near places of an image
see much the same, so that rows have near duplicates, and clusters of all sizes, as embeddings have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torchvision import models

from selective_ray import images

SIZE, BATCH, PLACES = 96, 100, 20
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a folder, with folders in it or without")
    parser.add_argument("--checkpoint", required=True, help="state dict of torchvision's squeezenet1_1")
    parser.add_argument("--to", required=True, help="the .npy file to write")
    options = parser.parse_args()
    network = models.squeezenet1_1()
    network.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    fire = network.features[:5].eval()
    files = sorted(file for file in Path(options.images).rglob("*") if file.is_file())
    rng, found = np.random.default_rng(0), []
    for start in range(0, len(files), BATCH):
        pixels = np.stack(
            [images.decode(file.read_bytes(), size=SIZE, crop=1.0) for file in files[start : start + BATCH]]
        )
        x = torch.from_numpy((pixels / np.float32(255) - MEAN) / STD).permute(0, 3, 1, 2)
        with torch.inference_mode():
            out = fire(x).flatten(2).transpose(1, 2).numpy()
        for one in out:
            found.append(one[rng.choice(len(one), PLACES, replace=False)])
    rows = np.concatenate(found)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    np.save(options.to, rows.astype(np.float32))
    print(f"{len(rows):,} rows of {rows.shape[1]} numbers from {len(files):,} images")


if __name__ == "__main__":
    main()
