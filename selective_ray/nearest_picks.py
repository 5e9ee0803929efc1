"""The nearest picks of rows, kept from round to round: a row compares itself only with picks that are new.

From one round to the next most clusters keep their pick. What a row has found then still holds: it tells how
much the next round pushes at least, and products with the few new picks bring it up to date. Before a row
meets all picks, it looks at those near its cluster's: any of them push no more than the nearest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from selective_ray.distances import blocks, product_error
from selective_ray.neighbors import Nearest
from selective_ray.repulsion import PickedVectors, Repulsion, direct_repulsion

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

    cluster_ids int32 [n]. Where the rows' sq_norms float32 [n] are given, a row that has met picks keeps the
    nearest window + SPARE_PICKS of them, 12 bytes each. `compared` counts the pairs of row and pick that were
    compared.
    """

    def __init__(
        self,
        x: np.ndarray,
        cluster_ids: np.ndarray,
        window: int,
        parameters: Repulsion,
        *,
        sq_norms: np.ndarray | None = None,
    ) -> None:
        self.x, self.cluster_ids, self.parameters = x, cluster_ids, parameters
        self.window, self.width, self.keep = window, window + SPARE_PICKS, sq_norms is not None
        self.sq_norms = sq_norms
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
        found = [np.empty(len(rows)) for _ in self.history[since:]]
        for which, find in ((known, self._with_new), (~known, self._search)):
            some = rows[which]
            if len(some):
                for new, part in zip(found, self._pushes(some, find(some, since), since), strict=True):
                    new[which] = part
        return found

    def _pushes(self, rows: np.ndarray, near: Kept, since: int) -> list[np.ndarray]:
        """Return what each round from `since` on adds to rows that have found the picks near them."""
        window = Window(self.picks, near, self._push(rows, near))
        found = []
        for number in range(since, len(self.history)):
            new = window.sums(number, self.window)
            count, farthest = window.known(number, self.window)
            # A pick that is not known may be as near as the reach.
            short = np.flatnonzero((count < self.window) | (farthest >= near.reach))
            if len(short):
                new[short] = self._searched(rows[short], number)
            found.append(new)
        if self.keep:
            self._store(rows, near.nearest(self.width, self.picks.rank), found[-1])
        return found

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
        np.add(found.sq_dists, self.sq_norms[rows, None], out=found.sq_dists)
        found = found.nearest(self.width, picks.rank)
        window = Window(self.picks, found, self._push(rows, found, own_adds=False))
        least = [window.sums(number, self.window) for number in range(since, len(self.history))]
        self._store(rows, found, least[-1])
        return least

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
            near = self.kept.take(some)
            window = Window(picks, near, self._push(rows[some], near, own_adds=False))
            self.sums[some] = window.sums(len(self.history) - 1, self.window - anew[some])
        return rows, self.sums[: self.taken]

    def _search(self, rows: np.ndarray, since: int, ending: int = OPEN) -> Kept:
        """Find the nearest picks among all of the rounds since <= r < ending, the more the more there are."""
        some = np.flatnonzero((self.picks.end > since) & (self.picks.first < ending))
        m = len(self.history[-1].x)
        more = 2 * self.window * (len(some) - m) // m
        return self._nearest(rows, some, np.full(len(rows), np.inf), self.width + more)

    def _with_new(self, rows: np.ndarray, since: int) -> Kept:
        """Bring what rows knew before a round up to date with the picks that have come since."""
        picks, old = self.picks, self.kept.take(self.slot[rows])
        gone = (old.picks < 0) | (picks.end[old.picks] <= since)
        old.sq_dists[gone], old.picks[gone] = np.inf, -1
        come = np.arange(picks.known[since], picks.known[-1])
        new = self._nearest(rows, come, old.reach, self.width)
        both = Kept(
            np.concatenate([old.picks, new.picks], axis=1),
            np.concatenate([old.sq_dists, new.sq_dists], axis=1),
            np.minimum(old.reach, new.reach),
        )
        return both.nearest(self.width, picks.rank)

    def _nearest(self, rows: np.ndarray, some: np.ndarray, within: np.ndarray, width: int) -> Kept:
        """Find the nearest of some picks, ascending, that are within a squared distance, float64 [r]."""
        if not len(some):
            return Kept.none(len(rows), 0)
        nearest = Nearest(self.x[rows], min(len(some), width), within=within)
        nearest.offer(some, self.picks.x[some])
        found = nearest.found()
        self.compared += len(rows) * len(some)
        reach = within if len(some) <= width else np.minimum(within, found.sq_dists[:, -1])
        return Kept(found.image_ids.astype(np.int32), found.sq_dists, reach).nearest(width, self.picks.rank)

    def _searched(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Return what a round adds to rows that search among its picks alone."""
        near = self._search(rows, number, number + 1)
        window = Window(self.picks, near, self._push(rows, near))
        new, (_, farthest) = window.sums(number, self.window), window.known(number, self.window)
        tied, picked = np.flatnonzero(farthest >= near.reach), self.history[number]
        if len(tied):
            some = rows[tied]
            new[tied] = direct_repulsion(self.x[some], self.cluster_ids[some], picked, self.parameters)
            self.compared += len(tied) * len(picked.x)
        return new

    def _push(self, rows: np.ndarray, near: Kept, *, own_adds: bool = True) -> np.ndarray:
        own = self.cluster_ids[rows, None] == self.picks.cluster_ids[near.picks]
        push = self.parameters.push(near.sq_dists, own)
        return push if own_adds else np.where(own, 0.0, push)

    def _store(self, rows: np.ndarray, near: Kept, sums: np.ndarray) -> None:
        fresh = rows[self.slot[rows] < 0]
        if self.taken + len(fresh) > len(self.rows):
            room = min(len(self.x), max(self.taken + len(fresh), 2 * len(self.rows)))
            self.rows, self.sums, self.knows, *kept = (
                np.concatenate([old, np.empty((room - len(old), *old.shape[1:]), old.dtype)])
                for old in (self.rows, self.sums, self.knows, *self.kept)
            )
            self.kept = Kept(*kept)
        self.slot[fresh] = np.arange(self.taken, self.taken + len(fresh))
        self.taken += len(fresh)
        at = self.slot[rows]
        self.kept.put(at, near)
        self.rows[at], self.sums[at], self.knows[at] = rows, sums, self.picks.known[-1]


class Window:
    """What the nearest picks of a round add to rows that know some, near, which push float64 [r, w] each."""

    def __init__(self, picks: Appearances, near: Kept, push: np.ndarray) -> None:
        # One contiguous column a pick: columns are added one after the other.
        known = near.picks.T
        self.first, self.end = picks.first[known], np.where(known < 0, 0, picks.end[known])
        self.push, self.sq_dists = np.ascontiguousarray(push.T), np.ascontiguousarray(near.sq_dists.T)

    def sums(self, number: int, most: np.ndarray | int) -> np.ndarray:
        """Return what the nearest `most` picks of a round add, float64 [r]."""
        total = np.zeros(self.push.shape[1])
        for there, push in zip(self._there(number, most), self.push, strict=True):
            # Zeros change no bit of the sum.
            total += np.where(there, push, 0.0)
        return total

    def known(self, number: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many of the nearest `most` picks of a round are there, int8 [r], and the squared
        distance of the farthest, float64 [r]."""
        count = np.zeros(self.push.shape[1], np.int8)
        farthest = np.zeros(self.push.shape[1])
        for there, sq_dists in zip(self._there(number, most), self.sq_dists, strict=True):
            count += there
            np.copyto(farthest, sq_dists, where=there)
        return count, farthest

    def _there(self, number: int, most: np.ndarray | int) -> Iterator[np.ndarray]:
        """Tell whose picks repel in a round, one nearest pick after the other, bool [r]."""
        left = np.broadcast_to(np.asarray(most, np.int32), self.push.shape[1]).copy()
        for first, end in zip(self.first, self.end, strict=True):
            there = first <= number
            there &= number < end
            there &= left > 0
            left -= there
            yield there


class Kept(NamedTuple):
    """Nearest picks of some rows, ascending by distance: picks int32 and sq_dists float64 [r, w].

    All that are nearer than reach float64 [r] are there (0: of a glimpse); empty places hold -1 and infinity.
    """

    picks: np.ndarray
    sq_dists: np.ndarray
    reach: np.ndarray

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
