"""An inverted file for joining a set with itself: lists of near rows, and which lists each row probes.

Rows belong to the list of their nearest centroid. A row probes every list whose centroid is at most `reach`
farther (in squared distance) than its nearest: rows inside a list probe one, rows between lists several. The
reach is read off a sample whose neighbors are known exactly, so that the recall asked for is reached. Which
list a row is in and which it probes are settled by direct differences: they depend on the embeddings alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import faiss
import numpy as np

from selective_ray.density import neighbors_needed
from selective_ray.distances import flat_nonzero, product_error, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.neighbors import TILE_PRODUCTS, TILE_QUERIES, TOGETHER_BYTES
from selective_ray.two_level import shares

if TYPE_CHECKING:
    from selective_ray.config import Density

# Lists for each square root of n: the work of finding lists and of joining them are then of a size.
LISTS_PER_ROOT = 2
# Rows that the centroids are trained on, for each list.
TRAINING_ROWS = 32
TRAINING_ITERATIONS = 10
# Rows whose exact neighbors tell how far to reach, and as many others that certify what came of it.
SAMPLE = 600
# Of the misses that are allowed, so many are planned for; the others are the sample's own error.
PLANNED_MISSES = 0.6
# Groups, the unit of work and of recovery: so many, and so many for each worker. Each is compared with most
# of the others, so they are as large as memory allows; lists that are larger are split.
GROUPS = 32
GROUPS_PER_WORKER = 4
LEAST_GROUP_ROWS = 256
GROUP_BYTES = 2**33
# Rows that a row is compared with by lists, on data whose neighborhoods overlap: so many times n^0.27, and so
# many for each neighbor. Measured (benchmarks/README.md); only plans are made by it.
COMPARED, COMPARED_PER_NEIGHBOR = 400, 50
# Rows of data that are harder than that have been compared with up to 1.75 times as many: where memory is
# stated, so much room is left for what they probe.
PROBES_ROOM = 2
# A squared distance between unit vectors is at most this: with it every list is probed.
WHOLE_SPHERE = 4.0


@dataclass(frozen=True)
class Plan:
    """How the neighbors of n rows are searched.

    needed is the number of nearest rows, themselves among them; lists is 0 in exact mode; kept neighbors of
    each row stay in `neighbors/`; asked_probes: so many lists for each row, as told. Only the size of groups
    looks at who does the work, and it does not change what is found.
    """

    n: int
    d: int
    needed: int
    lists: int
    workers: int = 1
    kept: int = 0
    asked_probes: int | None = None

    @property
    def group_rows(self) -> int:
        """Rows of a group at most."""
        each = -(-self.n // max(GROUPS, GROUPS_PER_WORKER * self.workers))
        return min(max(each, LEAST_GROUP_ROWS), max(GROUP_BYTES // (4 * self.d), LEAST_GROUP_ROWS))

    @property
    def exact(self) -> bool:
        """Whether every row is compared with every other."""
        return self.lists == 0

    @property
    def training_rows(self) -> int:
        """Rows that the centroids are trained on."""
        return min(self.n, TRAINING_ROWS * self.lists)

    def holder_bytes(self, rows: int, workers: int) -> int:
        """Bytes that one of so many processes takes which holds so many rows and joins groups of others.

        Its rows; while joining their lists, a group with its k nearest so far and what it probes, one of the
        groups it is joined with, and the training rows; while writing, what is kept of its rows, and as much
        again of what is read; a quarter of a GB for the libraries, and half as much for rows that are
        compared with all.
        """
        probes = min(self.lists, PROBES_ROOM * self.probes)
        group = replace(self, workers=workers).group_rows * (
            2 * 4 * self.d + 16 * 2 * self.needed + 32 * probes
        )
        joining = rows * 4 * probes + 2 * group + self.training_rows * 2 * 4 * self.d
        writing = rows * 2 * 12 * self.kept
        return rows * (4 * self.d + 8) + max(joining, writing) + TOGETHER_BYTES + 2**28

    @property
    def probes(self) -> int:
        """Lists that each row probes, about; 0 in exact mode."""
        if self.exact or self.asked_probes:
            return min(self.lists, self.asked_probes or 0)
        return math.ceil(self.compared * self.lists / self.n)

    @property
    def groups(self) -> int:
        """How many groups there are about."""
        return -(-self.n // self.group_rows)

    @property
    def compared(self) -> float:
        """Rows that each row is compared with, about."""
        if self.exact:
            return float(self.n)
        return min(self.n, max(COMPARED * self.n**0.27, COMPARED_PER_NEIGHBOR * self.needed))

    @property
    def products(self) -> float:
        """Products of d numbers in all, about: with centroids, with samples, with rows of lists."""
        return self.n * (self.compared + (0 if self.exact else self.lists + 2 * self.sample))

    def moved_bytes(self, itemsize: int) -> int:
        """Bytes of all groups, as they lie in Ray's object store: the rows, and what they probe."""
        return self.n * (itemsize * self.d + 24 + 4 * self.probes)

    def fetched_bytes(self, itemsize: int) -> int:
        """Bytes that cross the network at most: to the owners of groups, and from group to group.

        Each group is compared with rows of almost every other, and fetches it; a machine whose object store
        holds them all fetches each once.
        """
        return self.moved_bytes(itemsize) * (1 + self.groups)

    @property
    def sample(self) -> int:
        """Rows whose exact neighbors are found to choose the reach, and again to certify."""
        return min(self.n // 2, SAMPLE)


def plan(
    n: int,
    d: int,
    needed: int,
    *,
    mode: str = "auto",
    lists: int | None = None,
    probes: int | None = None,
    recall: float = 0.99,
    kept: int = 0,
) -> Plan:
    """Choose exact search or lists, and how many.

    Brute force computes n products a row, with lists `Plan.products` tells; what does not depend on n
    (training, starting) is worth about 60,000 products a row. A recall of 1 is exact. Raises UserError where
    lists are asked for and there are fewer rows than lists.
    """
    chosen = lists or 2 ** round(math.log2(max(2.0, LISTS_PER_ROOT * math.sqrt(n))))
    cheaper = n * n <= 1.5 * Plan(n, d, needed, chosen).products + 60_000 * n
    if mode == "exact" or recall >= 1 or (mode == "auto" and cheaper and not lists and not probes):
        chosen = 0
    elif chosen > n:
        raise UserError(
            f"density.lists = {chosen} exceeds the {n} embeddings; set it to {n} or fewer, or leave it out"
        )
    return Plan(n, d, needed, chosen, kept=kept, asked_probes=probes)


def plan_for(settings: Density, n: int, d: int, k: int) -> Plan:
    """Choose as the configuration says, for k neighbors."""
    return plan(
        *(n, d, neighbors_needed(k, settings.include_self)),
        mode=settings.mode,
        lists=settings.lists,
        probes=settings.probes,
        recall=settings.recall,
        kept=k if settings.keep_neighbors else 0,
    )


def draw(plan: Plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw row positions for training, int64 ascending, and for both samples, int64 [2 s]."""
    rng = np.random.default_rng(seed)
    training = np.sort(rng.choice(plan.n, plan.training_rows, replace=False))
    return training, rng.choice(plan.n, 2 * plan.sample, replace=False)


def train(sample: np.ndarray, lists: int, seed: int) -> np.ndarray:
    """Train the centroids of a coarse quantizer: float32 [lists, d], neighbors near each other in order.

    K-Means by FAISS in two levels, for the cost of a square root of the lists; then one iteration over all
    of them. One thread, so that the number of cores does not change the last bits.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        coarse = _kmeans(sample, max(1, round(math.sqrt(lists))), seed)
        coarse = coarse[_chain(coarse)]
        cell = faiss.knn(sample, coarse, 1)[1][:, 0]
        sizes = np.bincount(cell, minlength=len(coarse))
        share = np.zeros(len(coarse), np.int64)
        share[sizes > 0] = shares(sizes[sizes > 0], lists)
        parts = [_kmeans(sample[cell == c], int(share[c]), seed) for c in range(len(coarse)) if share[c]]
        centroids = np.concatenate(parts)
        nearest = faiss.knn(sample, centroids, 1)[1][:, 0]
    finally:
        faiss.omp_set_num_threads(threads)
    order = np.argsort(nearest, kind="stable")
    present, first = np.unique(nearest[order], return_index=True)
    sums = np.add.reduceat(sample[order], first, axis=0, dtype=np.float64)
    centroids[present] = sums / np.bincount(nearest, minlength=lists)[present][:, None]
    return centroids


def _kmeans(x: np.ndarray, c: int, seed: int) -> np.ndarray:
    if c >= len(x):
        return np.resize(x, (c, x.shape[1])).astype(np.float32)
    kmeans = faiss.Kmeans(
        x.shape[1],
        c,
        niter=TRAINING_ITERATIONS,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    kmeans.train(x)
    return kmeans.centroids


def _chain(x: np.ndarray) -> np.ndarray:
    """Order rows so that each follows the nearest that is left, from the first row on."""
    left = np.ones(len(x), bool)
    order = [0]
    left[0] = False
    for _ in range(len(x) - 1):
        rest = np.flatnonzero(left)
        difference = x[rest] - x[order[-1]]
        nearest = rest[np.einsum("nd,nd->n", difference, difference).argmin()]
        order.append(int(nearest))
        left[nearest] = False
    return np.array(order)


@dataclass(frozen=True)
class Assignment:
    """The list of every row, int32 [n], and what it probes: counts int32 [n], probes int32 [sum of counts].

    A row's own list is among its probes; they come in no particular order.
    """

    lists: np.ndarray
    counts: np.ndarray
    probes: np.ndarray

    @cached_property
    def _firsts(self) -> np.ndarray:
        """Where the probes of each row begin."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    def take(self, rows: np.ndarray) -> Assignment:
        """Return the assignment of some rows, in the order given."""
        counts = self.counts[rows].astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Assignment(
            self.lists[rows], counts, self.probes[np.repeat(self._firsts[rows], counts) + within]
        )


def propose(
    x: np.ndarray, centroids: np.ndarray, nth: int, slack: float
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for a tile of rows after the other, the centroids that come near them, by float32 products.

    A score is half of |x|^2 - |x - c|^2, so that its error is half of that of two distances. Named are all
    within `slack` of the nth best score of their row: the tile, row int64 [p] ascending within it, centroid
    int64 [p] and score float32 [p].
    """
    half_norms = (np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64) / 2).astype(np.float32)
    columns = np.ascontiguousarray(centroids.T)
    step = max(TILE_QUERIES, TILE_PRODUCTS // len(centroids))
    buffer = np.empty((step, len(centroids)), np.float32)
    for start in range(0, len(x), step):
        tile = slice(start, min(start + step, len(x)))
        scores = np.matmul(x[tile], columns, out=buffer[: tile.stop - start])
        scores -= half_norms
        last = len(centroids) - nth
        best = scores.max(axis=1) if nth == 1 else np.partition(scores, last, axis=1)[:, last]
        hits = flat_nonzero(scores >= (best - np.float32(slack))[:, None])
        yield tile, *np.divmod(hits, len(centroids)), scores.reshape(-1)[hits]


def assign(
    x: np.ndarray,
    centroids: np.ndarray,
    *,
    reach: float = 0.0,
    probes: int | None = None,
    propose: Callable[..., Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]] = propose,
) -> Assignment:
    """Find the list of every row and the lists it probes: those within `reach`, or its `probes` nearest.

    Products propose; wherever they leave a doubt direct differences decide, ties to the smallest list.
    """
    norms = np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64)
    margin = product_error(x.shape[1], 1.0, math.sqrt(norms.max()))
    if probes is None:
        found = [
            _within_reach(x[tile], centroids, *near, reach, margin)
            for tile, *near in propose(x, centroids, 1, reach / 2 + margin)
        ]
    else:
        probes = min(probes, len(centroids))
        found = [
            _nearest_lists(x[tile], centroids, row, column, probes)
            for tile, row, column, _ in propose(x, centroids, probes, margin)
        ]
    if not found:
        nothing = np.empty(0, np.int32)
        return Assignment(nothing, nothing, nothing)
    return Assignment(*(np.concatenate(parts).astype(np.int32) for parts in zip(*found, strict=True)))


def excess(x: np.ndarray, centroids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How much farther the centroids of some lists are than the nearest, in squared distance: [n, t].

    x float32 [n, d]; targets int [n, t] names lists of each row.
    """
    own = assign(x, centroids).lists
    rows = np.repeat(np.arange(len(x)), targets.shape[1])
    theirs = sq_dists_direct(x, rows, centroids, targets.ravel()).reshape(targets.shape)
    return theirs - sq_dists_direct(x, np.arange(len(x)), centroids, own)[:, None]


def ranks(x: np.ndarray, centroids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many centroids are nearer than those of some lists: int64 [n, t]; targets as in `excess`."""
    every = np.arange(len(centroids))
    found = np.empty(targets.shape, np.int64)
    for i, lists in enumerate(targets):
        sq_dists = sq_dists_direct(x[i : i + 1], np.zeros_like(every), centroids, every)
        found[i] = np.searchsorted(np.sort(sq_dists), sq_dists[lists])
    return found


def _within_reach(
    x: np.ndarray,
    centroids: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    scores: np.ndarray,
    reach: float,
    margin: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest list of every row, how many lie within reach of it, and these."""
    first = np.searchsorted(row, np.arange(len(x)))
    behind = 2 * (np.maximum.reduceat(scores, first)[row] - scores)
    # The nearest list: among those that products cannot tell apart, by direct differences.
    close = np.flatnonzero(behind <= 2 * margin)
    exact = sq_dists_direct(x, row[close], centroids, column[close])
    order = np.lexsort((column[close], exact, row[close]))
    _, first = np.unique(row[close][order], return_index=True)
    nearest = close[order[first]]
    own, own_sq_dists = column[nearest], exact[order[first]]
    kept = behind <= reach - 2 * margin
    kept[nearest] = True
    unsure = np.flatnonzero(~kept)
    exact = sq_dists_direct(x, row[unsure], centroids, column[unsure])
    kept[unsure] = exact - own_sq_dists[row[unsure]] <= reach
    return own, np.bincount(row[kept], minlength=len(x)), column[kept]


def _nearest_lists(
    x: np.ndarray, centroids: np.ndarray, row: np.ndarray, column: np.ndarray, probes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest list of every row, the number of probes, and so many nearest lists."""
    order = np.lexsort((column, sq_dists_direct(x, row, centroids, column), row))
    row, column = row[order], column[order]
    first = np.searchsorted(row, np.arange(len(x)))
    kept = np.arange(len(row)) - first[row] < probes
    return column[first], np.full(len(x), probes), column[kept]


def reach_for(excesses: np.ndarray, recall: float) -> float:
    """Return the reach within which the lists of a sample's neighbors lie, as often as is planned for.

    excesses [p]: `excess` of the list of each neighbor. Of the 1 - recall that may be missed only
    PLANNED_MISSES is used up.
    """
    share = 1 - PLANNED_MISSES * (1 - recall)
    return min(WHOLE_SPHERE, float(np.quantile(excesses, share, method="higher")))
