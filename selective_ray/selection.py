"""The regularized selection: in every cluster the densest image, pushed away from the picks of the others.

The loop is `rounds`; it is given two steps. In memory they are the methods of one `Candidates`; on Ray each
actor has one for its shards, nominations merge as `Picks`, and the picks' vectors are sent to all.

Most rows never meet the picks. A few picks push a row by at least so many times the push at their mean
distance (Jensen: the push is convex), which one product with their mean tells. A row that cannot win even if
it is pushed no more than that waits; should it matter later, it meets the picks of all rounds it has missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from selective_ray.distances import blocks, product_error, sq_dists_direct
from selective_ray.neighbors import neighbors
from selective_ray.schema import Picks

# Float64 products of unit vectors are off by less than (d + 8) * 2^-51, under 1e-11 up to d = 20,000.
PRODUCT_ERROR = 1e-11
# Nearer than this, 1 / distance would magnify that error, so direct differences are taken.
NEAR_SQ_DIST = 1e-3
# What then remains of the error, relative to the repulsion (alpha up to 4), with a wide margin.
REPULSION_ERROR = 1e-6
# Where all picks repel, so many nearest are bounded apart from the rest.
NEAR_PICKS = 16
# Picks that are looked for beyond the window, as those of several rounds are searched at once.
SPARE_PICKS = 8


@dataclass(frozen=True)
class Repulsion:
    """How picks push others away (USL, equation 6, as the published code has it).

    A pick s adds 1 / |x - s|^(2 alpha) to the repulsion of x: alpha works on the squared distance. Picks at
    a squared distance of horizon_sq_dist or more add nothing (0: no limit; CIFAR code), and only the
    horizon_picks nearest do (0: all; ImageNet code), ties to the smallest cluster. With exclude_own_cluster
    the pick of x's own cluster adds nothing; it is left out after the window of the nearest is taken, as
    published. A pick at distance zero (x itself or its exact duplicate) never adds anything.
    """

    alpha: float
    horizon_sq_dist: float = 0.0
    horizon_picks: int = 0
    exclude_own_cluster: bool = True

    def window(self, m: int) -> int:
        """Number of nearest picks that repel, of m; 0 where all do."""
        return self.horizon_picks if self.horizon_picks < m else 0

    def push(self, sq_dists: np.ndarray, own: np.ndarray) -> np.ndarray:
        """What single picks add, of the shape of sq_dists float64 and of own bool, the row's own cluster."""
        counts = sq_dists > 0
        if self.horizon_sq_dist > 0:
            counts &= sq_dists < self.horizon_sq_dist
        if self.exclude_own_cluster:
            counts &= ~own
        return self._pushed(np.where(counts, sq_dists, np.inf))

    def least(self, sq_dists: np.ndarray) -> np.ndarray:
        """Return a convex function below the push of other clusters' picks at sq_dists > 0, of that shape.

        The push itself; with a horizon, from alpha / (1 + alpha) of it on, the tangent that is 0 there.
        """
        if not self.horizon_sq_dist:
            return self._pushed(sq_dists)
        touch = self.horizon_sq_dist * self.alpha / (1 + self.alpha)
        tangent = touch**-self.alpha * (1 + self.alpha - self.alpha * sq_dists / touch)
        return np.where(sq_dists < touch, self._pushed(sq_dists), np.maximum(tangent, 0.0))

    def _pushed(self, sq_dists: np.ndarray) -> np.ndarray:
        """1 / sq_dists^alpha; the usual exponents need no power."""
        if self.alpha in (0.5, 1.0):
            return 1.0 / (sq_dists if self.alpha == 1.0 else np.sqrt(sq_dists))
        return sq_dists**-self.alpha


@dataclass(frozen=True)
class PickedVectors:
    """What repels in a round, by (cluster, image): cluster_ids int32 [m], image_ids int64 [m], x float32
    [m, d]."""

    cluster_ids: np.ndarray
    image_ids: np.ndarray
    x: np.ndarray


class Met:
    """The picks of some rounds, each once, by (cluster, image): x float32 [p, d], cluster_ids int32 [p].

    rounds holds for each round the places of its picks, int64 [m] ascending.
    """

    def __init__(self, history: list[PickedVectors]) -> None:
        clusters, ids, x = (
            np.concatenate([getattr(picked, name) for picked in history])
            for name in ("cluster_ids", "image_ids", "x")
        )
        order = np.lexsort((ids, clusters))
        new = np.diff(ids[order], prepend=-1) != 0
        place = np.empty(len(order), np.int64)
        place[order] = np.cumsum(new) - 1
        first = order[new]
        self.x, self.cluster_ids = x[first], clusters[first]
        self.rounds = np.split(place, np.cumsum([len(picked.x) for picked in history])[:-1])


def in_order(push: np.ndarray) -> np.ndarray:
    """Add columns one by one, float64 [n]: zeros among them then change no bit of the sum."""
    total = np.zeros(len(push))
    for column in push.T:
        total += column
    return total


def direct_repulsion(
    x: np.ndarray, cluster_ids: np.ndarray, picked: PickedVectors, parameters: Repulsion
) -> np.ndarray:
    """Sum the push of the picks of a round on rows x [n, d] by direct differences with all: float64 [n]."""
    m = len(picked.x)
    new = np.empty(len(x))
    for rows in blocks(len(x), 4 * m):
        count = rows.stop - rows.start
        row, column = np.repeat(np.arange(rows.start, rows.stop), m), np.tile(np.arange(m), count)
        sq_dists = sq_dists_direct(x, row, picked.x, column).reshape(count, m)
        own = cluster_ids[rows, None] == picked.cluster_ids
        push = parameters.push(sq_dists, own)
        if h := parameters.window(m):
            nearest = np.argsort(sq_dists, axis=1, kind="stable")[:, :h]
            new[rows] = in_order(np.take_along_axis(push, nearest, axis=1))
        else:
            new[rows] = push.sum(axis=1)
    return new


def repulsion_unit(picked: PickedVectors, parameters: Repulsion) -> float:
    """Median repulsion that picks feel from each other: the unit of the regularizer in scaled mode.

    Over at most 256 picks, evenly spaced in cluster order; 1 where picks do not reach each other.
    """
    sample = np.unique(np.linspace(0, len(picked.x) - 1, 256).astype(np.int64))
    felt = direct_repulsion(picked.x[sample], picked.cluster_ids[sample], picked, parameters)
    return float(np.median(felt)) or 1.0


class Candidates:
    """The rows one process holds, with what the earlier rounds' picks did to them.

    x float32 [n, d] unit rows, image_ids int64 [n] ascending, cluster_ids int32 [n], densities float64 [n]
    in the unit that the weight is measured in; equal rows share a cluster. The repulsion R starts at 0 and
    follows the picks by an exponential moving average, R = momentum · R + (1 - momentum) · new, not corrected
    for its start: after j updates it has reached 1 - momentum^j of its steady state (published).

    Only clusters in `open` int32 ascending take part (None: all). With prune a row meets the picks when it
    could win its cluster; without, in every round. `compared` counts the pairs of row and pick that were
    compared so far. The winners are the same.
    """

    def __init__(
        self,
        x: np.ndarray,
        image_ids: np.ndarray,
        cluster_ids: np.ndarray,
        densities: np.ndarray,
        *,
        momentum: float,
        parameters: Repulsion,
        open: np.ndarray | None = None,
        prune: bool = True,
    ) -> None:
        self.x, self.image_ids, self.cluster_ids, self.densities = x, image_ids, cluster_ids, densities
        self.momentum, self.parameters, self.prune = momentum, parameters, prune
        there = np.unique(cluster_ids)
        self.clusters = there if open is None else np.intersect1d(there, open)
        self.rows = np.arange(len(x)) if open is None else np.flatnonzero(np.isin(cluster_ids, open))
        self.place = np.searchsorted(self.clusters, cluster_ids[self.rows])
        self.history: list[PickedVectors] = []
        # The repulsion of a row after the first `seen` rounds. After all, that of `rows` is at least `low`.
        self.repulsion = np.zeros(len(x))
        self.seen = np.zeros(len(x), np.int32)
        self.unsure = np.zeros(len(x), bool)
        self.low = np.zeros(len(self.rows))
        # Where all picks repel, products only estimate; these are exact.
        self.exact = np.zeros(len(x))
        self.exact_seen = np.zeros(len(x), np.int32)
        self.sq_norms = np.einsum("nd,nd->n", x, x) if prune else None
        self.near: np.ndarray | None = None
        self.met: dict[int, Met] = {}
        self.compared = 0

    def repel(self, picked: PickedVectors) -> None:
        """Let the picks of a round push. A cluster has as many in every round."""
        self.history.append(picked)
        self.met = {}
        self.low *= self.momentum
        if self.prune:
            self._raise_low(picked)

    def nominate(self, weight: float) -> Picks:
        """Return the best of these rows in each open cluster by density - weight · repulsion.

        Ties go to the smallest image_id. Every row that could win within the error of products is judged by
        direct differences over all earlier picks, so the winners do not depend on how rows were blocked.
        """
        densities = self.densities[self.rows]
        if not self.prune:
            self._catch_up(np.arange(len(self.x)))
        most = 1
        while True:
            now = self.seen[self.rows] == len(self.history)
            repulsion = self.repulsion[self.rows]
            sure = now & ~self.unsure[self.rows]
            np.copyto(self.low, (1 - REPULSION_ERROR) * repulsion, where=sure)
            upper = densities - weight * self.low
            surely = np.full(len(self.clusters), -np.inf)
            lower = densities[sure] - weight * (1 + REPULSION_ERROR) * repulsion[sure]
            np.maximum.at(surely, self.place[sure], lower)
            able = upper >= surely[self.place]
            waiting = np.flatnonzero(able & ~now)
            if not len(waiting):
                break
            best = foremost(self.place[waiting], upper[waiting], len(self.clusters), most)
            self._catch_up(self.rows[waiting[best]])
            most *= 4
        rows = self.rows[able]
        utilities = self.densities[rows] - weight * self.exact_repulsion(rows)
        return Picks.none().merge(Picks(self.cluster_ids[rows], self.image_ids[rows], utilities))

    def exact_repulsion(self, rows: np.ndarray) -> np.ndarray:
        """Return the repulsion of a few rows by direct differences with all earlier picks: float64 [r]."""
        if self._windowed():
            self._catch_up(rows)
            return self.repulsion[rows]
        for since, behind in self._behind(self.exact_seen, rows):
            met = self._met(since)
            m = len(met.x)
            for part in blocks(len(behind), 4 * m):
                some = behind[part]
                row, column = np.repeat(some, m), np.tile(np.arange(m), len(some))
                sq_dists = sq_dists_direct(self.x, row, met.x, column).reshape(len(some), m)
                push = self.parameters.push(sq_dists, self.cluster_ids[some, None] == met.cluster_ids)
                for places in met.rounds:
                    # `take` keeps rows contiguous: numpy then adds each in the same way, however many.
                    new = push.take(places, axis=1).sum(axis=1)
                    self.exact[some] = self.momentum * self.exact[some] + (1 - self.momentum) * new
            self.compared += len(behind) * m
        return self.exact[rows]

    def judged(self, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Return repulsion and utility of all rows, float64 [n] both, within REPULSION_ERROR of exact.

        Those of every row that could win are exact. Asks for prune=False: all rows must meet all picks.
        """
        assert not self.prune
        self._catch_up(np.arange(len(self.x)))
        settled = np.zeros(len(self.x), bool) if self._windowed() else self.exact_seen == len(self.history)
        repulsion = np.where(settled, self.exact, self.repulsion)
        return repulsion, self.densities - weight * repulsion

    def _windowed(self) -> bool:
        return bool(self.history) and self.parameters.window(len(self.history[0].x)) > 0

    def _behind(self, seen: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows that have not met the picks of all rounds, by how many they have met."""
        for since in np.unique(seen[rows]).tolist():
            if since < len(self.history):
                behind = rows[seen[rows] == since]
                yield since, behind
                seen[behind] = len(self.history)

    def _met(self, since: int) -> Met:
        if since not in self.met:
            self.met[since] = Met(self.history[since:])
        return self.met[since]

    def _catch_up(self, rows: np.ndarray) -> None:
        """Let rows meet the picks of the rounds that they have missed."""
        for since, behind in self._behind(self.seen, rows):
            met = self._met(since)
            for part in blocks(len(behind), 4 * len(met.x)):
                if self._windowed():
                    self._meet_nearest(behind[part], met, since)
                else:
                    self._meet_all(behind[part], met)
            self.compared += len(behind) * len(met.x)

    def _meet_all(self, rows: np.ndarray, met: Met) -> None:
        """Estimate what all picks add, by float64 products."""
        x, picks = self.x[rows].astype(np.float64), met.x.astype(np.float64)
        sq_dists = x @ (-2.0 * picks.T)
        sq_dists += np.einsum("nd,nd->n", x, x)[:, None]
        sq_dists += np.einsum("md,md->m", picks, picks)
        row, column = np.nonzero(sq_dists < NEAR_SQ_DIST)
        sq_dists[row, column] = sq_dists_direct(x, row, picks, column)
        if horizon := self.parameters.horizon_sq_dist:
            self.unsure[rows] |= np.any(np.abs(sq_dists - horizon) <= PRODUCT_ERROR, axis=1)
        push = self.parameters.push(sq_dists, self.cluster_ids[rows, None] == met.cluster_ids)
        # What is left of each pick's push after the moving average of the rounds that it is in.
        left = np.zeros(len(met.x))
        for places in met.rounds:
            left *= self.momentum
            left[places] += 1 - self.momentum
        self.repulsion[rows] *= self.momentum ** len(met.rounds)
        self.repulsion[rows] += push @ left

    def _meet_nearest(self, rows: np.ndarray, met: Met, since: int) -> None:
        """Add what the nearest picks of each round do."""
        for new in self._nearest(rows, met, since):
            self.repulsion[rows] = self.momentum * self.repulsion[rows] + (1 - self.momentum) * new

    def _nearest(self, rows: np.ndarray, met: Met, since: int) -> Iterator[np.ndarray]:
        """Yield the sum of the push of the nearest picks of each round, found among those of all rounds."""
        p, h = len(met.x), self.parameters.window(len(self.history[0].x))
        spare = 1 if len(met.rounds) == 1 else SPARE_PICKS + 2 * h * (p - len(met.rounds[0])) // p
        near = neighbors(self.x[rows], [(np.arange(p), met.x)], min(p, h + spare))
        own = self.cluster_ids[rows, None] == met.cluster_ids[near.image_ids]
        push = self.parameters.push(near.sq_dists, own)
        for number, places in enumerate(met.rounds):
            member = np.zeros(p, bool)
            member[places] = True
            there = member[near.image_ids]
            count = np.cumsum(there, axis=1)
            there &= count <= h
            new = in_order(np.where(there, push, 0.0))
            # Who has fewer than h picks of the round, or as far as the farthest found, may miss a nearer one.
            farthest = np.where(there, near.sq_dists, 0.0).max(axis=1)
            short = np.flatnonzero((count[:, -1] < h) | (farthest >= near.sq_dists[:, -1]))
            if h + spare < p and len(short):
                some, picked = rows[short], self.history[since + number]
                if len(met.rounds) > 1:
                    new[short] = next(self._nearest(some, Met([picked]), since + number))
                else:
                    new[short] = direct_repulsion(
                        self.x[some], self.cluster_ids[some], picked, self.parameters
                    )
            yield new

    def _raise_low(self, picked: PickedVectors) -> None:
        """Add to `low` what the picks of a round do at least.

        Any other picks push at most as much as the nearest; of these h at most one is the own cluster's. A
        row is taken to be near the picks that are near its own cluster's pick in the first round.
        """
        m = len(picked.x)
        own = np.searchsorted(picked.cluster_ids, self.clusters)
        h = self.parameters.window(m)
        if self.near is None:
            count = min(m, h or NEAR_PICKS + 1)
            found = neighbors(picked.x[own], [(np.arange(m), picked.x)], count)
            self.near = found.without(own).image_ids if count > 1 else found.image_ids[:, :0]
        x, error = picked.x.astype(np.float64), product_error(picked.x.shape[1])
        sq_norms = np.einsum("md,md->m", x, x)
        sums = np.zeros((len(own), x.shape[1]))
        sq_sums = np.zeros(len(own))
        for column in self.near.T:
            sums += x[column]
            sq_sums += sq_norms[column]
        groups = [(self.near.shape[1], sums, sq_sums)]
        if not h:
            rest = m - 1 - self.near.shape[1]
            groups.append((rest, x.sum(axis=0) - x[own] - sums, sq_norms.sum() - sq_norms[own] - sq_sums))
        if not self.parameters.exclude_own_cluster:
            groups.append((1, x[own], sq_norms[own]))
        for count, sums, sq_sums in groups:
            if count:
                means, sq_means = (sums / count).astype(np.float32), sq_sums / count
                for part in blocks(len(self.rows), 16 * x.shape[1]):
                    place, rows = self.place[part], self.rows[part]
                    products = np.einsum("nd,nd->n", self.x.take(rows, 0), means.take(place, 0))
                    sq_dists = self.sq_norms[rows] + sq_means[place] - 2.0 * products
                    sq_dists += 2 * error
                    least = (1 - REPULSION_ERROR) * count * self.parameters.least(sq_dists)
                    # The own cluster's pick may be the row itself, or its copy.
                    least[sq_dists <= 4 * error] = 0.0
                    self.low[part] += (1 - self.momentum) * least


def foremost(place: np.ndarray, values: np.ndarray, places: int, most: int) -> np.ndarray:
    """Return indices of the `most` largest values at each of some places, int64; of one, also its equals."""
    if most == 1:
        largest = np.full(places, -np.inf)
        np.maximum.at(largest, place, values)
        return np.flatnonzero(values == largest[place])
    order = np.lexsort((-values, place))
    first = np.flatnonzero(np.diff(place[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return order[rank < most]


def largest_open(sizes: np.ndarray, closed: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` largest clusters that are not closed, int32 ascending; ties to the smallest id.

    sizes int64 [c] counts the rows of each; empty ones are not taken, so there may be fewer.
    """
    order = np.argsort(-sizes, kind="stable")
    order = order[(sizes[order] > 0) & ~np.isin(order, closed)]
    return np.sort(order[:count]).astype(np.int32)


def find(image_ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find images among rows with ascending image_ids: places in `wanted` and row numbers, int64 [p] both."""
    row = np.searchsorted(image_ids, wanted)
    place = np.flatnonzero(row < len(image_ids))
    place = place[image_ids[row[place]] == wanted[place]]
    return place, row[place]


def rounds(
    nominate: Callable[[float], Picks],
    fetch: Callable[[Picks], PickedVectors],
    repel: Callable[[PickedVectors], None],
    *,
    n_rounds: int,
    weight: float,
    unit: Callable[[PickedVectors], float] = lambda picked: 1.0,
    watch: Callable[[int], None] = lambda number: None,
) -> Picks:
    """Nominate, let the picks repel, and nominate again: the picks of the last of n_rounds rounds.

    All clusters are picked anew in every round from the same repulsion (published: Jacobi style). The first
    round has none, so one round, or weight 0, gives the densest image of every cluster. `unit` measures the
    first picks where the weight is in units of their repulsion. A round brings m nominations and the m·d
    floats of the picks in, and sends those out.
    """
    picks = nominate(weight)
    watch(1)
    for number in range(2, n_rounds + 1):
        picked = fetch(picks)
        if number == 2:
            weight /= unit(picked)
        repel(picked)
        picks = nominate(weight)
        watch(number)
    return picks
