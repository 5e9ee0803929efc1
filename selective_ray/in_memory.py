"""The whole selection over an array, in this process and without Ray."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from selective_ray import config as configuration
from selective_ray import density, embeddings, kmeans, prototypes, selection, starts, two_level
from selective_ray.distances import sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.neighbors import neighbors
from selective_ray.repulsion import PickedVectors, repulsion_unit
from selective_ray.schema import Partial, Picks


def _sq_dists(x: np.ndarray, k: int, settings: configuration.Density) -> np.ndarray:
    """Measure every row against all, float32 [n]."""
    needed = density.neighbors_needed(k, settings.include_self)
    rows, inverse = x, slice(None)
    if settings.duplicates == "collapse":
        rows, inverse = np.unique(x, axis=0, return_inverse=True)
    if needed > len(rows):
        raise density.too_few_distinct(k, len(rows) - (not settings.include_self))
    found = neighbors(rows, [(np.arange(len(rows)), rows)], needed)
    return density.sq_dists_of(found, k=k, estimator=settings.estimator)[inverse]


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
) -> Selected:
    """Pick `budget` of the rows of x that are most worth labeling.

    x is an array [n, d] of numbers, one row an image; rows are made unit length. settings are the keys of
    the configuration, as in {"selection.weight": 1.0}. Gives the same picks as the command on the same
    embeddings. Raises UserError where the data do not allow it, UsageError for unknown keys and values.
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
            "selection.budget": budget,
        },
        own_embeddings=True,
    )
    n = len(x)
    if budget > n:
        raise UserError(f"budget {budget} exceeds the {n} embeddings; lower it to {n} or fewer")
    k, warning = density.possible_k(config.density.k, n, config.density.include_self, "density.k" in asked)
    if warning:
        warnings.warn(warning, stacklevel=2)
    ids = np.arange(n)
    sq_dists = _sq_dists(x, k, config.density)

    clusters = _Clusters(x, config)
    clustering = clusters.run(budget)
    labels = clusters.rows.labels(clustering.assigned_by)

    if config.selection.method != "usl":
        return _prototypes(x, sq_dists, labels, clustering.centroids, config)
    scaled = config.selection.scale == "median"
    unit = density.median(lambda high: density.half_counts(sq_dists, high)) if scaled else 1.0
    parameters = config.selection.repulsion()
    candidates = selection.Candidates(
        x,
        ids,
        labels,
        density.relative(sq_dists, unit=unit, floor=config.density.floor),
        momentum=config.selection.momentum,
        parameters=parameters,
    )
    picks: Picks = selection.rounds(
        candidates.nominate,
        lambda picks: PickedVectors(picks.cluster_ids, picks.image_ids, x[picks.image_ids]),
        candidates.repel,
        n_rounds=config.selection.rounds,
        weight=config.selection.weight,
        unit=(lambda picked: repulsion_unit(picked, parameters)) if scaled else (lambda picked: 1.0),
    )
    return Selected(
        picks.image_ids,
        picks.cluster_ids,
        sq_dists[picks.image_ids],
        candidates.exact_repulsion(picks.image_ids),
        picks.utilities,
        labels,
        sq_dists,
        clustering.centroids,
    )


def _prototypes(
    x: np.ndarray,
    sq_dists: np.ndarray,
    labels: np.ndarray,
    centroids: np.ndarray,
    config: configuration.Config,
) -> Selected:
    ids, n = np.arange(len(x)), len(x)
    to_centroids = sq_dists_direct(x, ids, centroids, labels).astype(np.float32)
    start = Picks.none().merge(Picks(labels, ids, -to_centroids.astype(np.float64)))
    rows = prototypes.Represented(x, ids, sq_dists, n)
    state = prototypes.improve(
        prototypes.Medoids(start.image_ids, x[start.image_ids], 0),
        *(rows.represent, rows.propose, rows.gains),
        n=n,
        seed=config.seed,
        passes=config.selection.passes if config.selection.method == "prototypes" else 0,
    )
    picks, counts = state.medoids.image_ids, state.costs.counts
    order = np.lexsort((picks, labels[picks]))
    picks = picks[order]
    return Selected(
        picks,
        labels[picks],
        sq_dists[picks],
        np.zeros(len(picks)),
        counts[order] / n,
        labels,
        sq_dists,
        centroids,
    )
