"""The regularized selection: in every cluster the densest image, pushed away from the picks of the others.

The loop is `rounds`; it is given two steps. In memory they are the methods of one `Candidates`; on Ray each
actor has one for its shards, nominations merge as `Picks`, and the picks' vectors are sent to all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from selective_ray.distances import blocks, sq_dists_direct
from selective_ray.schema import Picks

# Float64 products of unit vectors are off by less than (d + 8) * 2^-51, under 1e-11 up to d = 20,000.
PRODUCT_ERROR = 1e-11
# Nearer than this, 1 / distance would magnify that error, so direct differences are taken.
NEAR_SQ_DIST = 1e-3
# What then remains of the error, relative to the repulsion (alpha up to 4), with a wide margin.
REPULSION_ERROR = 1e-6


@dataclass(frozen=True)
class Repulsion:
    """How picks push others away (USL, equation 6, as the published code has it).

    A pick s adds 1 / |x - s|^(2 alpha) to the repulsion of x: alpha works on the squared distance. Picks at
    a squared distance of horizon_sq_dist or more add nothing (0: no limit; CIFAR code), and only the
    horizon_picks nearest do (0: all; ImageNet code). With exclude_own_cluster the pick of x's own cluster
    adds nothing; it is left out after the window of the nearest is taken, as published. A pick at distance
    zero (x itself or its exact duplicate) never adds anything.
    """

    alpha: float
    horizon_sq_dist: float = 0.0
    horizon_picks: int = 0
    exclude_own_cluster: bool = True


@dataclass(frozen=True)
class PickedVectors:
    """The picks of one round in cluster order: cluster_ids int32 [m], x float32 [m, d]."""

    cluster_ids: np.ndarray
    x: np.ndarray


def repulsion_of(
    sq_dists: np.ndarray, own: np.ndarray, parameters: Repulsion
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the push of m picks on each of b rows: float64 [b], and whether a product may have misjudged it.

    sq_dists float64 [b, m]; own bool [b, m] marks the pick of the row's own cluster. A row is flagged, bool
    [b], where a pick lies within PRODUCT_ERROR of a horizon, so that direct differences must decide. The
    array sq_dists is overwritten.
    """
    m = sq_dists.shape[1]
    unsure = np.zeros(len(sq_dists), bool)
    if 0 < parameters.horizon_picks < m:
        h = parameters.horizon_picks
        # Ties at the window's edge go to the pick of the smallest cluster: a stable order decides.
        order = np.argsort(sq_dists, axis=1, kind="stable")[:, : h + 1]
        edge = np.take_along_axis(sq_dists, order[:, h - 1 :], axis=1)
        unsure |= edge[:, 1] - edge[:, 0] <= 2 * PRODUCT_ERROR
        sq_dists = np.take_along_axis(sq_dists, order[:, :h], axis=1)
        own = np.take_along_axis(own, order[:, :h], axis=1)
    counts = sq_dists > 0
    if parameters.horizon_sq_dist > 0:
        counts &= sq_dists < parameters.horizon_sq_dist
        unsure |= np.any(np.abs(sq_dists - parameters.horizon_sq_dist) <= PRODUCT_ERROR, axis=1)
    if parameters.exclude_own_cluster:
        counts &= ~own
    np.copyto(sq_dists, np.inf, where=~counts)
    push = 1.0 / np.sqrt(sq_dists) if parameters.alpha == 0.5 else sq_dists**-parameters.alpha
    return push.sum(axis=1), unsure


def repulsion_unit(picked: PickedVectors, parameters: Repulsion) -> float:
    """Median repulsion that picks feel from each other: the unit of the regularizer in scaled mode.

    Over at most 256 picks, evenly spaced in cluster order; 1 where picks do not reach each other.
    """
    m = len(picked.x)
    sample = np.unique(np.linspace(0, m - 1, 256).astype(np.int64))
    row, column = np.repeat(sample, m), np.tile(np.arange(m), len(sample))
    sq_dists = sq_dists_direct(picked.x, row, picked.x, column).reshape(len(sample), m)
    own = picked.cluster_ids[sample, None] == picked.cluster_ids
    median = float(np.median(repulsion_of(sq_dists, own, parameters)[0]))
    return median or 1.0


class Candidates:
    """The rows one process holds, with what the earlier rounds' picks did to them.

    x float32 [n, d] unit rows, image_ids int64 [n] ascending, cluster_ids int32 [n], densities float64 [n]
    in the unit that the weight is measured in. The repulsion R starts at 0 and follows the picks by an
    exponential moving average, R = momentum · R + (1 - momentum) · new, not corrected for its start: after
    j updates it has reached 1 - momentum^j of its steady state (published).
    """

    def __init__(
        self,
        x: np.ndarray,
        image_ids: np.ndarray,
        cluster_ids: np.ndarray,
        densities: np.ndarray,
        *,
        momentum: float,
        parameters: Repulsion,
    ) -> None:
        self.x, self.image_ids, self.cluster_ids, self.densities = x, image_ids, cluster_ids, densities
        self.momentum, self.parameters = momentum, parameters
        self.clusters, self.place = np.unique(cluster_ids, return_inverse=True)
        self.repulsion = np.zeros(len(x))
        self.unsure = np.zeros(len(x), bool)
        self.history: list[PickedVectors] = []

    def nominate(self, weight: float) -> Picks:
        """Return the best of these rows in each cluster by density - weight · repulsion.

        Ties go to the smallest image_id. Every row that could win within the error of products is judged by
        direct differences over all earlier picks, so the winners do not depend on how rows were blocked.
        """
        utilities = self.densities - weight * self.repulsion
        slack = weight * REPULSION_ERROR * self.repulsion
        surely = np.full(len(self.clusters), -np.inf)
        np.maximum.at(surely, self.place, utilities - slack)
        rows = np.flatnonzero((utilities + slack >= surely[self.place]) | self.unsure)
        exact = self.densities[rows] - weight * self.exact_repulsion(rows)
        return Picks.none().merge(Picks(self.cluster_ids[rows], self.image_ids[rows], exact))

    def repel(self, picked: PickedVectors) -> None:
        """Let the picks of a round push: update the repulsion of every row."""
        self.history.append(picked)
        x_picks = picked.x.astype(np.float64)
        norms = np.einsum("md,md->m", x_picks, x_picks)
        for rows in blocks(len(self.x), 4 * len(x_picks)):
            x = self.x[rows].astype(np.float64)
            sq_dists = x @ (-2.0 * x_picks.T)
            sq_dists += np.einsum("nd,nd->n", x, x)[:, None]
            sq_dists += norms
            row, column = np.nonzero(sq_dists < NEAR_SQ_DIST)
            sq_dists[row, column] = sq_dists_direct(x, row, x_picks, column)
            own = self.cluster_ids[rows, None] == picked.cluster_ids
            new, unsure = repulsion_of(sq_dists, own, self.parameters)
            self.repulsion[rows] = self.momentum * self.repulsion[rows] + (1 - self.momentum) * new
            self.unsure[rows] |= unsure

    def exact_repulsion(self, rows: np.ndarray) -> np.ndarray:
        """Recompute the repulsion of a few rows by direct differences over all earlier picks: float64 [r]."""
        repulsion = np.zeros(len(rows))
        for picked in self.history:
            m = len(picked.x)
            for part in blocks(len(rows), 4 * m):
                some = rows[part]
                row, column = np.repeat(some, m), np.tile(np.arange(m), len(some))
                sq_dists = sq_dists_direct(self.x, row, picked.x, column).reshape(len(some), m)
                own = self.cluster_ids[some, None] == picked.cluster_ids
                new, _ = repulsion_of(sq_dists, own, self.parameters)
                repulsion[part] = self.momentum * repulsion[part] + (1 - self.momentum) * new
        return repulsion


def find(image_ids: np.ndarray, picks: Picks) -> tuple[np.ndarray, np.ndarray]:
    """Find picks among rows with ascending image_ids: places in `picks` and row numbers, int64 [p] both."""
    row = np.searchsorted(image_ids, picks.image_ids)
    place = np.flatnonzero(row < len(image_ids))
    place = place[image_ids[row[place]] == picks.image_ids[place]]
    return place, row[place]


def rounds(
    nominate: Callable[[float], Picks],
    fetch: Callable[[Picks], PickedVectors],
    repel: Callable[[PickedVectors], None],
    *,
    n_rounds: int,
    weight: float,
    unit: Callable[[PickedVectors], float] = lambda picked: 1.0,
    watch: Callable[[int], None] = lambda number: None,
) -> Picks:
    """Nominate, let the picks repel, and nominate again: the picks of the last of n_rounds rounds.

    All clusters are picked anew in every round from the same repulsion (published: Jacobi style). The first
    round has none, so one round, or weight 0, gives the densest image of every cluster. `unit` measures the
    first picks where the weight is in units of their repulsion. A round brings m nominations and the m·d
    floats of the picks in, and sends those out.
    """
    picks = nominate(weight)
    watch(1)
    for number in range(2, n_rounds + 1):
        picked = fetch(picks)
        if number == 2:
            weight /= unit(picked)
        repel(picked)
        picks = nominate(weight)
        watch(number)
    return picks
