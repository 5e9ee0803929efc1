"""MaxHerding: picks that raise most what all images have of a pick near them, by a kernel on neighbors.

The value of some picks is the sum over all rows of their largest kernel to a pick; each pick is the row that
raises it most. The kernel is exp(-|x - y|² / (2 width²)) between a row and its kept neighbors, either way,
and 0 elsewhere, so that everything is linear in n.

Source: Bae, Noh and Sutherland, Generalized Coverage for More Robust Low-Budget Active Learning (ECCV 2024).

Deviations: the paper's kernel is dense, n x n. What a row would add is not evaluated lazily but kept: a pick
changes it only for rows two neighbors away, and by whole numbers, so that it never differs from a fresh sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from selective_ray.greedy import NEVER, Pick
from selective_ray.selection import find

# A kernel of 1, in fixed point.
ONE = 1 << 30


class Graph(NamedTuple):
    """Pairs of neighbors, of each row here to rows anywhere, sorted by row and target, each once.

    row int32 [e], the place of a row here; target int64 [e], an image id; sq_dists float32 [e]. A row is its
    own neighbor.
    """

    row: np.ndarray
    target: np.ndarray
    sq_dists: np.ndarray


def graph(image_ids: np.ndarray, lists: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Graph:
    """Pair the rows here with those that they have as neighbors, and those that have them.

    image_ids int64 [n] ascending; lists yields image_ids [s], neighbors [s, k] and squared distances [s, k]
    of all rows anywhere, block by block.
    """
    row, target = [np.arange(len(image_ids), dtype=np.int32)], [image_ids]
    near = [np.zeros(len(image_ids), np.float32)]
    for ids, others, sq_dists in lists:
        ids, others, sq_dists = np.repeat(ids, others.shape[1]), others.ravel(), sq_dists.ravel()
        there = np.flatnonzero((others >= 0) & (others != ids))
        ids, others, sq_dists = ids[there], others[there], sq_dists[there].astype(np.float32)
        for mine, theirs in ((ids, others), (others, ids)):
            place, rows = find(image_ids, mine)
            row.append(rows.astype(np.int32))
            target.append(theirs[place])
            near.append(sq_dists[place])
    row, target, near = (np.concatenate(parts) for parts in (row, target, near))
    order = np.lexsort((target, row))
    row, target, near = row[order], target[order], near[order]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (target[1:] != target[:-1])
    return Graph(row[new], target[new], near[new])


def gaussian(sq_dists: np.ndarray, width: float) -> np.ndarray:
    """Return the kernel in fixed point, int64 [e]."""
    return np.rint(ONE * np.exp(-sq_dists.astype(np.float64) / (2 * width**2))).astype(np.int64)


class Covering:
    """Rows with what each would add to the value of the picks: image_ids int64 [n] ascending.

    kernel maps squared distances float32 [e] to int64 [e]; the utility is what a row adds, in all and in
    fixed point.
    """

    def __init__(
        self, image_ids: np.ndarray, pairs: Graph, kernel: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.image_ids = image_ids
        self.row, self.target = pairs.row, pairs.target
        self.kernel = kernel(pairs.sq_dists)
        self.first_of_row = np.searchsorted(self.row, np.arange(len(image_ids) + 1))
        # The same pairs by target; what each target has of a pick so far.
        order = np.argsort(self.target, kind="stable")
        # There are twice as many as rows and neighbors.
        self.by_target = order.astype(np.int32) if len(order) < 2**31 else order
        self.targets, first = np.unique(self.target[self.by_target], return_index=True)
        self.first_of_target = np.append(first, len(self.target))
        self.most = np.zeros(len(self.targets), np.int64)
        self.gains = np.zeros(len(image_ids), np.int64)
        np.add.at(self.gains, self.row, self.kernel)

    def best(self) -> Pick:
        """Return the row that adds most."""
        if not len(self.image_ids):
            return Pick.none()
        row = int(self.gains.argmax())
        utility = int(self.gains[row]) if self.gains[row] >= 0 else NEVER
        return self.pick_of(row)._replace(utility=utility)

    def pick_of(self, row: int) -> Pick:
        """Return a row as a pick: with the image ids near it, and their kernel."""
        pairs = slice(*self.first_of_row[row : row + 2])
        return Pick(0.0, int(self.image_ids[row]), (self.target[pairs], self.kernel[pairs]))

    def take(self, pick: Pick) -> None:
        """Let the rows near a pick have it, and take what that was worth from those that would give it."""
        targets, kernel = pick.told
        place, at = find(self.targets, targets)
        more = kernel[place] > self.most[at]
        at, now = at[more], kernel[place[more]]
        counts = self.first_of_target[at + 1] - self.first_of_target[at]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = self.by_target[np.repeat(self.first_of_target[at], counts) + within]
        before, after = np.repeat(self.most[at], counts), np.repeat(now, counts)
        lost = np.maximum(self.kernel[pairs] - before, 0) - np.maximum(self.kernel[pairs] - after, 0)
        np.subtract.at(self.gains, self.row[pairs], lost)
        self.most[at] = now
        _, rows = find(self.image_ids, np.array([pick.image_id]))
        self.gains[rows] = np.iinfo(np.int64).min // 2
