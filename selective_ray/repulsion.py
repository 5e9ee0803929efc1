"""The regularizer: how picks push the rows near them (USL, equation 6), by direct differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selective_ray.distances import blocks, sq_dists_direct


@dataclass(frozen=True)
class Repulsion:
    """How picks push others away (USL, equation 6, as the published code has it).

    A pick s adds 1 / |x - s|^(2 alpha) to the repulsion of x: alpha works on the squared distance. Picks at
    a squared distance of horizon_sq_dist or more add nothing (0: no limit; CIFAR code), and only the
    horizon_picks nearest do (0: all; ImageNet code), ties to the smallest cluster. With exclude_own_cluster
    the pick of x's own cluster adds nothing; it is left out after the window of the nearest is taken, as
    published. A pick at distance zero (x itself or its exact duplicate) never adds anything.
    """

    alpha: float
    horizon_sq_dist: float = 0.0
    horizon_picks: int = 0
    exclude_own_cluster: bool = True

    def window(self, m: int) -> int:
        """Number of nearest picks that repel, of m; 0 where all do."""
        return self.horizon_picks if self.horizon_picks < m else 0

    def push(self, sq_dists: np.ndarray, own: np.ndarray) -> np.ndarray:
        """What single picks add, of the shape of sq_dists float64 and of own bool, the row's own cluster."""
        counts = sq_dists > 0
        if self.horizon_sq_dist > 0:
            counts &= sq_dists < self.horizon_sq_dist
        if self.exclude_own_cluster:
            counts &= ~own
        return self._pushed(np.where(counts, sq_dists, np.inf))

    def least(self, sq_dists: np.ndarray) -> np.ndarray:
        """Return a convex function below the push of other clusters' picks at sq_dists > 0, of that shape.

        The push itself; with a horizon, from alpha / (1 + alpha) of it on, the tangent that is 0 there.
        """
        if not self.horizon_sq_dist:
            return self._pushed(sq_dists)
        touch = self.horizon_sq_dist * self.alpha / (1 + self.alpha)
        tangent = touch**-self.alpha * (1 + self.alpha - self.alpha * sq_dists / touch)
        return np.where(sq_dists < touch, self._pushed(sq_dists), np.maximum(tangent, 0.0))

    def _pushed(self, sq_dists: np.ndarray) -> np.ndarray:
        """1 / sq_dists^alpha; the usual exponents need no power."""
        if self.alpha in (0.5, 1.0):
            return 1.0 / (sq_dists if self.alpha == 1.0 else np.sqrt(sq_dists))
        return sq_dists**-self.alpha


@dataclass(frozen=True)
class PickedVectors:
    """What repels in a round, by (cluster, image): cluster_ids int32 [m], image_ids int64 [m], x float32
    [m, d]."""

    cluster_ids: np.ndarray
    image_ids: np.ndarray
    x: np.ndarray


def in_order(push: np.ndarray) -> np.ndarray:
    """Add columns one by one, float64 [n]: zeros among them then change no bit of the sum."""
    total = np.zeros(len(push))
    for column in push.T:
        total += column
    return total


def direct_repulsion(
    x: np.ndarray, cluster_ids: np.ndarray, picked: PickedVectors, parameters: Repulsion
) -> np.ndarray:
    """Sum the push of the picks of a round on rows x [n, d] by direct differences with all: float64 [n]."""
    m = len(picked.x)
    new = np.empty(len(x))
    for rows in blocks(len(x), 4 * m):
        count = rows.stop - rows.start
        row, column = np.repeat(np.arange(rows.start, rows.stop), m), np.tile(np.arange(m), count)
        sq_dists = sq_dists_direct(x, row, picked.x, column).reshape(count, m)
        own = cluster_ids[rows, None] == picked.cluster_ids
        push = parameters.push(sq_dists, own)
        if h := parameters.window(m):
            nearest = np.argsort(sq_dists, axis=1, kind="stable")[:, :h]
            new[rows] = in_order(np.take_along_axis(push, nearest, axis=1))
        else:
            new[rows] = push.sum(axis=1)
    return new


def repulsion_unit(picked: PickedVectors, parameters: Repulsion) -> float:
    """Median repulsion that picks feel from each other: the unit of the regularizer in scaled mode.

    Over at most 256 picks, evenly spaced in cluster order; 1 where picks do not reach each other.
    """
    sample = np.unique(np.linspace(0, len(picked.x) - 1, 256).astype(np.int64))
    felt = direct_repulsion(picked.x[sample], picked.cluster_ids[sample], picked, parameters)
    return float(np.median(felt)) or 1.0
