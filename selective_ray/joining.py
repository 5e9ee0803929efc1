"""Joining a set with itself by inverted lists: groups of neighboring lists, and the rows that each probes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from selective_ray.distances import blocks
from selective_ray.ivf import Assignment
from selective_ray.neighbors import TOGETHER_BYTES, Nearest
from selective_ray.schema import Neighbors


@dataclass(frozen=True)
class Cells:
    """Lists, of which large ones are split into parts of about equal size; groups are runs of such cells.

    first_cell int64 [lists + 1]: list l is cells first_cell[l] … first_cell[l + 1] - 1; first_of_group int64
    [groups + 1], in cells.
    """

    first_cell: np.ndarray
    first_of_group: np.ndarray

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.first_of_group) - 1

    def of(self, lists: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return the cells of rows, int64 [n]: of a split list, by a key of the row, its id or hash."""
        first = self.first_cell[lists]
        parts = self.first_cell[lists + 1] - first
        return first + (keys % parts.astype(keys.dtype)).astype(np.int64)

    def probed(self, assignment: Assignment) -> tuple[np.ndarray, np.ndarray]:
        """Return what rows probe in cells: counts int64 [n] and cells int64."""
        parts = np.diff(self.first_cell)[assignment.probes]
        row = np.repeat(np.arange(len(assignment.counts)), assignment.counts)
        counts = np.bincount(row, weights=parts, minlength=len(assignment.counts)).astype(np.int64)
        within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        return counts, np.repeat(self.first_cell[assignment.probes], parts) + within

    def group_of(self, cells: np.ndarray) -> np.ndarray:
        """Return the group of each cell."""
        return np.searchsorted(self.first_of_group, cells, side="right") - 1


def cells(sizes: np.ndarray, group_rows: int) -> Cells:
    """Split lists of more than group_rows, and gather neighboring cells into groups of about so many rows."""
    parts = np.maximum(1, -(-sizes // group_rows))
    first_cell = np.concatenate([[0], np.cumsum(parts)])
    each = np.repeat(-(-sizes // parts), parts)
    firsts, rows = [0], 0
    for cell, size in enumerate(each.tolist()):
        if rows and rows + size > group_rows:
            firsts.append(cell)
            rows = 0
        rows += size
    return Cells(first_cell, np.array([*firsts, len(each)]))


@dataclass(frozen=True)
class Block:
    """The rows of a group, ordered by cell and image id.

    image_ids int64 [n], x [n, d] in the type of the store, cells int64 [n] ascending; counts int64 [n] and
    probes int32: the cells that each row probes. Without probes every row is compared with every other.
    wanted bool [n]: the rows whose neighbors are asked for. Where duplicates are collapsed: weights int64 [n]
    is the number of images that each row stands for, and stands_for int64 [n], of rows of several holders,
    the first row of the block that is equal to each; only such rows are neighbors.
    """

    image_ids: np.ndarray
    x: np.ndarray
    cells: np.ndarray
    wanted: np.ndarray
    counts: np.ndarray | None = None
    probes: np.ndarray | None = None
    weights: np.ndarray | None = None
    stands_for: np.ndarray | None = None

    def distinct(self) -> Block:
        """Return the rows that stand for themselves: those that count as neighbors."""
        if self.stands_for is None:
            return self
        rows = np.flatnonzero(self.stands_for == np.arange(len(self.cells)))
        return Block(self.image_ids[rows], self.x[rows], self.cells[rows], self.wanted[rows])

    @property
    def first_ids(self) -> np.ndarray:
        """Image ids of the rows that the rows stand for, int64 [n]."""
        return self.image_ids if self.stands_for is None else self.image_ids[self.stands_for]

    @property
    def images(self) -> int:
        """Number of images whose neighbors are asked for."""
        return int(self.wanted.sum() if self.weights is None else self.weights[self.wanted].sum())

    def cut(self) -> Iterator[tuple[int, slice]]:
        """Yield each cell that has rows, and where they are."""
        present, first = np.unique(self.cells, return_index=True)
        for cell, start, end in zip(present.tolist(), first, [*first[1:], len(self.cells)], strict=True):
            yield cell, slice(int(start), int(end))

    def probing(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probes of some rows as pairs: places in rows, and cells."""
        first = np.cumsum(self.counts) - self.counts
        counts = self.counts[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return place, self.probes[np.repeat(first[rows], counts) + within]


def gather(parts: Iterable[Block], collapse: bool) -> Block:
    """Put the rows of a group together that come from different holders; the same whatever these hold."""
    parts = list(parts)
    image_ids, x, cells, wanted = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("image_ids", "x", "cells", "wanted")
    )
    order = np.lexsort((image_ids, cells))
    counts = probes = None
    if parts[0].counts is not None:
        counts = np.concatenate([part.counts for part in parts])
        probes = np.concatenate([part.probes for part in parts])
        whole = Block(image_ids, x, cells, wanted, counts, probes)
        counts, probes = counts[order], whole.probing(order)[1]
    image_ids, x, cells, wanted = image_ids[order], x[order], cells[order], wanted[order]
    if not collapse:
        return Block(image_ids, x, cells, wanted, counts, probes)
    weights = np.concatenate([part.weights for part in parts])[order]
    firsts, place = distinct(x)
    return Block(image_ids, x, cells, wanted, counts, probes, weights, firsts[place])


def hashes(x: np.ndarray) -> np.ndarray:
    """Return a number of every row that equal rows share: uint64 [n]."""
    factors = np.random.default_rng(0).integers(1, 2**63, x.shape[1], np.uint64) * 2 + 1
    mixed = np.empty(len(x), np.uint64)
    for some in blocks(len(x), x.shape[1]):
        words = (np.ascontiguousarray(x[some], np.float32) + np.float32(0)).view(np.uint32)
        mixed[some] = (words * factors).sum(axis=1, dtype=np.uint64)
    return mixed ^ (mixed >> np.uint64(29))


def distinct(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of every set of equal rows int64 [r] ascending, and for each row its place among them,
    int64 [n]."""
    keys = hashes(x)
    order = np.argsort(keys, kind="stable")
    new = np.ones(len(x), bool)
    # Only rows of one hash need to be looked at.
    twin = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    for some in blocks(len(twin), x.shape[1]):
        at = twin[some]
        new[at + 1] = (x[order[at + 1]] != x[order[at]]).any(axis=1)
    first_of_set = order[new]
    sorted_firsts = np.argsort(first_of_set)
    rank = np.empty(len(first_of_set), np.int64)
    rank[sorted_firsts] = np.arange(len(rank))
    place = np.empty(len(x), np.int64)
    place[order] = rank[np.cumsum(new) - 1]
    return first_of_set[sorted_firsts], place


def merge_distinct(
    one: tuple[Neighbors, np.ndarray], other: tuple[Neighbors, np.ndarray]
) -> tuple[Neighbors, np.ndarray]:
    """Merge nearest rows that were found at two holders, of which some may be equal: the smallest id stays.

    With the hashes of the rows, uint64 [n, k].
    """
    k = one[1].shape[1]
    sq_dists = np.concatenate([one[0].sq_dists, other[0].sq_dists], axis=1)
    image_ids = np.concatenate([one[0].image_ids, other[0].image_ids], axis=1)
    keys = np.concatenate([one[1], other[1]], axis=1)

    def sort(*by: np.ndarray) -> None:
        order = np.lexsort(by, axis=1)
        for values in (sq_dists, image_ids, keys):
            values[:] = np.take_along_axis(values, order, axis=1)

    sort(image_ids, keys, sq_dists)
    again = (sq_dists[:, 1:] == sq_dists[:, :-1]) & (keys[:, 1:] == keys[:, :-1])
    sq_dists[:, 1:][again] = np.inf
    image_ids[:, 1:][again] = -1
    sort(image_ids, sq_dists)
    return Neighbors(sq_dists[:, :k], image_ids[:, :k]), keys[:, :k]


def join(
    block: Block,
    fetch: Callable[[list[int]], Iterator[Block]],
    cells: Cells,
    group: int,
    k: int,
    kernel: Callable[[np.ndarray, int], Nearest] = Nearest,
) -> tuple[Neighbors, int]:
    """Find the k nearest rows of the wanted rows of a group in the cells they probe; also counts products.

    fetch yields the blocks of other groups, in the order asked for. The rows of its own cell come first: with
    their distances most rows of other cells are excluded by a product. A row that finds fewer than k in the
    cells it probes is compared with all.
    """
    rows = np.flatnonzero(block.wanted)
    if block.stands_for is not None:
        rows = np.unique(block.stands_for[rows])
    queries = block.x[rows].astype(np.float32, copy=False)
    nearest = kernel(queries, k)
    own = block.cells[rows]
    everywhere = np.arange(cells.groups)
    if block.counts is None:
        _compare_with_all(nearest, block, fetch, everywhere, group)
    else:
        place, probe = block.probing(rows)
        others = probe != own[place]
        place, probe = place[others], probe[others]
        order = np.argsort(probe, kind="stable")
        place, probe = place[order], probe[order]
        here = block.distinct()
        mine = ((slice(*np.searchsorted(own, [cell, cell + 1])), part) for cell, part in here.cut())
        nearest.offer(here.image_ids, here.x, mine)
        for theirs in _own_first(block, fetch, np.unique(cells.group_of(probe)), group):
            there = theirs.distinct()
            cut = ((slice(*np.searchsorted(probe, [cell, cell + 1])), part) for cell, part in there.cut())
            nearest.offer(there.image_ids, there.x, ((place[pairs], part) for pairs, part in cut))
    found, products = nearest.found(), nearest.products
    short = np.flatnonzero(nearest.count < k)
    if len(short) and block.counts is not None:
        again = kernel(queries[short], k)
        _compare_with_all(again, block, fetch, everywhere, group)
        found.sq_dists[short], found.image_ids[short] = (again.found().sq_dists, again.found().image_ids)
        products += again.products
    if block.stands_for is not None:
        place = np.searchsorted(rows, block.stands_for[block.wanted])
        found = Neighbors(found.sq_dists[place], found.image_ids[place])
    return found, products


def _compare_with_all(
    nearest: Nearest,
    block: Block,
    fetch: Callable[[list[int]], Iterator[Block]],
    groups: np.ndarray,
    group: int,
) -> None:
    """Offer the rows of groups together, so many that each query settles few of them in vain."""
    enough = TOGETHER_BYTES // (4 * block.x.shape[1])
    parts: list[Block] = []
    for theirs in itertools.chain(_own_first(block, fetch, groups, group), [None]):
        if theirs is not None:
            parts.append(theirs.distinct())
        if parts and (theirs is None or sum(len(part.x) for part in parts) >= enough):
            nearest.offer(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("image_ids", "x")))
            parts = []


def _own_first(
    block: Block, fetch: Callable[[list[int]], Iterator[Block]], groups: np.ndarray, group: int
) -> Iterator[Block]:
    """Yield the blocks of some groups: the own, then neighboring ones, likelier to hold near rows."""
    if group in groups:
        yield block
    yield from fetch(sorted((g for g in groups.tolist() if g != group), key=lambda g: (abs(g - group), g)))
