"""Laws of the three values that merge: identity, any order, any grouping; ties to the smallest image_id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray.schema import Neighbors, Partial, Picks, farthest

seeds = st.integers(0, 2**32 - 1)


def random_picks(rng, ids):
    """Few utilities and clusters, so that ties are common."""
    n = len(ids)
    picks = Picks(rng.integers(0, 4, n).astype(np.int32), ids, rng.integers(0, 3, n).astype(np.float64))
    return Picks.none().merge(picks)


def same_picks(a, b):
    return all(
        np.array_equal(getattr(a, field), getattr(b, field))
        for field in ("cluster_ids", "image_ids", "utilities")
    )


@given(seeds)
def test_picks_merge_in_any_order_and_grouping(seed):
    rng = np.random.default_rng(seed)
    a, b, c = (random_picks(rng, ids) for ids in np.array_split(rng.permutation(20), 3))
    assert same_picks(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same_picks(a.merge(b), b.merge(a))
    assert same_picks(a.merge(Picks.none()), a)


def test_picks_keep_the_best_of_each_cluster_and_the_smaller_id_of_equals():
    a = Picks(np.array([0, 1], np.int32), np.array([7, 5]), np.array([1.0, 2.0]))
    b = Picks(np.array([0, 1, 2], np.int32), np.array([3, 9, 4]), np.array([1.0, 3.0, -np.inf]))
    merged = a.merge(b)
    assert merged.cluster_ids.tolist() == [0, 1, 2]
    assert merged.image_ids.tolist() == [3, 9, 4]


@given(seeds, st.integers(1, 6))
def test_neighbors_merge_in_any_order_and_grouping(seed, k):
    rng = np.random.default_rng(seed)
    n = 5
    parts = []
    for ids in np.array_split(rng.permutation(18), 3):
        sq_dists = rng.integers(0, 4, (n, len(ids))).astype(np.float64)
        found = Neighbors(sq_dists, np.broadcast_to(ids, (n, len(ids))).copy())
        parts.append((found, Neighbors.none(n, k).merge(found)))
    (a_all, a), (b_all, b), (c_all, c) = parts
    left, right, swapped = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
    everything = [
        sorted(
            zip(
                np.concatenate([p.sq_dists[i] for p in (a_all, b_all, c_all)]),
                np.concatenate([p.image_ids[i] for p in (a_all, b_all, c_all)]),
                strict=True,
            )
        )[:k]
        for i in range(n)
    ]
    for found in (left, right, swapped):
        assert [
            list(zip(d, i, strict=True)) for d, i in zip(found.sq_dists, found.image_ids, strict=True)
        ] == everything
    assert np.array_equal(a.merge(Neighbors.none(n, k)).image_ids, a.image_ids)


def random_partial(rng, ids, vectors, capacity):
    sums = rng.integers(-(2**60), 2**60, (3, 2))
    return Partial(
        sums, rng.integers(0, 10, 3), int(rng.integers(2**60)), *far(ids, vectors, capacity), capacity
    )


def far(ids, vectors, capacity):
    """The farthest rows among ids, where the rows of one vector have one distance, as in a real step."""
    kind = ids % len(vectors[0])
    return farthest(vectors[1][kind], ids, vectors[0][kind], capacity)


@given(seeds, st.integers(0, 5))
@settings(deadline=None)
def test_partials_add_in_any_order_and_grouping(seed, capacity):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(6, 2)).astype(np.float32), rng.integers(0, 3, 6).astype(np.float64)
    a, b, c = (random_partial(rng, ids, vectors, capacity) for ids in np.array_split(rng.permutation(20), 3))
    for left, right in (((a + b) + c, a + (b + c)), (a + b, b + a), (a + Partial.zero(3, 2, capacity), a)):
        assert np.array_equal(left.sums, right.sums)
        assert np.array_equal(left.counts, right.counts)
        assert left.sq_norm == right.sq_norm
        assert np.array_equal(left.far_image_ids, right.far_image_ids)
        assert np.array_equal(left.far_x, right.far_x)


def test_candidates_are_the_farthest_distinct_vectors():
    x = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float32)
    sq_dists, ids, kept = farthest(np.array([2.0, 2.0, 2.0, 1.0]), np.array([8, 3, 5, 1]), x, 2)
    assert ids.tolist() == [3, 5]
    assert sq_dists.tolist() == [2.0, 2.0]
    assert kept.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("capacity", [0, 3])
def test_zero_partial_has_no_candidates(capacity):
    zero = Partial.zero(2, 3, capacity)
    assert len((zero + zero).far_image_ids) == 0
