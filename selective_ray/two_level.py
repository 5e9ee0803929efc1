"""K-Means in two levels, for so many clusters that every iteration over all of them is dear.

About √m coarse clusters first; then each is split, in proportion to its size, by K-Means among its own
rows, which compare with about √m centroids instead of m; then a few iterations of Lloyd over all rows and
clusters, which also fill clusters that are empty. Fewer clusters are left to Lloyd's loop alone. Every part
is a sum over rows in fixed point or a draw by the hash of a row's position: nothing depends on who holds
which rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from selective_ray.assignment import assign
from selective_ray.kmeans import Clustering, Iteration, Rows, Step, counts_of, iterate, lloyd
from selective_ray.schema import Partial
from selective_ray.starts import uniform

# Iterations of the coarse clusters, inside each of them, and over all clusters at the end.
COARSE_ITERATIONS = 10
INSIDE_ITERATIONS = 10
FULL_ITERATIONS = 3
ITERATIONS = COARSE_ITERATIONS + INSIDE_ITERATIONS + FULL_ITERATIONS
# More than all iterations of a phase.
LONGEST = 100_000
# What the hash of a position is for, beside the rounds of k-means||.
DRAW_INSIDE = 1000


@dataclass(frozen=True)
class Split:
    """Coarse clusters, centroids float32 [k, d], and which clusters each is split into.

    Coarse cluster i is split into first[i] … first[i + 1] - 1; first int64 [k + 1].
    """

    centroids: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Reached:
    """How far a clustering has come: the centroids float32 [c, d] that the next iteration starts with.

    phase is "coarse", "inside" (which has the split) or "full"; history is that of the phase.
    """

    phase: str
    centroids: np.ndarray
    history: list[Iteration]
    split: Split | None = None

    @property
    def number(self) -> int:
        """A number that grows from one to the next."""
        before = {"coarse": 0, "inside": LONGEST, "full": 2 * LONGEST}
        return before[self.phase] + len(self.history)


class Inside:
    """The nearest centroid of each row among those of its own coarse cluster; used as an `Assignment` is.

    x float32 [n, d]; coarse int32 [n] are the rows' coarse clusters.
    """

    def __init__(self, x: np.ndarray, coarse: np.ndarray, first: np.ndarray) -> None:
        self.x, self.first = x, first
        order = np.argsort(coarse, kind="stable")
        self.members = np.split(order, np.cumsum(np.bincount(coarse, minlength=len(first) - 1))[:-1])
        self.labels = np.full(len(x), -1, np.int32)
        self.products = 0
        self.centroids: np.ndarray | None = None

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest; returns the rows whose label changed, and their labels before."""
        before = self.labels
        if self.centroids is None or not np.array_equal(centroids, self.centroids):
            self.labels = before.copy()
            for rows, first, end in zip(self.members, self.first[:-1], self.first[1:], strict=True):
                if len(rows):
                    self.labels[rows] = assign(self.x.take(rows, 0), centroids[first:end]) + first
                    self.products += len(rows) * int(end - first)
            self.centroids = centroids
        changed = np.flatnonzero(self.labels != before)
        return changed, before[changed]

    def draw(self, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw as many rows of each coarse cluster as it is split into, fewer where there are fewer.

        positions int64 [n]. Returns coarse clusters int64, hashes float64 and positions int64 of the rows.
        """
        hashes = uniform(positions, seed, DRAW_INSIDE)
        rows = [
            members[np.argsort(hashes[members], kind="stable")[:share]]
            for members, share in zip(self.members, np.diff(self.first), strict=True)
        ]
        coarse = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        taken = np.concatenate(rows)
        return coarse, hashes[taken], positions[taken]


def inside(rows: Rows, coarse: np.ndarray, first: np.ndarray, total: int) -> Rows:
    """Return the same rows, each to be compared with the centroids of its coarse cluster alone."""
    return Rows(rows.x, rows.image_ids, total, Inside(rows.x, coarse, first))


def shares(sizes: np.ndarray, m: int) -> np.ndarray:
    """Share out m clusters in proportion to sizes, int64: one at least, and no more than there are rows.

    sizes int64 [k], all above zero; m is between k and their sum.
    """
    exact = m * sizes / sizes.sum()
    share = np.clip(np.floor(exact).astype(np.int64), 1, sizes)
    while missing := m - int(share.sum()):
        room = np.flatnonzero(share < sizes if missing > 0 else share > 1)
        sign = 1 if missing > 0 else -1
        room = room[np.argsort(sign * (share[room] - exact[room]), kind="stable")]
        share[room[: abs(missing)]] += sign
    return share


def merge_draws(draws: list[tuple[np.ndarray, np.ndarray, np.ndarray]], first: np.ndarray) -> np.ndarray:
    """Merge what `Inside.draw` drew from parts of the rows: m positions int64, by coarse cluster."""
    coarse, hashes, positions = (np.concatenate(part) for part in zip(*draws, strict=True))
    order = np.lexsort((positions, hashes, coarse))
    coarse, positions = coarse[order], positions[order]
    rank = np.arange(len(coarse)) - np.searchsorted(coarse, coarse)
    return positions[rank < np.diff(first)[coarse]]


@dataclass(frozen=True)
class Steps:
    """What `cluster` asks of whoever holds the rows.

    full is the step of `lloyd`; inside compares rows with the centroids of their own coarse cluster; start
    gives so many centroids to start with, float32 [c, d]; start_inside gives rows drawn from every coarse
    cluster, as many as it is split into.
    """

    full: Step
    inside: Callable[[Split, np.ndarray, int, slice], Partial]
    start: Callable[[int], np.ndarray]
    start_inside: Callable[[Split], np.ndarray]


def cluster(
    steps: Steps,
    *,
    n: int,
    m: int,
    split_from: int,
    iterations: int,
    tolerance: float,
    final_assignment: bool,
    reached: Reached | None = None,
    watch: Callable[[Iteration], None] = lambda iteration: None,
    keep: Callable[[Reached], None] = lambda reached: None,
) -> Clustering:
    """Cluster n rows into m clusters, none of them empty: by `lloyd`, in two levels from `split_from` on.

    `keep` is given what the next iteration starts with, and `reached` continues there. In two levels the
    history is that of the iterations over all clusters, of which there are at most FULL_ITERATIONS.
    """
    two_levels = m >= split_from
    if reached is None:
        count = max(1, round(math.sqrt(m))) if two_levels else m
        reached = Reached("coarse" if two_levels else "full", steps.start(count), [])
        keep(reached)
    options = {"n": n, "tolerance": tolerance, "watch": watch}
    if reached.phase == "coarse":
        coarse = lloyd(
            steps.full,
            reached.centroids,
            iterations=COARSE_ITERATIONS,
            final_assignment=True,
            history=reached.history,
            keep=lambda centroids, history: keep(Reached("coarse", centroids, history)),
            **options,
        ).centroids
        sizes = counts_of(steps.full, coarse)
        split = Split(coarse, np.concatenate([[0], np.cumsum(shares(sizes, m))]))
        reached = Reached("inside", steps.start_inside(split), [], split)
        keep(reached)
    while reached.phase == "inside":
        step = functools.partial(steps.inside, reached.split)
        updated, now = iterate(step, reached.centroids, n, len(reached.history) + 1, repair=False)
        watch(now)
        reached = replace(reached, centroids=updated, history=[*reached.history, now])
        if now.number == INSIDE_ITERATIONS:
            reached = Reached("full", updated, [])
        keep(reached)
    return lloyd(
        steps.full,
        reached.centroids,
        iterations=min(iterations, FULL_ITERATIONS) if two_levels else iterations,
        final_assignment=final_assignment,
        history=reached.history,
        keep=lambda centroids, history: keep(Reached("full", centroids, history)),
        **options,
    )
