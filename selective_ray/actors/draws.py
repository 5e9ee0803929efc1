"""Random and stratified picks on Ray: drawn by the actors; with labels by the driver, which holds these."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from selective_ray import stratified
from selective_ray.actors.picking import Asked, Chosen
from selective_ray.actors.pool import Pool
from selective_ray.config import Selection

UNITS = "draws"


def expected(settings: Selection, count: int) -> int:
    """Return how many draws there are."""
    return 1


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Draw images besides those that are fixed: of all alike, or as many of every class as can be."""
    seed = asked.config.seed
    if asked.truth is None:
        drawn = pool.fold(
            lambda actor: actor.draw.remote(asked.count, seed, asked.fixed),
            lambda mine, theirs: mine.merge(theirs, asked.count),
        )
        image_ids, summary = drawn.image_ids, {}
    else:
        shards = pool.run.manifest("embeddings").shards
        parts = [pool.run.read_shard("embeddings", shard.index, ["image_id"]) for shard in shards]
        ids = np.concatenate([part["image_id"].to_numpy() for part in parts])
        codes = asked.truth.of(pool.run, ids)
        image_ids = stratified.picks(ids, codes, asked.count, seed, asked.fixed)
        summary = {"oracle": True, "labels_seen": int((codes >= 0).sum())}
    watch("")
    return Chosen(image_ids, summary, lambda ids, _: (np.zeros(len(ids)), np.zeros(len(ids))))
