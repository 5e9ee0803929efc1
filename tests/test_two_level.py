"""K-Means in two levels: shares, exactly m clusters, an objective close to Lloyd's."""

import numpy as np
import pytest
from conftest import unit
from hypothesis import given
from hypothesis import strategies as st

from selective_ray import assignment, config, in_memory, two_level


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.data())
def test_shares_are_in_proportion(sizes, data):
    sizes = np.array(sizes)
    m = data.draw(st.integers(len(sizes), int(sizes.sum())))
    share = two_level.shares(sizes, m)
    assert share.sum() == m
    assert (share >= 1).all() and (share <= sizes).all()
    exact = m * sizes / sizes.sum()
    # Where no share is held at its least or most, each is within one of its due.
    free = np.clip(exact, 1, sizes)
    assert np.all(np.abs(share - free) <= max(1.0, np.abs(free - exact).sum() + 1))


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(40, 8))
    return unit(centers[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, 8)))


def clustering(x, m, **cluster):
    settings, _ = config.load(options={f"cluster.{key}": value for key, value in cluster.items()})
    return in_memory._Clusters(x, settings).run(m)


@pytest.mark.parametrize("m", [100, 317])
def test_exactly_m_clusters_and_an_objective_close_to_that_of_lloyd(m):
    x = rows(2500)
    plain = clustering(x, m)
    levels = clustering(x, m, two_level=50)
    sizes = np.bincount(assignment.assign(x, levels.assigned_by), minlength=m)
    assert len(sizes) == m and sizes.min() > 0
    assert levels.history[-1].inertia < 1.1 * plain.history[-1].inertia
    assert len(levels.history) <= two_level.FULL_ITERATIONS + 2


def test_continues_from_whatever_was_reached():
    x = rows(800)
    settings, _ = config.load(options={"cluster.two_level": 50})
    kept = []

    def attempt(reached=None):
        clusters = in_memory._Clusters(x, settings)
        steps = two_level.Steps(clusters.rows.step, clusters._inside, clusters._start, clusters._start_inside)
        how = {"n": 800, "m": 90, "split_from": 50, "iterations": 9, "tolerance": 0.0}
        return two_level.cluster(
            steps, **how, final_assignment=True, reached=reached, keep=lambda reached: kept.append(reached)
        )

    expected = attempt()
    numbers = [reached.number for reached in kept]
    assert numbers == sorted(set(numbers))
    assert {reached.phase for reached in kept} == {"coarse", "inside", "full"}
    for reached in kept[::4]:
        assert np.array_equal(attempt(reached).centroids, expected.centroids)


def test_budget_of_every_row():
    x = rows(60)
    found = clustering(x, 60, two_level=50)
    assert np.bincount(assignment.assign(x, found.assigned_by)).tolist() == [1] * 60


def test_rows_compare_with_their_own_coarse_cluster_alone():
    x = rows(500)
    coarse = (np.arange(500) % 5).astype(np.int32)
    first = np.array([0, 1, 3, 3, 7, 9])
    coarse[coarse == 2] = 0
    centroids = x[100:109]
    inside = two_level.Inside(x, coarse, first)
    changed, before = inside.assign(centroids)
    for row in range(500):
        own = slice(first[coarse[row]], first[coarse[row] + 1])
        assert inside.labels[row] == assignment.assign(x[row : row + 1], centroids[own])[0] + own.start
    assert len(changed) == 500 and (before == -1).all()
    assert inside.products < 500 * 9
