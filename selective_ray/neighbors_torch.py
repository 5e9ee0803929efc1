"""On a GPU: the kernel of `neighbors` and the proposals of `ivf`, in torch.

Only answers come back to the host: neighbors, and the centroids near each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from selective_ray.distances import product_error
from selective_ray.neighbors import TILE_ROWS_PER_NEIGHBOR
from selective_ray.schema import Neighbors

# Products computed at a time: 64 MB of float32, about what the second-level cache of a large GPU holds.
TILE_PRODUCTS = 1 << 24
TILE_ROWS = 1 << 14
# Coordinates of direct differences at a time: 256 MB of float64.
PAIR_ENTRIES = 1 << 25


class NearestOnDevice:
    """As `neighbors.Nearest`, with the same meaning of every argument, on a torch device.

    Products are taken in float32 (torch's "highest" precision), direct differences in float64, both there.
    These are summed in the device's order: distances differ from those of a CPU in their last bits.
    """

    def __init__(
        self, queries: np.ndarray, k: int, *, device: str = "cuda", error: float | None = None
    ) -> None:
        n, d = queries.shape
        self.k, self.device = k, torch.device(device)
        self.queries = self._sent(queries)
        self.sq_norms = self.queries.double().square().sum(1)
        self.error = product_error(d) if error is None else error
        self.sq_dists = torch.full((n, k), torch.inf, dtype=torch.float64, device=self.device)
        self.image_ids = torch.full((n, k), -1, dtype=torch.int64, device=self.device)
        self.products = 0

    @property
    def count(self) -> np.ndarray:
        """How many neighbors each query has so far, up to k: int64 [n]."""
        return torch.isfinite(self.sq_dists).sum(1).cpu().numpy()

    def offer(
        self,
        image_ids: np.ndarray,
        x: np.ndarray,
        pairs: Iterable[tuple[np.ndarray | slice, slice]] = ((slice(None), slice(None)),),
    ) -> None:
        """Offer the rows of a block, x [s, d] with their image_ids int64 [s], to the queries of each pair."""
        if not len(x):
            return
        base, ids = self._sent(x), torch.from_numpy(image_ids).to(self.device)
        sq_norms = base.double().square().sum(1)
        every = torch.arange(len(self.queries), device=self.device)
        step = max(TILE_ROWS, TILE_ROWS_PER_NEIGHBOR * self.k)
        for queries, rows in pairs:
            chosen = queries if isinstance(queries, slice) else torch.from_numpy(queries).to(self.device)
            # Nothing is nearer than a k-th distance of zero.
            some = every[chosen]
            some = some[self.sq_dists[some, -1] > 0]
            first, last, _ = rows.indices(len(x))
            for start in range(first, last, step) if len(some) else ():
                part = slice(start, min(start + step, last))
                for here in some.split(max(1, TILE_PRODUCTS // (part.stop - part.start))):
                    self._compare(here, base[part], sq_norms[part], ids[part])

    def found(self) -> Neighbors:
        """Return the k nearest of every query, ascending by (sq_dist, image_id)."""
        sq_dists, image_ids = self.sq_dists.cpu().numpy(), self.image_ids.cpu().numpy()
        order = np.lexsort((image_ids, sq_dists), axis=1)
        return Neighbors(
            np.take_along_axis(sq_dists, order, axis=1), np.take_along_axis(image_ids, order, axis=1)
        )

    def _sent(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device).float()

    def _compare(
        self, here: torch.Tensor, x: torch.Tensor, sq_norms: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """Compare some queries with a tile of rows: products exclude, direct differences settle."""
        products = self.queries[here] @ x.T
        self.products += products.numel()
        norms, limit = self.sq_norms[here], self.sq_dists[here, -1]
        if len(x) >= self.k:
            # What is farther than the k-th nearest of this tile is not among the k nearest of all.
            kth = _lower_bound_of_kth_largest(products, self.k).double()
            limit = torch.minimum(limit, norms + sq_norms.max() - 2 * kth + self.error)
        least = ((norms + sq_norms.min() - limit - self.error) / 2).float()
        near = products >= torch.nextafter(least, torch.full_like(least, -torch.inf))[:, None]
        query, row = near.nonzero(as_tuple=True)
        step = max(1, PAIR_ENTRIES // x.shape[1])
        sq_dists = torch.cat(
            [
                (self.queries[here[q]].double() - x[r].double()).square().sum(1)
                for q, r in zip(query.split(step), row.split(step), strict=True)
            ]
        )
        self._keep(here, query, sq_dists, ids[row])

    def _keep(
        self, here: torch.Tensor, query: torch.Tensor, sq_dists: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """Merge new neighbors of some queries; query int64 [p] ascending counts within `here`."""
        if not len(query):
            return
        order = torch.argsort(sq_dists, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        counts = torch.bincount(query, minlength=len(here))
        rank = torch.arange(len(query), device=self.device) - (torch.cumsum(counts, 0) - counts)[query]
        order, query, rank = order[rank < self.k], query[rank < self.k], rank[rank < self.k]
        width = self.k + int(rank.max()) + 1
        merged = self.sq_dists.new_full((len(here), width), torch.inf)
        merged_ids = self.image_ids.new_full((len(here), width), -1)
        merged[:, : self.k], merged_ids[:, : self.k] = self.sq_dists[here], self.image_ids[here]
        merged[query, self.k + rank], merged_ids[query, self.k + rank] = sq_dists[order], ids[order]
        nearest, place = torch.sort(merged, dim=1, stable=True)
        self.sq_dists[here] = nearest[:, : self.k]
        self.image_ids[here] = torch.gather(merged_ids, 1, place[:, : self.k])


def _lower_bound_of_kth_largest(products: torch.Tensor, k: int) -> torch.Tensor:
    """As that of `neighbors`: a value of every row that at least k of its entries reach."""
    fold = max(1, products.shape[1] // (4 * k))
    groups = products.shape[1] // fold
    maxima = products[:, : fold * groups].reshape(len(products), fold, groups).amax(1)
    return torch.topk(maxima, k, dim=1, sorted=False)[0].amin(1)


def propose(
    x: np.ndarray, centroids: np.ndarray, nth: int, slack: float, *, device: str = "cuda"
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """As `ivf.propose`, on a torch device."""
    columns = torch.from_numpy(centroids).to(device)
    half_norms = (columns.double().square().sum(1) / 2).float()
    step = max(1, TILE_PRODUCTS // len(centroids))
    for start in range(0, len(x), step):
        tile = slice(start, min(start + step, len(x)))
        scores = torch.from_numpy(np.ascontiguousarray(x[tile])).to(device) @ columns.T - half_norms
        limit = torch.topk(scores, nth, dim=1, sorted=False)[0].amin(1) - slack
        row, column = (scores >= limit[:, None]).nonzero(as_tuple=True)
        yield tile, row.cpu().numpy(), column.cpu().numpy(), scores[row, column].cpu().numpy()
