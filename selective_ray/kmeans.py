"""K-Means as published (Lloyd from a seeded random start), with sums that no order of adding can change.

The loop is `lloyd`; it is given a step that assigns all rows and returns their merged `Partial`. Here a step
is `Rows.step` over an array in memory; on Ray it is a sum over the actors that hold the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from selective_ray.distances import blocks, product_error, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.schema import Partial, farthest

# More repairs than this after the last iteration would mean that the objective does not fall any more.
MAX_EXTRA_ITERATIONS = 10_000


def initial_rows(n: int, m: int, seed: int) -> np.ndarray:
    """Return the first m entries of `torch.randperm(n)` on a CPU generator seeded with `seed`: int64 [m].

    The published code starts centroid j at row perm[j]. A Fisher-Yates shuffle over a dictionary of the
    positions it touched gives the same numbers in O(m) memory, from the same Mersenne twister.
    """
    twister = np.random.MT19937()
    twister._legacy_seeding(seed)
    moved: dict[int, int] = {}
    rows = np.empty(m, np.int64)
    for i, raw in enumerate(twister.random_raw(m).tolist()):
        j = i + raw % (n - i)
        rows[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return rows


def fixed_point_bits(n: int) -> int:
    """Return s so that n coordinates of unit vectors, as integers of scale 2^s, add without overflow."""
    return 62 - max(0, math.ceil(math.log2(n)))


def coincident_sq_dist(n: int, d: int) -> float:
    """Return the squared distance under which the fixed point cannot tell a row from its centroid."""
    return 4.0 * d * 4.0 ** -(fixed_point_bits(n) + 1)


def assign(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of every row, ties to the smallest id: int32 [n].

    float32 products propose; where others come within their error bound, direct differences decide.
    """
    labels = np.empty(len(x), np.int32)
    norms = np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64)
    half_norms = (norms / 2).astype(np.float32)
    # Both compared distances may be off, and scores are half of distances.
    margin = np.float32(product_error(x.shape[1], 1.0, math.sqrt(norms.max(initial=1.0))))
    columns = np.ascontiguousarray(centroids.T)
    for rows in blocks(len(x), len(centroids)):
        scores = x[rows] @ columns
        np.subtract(half_norms, scores, out=scores)
        best = scores.argmin(axis=1)
        near = scores <= scores[np.arange(len(best)), best][:, None] + margin
        close = np.flatnonzero(np.count_nonzero(near, axis=1) > 1)
        if len(close):
            row, column = np.nonzero(near[close])
            exact = sq_dists_direct(x[rows], close[row], centroids, column)
            order = np.lexsort((column, exact, row))
            _, first = np.unique(row[order], return_index=True)
            best[close] = column[order[first]]
        labels[rows] = best
    return labels


class Rows:
    """The rows one process holds, with the cluster each is in and their exact sums.

    x float32 [n, d] unit rows, image_ids int64 [n], total the number of rows of all processes (it sets the
    fixed point). Rows that change cluster are moved by subtracting and adding integers, so a step costs the
    products and the rows that moved.
    """

    def __init__(self, x: np.ndarray, image_ids: np.ndarray, total: int) -> None:
        self.x, self.image_ids = x, image_ids
        self.scale = 2.0 ** fixed_point_bits(total)
        self.labels = np.full(len(x), -1, np.int32)
        self.sums = np.empty((0, x.shape[1]), np.int64)
        self.counts = np.empty(0, np.int64)
        origin = np.zeros((1, x.shape[1]), np.float32)
        sq_norms = sq_dists_direct(x, np.arange(len(x)), origin, np.zeros(len(x), np.int64))
        self.sq_norm = int(np.rint(sq_norms * self.scale).sum(dtype=np.int64))

    def step(self, centroids: np.ndarray, candidates: int = 0) -> Partial:
        """Assign every row to its nearest centroid; return the Partial with the farthest `candidates`."""
        if len(self.sums) != len(centroids):
            self.sums = np.zeros(centroids.shape, np.int64)
            self.counts = np.zeros(len(centroids), np.int64)
            self.labels[:] = -1
        labels = assign(self.x, centroids)
        changed = np.flatnonzero(labels != self.labels)
        self._add(changed[self.labels[changed] >= 0], self.labels, -1)
        self._add(changed, labels, 1)
        self.labels = labels
        far = self._farthest(centroids, candidates)
        return Partial(self.sums.copy(), self.counts.copy(), self.sq_norm, *far, candidates)

    def _add(self, rows: np.ndarray, labels: np.ndarray, sign: int) -> None:
        rows = rows[np.argsort(labels[rows], kind="stable")]
        for part in blocks(len(rows), self.x.shape[1]):
            taken = rows[part]
            clusters, first = np.unique(labels[taken], return_index=True)
            fixed = np.rint(self.x[taken] * self.scale).astype(np.int64)
            if len(taken):
                self.sums[clusters] += sign * np.add.reduceat(fixed, first, axis=0)
        self.counts += sign * np.bincount(labels[rows], minlength=len(self.counts))

    def _farthest(self, centroids: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not capacity:
            return farthest(np.empty(0), np.empty(0, np.int64), self.x[:0], 0)
        sq_dists = sq_dists_direct(self.x, np.arange(len(self.x)), centroids, self.labels)
        return farthest(sq_dists, self.image_ids, self.x, capacity)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, for the person watching."""

    number: int
    inertia: float
    empty: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class Clustering:
    """The outcome of `lloyd`.

    centroids float32 [c, d] are the ones to write; the labels are those that `assigned_by` float32 [c, d]
    gives. They are the same array where the labels belong to the centroids written.
    """

    centroids: np.ndarray
    assigned_by: np.ndarray
    history: list[Iteration]


def lloyd(
    step: Callable[[np.ndarray, int], Partial],
    centroids: np.ndarray,
    *,
    n: int,
    iterations: int,
    tolerance: float,
    final_assignment: bool,
    watch: Callable[[Iteration], None] = lambda iteration: None,
) -> Clustering:
    """Lloyd's algorithm on unit vectors; centroids are means and are not normalized (published code).

    It ends after `iterations`; at a fixed point, which equals running on; or when an iteration lowers the
    mean squared distance by less than `tolerance` of itself. With `final_assignment` the labels belong to
    the centroids written; without, they lag one update, as in the published code.

    Empty clusters: the published code makes NaN of them, and in its dense form one empty cluster then
    attracts every row. Here empty clusters, in order of id, start again at the rows farthest from their
    centroids (ties to the smallest image_id, no vector twice), and iterations go on until the labels
    have no empty cluster. Where none is ever empty the labels equal the published ones.

    step(centroids, e) returns the Partial of all n rows with e candidates. Each call sends c·d floats to
    the rows' owners and brings one Partial back. Raises UserError when the rows have fewer than c
    distinct vectors, with their number.
    """
    history: list[Iteration] = []
    previous_inertia = math.inf
    while True:
        partial = step(centroids, 0)
        empty = int(np.count_nonzero(partial.counts == 0))
        now = Iteration(
            len(history) + 1,
            inertia(partial, centroids, n),
            empty,
            int(partial.counts.min()),
            int(partial.counts.max()),
        )
        history.append(now)
        watch(now)
        updated = update(partial, centroids, n)
        if empty:
            updated[partial.counts == 0] = starts_for_empty(step(centroids, empty), n)
        elif np.array_equal(updated, centroids):
            return Clustering(centroids, centroids, history)
        fell = previous_inertia - now.inertia
        converged = tolerance > 0 and len(history) > 1 and fell <= tolerance * previous_inertia
        done = converged or len(history) >= iterations
        if done and not empty:
            if not final_assignment:
                return Clustering(updated, centroids, history)
            if not np.any(step(updated, 0).counts == 0):
                return Clustering(updated, updated, history)
        if len(history) > iterations + MAX_EXTRA_ITERATIONS:
            raise UserError(
                f"K-Means still has {empty} empty clusters after {len(history)} iterations; "
                "lower --budget or try another --seed"
            )
        previous_inertia = now.inertia
        centroids = updated


def update(partial: Partial, centroids: np.ndarray, n: int) -> np.ndarray:
    """Return the means of the clusters, float32 [c, d]; an empty cluster keeps its centroid."""
    means = partial.sums / (np.maximum(partial.counts, 1)[:, None] * 2.0 ** fixed_point_bits(n))
    return np.where(partial.counts[:, None] > 0, means.astype(np.float32), centroids)


def inertia(partial: Partial, centroids: np.ndarray, n: int) -> float:
    """Mean squared distance of the rows to their centroids, from the exact sums alone.

    sum |x - c|^2 = sum |x|^2 - 2 c·(sum of x) + count·|c|^2, cluster by cluster.
    """
    scale = 2.0 ** fixed_point_bits(n)
    wide = centroids.astype(np.float64)
    dots = np.einsum("cd,cd->", wide, partial.sums / scale)
    norms = np.einsum("cd,cd,c->", wide, wide, partial.counts.astype(np.float64))
    return max(0.0, (partial.sq_norm / scale - 2 * dots + norms) / n)


def starts_for_empty(partial: Partial, n: int) -> np.ndarray:
    """Return a new start for every empty cluster, float32 [e, d], repeating none while vectors last.

    Raises UserError when every row lies on its centroid: there are fewer distinct vectors than clusters.
    """
    empty = int(np.count_nonzero(partial.counts == 0))
    away = partial.far_sq_dists > coincident_sq_dist(n, partial.sums.shape[1])
    starts = partial.far_x[away]
    if not len(starts):
        distinct = len(partial.counts) - empty
        raise UserError(
            f"budget {len(partial.counts)} exceeds the {distinct} distinct embeddings among {n} images; "
            f"lower --budget to {distinct} or fewer"
        )
    # Fewer far rows than empty clusters: the rest repeat the last, stay empty, and are repaired next time.
    return starts[np.minimum(np.arange(empty), len(starts) - 1)]
