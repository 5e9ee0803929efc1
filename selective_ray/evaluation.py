"""How good a selection is, on frozen embeddings: what a few labels tell of the rest, and how they lie in it.

Plain functions over arrays: x float32 [n, d], unit rows; labels int64 [n], numbers of classes, -1 where not
known; rows int64 [m], the places of a selection in x. No function learns from a label outside of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array, csr_array, dia_array
from scipy.special import log_softmax

from selective_ray.distances import blocks, sq_dists_direct
from selective_ray.figures import ACCURACIES
from selective_ray.schema import Neighbors

VOTERS = 5
# Of the linear probe's weights, in units that do not depend on the encoder (`linear_probe`). On digits (PCA)
# and CIFAR-10 (SqueezeNet) with 20 to 200 labels within two points of the best of 1e-1 to 1e-5.
PENALTY = 1e-3
# Label propagation: neighbors of a row, the power of their cosine, and how far labels travel.
GRAPH_NEIGHBORS, GRAPH_POWER, DIFFUSION = 15, 3, 0.99
# Residual of its solution, as a share of what is solved for: on the sets above 1e-9 told the same labels.
RESIDUAL = 1e-6


@dataclass(frozen=True)
class Graph:
    """Which rows are alike: affinities S, a symmetric sparse matrix [n, n], and weights float64 [n].

    The weights are the vector that S leaves as it is: what is passed on for ever ends up in proportion to it.
    """

    affinities: csr_array
    weights: np.ndarray


@dataclass(frozen=True)
class Ground:
    """What selections are judged on: the same rows for all.

    x float32 [n, d] and labels int64 [n] as above, classes: how many there are. judged bool [n]: the rows
    whose labels are to be told, where they are known; a selection's own do not count. covered bool [n]: a
    fair sample of all images. sq_radius: the squared distance that coverage means. graph: `graph` of x.
    """

    x: np.ndarray
    labels: np.ndarray
    classes: int
    judged: np.ndarray
    covered: np.ndarray
    sq_radius: float
    graph: Graph | None

    @cached_property
    def standard(self) -> np.ndarray:
        """Return `standard` of x."""
        return standard(self.x)


def judge(ground: Ground, rows: np.ndarray) -> dict[str, float]:
    """Judge a selection of rows int64 [m]; returns those of `figures.FIGURES` that the labels allow.

    Accuracies are shares of the rows judged, the selection's own left out.
    """
    x, labels = ground.x, ground.labels
    near = nearest(x, x[rows], VOTERS)
    # As ProbCover counts it (Yehuda et al., NeurIPS 2022).
    found = {"coverage": float((near.sq_dists[ground.covered, 0] <= ground.sq_radius).mean())}
    known = rows[labels[rows] >= 0]
    if not len(known):
        return found
    counts = class_counts(labels[known], ground.classes)
    found |= {"classes": float(np.count_nonzero(counts)), "spread": float(counts.std())}
    judged = ground.judged & (labels >= 0)
    judged[rows] = False
    rest = np.flatnonzero(judged)
    if not len(rest):
        return found
    if len(known) < len(rows):
        near = nearest(x, x[known], VOTERS)
    near_labels = labels[known][near.image_ids[rest]]
    z = ground.standard
    told = {
        "linear_probe": linear_probe(z[known], labels[known], z[rest]),
        "nearest_neighbor": near_labels[:, 0],
        "five_neighbors": vote(near_labels),
    }
    if ground.graph:
        told["label_propagation"] = propagate(ground.graph, known, labels[known])[rest]
    accuracies = {name: float((told[name] == labels[rest]).mean()) for name in ACCURACIES if name in told}
    return accuracies | found


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Count the labels of a selection by class, int64 [classes]."""
    return np.bincount(labels, minlength=classes)


# Neighbors


def nearest(x: np.ndarray, others: np.ndarray, k: int) -> Neighbors:
    """Find the min(k, m) nearest of others [m, d] for every row, by their places, nearest first.

    Products find them, in float32: among nearly as far as the last, which one it is depends on the machine.
    Direct differences measure and order them; ties go to the one that comes first.
    """
    k = min(k, len(others))
    _, found = faiss.knn(np.ascontiguousarray(x), np.ascontiguousarray(others), k)
    sq_dists = sq_dists_direct(x, np.repeat(np.arange(len(x)), k), others, found.ravel()).reshape(-1, k)
    order = np.lexsort((found, sq_dists), axis=1)
    return Neighbors(np.take_along_axis(sq_dists, order, axis=1), np.take_along_axis(found, order, axis=1))


def vote(near: np.ndarray) -> np.ndarray:
    """Return the label that most of each row's neighbors have: near int64 [n, k], nearest first -> [n].

    Of labels with as many votes, the one of the nearest neighbor counts.
    """
    votes = sum((near == near[:, [i]]).astype(np.int64) for i in range(near.shape[1]))
    return near[np.arange(len(near)), votes.argmax(axis=1)]


# Linear probe


def standard(x: np.ndarray) -> np.ndarray:
    """Return x [n, d] less its mean, divided by the root of the mean squared distance from it, float32."""
    centered = x - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    sq_dist = np.einsum("nd,nd->n", centered, centered).mean(dtype=np.float64)
    return centered / np.float32(max(np.sqrt(sq_dist), 1e-6))


@dataclass(frozen=True)
class Probe:
    """A linear classifier: classes int64 [c] ascending, weights float32 [d, c], intercepts float64 [c]."""

    classes: np.ndarray
    weights: np.ndarray
    intercepts: np.ndarray

    def scores(self, z: np.ndarray) -> np.ndarray:
        """Return the logits of rows [n, d], float [n, c]."""
        return z @ self.weights + self.intercepts


def linear_probe(picked: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Tell the labels of rows [n, d] by `fit_probe` on the picks [m, d]: int64 [n]."""
    probe = fit_probe(picked, labels)
    parts = blocks(len(asked), len(probe.classes))
    best = [probe.scores(asked[part]).argmax(axis=1) for part in parts]
    return probe.classes[np.concatenate([np.empty(0, np.int64), *best])]


def fit_probe(picked: np.ndarray, labels: np.ndarray) -> Probe:
    """Fit logistic regression to picks [m, d] and their labels int64 [m].

    In `standard` units, so that one penalty means the same for every encoder. Multinomial, with an
    intercept and an L2 penalty: weights W and intercepts b minimize

        mean over the picks of cross-entropy(softmax(W z + b), label) + PENALTY / 2 * sum of squares of W

    (in the words of scikit-learn, C = 1 / (PENALTY · m)). The penalty is fixed, as few labels leave none to
    choose it by. Solved by L-BFGS in float64. Of picks of one class only, that class is told.
    """
    classes, target = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        return Probe(classes, np.zeros((picked.shape[1], 1), np.float32), np.zeros(1))
    z = picked.astype(np.float64)
    few = len(z) < z.shape[1]
    if few:
        # The best weights are sums of picks: they need no more dimensions than picks.
        basis, within = np.linalg.qr(z.T)
        z = within.T
    shape = len(classes), z.shape[1] + 1

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercepts = np.split(parameters.reshape(shape), [-1], axis=1)
        logs = log_softmax(z @ weights.T + intercepts.T, axis=1)
        value = -logs[np.arange(len(z)), target].mean() + PENALTY / 2 * (weights**2).sum()
        slopes = np.exp(logs)
        slopes[np.arange(len(z)), target] -= 1
        slopes /= len(z)
        gradient = np.hstack([slopes.T @ z + PENALTY * weights, slopes.sum(axis=0)[:, None]])
        return value, gradient.ravel()

    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-5}
    best = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options).x
    weights, intercepts = np.split(best.reshape(shape), [-1], axis=1)
    weights = basis @ weights.T if few else weights.T
    return Probe(classes, weights.astype(np.float32), intercepts.ravel())


# Label propagation


def graph_neighbors(x: np.ndarray) -> Neighbors:
    """Find the GRAPH_NEIGHBORS nearest other rows of every row, by their places."""
    return nearest(x, x, GRAPH_NEIGHBORS + 1).without(np.arange(len(x)))


def graph(found: Neighbors) -> Graph:
    """Make the graph of the nearest other rows of every row; found has their places, -1 for none.

    A has cos³ at each row's neighbors (negative ones: 0); W = A + Aᵀ; S = D^-½ W D^-½ with D the sums of W's
    rows (Iscen et al., Label Propagation for Deep Semi-supervised Learning, CVPR 2019, equations 8 to 10).
    """
    n, k = found.image_ids.shape
    there = found.image_ids.ravel() >= 0
    places = np.repeat(np.arange(n), k)[there], found.image_ids.ravel()[there]
    # Of unit rows.
    cosines = np.maximum(1 - found.sq_dists.ravel()[there] / 2, 0) ** GRAPH_POWER
    a = coo_array((cosines, places), shape=(n, n)).tocsr()
    w = (a + a.T).tocsr()
    degrees = w.sum(axis=1)
    # A row that is like no other stays alone.
    weights = np.sqrt(np.where(degrees > 0, degrees, 1))
    scale = dia_array((1 / weights[None], 0), shape=(n, n))
    return Graph((scale @ w @ scale).tocsr(), weights)


def propagate(graph: Graph, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tell the labels of all rows from those of a few, along the graph: int64 [n], -1 where none arrives.

    Z solves (I - DIFFUSION · S) Z = Y, and the label of a row is where its Z is largest (Zhou et al.,
    Learning with Local and Global Consistency, NIPS 2004). Y is 0 but at (row, its label); there it is 1 /
    the sum of the weights of the rows with this label. The paper has 1: then far from all labels the class
    with the most of them wins, as each ends up with what it began with. (On the sets of `PENALTY` equal
    shares told 1 to 13 points more.)
    """
    classes, target = np.unique(labels, return_inverse=True)
    n = len(graph.weights)
    each = (1 / np.bincount(target, graph.weights[rows]))[target]
    most, told = np.zeros(n), np.full(n, -1)
    for part in blocks(len(classes), n):
        here = np.flatnonzero((part.start <= target) & (target < part.stop))
        y = np.zeros((n, part.stop - part.start))
        y[rows[here], target[here] - part.start] = each[here]
        z = _solve(graph.affinities, y)
        largest = z.max(axis=1)
        told = np.where(largest > most, classes[part][z.argmax(axis=1)], told)
        most = np.maximum(largest, most)
    return told


def _solve(s: csr_array, y: np.ndarray) -> np.ndarray:
    """Solve (I - DIFFUSION · S) Z = Y by conjugate gradients, all columns at once: float64 [n, c]."""
    z, residual, direction = np.zeros_like(y), y.copy(), y.copy()
    size = (y**2).sum(axis=0)
    goal = RESIDUAL**2 * size
    # Far fewer are needed: the condition number is at most (1 + DIFFUSION) / (1 - DIFFUSION).
    for _ in range(1000):
        if (size <= goal).all():
            break
        moved = direction - DIFFUSION * (s @ direction)
        step = size / np.maximum((direction * moved).sum(axis=0), 1e-300)
        z += step * direction
        residual -= step * moved
        before, size = size, (residual**2).sum(axis=0)
        direction = residual + size / np.maximum(before, 1e-300) * direction
    return z
