"""The nearest centroid of every row, kept from one iteration to the next so that few are compared again.

A row compares by its score with a centroid, x·c - |c|²/2: the nearest has the largest. Centroids are in a few
groups, and a row keeps a lower bound of its own centroid's score and an upper bound of the others' in each
group. When centroids move, the bounds loosen by how far; only where they cross are scores computed again
(Ding et al., Yinyang K-Means, ICML 2015). The bounds allow for every rounding, and scores closer than their
error are settled by direct differences, so the labels are those of comparing every row with every centroid.
"""

from __future__ import annotations

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
# Coordinates of the rows that are looked at together: 4 MB, which stay in a cache for all groups.
BLOCK_ENTRIES = 1 << 20


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

        Returns the rows int64 [r] whose label changed, and their labels before, int32 [r].
        """
        first = len(centroids) != len(self.centroids)
        if not first and np.array_equal(centroids, self.centroids):
            return np.empty(0, np.int64), np.empty(0, np.int32)
        if first:
            self._begin(centroids)
        moves = _Moves(self, centroids)
        changed = [np.empty(0, np.int64)]
        before = [np.empty(0, np.int32)]
        step = max(1, BLOCK_ENTRIES // self.x.shape[1])
        for start in range(0, len(self.x), step):
            rows, labels = _Block(self, moves, slice(start, start + step)).update()
            changed.append(rows + start)
            before.append(labels)
        self.centroids, self.carry = centroids, moves.carry
        return np.concatenate(changed), np.concatenate(before)

    def _begin(self, centroids: np.ndarray) -> None:
        self.centroids = centroids
        groups = _groups(centroids)
        self.order = np.argsort(groups, kind="stable")
        # Of a centroid: its place in that order, and its group. Of a group: its places.
        self.place = np.empty(len(centroids), np.int64)
        self.place[self.order] = np.arange(len(centroids))
        self.group = groups
        ends = np.cumsum(np.bincount(groups)).tolist()
        self.places = list(zip([0, *ends[:-1]], ends, strict=True))
        self.labels[:] = -1
        self.own = np.full(len(self.x), -np.inf, np.float32)
        self.others = np.full((len(self.x), len(self.places)), UNKNOWN, np.int16)
        # What all bounds of a group have loosened by and does not make a unit yet.
        self.carry = np.zeros(len(self.places))


class _Moves:
    """How far new centroids are from those before, and what that does to bounds."""

    def __init__(self, assignment: Assignment, centroids: np.ndarray) -> None:
        before = assignment.centroids
        self.centroids = centroids
        self.moved = np.zeros(len(centroids), bool)
        norms = np.empty(len(centroids))
        down, up = np.zeros(len(centroids)), np.zeros(len(centroids))
        for start in range(0, len(centroids), 4096):
            part = slice(start, start + 4096)
            now, then = centroids[part].astype(np.float64), before[part].astype(np.float64)
            norms[part] = np.einsum("cd,cd->c", now, now)
            self.moved[part] = (now != then).any(axis=1)
            # A score changes by x·move less half of what |c|² grows by.
            reach = assignment.norm * np.sqrt(np.einsum("cd,cd->c", now - then, now - then))
            grown = (norms[part] - np.einsum("cd,cd->c", then, then)) / 2
            down[part], up[part] = -reach - grown - SLACK / 2, reach - grown
        self.down = np.where(self.moved, down, 0.0).astype(np.float32)
        up[~self.moved] = 0.0
        self.half_norms = (norms / 2).astype(np.float32)
        largest = max(1.0, math.sqrt(norms.max()))
        # Of one score, which is half of a squared distance but for |x|².
        error = product_error(assignment.x.shape[1], max(1.0, assignment.norm), largest) / 2 + SLACK
        assignment.error = max(assignment.error, error)
        order, self.groups = assignment.order, []
        loosened = assignment.carry.copy()
        for g, (start, end) in enumerate(assignment.places):
            ids = order[start:end]
            loosened[g] += up[ids].max()
            some = ids[self.moved[ids]]
            self.groups.append(
                (
                    (ids, centroids[ids], self.half_norms[ids]),
                    (some, centroids[some], self.half_norms[some]),
                )
            )
        self.shift = np.floor(loosened / UNIT).astype(np.int32)
        self.carry = loosened - self.shift * UNIT


class _Block:
    """Some rows while their labels and bounds are brought up to date."""

    def __init__(self, assignment: Assignment, moves: _Moves, rows: slice) -> None:
        self.of, self.moves = assignment, moves
        self.x, self.labels = assignment.x[rows], assignment.labels[rows]
        self.own, self.others = assignment.own[rows], assignment.others[rows]
        self.margin = np.float32(2 * assignment.error)
        self.hits: list[tuple[np.ndarray, ...]] = []

    def update(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows whose label changed, and their labels before."""
        before = self.others.copy()
        loosened = self.others.astype(np.int32) + self.moves.shift
        self.others[:] = np.clip(loosened, LOWEST, UNKNOWN)
        self.own += self.moves.down[self.labels]
        some = np.flatnonzero(self._crossed(slice(None)).any(axis=1))
        if not len(some):
            return some, self.labels[:0]
        known = some[self.labels[some] >= 0]
        self.own[known] = self._scores_of(known, self.labels[known])
        crossed = self._crossed(some)
        stays = (self.labels[some] >= 0) & ~self.moves.moved[self.labels[some]]
        self.best = self.own.copy()
        # The best score but one in the group of the best, and whose is the best.
        self.second = np.empty(len(self.x))
        self.second_to = np.full(len(self.x), -1, np.int64)
        for g, (every, moved) in enumerate(self.moves.groups):
            # A row whose centroid stays where it is beats those that stay, too.
            base = UNIT * before[:, g] + self.of.carry[g] - self.of.error
            self._compare(g, some[crossed[:, g] & ~stays], *every, None)
            self._compare(g, some[crossed[:, g] & stays], *moved, base)
        return self._settle()

    def _crossed(self, rows: np.ndarray | slice) -> np.ndarray:
        """Whether a centroid of each group may beat a row's own, bool [r, groups]."""
        most = np.float32(UNIT) * self.others[rows] + self.moves.carry.astype(np.float32)
        return most >= (self.own[rows] - np.float32(self.of.error))[:, None]

    def _scores_of(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        products = np.einsum("nd,nd->n", self.x.take(rows, 0), self.moves.centroids.take(labels, 0))
        self.of.products += len(rows)
        return products - self.moves.half_norms[labels]

    def _bound(self, scores: np.ndarray, g: np.ndarray | int) -> np.ndarray:
        """Return upper bounds of computed scores as they are kept."""
        # In float64, so that bounds which are taken over again and again lose nothing.
        units = np.ceil((scores.astype(np.float64) + self.of.error - self.moves.carry[g]) / UNIT)
        return np.clip(units, LOWEST, UNKNOWN).astype(np.int16)

    def _compare(
        self,
        g: int,
        rows: np.ndarray,
        ids: np.ndarray,
        centroids: np.ndarray,
        half_norms: np.ndarray,
        base: np.ndarray | None,
    ) -> None:
        """Compare rows with centroids of a group; base float64 [n] bounds scores of its others."""
        if not len(ids):
            self.others[rows, g] = self._bound(base[rows], g)
            return
        start, end = self.of.places[g]
        step = max(TILE_QUERIES, TILE_PRODUCTS // len(ids))
        buffer = np.empty((min(step, len(rows)), len(ids)), np.float32)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            x = self.x[part[0] : part[-1] + 1]
            x = x if len(part) == len(x) else self.x.take(part, 0)
            scores = np.matmul(x, centroids.T, out=buffer[: len(part)])
            scores -= half_norms
            self.of.products += scores.size
            if base is None:
                own = self.of.place[self.labels[part]]
                inside = np.flatnonzero((own >= start) & (own < end) & (self.labels[part] >= 0))
                scores[inside, own[inside] - start] = -np.inf
            top = scores.max(axis=1)
            self._note(part, ids, scores, top, base)
            most = top if base is None else np.maximum(top, base[part])
            self.others[part, g] = self._bound(most, g)

    def _note(
        self, part: np.ndarray, ids: np.ndarray, scores: np.ndarray, top: np.ndarray, base: np.ndarray | None
    ) -> None:
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
        second = scores.max(axis=1)
        if base is not None:
            second = np.maximum(second, base[rows[lead]])
        self.second[rows[lead]], self.second_to[rows[lead]] = second, ids[at]

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
        led = np.flatnonzero(self.second_to[row] == column)
        self.others[row[led], group[led]] = self._bound(self.second[row[led]], group[led])
        left = np.flatnonzero(before >= 0)
        there = self.of.group[before[left]]
        self.others[row[left], there] = np.maximum(
            self.others[row[left], there], self._bound(self.own[row[left]], there)
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
