"""What is told from a few labels: by hand, against dense solutions and scikit-learn."""

import numpy as np
import pytest
from conftest import unit
from sklearn.linear_model import LogisticRegression

from selective_ray import distances, evaluation, figures
from selective_ray.evaluation import Ground, judge
from selective_ray.schema import Neighbors


def angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def ground(x: np.ndarray, labels: np.ndarray, **other) -> Ground:
    every = np.ones(len(x), bool)
    graph = evaluation.graph(evaluation.graph_neighbors(x))
    given = {"judged": every, "covered": every, "sq_radius": 0.1, "graph": graph, **other}
    return Ground(x, labels, int(labels.max()) + 1, **given)


@pytest.fixture
def classes(blobs):
    """Labels of the blobs that their direction says, with some noise: 4 classes."""
    rng = np.random.default_rng(1)
    return np.argmax(blobs[:, :4] + 0.2 * rng.normal(size=(len(blobs), 4)), axis=1)


# Neighbors


def test_neighbors_by_hand():
    picked, labels = angles(0, 10, 40, 50, 60), np.array([7, 7, 3, 3, 5])
    near = labels[evaluation.nearest(angles(21, 29, 90), picked, 5).image_ids]
    # 10, 40, 0, 50, 60; 40, 10, 50, 0, 60; 60, 50, 40, 10, 0.
    assert near.tolist() == [[7, 3, 7, 3, 5], [3, 7, 3, 7, 5], [5, 3, 3, 7, 7]]
    # Two votes each: the nearest of these labels counts.
    assert evaluation.vote(near).tolist() == [7, 3, 3]
    assert evaluation.vote(near[:, :1]).tolist() == near[:, 0].tolist()
    found = evaluation.nearest(angles(1), picked[:2], 5)
    assert found.image_ids.tolist() == [[0, 1]]
    assert found.sq_dists[0] == pytest.approx(2 - 2 * np.cos(np.deg2rad([1, 9])), abs=1e-6)


def test_of_equal_picks_the_first_is_the_nearest():
    found = evaluation.nearest(angles(3, 5), angles(7, 3, 3, 7), 4)
    assert found.image_ids.tolist()[0] == [1, 2, 0, 3] and (found.sq_dists[0, :2] == 0).all()


def test_coverage_by_hand():
    x = angles(0, 10, 20, 90, 180)
    labels = np.zeros(5, np.int64)
    chord = 2 - 2 * np.cos(np.deg2rad(10.001))
    for rows, radius, expected in (([1], chord, 3 / 5), ([1, 3], chord, 4 / 5), (range(5), 0.0, 1)):
        found = judge(ground(x, labels, sq_radius=radius), np.array(rows))
        assert found["coverage"] == expected


# Linear probe


@pytest.mark.parametrize("each", [1, 10])
def test_linear_probe_is_the_logistic_regression_of_scikit_learn(blobs, classes, each):
    """With fewer picks than dimensions, and with more; features far from zero mean and unit scale."""
    x = unit(blobs + 3 * np.eye(8)[0])
    rows = np.concatenate([np.flatnonzero(classes == c)[:each] for c in range(4)])
    m = len(rows)
    scale = np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
    z = ((x - x.mean(axis=0)) / scale).astype(np.float64)
    oracle = LogisticRegression(C=1 / (evaluation.PENALTY * m), tol=1e-10, max_iter=100_000)
    oracle.fit(z[rows], classes[rows])
    expected = oracle.predict(z)
    ours = evaluation.standard(x)
    assert ours == pytest.approx(z, abs=1e-5)
    told = evaluation.linear_probe(ours[rows], classes[rows], ours)
    assert len(np.unique(expected)) > 2
    assert (told == expected).all()


def test_linear_probe_is_the_same_for_any_scale_of_the_encoder(blobs, classes):
    rows = np.arange(0, 300, 9)
    near = unit(100 * np.eye(8)[3] + blobs)
    far = unit(10_000 * np.eye(8)[3] + blobs)
    z = [evaluation.standard(x) for x in (near, far)]
    first, second = (evaluation.linear_probe(x[rows], classes[rows], x) for x in z)
    # Both are plain shifts of the same cloud, a hundred times smaller.
    assert (first == second).mean() > 0.98


def test_linear_probe_of_one_class_tells_that(blobs):
    assert set(evaluation.linear_probe(blobs[:3], np.array([2, 2, 2]), blobs)) == {2}


# Label propagation


def dense(found: Neighbors, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Zhou's closed form, from the equations: Z [n, classes]."""
    n = len(found.image_ids)
    a = np.zeros((n, n))
    for i in range(n):
        for j, sq_dist in zip(found.image_ids[i], found.sq_dists[i], strict=True):
            a[i, j] = max(0, 1 - sq_dist / 2) ** 3
    w = a + a.T
    d = w.sum(axis=1)
    s = w / np.sqrt(np.outer(d, d))
    y = np.zeros((n, labels.max() + 1))
    for c in range(y.shape[1]):
        mine = rows[labels == c]
        y[mine, c] = 1 / np.sqrt(d[mine]).sum()
    return np.linalg.solve(np.eye(n) - 0.99 * s, y)


@pytest.mark.parametrize("classes_at_once", [4, 2, 1])
def test_label_propagation_is_the_dense_solution(blobs, classes, classes_at_once, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK_PRODUCTS", 300 * classes_at_once)
    found = evaluation.graph_neighbors(blobs)
    assert found.image_ids.shape == (300, 15) and not (found.image_ids == np.arange(300)[:, None]).any()
    rows = np.random.default_rng(3).choice(300, 20, replace=False)
    z = dense(found, rows, classes[rows])
    told = evaluation.propagate(evaluation.graph(found), rows, classes[rows])
    arrives = z.max(axis=1) > 1e-12
    assert 250 < arrives.sum() < 300
    assert (told == np.where(arrives, z.argmax(axis=1), -1)).all()


def test_no_label_arrives_where_no_path_leads():
    x = unit(np.repeat(np.eye(3), 20, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(60, 3)))
    graph = evaluation.graph(evaluation.graph_neighbors(x))
    told = evaluation.propagate(graph, np.array([0, 25]), np.array([4, 1]))
    assert told.tolist() == [4] * 20 + [1] * 20 + [-1] * 20


def test_a_class_with_many_labels_takes_no_more_than_it_is(blobs):
    """Three labels of one half of a cloud and one of the other: far rows do not go to the three."""
    x = unit(np.concatenate([angles(*np.linspace(0, 90, 60))]))
    labels = (np.arange(60) >= 30).astype(np.int64)
    graph = evaluation.graph(evaluation.graph_neighbors(x))
    told = evaluation.propagate(graph, np.array([10, 12, 15, 18, 45]), np.array([0, 0, 0, 0, 1]))
    assert (told == labels).mean() > 0.85


# All together


def test_figures_by_hand():
    x = angles(0, 1, 2, 90, 91, 92, 180)
    labels = np.array([0, 0, 1, 1, 1, -1, 2])
    found = judge(ground(x, labels, sq_radius=2 - 2 * np.cos(np.deg2rad(1.5)), graph=None), np.array([0, 3]))
    # Of rows 1, 2, 4 and 6 (that of 5 is not known) the labels are 0, 1, 1, 2, the nearest picks 0, 0, 3, 3.
    assert found["nearest_neighbor"] == 2 / 4
    assert found["coverage"] == 4 / 7
    assert (found["classes"], found["spread"]) == (2, pytest.approx(np.std([1, 1, 0])))
    assert "label_propagation" not in found


def test_labels_outside_of_the_selection_only_count(blobs, classes):
    """No figure learns from them: of labels that no pick has none is told right."""
    rows = np.arange(0, 300, 13)
    found = judge(ground(blobs, classes), rows)
    assert list(found) == list(figures.FIGURES) and 0.3 < found["linear_probe"] < 1
    other = classes.copy()
    rest = np.setdiff1d(np.arange(300), rows)
    other[rest] = 4
    assert all(judge(ground(blobs, other), rows)[name] == 0 for name in figures.ACCURACIES)


def test_without_labels_there_is_coverage_alone(blobs):
    labels = np.full(300, -1)
    blind = Ground(blobs, labels, 0, labels < 0, labels < 0, 0.2, None)
    assert list(judge(blind, np.arange(9))) == ["coverage"]


@pytest.mark.parametrize("seed", range(3))
def test_neither_the_order_of_rows_nor_the_names_of_classes_matter(blobs, classes, seed):
    rng = np.random.default_rng(seed)
    rows = rng.choice(300, 24, replace=False)
    order, renamed = rng.permutation(300), rng.permutation(4)
    shuffled = np.argsort(order)[rows]
    other = judge(ground(blobs[order], renamed[classes][order]), rng.permutation(shuffled))
    assert other == pytest.approx(judge(ground(blobs, classes), rows), abs=1e-12)
