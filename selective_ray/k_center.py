"""k-center: each pick is the image farthest from all earlier ones (core-set).

Source: the greedy 2-approximation of Gonzalez (1985), as in Sener and Savarese, Active Learning for
Convolutional Neural Networks: A Core-Set Approach (ICLR 2018).

Deviations: the published code starts from labeled images and has none here, so the first pick is drawn with
the seed; the paper's mixed integer program, which drops outliers, is left out, as it is in most comparisons.
"""

from __future__ import annotations

import numpy as np

from selective_ray.distances import product_error, sq_dists_direct
from selective_ray.greedy import NEVER, Pick
from selective_ray.random_picks import hashed
from selective_ray.selection import find


class Farthest:
    """Rows with their squared distance to the nearest pick: x float32 [n, d], image_ids int64 [n] ascending.

    The utility is that squared distance; of the first pick a number above any. first_row is the position of
    the first row among all.
    """

    def __init__(self, x: np.ndarray, image_ids: np.ndarray, seed: int, first_row: int = 0) -> None:
        self.x, self.image_ids, self.seed, self.first_row = x, image_ids, seed, first_row
        self.sq_norms = np.einsum("nd,nd->n", x, x)
        self.sq_dists = np.full(len(x), np.inf)

    def best(self) -> Pick:
        """Return the farthest row; before there is a pick, the one with the smallest drawn number."""
        if not len(self.x):
            return Pick.none()
        if np.isposinf(self.sq_dists[0]):
            numbers = hashed(self.first_row + np.arange(len(self.x)), self.seed)
            first = self.pick_of(int(numbers.argmin()))
            # Whole, so that none are rounded together; above any distance.
            return first._replace(utility=2**65 - int(numbers.min()))
        row = int(self.sq_dists.argmax())
        return self.pick_of(row)._replace(utility=float(self.sq_dists[row]))

    def pick_of(self, row: int) -> Pick:
        """Return a row as a pick: with its vector."""
        return Pick(0.0, int(self.image_ids[row]), (self.x[row],))

    def take(self, pick: Pick) -> None:
        """Bring the distances up to date: products propose, direct differences decide."""
        (y,) = pick.told
        least = (self.sq_norms + float(y @ y) - self.sq_dists - 2 * product_error(len(y))) / 2
        rows = np.flatnonzero(self.x @ y >= least)
        sq_dists = sq_dists_direct(self.x, rows, y[None], np.zeros(len(rows), np.int64))
        self.sq_dists[rows] = np.minimum(self.sq_dists[rows], sq_dists)
        _, rows = find(self.image_ids, np.array([pick.image_id]))
        self.sq_dists[rows] = NEVER
