"""Greedy selection: one image after the other, each the best beside those picked before.

The loop is `picks`; it is given a step that lets the last pick be met and returns the best row that is left.
In memory it is that of one `Met`; on Ray each actor has one for its shards, and of their answers the largest
by (utility, -image_id) counts. What a method keeps of every row lies beside the row; a pick travels with all
that others must know of it.

A method is a class with three functions: `best()`, the best row that is not picked; `pick_of(row)`, any row
as a pick; `take(pick)`, what a pick changes. Its rows have ascending image ids: among equals the first wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Rows that can not be picked.
NEVER = -np.inf


class Pick(NamedTuple):
    """A row that may be picked: its utility when it was the best, and what is told of it to all rows."""

    utility: float
    image_id: int
    told: tuple[np.ndarray, ...]

    @staticmethod
    def none() -> Pick:
        """Return the identity of `merge`."""
        return Pick(NEVER, np.iinfo(np.int64).max, ())

    def merge(self, other: Pick) -> Pick:
        """Keep the larger by (utility, -image_id)."""
        return max(self, other, key=lambda pick: (pick.utility, -pick.image_id))


class Method(Protocol):
    """Rows as a method of picking sees them."""

    def best(self) -> Pick:
        """Return the best row that is not picked."""

    def pick_of(self, row: int) -> Pick:
        """Return a row as a pick."""

    def take(self, pick: Pick) -> None:
        """Let the rows know of a pick, which may be one of them."""


class Met:
    """The rows of one process, and how many picks they have met: none of them twice."""

    def __init__(self, rows: Method) -> None:
        self.rows, self.count = rows, 0

    def best(self, since: int, picked: Sequence[Pick]) -> Pick | None:
        """Meet the picks from the one with number `since` on, and return the best row.

        None where earlier ones have not been met: the process is a new one, and is to be told all.
        """
        if self.count < since:
            return None
        for pick in picked[self.count - since :]:
            self.rows.take(pick)
            self.count += 1
        return self.rows.best()


def picks(
    step: Callable[[int, Sequence[Pick]], Pick | None],
    fixed: Sequence[Pick],
    count: int,
    watch: Callable[[Pick], None] = lambda pick: None,
) -> list[Pick]:
    """Pick `count` rows besides those that are fixed, which are met first."""
    picked, told = list(fixed), 0
    while len(picked) < len(fixed) + count:
        best = step(told, picked[told:])
        if best is None:
            # Somebody begins anew.
            best = step(0, picked)
        told = len(picked)
        picked.append(best)
        watch(best)
    return picked[len(fixed) :]
