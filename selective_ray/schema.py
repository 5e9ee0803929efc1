"""The contract: the tables on disk and the three values that merge.

Letters used everywhere: n rows, d dimensions, k neighbors, c clusters, m budget. Embeddings are float32 and
unit length, sums are int64 fixed point, utilities float64, image ids int64, cluster ids int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 2

# What a listing says of an image. A member of a tar archive has its offset and length in bytes, a row of a
# Parquet file its number as offset, a file of its own neither; the uri of the first two is
# "<archive>#<member>". size is null and version empty where the listing does not tell.
LISTED = pa.schema(
    [
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)
IMAGES = pa.schema([("image_id", pa.int64()), *LISTED])
# Images that are equal, byte for byte, to one with a smaller id: the smallest such id.
DUPLICATES = pa.schema([("image_id", pa.int64()), ("first_image_id", pa.int64())])
REJECTED = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())])
# What people say of images: nothing before training reads it.
LABELS = pa.schema([("image_id", pa.int64()), ("label", pa.string())])
SKIPPED = pa.schema([("image_id", pa.int64()), ("uri", pa.string())])
# How good a selection is: a figure (`figures.FIGURES`) of a run and its seed, or of a random draw.
EVALUATION = pa.schema(
    [
        ("budget", pa.int64()),
        ("run", pa.string()),
        ("seed", pa.int64()),
        ("draw", pa.int64()),
        ("figure", pa.string()),
        ("value", pa.float64()),
    ]
)
# What methods of selection reach beside each other: a figure (`figures.FIGURES`, and the seconds that picking
# took) of the picks of a method, of a budget and a seed. One that sees labels before it picks is an oracle.
COMPARISON = pa.schema(
    [
        ("method", pa.string()),
        ("sees_labels", pa.bool_()),
        ("budget", pa.int64()),
        ("seed", pa.int64()),
        ("figure", pa.string()),
        ("value", pa.float64()),
    ]
)
# What the trained network says, and the probability that it gives its answer.
PREDICTIONS = pa.schema([("image_id", pa.int64()), ("label", pa.string()), ("confidence", pa.float32())])
DENSITY = {
    "mean": pa.schema([("image_id", pa.int64()), ("mean_sq_dist", pa.float32())]),
    "kth": pa.schema(
        [("image_id", pa.int64()), ("kth_sq_dist", pa.float32()), ("log_density", pa.float64())]
    ),
}


def neighbors_schema(k: int) -> pa.Schema:
    """Schema of `neighbors/`: the k nearest images of each, ascending, with their squared distances."""
    lists = ("neighbors", pa.list_(pa.int64(), k)), ("sq_dists", pa.list_(pa.float32(), k))
    return pa.schema([("image_id", pa.int64()), *lists])


CLUSTERS = pa.schema([("image_id", pa.int64()), ("cluster_id", pa.int32()), ("sq_dist", pa.float32())])


def embeddings_schema(dimension: int, dtype: str, *, digest: bool = False) -> pa.Schema:
    """Schema of `embeddings/`; a list of fixed size, because offsets of int32 overflow at 2^31 values.

    digest: the BLAKE2b of the bytes of the image, where these were read.
    """
    value = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    columns = [("image_id", pa.int64()), ("embedding", pa.list_(value, dimension))]
    return pa.schema([*columns, ("digest", pa.binary(16))] if digest else columns)


def embeddings_table(
    image_ids: np.ndarray, x: np.ndarray, schema: pa.Schema, digests: np.ndarray | None = None
) -> pa.Table:
    """Return a shard of `embeddings/`: image_ids int64 [n], x [n, d] in the type of the schema.

    digests uint8 [n, 16] where the schema has a column for them.
    """
    value = schema.field("embedding").type.value_type
    flat = np.ascontiguousarray(x.reshape(-1), value.to_pandas_dtype())
    columns = [pa.array(image_ids), pa.FixedSizeListArray.from_arrays(pa.array(flat), x.shape[1])]
    if digests is not None:
        buffer = pa.py_buffer(np.ascontiguousarray(digests))
        columns.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests), [None, buffer]))
    return pa.table(columns, schema)


# Of all images, when the last round picked.
UTILITIES = pa.schema([("image_id", pa.int64()), ("repulsion", pa.float64()), ("utility", pa.float64())])


def selection_schema(estimator: str, *, nested: bool = False) -> pa.Schema:
    """Schema of `selection/`; the column of the measured distance is named as in `density/`.

    nested: the smallest budget that contains the image, where budgets contain each other.
    """
    return pa.schema(
        [
            ("image_id", pa.int64()),
            ("uri", pa.string()),
            ("cluster_id", pa.int32()),
            (sq_dist_column(estimator), pa.float32()),
            ("repulsion", pa.float64()),
            ("utility", pa.float64()),
            *([("budget", pa.int64())] if nested else []),
        ]
    )


def sq_dist_column(estimator: str) -> str:
    """Name of the distance that the estimator measures, in `density/` and in `selection/`."""
    return {"mean": "mean_sq_dist", "kth": "kth_sq_dist"}[estimator]


@dataclass(frozen=True)
class Partial:
    """What a set of rows contributes to one K-Means update; adding is exact, so no order matters.

    sums int64 [c, d] and sq_norm int are fixed point (`kmeans.fixed_point_bits`), counts int64 [c]. The
    candidates for empty clusters are distinct vectors, farthest from their centroid first: far_sq_dists
    float64 [e], far_image_ids int64 [e], far_x float32 [e, d]; `capacity` is the largest e that is kept.
    products is how many scores of a row and a centroid were computed for it.
    """

    sums: np.ndarray
    counts: np.ndarray
    sq_norm: int
    far_sq_dists: np.ndarray
    far_image_ids: np.ndarray
    far_x: np.ndarray
    capacity: int
    products: int = 0

    @staticmethod
    def zero(c: int, d: int, capacity: int = 0) -> Partial:
        """Return the identity of `+`."""
        return Partial(
            np.zeros((c, d), np.int64),
            np.zeros(c, np.int64),
            0,
            np.empty(0, np.float64),
            np.empty(0, np.int64),
            np.empty((0, d), np.float32),
            capacity,
        )

    def __add__(self, other: Partial) -> Partial:
        far = farthest(
            np.concatenate([self.far_sq_dists, other.far_sq_dists]),
            np.concatenate([self.far_image_ids, other.far_image_ids]),
            np.concatenate([self.far_x, other.far_x]),
            self.capacity,
        )
        return Partial(
            self.sums + other.sums,
            self.counts + other.counts,
            self.sq_norm + other.sq_norm,
            *far,
            self.capacity,
            self.products + other.products,
        )


def farthest(
    sq_dists: np.ndarray, image_ids: np.ndarray, x: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the `capacity` rows with the largest (sq_dist, -image_id) whose vectors differ from each other.

    Two empty clusters must not be given the same vector: one of them would stay empty.
    """
    order = np.lexsort((image_ids, -sq_dists))
    # Few more than are kept, unless many of them are equal.
    size = 2 * capacity
    while True:
        some = order[:size]
        first = np.unique(x[some].view(np.uint32), axis=0, return_index=True)[1] if len(some) else some
        if len(first) >= capacity or len(some) == len(order):
            keep = some[np.sort(first)[:capacity]]
            return sq_dists[keep], image_ids[keep], x[keep]
        size *= 4


@dataclass(frozen=True)
class Neighbors:
    """The nearest neighbors found so far: sq_dists float64 [n, k] ascending, image_ids int64 [n, k].

    Places not filled yet hold infinity and -1. DESIGN keeps float32 at rest; in flight the distances are
    the float64 ones that were compared.
    """

    sq_dists: np.ndarray
    image_ids: np.ndarray

    @staticmethod
    def none(n: int, k: int) -> Neighbors:
        """Return the identity of `merge`."""
        return Neighbors(np.full((n, k), np.inf), np.full((n, k), -1, np.int64))

    def merge(self, other: Neighbors) -> Neighbors:
        """Keep the k smallest of both by (sq_dist, image_id), row by row; the two hold different images."""
        k = self.sq_dists.shape[1]
        sq_dists = np.concatenate([self.sq_dists, other.sq_dists], axis=1)
        image_ids = np.concatenate([self.image_ids, other.image_ids], axis=1)
        order = np.lexsort((image_ids, sq_dists), axis=1)[:, :k]
        return Neighbors(
            np.take_along_axis(sq_dists, order, axis=1), np.take_along_axis(image_ids, order, axis=1)
        )

    def without(self, own: np.ndarray) -> Neighbors:
        """Leave out each row's own image id, own int64 [n]; where it is not there, the last of its row."""
        k = self.image_ids.shape[1] - 1
        itself = self.image_ids == own[:, None]
        itself[~itself.any(axis=1), k] = True
        return Neighbors(self.sq_dists[~itself].reshape(-1, k), self.image_ids[~itself].reshape(-1, k))


@dataclass(frozen=True)
class Picks:
    """The best image of each cluster, ordered by cluster: cluster_ids int32 [m], image_ids int64 [m],
    utilities float64 [m]."""

    cluster_ids: np.ndarray
    image_ids: np.ndarray
    utilities: np.ndarray

    @staticmethod
    def none() -> Picks:
        """Return the identity of `merge`."""
        return Picks(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float64))

    def merge(self, other: Picks) -> Picks:
        """Keep, for each cluster, the larger by (utility, -image_id)."""
        cluster_ids = np.concatenate([self.cluster_ids, other.cluster_ids])
        image_ids = np.concatenate([self.image_ids, other.image_ids])
        utilities = np.concatenate([self.utilities, other.utilities])
        order = np.lexsort((image_ids, -utilities, cluster_ids))
        _, first = np.unique(cluster_ids[order], return_index=True)
        best = order[first]
        return Picks(cluster_ids[best], image_ids[best], utilities[best])
