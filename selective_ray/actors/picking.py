"""What a method of selection is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selective_ray import density
from selective_ray.actors.pool import Pool
from selective_ray.config import Config
from selective_ray.store import Shard
from selective_ray.truth import Truth


@dataclass(frozen=True)
class Asked:
    """Pick `count` images besides those that are fixed.

    clusters: the table they are clustered in; column: that of `density/`; fixed int64: image ids that have
    labels or are of a smaller budget, with fixed_clusters int32; sizes int64 [c] of all clusters; open int32:
    the clusters that take part, None: all. table: where the picks go; truth: the labels, for an oracle.
    """

    config: Config
    clusters: str
    column: str
    fixed: np.ndarray
    fixed_clusters: np.ndarray
    sizes: np.ndarray
    count: int
    open: np.ndarray | None
    table: str
    truth: Truth | None = None


@dataclass(frozen=True)
class Chosen:
    """The images that a method picked, int64, and what its summary says.

    judge: repulsion and utility float64 of images, given their squared distances. write: writes those of all
    images to a table, where they are to be kept.
    """

    image_ids: np.ndarray
    summary: dict[str, Any]
    judge: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    write: Callable[[str], list[Shard]] | None = None


def median_sq_dist(pool: Pool, column: str) -> float:
    """Return the exact median of a column of `density/`."""

    def count(high: int | None) -> np.ndarray:
        return pool.fold(lambda actor: actor.half_counts.remote(column, high), np.add)

    return density.median(count)


def in_place(places: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Put what the actors answered in the order of what was asked."""
    return np.concatenate(values)[np.argsort(np.concatenate(places))]
