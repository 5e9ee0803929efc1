"""Density: by hand, against the oracle, exact whatever the blocks, duplicates, k-th estimator, median."""

import math

import numpy as np
import oracle
import pytest
from conftest import unit
from hypothesis import given
from hypothesis import strategies as st

from selective_ray import density
from selective_ray.errors import UserError
from selective_ray.neighbors import neighbors


def in_blocks(x, rows):
    return [(np.arange(s, min(len(x), s + rows)), x[s : s + rows]) for s in range(0, len(x), rows)]


def test_three_points_by_hand():
    x = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    found = neighbors(x, in_blocks(x, 3), 2)
    # 0.16 + 0.64 = 0.8 and 0.36 + 0.04 = 0.4; self is the first neighbor, at 0.
    assert density.sq_dists_of(found, k=2, estimator="mean") == pytest.approx([0.4, 0.2, 0.2], abs=1e-7)
    assert density.sq_dists_of(found, k=2, estimator="kth") == pytest.approx([0.8, 0.4, 0.4], abs=1e-7)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("k", [2, 20, 299])
def test_equals_the_oracle(blobs, k, include_self):
    found = neighbors(blobs, in_blocks(blobs, 300), density.neighbors_needed(k, include_self))
    expected = oracle.mean_sq_dist(blobs, k, include_self)
    assert np.allclose(density.sq_dists_of(found, k=k, estimator="mean"), expected, rtol=1e-6, atol=0)


def test_exact_duplicates_are_dense_but_finite():
    x = np.concatenate(
        [np.tile(unit(np.ones((1, 4))), (30, 1)), unit(np.random.default_rng(0).normal(size=(30, 4)))]
    )
    sq_dists = density.sq_dists_of(neighbors(x, in_blocks(x, 60), 20), k=20, estimator="mean")
    assert (sq_dists[:30] == 0).all()
    relative = density.relative(sq_dists, unit=1.0, floor=1e-6)
    assert relative.max() == 1e6
    assert (relative[30:] == 1 / sq_dists[30:].astype(np.float64)).all()


def test_without_self_duplicates_count_as_neighbors():
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = neighbors(x, in_blocks(x, 3), density.neighbors_needed(1, False))
    assert density.sq_dists_of(found, k=1, estimator="mean").tolist() == [0, 0, 2]


def test_log_density_of_the_plane_by_hand():
    """k / (n · pi · D^2) for d = 2."""
    found = density.log_density(np.array([0.25], np.float32), k=3, n=10, d=2, floor=1e-6)
    assert found[0] == pytest.approx(math.log(3 / (10 * math.pi * 0.25)))


def test_log_density_exists_where_density_overflows():
    found = density.log_density(np.array([0.01, 0.0], np.float32), k=20, n=50_000_000, d=2048, floor=1e-6)
    assert np.isfinite(found).all()
    assert found[0] > 700


def test_k_that_data_allow():
    assert density.possible_k(20, 20, True, asked=True) == (20, None)
    assert density.possible_k(20, 20, False, asked=False)[0] == 19
    assert density.possible_k(20, 1, True, asked=False)[0] == 1
    with pytest.raises(UserError, match=r"set density\.k to 5 or fewer"):
        density.possible_k(20, 5, True, asked=True)


@given(st.lists(st.floats(0, 4, width=32), min_size=1, max_size=60), st.integers(1, 5))
def test_median_of_values_spread_over_processes(values, parts):
    values = np.abs(np.array(values, np.float32))
    spread = np.array_split(values, parts)
    found = density.median(lambda high: sum(density.half_counts(part, high) for part in spread))
    assert found == np.sort(values)[(len(values) - 1) // 2]
