"""The nearest centroid of every row, kept from one iteration to the next so that few are compared again.

A row compares by its score with a centroid, x·c - |c|²/2: the nearest has the largest. Centroids are in a few
groups, and a row keeps a lower bound of its own centroid's score and an upper bound of the others' in each
group. When centroids move, the bounds loosen by how far; only where they cross are scores computed again
(Ding et al., Yinyang K-Means, ICML 2015). A few centroids move much farther than all others: these every row
meets again, so that they loosen nothing. The bounds allow for every rounding, and scores closer than their
error are settled by direct differences, so the labels are those of comparing every row with every centroid.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from selective_ray.distances import flat_nonzero, nearest_pairs, product_error
from selective_ray.neighbors import TILE_PRODUCTS, TILE_QUERIES

# Groups of centroids: with a float32 and so many int16 the bounds of a row take 16 bytes.
GROUPS = 6
# Fewer centroids than this in a group make matrix products slow.
GROUP_CENTROIDS = 64
# Passes over the centroids that put near ones in the same group.
GROUPING_ITERATIONS = 5
# Bounds of the others' scores are multiples of this, rounded up; an int16 of them reaches from -4 to 4.
UNIT = 2.0**-13
LOWEST, UNKNOWN = -(2**15), 2**15 - 1
# More than all roundings of bounds in float32, which are under 8.
SLACK = 2.0**-20
# Centroids that a tile of products has at most.
TILE_CENTROIDS = 1024
# A row that must meet this share of all centroids meets them all at once.
WIDE = 0.5
# What it costs to meet the fast centroids beside their products, in products; and the share of all
# centroids that rows meet for each unit that bounds loosen by, before it is known.
FAST_COST, LOOSE_SHARE = 32, 20.0
# One of so many rows tells whether to tighten bounds is of use.
SAMPLED = 16
# Coordinates of the rows that are looked at together: 8 MB, which stay in a large cache.
BLOCK_ENTRIES = 1 << 21


def assign(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of every row, ties to the smallest id: int32 [n]."""
    assignment = Assignment(x)
    assignment.assign(centroids)
    return assignment.labels


class Assignment:
    """The nearest centroid of each of some rows, for one set of centroids after another.

    x float32 [n, d], of length below 2. labels int32 [n] are -1 before the first `assign`; `products` counts
    the scores computed so far.
    """

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.labels = np.full(len(x), -1, np.int32)
        self.products = 0
        sq_norms = np.einsum("nd,nd->n", x, x, dtype=np.float32)
        self.norm = 1.0001 * math.sqrt(sq_norms.max(initial=0.0))
        self.centroids = np.empty((0, x.shape[1]), np.float32)
        self.error = 0.0

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest of new centroids, float32 [c, d], ties to the smallest id.

        Returns the rows int64 [r] whose label changed, ascending, and their labels before, int32 [r].
        """
        first = len(centroids) != len(self.centroids)
        if not first and np.array_equal(centroids, self.centroids):
            return np.empty(0, np.int64), np.empty(0, np.int32)
        if first:
            self._begin(centroids)
        moves = _Moves(self, centroids)
        computed = self.products
        changed = [np.empty(0, np.int64)]
        before = [np.empty(0, np.int32)]
        step = max(1, BLOCK_ENTRIES // self.x.shape[1])
        for start in range(0, len(self.x), step):
            rows, labels = _Block(self, moves, slice(start, start + step)).update()
            changed.append(rows + start)
            before.append(labels)
        self.centroids, self.carry = centroids, moves.carry
        share = (self.products - computed) / max(1, len(self.x)) - len(moves.fast.ids)
        moves.learn(self, share / len(centroids))
        return np.concatenate(changed), np.concatenate(before)

    def _begin(self, centroids: np.ndarray) -> None:
        self.centroids = centroids
        self.group = _groups(centroids)
        # Centroids of a group follow each other in this order.
        self.order = np.argsort(self.group, kind="stable")
        count = int(self.group.max()) + 1
        self.labels[:] = -1
        self.own = np.full(len(self.x), -np.inf, np.float32)
        self.others = np.full((count, len(self.x)), UNKNOWN, np.int16)
        # What all bounds of a group have loosened by and does not make a unit yet.
        self.carry = np.zeros((count, 1))
        self.loose_share = LOOSE_SHARE


class _Centroids:
    """Some of the centroids, those of a group beside each other, in tiles that scores are computed of.

    ids int64 [s], centroids float32 [s, d], half of their squared norms float32 [s]; of each group there is,
    its first and its end among them.
    """

    def __init__(self, ids: np.ndarray, moves: _Moves, group: np.ndarray, count: int) -> None:
        self.ids, self.centroids, self.half_norms = ids, moves.centroids[ids], moves.half_norms[ids]
        ends = np.searchsorted(group[ids], np.arange(count + 1))
        self.places = list(itertools.pairwise(ends.tolist()))
        self.groups = [g for g, (start, end) in enumerate(self.places) if end > start]
        # Groups are cut into pieces that fit a tile: where each begins, and which is the first of a group.
        firsts = [range(*self.places[g], TILE_CENTROIDS) for g in self.groups]
        self.pieces = np.concatenate([np.empty(0, np.int64), *firsts])
        self.first_piece = np.cumsum([0, *(len(part) for part in firsts[:-1])])
        # Pieces that fit a tile together: the first centroid, the end, and the pieces.
        self.tiles: list[tuple[int, int, slice]] = []
        bounds = [*self.pieces.tolist(), len(ids)]
        first = 0
        for piece in range(1, len(bounds)):
            if piece == len(bounds) - 1 or bounds[piece + 1] - bounds[first] > TILE_CENTROIDS:
                self.tiles.append((bounds[first], bounds[piece], slice(first, piece)))
                first = piece
        widest = max((stop - start for start, stop, _ in self.tiles), default=1)
        self.rows = max(TILE_QUERIES, TILE_PRODUCTS // widest)
        self.tile = np.empty(self.rows * widest, np.float32)

    def scores(self, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return the scores of a few rows with the centroids of a tile: the array is used again."""
        scores = self.tile[: len(x) * (stop - start)].reshape(len(x), stop - start)
        np.matmul(x, self.centroids[start:stop].T, out=scores)
        scores -= self.half_norms[start:stop]
        return scores

    def best_of_groups(self, x: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best score of a few rows in each group there is, but for their own, and that one.

        own int64 [r]: places of their own centroids, -1 where it is not one of these. Both float32, [groups,
        r] and [r], with -inf where there is none.
        """
        best = np.empty((len(self.pieces), len(x)), np.float32)
        own_score = np.full(len(x), -np.inf, np.float32)
        for start, stop, pieces in self.tiles:
            # A line for each centroid: lines are compared faster than what is beside each other.
            scores = self.tile[: len(x) * (stop - start)].reshape(stop - start, len(x))
            np.matmul(self.centroids[start:stop], x.T, out=scores)
            scores -= self.half_norms[start:stop, None]
            here = np.flatnonzero((own >= start) & (own < stop))
            own_score[here] = scores[own[here] - start, here]
            scores[own[here] - start, here] = -np.inf
            begins = [*(self.pieces[pieces] - start).tolist(), stop - start]
            for out, (begin, end) in zip(best[pieces], itertools.pairwise(begins), strict=True):
                scores[begin:end].max(axis=0, out=out)
        return np.maximum.reduceat(best, self.first_piece, axis=0), own_score

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return place and score of the best centroid of a few rows, and the best other of each group."""
        every = np.arange(len(x))
        best, place = np.full(len(x), -np.inf, np.float32), np.zeros(len(x), np.int64)
        others = np.empty((len(x), len(self.pieces)), np.float32)
        for start, stop, pieces in self.tiles:
            scores = self.scores(x, start, stop)
            at = scores.argmax(axis=1)
            top = scores[every, at]
            scores[every, at] = -np.inf
            np.maximum.reduceat(scores, self.pieces[pieces] - start, axis=1, out=others[:, pieces])
            # The lesser of the best so far and the best here is one of the others of its piece.
            at += start
            ahead = top > best
            piece = np.searchsorted(self.pieces, np.where(ahead, place, at), side="right") - 1
            others[every, piece] = np.maximum(others[every, piece], np.where(ahead, best, top))
            best, place = np.where(ahead, top, best), np.where(ahead, at, place)
        return place, best, np.maximum.reduceat(others, self.first_piece, axis=1).T


class _Moves:
    """How far new centroids are from those before, and what that does to bounds."""

    def __init__(self, assignment: Assignment, centroids: np.ndarray) -> None:
        before = assignment.centroids
        self.centroids = centroids
        moved = np.zeros(len(centroids), bool)
        norms = np.empty(len(centroids))
        down, up = np.zeros(len(centroids)), np.zeros(len(centroids))
        for start in range(0, len(centroids), 4096):
            part = slice(start, start + 4096)
            now, then = centroids[part].astype(np.float64), before[part].astype(np.float64)
            norms[part] = np.einsum("cd,cd->c", now, now)
            moved[part] = (now != then).any(axis=1)
            # A score changes by x·move less half of what |c|² grows by.
            reach = assignment.norm * np.sqrt(np.einsum("cd,cd->c", now - then, now - then))
            grown = (norms[part] - np.einsum("cd,cd->c", then, then)) / 2
            down[part], up[part] = -reach - grown - SLACK / 2, reach - grown
        up[~moved] = down[~moved] = 0.0
        self.down = down.astype(np.float32)
        self.half_norms = (norms / 2).astype(np.float32)
        largest = max(1.0, math.sqrt(norms.max()))
        # Of one score, which is half of a squared distance but for |x|².
        error = product_error(assignment.x.shape[1], max(1.0, assignment.norm), largest) / 2 + SLACK
        assignment.error = max(assignment.error, error)
        order, group, count = assignment.order, assignment.group, len(assignment.carry)
        self.every = _Centroids(order, self, group, count)
        fast = self._fast(np.maximum(up, -down), assignment.loose_share)
        up[fast] = 0.0
        self.fast = _Centroids(order[fast[order]], self, group, count)
        self.place = np.full(len(centroids), -1)
        self.place[self.fast.ids] = np.arange(len(self.fast.ids))
        firsts = [first for first, _ in self.every.places]
        loosened = assignment.carry + np.maximum.reduceat(up[order], firsts)[:, None]
        self.shift = np.floor(loosened / UNIT).astype(np.int32)
        self.carry = loosened - self.shift * UNIT

    def _fast(self, far: np.ndarray, loose_share: float) -> np.ndarray:
        """Choose the centroids that every row meets, bool [c]: as many as make the fewest products in all."""
        by_far = np.sort(far)[::-1]
        counts = np.unique(np.geomspace(1, len(far), 40).astype(np.int64))
        counts = np.concatenate([[0], counts[counts < len(far)]])
        self.loosened = by_far[counts]
        bounds = len(far) * np.minimum(1.0, loose_share * self.loosened)
        best = (counts + np.where(counts > 0, FAST_COST, 0) + bounds).argmin()
        self.loosened = self.loosened[best]
        return far > self.loosened if best else np.zeros(len(far), bool)

    def learn(self, assignment: Assignment, share: float) -> None:
        """Note which share of all centroids rows have met because bounds have loosened."""
        if self.loosened > 0 and share < 0.9:
            assignment.loose_share = max(share / self.loosened, 1e-3)


class _Block:
    """Some rows while their labels and bounds are brought up to date."""

    def __init__(self, assignment: Assignment, moves: _Moves, rows: slice) -> None:
        self.of, self.moves = assignment, moves
        self.x, self.labels = assignment.x[rows], assignment.labels[rows]
        self.own, self.others = assignment.own[rows], assignment.others[:, rows]
        self.margin = np.float32(2 * assignment.error)
        self.hits: list[tuple[np.ndarray, ...]] = []

    def update(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows whose label changed, and their labels before."""
        loosened = self.others.astype(np.int32) + self.moves.shift
        self.others[:] = np.clip(loosened, LOWEST, UNKNOWN)
        self.own += self.moves.down[self.labels]
        if len(self.moves.fast.ids):
            self._meet_fast()
        some = np.flatnonzero(self._crossed(slice(None)).any(axis=0))
        self._tighten(some)
        crossed = self._crossed(some)
        wide = self._together(crossed)
        changed = [self._compare_all(some[wide])]
        some, crossed = some[~wide], crossed[:, ~wide]
        if len(some):
            changed.append(self._compare_groups(some, crossed))
        rows, labels = (np.concatenate(part) for part in zip(*changed, strict=True))
        order = np.argsort(rows)
        return rows[order], labels[order]

    def _meet_fast(self) -> None:
        """Compute the scores of all rows with the fast centroids, which loosen no bounds."""
        fast = self.moves.fast
        own = np.where(self.labels >= 0, self.moves.place[self.labels], -1)
        for first in range(0, len(self.x), fast.rows):
            part = slice(first, first + fast.rows)
            best, score = fast.best_of_groups(self.x[part], own[part])
            bounds = self._bound(best, self.moves.carry[fast.groups])
            self.others[fast.groups, part] = np.maximum(self.others[fast.groups, part], bounds)
            self.own[part] = np.where(own[part] >= 0, score, self.own[part])
        self.of.products += len(self.x) * len(fast.ids)

    def _tighten(self, some: np.ndarray) -> None:
        """Compute the scores of rows with their own centroids, unless they meet all others even so."""
        known = self.labels[some] >= 0
        wide = known & self._together(self._crossed(some))
        sample = some[wide][::SAMPLED]
        self._set_own(sample)
        if np.sum(self._together(self._crossed(sample))) < 0.9 * len(sample):
            wide[:] = False
        self._set_own(some[known & ~wide])

    def _compare_groups(self, some: np.ndarray, crossed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compare rows with groups that crossed; returns those that changed, and their labels before."""
        self.best = self.own.copy()
        # The best score but one in the group of the best, and whose is the best.
        self.second = np.empty(len(self.x))
        self.second_to = np.full(len(self.x), -1, np.int64)
        for g in range(len(self.others)):
            self._compare(g, some[crossed[g]])
        return self._settle()

    def _crossed(self, rows: np.ndarray | slice) -> np.ndarray:
        """Whether a centroid of each group may beat a row's own, bool [groups, r]."""
        most = np.float32(UNIT) * self.others[:, rows] + self.moves.carry.astype(np.float32)
        return most >= self.own[rows] - np.float32(self.of.error)

    def _together(self, crossed: np.ndarray) -> np.ndarray:
        """Whether a row meets all centroids at once, as it must meet many of them: bool [r]."""
        sizes = np.array([end - start for start, end in self.moves.every.places], np.float32)
        return sizes @ crossed >= WIDE * sizes.sum()

    def _set_own(self, rows: np.ndarray) -> None:
        labels = self.labels[rows]
        products = np.einsum("nd,nd->n", self._rows(rows), self.moves.centroids.take(labels, 0))
        self.of.products += len(rows)
        self.own[rows] = products - self.moves.half_norms[labels]

    def _bound(self, scores: np.ndarray, carry: np.ndarray | float) -> np.ndarray:
        """Return upper bounds of computed scores as they are kept."""
        # In float64, so that bounds which are taken over again and again lose nothing.
        units = np.ceil((scores.astype(np.float64) + (self.of.error - carry)) / UNIT)
        return np.clip(units, LOWEST, UNKNOWN).astype(np.int16)

    def _rows(self, part: np.ndarray) -> np.ndarray:
        """Return rows by their ascending places, copied where they are not all that are beside each other."""
        if len(part) and part[-1] - part[0] == len(part) - 1:
            return self.x[part[0] : part[-1] + 1]
        return self.x.take(part, 0)

    def _compare_all(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compare rows with all centroids; returns those whose label changed, and their labels before."""
        every, before = self.moves.every, self.labels[rows]
        place, score = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        bounds = np.empty((len(self.others), len(rows)), np.float32)
        for first in range(0, len(rows), every.rows):
            part = slice(first, first + every.rows)
            place[part], score[part], bounds[:, part] = every.nearest(self._rows(rows[part]))
        self.of.products += len(rows) * len(every.ids)
        close = np.flatnonzero(bounds.max(axis=0) >= score - self.margin)
        chosen, at = self._direct(rows[close])
        other = np.flatnonzero(chosen != place[close])
        beaten, chosen = close[other], chosen[other]
        group = self.of.group[every.ids[place[beaten]]]
        bounds[group, beaten] = np.maximum(bounds[group, beaten], score[beaten])
        place[beaten], score[beaten] = chosen, at[other]
        self.own[rows], self.others[:, rows] = score, self._bound(bounds, self.moves.carry)
        self.labels[rows] = every.ids[place]
        changed = np.flatnonzero(self.labels[rows] != before)
        return rows[changed], before[changed]

    def _direct(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return place and score of the nearest centroid of rows, by direct differences where it is close."""
        every = self.moves.every
        place, score = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        step = max(1, TILE_PRODUCTS // len(every.ids))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            scores = self.x.take(part, 0) @ every.centroids.T - every.half_norms
            self.of.products += scores.size
            near = flat_nonzero(scores >= (scores.max(axis=1) - self.margin)[:, None])
            row, at = np.divmod(near, scores.shape[1])
            at = at[nearest_pairs(self.x, part[row], self.moves.centroids, every.ids[at])]
            place[first : first + step] = at
            score[first : first + step] = scores[np.arange(len(part)), at]
        return place, score

    def _compare(self, g: int, rows: np.ndarray) -> None:
        """Compare rows with the centroids of a group."""
        every, carry = self.moves.every, self.moves.carry[g]
        start, end = every.places[g]
        ids = every.ids[start:end]
        step = max(TILE_QUERIES, TILE_PRODUCTS // len(ids))
        buffer = np.empty((min(step, len(rows)), len(ids)), np.float32)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            scores = np.matmul(self._rows(part), every.centroids[start:end].T, out=buffer[: len(part)])
            scores -= every.half_norms[start:end]
            self.of.products += scores.size
            inside = np.flatnonzero((self.labels[part] >= 0) & (self.of.group[self.labels[part]] == g))
            scores[inside, np.searchsorted(ids, self.labels[part[inside]])] = -np.inf
            top = scores.max(axis=1)
            self._note(part, ids, scores, top)
            self.others[g, part] = self._bound(top, carry)

    def _note(self, part: np.ndarray, ids: np.ndarray, scores: np.ndarray, top: np.ndarray) -> None:
        """Keep the pairs that may be the best of their rows."""
        here = np.flatnonzero(top >= self.best[part] - self.margin)
        if not len(here):
            return
        rows, top = part[here], top[here]
        better = top > self.best[rows]
        self.best[rows] = np.maximum(self.best[rows], top)
        scores = scores[here] if len(here) < len(scores) else scores
        hits = flat_nonzero(scores >= (self.best[rows] - self.margin)[:, None])
        row, column = np.divmod(hits, len(ids))
        self.hits.append((rows[row], ids[column], scores.reshape(-1)[hits]))
        # Should the best of these become a row's own, the next of its group bounds the others there.
        lead = np.flatnonzero(better)
        scores = scores[lead] if len(lead) < len(scores) else scores
        at = scores.argmax(axis=1)
        scores[np.arange(len(lead)), at] = -np.inf
        self.second[rows[lead]], self.second_to[rows[lead]] = scores.max(axis=1), ids[at]

    def _settle(self) -> tuple[np.ndarray, np.ndarray]:
        """Choose the nearest among the pairs that were kept, by direct differences where they are close."""
        if not self.hits:
            return np.empty(0, np.int64), self.labels[:0]
        row, column, score = (np.concatenate(part) for part in zip(*self.hits, strict=True))
        near = score >= self.best[row] - self.margin
        row, column, score = row[near], column[near], score[near]
        rows = np.unique(row)
        rivals = rows[(self.labels[rows] >= 0) & (self.own[rows] >= self.best[rows] - self.margin)]
        row = np.concatenate([row, rivals])
        column = np.concatenate([column, self.labels[rivals]])
        score = np.concatenate([score, self.own[rivals]])
        chosen = nearest_pairs(self.x, row, self.moves.centroids, column)
        row, column, score = row[chosen], column[chosen], score[chosen]
        changed = np.flatnonzero(column != self.labels[row])
        row, column, score = row[changed], column[changed], score[changed]
        before = self.labels[row]
        group = self.of.group[column]
        carry = self.moves.carry[:, 0]
        led = np.flatnonzero(self.second_to[row] == column)
        self.others[group[led], row[led]] = self._bound(self.second[row[led]], carry[group[led]])
        left = np.flatnonzero(before >= 0)
        there = self.of.group[before[left]]
        self.others[there, row[left]] = np.maximum(
            self.others[there, row[left]], self._bound(self.own[row[left]], carry[there])
        )
        self.own[row], self.labels[row] = score, column
        return row, before


def _groups(centroids: np.ndarray) -> np.ndarray:
    """Put centroids that are near each other in a group, int64 [c]; what is far is seldom compared with."""
    count = min(GROUPS, max(1, len(centroids) // GROUP_CENTROIDS))
    middles = centroids[np.linspace(0, len(centroids) - 1, count).astype(np.int64)]
    for _ in range(GROUPING_ITERATIONS):
        nearest = (np.einsum("gd,gd->g", middles, middles) / 2 - centroids @ middles.T).argmin(axis=1)
        present, groups = np.unique(nearest, return_inverse=True)
        middles = np.stack([centroids[nearest == g].mean(axis=0) for g in present])
    return groups
