"""TypiClust on Ray: the rows of a cluster meet on one actor, group of clusters by group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from selective_ray.actors.picking import Asked, Chosen
from selective_ray.actors.pool import Pool, Shrunk
from selective_ray.config import Selection
from selective_ray.schema import Picks

UNITS = "clusters"
# Groups for each actor at least: a group is what an actor holds besides its own rows.
GROUPS_EACH = 4


def expected(settings: Selection, count: int) -> int:
    """Return how many clusters give a pick."""
    return count


def groups_of(clusters: np.ndarray, sizes: np.ndarray, rows: int) -> list[np.ndarray]:
    """Put clusters int32 ascending together, one after the other, in groups of about so many rows."""
    ends = np.cumsum(sizes[clusters])
    return [part for part in np.split(clusters, np.flatnonzero(np.diff(ends // rows)) + 1) if len(part)]


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Pick the most typical image of each open cluster."""
    clusters = np.flatnonzero(asked.sizes).astype(np.int32) if asked.open is None else asked.open
    rows = max(1, int(asked.sizes.sum()) // (GROUPS_EACH * len(pool.actors)))
    groups = groups_of(clusters, asked.sizes, rows)
    picks = Picks.none()
    while groups:
        now = groups[: len(pool.actors)]
        try:
            calls = []
            for actor, group in zip(pool.actors, now, strict=False):
                parts = [holder.rows_of_clusters.remote(asked.clusters, group) for holder in pool.actors]
                calls.append(actor.typical.remote(*parts))
            pool.wait(calls)
            for group, call in zip(now, calls, strict=True):
                picks = picks.merge(pool.answer(call))
                for _ in group:
                    watch("")
        except Shrunk:
            pool.restart()
            continue
        groups = groups[len(now) :]
    utilities = dict(zip(picks.image_ids.tolist(), picks.utilities.tolist(), strict=True))
    return Chosen(
        image_ids=picks.image_ids,
        summary={},
        judge=lambda ids, _: (np.zeros(len(ids)), np.array([utilities.get(i, 0.0) for i in ids.tolist()])),
    )
