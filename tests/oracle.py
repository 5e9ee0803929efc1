"""The published selection in plain numpy, from its description: dense, in float64, one loop a sentence."""

from __future__ import annotations

import numpy as np


def sq_dists(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    difference = x[:, None, :].astype(np.float64) - y[None, :, :]
    return (difference**2).sum(axis=2)


def mean_sq_dist(x: np.ndarray, k: int, include_self: bool = True) -> np.ndarray:
    nearest = np.sort(sq_dists(x, x), axis=1)
    return nearest[:, :k].mean(axis=1) if include_self else nearest[:, 1 : k + 1].mean(axis=1)


def kmeans(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels lag the centroids by one update, as published; no cluster may become empty."""
    centroids = x[start].astype(np.float64)
    for _ in range(iterations):
        labels = sq_dists(x, centroids).argmin(axis=1)
        centroids = np.stack([x[labels == c].astype(np.float64).mean(axis=0) for c in range(len(start))])
    return labels, centroids


def select(
    x: np.ndarray,
    labels: np.ndarray,
    utility: np.ndarray,
    *,
    rounds: int,
    weight: float,
    momentum: float,
    alpha: float,
    horizon_sq_dist: float = 0.0,
    horizon_picks: int = 0,
    exclude_own_cluster: bool = True,
    fixed: np.ndarray | tuple = (),
    count: int | None = None,
) -> np.ndarray:
    """Section 1.5 of the method's description, pick by pick.

    Fixed rows repel, and close their clusters; the `count` largest open ones give a pick each.
    """
    sizes = np.bincount(labels)
    open_ = sorted(set(range(len(sizes))) - set(labels[list(fixed)].tolist()), key=lambda c: (-sizes[c], c))
    distances = sq_dists(x, x)
    regularizer = np.zeros(len(x))
    for _ in range(rounds):
        picks = []
        for c in sorted(open_[:count]):
            members = np.flatnonzero(labels == c)
            score = utility[members] - weight * regularizer[members]
            picks.append(members[score.argmax()])
        new = np.zeros(len(x))
        for i in range(len(x)):
            repelling = sorted([*picks, *fixed], key=lambda s: (labels[s], s))
            reach = sorted(repelling, key=lambda s, i=i: distances[i, s])
            for s in reach[: horizon_picks or None]:
                if distances[i, s] == 0 or (exclude_own_cluster and labels[s] == labels[i]):
                    continue
                if horizon_sq_dist and distances[i, s] >= horizon_sq_dist:
                    continue
                new[i] += 1 / distances[i, s] ** alpha
        regularizer = momentum * regularizer + (1 - momentum) * new
    return np.array(picks)
