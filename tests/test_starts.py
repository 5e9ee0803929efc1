"""k-means||: against a loop written out, laws of its draws, the same for any split of the rows."""

import numpy as np
import oracle
import pytest
from conftest import unit

from selective_ray import kmeans, starts


def drawn(x, m, parts=1, seed=0):
    """Choose starts among rows that are spread over `parts` processes."""
    n = len(x)
    held = [
        starts.Oversampling(x[rows], rows, n) for rows in np.array_split(np.arange(n), parts) if len(rows)
    ]

    def offer(candidates):
        for rows in held:
            rows.offer(candidates)

    return starts.draw_starts(
        lambda positions: x[positions],
        offer,
        lambda: sum(rows.cost() for rows in held),
        lambda cost, wanted: np.concatenate([rows.draw(cost, wanted, seed) for rows in held[::-1]]),
        lambda: sum(rows.weights() for rows in held),
        n=n,
        m=m,
        seed=seed,
    )


@pytest.mark.parametrize("parts", [2, 7, 300])
def test_same_starts_for_any_split(blobs, parts):
    assert drawn(blobs, 12, parts).tolist() == drawn(blobs, 12).tolist()


def test_starts_differ_and_cover_separate_blobs():
    """Twelve blobs far apart: a start in each, where random rows nearly always miss some."""
    rng = np.random.default_rng(3)
    blob = rng.integers(0, 12, 400)
    x = unit(np.eye(12)[blob] + 0.01 * rng.normal(size=(400, 12)))
    for seed in range(5):
        rows = drawn(x, 12, seed=seed)
        assert len(np.unique(rows)) == 12
        assert sorted(blob[rows].tolist()) == list(range(12))
        assert len(np.unique(blob[kmeans.initial_rows(400, 12, seed)])) < 12


def test_cost_and_weights_equal_the_oracle(blobs):
    rows = starts.Oversampling(blobs, np.arange(300), 300)
    first, second = blobs[[5, 17]], blobs[[200, 5]]
    rows.offer(first)
    rows.offer(second)
    sq_dists = oracle.sq_dists(blobs, np.concatenate([first, second]))
    assert rows.cost() / rows.scale == pytest.approx(sq_dists.min(axis=1).sum(), rel=1e-12)
    # The candidate that came twice keeps its rows the first time.
    assert rows.weights().tolist() == np.bincount(sq_dists.argmin(axis=1), minlength=4).tolist()
    assert rows.weights()[3] == 0


def test_draws_follow_the_squared_distances():
    """Over many seeds a row is drawn as often as its share of the cost says."""
    x = unit(np.array([[1, 0], [1, 0.1], [1, 0.4], [0, 1], [-1, 0.2]]))
    rows = starts.Oversampling(x, np.arange(5), 5)
    rows.offer(x[:1])
    cost = rows.cost()
    counts = np.zeros(5)
    for seed in range(4000):
        counts[rows.draw(cost, 1.0, seed)] += 1
    sq_dists = oracle.sq_dists(x, x[:1])[:, 0]
    assert np.allclose(counts / 4000, sq_dists / sq_dists.sum(), atol=0.03)


def test_fewer_distinct_rows_than_starts(blobs):
    x = blobs[np.arange(40) % 3]
    rows = drawn(x, 5)
    assert len(np.unique(rows)) == 5
    assert len(np.unique(x[rows], axis=0)) == 3


def test_objective_from_these_starts_is_lower(blobs):
    """In the mean over seeds, after the same iterations."""
    x = np.concatenate([blobs, unit(np.random.default_rng(1).normal(size=(20, 8)))])

    def after(rows):
        held = kmeans.Rows(x, np.arange(len(x)), len(x))
        how = {"n": len(x), "iterations": 3, "tolerance": 0.0, "final_assignment": False}
        return kmeans.lloyd(held.step, x[rows], **how).history[-1].inertia

    seeds = range(8)
    plain = np.mean([after(kmeans.initial_rows(len(x), 12, seed)) for seed in seeds])
    assert np.mean([after(drawn(x, 12, seed=seed)) for seed in seeds]) < 0.95 * plain
