"""The nearest centroid of every row by products on a device: a GPU, or the CPU by torch.

The device proposes: whatever its tensor cores round away, every centroid that may be the nearest is measured
by direct differences in float64, there first, and on the CPU where even those are too close to call. So the
labels are those of `assignment`, whatever the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from selective_ray.distances import nearest_pairs, product_error

# Scores of a tile: 32 MB of float32, which the second-level cache of a large GPU holds.
TILE_SCORES = 1 << 23
# Tensor cores take float32 as TF32, of 10 bits: both numbers of a product may be off by 2^-10, if cut off.
TF32_ERROR = 2.01 * 2.0**-10
# Direct differences in float64 differ by less between devices, whose sums run in another order.
DIRECT_ERROR = 1e-13


class AssignmentOnDevice:
    """The nearest centroid of each of some rows, as `Assignment` finds it; their copy is on the device.

    x float32 [n, d]. Without bounds: a row whose centroid moved is compared with all, one whose centroid
    stayed with those that moved, for the others have lost against it before.
    """

    def __init__(self, x: np.ndarray, device: str) -> None:
        self.x = x
        self.labels = np.full(len(x), -1, np.int32)
        self.products = 0
        self.device = torch.device(device)
        # Arrays out of Ray's store are read-only, which torch warns of.
        self.on_device = torch.from_numpy(x if x.flags.writeable else x.copy()).to(self.device)
        sq_norms = np.einsum("nd,nd->n", x, x, dtype=np.float32)
        self.norm = 1.0001 * math.sqrt(sq_norms.max(initial=0.0))
        self.centroids = np.empty((0, x.shape[1]), np.float32)

    def assign(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest; returns the rows int64 whose label changed, and their labels before, int32."""
        before = self.labels
        every = np.arange(len(centroids))
        if len(centroids) != len(self.centroids):
            moved, stays = every, np.zeros(len(self.x), bool)
            before = np.full(len(self.x), -1, np.int32)
        else:
            moved = np.flatnonzero((centroids != self.centroids).any(axis=1))
            stays = ~np.isin(self.labels, moved)
        self.labels = before.copy()
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            products = _Products(self, centroids)
            for rows, ids, own in ((~stays, every, False), (stays, moved, True)):
                if len(ids):
                    products.compare(np.flatnonzero(rows), ids, own)
        finally:
            torch.set_float32_matmul_precision(precision)
        self.centroids = centroids
        changed = np.flatnonzero(self.labels != before)
        return changed, before[changed]


class _Products:
    """One set of centroids on the device."""

    def __init__(self, of: AssignmentOnDevice, centroids: np.ndarray) -> None:
        self.of, self.host = of, centroids
        self.centroids = torch.from_numpy(centroids.copy()).to(of.device)
        norms = np.einsum("cd,cd->c", centroids, centroids, dtype=np.float64)
        self.half_norms = torch.from_numpy((norms / 2).astype(np.float32)).to(of.device)
        x_norm, norm = max(1.0, of.norm), max(1.0, math.sqrt(norms.max()))
        # Of two scores, each half of a squared distance.
        self.margin = product_error(centroids.shape[1], x_norm, norm) + 2 * TF32_ERROR * x_norm * norm

    def compare(self, rows: np.ndarray, ids: np.ndarray, own: bool) -> None:
        """Find the nearest of some centroids for some rows; with own, of their own one, too."""
        place = torch.from_numpy(ids).to(self.of.device)
        some, half_norms = self.centroids[place], self.half_norms[place]
        step = max(1, TILE_SCORES // len(ids))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            here = torch.from_numpy(part).to(self.of.device)
            x = self.of.on_device[here]
            scores = torch.addmm(half_norms, x, some.T, beta=-1)
            self.of.products += scores.numel()
            best = scores.amax(dim=1)
            if own:
                labels = torch.from_numpy(self.of.labels[part].astype(np.int64)).to(self.of.device)
                mine = (x * self.centroids[labels]).sum(dim=1) - self.half_norms[labels]
                best = torch.maximum(best, mine)
            row, column = (scores >= (best - self.margin)[:, None]).nonzero(as_tuple=True)
            column = place[column]
            if own:
                rivals = (mine >= best - self.margin).nonzero()[:, 0]
                row, column = torch.cat([row, rivals]), torch.cat([column, labels[rivals]])
            self._settle(part, x, row, column)

    def _settle(self, part: np.ndarray, x: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> None:
        """Choose among the pairs that products left: row in `part`, column the centroid."""
        close = torch.bincount(row, minlength=len(part))[row] > 1
        measured = torch.zeros(len(row), dtype=torch.float64, device=row.device)
        pairs = close.nonzero()[:, 0]
        for some in pairs.split(max(1, TILE_SCORES // (2 * x.shape[1]))):
            difference = x[row[some]].double() - self.centroids[column[some]].double()
            measured[some] = difference.square().sum(dim=1)
        least = torch.full((len(part),), math.inf, dtype=torch.float64, device=row.device)
        least.scatter_reduce_(0, row, measured, "amin")
        left = measured <= least[row] + DIRECT_ERROR
        row, column = part[row[left].cpu().numpy()], column[left].cpu().numpy()
        chosen = nearest_pairs(self.of.x, row, self.host, column)
        self.of.labels[row[chosen]] = column[chosen]
