"""Differences of methods over the same seeds, with bootstrap intervals: what is inside the noise.

A seed gives one value to each method. Only the seeds are drawn anew (with replacement, DRAWS times), for both
methods alike; so an interval tells what other seeds would give on these images, not what other images would.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Fewer seeds give no interval.
FEWEST = 3
DRAWS = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """The mean of paired differences, its interval (None: too few seeds), and how many are above, below 0."""

    mean: float
    low: float | None
    high: float | None
    wins: int
    losses: int

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def drawn_seeds(seeds: int) -> np.ndarray:
    """Draw the seeds anew, DRAWS times: int64 [DRAWS, seeds], always the same."""
    return np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare values float64 [s] of the same seeds.

    The interval is that of the percentiles of the mean, widened by sqrt(s / (s - 1)), as the bootstrap's
    spread is too small by that factor (Hesterberg, What Teachers Should Know About the Bootstrap, 2015).
    """
    values = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean, s = float(values.mean()), len(values)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    if s < FEWEST:
        return Difference(mean, None, None, wins, losses)
    around = (values[drawn_seeds(s)].mean(axis=1) - mean) * np.sqrt(s / (s - 1))
    low, high = np.quantile(around, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(mean, float(mean + low), float(mean + high), wins, losses)


class Equal(NamedTuple):
    """The budget at which random picks do as well, and its interval (None: too few seeds).

    Infinite where the largest budget tried does not suffice, the smallest one tried where that does already.
    """

    budget: float
    low: float | None
    high: float | None


def equal_budget(ours: np.ndarray, budgets: np.ndarray, random: np.ndarray) -> Equal:
    """Find the budget at which random picks are as accurate as a method: ours [s], the same seeds.

    random [b, s] is their accuracy at budgets [b] ascending. Between budgets it is linear in the logarithm
    of the budget; where its mean falls with more labels, the largest so far counts.
    """
    found = float(_reached(ours.mean()[None], budgets, random.mean(axis=1)[None])[0])
    s = len(ours)
    if s < FEWEST:
        return Equal(found, None, None)
    seeds = drawn_seeds(s)
    many = _reached(ours[seeds].mean(axis=1), budgets, random[:, seeds].mean(axis=2).T)
    low, high = np.quantile(many, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Equal(found, float(low), float(high))


def _reached(wanted: np.ndarray, budgets: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Return where curves [q, b] first reach what is wanted [q]: a budget each, float64 [q]."""
    curves, logs = np.maximum.accumulate(curves, axis=1), np.log(budgets)
    at = (curves < wanted[:, None]).sum(axis=1)
    inside = (at > 0) & (at < len(budgets))
    right = np.clip(at, 1, len(budgets) - 1) if len(budgets) > 1 else np.zeros(len(at), np.int64)
    left, q = np.maximum(right - 1, 0), np.arange(len(at))
    rise = np.where(inside, curves[q, right] - curves[q, left], 1.0)
    share = np.where(inside, (wanted - curves[q, left]) / rise, 0.0)
    between = np.exp(logs[left] + share * (logs[right] - logs[left]))
    return np.where(at == 0, budgets[0], np.where(at == len(budgets), np.inf, between))
