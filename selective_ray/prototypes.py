"""Prototypes: picks that lie near all images, improved by swaps (k-medoids, as FasterPAM does).

Rows are seen from their mean: less it, and of unit length again. Features that end in a rectifier lie in a
narrow cone, where few rows far from all others would cost the most and draw the picks to them.

Each row is represented by one pick, which costs their squared distance and, in proportion, the mean squared
distance of the pick to its own neighbors: a label is less worth where it stands alone. The cost of some picks
is that of the cheapest for each row, summed over all rows; the nearest pick means the cheapest throughout.
It starts at the row nearest to each centroid of K-Means. Then each pass proposes a few candidates for every
pick: the rows that would represent those it represents for the least, and a drawn one of them. Drawn rows of
that pick and of those nearest to it tell what each would gain, in place of that pick or of one elsewhere
that is hardly missed. All swaps that gain are made together; where that does not lower the cost of all rows,
only the half that gains most is.

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
from selective_ray.kmeans import add_rows, fixed_point_bits
from selective_ray.neighbors import neighbors
from selective_ray.random_picks import hashed

# Candidates for each pick in a pass: so many of those that cost its rows the least, and a drawn one besides.
LEAST = 2
# Rows for each pick that tell what candidates gain, drawn anew in each pass; where there are fewer, all do.
SAMPLED = 512
# Picks, itself among them, whose rows tell what a pick's candidates gain: others seldom change hands.
NEAR = 32
# Rows for each pick that tell what a row is away from the nearest on average, at the start.
AVERAGED = 64
# Rows nearer to the mean than this share of the root mean square are not stretched to unit length, but as
# much as those at that distance: what little they differ by says nothing.
SHORT = 0.7


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
    """Candidates for picks, the first of each by kind and key: place int32, kind int8 (0: of the least cost,
    1: drawn), key float64 ascending, image_ids int64, x float32 [p, d], and sq_dists float32 to their
    neighbors, all [p]."""

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
        """Keep of each place and kind the first by (key, image_id): LEAST of kind 0, one that is drawn."""
        order = np.lexsort((self.image_ids, self.key, self.kind, self.place))
        groups = self.place[order].astype(np.int64) * 2 + self.kind[order]
        new = np.flatnonzero(np.diff(groups, prepend=-1))
        rank = np.arange(len(order)) - np.repeat(new, np.diff(new, append=len(order)))
        return Proposals(*(part[order[rank < np.where(groups % 2, 1, LEAST)]] for part in self))


class Gains(NamedTuple):
    """By how much candidates lower the cost, int64 [p] in fixed point: `instead` of the pick that they are
    proposed for, and `besides` all picks; as far as the rows tell that were drawn."""

    instead: np.ndarray
    besides: np.ndarray

    def add(self, other: Gains) -> Gains:
        """Return what both contribute."""
        return Gains(self.instead + other.instead, self.besides + other.besides)


@dataclass(frozen=True)
class Offered:
    """Candidates for picks: place int32 [p] ascending, and `lift` of them, float32 [p, d + 1].

    near int32 [m, c]: for each pick, those whose rows tell what its candidates gain, itself among them; of
    these rows only a share, drawn by `draw`.
    """

    place: np.ndarray
    lifted: np.ndarray
    near: np.ndarray
    share: float
    draw: int


@dataclass(frozen=True)
class Medoids:
    """Picks by place: image_ids int64 [m], and x float32 [m, d] as rows are seen.

    sq_dists float32 [m] are those to their own neighbors (the density's inverse). The first `fixed` stay. A
    pick costs each row `density_cost` times its sq_dist besides their distance.
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


def summed(x: np.ndarray, n: int) -> np.ndarray:
    """Add up rows of n in all, int64 [d] in fixed point: exact in any order."""
    sums = np.zeros((1, x.shape[1]), np.int64)
    for part in blocks(len(x), x.shape[1]):
        rows = x[part].astype(np.float32)
        add_rows(sums, rows, np.arange(len(rows)), np.zeros(len(rows), np.int64), scale_of(n), 1)
    return sums[0]


def mean_of(sums: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of n rows, float32 [d], of what `summed` found."""
    return (sums / (scale_of(n) * n)).astype(np.float32)


def seen_from(mean: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    """Return unit rows [n, d] as they are seen from the mean of all, at most of unit length: float32."""
    x = x.astype(np.float32)
    if mean is None:
        return x
    x -= mean
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    # Of unit rows it is the root mean square of their distances to the mean.
    typical = np.sqrt(max(0.0, 1 - float(np.einsum("d,d->", mean, mean, dtype=np.float64))))
    x /= np.maximum(lengths, max(SHORT * typical, 1e-6)).astype(np.float32)[:, None]
    return x


def scale_of(n: int) -> float:
    """Return the scale of the fixed point for costs of n rows in all, which are at most 4 + 4."""
    return 2.0 ** (fixed_point_bits(n) - 3)


def _operands(lifted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return what products with lifted picks float32 [p, d + 1] take.

    x float32 [p, d]; what they cost besides distances, float64 [p]; (c, -(|c|² + extra) / 2), float32
    [d + 1, p], for rows with a 1 added; and a bound of the error of such a product.
    """
    x, extra = np.ascontiguousarray(lifted[:, :-1]), lifted[:, -1].astype(np.float64) ** 2
    offset = -(np.einsum("pd,pd->p", x, x, dtype=np.float64) + extra) / 2
    # Of (x, 1) and (c, at most 5 / 2) the product of lengths is under 4; the half of |row|² adds 1 / 2.
    error = product_error(x.shape[1] + 1, y_norm=1.5)
    return x, extra, np.vstack([x.T, offset.astype(np.float32)]), error


class Represented:
    """The rows one process holds, with their nearest and second-nearest pick.

    x [n, d] unit rows, image_ids int64 [n], sq_dists float32 [n] to their neighbors (the density's inverse);
    total is the number of all rows, mean float32 [d] theirs, None where rows are seen as they are.
    """

    def __init__(
        self,
        x: np.ndarray,
        image_ids: np.ndarray,
        sq_dists: np.ndarray,
        total: int,
        mean: np.ndarray | None = None,
    ) -> None:
        self.x, self.image_ids, self.sq_dists, self.scale = x, image_ids, sq_dists, scale_of(total)
        self.mean = mean
        self.sq_norms = np.empty(len(x), np.float32)
        for part in blocks(len(x), x.shape[1]):
            rows = self._rows(np.arange(part.start, part.stop))
            self.sq_norms[part] = np.einsum("nd,nd->n", rows, rows)
        self.medoids: Medoids | None = None
        # Of the two nearest picks of every row.
        self.places, self.costs = np.empty((len(x), 2), np.int64), np.empty((len(x), 2))

    def _meet(self, medoids: Medoids) -> None:
        """Find the two nearest picks of every row; those known are compared with what has changed only."""
        known, m = self.medoids, len(medoids.x)
        if known is not None and len(known.x) != m:
            # Picks of another budget.
            known = None
        changed, lost = np.arange(m), np.ones(len(self.x), bool)
        if known is not None and known.density_cost == medoids.density_cost:
            changed = np.flatnonzero(known.image_ids != medoids.image_ids)
            gone = np.zeros(m, bool)
            gone[changed] = True
            lost = gone[self.places].any(axis=1)
        if known is None:
            # By place: the sum of the rows it represents, and where each row has been added, -1 for nowhere.
            self.sums = np.zeros((m, self.x.shape[1]), np.int64)
            self.summed = np.full(len(self.x), -1)
        self.medoids = medoids
        if len(changed):
            self._offer(np.flatnonzero(~lost), changed, keep=True)
            self._offer(np.flatnonzero(lost), np.arange(m), keep=False)

    def _offer(self, rows: np.ndarray, picks: np.ndarray, *, keep: bool) -> None:
        """Find the two nearest of some picks for some rows, and of those known already if these are kept."""
        lifted = self.medoids.lifted()[picks]
        x, extra, columns, error = _operands(lifted)
        for part in blocks(len(rows), max(len(picks), self.x.shape[1])):
            at, here = rows[part], self._rows(rows[part])
            products = self._products(here, columns)
            if keep:
                least = (self.sq_norms[at] - self.costs[at, 1]) / 2 - error
            else:
                best = np.arange(len(at)), products.argmax(axis=1)
                products[best] = -np.inf
                # Two products are compared.
                least = products.max(axis=1) - 2 * error
                products[best] = np.inf
            row, column = np.divmod(flat_nonzero(products >= least.astype(np.float32)[:, None]), len(picks))
            costs, places = sq_dists_direct(here, row, x, column) + extra[column], picks[column]
            if keep:
                row = np.concatenate([row, np.repeat(np.arange(len(at)), 2)])
                costs = np.concatenate([costs, self.costs[at].ravel()])
                places = np.concatenate([places, self.places[at].ravel()])
            order = np.lexsort((places, costs, row))
            first = np.flatnonzero(np.diff(row[order], prepend=-1))
            # A pick alone is the second, too; without it a row would cost more than by any other.
            second = first + (len(self.medoids.x) > 1)
            self.places[at] = places[order[np.column_stack([first, second])]]
            self.costs[at] = costs[order[np.column_stack([first, second])]]
            if len(self.medoids.x) == 1:
                self.costs[at, 1] = 8.0

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the rows as they are seen from the mean; no second copy of all is kept."""
        return seen_from(self.mean, self.x.take(rows, 0))

    @staticmethod
    def _products(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Multiply rows with what `_operands` made of picks: half of |row|² less what it costs, [r, p]."""
        return np.pad(x, ((0, 0), (0, 1)), constant_values=1) @ columns

    def represent(self, medoids: Medoids, share: float = 1.0, draw: int = 0) -> Costs:
        """Sum what the rows contribute to the cost of picks; cost and counts only where a share is drawn."""
        m = len(medoids.x)
        if share < 1:
            rows = self._drawn(share, draw)
            self.medoids = medoids
            self._offer(rows, np.arange(m), keep=False)
            # The others have not met them.
            self.medoids = None
            nothing = np.zeros(m, np.int64)
            counts = np.bincount(self.place[rows], minlength=m)
            return Costs(int(self._fixed(self.costs[rows, 0]).sum()), counts, nothing, nothing)
        self._meet(medoids)
        nearest, second = self._fixed(self.costs).T
        loss = np.zeros(m, np.int64)
        np.add.at(loss, self.place, second - nearest)
        moved = np.flatnonzero(self.summed != self.place)
        for part in blocks(len(moved), self.x.shape[1]):
            some = moved[part]
            here, before = self._rows(some), np.flatnonzero(self.summed[some] >= 0)
            add_rows(self.sums, here, before, self.summed[some[before]], self.scale, -1)
            add_rows(self.sums, here, np.arange(len(some)), self.place[some], self.scale, 1)
        self.summed = self.place.copy()
        counts = np.bincount(self.place, minlength=m)
        return Costs(int(nearest.sum()), counts, loss, self.sums.copy())

    def propose(self, medoids: Medoids, means: np.ndarray, draw: int) -> Proposals:
        """Propose rows for the picks that are not fixed; `draw` seeds what is drawn.

        means float32 [m, d] of the rows that each pick represents. A candidate costs each of them what the
        mean would, its own squared distance to the mean, and what its sq_dist costs.
        """
        self._meet(medoids)
        rows = np.flatnonzero(self.place >= self.medoids.fixed)
        rows = rows[self.image_ids[rows] != self.medoids.image_ids[self.place[rows]]]
        place, ids = self.place[rows].astype(np.int32), self.image_ids[rows]
        own = medoids.density_cost * self.sq_dists[rows].astype(np.float64)
        for part in blocks(len(rows), self.x.shape[1]):
            here = self._rows(rows[part])
            own[part] += sq_dists_direct(here, np.arange(len(here)), means, place[part])
        keys = own, hashed(ids, draw).astype(np.float64)
        kinds = []
        for kind, key in enumerate(keys):
            # The rows are looked up once it is known which are among the first.
            numbers = np.full(len(rows), kind, np.int8)
            kinds.append(Proposals(place, numbers, key, ids, rows[:, None], self.sq_dists[rows]).first())
        place, kind, key, ids, at, sq_dists = (np.concatenate(parts) for parts in zip(*kinds, strict=True))
        return Proposals(place, kind, key, ids, self._rows(at[:, 0]), sq_dists).first()

    def gains(self, medoids: Medoids, offered: Offered) -> Gains:
        """Return what candidates gain, as a share of the rows near them tells."""
        self._meet(medoids)
        place, p, (x, extra, columns, error) = offered.place, len(offered.place), _operands(offered.lifted)
        instead, besides = np.zeros(p, np.int64), np.zeros(p, np.int64)
        first = np.searchsorted(place, np.arange(len(self.medoids.x) + 1))
        drawn = self._drawn(offered.share, offered.draw)
        drawn = drawn[np.argsort(self.place[drawn], kind="stable")]
        # By place: the candidates its rows tell of.
        told_by = offered.near[place]
        order = np.argsort(told_by, axis=None, kind="stable")
        whom = order // told_by.shape[1]
        bounds = np.searchsorted(told_by.ravel()[order], np.arange(len(first)))
        cells = np.searchsorted(self.place[drawn], np.arange(len(first)))
        for at in np.flatnonzero(np.diff(cells) * np.diff(bounds)):
            mine, who = drawn[cells[at] : cells[at + 1]], whom[bounds[at] : bounds[at + 1]]
            for part in blocks(len(mine), max(len(who), self.x.shape[1])):
                rows, here = mine[part], self._rows(mine[part])
                # Who may be cheaper than the nearest pick, but for errors.
                least = (self.sq_norms[rows] - self.costs[rows, 0]) / 2 - error
                near = self._products(here, columns[:, who]) >= least.astype(np.float32)[:, None]
                row, column = np.divmod(flat_nonzero(near), len(who))
                column = who[column]
                sq_dists = sq_dists_direct(here, row, x, column) + extra[column]
                closer = np.flatnonzero(sq_dists < self.costs[rows[row], 0])
                row, column = rows[row[closer]], column[closer]
                won = self._fixed(self.costs[row, 0]) - self._fixed(sq_dists[closer])
                np.add.at(besides, column, won)
                foreign = place[column] != at
                np.add.at(instead, column[foreign], won[foreign])
        for part in blocks(len(drawn), max(16 * (LEAST + 1), self.x.shape[1])):
            # Without its pick, a row goes to the candidate or to its second-nearest pick.
            rows, here = drawn[part], self._rows(drawn[part])
            mine = self.place[rows]
            counts = first[mine + 1] - first[mine]
            row, at = np.repeat(rows, counts), np.repeat(np.arange(len(rows)), counts)
            column = np.repeat(first[mine + 1] - np.cumsum(counts), counts) + np.arange(counts.sum())
            there = sq_dists_direct(here, at, x, column) + extra[column]
            left = np.minimum(there, self.costs[row, 1])
            np.add.at(instead, column, self._fixed(self.costs[row, 0]) - self._fixed(left))
        return Gains(instead, besides)

    def _drawn(self, share: float, draw: int) -> np.ndarray:
        """Draw a share of the rows held here."""
        if share >= 1:
            return np.arange(len(self.x))
        return np.flatnonzero(hashed(self.image_ids, draw) < int(share * 2.0**64))

    @property
    def place(self) -> np.ndarray:
        """The nearest pick of every row, by its place."""
        return self.places[:, 0]

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
    represent: Callable[..., Costs],
    propose: Callable[[Medoids, np.ndarray, int], Proposals],
    gains: Callable[[Medoids, Offered], Gains],
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
    costs each row it represents `density_cost` times what drawn ones cost on average at the start, by
    distance alone; where `unit` is 0, as among copies, nothing. The cost is never above that of the start.
    """
    scale, share = scale_of(n), min(1.0, SAMPLED * len(start.x) / n)
    if density_cost and unit:
        told = represent(start, min(1.0, AVERAGED * len(start.x) / n), seed)
        mean = told.cost / scale / max(1, told.counts.sum())
        start = replace(start, density_cost=density_cost * mean / unit)
    state = State(start, represent(start))
    for number in range(1, passes + 1):
        medoids, costs = state.medoids, state.costs
        counts = np.maximum(costs.counts, 1)
        means = (costs.sums / (scale * counts[:, None])).astype(np.float32)
        draw = seed * 1_000_003 + number
        offered = propose(medoids, means, draw)
        lifted = lift(offered.x, offered.sq_dists, medoids.density_cost)
        # Of other draws than those of the candidates: of their own they would say too much.
        near = _near(medoids.x)
        told = gains(medoids, Offered(offered.place, lifted, near, share, draw + 500_000))
        told = Gains(*(np.rint(part / share).astype(np.int64) for part in told))
        found = choose(told, offered.place, costs.loss, medoids.fixed)
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


def _near(x: np.ndarray) -> np.ndarray:
    """Return the NEAR nearest picks of each, itself among them: int32 [m, c]."""
    places = np.arange(len(x))
    if len(x) <= NEAR:
        return np.tile(places.astype(np.int32), (len(x), 1))
    found = neighbors(x, [(places, x)], NEAR).image_ids.astype(np.int32)
    # Among many copies it need not be.
    missing = np.flatnonzero(~(found == places[:, None]).any(axis=1))
    found[missing, -1] = missing
    return found
