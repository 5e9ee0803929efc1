"""The nearest picks of rows, kept from round to round: a row compares itself only with picks that are new.

From one round to the next most clusters keep their pick. What a row has found then still holds: it tells how
much the next round pushes at least, and products with the few new picks bring it up to date. Before a row
meets all picks, it looks at those near its cluster's: any of them push no more than the nearest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from selective_ray.distances import blocks, product_error
from selective_ray.neighbors import Nearest
from selective_ray.repulsion import PickedVectors, Repulsion, direct_repulsion, in_order

# Picks that are kept beyond the window: so many may go before a row has to search again.
SPARE_PICKS = 8
# The end of what has not ended.
OPEN = np.iinfo(np.int32).max


class Appearances:
    """The picks of all rounds; one that stays for several rounds in a row is there once.

    A pick that went and comes back appears anew. x float32 [a, d]; cluster_ids int32, image_ids int64, first
    and end int32 [a]: it repelled in rounds first <= r < end. rank int64 [a] orders them by (cluster, image);
    place int32 [a] is that among the picks of a round.
    """

    def __init__(self, d: int) -> None:
        self.x = np.empty((0, d), np.float32)
        self.cluster_ids = np.empty(0, np.int32)
        self.image_ids, self.rank = np.empty(0, np.int64), np.empty(0, np.int64)
        self.first, self.end, self.place = (np.empty(0, np.int32) for _ in range(3))
        # How many there were before each round, and after the last.
        self.known = [0]

    def add(self, picked: PickedVectors) -> None:
        """Take the picks of the next round."""
        number = len(self.known) - 1
        there = np.flatnonzero(self.end == OPEN)
        images, clusters = picked.image_ids, picked.cluster_ids
        # An image is in one cluster only.
        self.end[there[~np.isin(self.image_ids[there], images)]] = number
        new = np.flatnonzero(~np.isin(images, self.image_ids[there]))
        count = len(new)
        self.x = np.concatenate([self.x, picked.x[new]])
        self.cluster_ids = np.concatenate([self.cluster_ids, clusters[new]])
        self.image_ids = np.concatenate([self.image_ids, images[new]])
        self.first = np.concatenate([self.first, np.full(count, number, np.int32)])
        self.end = np.concatenate([self.end, np.full(count, OPEN)])
        self.place = np.concatenate([self.place, new.astype(np.int32)])
        self.rank = np.empty(len(self.x), np.int64)
        self.rank[np.lexsort((self.image_ids, self.cluster_ids))] = np.arange(len(self.x))
        self.known.append(len(self.x))


class NearestPicks:
    """What the nearest `window` picks of each round add to the repulsion of rows x float32 [n, d].

    cluster_ids int32 [n]. With `keep`, a row that has met the picks keeps the nearest window + SPARE_PICKS of
    them, 12 bytes each. `compared` counts the pairs of row and pick that were compared.
    """

    def __init__(
        self, x: np.ndarray, cluster_ids: np.ndarray, window: int, parameters: Repulsion, *, keep: bool
    ) -> None:
        self.x, self.cluster_ids, self.parameters = x, cluster_ids, parameters
        self.window, self.width, self.keep = window, window + SPARE_PICKS, keep
        self.sq_norms = np.einsum("nd,nd->n", x, x)
        self.picks = Appearances(x.shape[1])
        self.history: list[PickedVectors] = []
        self.compared = 0
        # Where a row's nearest picks are kept, -1: nowhere; whose they are, what the last round adds to it at
        # least, and the number of appearances that it knows.
        self.slot = np.full(len(x), -1, np.int32)
        self.kept = Kept.none(0, self.width)
        self.rows, self.sums = np.empty(0, np.int64), np.empty(0)
        self.knows = np.empty(0, np.int32)
        self.taken = 0

    def add(self, picked: PickedVectors) -> None:
        """Take the picks of the next round."""
        self.history.append(picked)
        self.picks.add(picked)

    def pushes(self, rows: np.ndarray, since: int) -> list[np.ndarray]:
        """Return what each round from `since` on adds to some rows int64 [r], float64 [r] each.

        All of them have met the picks of the rounds before, and of no later one.
        """
        known = self.slot[rows] >= 0
        known[known] = self.kept.reach[self.slot[rows[known]]] > 0
        near = Kept.none(len(rows), self.width)
        if known.any():
            old = self.kept.take(self.slot[rows[known]])
            near.put(np.flatnonzero(known), self._with_new(rows[known], old, since))
        if not known.all():
            near.put(np.flatnonzero(~known), self._search(rows[~known], since))
        whole = near.sq_dists[:, self.window - 1] < near.reach
        return self._rounds(rows, near, since, whole, self._round)

    def glimpse(self, rows: np.ndarray, own: np.ndarray, near: np.ndarray, since: int) -> list[np.ndarray]:
        """Return what each round from `since` on adds to some rows at least, float64 [r] each.

        own int64 [r] ascending are the places of the picks of their clusters, and near int64 [m, s] those of
        the picks that are looked at from there, the own one among them.
        """
        picks, error = self.picks, product_error(self.x.shape[1])
        by_place = np.argsort(picks.place, kind="stable")
        first = np.searchsorted(picks.place[by_place], np.arange(len(near) + 1))
        minus_twice, sq_norms = -2.0 * picks.x, np.einsum("ad,ad->a", picks.x, picks.x)
        found = Kept.none(len(rows), self.width)
        found.reach[:] = 0.0
        bounds = np.flatnonzero(np.diff(own, prepend=-1, append=-1))
        mine = own[bounds[:-1]]
        looked = near[mine]
        # All that ever were at these places, one cluster after the other.
        counts = first[looked + 1] - first[looked]
        flat, sizes = counts.reshape(-1), counts.sum(axis=1)
        seen = np.repeat(first[looked + 1].reshape(-1) - np.cumsum(flat), flat) + np.arange(flat.sum())
        seen, ends = by_place[seen], np.cumsum(sizes)
        # Others may be as far, the own one as near, as the error of products allows.
        itself = picks.place[seen] == np.repeat(mine, sizes)
        base = sq_norms[seen] + np.where(itself, -error, error).astype(np.float32)
        start = 0
        for (i, j), end in zip(itertools.pairwise(bounds.tolist()), ends.tolist(), strict=True):
            some = seen[start:end]
            x = self.x.take(rows[i:j], 0).astype(np.float32, copy=False)
            sq_dists = x @ minus_twice.take(some, 0).T
            sq_dists += base[start:end]
            width = min(end - start, self.width)
            nearest = np.argpartition(sq_dists, width - 1, axis=1)[:, :width]
            found.picks[i:j, :width] = some.take(nearest)
            nearest += np.arange(0, sq_dists.size, end - start)[:, None]
            found.sq_dists[i:j, :width] = sq_dists.take(nearest)
            self.compared += sq_dists.size
            start = end
        found.sq_dists += self.sq_norms[rows, None]
        found = found.nearest(self.width, picks.rank)
        return self._rounds(rows, found, since, np.ones(len(rows), bool), self._at_least)

    def _rounds(
        self,
        rows: np.ndarray,
        near: Kept,
        since: int,
        whole: np.ndarray,
        one: Callable[[np.ndarray, Kept, int], np.ndarray],
    ) -> list[np.ndarray]:
        """Ask `one` for each round from `since` on; only once for rows that know their `whole` window,
        bool [r], if its picks stay through all of the rounds."""
        window = near.picks[:, : self.window]
        stays = (window >= 0) & (self.picks.first[window] <= since) & (self.picks.end[window] == OPEN)
        stays = stays.all(axis=1) & whole
        same, others = np.flatnonzero(stays), np.flatnonzero(~stays)
        always = one(rows[same], near.take(same, self.window), len(self.history) - 1)
        varying = near.take(others)
        found = []
        for number in range(since, len(self.history)):
            new = np.empty(len(rows))
            new[same] = always
            new[others] = one(rows[others], varying, number)
            found.append(new)
        near.put(others, varying)
        if self.keep:
            self._store(rows, near, found[-1])
        return found

    def least(self) -> tuple[np.ndarray, np.ndarray]:
        """Return rows int64 [r] that have met picks, and what the last round adds to them at least.

        Picks that a row does not know yet push more than those that they replace in its window, save that of
        its own cluster, which takes a place and may add nothing.
        """
        picks, rows = self.picks, self.rows[: self.taken]
        if not len(rows):
            return rows, self.sums
        alive = np.flatnonzero(picks.end == OPEN)
        own = np.full(1 + max(int(self.cluster_ids.max()), int(picks.cluster_ids.max())), -1, np.int64)
        own[picks.cluster_ids[alive]] = alive
        anew = own[self.cluster_ids[rows]] >= self.knows[: self.taken]
        window = self.kept.picks[: self.taken, : self.window]
        changed = np.flatnonzero(anew | ((window < 0) | (picks.end[window] < OPEN)).any(axis=1))
        for part in blocks(len(changed), 16 * self.width):
            some = changed[part]
            most = self.window - anew[some]
            self.sums[some] = self._at_least(
                rows[some], self.kept.take(some), len(self.history) - 1, most[:, None]
            )
        return rows, self.sums[: self.taken]

    def _at_least(
        self, rows: np.ndarray, near: Kept, number: int, most: np.ndarray | int | None = None
    ) -> np.ndarray:
        """Return what those of a round that rows know, the nearest `most` (the window's), add at least."""
        there = self._there(near, number, self.window if most is None else most)
        own = self.cluster_ids[rows, None] == self.picks.cluster_ids[near.picks]
        push = self.parameters.push(near.sq_dists, own)
        return np.where(there & ~own, push, 0.0).sum(axis=1)

    def _there(self, near: Kept, number: int, most: np.ndarray | int) -> np.ndarray:
        """Tell which picks repel in a round, of each row the nearest `most`."""
        first, end = self.picks.first[near.picks], self.picks.end[near.picks]
        there = (near.picks >= 0) & (first <= number) & (number < end)
        return there & (np.cumsum(there, axis=1) <= most)

    def _search(self, rows: np.ndarray, since: int, ending: int = OPEN) -> Kept:
        """Find the nearest picks among all of the rounds since <= r < ending."""
        some = np.flatnonzero((self.picks.end > since) & (self.picks.first < ending))
        return self._nearest(rows, some, np.full(len(rows), np.inf))

    def _with_new(self, rows: np.ndarray, old: Kept, since: int) -> Kept:
        """Bring what rows knew before a round up to date with the picks that have come since."""
        picks = self.picks
        gone = (old.picks < 0) | (picks.end[old.picks] <= since)
        old.sq_dists[gone], old.picks[gone] = np.inf, -1
        new = self._nearest(rows, np.arange(picks.known[since], picks.known[-1]), old.reach)
        both = Kept(
            np.concatenate([old.picks, new.picks], axis=1),
            np.concatenate([old.sq_dists, new.sq_dists], axis=1),
            np.minimum(old.reach, new.reach),
        )
        return both.nearest(self.width, picks.rank)

    def _nearest(self, rows: np.ndarray, some: np.ndarray, within: np.ndarray) -> Kept:
        """Find the nearest of some picks, ascending, that are within a squared distance, float64 [r]."""
        if not len(some):
            return Kept.none(len(rows), 0)
        nearest = Nearest(self.x[rows], min(len(some), self.width), within=within)
        nearest.offer(some, self.picks.x[some])
        found = nearest.found()
        self.compared += len(rows) * len(some)
        whole = len(some) <= self.width
        reach = within if whole else np.minimum(within, found.sq_dists[:, -1])
        return Kept(found.image_ids.astype(np.int32), found.sq_dists, reach.copy()).nearest(
            self.width, self.picks.rank
        )

    def _round(self, rows: np.ndarray, near: Kept, number: int) -> np.ndarray:
        """Return what a round adds to rows; those that know too few of its picks search among them.

        In the last round, what they find takes the place of what they knew.
        """
        new, short = self._sum(rows, near, number)
        if len(short):
            again = self._search(rows[short], number, number + 1)
            new[short], still = self._sum(rows[short], again, number)
            if number == len(self.history) - 1:
                near.put(short, again)
            if len(still):
                some, picked = rows[short[still]], self.history[number]
                new[short[still]] = direct_repulsion(
                    self.x[some], self.cluster_ids[some], picked, self.parameters
                )
                self.compared += len(some) * len(picked.x)
        return new

    def _sum(self, rows: np.ndarray, near: Kept, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what a round adds to rows, and which of them know too few of its picks to tell."""
        there = self._there(near, number, self.window)
        own = self.cluster_ids[rows, None] == self.picks.cluster_ids[near.picks]
        new = in_order(np.where(there, self.parameters.push(near.sq_dists, own), 0.0))
        # A pick that is not known may be as near as the reach.
        farthest = np.where(there, near.sq_dists, 0.0).max(axis=1)
        return new, np.flatnonzero((there.sum(axis=1) < self.window) | (farthest >= near.reach))

    def _store(self, rows: np.ndarray, near: Kept, sums: np.ndarray) -> None:
        fresh = rows[self.slot[rows] < 0]
        if self.taken + len(fresh) > len(self.rows):
            room = min(len(self.x), max(self.taken + len(fresh), 2 * len(self.rows)))
            kept = Kept.none(room, self.width)
            kept.put(np.arange(len(self.rows)), self.kept)
            self.kept = kept
            for name in ("rows", "sums", "knows"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.empty(room - len(old), old.dtype)]))
        self.slot[fresh] = np.arange(self.taken, self.taken + len(fresh))
        self.taken += len(fresh)
        at = self.slot[rows]
        self.kept.put(at, near)
        self.rows[at], self.sums[at], self.knows[at] = rows, sums, self.picks.known[-1]


class Kept:
    """Nearest picks of some rows, ascending by distance: picks int32 and sq_dists float64 [r, w].

    All that are nearer than reach float64 [r] are there (0: of a glimpse); empty places hold -1 and infinity.
    """

    def __init__(self, picks: np.ndarray, sq_dists: np.ndarray, reach: np.ndarray) -> None:
        self.picks, self.sq_dists, self.reach = picks, sq_dists, reach

    @staticmethod
    def none(r: int, width: int) -> Kept:
        """Return rows that know of no pick, and need know of none."""
        return Kept(np.full((r, width), -1, np.int32), np.full((r, width), np.inf), np.full(r, np.inf))

    def take(self, at: np.ndarray, width: int | None = None) -> Kept:
        """Return a copy of some rows, of their nearest `width` picks."""
        return Kept(self.picks[at, :width], self.sq_dists[at, :width], self.reach[at])

    def put(self, at: np.ndarray, other: Kept) -> None:
        """Replace some rows."""
        self.picks[at], self.sq_dists[at], self.reach[at] = other.picks, other.sq_dists, other.reach

    def nearest(self, width: int, rank: np.ndarray) -> Kept:
        """Return the `width` nearest, ascending; ties by rank int64 [a] of a pick."""
        order = np.argsort(self.sq_dists, axis=1)
        sq_dists = np.take_along_axis(self.sq_dists, order, axis=1)
        tied = ((sq_dists[:, 1:] == sq_dists[:, :-1]) & np.isfinite(sq_dists[:, 1:])).any(axis=1)
        if len(rows := np.flatnonzero(tied)):
            order[rows] = np.lexsort((rank[self.picks[rows]], self.sq_dists[rows]), axis=1)
        picks = np.take_along_axis(self.picks, order, axis=1)
        reach = self.reach
        if sq_dists.shape[1] > width:
            reach = np.minimum(reach, sq_dists[:, width])
            picks, sq_dists = picks[:, :width], sq_dists[:, :width]
        elif sq_dists.shape[1] < width:
            more = Kept.none(len(picks), width - sq_dists.shape[1])
            picks = np.concatenate([picks, more.picks], axis=1)
            sq_dists = np.concatenate([sq_dists, more.sq_dists], axis=1)
        return Kept(picks, sq_dists, reach)
