"""Prototypes: picks that lie near all images, improved by swaps (k-medoids, as FasterPAM does).

Each row is represented by one pick, which costs their squared distance and, in proportion, the mean squared
distance of the pick to its own neighbors: a label is less worth where it stands alone. The cost of some picks
is that of the cheapest for each row, summed over all rows; the nearest pick means the cheapest throughout.
It starts at the row nearest to each centroid of K-Means. Then each pass proposes a few candidates for every
pick: the rows nearest to the mean of those that it represents, the densest of them and a drawn one. One sweep
finds what each would gain, in place of that pick or of one elsewhere that is hardly missed. All swaps that
gain are made together; where that does not lower the cost, only the half that gains most is.

Sources: PAM (Kaufman and Rousseeuw, 1990); gains by the nearest and second-nearest pick, FasterPAM (Schubert
and Rousseeuw, 2021), which looks at every row as a candidate for every pick, one after the other.

The loop is `improve`; it is given steps that sum over the rows, in memory those of one `Represented`, on Ray
a sum over the actors that hold the shards. Sums are integers of fixed point: no order of adding changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from selective_ray.distances import blocks, flat_nonzero, product_error, sq_dists_direct
from selective_ray.kmeans import fixed_point_bits
from selective_ray.neighbors import neighbors
from selective_ray.random_picks import hashed

# Candidates for each pick in a pass: so many nearest to the mean, and the densest and a drawn one besides.
NEAREST = 3
PROPOSED = NEAREST + 2


class Costs(NamedTuple):
    """What rows contribute to the cost of m picks; `add` is exact. In fixed point, but for the counts.

    cost int; counts int64 [m] of the rows nearest to each; loss int64 [m], by which the cost grows without a
    pick; sums int64 [m, d] of the rows of each.
    """

    cost: int
    counts: np.ndarray
    loss: np.ndarray
    sums: np.ndarray

    def add(self, other: Costs) -> Costs:
        """Return what both contribute."""
        return Costs(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Proposals(NamedTuple):
    """Candidates for picks, the first of each by kind and key: place int32, kind int8 (0: nearest to the
    mean, 1: densest, 2: drawn), key float64 ascending, image_ids int64, x float32 [p, d], and sq_dists
    float32 to their neighbors, all [p]."""

    place: np.ndarray
    kind: np.ndarray
    key: np.ndarray
    image_ids: np.ndarray
    x: np.ndarray
    sq_dists: np.ndarray

    def merge(self, other: Proposals) -> Proposals:
        """Keep the first of both."""
        return Proposals(*(np.concatenate(both) for both in zip(self, other, strict=True))).first()

    def first(self) -> Proposals:
        """Keep of each place and kind the first by (key, image_id): NEAREST of kind 0, one of the others."""
        order = np.lexsort((self.image_ids, self.key, self.kind, self.place))
        groups = self.place[order].astype(np.int64) * 3 + self.kind[order]
        new = np.flatnonzero(np.diff(groups, prepend=-1))
        rank = np.arange(len(order)) - np.repeat(new, np.diff(new, append=len(order)))
        return Proposals(*(part[order[rank < np.where(groups % 3, 1, NEAREST)]] for part in self))


class Gains(NamedTuple):
    """By how much candidates lower the cost, int64 [p] in fixed point: `instead` of the pick that they are
    proposed for, and `besides` all picks."""

    instead: np.ndarray
    besides: np.ndarray

    def add(self, other: Gains) -> Gains:
        """Return what both contribute."""
        return Gains(self.instead + other.instead, self.besides + other.besides)


@dataclass(frozen=True)
class Medoids:
    """Picks by place: image_ids int64 [m], x float32 [m, d], sq_dists float32 [m] to their neighbors.

    The first `fixed` stay. A pick costs each row `density_cost` times its sq_dist besides their distance.
    """

    image_ids: np.ndarray
    x: np.ndarray
    sq_dists: np.ndarray
    fixed: int
    density_cost: float = 0.0

    def lifted(self) -> np.ndarray:
        """Return float32 [m, d + 1]: as far from rows with a 0 added as it costs them to be represented."""
        return lift(self.x, self.sq_dists, self.density_cost)


def lift(x: np.ndarray, sq_dists: np.ndarray, density_cost: float) -> np.ndarray:
    """Add to rows float32 [p, d] the root of what they cost besides distances, at most 4: [p, d + 1]."""
    return np.column_stack([x, np.sqrt(np.minimum(density_cost * sq_dists, 4), dtype=np.float32)])


def scale_of(n: int) -> float:
    """Return the scale of the fixed point for costs of n rows in all, which are at most 4 + 4."""
    return 2.0 ** (fixed_point_bits(n) - 3)


class Represented:
    """The rows one process holds, with their nearest and second-nearest pick.

    x float32 [n, d] unit rows, image_ids int64 [n], sq_dists float32 [n] to their neighbors (the density's
    inverse); total is the number of rows of all processes.
    """

    def __init__(self, x: np.ndarray, image_ids: np.ndarray, sq_dists: np.ndarray, total: int) -> None:
        self.x, self.image_ids, self.sq_dists, self.scale = x, image_ids, sq_dists, scale_of(total)
        self.sq_norms = np.einsum("nd,nd->n", x, x)
        self.medoids: Medoids | None = None

    def _meet(self, medoids: Medoids) -> None:
        """Find the nearest picks of every row, unless these are known."""
        known = self.medoids
        same = known is not None and known.density_cost == medoids.density_cost
        if same and np.array_equal(known.image_ids, medoids.image_ids):
            return
        n, m = len(self.x), len(medoids.x)
        self.medoids, self.place = medoids, np.empty(n, np.int64)
        self.nearest, self.second = np.empty(n), np.full(n, 8.0)
        picks = np.arange(m), medoids.lifted()
        error = product_error(self.x.shape[1] + 1, y_norm=1 + float(picks[1][:, -1].max(initial=0)))
        for rows in blocks(n, self.x.shape[1]):
            found = neighbors(np.pad(self.x[rows], ((0, 0), (0, 1))), [picks], min(2, m), error=error)
            self.place[rows], self.nearest[rows] = found.image_ids[:, 0], found.sq_dists[:, 0]
            if m > 1:
                self.second[rows] = found.sq_dists[:, 1]

    def represent(self, medoids: Medoids) -> Costs:
        """Sum what the rows contribute to the cost of picks."""
        self._meet(medoids)
        m = len(medoids.x)
        nearest = np.rint(self.nearest * self.scale).astype(np.int64)
        loss = np.zeros(m, np.int64)
        np.add.at(loss, self.place, np.rint(self.second * self.scale).astype(np.int64) - nearest)
        sums = np.zeros((m, self.x.shape[1]), np.int64)
        for rows in blocks(len(self.x), 64 * self.x.shape[1]):
            fixed = np.rint(self.x[rows].astype(np.float64) * self.scale).astype(np.int64)
            np.add.at(sums, self.place[rows], fixed)
        counts = np.bincount(self.place, minlength=m)
        return Costs(int(nearest.sum()), counts, loss, sums)

    def propose(self, medoids: Medoids, means: np.ndarray, draw: int) -> Proposals:
        """Propose rows for the picks that are not fixed; means float32 [m, d]; `draw` seeds what is drawn."""
        self._meet(medoids)
        rows = np.flatnonzero(self.place >= self.medoids.fixed)
        rows = rows[self.image_ids[rows] != self.medoids.image_ids[self.place[rows]]]
        place, ids = self.place[rows].astype(np.int32), self.image_ids[rows]
        keys = (
            sq_dists_direct(self.x, rows, means, place),
            self.sq_dists[rows].astype(np.float64),
            hashed(ids, draw).astype(np.float64),
        )
        kinds = []
        for kind, key in enumerate(keys):
            # The rows are looked up once it is known which are among the first.
            numbers = np.full(len(rows), kind, np.int8)
            kinds.append(Proposals(place, numbers, key, ids, rows[:, None], self.sq_dists[rows]).first())
        place, kind, key, ids, at, sq_dists = (np.concatenate(parts) for parts in zip(*kinds, strict=True))
        return Proposals(place, kind, key, ids, self.x[at[:, 0]], sq_dists).first()

    def gains(self, medoids: Medoids, lifted: np.ndarray, place: np.ndarray) -> Gains:
        """Return what candidates for the picks at some places int32 [p] ascending gain.

        lifted float32 [p, d + 1]: the candidates as `lift` gives them.
        """
        self._meet(medoids)
        p, x = len(lifted), np.ascontiguousarray(lifted[:, :-1])
        extra = lifted[:, -1].astype(np.float64) ** 2
        instead, besides = np.zeros(p, np.int64), np.zeros(p, np.int64)
        first = np.searchsorted(place, np.arange(len(self.medoids.x) + 1))
        error = product_error(x.shape[1])
        # |x|² + |c|² - 2 x·c + extra < nearest: who may be cheaper than the nearest pick, but for errors.
        offset = (np.einsum("pd,pd->p", x, x, dtype=np.float64) + extra) / 2
        for rows in blocks(len(self.x), 4 * p):
            nearest = self.nearest[rows]
            least = (self.sq_norms[rows] - nearest - 2 * error) / 2
            near = self.x[rows] @ x.T - offset.astype(np.float32) >= least.astype(np.float32)[:, None]
            row, column = np.divmod(flat_nonzero(near), p)
            row += rows.start
            sq_dists = sq_dists_direct(self.x, row, x, column) + extra[column]
            closer = np.flatnonzero(sq_dists < self.nearest[row])
            row, column = row[closer], column[closer]
            won = self._fixed(self.nearest[row]) - self._fixed(sq_dists[closer])
            np.add.at(besides, column, won)
            foreign = self.place[row] != place[column]
            np.add.at(instead, column[foreign], won[foreign])
            # Without its pick, a row goes to the candidate or to its second-nearest pick.
            mine = self.place[rows]
            counts = first[mine + 1] - first[mine]
            row = np.repeat(np.arange(rows.start, rows.stop), counts)
            column = np.repeat(first[mine + 1] - np.cumsum(counts), counts) + np.arange(counts.sum())
            there = sq_dists_direct(self.x, row, x, column) + extra[column]
            left = np.minimum(there, self.second[row])
            np.add.at(instead, column, self._fixed(self.nearest[row]) - self._fixed(left))
        return Gains(instead, besides)

    def _fixed(self, sq_dists: np.ndarray) -> np.ndarray:
        return np.rint(sq_dists * self.scale).astype(np.int64)


@dataclass(frozen=True)
class Swaps:
    """Candidates that take the places of picks: gain int64 in fixed point, place int32, candidate int64, all
    [s], largest gain first. No place is part of two swaps."""

    gain: np.ndarray
    place: np.ndarray
    candidate: np.ndarray

    def half(self) -> Swaps:
        """Keep the half that gains most."""
        keep = slice(0, len(self.gain) // 2)
        return Swaps(self.gain[keep], self.place[keep], self.candidate[keep])


def choose(gains: Gains, place: np.ndarray, loss: np.ndarray, fixed: int) -> Swaps:
    """Choose swaps that gain, by what each gains alone.

    place int32 [p] of the candidates, loss int64 [m] of the picks. A candidate may take the place it is
    proposed for; or that of a pick elsewhere which is missed less than the candidate gains besides all.
    """
    order = np.lexsort((np.arange(len(place)), -gains.instead, place))
    best = order[np.flatnonzero(np.diff(place[order], prepend=-1))]
    best = best[gains.instead[best] > 0]
    gain, into, who = [gains.instead[best]], [place[best]], [best]
    # Elsewhere: the places that nobody improves, the least missed with the candidates that gain most.
    free = np.ones(len(loss), bool)
    free[:fixed] = False
    free[place[best]] = False
    spare = np.flatnonzero(free)
    spare = spare[np.argsort(loss[spare], kind="stable")]
    order = np.lexsort((np.arange(len(place)), -gains.besides, place))
    offers = order[np.flatnonzero(np.diff(place[order], prepend=-1))]
    offers = offers[free[place[offers]] & (gains.besides[offers] > 0)]
    offers = offers[np.argsort(-gains.besides[offers], kind="stable")]
    taken = np.zeros(len(loss), bool)
    at = 0
    for candidate in offers.tolist():
        home = place[candidate]
        while at < len(spare) and taken[spare[at]]:
            at += 1
        if at == len(spare) or taken[home]:
            continue
        gone = spare[at] if spare[at] != home else next((s for s in spare[at + 1 :] if not taken[s]), None)
        if gone is None or gains.besides[candidate] <= loss[gone]:
            break
        taken[[home, gone]] = True
        gain.append(gains.besides[[candidate]] - loss[[gone]])
        into.append(np.array([gone], np.int32))
        who.append(np.array([candidate]))
    gain, into, who = np.concatenate(gain), np.concatenate(into).astype(np.int32), np.concatenate(who)
    order = np.lexsort((into, -gain))
    return Swaps(gain[order], into[order], who[order])


@dataclass(frozen=True)
class Pass:
    """What a pass did: the cost per row after it, and how many of the swaps that gained were made."""

    number: int
    cost: float
    made: int
    found: int


@dataclass
class State:
    """Picks with what they cost; all that a next pass depends on."""

    medoids: Medoids
    costs: Costs
    history: list[Pass] = field(default_factory=list)


def improve(
    start: Medoids,
    represent: Callable[[Medoids], Costs],
    propose: Callable[[Medoids, np.ndarray, int], Proposals],
    gains: Callable[[Medoids, np.ndarray, np.ndarray], Gains],
    *,
    n: int,
    seed: int,
    passes: int,
    density_cost: float = 0.0,
    unit: float = 1.0,
    watch: Callable[[Pass], None] = lambda done: None,
) -> State:
    """Swap picks until no swap is found that lowers the cost, or for so many passes.

    represent, propose and gains sum over all n rows. A pick whose squared distance to its neighbors is `unit`
    costs each row it represents `density_cost` times what they cost on average at the start, by distance
    alone. The cost is never above that of the start.
    """
    scale = scale_of(n)
    state = State(start, represent(start))
    if density_cost and unit:
        each = density_cost * state.costs.cost / scale / n / unit
        state.medoids = replace(start, density_cost=each)
        state.costs = represent(state.medoids)
    for number in range(1, passes + 1):
        medoids, costs = state.medoids, state.costs
        counts = np.maximum(costs.counts, 1)
        means = (costs.sums / (scale * counts[:, None])).astype(np.float32)
        offered = propose(medoids, means, seed * 1_000_003 + number)
        lifted = lift(offered.x, offered.sq_dists, medoids.density_cost)
        found = choose(gains(medoids, lifted, offered.place), offered.place, costs.loss, medoids.fixed)
        swaps = found
        while len(swaps.gain):
            image_ids, x, sq_dists = medoids.image_ids.copy(), medoids.x.copy(), medoids.sq_dists.copy()
            image_ids[swaps.place] = offered.image_ids[swaps.candidate]
            x[swaps.place] = offered.x[swaps.candidate]
            sq_dists[swaps.place] = offered.sq_dists[swaps.candidate]
            tried = replace(medoids, image_ids=image_ids, x=x, sq_dists=sq_dists)
            now = represent(tried)
            if now.cost < costs.cost:
                state.medoids, state.costs = tried, now
                break
            swaps = swaps.half()
        done = Pass(number, state.costs.cost / scale / n, len(swaps.gain), len(found.gain))
        state.history.append(done)
        watch(done)
        if not len(swaps.gain):
            break
    return state
