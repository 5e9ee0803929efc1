"""K-Means: by hand, against the oracle and torch, empty clusters, the same bits for any split of the rows."""

import functools
import itertools

import numpy as np
import oracle
import pytest
import torch
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import assignment, kmeans
from selective_ray.errors import UserError
from selective_ray.schema import Partial


def run(x, start, parts=1, **options):
    """Cluster rows that are spread over `parts` processes."""
    options = {"iterations": 20, "tolerance": 0.0, "final_assignment": True} | options
    held = [
        kmeans.Rows(x[rows], rows, len(x)) for rows in np.array_split(np.arange(len(x)), parts) if len(rows)
    ]

    def step(*asked):
        return functools.reduce(Partial.__add__, (rows.step(*asked) for rows in held))

    return kmeans.lloyd(step, x[start], n=len(x), **options)


@pytest.mark.parametrize(
    ("n", "m", "seed"), [(50_000, 40, 1), (50_000, 40, 2), (50_000, 40, 5), (7, 7, 3), (1, 1, 0)]
)
def test_start_equals_torch_randperm(n, m, seed):
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:m]
    assert kmeans.initial_rows(n, m, seed).tolist() == expected.tolist()


def test_start_of_the_published_seeds():
    assert kmeans.initial_rows(50_000, 5, 1).tolist() == [45845, 11799, 43880, 43701, 41303]
    assert kmeans.initial_rows(1_281_167, 5, 0).tolist() == [1069931, 571398, 762430, 399643, 899707]


def test_four_points_by_hand():
    x = np.array([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]], np.float32)
    clustering = run(x, np.array([0, 2]))
    assert assignment.assign(x, clustering.assigned_by).tolist() == [0, 0, 1, 1]
    assert np.allclose(clustering.centroids, [[0.9, 0.3], [-0.3, 0.9]])
    # Each point lies sqrt(0.1) from the mean of its pair.
    assert clustering.history[-1].inertia == pytest.approx(0.1, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_centroids_equal_the_oracle(blobs, seed):
    start = kmeans.initial_rows(len(blobs), 9, seed)
    labels, centroids = oracle.kmeans(blobs, start, 6)
    clustering = run(blobs, start, iterations=6, final_assignment=False)
    assert assignment.assign(blobs, clustering.assigned_by).tolist() == labels.tolist()
    assert np.allclose(clustering.centroids, centroids, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 7, 300])
@pytest.mark.parametrize("entries", [64, 1 << 20])
def test_same_bits_for_any_split_and_block(blobs, parts, entries, monkeypatch):
    start = kmeans.initial_rows(300, 12, 0)
    expected = run(blobs, start)
    monkeypatch.setattr(assignment, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(kmeans, "FIXED_ENTRIES", entries)
    found = run(blobs, start, parts)
    assert np.array_equal(found.centroids, expected.centroids)
    assert found.history == expected.history


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_objective_never_rises_and_no_cluster_ends_empty(seed):
    rng = np.random.default_rng(seed)
    few = unit(rng.normal(size=(rng.integers(2, 30), 3)))
    x = few[rng.integers(0, len(few), 60)]
    m = int(rng.integers(1, len(np.unique(x, axis=0)) + 1))
    repaired = []
    clustering = run(x, kmeans.initial_rows(60, m, seed), watch=lambda now: repaired.append(now.empty))
    inertia = [iteration.inertia for iteration in clustering.history]
    assert all(after <= before * (1 + 1e-6) + 1e-12 for before, after in itertools.pairwise(inertia))
    assert np.bincount(assignment.assign(x, clustering.assigned_by), minlength=m).min() > 0
    assert [iteration.empty for iteration in clustering.history] == repaired


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_rows_in_another_order_from_the_same_centroids(seed):
    """Normal rows have no ties: the same rows are in the same clusters, and the centroids the same bits."""
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(80, 4)))
    order = rng.permutation(80)
    start = rng.choice(80, 7, replace=False)
    here, there = run(x, start), run(x[order], np.argsort(order)[start])
    assert np.array_equal(here.centroids, there.centroids)
    assert here.history == there.history
    labels = assignment.assign(x, here.centroids)
    assert np.array_equal(labels[order], assignment.assign(x[order], there.centroids))


def test_reduced_in_ranges_of_clusters(blobs, monkeypatch):
    """Ranges change the order in which the objective is added up, and nothing else."""
    expected = run(blobs, kmeans.initial_rows(300, 12, 0))
    monkeypatch.setattr(kmeans, "RANGE_ENTRIES", 8 * 5)
    assert [part.start for part in kmeans.ranges(12, 8)] == [0, 5, 10]
    asked = []
    rows = kmeans.Rows(blobs, np.arange(300), 300)

    def step(centroids, candidates, clusters):
        partial = rows.step(centroids, candidates, clusters)
        asked.append(len(partial.sums))
        return partial

    found = kmeans.lloyd(
        *(step, blobs[kmeans.initial_rows(300, 12, 0)]),
        n=300,
        iterations=20,
        tolerance=0.0,
        final_assignment=True,
    )
    assert np.array_equal(found.centroids, expected.centroids)
    assert max(asked) == 5


def test_continues_from_what_was_kept(blobs):
    start = kmeans.initial_rows(300, 12, 0)
    kept = []
    expected = run(blobs, start, keep=lambda centroids, history: kept.append((centroids, list(history))))
    assert len(kept) == len(expected.history) - 1
    for centroids, history in kept[1::3]:
        rows = kmeans.Rows(blobs, np.arange(300), 300)
        again = kmeans.lloyd(
            *(rows.step, centroids),
            n=300,
            iterations=20,
            tolerance=0.0,
            final_assignment=True,
            history=history,
        )
        assert np.array_equal(again.centroids, expected.centroids)
        assert again.history == expected.history


@pytest.mark.parametrize("final_assignment", [True, False])
def test_every_budget_up_to_the_distinct_rows(final_assignment):
    rng = np.random.default_rng(0)
    distinct = unit(rng.normal(size=(17, 4)))
    x = np.concatenate([distinct, distinct[rng.integers(0, 17, 40)]])
    for m in range(1, 18):
        clustering = run(x, kmeans.initial_rows(len(x), m, 1), final_assignment=final_assignment)
        assert np.bincount(assignment.assign(x, clustering.assigned_by), minlength=m).min() > 0, m
    with pytest.raises(UserError, match="exceeds the 17 distinct embeddings among 57 images"):
        run(x, kmeans.initial_rows(len(x), 18, 1), final_assignment=final_assignment)


def test_labeled_images_take_some_of_the_distinct_rows():
    said = str(kmeans.TooFewDistinct(17, 57, 5))
    assert "exceeds the 12 distinct embeddings among 57 images besides those of 5 labeled" in said
    assert "lower --budget to 12 or fewer" in said
    assert "nothing left to label" in str(kmeans.TooFewDistinct(3, 57, 5))


def test_all_rows_equal():
    x = np.tile(unit(np.ones((1, 5))), (10, 1))
    assert assignment.assign(x, run(x, np.array([3])).assigned_by).tolist() == [0] * 10
    with pytest.raises(UserError, match="the 1 distinct"):
        run(x, np.array([3, 4]))


def test_fixed_point_equals_running_on(blobs):
    start = kmeans.initial_rows(300, 12, 0)
    short, long = run(blobs, start, iterations=200), run(blobs, start, iterations=400)
    assert len(short.history) < 200
    assert np.array_equal(short.centroids, long.centroids)


def test_tolerance_ends_earlier(blobs):
    start = kmeans.initial_rows(300, 12, 0)
    long = run(blobs, start).history
    short = run(blobs, start, tolerance=0.05).history
    assert 1 < len(short) < len(long)
    falls = [1 - after.inertia / before.inertia for before, after in itertools.pairwise(long)]
    # It ends with the first iteration that lowers the mean squared distance by a twentieth or less.
    assert len(short) == 2 + next(i for i, fall in enumerate(falls) if fall <= 0.05)


def test_equal_distances_go_to_the_smaller_cluster():
    x = unit(np.random.default_rng(0).normal(size=(50, 6)))
    centroids = np.concatenate([x[:5], x[:5]])
    assert assignment.assign(x, centroids).max() < 5


def test_near_ties_are_settled_by_direct_differences():
    """Two centroids one unit in the last place apart: float32 products cannot tell them apart."""
    rng = np.random.default_rng(1)
    x = unit(rng.normal(size=(200, 64)))
    base = unit(rng.normal(size=(1, 64)))
    nudged = base.copy()
    nudged[0, :32] = np.nextafter(nudged[0, :32], np.float32(2))
    centroids = np.concatenate([base, nudged])
    assert assignment.assign(x, centroids).tolist() == oracle.sq_dists(x, centroids).argmin(axis=1).tolist()


def test_moved_rows_leave_exact_sums(blobs):
    """Sums after many incremental moves equal those of a fresh start."""
    rows = kmeans.Rows(blobs, np.arange(300), 300)
    rng = np.random.default_rng(2)
    for _ in range(5):
        centroids = unit(rng.normal(size=(7, 8)))
        partial = rows.step(centroids, 3)
        fresh = kmeans.Rows(blobs, np.arange(300), 300).step(centroids, 3)
        assert np.array_equal(partial.sums, fresh.sums)
        assert np.array_equal(partial.counts, fresh.counts)
        assert np.array_equal(partial.far_image_ids, fresh.far_image_ids)


def test_inertia_equals_the_mean_of_squared_distances(blobs):
    centroids = unit(np.random.default_rng(3).normal(size=(7, 8)))
    partial = kmeans.Rows(blobs, np.arange(300), 300).step(centroids)
    expected = oracle.sq_dists(blobs, centroids).min(axis=1).mean()
    assert kmeans.inertia(partial, centroids, 300) == pytest.approx(expected, abs=1e-12)
