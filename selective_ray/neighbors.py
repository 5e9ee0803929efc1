"""The k nearest rows of many queries: products propose, direct differences settle.

One kernel serves every search of this project: the rows of an inverted list that are joined with the rows
that probe it, blocks of a brute-force search, and the samples that certify both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from selective_ray.distances import blocks, flat_nonzero, product_error, sq_dists_direct
from selective_ray.schema import Neighbors

# Products computed at a time: 4 MB of float32, which stay near a core.
TILE_PRODUCTS = 1 << 20
# Rows and queries of a tile at least: fewer make matrix products slow. A tile of many rows for its k settles
# few pairs in vain.
TILE_QUERIES = 256
TILE_ROWS = 4096
TILE_ROWS_PER_NEIGHBOR = 64
# Bytes of rows that are compared with all queries at a time, at least: what is near among few rows is settled
# in vain where nearer ones follow. At k = 400 of 50,000 rows a third of the time.
TOGETHER_BYTES = 1 << 27
# Pairs whose direct differences are computed at a time: bounds what near-duplicates by the thousand take.
MOST_PAIRS = 1 << 20
# Where queries have so many times k pairs on average, and so many more than k, it pays to tell the k nearest
# by their products first.
WORTH_SORTING = 1.2
SPARE_PAIRS = 8


class Nearest:
    """The k nearest rows seen so far of each of some queries.

    queries float32 [n, d]. Rows are offered in blocks, each row once to a query. A product within its error
    bound of a query's k-th distance so far is settled by direct differences in float64, so the distances
    kept are exact: those of the k nearest of all rows that were offered. Among rows at the same distance as
    the k-th, which ids are kept is not promised. `error` overrides the bound (for tests). What is farther
    than `within` float64 [n] is not looked for.
    """

    def __init__(
        self,
        queries: np.ndarray,
        k: int,
        *,
        error: float | None = None,
        within: np.ndarray | None = None,
    ) -> None:
        n, d = queries.shape
        self.queries, self.k = queries, k
        self.sq_norms = np.einsum("nd,nd->n", queries, queries)
        self.error = product_error(d) if error is None else error
        # Room for as many again before the k nearest must be told from the rest.
        self.width = k + max(16, min(k, 64))
        self.sq_dists = np.full((n, self.width), np.inf)
        self.image_ids = np.full((n, self.width), -1, np.int64)
        self.count = np.zeros(n, np.int64)
        self.kth = np.full(n, np.inf) if within is None else within.copy()
        self.products = 0

    def offer(
        self,
        image_ids: np.ndarray,
        x: np.ndarray,
        pairs: Iterable[tuple[np.ndarray | slice, slice]] = ((slice(None), slice(None)),),
    ) -> None:
        """Offer the rows of a block, x [s, d] with their image_ids int64 [s].

        pairs says which queries are compared with which run of rows; all with all where it is left out.
        """
        if not len(x):
            return
        pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        waiting = 0
        every = np.arange(len(self.queries))
        sq_norms = np.einsum("sd,sd->s", x, x, dtype=np.float32)
        norms = float(sq_norms.min()), float(sq_norms.max())
        buffer = np.empty(0, np.float32)
        # So few queries at a time that all their rows are seen before the nearest are settled.
        together = max(TILE_QUERIES, MOST_PAIRS // (4 * self.k))
        for queries, rows in pairs:
            # Nothing is nearer than a k-th distance of zero.
            all_queries = every[queries]
            all_queries = all_queries[self.kth[all_queries] > 0]
            first, last, _ = rows.indices(len(x))
            step = max(TILE_ROWS, TILE_ROWS_PER_NEIGHBOR * self.k)
            for some in (all_queries[at : at + together] for at in range(0, len(all_queries), together)):
                for start in range(first, last, step):
                    part = x[start : min(start + step, last)].astype(np.float32, copy=False)
                    tile = max(TILE_QUERIES, TILE_PRODUCTS // len(part))
                    if len(buffer) < tile * len(part):
                        buffer = np.empty(tile * len(part), np.float32)
                    for query, row, product in self._near(some, part, tile, buffer, *norms):
                        pending.append((query, row + start, product))
                        waiting += len(query)
                        if waiting > 4 * MOST_PAIRS:
                            self._settle(pending, image_ids, x, norms[1] - norms[0])
                            pending, waiting = [], 0
                if waiting > MOST_PAIRS:
                    self._settle(pending, image_ids, x, norms[1] - norms[0])
                    pending, waiting = [], 0
        self._settle(pending, image_ids, x, norms[1] - norms[0])

    def _near(
        self,
        some: np.ndarray,
        x: np.ndarray,
        tile: int,
        buffer: np.ndarray,
        smallest: float,
        largest: float,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the pairs of queries and rows that a product cannot exclude, `tile` queries at a time.

        With the product, float32 [p]; smallest and largest bound the squared norms of the rows.
        """
        for start in range(0, len(some), tile):
            here = some[start : start + tile]
            out = buffer[: len(here) * len(x)].reshape(len(here), len(x))
            products = np.matmul(self.queries.take(here, 0), x.T, out=out)
            self.products += products.size
            limit, norms = self.kth[here], self.sq_norms[here]
            if len(x) >= self.k and np.isinf(limit).any():
                # What is farther than the k-th nearest of this tile is not among the k nearest of all.
                kth_product = _lower_bound_of_kth_largest(products, self.k)
                limit = np.minimum(limit, norms + largest - 2.0 * kth_product + self.error)
            # |q|^2 + |x|^2 - 2 q·x <= limit + error, with the smallest |x|^2 for all rows.
            least = ((norms + smallest - limit - self.error) / 2).astype(np.float32)
            near = products >= np.nextafter(least, np.float32(-np.inf))[:, None]
            hits = flat_nonzero(near)
            if len(hits):
                query, row = np.divmod(hits, len(x))
                yield here[query], row, products.reshape(-1)[hits]

    def _settle(
        self,
        pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
        image_ids: np.ndarray,
        x: np.ndarray,
        spread: float,
    ) -> None:
        """Measure the pairs that products could not exclude, and keep the nearest.

        spread is that of the squared norms of the rows.
        """
        if not pending:
            return
        query, row, products = (np.concatenate(part) for part in zip(*pending, strict=True))
        query, row = self._without_far(query, row, products, spread)
        for start in range(0, len(query), MOST_PAIRS):
            some, rows = query[start : start + MOST_PAIRS], row[start : start + MOST_PAIRS]
            sq_dists = sq_dists_direct(self.queries, some, x, rows)
            good = np.flatnonzero(sq_dists <= self.kth[some])
            good = good[np.argsort(some[good], kind="stable")]
            self._keep(some[good], sq_dists[good], image_ids[rows[good]])

    def _without_far(
        self, query: np.ndarray, row: np.ndarray, products: np.ndarray, spread: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leave out pairs that are farther than k others of their query, where there are many such."""
        counts = np.bincount(query, minlength=len(self.queries))
        many = np.flatnonzero(counts > self.k + SPARE_PAIRS)
        if len(query) < WORTH_SORTING * self.k * len(many) or not len(many):
            return query, row
        order = np.argsort(query, kind="stable")
        least = np.full(len(self.queries), -np.inf, np.float32)
        first = np.cumsum(counts) - counts
        for part in blocks(len(many), int(counts.max())):
            some = many[part]
            taken = counts[some]
            within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
            at = order[np.repeat(first[some], taken) + within]
            table = np.full((len(some), int(taken.max())), -np.inf, np.float32)
            table[np.repeat(np.arange(len(some)), taken), within] = products[at]
            kth = np.partition(table, table.shape[1] - self.k, axis=1)[:, -self.k]
            least[some] = kth - np.float32(self.error + spread / 2)
        kept = products >= np.nextafter(least, np.float32(-np.inf))[query]
        return query[kept], row[kept]

    def _keep(self, query: np.ndarray, sq_dists: np.ndarray, image_ids: np.ndarray) -> None:
        """Keep new neighbors; query int64 [p] ascending."""
        while len(query):
            new = np.flatnonzero(np.diff(query, prepend=-1))
            touched = query[new]
            counts = np.diff(new, append=len(query))
            self._compress(touched[self.count[touched] + counts > self.width])
            room = np.minimum(self.width - self.count[touched], counts)
            place = np.arange(len(query)) - np.repeat(new, counts)
            now = place < np.repeat(room, counts)
            at = query[now] * self.width + (place + np.repeat(self.count[touched], counts))[now]
            self.sq_dists.reshape(-1)[at] = sq_dists[now]
            self.image_ids.reshape(-1)[at] = image_ids[now]
            self.count[touched] += room
            full = touched[self.count[touched] >= self.k]
            self.kth[full] = np.partition(self.sq_dists[full], self.k - 1, axis=1)[:, self.k - 1]
            query, sq_dists, image_ids = query[~now], sq_dists[~now], image_ids[~now]
            nearer = sq_dists <= self.kth[query]
            query, sq_dists, image_ids = query[nearer], sq_dists[nearer], image_ids[nearer]

    def _compress(self, rows: np.ndarray) -> None:
        """Drop all but the k nearest of some queries."""
        if not len(rows):
            return
        sq_dists, image_ids = self.sq_dists[rows], self.image_ids[rows]
        order = np.argpartition(sq_dists, self.k - 1, axis=1)[:, : self.k]
        order += np.arange(len(rows))[:, None] * self.width
        self.sq_dists[rows, : self.k] = sq_dists.reshape(-1)[order]
        self.image_ids[rows, : self.k] = image_ids.reshape(-1)[order]
        self.sq_dists[rows, self.k :] = np.inf
        self.image_ids[rows, self.k :] = -1
        self.count[rows] = np.minimum(self.count[rows], self.k)

    def found(self) -> Neighbors:
        """Return the k nearest of every query, ascending by (sq_dist, image_id)."""
        self._compress(np.flatnonzero(self.count > self.k))
        sq_dists, image_ids = self.sq_dists[:, : self.k], self.image_ids[:, : self.k]
        order = np.argsort(sq_dists, axis=1)
        nearest = np.take_along_axis(sq_dists, order, axis=1)
        tied = np.flatnonzero((nearest[:, 1:] == nearest[:, :-1]).any(axis=1))
        order[tied] = np.lexsort((image_ids[tied], sq_dists[tied]), axis=1)
        return Neighbors(nearest, np.take_along_axis(image_ids, order, axis=1))


def _lower_bound_of_kth_largest(products: np.ndarray, k: int) -> np.ndarray:
    """Return a value of every row of [q, s] that at least k of its entries reach, close to the k-th largest.

    The k-th largest of the maxima of groups of entries: much faster than that of the entries themselves.
    """
    fold = max(1, products.shape[1] // (4 * k))
    groups = products.shape[1] // fold
    maxima = products[:, : fold * groups].reshape(len(products), fold, groups).max(axis=1)
    return np.partition(maxima, groups - k, axis=1)[:, groups - k]


def neighbors(
    queries: np.ndarray, base: Iterable[tuple[np.ndarray, np.ndarray]], k: int, *, error: float | None = None
) -> Neighbors:
    """Find the k nearest rows of all base blocks for every query row, the row itself among them.

    queries float32 [n, d]; base yields (image_ids int64 [b], x float32 [b, d]), each image once. Where there
    are fewer than k rows in all, places stay at infinity and -1.
    """
    nearest = Nearest(queries, k, error=error)
    for image_ids, x in base:
        nearest.offer(image_ids, x)
    return nearest.found()
