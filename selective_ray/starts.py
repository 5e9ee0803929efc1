"""k-means||, the alternative to starting K-Means at random rows.

It (Bahmani et al., Scalable K-Means++, VLDB 2012) draws candidates in a few rounds, each row with a
chance in proportion to its squared distance to the candidates so far, and chooses the starts among them by
k-means++, each weighing as many rows as are nearest to it. Chances hang on a row's position and the seed
alone, sums are order-free, and distances are direct differences: whoever holds the rows, the draws are the
same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from selective_ray.assignment import assign
from selective_ray.distances import product_error, sq_dists_direct
from selective_ray.kmeans import initial_rows

# Rounds, and candidates drawn in a round for each start that is wanted. The authors found five rounds enough
# wherever they draw more candidates than starts.
ROUNDS = 5
OVERSAMPLING = 1.0


def uniform(positions: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Return a number in [0, 1) for each row position, float64: a hash of position, seed and purpose.

    Two rounds of SplitMix64 (Steele et al., OOPSLA 2014), whose bits pass the usual tests of randomness.
    """
    key = _mixed(np.uint64(seed) + (np.uint64(purpose) << np.uint64(32)))
    return (_mixed(positions.astype(np.uint64) ^ key) >> np.uint64(11)) * 2.0**-53


def _mixed(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Oversampling:
    """The rows one process holds, with the nearest of the candidates drawn so far.

    x float32 [n, d], positions int64 [n] among all rows, total the number of rows of all processes.
    """

    def __init__(self, x: np.ndarray, positions: np.ndarray, total: int) -> None:
        self.x, self.positions = x, positions
        # Squared distances are at most 4, and n of them must not overflow.
        self.scale = 2.0 ** (60 - max(0, int(total - 1).bit_length()))
        self.nearest = np.full(len(x), -1, np.int64)
        self.sq_dists = np.full(len(x), np.inf)
        self.rounds = 0
        self.candidates = 0

    def offer(self, candidates: np.ndarray) -> None:
        """Take in the candidates of a round, float32 [e, d]; of equally near ones the first stays."""
        self.rounds += 1
        if len(candidates):
            labels = assign(self.x, candidates)
            sq_dists = sq_dists_direct(self.x, np.arange(len(self.x)), candidates, labels)
            nearer = sq_dists < self.sq_dists
            self.sq_dists[nearer] = sq_dists[nearer]
            self.nearest[nearer] = labels[nearer] + self.candidates
        self.candidates += len(candidates)

    def cost(self) -> int:
        """Return the sum of squared distances to the candidates in fixed point, which no order changes."""
        return int(np.rint(self.sq_dists * self.scale).astype(np.int64).sum())

    def draw(self, cost: int, wanted: float, seed: int) -> np.ndarray:
        """Draw rows by their squared distances, `wanted` of all on average: positions int64."""
        if not cost:
            return np.empty(0, np.int64)
        chance = wanted * np.rint(self.sq_dists * self.scale) / cost
        return self.positions[uniform(self.positions, seed, self.rounds) < chance]

    def weights(self) -> np.ndarray:
        """Count the rows nearest to each candidate, int64 [candidates]."""
        return np.bincount(self.nearest, minlength=self.candidates)


def choose(candidates: np.ndarray, weights: np.ndarray, m: int, seed: int) -> np.ndarray:
    """Choose m of the candidates by weighted k-means++: places int64, fewer where fewer differ.

    candidates float32 [e, d], weights int64 [e] of which one is above zero. D. Arthur, S. Vassilvitskii,
    k-means++, SODA 2007. Products propose which candidates a new start is nearer to; those are measured.
    """
    rng = np.random.default_rng([seed, m])
    norms = np.einsum("ed,ed->e", candidates, candidates)
    error = product_error(candidates.shape[1], *[float(np.sqrt(norms.max(initial=1.0)))] * 2)
    sq_dists = np.full(len(candidates), np.inf)
    mass = weights.astype(np.float64)
    chosen: list[int] = []
    for _ in range(min(m, len(candidates))):
        total = np.cumsum(mass)
        if total[-1] <= 0:
            break
        # The last place with mass, should rounding put the draw beyond it.
        place = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        place = min(place, int(np.flatnonzero(mass)[-1]))
        chosen.append(place)
        near = norms - 2 * (candidates @ candidates[place]) + norms[place]
        some = np.flatnonzero(near <= sq_dists + error)
        exact = sq_dists_direct(candidates, some, candidates, np.full(len(some), place))
        sq_dists[some] = np.minimum(sq_dists[some], exact)
        mass = weights * sq_dists
    return np.array(chosen, np.int64)


def draw_starts(
    fetch: Callable[[np.ndarray], np.ndarray],
    offer: Callable[[np.ndarray], None],
    cost: Callable[[], int],
    draw: Callable[[int, float], np.ndarray],
    weights: Callable[[], np.ndarray],
    *,
    n: int,
    m: int,
    seed: int,
) -> np.ndarray:
    """Choose the positions of m starts among n rows by k-means||: int64 [m], all different.

    `fetch` returns rows by position, float32 [e, d]; `offer` sends them out as candidates; `cost` sums the
    squared distances to the nearest candidate, `draw` draws the positions of the next, and `weights` counts
    the rows nearest to each. Where rows repeat each other so often that too few candidates differ, rows of
    the seeded permutation fill up.
    """
    drawn = [initial_rows(n, 1, seed)]
    candidates = [fetch(drawn[0])]
    offer(candidates[0])
    for _ in range(ROUNDS):
        drawn.append(np.sort(draw(cost(), OVERSAMPLING * m)))
        candidates.append(fetch(drawn[-1]))
        offer(candidates[-1])
    chosen = choose(np.concatenate(candidates), weights(), m, seed)
    return _fill(np.concatenate(drawn)[chosen], n, m, seed)


def _fill(positions: np.ndarray, n: int, m: int, seed: int) -> np.ndarray:
    """Add rows of the seeded permutation until there are m different positions: int64 [m]."""
    more = initial_rows(n, min(n, m + len(positions)), seed)
    return np.concatenate([positions, more[~np.isin(more, positions)]])[:m]
