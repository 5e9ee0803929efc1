"""The regularized selection: in every cluster the densest image, pushed away from the picks of the others.

The loop is `rounds`; it is given two steps. In memory they are the methods of one `Candidates`; on Ray each
actor has one for its shards, nominations merge as `Picks`, and the picks' vectors are sent to all.

Most rows never meet the picks. A few picks push a row by at least so many times the push at their mean
distance (Jensen: the push is convex), which one product with their mean tells. A row that cannot win even if
it is pushed no more than that waits; should it matter later, it meets the picks of all rounds it has missed.
Where only the nearest picks repel, what a row found in one round is kept for the next (`nearest_picks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from selective_ray.distances import blocks, product_error, sq_dists_direct
from selective_ray.nearest_picks import NearestPicks
from selective_ray.neighbors import neighbors
from selective_ray.repulsion import PickedVectors, Repulsion
from selective_ray.schema import Picks

# Float64 products of unit vectors are off by less than (d + 8) * 2^-51, under 1e-11 up to d = 20,000.
PRODUCT_ERROR = 1e-11
# Nearer than this, 1 / distance would magnify that error, so direct differences are taken.
NEAR_SQ_DIST = 1e-3
# What then remains of the error, relative to the repulsion (alpha up to 4), with a wide margin.
REPULSION_ERROR = 1e-6
# Where all picks repel, so many nearest are bounded apart from the rest.
NEAR_PICKS = 16
# Where only the nearest repel: so many picks near that of its cluster a row looks at before it meets all.
GLIMPSED_PICKS = 64


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
        # What the last round added to it at least, as far as means of picks tell.
        self.least = np.zeros(len(self.rows))
        # Where all picks repel, products only estimate; these are exact.
        self.exact = np.zeros(len(x))
        self.exact_seen = np.zeros(len(x), np.int32)
        self.sq_norms = np.einsum("nd,nd->n", x, x) if prune else None
        self.near: np.ndarray | None = None
        self.met: dict[int, Met] = {}
        self.nearest_picks: NearestPicks | None = None
        self.compared = 0

    def repel(self, picked: PickedVectors) -> None:
        """Let the picks of a round push. A cluster has as many in every round."""
        self.history.append(picked)
        self.met = {}
        if h := self.parameters.window(len(picked.x)):
            if self.nearest_picks is None:
                args = (self.x, self.cluster_ids, h, self.parameters)
                self.nearest_picks = NearestPicks(*args, sq_norms=self.sq_norms)
            self.nearest_picks.add(picked)
        self.low *= self.momentum
        if self.prune:
            self._raise_low(picked)

    def bar(self, weight: float) -> Picks:
        """Return the last picks among these rows, with what their utilities now are at least.

        They are hard to beat: rows that cannot need not meet anyone. None where nothing is pruned.
        """
        if not self.history or not self.prune:
            return Picks.none()
        _, rows = find(self.image_ids, self.history[-1].image_ids)
        rows = rows[np.isin(self.cluster_ids[rows], self.clusters)]
        self._catch_up(rows)
        rows = rows[~self.unsure[rows]]
        utilities = self.densities[rows] - weight * (1 + REPULSION_ERROR) * self.repulsion[rows]
        return Picks(self.cluster_ids[rows], self.image_ids[rows], utilities)

    def nominate(self, weight: float, bar: Picks | None = None) -> Picks:
        """Return the best of these rows in each open cluster by density - weight · repulsion.

        Ties go to the smallest image_id. Every row that could win within the error of products is judged by
        direct differences over all earlier picks, so the winners do not depend on how rows were blocked.
        Rows below the bar, that of all processes, are left out (None: that of these rows).
        """
        if not self.prune:
            self._catch_up(np.arange(len(self.x)))
        bar = self.bar(weight) if bar is None else bar
        surely = np.full(len(self.clusters), -np.inf)
        here = np.isin(bar.cluster_ids, self.clusters)
        surely[np.searchsorted(self.clusters, bar.cluster_ids[here])] = bar.utilities[here]
        upper = self._bounded(slice(None), weight, surely)
        able = np.flatnonzero(upper >= surely[self.place])
        upper, most, look = upper[able], 1, self._glimpses()
        while True:
            waiting = np.flatnonzero(self.seen[self.rows[able]] < len(self.history))
            if not len(waiting):
                break
            if look:
                some, look = waiting, False
                self._glimpse(able[some])
            else:
                some = waiting[foremost(self.place[able[waiting]], upper[waiting], len(self.clusters), most)]
                self._catch_up(self.rows[able[some]])
                most *= 4
            upper[some] = self._bounded(able[some], weight, surely)
            left = upper >= surely[self.place[able]]
            able, upper = able[left], upper[left]
        rows = self.rows[able]
        utilities = self.densities[rows] - weight * self.exact_repulsion(rows)
        return Picks.none().merge(Picks(self.cluster_ids[rows], self.image_ids[rows], utilities))

    def _bounded(self, some: np.ndarray | slice, weight: float, surely: np.ndarray) -> np.ndarray:
        """Return the utility that some of `rows` have at most; raise what their clusters surely reach."""
        rows, densities = self.rows[some], self.densities[self.rows[some]]
        repulsion = self.repulsion[rows]
        sure = (self.seen[rows] == len(self.history)) & ~self.unsure[rows]
        low = np.where(sure, (1 - REPULSION_ERROR) * repulsion, self.low[some])
        self.low[some] = low
        lower = densities[sure] - weight * (1 + REPULSION_ERROR) * repulsion[sure]
        np.maximum.at(surely, self.place[some][sure], lower)
        return densities - weight * low

    def exact_repulsion(self, rows: np.ndarray) -> np.ndarray:
        """Return the repulsion of a few rows by direct differences with all earlier picks: float64 [r]."""
        if self.nearest_picks is not None:
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
        repulsion = self.repulsion
        if self.nearest_picks is None:
            repulsion = np.where(self.exact_seen == len(self.history), self.exact, repulsion)
        return repulsion, self.densities - weight * repulsion

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
            if self.nearest_picks is not None:
                before = self.nearest_picks.compared
                for part in blocks(len(behind), 16 * self.nearest_picks.width):
                    some = behind[part]
                    for new in self.nearest_picks.pushes(some, since):
                        self.repulsion[some] *= self.momentum
                        self.repulsion[some] += (1 - self.momentum) * new
                self.compared += self.nearest_picks.compared - before
            else:
                met = self._met(since)
                for part in blocks(len(behind), 4 * len(met.x)):
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

    def _glimpses(self) -> bool:
        """Tell whether picks near those of the clusters are few beside all."""
        return (
            self.prune and self.nearest_picks is not None and 2 * self.near.shape[1] < len(self.history[0].x)
        )

    def _glimpse(self, some: np.ndarray) -> None:
        """Raise `low` of some of `rows` by what the picks near that of their cluster do."""
        own = np.searchsorted(self.history[0].cluster_ids, self.clusters)
        near = np.zeros((len(self.history[0].x), 1 + self.near.shape[1]), np.int64)
        near[own] = np.column_stack([own, self.near])
        before = self.nearest_picks.compared
        seen = self.seen[self.rows[some]]
        for since in np.unique(seen).tolist():
            which = some[seen == since]
            # Those of a cluster side by side.
            which = which[np.argsort(self.place[which], kind="stable")]
            for part in blocks(len(which), 32 * self.near.shape[1]):
                at = which[part]
                rows = self.rows[at]
                low = self.repulsion[rows]
                for new in self.nearest_picks.glimpse(rows, own[self.place[at]], near, since):
                    low = self.momentum * low + (1 - self.momentum) * new
                self.low[at] = np.maximum(self.low[at], (1 - REPULSION_ERROR) * low)
        self.compared += self.nearest_picks.compared - before

    def _raise_low(self, picked: PickedVectors) -> None:
        """Add to `low` what the picks of a round do at least.

        Any other picks push at most as much as the nearest; of these h at most one is the own cluster's. A
        row is taken to be near the picks that are near its own cluster's pick in the first round.
        """
        m = len(picked.x)
        own = np.searchsorted(picked.cluster_ids, self.clusters)
        h = self.parameters.window(m)
        if self.near is None:
            count = min(m, (GLIMPSED_PICKS if h else NEAR_PICKS) + 1)
            found = neighbors(picked.x[own], [(np.arange(m), picked.x)], count)
            self.near = found.without(own).image_ids if count > 1 else found.image_ids[:, :0]
        x, error = picked.x.astype(np.float64), product_error(picked.x.shape[1])
        sq_norms = np.einsum("md,md->m", x, x)
        sums = np.zeros((len(own), x.shape[1]))
        sq_sums = np.zeros(len(own))
        near = self.near[:, : h - 1] if h else self.near
        for column in near.T:
            sums += x[column]
            sq_sums += sq_norms[column]
        groups = [(near.shape[1], sums, sq_sums)]
        if not h:
            rest = m - 1 - near.shape[1]
            groups.append((rest, x.sum(axis=0) - x[own] - sums, sq_norms.sum() - sq_norms[own] - sq_sums))
        if not self.parameters.exclude_own_cluster:
            groups.append((1, x[own], sq_norms[own]))
        unmet = np.ones(len(self.rows), bool)
        if self.nearest_picks is not None:
            rows, least = self.nearest_picks.least()
            at = rows if len(self.rows) == len(self.x) else np.searchsorted(self.rows, rows)
            self.low[at] += (1 - self.momentum) * (1 - REPULSION_ERROR) * least
            unmet[at] = False
        # Where only the near picks of a cluster count, they add the same as before unless one has changed.
        which = unmet
        if h and len(self.history) > 1:
            same = picked.image_ids == self.history[-2].image_ids
            which = unmet & ~(same[near].all(axis=1) & same[own])[self.place]
        which = np.flatnonzero(which)
        self.least[which] = 0.0
        for count, sums, sq_sums in groups:
            if count:
                means, sq_means = (sums / count).astype(np.float32), sq_sums / count
                for part in blocks(len(which), 16 * x.shape[1]):
                    at = which[part]
                    place, rows = self.place[at], self.rows[at]
                    products = np.einsum("nd,nd->n", self.x.take(rows, 0), means.take(place, 0))
                    sq_dists = self.sq_norms[rows] + sq_means[place] - 2.0 * products
                    sq_dists += 2 * error
                    least = (1 - REPULSION_ERROR) * count * self.parameters.least(sq_dists)
                    # The own cluster's pick may be the row itself, or its copy.
                    least[sq_dists <= 4 * error] = 0.0
                    self.least[at] += least
        self.low[unmet] += (1 - self.momentum) * self.least[unmet]


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
