"""kNN density: how close the nearest neighbors of an image are.

Published: density = 1 / mean of k squared distances, the image itself included as its own first neighbor.
Where the neighbors come from is no matter here: `neighbors` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from selective_ray.errors import UserError
from selective_ray.schema import Neighbors


def neighbors_needed(k: int, include_self: bool) -> int:
    """Number of nearest rows, the image itself among them, that an estimate over k neighbors needs."""
    return k if include_self else k + 1


def possible_k(k: int, n: int, include_self: bool, asked: bool) -> tuple[int, str | None]:
    """Return the k that n rows allow, with a warning where the default had to be lowered.

    Raises UserError where a k that was asked for is too large.
    """
    largest = n if include_self else n - 1
    if largest < 1:
        raise UserError("one embedding has no neighbor but itself; leave density.include_self at true")
    if k <= largest:
        return k, None
    if asked:
        raise UserError(
            f"density.k = {k} exceeds the {largest} neighbors that {n} embeddings have; "
            f"set density.k to {largest} or fewer"
        )
    return largest, f"density.k lowered from {k} to {largest}: there are {n} embeddings"


def too_few_distinct(k: int, least: int) -> UserError:
    """Return the error of a k that only copies could make possible."""
    return UserError(
        f"density.k = {k} exceeds the {least} neighbors that the distinct embeddings have with "
        f"density.duplicates = collapse; set density.k to {least} or fewer"
    )


def sq_dists_of(found: Neighbors, *, k: int, estimator: str) -> np.ndarray:
    """What the estimator measures, float32 [n]: the mean of k squared distances, or the k-th.

    With self included (published), `found` holds k columns of which the first is the image itself at
    distance 0. Without, it holds k + 1: the image itself adds nothing to the sum and comes before the k-th,
    so it needs no search, also where exact duplicates share its distance.
    """
    if estimator == "mean":
        return (found.sq_dists.sum(axis=1) / k).astype(np.float32)
    return found.sq_dists[:, -1].astype(np.float32)


def relative(sq_dists: np.ndarray, *, unit: float, floor: float) -> np.ndarray:
    """Return density = unit / squared distance, float64 [n].

    unit is 1 as published, or the median squared distance, which makes 1 the median density. In the
    published code exact duplicates get an infinite density; here a squared distance counts as at least
    `floor`.
    """
    return max(unit, floor) / np.maximum(sq_dists.astype(np.float64), floor)


def log_density(kth_sq_dists: np.ndarray, *, k: int, n: int, d: int, floor: float) -> np.ndarray:
    """Logarithm of the kNN density estimate k / (n · A_d · D^d), float64 [n].

    D is the k-th distance and A_d the volume of the unit ball (USL, section 3.1). At d = 512 the density
    itself overflows every float; its logarithm does not. Squared distances under `floor` count as `floor`.
    """
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    log_distance = np.log(np.maximum(kth_sq_dists.astype(np.float64), floor)) / 2
    return math.log(k) - math.log(n) - log_ball - d * log_distance


def half_counts(values: np.ndarray, high: int | None) -> np.ndarray:
    """Count values by half of their bits, int64 [65536]: the upper half, or the lower half where the upper is
    `high`. Floats that are not negative are ordered like their bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if high is None:
        return np.bincount(bits >> 16, minlength=1 << 16)
    return np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)


def median(count: Callable[[int | None], np.ndarray]) -> float:
    """Return the exact lower median of float32 values >= 0 that are spread over many processes.

    `count` is the sum of `half_counts` over all of them: two rounds of 65,536 counts, however many values.
    """
    above = np.cumsum(count(None))
    rank = (above[-1] - 1) // 2
    high = int(np.searchsorted(above, rank, side="right"))
    below = above[high - 1] if high else 0
    low = int(np.searchsorted(np.cumsum(count(high)), rank - below, side="right"))
    return float(np.uint32(high << 16 | low).view(np.float32))
