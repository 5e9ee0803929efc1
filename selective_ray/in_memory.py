"""The whole selection over an array, in this process and without Ray."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from selective_ray import config as configuration
from selective_ray import (
    density,
    embeddings,
    greedy,
    kmeans,
    methods,
    prototypes,
    random_picks,
    rdss,
    selection,
    starts,
    stratified,
    two_level,
    typiclust,
)
from selective_ray.distances import sq_dists_direct
from selective_ray.errors import UsageError, UserError
from selective_ray.neighbors import neighbors
from selective_ray.repulsion import PickedVectors, repulsion_unit
from selective_ray.schema import Neighbors, Partial, Picks


class _Clusters:
    """The steps of clustering, over all rows here."""

    def __init__(self, x: np.ndarray, config: configuration.Config) -> None:
        self.x, self.config = x, config
        self.rows = kmeans.Rows(x, np.arange(len(x)), len(x))
        self.within: kmeans.Rows | None = None

    def run(self, m: int) -> kmeans.Clustering:
        settings = self.config.cluster
        return two_level.cluster(
            two_level.Steps(self.rows.step, self._inside, self._start, self._start_inside),
            n=len(self.x),
            m=m,
            split_from=settings.two_level,
            iterations=settings.iterations,
            tolerance=settings.tolerance,
            final_assignment=settings.final_assignment,
        )

    def _start(self, count: int) -> np.ndarray:
        n, seed = len(self.x), self.config.seed
        if self.config.cluster.init == "random":
            return self.x[kmeans.initial_rows(n, count, seed)]
        rows = starts.Oversampling(self.x, np.arange(n), n)
        positions = starts.draw_starts(
            lambda positions: self.x[positions],
            rows.offer,
            rows.cost,
            lambda cost, wanted: rows.draw(cost, wanted, seed),
            rows.weights,
            n=n,
            m=count,
            seed=seed,
        )
        return self.x[positions]

    def _split(self, split: two_level.Split) -> kmeans.Rows:
        if self.within is None:
            labels = self.rows.labels(split.centroids)
            self.within = two_level.inside(self.rows, labels, split.first, len(self.x))
        return self.within

    def _start_inside(self, split: two_level.Split) -> np.ndarray:
        drawn = self._split(split).assignment.draw(np.arange(len(self.x)), self.config.seed)
        return self.x[two_level.merge_draws([drawn], split.first)]

    def _inside(self, split: two_level.Split, *asked: Any) -> Partial:
        return self._split(split).step(*asked)


@dataclass(frozen=True)
class Selected:
    """The selection, ordered by cluster, and what it was derived from.

    Of the m picks: rows int64, cluster_ids int32, sq_dists float32, repulsions float64, utilities float64.
    Of all n rows: all_cluster_ids int32, all_sq_dists float32 (what density is the inverse of). And the
    centroids, float32 [m, d].
    """

    rows: np.ndarray
    cluster_ids: np.ndarray
    sq_dists: np.ndarray
    repulsions: np.ndarray
    utilities: np.ndarray
    all_cluster_ids: np.ndarray
    all_sq_dists: np.ndarray
    centroids: np.ndarray


def select(
    x: np.ndarray,
    budget: int,
    *,
    preset: str | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
    labels: Sequence[Any] | None = None,
) -> Selected:
    """Pick `budget` of the rows of x that are most worth labeling.

    x is an array [n, d] of numbers, one row an image; rows are made unit length. settings are the keys of
    the configuration, as in {"selection.weight": 1.0}. labels, one a row, are for the method stratified, an
    oracle. Gives the same picks as the command on the same embeddings. Raises UserError where the data do
    not allow it, UsageError for unknown keys and values.
    """
    x = np.asarray(x)
    embeddings.check_shape(x.shape, x.dtype, "the array")
    x, *unusable = embeddings.unit_rows(x)
    embeddings.complain(*unusable, "the array")
    config, asked = configuration.load(
        preset=preset,
        options={
            **(settings or {}),
            **({} if seed is None else {"seed": seed}),
            **({} if labels is None else {"selection.labels": "labels="}),
            "selection.budget": budget,
        },
        own_embeddings=True,
    )
    if budget > len(x):
        raise UserError(f"budget {budget} exceeds the {len(x)} embeddings; lower it to {len(x)} or fewer")
    k, warning = density.possible_k(
        config.density.k, len(x), config.density.include_self, "density.k" in asked
    )
    if warning:
        warnings.warn(warning, stacklevel=2)
    codes = None if labels is None else np.unique(np.asarray(labels), return_inverse=True)[1]
    if codes is not None and codes.shape != (len(x),):
        raise UsageError(f"labels= is of shape {codes.shape}, and there are {len(x)} rows: give one for each")
    return Rows(x, config.density, k).select(config, budget, codes)


class Rows:
    """Rows to select from, x float32 [n, d] of unit length, with their neighbors; k of them tell the density.

    They are found once, and the clusters of one budget and seed are kept for the next method. image_ids
    int64 [n] ascending, where they are not the numbers of the rows.
    """

    def __init__(
        self, x: np.ndarray, settings: configuration.Density, k: int, image_ids: np.ndarray | None = None
    ) -> None:
        self.x, self.settings, self.k = x, settings, k
        self.ids = np.arange(len(x))
        self.image_ids = self.ids if image_ids is None else image_ids
        self.clustered: tuple[object, np.ndarray, np.ndarray] | None = None
        needed = density.neighbors_needed(k, settings.include_self)
        rows, inverse = x, slice(None)
        if settings.duplicates == "collapse":
            rows, inverse = np.unique(x, axis=0, return_inverse=True)
        if needed > len(rows):
            raise density.too_few_distinct(k, len(rows) - (not settings.include_self))
        found = neighbors(rows, [(np.arange(len(rows)), rows)], needed)
        self.sq_dists = density.sq_dists_of(found, k=k, estimator=settings.estimator)[inverse]
        self.found = found if rows is x else None

    @cached_property
    def neighbors(self) -> Neighbors:
        """The k nearest rows of every row, as the density stage keeps them."""
        found = self.found
        if found is None:
            needed = density.neighbors_needed(self.k, self.settings.include_self)
            found = neighbors(self.x, [(self.ids, self.x)], needed)
        return found if self.settings.include_self else found.without(self.ids)

    def clusters(self, config: configuration.Config, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clusters of the rows int32 [n], and the centroids float32 [budget, d]."""
        key = config.cluster, config.seed, budget
        if self.clustered is None or self.clustered[0] != key:
            clusters = _Clusters(self.x, config)
            clustering = clusters.run(budget)
            self.clustered = key, clusters.rows.labels(clustering.assigned_by), clustering.centroids
        return self.clustered[1:]

    def select(self, config: configuration.Config, budget: int, labels: np.ndarray | None = None) -> Selected:
        """Select as the configuration says; labels int64 [n], -1 where not known, for an oracle only."""
        clusters, centroids = self.clusters(config, budget)
        picks, repulsions, utilities = self.picks(config, budget, labels)
        order = np.lexsort((picks, clusters[picks]))
        picks = picks[order]
        return Selected(
            picks,
            clusters[picks],
            self.sq_dists[picks],
            repulsions[order],
            utilities[order],
            clusters,
            self.sq_dists,
            centroids,
        )

    def picks(
        self, config: configuration.Config, budget: int, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return picked rows int64, repulsions and utilities float64, all [budget], in any order."""
        method, seed = config.selection.method, config.seed
        if method == "usl":
            return self._usl(config, budget)
        if method == "usl-t":
            raise UsageError("clusters of usl-t are trained on images: run `selective-ray select --images`")
        nothing, utilities = np.empty(0, np.int64), np.zeros(budget)
        if method in ("k-medoid", "prototypes"):
            picks, utilities = self._prototypes(config, budget)
        elif method == "typiclust":
            found = typiclust.picks(self.x, self.ids, self.clusters(config, budget)[0])
            picks, utilities = found.image_ids, found.utilities
        elif method in methods.GREEDY:
            picks, utilities = self._greedy(config, budget)
        elif method == "random":
            picks = random_picks.draw(self.ids, self.ids, budget, seed, nothing).image_ids
        elif labels is not None:
            picks = stratified.picks(self.ids, labels, budget, seed, nothing)
        else:
            raise UsageError("the method stratified is an oracle: it takes labels=, one for each row")
        return picks, np.zeros(budget), utilities

    def _usl(self, config: configuration.Config, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        settings, x, clusters = config.selection, self.x, self.clusters(config, budget)[0]
        scaled = settings.scale == "median"
        unit = self._median() if scaled else 1.0
        parameters = settings.repulsion()
        candidates = selection.Candidates(
            x,
            self.ids,
            clusters,
            density.relative(self.sq_dists, unit=unit, floor=config.density.floor),
            momentum=settings.momentum,
            parameters=parameters,
        )
        picks: Picks = selection.rounds(
            candidates.nominate,
            lambda picks: PickedVectors(picks.cluster_ids, picks.image_ids, x[picks.image_ids]),
            candidates.repel,
            n_rounds=settings.rounds,
            weight=settings.weight,
            unit=(lambda picked: repulsion_unit(picked, parameters)) if scaled else (lambda picked: 1.0),
        )
        return picks.image_ids, candidates.exact_repulsion(picks.image_ids), picks.utilities

    def _prototypes(self, config: configuration.Config, budget: int) -> tuple[np.ndarray, np.ndarray]:
        x, ids, n = self.x, self.ids, len(self.x)
        clusters, centroids = self.clusters(config, budget)
        settings = config.selection
        swapping = settings.method == "prototypes"
        to_centroids = sq_dists_direct(x, ids, centroids, clusters).astype(np.float32)
        start = Picks.none().merge(Picks(clusters, ids, -to_centroids.astype(np.float64)))
        mean = prototypes.mean_of(prototypes.summed(x, n), n) if swapping else None
        rows = prototypes.Represented(x, self.image_ids, self.sq_dists, n, mean)
        at = start.image_ids
        state = prototypes.improve(
            prototypes.Medoids(self.image_ids[at], prototypes.seen_from(mean, x[at]), self.sq_dists[at], 0),
            *(rows.represent, rows.propose, rows.gains),
            n=n,
            seed=config.seed,
            passes=settings.passes if swapping else 0,
            density_cost=settings.density_cost if swapping else 0.0,
            unit=self._median(),
        )
        return np.searchsorted(self.image_ids, state.medoids.image_ids), state.costs.counts / n

    def _greedy(self, config: configuration.Config, budget: int) -> tuple[np.ndarray, np.ndarray]:
        settings, x, n = config.selection, self.x, len(self.x)
        floor = config.density.floor
        radius = methods.radius_of(settings.method, settings.radius, self._median, floor)
        terms = methods.Terms(settings.method, budget, config.seed, radius, settings.features)
        if settings.method == "rdss":
            sums = terms.random_features(x.shape[1]).sums(x, n)
            terms = replace(terms, mean=rdss.mean_of(sums, n))
        lists = []
        if settings.method in configuration.OF_NEIGHBORS:
            near = self.neighbors
            lists = [(self.ids, near.image_ids, near.sq_dists.astype(np.float32))]
        met = greedy.Met(methods.rows_of(terms, x, self.ids, lists))
        picks = greedy.picks(met.best, [], budget)
        utilities = [methods.shown(settings.method, one.utility) for one in picks]
        return np.array([one.image_id for one in picks]), np.array(utilities)

    def _median(self) -> float:
        return density.median(lambda high: density.half_counts(self.sq_dists, high))
