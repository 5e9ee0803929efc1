"""The methods that pick one image after the other (`greedy`), by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from selective_ray import greedy, k_center, max_herding, probcover, rdss

GREEDY = ("k-center", "rdss", "probcover", "max-herding")


# What a whole image counts in their utilities, which are whole numbers.
_ONE = {"probcover": probcover.ONE, "max-herding": max_herding.ONE}


def shown(method: str, utility: float) -> float:
    """Return a utility as tables have it: that of the first pick of k-center is the largest there is."""
    return min(utility, 4.0) if method == "k-center" else float(utility / _ONE.get(method, 1))


@dataclass(frozen=True)
class Terms:
    """What all rows are told of a greedy selection, so that they judge alike.

    budget: how many are picked in all, the fixed ones included. radius, features: as in the configuration,
    radius never None. mean float64 [features]: that of all rows, for rdss.
    """

    method: str
    budget: int
    seed: int
    radius: float
    features: int = 0
    mean: np.ndarray | None = None

    def random_features(self, d: int) -> rdss.Features:
        """Return the random features of rdss for rows of d numbers."""
        return rdss.Features(d, self.features, self.radius, self.seed)


def radius_of(method: str, asked: float | None, median_sq_dist: Callable[[], float], floor: float) -> float:
    """Return the radius of a method, where it is not asked for: see `config.Selection`.

    median_sq_dist is a function that returns the median of `density/`.
    """
    if asked is not None:
        return asked
    return 1.0 if method in ("rdss", "k-center") else max(median_sq_dist(), floor) ** 0.5


def rows_of(
    terms: Terms,
    x: np.ndarray,
    image_ids: np.ndarray,
    lists: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    first_row: int = 0,
) -> greedy.Method:
    """Return the rows of one process as the method sees them.

    x float32 [n, d], image_ids int64 [n] ascending, the first at position first_row among all; lists: the
    neighbors of all rows anywhere, block by block (`max_herding.graph`), read where the method takes them.
    """
    if terms.method == "k-center":
        return k_center.Farthest(x, image_ids, terms.seed, first_row)
    if terms.method == "rdss":
        features = terms.random_features(x.shape[1])
        own = {"mean": terms.mean, "width": terms.radius, "budget": terms.budget}
        return rdss.Herding(x, image_ids, features=features, **own)
    kernel = probcover.top_hat if terms.method == "probcover" else max_herding.gaussian
    pairs = max_herding.graph(image_ids, lists)
    return max_herding.Covering(image_ids, pairs, lambda sq_dists: kernel(sq_dists, terms.radius))
