"""What an approximate search missed, by the exact neighbors of a seeded sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Certificate:
    """What approximation cost, by the exact neighbors of a seeded sample; shares with a 95 % interval."""

    rows: int
    recall: float
    recall_low: float
    recall_high: float
    mean_relative_error: float
    largest_relative_error: float
    rank_correlation: float


def certify(found: np.ndarray, exact: np.ndarray) -> Certificate:
    """Compare the distances found with the exact ones of the same rows: both float64 [s, k] ascending.

    A neighbor counts as found where its distance is one of the k smallest, so that ties of equal distance
    are not misses. The interval is that of the mean over rows, whose misses come together.
    """
    # The first is the row itself.
    hits = (found[:, 1:] <= exact[:, -1:]).mean(axis=1)
    recall = float(hits.mean())
    half = 1.96 * float(hits.std()) / math.sqrt(len(hits))
    # Where every row is whole the spread says nothing: the rule of three.
    half = half or 3 / len(hits)
    there, true = found.mean(axis=1), exact.mean(axis=1)
    error = np.divide(there - true, true, out=np.zeros_like(true), where=true > 0)
    return Certificate(
        rows=len(hits),
        recall=recall,
        recall_low=max(0.0, recall - half),
        recall_high=min(1.0, recall + half),
        mean_relative_error=float(error.mean()),
        largest_relative_error=float(error.max()),
        rank_correlation=_rank_correlation(there, true),
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties by their mean rank; 1 where either has one value only."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[inverse])
    if min(np.ptp(rank) for rank in ranks) == 0:
        return 1.0
    return float(np.corrcoef(*ranks)[0, 1])
