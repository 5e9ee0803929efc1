"""The neighbor kernel: against the oracle, exact whatever the blocks, the order and the error bound."""

import numpy as np
import oracle
import pytest
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_density import in_blocks

from selective_ray import neighbors as kernel
from selective_ray.distances import flat_nonzero
from selective_ray.neighbors import Nearest, neighbors


def near_duplicates(rng):
    """120 rows of which many are near, at every scale, and 30 equal."""
    centers = unit(rng.normal(size=(6, 24)))
    x = unit(
        centers[rng.integers(0, 6, 120)] + 10.0 ** rng.uniform(-9, 0, (120, 1)) * rng.normal(size=(120, 24))
    )
    x[rng.integers(0, 120, 30)] = x[0]
    return x


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_same_bits_for_any_blocks_order_and_error_bound(seed):
    """Near-duplicates, and an error bound that distrusts most products."""
    rng = np.random.default_rng(seed)
    x, k = near_duplicates(rng), int(rng.integers(2, 40))
    exact = np.sort(oracle.sq_dists(x, x), axis=1)[:, :k]
    blocks = in_blocks(x, int(rng.integers(1, 121)))
    rng.shuffle(blocks)
    for error in (None, 0.01, 10.0):
        found = neighbors(x, blocks, k, error=error)
        assert np.allclose(found.sq_dists, exact, rtol=1e-12, atol=0)
        assert np.array_equal(found.sq_dists, neighbors(x, in_blocks(x, 120), k).sq_dists)


def test_blocks_without_rows_change_nothing(blobs):
    empty = (np.arange(0), blobs[:0])
    found = neighbors(blobs, [empty, *in_blocks(blobs, 100), empty], 5)
    assert np.array_equal(found.sq_dists, neighbors(blobs, in_blocks(blobs, 300), 5).sq_dists)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_same_for_tiles_of_any_size(k, blobs, monkeypatch):
    expected = neighbors(blobs, [(np.arange(300), blobs)], k)
    monkeypatch.setattr(kernel, "TILE_ROWS", 8)
    monkeypatch.setattr(kernel, "TILE_ROWS_PER_NEIGHBOR", 1)
    monkeypatch.setattr(kernel, "TILE_QUERIES", 3)
    monkeypatch.setattr(kernel, "TILE_PRODUCTS", 24)
    monkeypatch.setattr(kernel, "MOST_PAIRS", 10)
    found = neighbors(blobs, [(np.arange(300), blobs)], k)
    assert np.array_equal(found.sq_dists, expected.sq_dists)
    assert np.array_equal(found.image_ids, expected.image_ids)


def test_thousands_of_equal_rows_cost_no_more_than_the_first_k(blobs):
    """A k-th distance of zero cannot be beaten, so that copies are not compared with each other again."""
    x = np.repeat(blobs[:2], 3000, axis=0)
    nearest = Nearest(x, 20)
    for start in range(0, len(x), 1000):
        nearest.offer(np.arange(start, start + 1000), x[start : start + 1000])
    assert (nearest.found().sq_dists == 0).all()
    assert nearest.products < 4.1e3 * len(x)


def test_rows_of_other_than_unit_length_are_compared_exactly():
    """As float16 leaves them, and worse."""
    rng = np.random.default_rng(3)
    x = (unit(rng.normal(size=(200, 16))) * rng.uniform(0.9, 1.1, (200, 1))).astype(np.float32)
    found = neighbors(x, in_blocks(x, 64), 9)
    assert np.allclose(found.sq_dists, np.sort(oracle.sq_dists(x, x), axis=1)[:, :9], rtol=1e-12)


def test_queries_are_compared_with_the_runs_they_are_paired_with():
    x = unit(np.random.default_rng(0).normal(size=(30, 8)))
    nearest = Nearest(x, 3)
    nearest.offer(np.arange(30), x, [(np.array([4, 9]), slice(10, 20)), (slice(0, 2), slice(20, 30))])
    found = nearest.found()
    distances = oracle.sq_dists(x, x)
    assert set(found.image_ids[4]) == set(10 + np.argsort(distances[4, 10:20])[:3])
    assert set(found.image_ids[1]) == set(20 + np.argsort(distances[1, 20:])[:3])
    assert (found.image_ids[2] == -1).all()


def test_fewer_rows_than_k_leave_places_open(blobs):
    found = neighbors(blobs[:4], [(np.arange(4), blobs[:4])], 6)
    assert (found.image_ids[:, 4:] == -1).all()
    assert np.isinf(found.sq_dists[:, 4:]).all()
    assert np.isfinite(found.sq_dists[:, :4]).all()


@given(st.lists(st.booleans(), min_size=0, max_size=60))
def test_flat_nonzero(values):
    mask = np.array(values, bool).reshape(1, -1)
    assert flat_nonzero(mask).tolist() == np.flatnonzero(values).tolist()
