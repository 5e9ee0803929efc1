"""Greedy methods on Ray: the loop here, every row's state on the actor that holds it.

A pick is a round trip: the last pick goes to all actors, each answers with the best of its rows. An actor
that died knows of no picks, says so, and is told all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import ray

from selective_ray import greedy, rdss
from selective_ray.actors.picking import Asked, Chosen, median_sq_dist
from selective_ray.actors.pool import Pool
from selective_ray.config import Selection
from selective_ray.greedy import Pick
from selective_ray.methods import Terms, radius_of, shown

UNITS = "picks"


def expected(settings: Selection, count: int) -> int:
    """Return how many picks there are."""
    return count


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Pick one image after the other, beside those that are fixed."""
    settings, n = asked.config.selection, int(asked.sizes.sum())
    median = functools.partial(median_sq_dist, pool, asked.column)
    radius = radius_of(settings.method, settings.radius, median, asked.config.density.floor)
    budget = len(asked.fixed) + asked.count
    terms = Terms(settings.method, budget, asked.config.seed, radius, settings.features)
    if settings.method == "rdss":
        sums = pool.fold(lambda actor: actor.feature_sums.remote(terms), np.add)
        terms = Terms(
            *(settings.method, budget, asked.config.seed, radius, settings.features), rdss.mean_of(sums, n)
        )
    sent = ray.put(terms)
    fixed: list[Pick] = []
    if len(asked.fixed):
        answers = pool.all(lambda actor: actor.picks_of.remote(asked.table, sent, asked.fixed))
        fixed = sorted((one for some in answers for one in some), key=lambda one: one.image_id)

    def step(since: int, picked: Sequence[Pick]) -> Pick | None:
        # Many picks, as for an actor that begins anew, are sent once and not with every call.
        new = picked if len(picked) < 2 else ray.put(list(picked))
        return pool.fold(lambda actor: actor.greedy_best.remote(asked.table, sent, since, new), _better)

    picks = greedy.picks(step, fixed, asked.count, lambda _: watch(""))
    utilities = {one.image_id: shown(settings.method, one.utility) for one in picks}
    return Chosen(
        image_ids=np.array([one.image_id for one in picks], np.int64),
        summary={"radius": radius} if settings.method != "k-center" else {},
        judge=lambda ids, _: (np.zeros(len(ids)), np.array([utilities.get(i, 0.0) for i in ids.tolist()])),
    )


def _better(mine: Pick | None, theirs: Pick | None) -> Pick | None:
    return None if mine is None or theirs is None else mine.merge(theirs)
