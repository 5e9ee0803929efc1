"""The cluster stage on Ray: the clusters of the loop in memory, whatever holds the rows or is stopped."""

import numpy as np
import pytest
from conftest import unit
from test_pipeline import advance

from selective_ray import config, in_memory, two_level
from selective_ray.actors import kmeans, pipeline
from selective_ray.store import Run

WAYS = {
    "plain": {"cluster.final_assignment": False},
    "k-means||": {"cluster.init": "k-means||"},
    "two levels": {"cluster.two_level": 50},
    "in ranges": {},
}


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(30, 16))
    return unit(centers[rng.integers(0, 30, 1500)] + 0.5 * rng.normal(size=(1500, 16)))


@pytest.fixture(scope="module")
def file(x, tmp_path_factory):
    file = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(file, x)
    return file


def options(way: str) -> dict:
    return {"selection.budget": 80, "cluster.tolerance": 0.0, "cluster.iterations": 15, **WAYS[way]}


def in_process(x, way):
    """Labels and centroids without Ray."""
    settings, _ = config.load(options=options(way))
    clusters = in_memory._Clusters(x, settings)
    found = clusters.run(80)
    return clusters.rows.labels(found.assigned_by), found


def labels(run: Run) -> np.ndarray:
    shards = range(len(run.manifest("clusters").shards))
    return np.concatenate([run.read_shard("clusters", i)["cluster_id"].to_numpy() for i in shards])


@pytest.mark.parametrize(
    ("way", "shard_rows", "workers"),
    [("plain", 1500, 1), ("plain", 750, 2), *((way, 220, 2) for way in WAYS)],
)
def test_same_clusters_for_any_shards_and_workers(
    way, shard_rows, workers, two_cpus, x, file, tmp_path, monkeypatch
):
    if way == "in ranges":
        # On the driver, which asks for the ranges.
        monkeypatch.setattr("selective_ray.kmeans.RANGE_ENTRIES", 16 * 23)
    run = advance(
        tmp_path / "run",
        source=pipeline.Source(embeddings=str(file)),
        upto="clusters",
        **options(way),
        **{"resources.shard_rows": shard_rows, "resources.workers": workers},
    )
    expected, clustering = in_process(x, way)
    assert labels(run).tolist() == expected.tolist()
    assert np.array_equal(np.load(run.path("clusters", "centroids.npy")), clustering.centroids)
    summary = run.manifest("clusters").summary
    last = clustering.history[-1]
    assert summary["mean_sq_dist_to_centroid"] == last.inertia
    assert summary["history"]["inertia"] == [iteration.inertia for iteration in clustering.history]
    for key in ("empty", "smallest", "largest"):
        assert summary["history"][key] == [getattr(iteration, key) for iteration in clustering.history]
    assert (summary["smallest_cluster"], summary["largest_cluster"]) == (last.smallest, last.largest)
    assert 0 < summary["share_of_distances"] <= 1.1
    assert not run.exists("clusters", "work")


@pytest.mark.parametrize(("way", "stop_after"), [("plain", 8), ("two levels", 13)])
def test_an_interrupted_run_continues_at_its_iteration(
    way, stop_after, two_cpus, x, file, tmp_path, monkeypatch
):
    """Every few iterations the driver stops; the last file that it kept is cut short once."""
    attempts: list[list[int]] = []

    def interrupted(*arguments, watch, **rest):
        seen = []
        attempts.append(seen)

        def stop(iteration):
            watch(iteration)
            seen.append(iteration.number)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        return whole(*arguments, watch=stop, **rest)

    whole = two_level.cluster
    monkeypatch.setattr(two_level, "cluster", interrupted)
    folder = tmp_path / "run" / "clusters" / "work"
    while True:
        try:
            run = advance(
                tmp_path / "run",
                source=pipeline.Source(embeddings=str(file)),
                upto="clusters",
                **options(way),
                **{"resources.shard_rows": 750},
            )
            break
        except KeyboardInterrupt:
            kept = sorted(folder.iterdir())
            assert len(kept) == kmeans.KEPT
            if len(attempts) == 1:
                kept[-1].write_bytes(kept[-1].read_bytes()[:100])
    monkeypatch.setattr(two_level, "cluster", whole)
    expected, clustering = in_process(x, way)
    assert labels(run).tolist() == expected.tolist()
    assert np.array_equal(np.load(run.path("clusters", "centroids.npy")), clustering.centroids)
    if way == "plain":
        # What the eighth led to was not kept, and what the seventh led to was cut short.
        assert [seen[0] for seen in attempts] == [1, 7]
        assert run.manifest("clusters").summary["iterations"] == clustering.history[-1].number
