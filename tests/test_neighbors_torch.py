"""The kernels for a GPU, on torch's CPU device: the same neighbors and lists as those of numpy."""

import functools

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_density import in_blocks
from test_ivf import joined, scattered
from test_neighbors import near_duplicates

from selective_ray import ivf, neighbors_torch
from selective_ray.neighbors import Nearest
from selective_ray.neighbors_torch import NearestOnDevice

on_device = functools.partial(NearestOnDevice, device="cpu")


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_same_neighbors_as_direct_differences(seed):
    """Near-duplicates, in blocks of any size, with an error bound that distrusts products."""
    rng = np.random.default_rng(seed)
    x, k = near_duplicates(rng), int(rng.integers(2, 40))
    exact = np.sort(oracle.sq_dists(x, x), axis=1)[:, :k]
    for error in (None, 10.0):
        nearest = on_device(x, k, error=error)
        for image_ids, part in in_blocks(x, int(rng.integers(1, 121))):
            nearest.offer(image_ids, part)
        found = nearest.found()
        assert np.allclose(found.sq_dists, exact, rtol=1e-12, atol=0)
        there = oracle.sq_dists(x, x)[np.arange(120)[:, None], found.image_ids]
        assert np.allclose(there, found.sq_dists, rtol=1e-12, atol=1e-18)
        assert (np.sort(found.image_ids)[:, 1:] != np.sort(found.image_ids)[:, :-1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tiles_pairs_and_places_left_open(dtype, blobs, monkeypatch):
    monkeypatch.setattr(neighbors_torch, "TILE_ROWS", 8)
    monkeypatch.setattr(neighbors_torch, "TILE_ROWS_PER_NEIGHBOR", 1)
    monkeypatch.setattr(neighbors_torch, "TILE_PRODUCTS", 24)
    monkeypatch.setattr(neighbors_torch, "PAIR_ENTRIES", 100)
    x = blobs.astype(dtype)
    pairs = [(np.array([4, 9]), slice(10, 20)), (slice(0, 2), slice(20, 60))]
    ours, theirs = on_device(x.astype(np.float32), 12), Nearest(x.astype(np.float32), 12)
    for nearest in (ours, theirs):
        nearest.offer(np.arange(len(x)), x, pairs)
    assert np.allclose(ours.found().sq_dists, theirs.found().sq_dists, rtol=1e-12)
    assert np.array_equal(ours.found().image_ids, theirs.found().image_ids)
    assert ours.count.tolist() == np.minimum(theirs.count, 12).tolist()


@pytest.mark.parametrize(("reach", "probes"), [(0.0, None), (0.3, None), (0.0, 4)])
def test_same_lists(reach, probes, monkeypatch):
    monkeypatch.setattr(neighbors_torch, "TILE_PRODUCTS", 300)
    x = scattered(400)
    centroids = np.concatenate([scattered(10, seed=1), scattered(2, seed=1)])
    ours = ivf.assign(
        x,
        centroids,
        reach=reach,
        probes=probes,
        propose=functools.partial(neighbors_torch.propose, device="cpu"),
    )
    theirs = ivf.assign(x, centroids, reach=reach, probes=probes)
    assert np.array_equal(ours.lists, theirs.lists)
    assert np.array_equal(ours.counts, theirs.counts)
    ends = np.cumsum(theirs.counts)[:-1]
    for mine, other in zip(np.split(ours.probes, ends), np.split(theirs.probes, ends), strict=True):
        assert sorted(mine) == sorted(other)


@pytest.mark.parametrize("collapse", [False, True])
def test_same_join(collapse):
    x = scattered(400)
    x[50:60] = x[49]
    centroids = scattered(12, seed=1)
    theirs, *_ = joined(x, centroids, 0.2, collapse=collapse)
    ours, *_ = joined(x, centroids, 0.2, collapse=collapse, kernel=on_device)
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-18)
