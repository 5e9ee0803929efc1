"""Prototypes on Ray: the loop of swaps here, sums over the rows on the actors that hold the shards."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import ray

from selective_ray import prototypes
from selective_ray.actors.picking import Asked, Chosen, in_place, median_sq_dist
from selective_ray.actors.pool import Pool
from selective_ray.config import Selection
from selective_ray.prototypes import Costs, Gains, Medoids, Offered, Pass, Proposals
from selective_ray.schema import Picks

UNITS = "passes"


def expected(settings: Selection, count: int) -> int:
    """Return how many passes there are at most."""
    return settings.passes if settings.method == "prototypes" else 1


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Pick the images nearest to the centroids of open clusters, and swap them; fixed ones stay."""
    settings = asked.config.selection
    start = pool.fold(
        lambda actor: actor.nearest_to_centroids.remote(asked.clusters, asked.open), Picks.merge
    )
    ids = np.concatenate([asked.fixed, start.image_ids])
    places, x = zip(*pool.all(lambda actor: actor.vectors.remote(ids)), strict=True)
    n, swapping = int(asked.sizes.sum()), settings.method == "prototypes"
    mean = None
    if swapping:
        mean = prototypes.mean_of(pool.fold(lambda actor: actor.summed.remote(), np.add), n)
    seen = asked.column, mean
    sent: tuple[Medoids, ray.ObjectRef] | None = None

    def put(medoids: Medoids) -> ray.ObjectRef:
        nonlocal sent
        if sent is None or sent[0] is not medoids:
            sent = medoids, ray.put(medoids)
        return sent[1]

    def represent(medoids: Medoids, share: float = 1.0, draw: int = 0) -> Costs:
        to = put(medoids)
        return pool.fold(lambda actor: actor.represent.remote(to, seen, share, draw), Costs.add)

    def propose(medoids: Medoids, means: np.ndarray, draw: int) -> Proposals:
        to, around = put(medoids), ray.put(means)
        call = functools.partial(_propose, to, seen, around, draw)
        return pool.fold(call, Proposals.merge)

    def gains(medoids: Medoids, offered: Offered) -> Gains:
        to, sent = put(medoids), ray.put(offered)
        return pool.fold(lambda actor: actor.gains.remote(to, seen, sent), Gains.add)

    def told(done: Pass) -> None:
        watch(f"mean cost of an image {done.cost:.4f}, {done.made:,} picks swapped")

    at, sq_dists, _ = zip(*pool.all(lambda actor: actor.sq_dists_of.remote(asked.column, ids)), strict=True)
    state = prototypes.improve(
        Medoids(
            ids, prototypes.seen_from(mean, in_place(places, x)), in_place(at, sq_dists), len(asked.fixed)
        ),
        *(represent, propose, gains),
        n=n,
        seed=asked.config.seed,
        passes=settings.passes if swapping else 0,
        density_cost=settings.density_cost if swapping else 0.0,
        unit=median_sq_dist(pool, asked.column) if swapping else 1.0,
        watch=told,
    )
    shares = dict(zip(state.medoids.image_ids.tolist(), (state.costs.counts / n).tolist(), strict=True))
    cost = state.costs.cost / prototypes.scale_of(n) / n
    return Chosen(
        image_ids=state.medoids.image_ids[len(asked.fixed) :],
        summary={
            "mean_cost": cost,
            "passes": len(state.history),
            "swapped": sum(done.made for done in state.history),
        },
        judge=lambda ids, _: (np.zeros(len(ids)), np.array([shares[i] for i in ids.tolist()])),
    )


def _propose(to: ray.ObjectRef, seen: tuple, around: ray.ObjectRef, draw: int, actor) -> ray.ObjectRef:
    return actor.propose.remote(to, seen, around, draw)
