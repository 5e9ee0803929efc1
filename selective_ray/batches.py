"""Which images a step of training sees, and its random numbers: pure functions of the seed and the step.

So neither depends on how many workers share the work, and to resume is to begin at another step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rounds of the Feistel network: from four on it is a pseudorandom permutation (Luby and Rackoff, 1988).
_ROUNDS = 6
# What draws from the same seed for different purposes.
LABELED, UNLABELED, WEAK, STRONG = range(4)
# The views of contrastive learning, from this number on; and who stands in for an image, at each attempt.
VIEWS, INSTEAD = 100, 1000


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scatter the bits of uint64 (the finalizer of SplitMix64; Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*numbers: int) -> np.uint64:
    """Make one number of several, so that other numbers give an unrelated one."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mixed(key + np.array([number], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key[0]


def stream(positions: np.ndarray, n: int, seed: int, purpose: int) -> np.ndarray:
    """Return which of n things is at each position of an endless stream that shuffles them anew every n.

    positions int64 [b] of 0 and more; returns int64 [b] in [0, n). Every n positions from a multiple of n
    on hold everything once. Takes no memory that grows with n: the order is a Feistel network on the
    numbers below a power of four, which is walked until it comes back below n (Black and Rogaway, 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    epochs, places = np.divmod(positions, n)
    keys = _mixed(epochs.astype(np.uint64) + _key(seed, purpose))
    found = places.astype(np.uint64)
    left = np.arange(len(found))
    while len(left):
        x, key = found[left], keys[left]
        high, rest = x >> shift, x & low
        for i in range(_ROUNDS):
            high, rest = rest, high ^ (_mixed(rest + key + np.uint64(i << 32)) & low)
        found[left] = (high << shift) | rest
        left = left[found[left] >= n]
    return found.astype(np.int64)


def draws(seed: int, step: int, slots: int, count: int, purpose: int) -> np.ndarray:
    """Return uniform random numbers in [0, 1) of a step, float64 [slots, count]: each slot has its own."""
    key = np.array([_key(seed, purpose), step], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random((slots, count))


def nth_left(places: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the ids at some places among 0, 1, 2, … without those left out (ascending int64)."""
    before = left_out - np.arange(len(left_out))
    return places + np.searchsorted(before, places, side="right")


@dataclass(frozen=True)
class Plan:
    """What every step sees: `labeled` of the labeled images, and `unlabeled` of all that can be read.

    labeled_ids: image ids int64 of the labeled, ascending; images: how many ids there are, from 0; rejected:
    the ids among them that cannot be read, int64 ascending.
    """

    labeled_ids: np.ndarray
    images: int
    rejected: np.ndarray
    labeled: int
    unlabeled: int
    seed: int

    @property
    def slots(self) -> int:
        """Images of a step: the labeled ones come first."""
        return self.labeled + self.unlabeled

    def step(self, t: int) -> np.ndarray:
        """Return the image ids of step t, int64 [slots]."""
        where = t * self.labeled + np.arange(self.labeled)
        known = self.labeled_ids[stream(where, len(self.labeled_ids), self.seed, LABELED)]
        where = t * self.unlabeled + np.arange(self.unlabeled)
        n = self.images - len(self.rejected)
        return np.concatenate([known, nth_left(stream(where, n, self.seed, UNLABELED), self.rejected)])

    def instead(self, t: int, slots: np.ndarray, attempt: int) -> np.ndarray:
        """Return the image ids that stand in for those of some slots of step t, unlabeled, int64 [b]."""
        n = self.images - len(self.rejected)
        found = stream(t * self.slots + slots, n, self.seed, INSTEAD + attempt)
        return nth_left(found, self.rejected)
