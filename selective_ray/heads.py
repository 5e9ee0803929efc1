"""What the trained heads of USL-T say of features: the cluster of each, and how sure they are of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from selective_ray.distances import blocks
from selective_ray.schema import CLUSTERS


@dataclass(frozen=True)
class Trained:
    """Heads after training: weight float32 [h, c, d]; bias float32 [h, c], or none where they are of cosines.

    scale multiplies the cosines. of_all: whether the confidence is the mean over heads (as published for
    CIFAR-10), or the first one's (CIFAR-100).
    """

    weight: np.ndarray
    bias: np.ndarray | None
    scale: float
    of_all: bool

    @property
    def centroids(self) -> np.ndarray:
        """The first head's weights at unit length, float32 [c, d]."""
        return _unit(self.weight[0]).astype(np.float32)

    def judge(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return clusters int32 [n], confidences float32 [n], and sq_dists float32 [n] to unit weights.

        x float32 [n, d]. The cluster is the first head's most probable. Products are in float64, so that what
        is near an equal does not depend on which rows are together.
        """
        clusters = np.empty(len(x), np.int32)
        confidences, sq_dists = np.empty((2, len(x)), np.float32)
        heads = self.weight if self.of_all else self.weight[:1]
        weights = [_unit(one) if self.bias is None else one.astype(np.float64) for one in heads]
        directions = _unit(self.weight[0])
        for part in blocks(len(x), self.weight.shape[1]):
            rows = x[part].astype(np.float64)
            unit = _unit(rows)
            sure = np.zeros(len(rows))
            for head, weight in enumerate(weights):
                if self.bias is None:
                    logits = self.scale * (unit @ weight.T)
                else:
                    logits = rows @ weight.T + self.bias[head]
                if head == 0:
                    clusters[part] = logits.argmax(axis=1)
                sure += 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
            confidences[part] = sure / len(weights)
            cosines = np.einsum("nd,nd->n", unit, directions[clusters[part]])
            sq_dists[part] = np.maximum(2 - 2 * cosines, 0)
        return clusters, confidences, sq_dists

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads."""
        buffer = io.BytesIO()
        bias = np.empty(0, np.float32) if self.bias is None else self.bias
        np.savez(buffer, weight=self.weight, bias=bias, scale=self.scale, of_all=self.of_all)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Trained:
        """Read heads."""
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            bias = kept["bias"] if kept["bias"].size else None
            return Trained(kept["weight"], bias, float(kept["scale"]), bool(kept["of_all"]))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def heads_table(
    image_ids: np.ndarray, clusters: np.ndarray, confidence: np.ndarray, sq_dists: np.ndarray
) -> pa.Table:
    """Return a shard of `clusters/` as heads make it: with how sure they are of each image."""
    columns = [pa.array(np.ascontiguousarray(values)) for values in (image_ids, clusters, sq_dists)]
    sure = pa.array(np.ascontiguousarray(confidence))
    return pa.table(columns, CLUSTERS).append_column("confidence", sure)
