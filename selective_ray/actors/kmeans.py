"""The cluster stage: Lloyd's loop here, its step a sum over the actors that hold the shards."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from selective_ray import kmeans
from selective_ray.actors.session import peak_memory
from selective_ray.actors.shards import Pool
from selective_ray.config import Config
from selective_ray.progress import Reporter
from selective_ray.schema import Partial
from selective_ray.store import Manifest, Run, Stopwatch

CENTROIDS = "centroids.npy"


def what_of(config: Config, budget: int, labeled: int) -> dict[str, Any]:
    """Return what a clustering depends on, as its manifest has it."""
    return {
        "selection": {"budget": budget, **({"labeled": labeled} if labeled else {})},
        "cluster": config.cluster.model_dump(),
        "seed": config.seed,
    }


def cluster(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    budget: int,
    labeled: int = 0,
    table: str = "clusters",
    earlier: Run | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Cluster the embeddings into a table `clusters/` and its `centroids.npy`.

    There are as many clusters as the budget and the labeled images, so that enough are free of these.
    """
    embeddings = run.manifest("embeddings")
    assert embeddings is not None
    n, m = embeddings.rows, budget + labeled
    what = what_of(config, budget, labeled)
    if done := run.begin(table, what, run.fingerprints("embeddings"), earlier):
        return done
    stopwatch = Stopwatch(run, table)
    with reporter.stage("cluster", config.cluster.iterations, "iterations") as bar:
        pool.start()

        def step(centroids: np.ndarray, candidates: int) -> Partial:
            """One put of c·d floats; one Partial back from each actor, added as it comes."""
            sent = ray.put(centroids)
            return pool.fold(lambda actor: actor.kmeans_step.remote(sent, candidates), Partial.__add__)

        def watch(iteration: kmeans.Iteration) -> None:
            bar.advance(1)
            bar.say(f"mean squared distance {iteration.inertia:.4f}")
            check()
            stopwatch.note()

        clustering = kmeans.lloyd(
            step,
            pool.rows_at(kmeans.initial_rows(n, m, config.seed))[1],
            n=n,
            iterations=config.cluster.iterations,
            tolerance=config.cluster.tolerance,
            final_assignment=config.cluster.final_assignment,
            watch=watch,
        )
        sent = [ray.put(clustering.assigned_by), ray.put(clustering.centroids)]
        answers = pool.all(lambda actor: actor.write_clusters.remote(table, *sent))
    buffer = io.BytesIO()
    np.save(buffer, clustering.centroids)
    run.write_bytes(buffer.getvalue(), table, CENTROIDS)
    last = clustering.history[-1]
    return run.finish(
        table,
        [shard for shards, _ in answers for shard in shards],
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": max(peak for _, peak in answers)},
        summary={
            "clusters": m,
            "iterations": last.number,
            "mean_sq_dist_to_centroid": last.inertia,
            "smallest_cluster": last.smallest,
            "largest_cluster": last.largest,
            "empty_clusters_repaired": sum(iteration.empty for iteration in clustering.history),
        },
    )
