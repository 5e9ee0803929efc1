"""K-Means as published (Lloyd from a seeded random start), with sums that no order of adding can change.

The loop is `lloyd`; it is given a step that assigns all rows and returns their merged `Partial`. Here a step
is `Rows.step` over an array in memory; on Ray it is a sum over the actors that hold the shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from selective_ray.assignment import Assignment
from selective_ray.distances import sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.schema import Partial, farthest

# More repairs than this after the last iteration would mean that the objective does not fall any more.
MAX_EXTRA_ITERATIONS = 10_000
# Coordinates that are turned into integers at a time: 256 KB of int64.
FIXED_ENTRIES = 1 << 15
# Sums that travel in one Partial: 64 MB of int64. More clusters are reduced in ranges, one after the other.
RANGE_ENTRIES = 1 << 23


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


def holder_bytes(rows: int, d: int, c: int) -> int:
    """Bytes that a process takes which holds so many rows: they, their bounds and labels; sums and centroids.

    Of the centroids it has two sets, one of them by groups, too, and in parts those of repairs or starts.
    """
    return rows * (4 * d + 64) + c * d * (8 + 4 * 4) + 2**28


class TooFewDistinct(UserError):
    """There are fewer distinct embeddings than clusters, of which the labeled images take some."""

    def __init__(self, distinct: int, n: int, labeled: int = 0) -> None:
        room = max(0, distinct - labeled)
        besides = f" besides those of {labeled} labeled images" if labeled else ""
        super().__init__(
            f"the budget exceeds the {room} distinct embeddings among {n} images{besides}; "
            + (f"lower --budget to {room} or fewer" if room else "there is nothing left to label")
        )
        self.distinct = distinct


def add_rows(
    sums: np.ndarray, x: np.ndarray, rows: np.ndarray, labels: np.ndarray, scale: float, sign: int
) -> None:
    """Add rows of x to the sums int64 [c, d] of their clusters in fixed point, or take them out."""
    # Sorting integers of 16 bits takes a tenth of the time.
    short = labels.astype(np.uint16) if len(sums) <= 2**16 else labels
    order = np.argsort(short, kind="stable")
    rows, labels = rows[order], labels[order]
    step = max(1, FIXED_ENTRIES // x.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        first = np.append(0, np.flatnonzero(np.diff(labels[part])) + 1)
        scaled = x.take(rows[part], 0)
        scaled *= np.float32(scale)
        fixed = np.rint(scaled, out=scaled).astype(np.int64)
        sums[labels[part][first]] += sign * np.add.reduceat(fixed, first, axis=0)


class Rows:
    """The rows one process holds, with the cluster each is in and their exact sums.

    x float32 [n, d] unit rows, image_ids int64 [n], total the number of rows of all processes (it sets the
    fixed point). Rows that change cluster are moved by subtracting and adding integers, so a step costs the
    products and the rows that moved.
    """

    def __init__(
        self, x: np.ndarray, image_ids: np.ndarray, total: int, assignment: Assignment | None = None
    ) -> None:
        self.x, self.image_ids = x, image_ids
        self.scale = 2.0 ** fixed_point_bits(total)
        self.assignment = assignment or Assignment(x)
        self.sums = np.empty((0, x.shape[1]), np.int64)
        self.counts = np.empty(0, np.int64)
        self.sq_norm = 0
        step = max(1, FIXED_ENTRIES // x.shape[1])
        for start in range(0, len(x), step):
            part = x[start : start + step].astype(np.float64)
            sq_norms = np.einsum("nd,nd->n", part, part)
            self.sq_norm += int(np.rint(sq_norms * self.scale).sum(dtype=np.int64))

    def step(self, centroids: np.ndarray, candidates: int = 0, clusters: slice = slice(None)) -> Partial:
        """Assign every row to its nearest centroid; return the Partial with the farthest `candidates`.

        Its sums and counts are those of some clusters; to ask for others of the same centroids costs nothing.
        """
        if len(self.sums) != len(centroids):
            self.sums = np.zeros(centroids.shape, np.int64)
            self.counts = np.zeros(len(centroids), np.int64)
        computed = self.assignment.products
        changed, before = self.assignment.assign(centroids)
        held = before >= 0
        self._add(changed[held], before[held], -1)
        self._add(changed, self.assignment.labels[changed], 1)
        far = self._farthest(centroids, candidates)
        computed = self.assignment.products - computed
        sums, counts = self.sums[clusters].copy(), self.counts[clusters].copy()
        return Partial(sums, counts, self.sq_norm, *far, candidates, computed)

    def labels(self, centroids: np.ndarray) -> np.ndarray:
        """Return the nearest centroid of every row, int32 [n]."""
        self.assignment.assign(centroids)
        return self.assignment.labels

    def _add(self, rows: np.ndarray, labels: np.ndarray, sign: int) -> None:
        """Add rows to the sums of some clusters, or take them out."""
        add_rows(self.sums, self.x, rows, labels, self.scale, sign)
        self.counts += sign * np.bincount(labels, minlength=len(self.counts))

    def _farthest(self, centroids: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not capacity:
            return farthest(np.empty(0), np.empty(0, np.int64), self.x[:0], 0)
        sq_dists = sq_dists_direct(self.x, np.arange(len(self.x)), centroids, self.assignment.labels)
        return farthest(sq_dists, self.image_ids, self.x, capacity)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, for the person watching.

    inertia is the mean squared distance of the rows to the centroids they were assigned to; shift the root
    mean square of how far the centroids then moved; share how many of the n·c distances were computed, which
    like the seconds depends on who did the work.
    """

    number: int
    inertia: float
    shift: float
    empty: int
    smallest: int
    largest: int
    share: float = field(compare=False)
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Clustering:
    """The outcome of `lloyd`.

    centroids float32 [c, d] are the ones to write; the labels are those that `assigned_by` float32 [c, d]
    gives. They are the same array where the labels belong to the centroids written.
    """

    centroids: np.ndarray
    assigned_by: np.ndarray
    history: list[Iteration]


# Assign all rows to centroids float32 [c, d]; the Partial of all n rows, with so many candidates for empty
# clusters, and the sums and counts of some clusters.
Step = Callable[[np.ndarray, int, slice], Partial]


def lloyd(
    step: Step,
    centroids: np.ndarray,
    *,
    n: int,
    iterations: int,
    tolerance: float,
    final_assignment: bool,
    history: Sequence[Iteration] = (),
    watch: Callable[[Iteration], None] = lambda iteration: None,
    keep: Callable[[np.ndarray, list[Iteration]], None] = lambda centroids, history: None,
) -> Clustering:
    """Lloyd's algorithm on unit vectors; centroids are means and are not normalized (published code).

    It ends after `iterations`; at a fixed point, which equals running on; or when an iteration lowers the
    mean squared distance by less than `tolerance` of itself. With `final_assignment` the labels belong to
    the centroids written; without, they lag one update, as in the published code.

    Empty clusters: the published code makes NaN of them, and in its dense form one empty cluster then
    attracts every row. Here empty clusters, in order of id, start again at the rows farthest from their
    centroids (ties to the smallest image_id, no vector twice), and iterations go on until the labels
    have no empty cluster. Where none is ever empty the labels equal the published ones.

    Each call of the step sends c·d floats to the rows' owners and brings the sums of one range of clusters
    back. `keep` is given what the next iteration starts with; centroids and history as it was given them
    continue there. Raises UserError when the rows have fewer than c distinct vectors, with their number.
    """
    history = list(history)
    while True:
        updated, now = iterate(step, centroids, n, len(history) + 1)
        previous_inertia = history[-1].inertia if history else math.inf
        history.append(now)
        watch(now)
        if not now.empty and np.array_equal(updated, centroids):
            return Clustering(centroids, centroids, history)
        fell = previous_inertia - now.inertia
        converged = tolerance > 0 and len(history) > 1 and fell <= tolerance * previous_inertia
        done = converged or len(history) >= iterations
        if done and not now.empty:
            if not final_assignment:
                return Clustering(updated, centroids, history)
            if not np.any(counts_of(step, updated) == 0):
                return Clustering(updated, updated, history)
        if len(history) > iterations + MAX_EXTRA_ITERATIONS:
            raise UserError(
                f"K-Means still has {now.empty} empty clusters after {len(history)} iterations; "
                "lower --budget or try another --seed"
            )
        centroids = updated
        keep(centroids, list(history))


def iterate(
    step: Step, centroids: np.ndarray, n: int, number: int, *, repair: bool = True
) -> tuple[np.ndarray, Iteration]:
    """Assign and update once, range by range of clusters; without repair empty clusters stay as they are."""
    begun = time.monotonic()
    c, d = centroids.shape
    updated, counts = np.empty_like(centroids), np.empty(c, np.int64)
    spread, moved, products = 0.0, 0.0, 0
    for clusters in ranges(c, d):
        partial = step(centroids, 0, clusters)
        counts[clusters] = partial.counts
        updated[clusters] = update(partial, centroids[clusters], n)
        spread += _spread(partial, centroids[clusters], n)
        products += partial.products
    empty = np.flatnonzero(counts == 0)
    if len(empty) and repair:
        updated[empty] = starts_for_empty(step(centroids, len(empty), slice(0, 0)), empty, c, n)
    for clusters in ranges(c, d):
        moved += np.sum(np.square(updated[clusters].astype(np.float64) - centroids[clusters]))
    return updated, Iteration(
        number,
        max(0.0, partial.sq_norm / 2.0 ** fixed_point_bits(n) / n + spread),
        math.sqrt(moved / c),
        len(empty),
        int(counts.min()),
        int(counts.max()),
        products / (n * c),
        time.monotonic() - begun,
    )


def counts_of(step: Step, centroids: np.ndarray) -> np.ndarray:
    """Return how many rows are nearest to each centroid, int64 [c]."""
    return np.concatenate([step(centroids, 0, clusters).counts for clusters in ranges(*centroids.shape)])


def ranges(c: int, d: int) -> Iterator[slice]:
    """Cut c clusters of d dimensions into ranges whose sums travel together."""
    width = max(1, RANGE_ENTRIES // d)
    for start in range(0, c, width):
        yield slice(start, min(c, start + width))


def update(partial: Partial, centroids: np.ndarray, n: int) -> np.ndarray:
    """Return the means of the clusters, float32 [c, d]; an empty cluster keeps its centroid."""
    means = partial.sums / (np.maximum(partial.counts, 1)[:, None] * 2.0 ** fixed_point_bits(n))
    return np.where(partial.counts[:, None] > 0, means.astype(np.float32), centroids)


def inertia(partial: Partial, centroids: np.ndarray, n: int) -> float:
    """Mean squared distance of the rows to their centroids, from the exact sums of all clusters alone."""
    return max(0.0, partial.sq_norm / 2.0 ** fixed_point_bits(n) / n + _spread(partial, centroids, n))


def _spread(partial: Partial, centroids: np.ndarray, n: int) -> float:
    """What clusters add to the mean squared distance beside the mean of |x|^2.

    sum |x - c|^2 = sum |x|^2 - 2 c·(sum of x) + count·|c|^2, cluster by cluster.
    """
    wide = centroids.astype(np.float64)
    dots = np.einsum("cd,cd->", wide, partial.sums / 2.0 ** fixed_point_bits(n))
    norms = np.einsum("cd,cd,c->", wide, wide, partial.counts.astype(np.float64))
    return float(norms - 2 * dots) / n


def starts_for_empty(partial: Partial, empty: np.ndarray, c: int, n: int) -> np.ndarray:
    """Return a new start for every empty cluster, float32 [e, d], repeating none while vectors last.

    The partial holds e candidates. Raises UserError when every row lies on its centroid: there are fewer
    distinct vectors than the c clusters.
    """
    away = partial.far_sq_dists > coincident_sq_dist(n, partial.far_x.shape[1])
    starts = partial.far_x[away]
    if not len(starts):
        raise TooFewDistinct(c - len(empty), n)
    # Fewer far rows than empty clusters: the rest repeat the last, stay empty, and are repaired next time.
    return starts[np.minimum(np.arange(len(empty)), len(starts) - 1)]
