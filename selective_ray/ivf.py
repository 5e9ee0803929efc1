"""An inverted file for joining a set with itself: lists of near rows, and which lists each row probes.

Rows belong to the list of their nearest centroid. A row probes every list whose centroid is at most `reach`
farther (in squared distance) than its nearest: rows inside a list probe one, rows between lists several. The
reach is read off a sample whose neighbors are known exactly, so that the recall asked for is reached. Which
list a row is in and which it probes are settled by direct differences: they depend on the embeddings alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import faiss
import numpy as np

from selective_ray.distances import flat_nonzero, product_error, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.neighbors import (
    TILE_PRODUCTS,
    TILE_QUERIES,
    TILE_ROWS,
    TILE_ROWS_PER_NEIGHBOR,
    Nearest,
)
from selective_ray.schema import Neighbors

# Lists for each square root of n: the work of finding lists and of joining them are then of a size.
LISTS_PER_ROOT = 2
# Rows that the centroids are trained on, for each list.
TRAINING_ROWS = 32
TRAINING_ITERATIONS = 10
# Rows whose exact neighbors tell how far to reach, and as many others that certify what came of it.
SAMPLE = 600
# Of the misses that are allowed, so many are planned for; the others are the sample's own error.
PLANNED_MISSES = 0.6
# Groups, the unit of work and of recovery: so many, and so many for each worker. Each is compared with most
# of the others, so they are as large as memory allows; lists that are larger are split.
GROUPS = 32
GROUPS_PER_WORKER = 4
LEAST_GROUP_ROWS = 256
GROUP_BYTES = 2**33
# Rows that a row is compared with by lists, on data whose neighborhoods overlap: so many times n^0.27, and so
# many for each neighbor. Measured (benchmarks/README.md); only plans are made by it.
COMPARED, COMPARED_PER_NEIGHBOR = 400, 50
# Lists that a row is taken to probe where memory is stated beforehand.
PROBES_STATED = 32
# A squared distance between unit vectors is at most this: with it every list is probed.
WHOLE_SPHERE = 4.0


@dataclass(frozen=True)
class Plan:
    """How the neighbors of n rows are searched.

    needed is the number of nearest rows, themselves among them; lists is 0 in exact mode. Only the size of
    groups looks at who does the work, and it does not change what is found.
    """

    n: int
    d: int
    needed: int
    lists: int
    workers: int = 1

    @property
    def group_rows(self) -> int:
        """Rows of a group at most."""
        each = -(-self.n // max(GROUPS, GROUPS_PER_WORKER * self.workers))
        return min(max(each, LEAST_GROUP_ROWS), max(GROUP_BYTES // (4 * self.d), LEAST_GROUP_ROWS))

    @property
    def exact(self) -> bool:
        """Whether every row is compared with every other."""
        return self.lists == 0

    @property
    def training_rows(self) -> int:
        """Rows that the centroids are trained on."""
        return min(self.n, TRAINING_ROWS * self.lists)

    def holder_bytes(self, rows: int, workers: int) -> int:
        """Bytes that one of so many processes takes which holds so many rows and joins groups of others.

        Its rows and their lists; a group with its k nearest so far and what it probes, and one of the groups
        it is joined with; the training rows; and a quarter of a GB for the libraries.
        """
        held = rows * (4 * self.d + 8 + 4 * PROBES_STATED)
        group = replace(self, workers=workers).group_rows * (
            2 * 4 * self.d + 16 * 2 * self.needed + (0 if self.exact else 32 * PROBES_STATED)
        )
        return held + 2 * group + self.training_rows * 2 * 4 * self.d + 2**28

    @property
    def groups(self) -> int:
        """How many groups there are about."""
        return -(-self.n // self.group_rows)

    @property
    def compared(self) -> float:
        """Rows that each row is compared with, about."""
        if self.exact:
            return float(self.n)
        return min(self.n, max(COMPARED * self.n**0.27, COMPARED_PER_NEIGHBOR * self.needed))

    @property
    def products(self) -> float:
        """Products of d numbers in all, about: with centroids, with samples, with rows of lists."""
        return self.n * (self.compared + (0 if self.exact else self.lists + 2 * self.sample))

    def moved_bytes(self, itemsize: int) -> int:
        """Bytes of all groups, as they lie in Ray's object store: the rows, and what they probe."""
        return self.n * (itemsize * self.d + 24 + (0 if self.exact else 4 * PROBES_STATED))

    def fetched_bytes(self, itemsize: int) -> int:
        """Bytes that cross the network at most: to the owners of groups, and from group to group.

        Each group is compared with rows of almost every other, and fetches it; a machine whose object store
        holds them all fetches each once.
        """
        return self.moved_bytes(itemsize) * (1 + self.groups)

    @property
    def sample(self) -> int:
        """Rows whose exact neighbors are found to choose the reach, and again to certify."""
        return min(self.n // 2, SAMPLE)


def plan(
    n: int, d: int, needed: int, *, mode: str = "auto", lists: int | None = None, recall: float = 0.99
) -> Plan:
    """Choose exact search or lists, and how many.

    Brute force computes n products a row, with lists `Plan.products` tells; what does not depend on n
    (training, starting) is worth about 60,000 products a row. A recall of 1 is exact. Raises UserError where
    lists are asked for and there are fewer rows than lists.
    """
    chosen = lists or 2 ** round(math.log2(max(2.0, LISTS_PER_ROOT * math.sqrt(n))))
    cheaper = n * n <= 1.5 * Plan(n, d, needed, chosen).products + 60_000 * n
    if mode == "exact" or recall >= 1 or (mode == "auto" and cheaper and not lists):
        chosen = 0
    elif chosen > n:
        raise UserError(
            f"density.lists = {chosen} exceeds the {n} embeddings; set it to {n} or fewer, or leave it out"
        )
    return Plan(n, d, needed, chosen)


def draw(plan: Plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw row positions for training, int64 ascending, and for both samples, int64 [2 s]."""
    rng = np.random.default_rng(seed)
    training = np.sort(rng.choice(plan.n, plan.training_rows, replace=False))
    return training, rng.choice(plan.n, 2 * plan.sample, replace=False)


def train(sample: np.ndarray, lists: int, seed: int) -> np.ndarray:
    """Train the centroids of a coarse quantizer: float32 [lists, d], neighbors near each other in order.

    K-Means by FAISS in two levels, for the cost of a square root of the lists; then one iteration over all
    of them. One thread, so that the number of cores does not change the last bits.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        coarse = _kmeans(sample, max(1, round(math.sqrt(lists))), seed)
        coarse = coarse[_chain(coarse)]
        cell = faiss.knn(sample, coarse, 1)[1][:, 0]
        share = _shares(np.bincount(cell, minlength=len(coarse)), lists)
        parts = [_kmeans(sample[cell == c], int(share[c]), seed) for c in range(len(coarse)) if share[c]]
        centroids = np.concatenate(parts)
        nearest = faiss.knn(sample, centroids, 1)[1][:, 0]
    finally:
        faiss.omp_set_num_threads(threads)
    order = np.argsort(nearest, kind="stable")
    present, first = np.unique(nearest[order], return_index=True)
    sums = np.add.reduceat(sample[order], first, axis=0, dtype=np.float64)
    centroids[present] = sums / np.bincount(nearest, minlength=lists)[present][:, None]
    return centroids


def _kmeans(x: np.ndarray, c: int, seed: int) -> np.ndarray:
    if c >= len(x):
        return np.resize(x, (c, x.shape[1])).astype(np.float32)
    kmeans = faiss.Kmeans(
        x.shape[1],
        c,
        niter=TRAINING_ITERATIONS,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    kmeans.train(x)
    return kmeans.centroids


def _chain(x: np.ndarray) -> np.ndarray:
    """Order rows so that each follows the nearest that is left, from the first row on."""
    left = np.ones(len(x), bool)
    order = [0]
    left[0] = False
    for _ in range(len(x) - 1):
        rest = np.flatnonzero(left)
        difference = x[rest] - x[order[-1]]
        nearest = rest[np.einsum("nd,nd->n", difference, difference).argmin()]
        order.append(int(nearest))
        left[nearest] = False
    return np.array(order)


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """Share out a total in proportion to sizes, one to each that has any: by largest remainders, int64."""
    there = (sizes > 0).astype(np.int64)
    exact = (total - there.sum()) * sizes / sizes.sum()
    share = there + np.floor(exact).astype(np.int64)
    most = np.argsort(np.floor(exact) - exact, kind="stable")[: total - share.sum()]
    share[most] += 1
    return share


@dataclass(frozen=True)
class Assignment:
    """The list of every row, int32 [n], and what it probes: counts int32 [n], probes int32 [sum of counts].

    A row's own list is among its probes; they come in no particular order.
    """

    lists: np.ndarray
    counts: np.ndarray
    probes: np.ndarray


def propose(
    x: np.ndarray, centroids: np.ndarray, nth: int, slack: float
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for a tile of rows after the other, the centroids that come near them, by float32 products.

    A score is half of |x|^2 - |x - c|^2, so that its error is half of that of two distances. Named are all
    within `slack` of the nth best score of their row: the tile, row int64 [p] ascending within it, centroid
    int64 [p] and score float32 [p].
    """
    half_norms = (np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64) / 2).astype(np.float32)
    columns = np.ascontiguousarray(centroids.T)
    step = max(TILE_QUERIES, 4 * TILE_PRODUCTS // len(centroids))
    buffer = np.empty((step, len(centroids)), np.float32)
    for start in range(0, len(x), step):
        tile = slice(start, min(start + step, len(x)))
        scores = np.matmul(x[tile], columns, out=buffer[: tile.stop - start])
        scores -= half_norms
        last = len(centroids) - nth
        best = scores.max(axis=1) if nth == 1 else np.partition(scores, last, axis=1)[:, last]
        hits = flat_nonzero(scores >= (best - np.float32(slack))[:, None])
        yield tile, *np.divmod(hits, len(centroids)), scores.reshape(-1)[hits]


def assign(
    x: np.ndarray,
    centroids: np.ndarray,
    *,
    reach: float = 0.0,
    probes: int | None = None,
    propose: Callable[..., Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]] = propose,
) -> Assignment:
    """Find the list of every row and the lists it probes: those within `reach`, or its `probes` nearest.

    Products propose; wherever they leave a doubt direct differences decide, ties to the smallest list.
    """
    norms = np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64)
    margin = product_error(x.shape[1], 1.0, math.sqrt(norms.max()))
    if probes is None:
        found = [
            _within_reach(x[tile], centroids, *near, reach, margin)
            for tile, *near in propose(x, centroids, 1, reach / 2 + margin)
        ]
    else:
        probes = min(probes, len(centroids))
        found = [
            _nearest_lists(x[tile], centroids, row, column, probes)
            for tile, row, column, _ in propose(x, centroids, probes, margin)
        ]
    if not found:
        nothing = np.empty(0, np.int32)
        return Assignment(nothing, nothing, nothing)
    return Assignment(*(np.concatenate(parts).astype(np.int32) for parts in zip(*found, strict=True)))


def excess(x: np.ndarray, centroids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How much farther the centroids of some lists are than the nearest, in squared distance: [n, t].

    x float32 [n, d]; targets int [n, t] names lists of each row.
    """
    own = assign(x, centroids).lists
    rows = np.repeat(np.arange(len(x)), targets.shape[1])
    theirs = sq_dists_direct(x, rows, centroids, targets.ravel()).reshape(targets.shape)
    return theirs - sq_dists_direct(x, np.arange(len(x)), centroids, own)[:, None]


def ranks(x: np.ndarray, centroids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many centroids are nearer than those of some lists: int64 [n, t]; targets as in `excess`."""
    every = np.arange(len(centroids))
    found = np.empty(targets.shape, np.int64)
    for i, lists in enumerate(targets):
        sq_dists = sq_dists_direct(x[i : i + 1], np.zeros_like(every), centroids, every)
        found[i] = np.searchsorted(np.sort(sq_dists), sq_dists[lists])
    return found


def _within_reach(
    x: np.ndarray,
    centroids: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    scores: np.ndarray,
    reach: float,
    margin: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest list of every row, how many lie within reach of it, and these."""
    first = np.searchsorted(row, np.arange(len(x)))
    behind = 2 * (np.maximum.reduceat(scores, first)[row] - scores)
    # The nearest list: among those that products cannot tell apart, by direct differences.
    close = np.flatnonzero(behind <= 2 * margin)
    exact = sq_dists_direct(x, row[close], centroids, column[close])
    order = np.lexsort((column[close], exact, row[close]))
    _, first = np.unique(row[close][order], return_index=True)
    nearest = close[order[first]]
    own, own_sq_dists = column[nearest], exact[order[first]]
    kept = behind <= reach - 2 * margin
    kept[nearest] = True
    unsure = np.flatnonzero(~kept)
    exact = sq_dists_direct(x, row[unsure], centroids, column[unsure])
    kept[unsure] = exact - own_sq_dists[row[unsure]] <= reach
    return own, np.bincount(row[kept], minlength=len(x)), column[kept]


def _nearest_lists(
    x: np.ndarray, centroids: np.ndarray, row: np.ndarray, column: np.ndarray, probes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest list of every row, the number of probes, and so many nearest lists."""
    order = np.lexsort((column, sq_dists_direct(x, row, centroids, column), row))
    row, column = row[order], column[order]
    first = np.searchsorted(row, np.arange(len(x)))
    kept = np.arange(len(row)) - first[row] < probes
    return column[first], np.full(len(x), probes), column[kept]


def reach_for(excesses: np.ndarray, recall: float) -> float:
    """Return the reach within which the lists of a sample's neighbors lie, as often as is planned for.

    excesses [p]: `excess` of the list of each neighbor. Of the 1 - recall that may be missed only
    PLANNED_MISSES is used up.
    """
    share = 1 - PLANNED_MISSES * (1 - recall)
    return min(WHOLE_SPHERE, float(np.quantile(excesses, share, method="higher")))


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
    wanted bool [n]: the rows whose neighbors are asked for. stands_for int64 [n], where duplicates are
    collapsed: the first row of the block that is equal to each; only such rows are neighbors.
    """

    image_ids: np.ndarray
    x: np.ndarray
    cells: np.ndarray
    wanted: np.ndarray
    counts: np.ndarray | None = None
    probes: np.ndarray | None = None
    stands_for: np.ndarray | None = None

    def distinct(self) -> Block:
        """Return the rows that stand for themselves: those that count as neighbors."""
        if self.stands_for is None:
            return self
        rows = np.flatnonzero(self.stands_for == np.arange(len(self.cells)))
        return Block(self.image_ids[rows], self.x[rows], self.cells[rows], self.wanted[rows])

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
    stands_for = _firsts_of_equal(x, cells) if collapse else None
    return Block(image_ids, x, cells, wanted, counts, probes, stands_for)


def hashes(x: np.ndarray) -> np.ndarray:
    """Return a number of every row that equal rows share: uint64 [n]."""
    words = (np.ascontiguousarray(x, np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, x.shape[1], np.uint64) * 2 + 1
    mixed = (words * factors).sum(axis=1, dtype=np.uint64)
    return mixed ^ (mixed >> np.uint64(29))


def _firsts_of_equal(x: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return, for every row, the first that is equal to it: int64 [n]."""
    order = np.lexsort((hashes(x), cells))
    new = np.ones(len(x), bool)
    new[1:] = (x[order[1:]] != x[order[:-1]]).any(axis=1)
    firsts = np.flatnonzero(new)
    stands_for = np.empty(len(x), np.int64)
    stands_for[order] = order[firsts][np.cumsum(new) - 1]
    return stands_for


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
    enough = max(TILE_ROWS, TILE_ROWS_PER_NEIGHBOR * nearest.k)
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


@dataclass(frozen=True)
class Certificate:
    """What approximation cost, by the exact neighbors of a seeded sample; shares with a 95 % interval."""

    rows: int
    recall: float
    recall_low: float
    recall_high: float
    mean_relative_error: float
    largest_relative_error: float
    rank_correlation: float


def certify(found: np.ndarray, exact: np.ndarray) -> Certificate:
    """Compare the distances found with the exact ones of the same rows: both float64 [s, k] ascending.

    A neighbor counts as found where its distance is one of the k smallest, so that ties of equal distance
    are not misses. The interval is that of the mean over rows, whose misses come together.
    """
    # The first is the row itself.
    hits = (found[:, 1:] <= exact[:, -1:]).mean(axis=1)
    recall = float(hits.mean())
    half = 1.96 * float(hits.std()) / math.sqrt(len(hits))
    # Where every row is whole the spread says nothing: the rule of three.
    half = half or 3 / len(hits)
    there, true = found.mean(axis=1), exact.mean(axis=1)
    error = np.divide(there - true, true, out=np.zeros_like(true), where=true > 0)
    return Certificate(
        rows=len(hits),
        recall=recall,
        recall_low=max(0.0, recall - half),
        recall_high=min(1.0, recall + half),
        mean_relative_error=float(error.mean()),
        largest_relative_error=float(error.max()),
        rank_correlation=_rank_correlation(there, true),
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties by their mean rank; 1 where either has one value only."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[inverse])
    if min(np.ptp(rank) for rank in ranks) == 0:
        return 1.0
    return float(np.corrcoef(*ranks)[0, 1])
