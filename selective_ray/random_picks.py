"""Random picks: those whose numbers, drawn for every row from its position and the seed, are smallest.

A uniform draw without replacement, as far as hashed numbers are random. The number of a row depends on
nothing else, so that any process can draw among its own rows, and a larger draw contains a smaller one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def hashed(keys: np.ndarray, draw: int) -> np.ndarray:
    """Return numbers that look random, uint64 [n], of whole numbers [n] and a seed (SplitMix64)."""
    x = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(draw)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Drawn(NamedTuple):
    """The images with the smallest numbers: numbers uint64 and image_ids int64 [count], ascending by both."""

    numbers: np.ndarray
    image_ids: np.ndarray

    def merge(self, other: Drawn, count: int) -> Drawn:
        """Keep the `count` smallest of both."""
        return Drawn(*(np.concatenate(both) for both in zip(self, other, strict=True))).first(count)

    def first(self, count: int) -> Drawn:
        """Keep the `count` smallest."""
        order = np.lexsort((self.image_ids, self.numbers))[:count]
        return Drawn(self.numbers[order], self.image_ids[order])


def draw(image_ids: np.ndarray, positions: np.ndarray, count: int, seed: int, without: np.ndarray) -> Drawn:
    """Draw `count` of the images int64 [n], none of those `without`; all where there are fewer.

    positions int64 [n] are those of the images among all rows.
    """
    rest = ~np.isin(image_ids, without)
    return Drawn(hashed(positions[rest], seed), image_ids[rest]).first(count)
