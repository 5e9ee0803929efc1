"""TypiClust: in every cluster the most typical image, that with the nearest neighbors inside the cluster.

typicality = 1 / (mean squared distance to the min(20, size / 2) nearest others of the cluster + 1e-5).

Source: Hacohen, Dekel and Weinshall, Active Learning on a Budget (ICML 2022), and its code.

Deviations: as many clusters as the budget, from the cluster stage, where the published code has 500 at most
and then picks several of one; clusters of five images or fewer are not left out, so that the budget is
exact. All images of a cluster meet: n · size products, linear in n for clusters of bounded size only.
"""

from __future__ import annotations

import numpy as np

from selective_ray.neighbors import neighbors
from selective_ray.schema import Picks

NEIGHBORS = 20
# Added to the mean squared distance: copies are typical, not infinitely so.
FLOOR = 1e-5


def typicality(x: np.ndarray) -> np.ndarray:
    """Return the typicality of the rows of one cluster, x float32 [s, d]: float64 [s]; 0 for a lone row."""
    k = min(NEIGHBORS, len(x) // 2)
    if not k:
        return np.zeros(len(x))
    # Each row is its own nearest, at distance 0.
    found = neighbors(x, [(np.arange(len(x)), x)], k + 1)
    return 1 / (found.sq_dists.sum(axis=1) / k + FLOOR)


def picks(x: np.ndarray, image_ids: np.ndarray, clusters: np.ndarray) -> Picks:
    """Pick the most typical row of each cluster, ties to the smallest image id.

    x float32 [n, d], image_ids int64 [n], clusters int32 [n]; all rows of every cluster that there is.
    """
    utilities = np.zeros(len(x))
    order = np.argsort(clusters, kind="stable")
    ends = np.flatnonzero(np.diff(clusters[order], append=-1)) + 1
    for rows in np.split(order, ends[:-1]):
        utilities[rows] = typicality(x[rows])
    return Picks.none().merge(Picks(clusters, image_ids, utilities))
