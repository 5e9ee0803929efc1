"""How much memory processes take: this one so far, and what others state before they start."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from selective_ray.reading import AHEAD_BYTES

# The libraries of a decoder; and what a network and its activations take, where nothing else is asked for.
DECODE_LIBRARIES = 512 * 2**20
ENCODE_MEMORY = 2 * 2**30


def decoder_bytes() -> int:
    """Bytes that a decoder takes besides the pixels that it passes on."""
    return DECODE_LIBRARIES + AHEAD_BYTES


def encoder_bytes(gib: float | None) -> int:
    """Bytes that an encoder states: so many GiB, where they were asked for."""
    return ENCODE_MEMORY if gib is None else round(gib * 2**30)


def shards_per_wave(encoders: int) -> int:
    """Shards that are embedded before encoders are started anew: a wave lists all their ranges at once."""
    return 64 * min(4, encoders)


def peak_memory() -> int:
    """Return the largest resident size that this process has had, in bytes."""
    try:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # Elsewhere than on Linux, where this number is handed down from the process that started this one.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
