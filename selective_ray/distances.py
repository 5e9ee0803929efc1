"""Squared distances: products propose, direct differences decide.

A matrix product differs in its last bits with block size, threads and device. So it only proposes: wherever
two results lie within `product_error`, the rows themselves are compared by `sq_dists_direct`, which depends
on nothing but the two rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Entries in one block of products: 16 MB of float32, which stays near the caches.
BLOCK_PRODUCTS = 1 << 22
# Coordinates of direct differences at a time: 256 KB of float64.
PAIR_ENTRIES = 1 << 15


def product_error(d: int, x_norm: float = 1.0, y_norm: float = 1.0) -> float:
    """Bound the error of |x|^2 + |y|^2 - 2xy in float32, whatever the order of its sums.

    A sum of d products is off by at most d * 2^-24 times the sum of their sizes (Higham, Accuracy and
    Stability, 3.1); 8 more roundings cover the norms and the last two additions.
    """
    return (d + 8) * 2.0**-24 * (x_norm + y_norm) ** 2


def sq_dists_direct(x: np.ndarray, rows: np.ndarray, y: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of the pairs x[rows], y[columns] by direct differences in float64: [p].

    The last word wherever two products are too close to call: it depends on the two rows only.
    """
    out = np.empty(len(rows))
    # Few enough pairs at a time that their differences stay in the second-level cache.
    step = max(1, PAIR_ENTRIES // x.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        # `take` gathers rows faster than indexing does.
        difference = x.take(rows[part], 0).astype(np.float64)
        difference -= y.take(columns[part], 0)
        out[part] = np.einsum("pd,pd->p", difference, difference)
    return out


def nearest_pairs(x: np.ndarray, row: np.ndarray, y: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return which of the pairs x[row], y[column] is the nearest of its row, ties to the smallest column.

    int64, one place for every row that has a pair, by ascending row. A pair without rivals is not measured.
    """
    sq_dists = np.zeros(len(row))
    rows, place, counts = np.unique(row, return_inverse=True, return_counts=True)
    close = np.flatnonzero(counts[place] > 1)
    sq_dists[close] = sq_dists_direct(x, row[close], y, column[close])
    order = np.lexsort((column, sq_dists, place))
    return order[np.searchsorted(place[order], np.arange(len(rows)))]


def blocks(n: int, width: int) -> Iterator[slice]:
    """Cut n rows so that a block times `width` columns has at most BLOCK_PRODUCTS entries."""
    rows = max(1, BLOCK_PRODUCTS // max(1, width))
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def flat_nonzero(mask: np.ndarray) -> np.ndarray:
    """Return the places of the true entries of a bool array [q, s], flat: eight are passed over at a time."""
    flat = mask.reshape(-1)
    whole = len(flat) // 8 * 8
    words = np.flatnonzero(flat[:whole].view(np.uint64))
    inside = (words[:, None] * 8 + np.arange(8)).reshape(-1)
    hits = inside[flat[inside]]
    return np.concatenate([hits, whole + np.flatnonzero(flat[whole:])])
