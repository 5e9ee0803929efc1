"""The GPU's share: images per second from host memory against the same network on tensors that are there.

    python benchmarks/encoders.py --batches 64 128 256 512 --seconds 10

For ResNet-50 and ViT-B/16 with random weights, in bfloat16: `Encoder.stream` takes decoded uint8 batches
from host memory, copies, normalizes, computes and returns unit vectors; against it stands the network alone
on a float tensor that is on the GPU already. Both take turns in one run, and the best of the repeats counts.
Besides, how close the embeddings are to float32 on the CPU (cosine), and whether a second run gives the same
bits. Without a GPU only the last two are done, on the CPU and for a few images.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torchvision import models

from selective_ray import encoders, inference

NAMES = ("resnet50", "vit_b_16")
SIZE = 224


def checkpoint(name: str, folder: str) -> str:
    """Save random weights, with statistics of normalization as in a trained network."""
    torch.manual_seed(0)
    network = models.get_model(name)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, SIZE, SIZE))
    path = Path(folder) / f"{name}.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def pixels_of(count: int, seed: int = 0) -> np.ndarray:
    """Draw images of 49 colors, which differ more than noise does: uint8 [count, SIZE, SIZE, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 7, 7, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(SIZE // 7, axis=1).repeat(SIZE // 7, axis=2))


def rate_of_stream(encoder: encoders.Encoder, batch: int, seconds: float) -> float:
    """Images per second through `Encoder.stream`, from a few batches in host memory in turn."""
    held = [pixels_of(batch, seed) for seed in range(4)]
    end = time.perf_counter() + seconds
    started, images = time.perf_counter(), 0
    until = itertools.takewhile(lambda _: time.perf_counter() < end, itertools.cycle(held))
    for embeddings in encoder.stream(until):
        images += len(embeddings)
    return images / (time.perf_counter() - started)


def rate_of_network(network: torch.nn.Module, dtype: torch.dtype | None, batch: int, seconds: float) -> float:
    """Images per second of the network alone, on a tensor that is on the GPU."""
    x = torch.randn(batch, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    images, started = 0, time.perf_counter()
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype is not None):
        while time.perf_counter() - started < seconds:
            for _ in range(8):
                network(x)
            images += 8 * batch
            torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def closeness(name: str, path: str, device: str, precision: str, count: int) -> str:
    """Say how close the embeddings are to those in float32 on the CPU, and whether they repeat."""
    pixels = pixels_of(count, seed=9)
    options = {"checkpoint": path, "image_size": SIZE}
    exact = encoders.load(name, **options, precision="float32").encode(pixels)
    encoder = encoders.load(name, **options, device=device, precision=precision, batch=count)
    first, again = encoder.encode(pixels), encoder.encode(pixels)
    streamed = list(encoder.stream([pixels] * 3))
    same = all(np.array_equal(first, other) for other in (again, *streamed))
    cosines = np.sum(exact.astype(np.float64) * first, axis=1)
    among = exact @ exact.T
    apart = 1 - (among.sum() - np.trace(among)) / (count * (count - 1))
    return (
        f"{name}, {device} {precision} against cpu float32: cosine at least {cosines.min():.6f}, mean "
        f"{cosines.mean():.6f} (images are {apart:.3f} apart); the same bits again: {'yes' if same else 'NO'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: checkpoint(name, folder) for name in options.names}
        if not torch.cuda.is_available():
            print("no GPU here: a check on the CPU, and no rates")
            for name in options.names:
                print(closeness(name, paths[name], "cpu", "bfloat16", 2), flush=True)
            return
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name in options.names:
            print(closeness(name, paths[name], "cuda", "auto", 32), flush=True)
        for name, batch in itertools.product(options.names, options.batches):
            encoder = encoders.load(
                name,
                checkpoint=paths[name],
                image_size=SIZE,
                device="cuda",
                compile=options.compile,
                batch=batch,
            )
            # The network as the encoder runs it, without its classifier and in channels-last format.
            network = models.get_model(name).to("cuda", memory_format=torch.channels_last).eval()
            network.load_state_dict(torch.load(paths[name], weights_only=True))
            network.set_submodule("fc" if name == "resnet50" else "heads", torch.nn.Identity())
            if options.compile:
                network = torch.compile(network, dynamic=False)
            dtype = inference.autocast_dtype("cuda", "auto")
            rate_of_stream(encoder, batch, 2), rate_of_network(network, dtype, batch, 2)  # warm up
            alone = streamed = 0.0
            for _ in range(options.repeats):
                alone = max(alone, rate_of_network(network, dtype, batch, options.seconds))
                streamed = max(streamed, rate_of_stream(encoder, batch, options.seconds))
            print(
                f"{name}, batch {batch}: network alone {alone:.0f} images/s, from host memory {streamed:.0f} "
                f"images/s, share {streamed / alone:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
