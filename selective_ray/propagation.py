"""Labels passed on to the densest images of a cluster, as USL-T's published code does for ImageNet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from selective_ray.errors import UserError
from selective_ray.schema import sq_dist_column
from selective_ray.store import Run


def propagated(run: Run, labels: dict[int, str], count: int) -> dict[int, str]:
    """Return labels with those that the `count` densest images of each labeled image's cluster get from it.

    Where a cluster holds several labeled images, they get that of the densest. Labels that are there stay.
    Raises UserError where the run has no clusters.
    """
    if run.manifest("density") is None or run.manifest("clusters") is None:
        raise UserError(
            f"train.propagate goes by densities and clusters, and {run.uri} has none: select on it first"
        )
    labeled = np.array(sorted(labels), np.int64)
    densest: dict[int, tuple[float, int]] = {}
    for ids, clusters, sq_dists in _rows(run):
        for row in np.flatnonzero(np.isin(ids, labeled)).tolist():
            found = float(sq_dists[row]), int(ids[row])
            cluster = int(clusters[row])
            densest[cluster] = min(found, densest.get(cluster, found))
    kept = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    for part in _rows(run):
        wanted = np.isin(part[1], list(densest))
        kept = tuple(np.concatenate([a, b[wanted]]) for a, b in zip(kept, part, strict=True))
        order = np.lexsort((kept[0], kept[2], kept[1]))
        kept = tuple(values[order] for values in kept)
        rank = np.arange(len(order)) - np.searchsorted(kept[1], kept[1])
        kept = tuple(values[rank < count] for values in kept)
    passed_on = {
        image: labels[densest[cluster][1]]
        for image, cluster in zip(kept[0].tolist(), kept[1].tolist(), strict=True)
    }
    return passed_on | labels


def _rows(run: Run) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read image ids, clusters and squared distances, shard by shard."""
    density = run.manifest("density")
    column = sq_dist_column(density.what["density"]["estimator"])
    for shard in density.shards:
        rows = run.read_shard("density", shard.index, ["image_id", column])
        clusters = run.read_shard("clusters", shard.index, ["cluster_id"])["cluster_id"]
        yield rows["image_id"].to_numpy(), clusters.to_numpy(), rows[column].to_numpy()
