"""Active learning, as a point of reference: labels are bought in rounds, by what a linear head is unsure of.

The first round is drawn at random. Before each later one a head (`evaluation.fit_probe`) learns from the
labels so far, over frozen embeddings, and tells which rows to buy. It needs a person who answers between the
rounds, which a selection does not; here a file of labels answers. In `compare` only.

entropy: the rows whose answer has the largest entropy. margin: those with the smallest difference of the
two largest probabilities (Scheffer et al., 2001). badge: k-means++ over the gradients that the rows would
give the head's weights, if its answers were right (Ash et al., Deep Batch Active Learning by Diverse,
Uncertain Gradient Lower Bounds, ICLR 2020). core-set: the rows farthest from those labeled (`k_center`).

Deviation: with frozen embeddings only the head learns, anew in every round; so core-set does not depend on
labels at all. Rows that are equally good are taken in a drawn order.
"""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from selective_ray import evaluation, k_center
from selective_ray.errors import UsageError
from selective_ray.random_picks import draw, hashed

METHODS = ("entropy", "margin", "badge", "core-set")


def batches(budget: int, rounds: int) -> list[int]:
    """Return how many rows each round buys; the first ones one more where the budget is no multiple."""
    if rounds > budget:
        raise UsageError(
            f"{rounds} rounds cannot share a budget of {budget}: each buys one label at least; lower --rounds"
        )
    return [budget // rounds + (number < budget % rounds) for number in range(rounds)]


def picks(
    method: str, x: np.ndarray, z: np.ndarray, labels: np.ndarray, *, budget: int, rounds: int, seed: int
) -> np.ndarray:
    """Buy labels in rounds: rows int64 [budget], in the order in which they were bought.

    x float32 [n, d] unit rows; z those in `evaluation.standard` units; labels int64 [n], of which only those
    bought are looked at.
    """
    first, *later = batches(budget, rounds)
    every = np.arange(len(x))
    bought = draw(every, every, first, seed, np.empty(0, np.int64)).image_ids
    for number, count in enumerate(later, 1):
        if method == "core-set":
            more = _farthest(x, bought, count, seed)
        else:
            rest = np.setdiff1d(every, bought)
            head = evaluation.fit_probe(z[bought], labels[bought])
            p = softmax(head.scores(z[rest]).astype(np.float64), axis=1)
            numbers = hashed(rest, seed * 1_000_003 + number)
            if method == "badge":
                rng = np.random.default_rng([seed, number])
                more = rest[spread_gradients(p, z[rest], count, rng, numbers)]
            else:
                score = entropy(p) if method == "entropy" else -margin(p)
                more = rest[np.lexsort((numbers, -score))[:count]]
        bought = np.concatenate([bought, more])
    return bought


def entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropies of probabilities [n, c], float64 [n], in nats."""
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)


def margin(p: np.ndarray) -> np.ndarray:
    """Return by how much the largest of probabilities [n, c] is above the next: float64 [n]."""
    if p.shape[1] == 1:
        return np.ones(len(p))
    largest = np.sort(p, axis=1)[:, -2:]
    return largest[:, 1] - largest[:, 0]


def _farthest(x: np.ndarray, bought: np.ndarray, count: int, seed: int) -> np.ndarray:
    rows = k_center.Farthest(x, np.arange(len(x)), seed)
    for row in bought.tolist():
        rows.take(rows.pick_of(row))
    found = []
    for _ in range(count):
        found.append(rows.best().image_id)
        rows.take(rows.pick_of(found[-1]))
    return np.array(found, np.int64)


def spread_gradients(
    p: np.ndarray, z: np.ndarray, count: int, rng: np.random.Generator, numbers: np.ndarray
) -> np.ndarray:
    """Choose rows by k-means++ over gradients (p - its largest entry's unit vector) ⊗ z: places [count].

    The first has the largest gradient, each other is drawn in proportion to its squared distance to the
    nearest chosen one. Squared distances come from products of the two factors. Where all are 0, the smallest
    of numbers uint64 [n] comes next.
    """
    a = p.copy()
    a[np.arange(len(a)), p.argmax(axis=1)] -= 1
    z = z.astype(np.float64)
    sq_norms = (a**2).sum(axis=1) * (z**2).sum(axis=1)
    chosen = [int(np.lexsort((numbers, -sq_norms))[0])]
    nearest = np.full(len(a), np.inf)
    free = np.ones(len(a), bool)
    while True:
        last = chosen[-1]
        free[last] = False
        if len(chosen) == count:
            return np.array(chosen)
        sq_dists = sq_norms + sq_norms[last] - 2 * (a @ a[last]) * (z @ z[last])
        nearest = np.where(free, np.minimum(nearest, np.maximum(sq_dists, 0)), 0)
        total = nearest.sum()
        if total > 0:
            chosen.append(int(rng.choice(len(a), p=nearest / total)))
        else:
            left = np.flatnonzero(free)
            chosen.append(int(left[numbers[left].argmin()]))
