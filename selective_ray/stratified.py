"""Stratified picks: as many of every class as can be, drawn at random within each. An oracle.

It is told the labels of the images that it picks from, which is what a selection is to save: it says how much
of the way from random picks is due to the balance of classes, and is never a method to use. FixMatch (Sohn et
al., NeurIPS 2020) and what followed it report labels that were drawn like this.

Deviation: where the budget is no multiple of the classes, or a class has too few images, the rest goes to the
classes that have fewest picks, in an order drawn with the seed.
"""

from __future__ import annotations

import numpy as np

from selective_ray.errors import UserError
from selective_ray.random_picks import draw


def quotas(have: np.ndarray, there: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return how many of each class to pick, int64 [c].

    have int64 [c] are picked already, there int64 [c] can be. One after the other goes to the class with
    fewest, ties in a drawn order.
    """
    if there.sum() < count:
        raise UserError(
            f"a stratified selection picks images with a label only: there are {int(there.sum()):,} of them, "
            f"and {count:,} to pick; lower the budget, or give labels of more images"
        )
    order = np.random.default_rng(seed).permutation(len(there))
    total, left = have[order].astype(np.float64), there[order].copy()
    total[left == 0] = np.inf
    taken = np.zeros(len(there), np.int64)
    for _ in range(count):
        fewest = int(total.argmin())
        taken[fewest] += 1
        left[fewest] -= 1
        total[fewest] = total[fewest] + 1 if left[fewest] else np.inf
    found = np.empty(len(there), np.int64)
    found[order] = taken
    return found


def picks(image_ids: np.ndarray, codes: np.ndarray, count: int, seed: int, fixed: np.ndarray) -> np.ndarray:
    """Pick `count` images besides the fixed ones: image ids int64 [count].

    codes int64 [n] are the classes of image_ids int64 [n], all there are, -1 where not known. Raises
    UserError where too few are known.
    """
    classes = int(codes.max(initial=-1)) + 1
    known = codes >= 0
    mine = np.isin(image_ids, fixed)
    have = np.bincount(codes[known & mine], minlength=classes)
    wanted = quotas(have, np.bincount(codes[known & ~mine], minlength=classes), count, seed)
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], np.arange(classes + 1))
    found = [np.empty(0, np.int64)]
    for c in np.flatnonzero(wanted):
        rows = order[first[c] : first[c + 1]]
        found.append(draw(image_ids[rows], rows, int(wanted[c]), seed, fixed).image_ids)
    return np.concatenate(found)
