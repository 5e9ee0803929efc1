"""A network on a device: batches of pixels in host memory to unit vectors.

    pinned memory ──► copy (own stream) ──► normalize, network (bf16) ──► pinned memory ──► unit length

On a GPU batch i + 1 is copied while batch i computes, and what batch i gave is fetched while batch i + 1
computes; on a CPU one batch follows the other.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from selective_ray.encoders import unit
from selective_ray.errors import UserError


def autocast_dtype(device: str, precision: str) -> torch.dtype | None:
    """Return what products are computed in: bfloat16, or None for float32; raises UserError.

    precision is "float32", "bfloat16", or "auto": bfloat16 on GPUs that have it.
    """
    cuda = device.startswith("cuda")
    able = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True
    if precision == "bfloat16" and not able:
        raise UserError(
            "this GPU does not compute in bfloat16; set embed.precision to auto, which then means float32"
        )
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and cuda and able) else None


class Inference:
    """Pixels uint8 [b, h, w, 3] to unit vectors float32 [b, d], rows without direction NaN.

    finish: what becomes of what the network returns, float32 [b, …], if not its unit vectors. What comes out
    for a batch does not depend on the way in, `encode` or `stream`.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: str,
        precision: str,
        finish: Callable[[np.ndarray], np.ndarray] = unit,
    ) -> None:
        self.finish = finish
        self.dtype = autocast_dtype(device, precision)
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.network = network.to(device, memory_format=torch.channels_last).eval()

    def compile(self) -> None:
        """Compile the network at its next batch, for batches of that shape."""
        self.network = torch.compile(self.network, dynamic=False)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encode one batch."""
        return next(self.stream([pixels]))

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encode batches in order; on a GPU a batch is taken before the one ahead of it is returned."""
        if self.device.type != "cuda":
            return map(self._on_cpu, batches)
        copies = torch.cuda.Stream(self.device)
        return overlapped(batches, lambda pixels: self._launched(pixels, copies), self._fetched)

    def probe(self, batch: int, size: int) -> object:
        """Return what the network makes of a batch of black images, whatever that is."""
        features = self._forward(torch.zeros((batch, size, size, 3), dtype=torch.uint8, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return features

    @torch.inference_mode()
    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute [b, d] from uint8 [b, h, w, 3] on the same device."""
        x = pixels.permute(0, 3, 1, 2)  # channels last in memory
        with self._exact(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.network((x.float() / 255 - self.mean) / self.std)

    def _exact(self) -> contextlib.AbstractContextManager:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        # The same bits from every run, and no TensorFloat-32 where float32 is asked for.
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)

    def _on_cpu(self, pixels: np.ndarray) -> np.ndarray:
        # torch.tensor copies: an array out of an object store is read-only, which from_numpy warns about.
        return self.finish(self._forward(torch.tensor(pixels)).float().numpy())

    def _launched(
        self, pixels: np.ndarray, copies: torch.cuda.Stream
    ) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Queue a batch on the GPU; returns where its features will be and the event after which they are."""
        # Only from pinned memory does a copy run beside the computation. torch keeps such memory until the
        # copy is done.
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = pixels
        with torch.cuda.device(self.device):
            computing = torch.cuda.current_stream()
            with torch.cuda.stream(copies):
                on_device = pinned.to(self.device, non_blocking=True)
            computing.wait_stream(copies)
            on_device.record_stream(computing)  # not to be reused for the next copy before it is read
            features = self._forward(on_device).float()
            result = torch.empty(features.shape, pin_memory=True)
            result.copy_(features, non_blocking=True)
            done = torch.cuda.Event()
            done.record(computing)
        return result, done

    def _fetched(self, launched: tuple[torch.Tensor, torch.cuda.Event]) -> np.ndarray:
        result, done = launched
        done.synchronize()
        return self.finish(result.numpy())


def overlapped(
    batches: Iterable[np.ndarray], launch: Callable[[np.ndarray], Any], fetch: Callable[[Any], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield fetch(launch(batch)) in order, each fetched only when the next is launched."""
    ahead = None
    for pixels in batches:
        behind, ahead = ahead, launch(pixels)
        if behind is not None:
            yield fetch(behind)
    if ahead is not None:
        yield fetch(ahead)
