"""RDSS: kernel herding without replacement, with random features for the mean kernel.

Each pick minimizes S - a · mu: mu is the mean kernel of a row to all rows, S the mean kernel to the picks so
far, a = 1 - 1/sqrt(budget), and the kernel exp(-|x - y|² / (2 width²)). The first maximizes mu.

Source: Shao et al., Enhancing Semi-Supervised Learning via Representative and Diverse Sample Selection
(NeurIPS 2024). Random features: Rahimi and Recht (NIPS 2007).

Deviations: the published code holds an n x n kernel; here mu comes from `features` random features, an
estimate that is off by about sqrt(1 / features), while S is exact. The width is a setting; the published code
has 1 on unit vectors, and the paper the median distance. Utilities equal to nine digits are a tie.
"""

from __future__ import annotations

import numpy as np

from selective_ray.distances import blocks, sq_dists_direct
from selective_ray.greedy import NEVER, Pick
from selective_ray.kmeans import fixed_point_bits
from selective_ray.selection import find

# What is told apart: far above the error of float64 products, which differ with the machine.
DIGITS = 9


class Features:
    """Random features of rows, whose products estimate the kernel: `features` numbers a row, always even."""

    def __init__(self, d: int, features: int, width: float, seed: int) -> None:
        self.directions = np.random.default_rng(seed).normal(size=(d, features // 2)) / width

    def of(self, x: np.ndarray) -> np.ndarray:
        """Return the features of x [n, d], float64 [n, features]."""
        phases = x.astype(np.float64) @ self.directions
        return np.concatenate([np.cos(phases), np.sin(phases)], axis=1) / np.sqrt(self.directions.shape[1])

    def sums(self, x: np.ndarray, total: int) -> np.ndarray:
        """Add up the features of rows, of `total` in all, in fixed point: int64 [features]."""
        scale, width = 2.0 ** fixed_point_bits(total), 2 * self.directions.shape[1]
        parts = (np.rint(self.of(x[rows]) * scale).astype(np.int64) for rows in blocks(len(x), width))
        return sum((part.sum(axis=0) for part in parts), np.zeros(width, np.int64))


def mean_of(sums: np.ndarray, total: int) -> np.ndarray:
    """Return the mean of the features of all rows from the sum of `Features.sums`: float64 [features]."""
    return sums / (2.0 ** fixed_point_bits(total) * total)


class Herding:
    """Rows with their mean kernel to all rows and its sum over the picks.

    x float32 [n, d], image_ids int64 [n] ascending; mean float64 [features] of all rows; budget: how many are
    picked in all.
    """

    def __init__(
        self,
        x: np.ndarray,
        image_ids: np.ndarray,
        *,
        features: Features,
        mean: np.ndarray,
        width: float,
        budget: int,
    ) -> None:
        self.x, self.image_ids, self.width = x, image_ids, width
        parts = [features.of(x[rows]) @ mean for rows in blocks(len(x), len(mean))]
        self.mean_kernel = np.concatenate([np.empty(0), *parts])
        self.share = 1 - 1 / np.sqrt(budget)
        self.kernel_sum = np.zeros(len(x))
        self.open = np.ones(len(x), bool)
        self.count = 0

    def best(self) -> Pick:
        """Return the row that is most like all rows, and least like the picks."""
        if not len(self.x):
            return Pick.none()
        if self.count:
            utility = self.share * self.mean_kernel - self.kernel_sum / self.count
        else:
            utility = self.mean_kernel
        utility = np.where(self.open, np.round(utility, DIGITS), NEVER)
        row = int(utility.argmax())
        return self.pick_of(row)._replace(utility=float(utility[row]))

    def pick_of(self, row: int) -> Pick:
        """Return a row as a pick: with its vector."""
        return Pick(0.0, int(self.image_ids[row]), (self.x[row],))

    def take(self, pick: Pick) -> None:
        """Add the kernel to a pick."""
        (y,) = pick.told
        every = np.arange(len(self.x))
        sq_dists = sq_dists_direct(self.x, every, y[None], np.zeros(len(every), np.int64))
        self.kernel_sum += np.exp(-sq_dists / (2 * self.width**2))
        self.count += 1
        _, rows = find(self.image_ids, np.array([pick.image_id]))
        self.open[rows] = False
