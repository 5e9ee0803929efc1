"""Assignments kept over iterations: whatever moves, the labels are those of comparing every row with all."""

import numpy as np
import oracle
import pytest
import torch
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import assignment, assignment_torch, kmeans


def nearest(x, centroids):
    """Distances by differences in float64, ties to the smallest id: argmin takes the first."""
    return oracle.sq_dists(x, centroids).argmin(axis=1)


def moving(rng, x, c, kind):
    """Centroids of one iteration after another."""
    centroids = x[rng.integers(0, len(x), c)].copy()
    for _ in range(8):
        yield centroids
        centroids = centroids.copy()
        some = rng.random(c) < rng.choice([0.05, 0.5, 1.0])
        size = np.float32(10.0 ** -rng.integers(0, 8))
        if kind == "wander":
            centroids[some] += size * rng.normal(size=(some.sum(), x.shape[1])).astype(np.float32)
        elif kind == "ties":
            # Onto each other, and a unit in the last place beside each other.
            centroids[some] = centroids[rng.integers(0, c, some.sum())]
            nudged = rng.integers(0, c, 3)
            centroids[nudged] = np.nextafter(centroids[nudged], np.float32(2))
        else:
            # Onto rows, and between two rows, at the same distance from both.
            a, b = x[rng.integers(0, len(x), (2, some.sum()))]
            centroids[some] = a if rng.random() < 0.5 else (a + b) / 2


def examples(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.choice([2, 5, 24]))
    x = unit(rng.normal(size=(int(rng.integers(1, 60)), d)))
    return rng, x[rng.integers(0, len(x), 90)]


def check(kept, rng, x, kind):
    for centroids in moving(rng, x, int(rng.integers(1, 30)), kind):
        then = kept.labels.copy()
        changed, before = kept.assign(centroids)
        assert kept.labels.tolist() == nearest(x, centroids).tolist()
        assert changed.tolist() == np.flatnonzero(kept.labels != then).tolist()
        assert before.tolist() == then[changed].tolist()


@pytest.mark.parametrize("kind", ["wander", "ties", "rows"])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_bounds_change_nothing(kind, seed):
    rng, x = examples(seed)
    with pytest.MonkeyPatch.context() as patch:
        # Groups, tiles and blocks as small as the example.
        patch.setattr(assignment, "GROUP_CENTROIDS", int(rng.integers(1, 5)))
        patch.setattr(assignment, "TILE_QUERIES", 3)
        patch.setattr(assignment, "TILE_PRODUCTS", 20)
        patch.setattr(assignment, "TILE_CENTROIDS", int(rng.integers(1, 9)))
        patch.setattr(assignment, "WIDE", float(rng.choice([0.3, 0.9, 2.0])))
        patch.setattr(assignment, "FAST_COST", int(rng.choice([0, 1000])))
        patch.setattr(assignment, "LOOSE_SHARE", float(rng.choice([0.0, 2.0, 1e6])))
        patch.setattr(assignment, "BLOCK_ENTRIES", int(rng.integers(1, 40)) * x.shape[1])
        check(assignment.Assignment(x), rng, x, kind)


def cut(values):
    """What a tensor core sees of a float32: 10 bits of its mantissa, the others cut off."""
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("rounding", [lambda values: values, cut], ids=["float32", "TF32"])
@pytest.mark.parametrize("kind", ["wander", "ties", "rows"])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_a_device_changes_nothing(kind, rounding, seed):
    """On the CPU, by torch; with products as inexact as those of a GPU, too."""
    rng, x = examples(seed)
    addmm = torch.addmm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", lambda a, x, y, **how: addmm(a, rounding(x), rounding(y.T).T, **how))
        patch.setattr(assignment_torch, "TILE_SCORES", int(rng.integers(1, 200)))
        check(assignment_torch.AssignmentOnDevice(x, "cpu"), rng, x, kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@pytest.mark.parametrize("kind", ["wander", "ties", "rows"])
def test_a_gpu_changes_nothing(kind):
    for seed in range(20):
        rng, x = examples(seed)
        check(assignment_torch.AssignmentOnDevice(x, "cuda"), rng, x, kind)


def test_lloyd_by_bounds_equals_lloyd_by_all_distances_and_computes_fewer(blobs):
    x = np.concatenate([blobs] * 4)
    centroids = x[kmeans.initial_rows(len(x), 130, 1)]
    rows = kmeans.Rows(x, np.arange(len(x)), len(x))
    plain = centroids
    computed = []
    for _ in range(20):
        labels = nearest(x, plain)
        partial = rows.step(centroids)
        assert rows.assignment.labels.tolist() == labels.tolist()
        computed.append(partial.products)
        centroids = kmeans.update(partial, centroids, len(x))
        plain = plain.copy()
        for c in np.unique(labels):
            plain[c] = x[labels == c].mean(axis=0, dtype=np.float64)
        assert np.allclose(centroids, plain, atol=1e-7)
        plain = centroids
    # Four copies of every row: the nearest are too close to call for many.
    assert len(x) * 130 <= computed[0] < 2 * len(x) * 130
    assert sum(computed[-5:]) < 0.1 * 5 * len(x) * 130


def test_bounds_take_sixteen_bytes_a_row():
    x = unit(np.random.default_rng(0).normal(size=(500, 8)))
    kept = assignment.Assignment(x)
    kept.assign(x)
    assert kept.own.itemsize + kept.others.itemsize * kept.others.shape[0] == 16
