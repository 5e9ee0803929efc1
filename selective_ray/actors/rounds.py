"""USL's regularized selection on Ray: the rounds' loop here, nominations and repulsion on the actors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from selective_ray import density, selection
from selective_ray.actors.picking import Asked, Chosen, in_place, median_sq_dist
from selective_ray.actors.pool import Pool
from selective_ray.actors.shards import Judging
from selective_ray.config import Selection
from selective_ray.repulsion import PickedVectors, repulsion_unit
from selective_ray.schema import Picks
from selective_ray.store import Shard

UNITS = "rounds"


def expected(settings: Selection, count: int) -> int:
    """Return how many rounds there are."""
    return settings.rounds


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Pick one image of each open cluster; images that are fixed repel like picks."""
    settings, floor = asked.config.selection, asked.config.density.floor
    repulsion, scaled = settings.repulsion(), settings.scale == "median"
    history: list[ray.ObjectRef] = []
    compared: list[int] = []
    pairs_in_all, weight_at_last = 1, 0.0
    unit = median_sq_dist(pool, asked.column) if scaled else 1.0
    judged = Judging(
        *(asked.clusters, asked.column, unit, floor, settings.momentum, repulsion),
        open=asked.open,
        prune=not settings.keep_utilities,
    )
    judging = ray.put(judged)

    def nominate(weight: float) -> Picks:
        """Send references to the earlier picks, m·d floats a round; merge two Picks an actor."""
        nonlocal weight_at_last
        bar, first = pool.fold(lambda actor: actor.bar.remote(weight, judging, history), _merge)
        sent = ray.put(bar)
        picks, pairs = pool.fold(lambda actor: actor.nominate.remote(weight, sent, judging, history), _merge)
        compared.append(first + pairs)
        weight_at_last = weight
        return picks

    def fetch(picks: Picks) -> PickedVectors:
        nonlocal pairs_in_all
        ids = np.concatenate([asked.fixed, picks.image_ids])
        clusters = np.concatenate([asked.fixed_clusters, picks.cluster_ids])
        order = np.lexsort((ids, clusters))
        places, x = zip(*pool.all(lambda actor: actor.vectors.remote(ids[order])), strict=True)
        pairs_in_all = int(asked.sizes.sum()) * len(ids)
        return PickedVectors(clusters[order], ids[order], in_place(places, x))

    picks = selection.rounds(
        nominate,
        fetch,
        lambda picked: history.append(ray.put(picked)),
        n_rounds=settings.rounds,
        weight=settings.weight,
        unit=lambda picked: repulsion_unit(picked, repulsion) if scaled else 1.0,
        watch=lambda number: watch(
            f"{100 * compared[-1] / pairs_in_all:.2f} % of distances to picks computed" if number > 1 else ""
        ),
    )

    def judge(ids: np.ndarray, sq_dists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answers = pool.all(lambda actor: actor.repulsions_of.remote(ids, judging, history))
        repulsions = in_place(*zip(*answers, strict=True))
        return repulsions, density.relative(sq_dists, unit=unit, floor=floor) - weight_at_last * repulsions

    def write(table: str) -> list[Shard]:
        written = pool.all(
            lambda actor: actor.write_utilities.remote(table, weight_at_last, judging, history)
        )
        return [shard for shards in written for shard in shards]

    # Of those that every image has to every pick, round by round from the second on.
    shares: dict[str, Any] = {"distances_computed": [round(p / pairs_in_all, 6) for p in compared[1:]]}
    return Chosen(
        image_ids=picks.image_ids,
        summary=shares | {"pruned": judged.prune},
        judge=judge,
        write=write if settings.keep_utilities else None,
    )


def _merge(mine: tuple[Picks, int], theirs: tuple[Picks, int]) -> tuple[Picks, int]:
    return mine[0].merge(theirs[0]), mine[1] + theirs[1]
