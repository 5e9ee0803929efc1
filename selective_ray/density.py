"""kNN density: how close the nearest neighbors of an image are.

Published: density = 1 / mean of k squared distances, the image itself included as its own first neighbor.
FAISS proposes the neighbors by matrix products; direct differences in float64 settle their distances, so
the numbers depend on the embeddings alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import faiss
import numpy as np

from selective_ray.distances import product_error, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.schema import Neighbors


def neighbors(
    queries: np.ndarray, base: Iterable[tuple[np.ndarray, np.ndarray]], k: int, *, error: float | None = None
) -> Neighbors:
    """Find the k nearest rows of all base blocks for every query row, the row itself among them.

    queries float32 [n, d]; base yields (image_ids int64 [b], x float32 [b, d]), each image once, at least k
    in all. The distances are exact: those of direct differences, the k smallest of them. Among rows at the
    same distance as the k-th, which ids are named is not promised. `error` overrides the error bound of a
    product (for tests).
    """
    found = Neighbors.none(len(queries), k)
    error = product_error(queries.shape[1]) if error is None else error
    for image_ids, x in base:
        # A shard of which every image was rejected has no rows.
        if not len(x):
            continue
        found = found.merge(_nearest_in_block(queries, image_ids, x, found.sq_dists[:, -1], k, error))
    return found


def _nearest_in_block(
    queries: np.ndarray, image_ids: np.ndarray, x: np.ndarray, kth: np.ndarray, k: int, error: float
) -> Neighbors:
    """Find the rows of one block that can be among the k nearest, given the k-th distance so far."""
    k_here = min(k, len(x))
    proposed = min(k_here + 8 + k_here // 16, len(x))
    products, columns = faiss.knn(queries, x, proposed)
    # A row of the block can only matter within the error bounds of the k-th so far and of the k-th here.
    limit = np.minimum(kth, products[:, k_here - 1] + error) + error
    rows, places = np.nonzero(products <= limit[:, None])
    exact = np.full(products.shape, np.inf)
    exact[rows, places] = sq_dists_direct(queries, rows, x, columns[rows, places])
    ids = np.where(np.isfinite(exact), image_ids[columns], -1)
    result = Neighbors.none(len(queries), k).merge(Neighbors(exact, ids))
    if proposed == len(x):
        return result
    # Rows that were not proposed lie at products[:, -1] or beyond. Where that is not surely farther than
    # the k-th distance, the whole block is searched; nothing is nearer than a k-th distance of zero.
    after = np.minimum(kth, result.sq_dists[:, k_here - 1])
    unsure = np.flatnonzero((products[:, -1] - error < after) & (after > 0))
    for row in unsure:
        result.sq_dists[row], result.image_ids[row] = _search_block(queries[row], image_ids, x, limit[row], k)
    return result


def _search_block(
    query: np.ndarray, image_ids: np.ndarray, x: np.ndarray, limit: float, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compare one query with every row of the block that a product cannot exclude: float64 [k], int64 [k]."""
    products = np.float32(query @ query) + np.einsum("nd,nd->n", x, x) - 2 * (x @ query)
    near = np.flatnonzero(products <= limit)
    exact = sq_dists_direct(query[None], np.zeros_like(near), x, near)
    one = Neighbors.none(1, k).merge(Neighbors(exact[None], image_ids[near][None]))
    return one.sq_dists[0], one.image_ids[0]


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
