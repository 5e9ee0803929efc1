"""Methods of selection beside each other: what is compared, the values, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from selective_ray import active
from selective_ray.config import METHOD_KEYS
from selective_ray.errors import UsageError
from selective_ray.figures import COMPARED, deviation, shown
from selective_ray.paired import LEVEL, Difference, Equal, difference, equal_budget

# Not usl-t: its clusters are trained on images, and not in this process.
METHODS = (*(method for method in METHOD_KEYS if method != "usl-t"), *active.METHODS)
# All others are compared with these two.
AGAINST = ("random", "usl")
# They see labels before all are picked, which the others do not.
SEES_LABELS = ("stratified", *active.METHODS)
# What a buyer of labels looks at first.
MAIN = ("linear_probe", "label_propagation")


@dataclass(frozen=True)
class Plan:
    """What is compared: methods, budgets ascending, seeds 0, 1, …; active learning in so many rounds, on so
    many images at most. set: `section.key=value` over what the run was made with. fixmatch: whether a
    classifier is trained on the labels of every selection and on all other images."""

    labels: str | None
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: int
    rounds: int
    sample: int
    set: tuple[str, ...] = ()
    fixmatch: bool = False

    def check(self) -> None:
        """Raise UsageError where no comparison can be that."""
        for method in self.methods:
            if method not in METHODS:
                raise UsageError(f"there is no method {method!r} to compare; there are {', '.join(METHODS)}")
        for smaller, larger in pairwise(self.budgets):
            if larger <= smaller:
                raise UsageError(f"--budgets must increase, and {larger} follows {smaller}")
        if not self.budgets or self.budgets[0] < 1:
            raise UsageError("give --budgets of 1 or more, as 40,100,400")
        if set(self.methods) & set(active.METHODS):
            active.batches(self.budgets[0], self.rounds)


@dataclass(frozen=True)
class Cell:
    """The picks of one method, budget and seed, judged: figures by name, seconds of picking."""

    method: str
    budget: int
    seed: int
    figures: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Compared:
    """All cells, and on what: images of the run, how many of them were compared on, and their classes."""

    run: str
    page: str
    source: str
    images: int
    labeled: int
    compared: int
    classes: int
    plan: Plan
    cells: list[Cell]

    def values(self, method: str, budget: int, figure: str) -> np.ndarray:
        """Return a figure of a method by seed, float64 [s]; nothing where it is not known."""
        return self._values.get((method, budget, figure), np.empty(0))

    @cached_property
    def _values(self) -> dict[tuple[str, int, str], np.ndarray]:
        found: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
        for cell in self.cells:
            for figure, value in {**cell.figures, "seconds": cell.seconds}.items():
                found.setdefault((cell.method, cell.budget, figure), []).append((cell.seed, value))
        return {key: np.array([value for _, value in sorted(some)]) for key, some in found.items()}

    def difference(self, method: str, other: str, budget: int, figure: str) -> Difference:
        """Compare a figure of two methods over the same seeds."""
        return difference(self.values(method, budget, figure), self.values(other, budget, figure))

    def equal_budget(self, method: str, budget: int, figure: str) -> Equal:
        """Find the budget at which random picks reach a figure of a method."""
        tried = self.random_budgets(figure)
        random = np.stack([self.values("random", one, figure) for one in tried])
        return equal_budget(self.values(method, budget, figure), np.array(tried, np.float64), random)

    def random_budgets(self, figure: str) -> list[int]:
        """Return the budgets that random picks were judged at by a figure, ascending."""
        return sorted({c.budget for c in self.cells if c.method == "random" and figure in c.figures})

    @property
    def main(self) -> tuple[str, ...]:
        """The figures that a buyer of labels looks at first."""
        return (*MAIN, "fixmatch") if self.plan.fixmatch else MAIN

    def ranked(self) -> list[str]:
        """Return the methods by the mean of linear probe and label propagation, over budgets; best first."""
        return sorted(self.plan.methods, key=lambda method: (-self.score(method).mean(), method))

    def score(self, method: str) -> np.ndarray:
        """Return the mean of linear probe and label propagation over the budgets, by seed: float64 [s]."""
        return np.mean([self.values(method, b, f) for b in self.plan.budgets for f in MAIN], axis=0)


# For machines, and for people at a terminal


def as_json(found: Compared) -> dict[str, Any]:
    """Return all values, and what follows from them."""
    methods = []
    for method in found.ranked():
        for budget in found.plan.budgets:
            figures = {name: found.values(method, budget, name).tolist() for name in (*COMPARED, "seconds")}
            against = {
                other: {
                    name: _told(found.difference(method, other, budget, name))
                    for name, values in figures.items()
                    if values
                }
                for other in AGAINST
                if other != method
            }
            equal = {name: found.equal_budget(method, budget, name) for name in found.main}
            methods.append(
                {
                    "method": method,
                    "sees_labels": method in SEES_LABELS,
                    "budget": budget,
                    "figures": {name: values for name, values in figures.items() if values},
                    "difference": against,
                    # null: more than the largest budget of random picks.
                    "random_needs": {
                        name: {
                            key: value if value != math.inf else None for key, value in one._asdict().items()
                        }
                        for name, one in equal.items()
                    },
                }
            )
    return {
        "run": found.run,
        "page": found.page,
        "labels": found.source,
        "images": found.images,
        "compared": found.compared,
        "classes": found.classes,
        "seeds": found.plan.seeds,
        "methods": methods,
    }


def _told(found: Difference) -> dict[str, Any]:
    return {**found._asdict(), "noise": found.noise}


def lines(found: Compared) -> Iterator[str]:
    """Tell a person what came out: a table for each budget and each main figure."""
    yield f"images     {found.compared:,} of {found.images:,}, {found.classes:,} classes, from {found.source}"
    yield f"seeds      {found.plan.seeds}; intervals hold {100 * LEVEL:.0f} %, over seeds"
    for figure in found.main:
        for budget in found.plan.budgets:
            yield ""
            title = f"{COMPARED[figure]}, {budget:,} labels"
            yield f"{title:<34}{'to random':>25}{'to usl':>25}{'random needs':>22}"
            for method in found.ranked():
                values = found.values(method, budget, figure)
                mark = " *" if method in SEES_LABELS else ""
                name = f"{method}{mark}"
                cells = [
                    written(found.difference(method, other, budget, figure)) if method != other else ""
                    for other in AGAINST
                ]
                equal = needs(found.equal_budget(method, budget, figure), found.random_budgets(figure))
                yield (
                    f"{name:<17}{shown(figure, float(values.mean()), deviation(values)):>17}"
                    f"{cells[0]:>25}{cells[1]:>25}{'' if method == 'random' else equal:>22}"
                )
    yield ""
    if set(found.plan.methods) & set(SEES_LABELS):
        yield "*          sees labels before all are picked: an oracle, or active learning in rounds"
    yield "~          inside the noise: the interval holds 0, or there are too few seeds for one"
    yield f"page       {found.page}"


def written(found: Difference, scale: float = 100.0) -> str:
    """Write a difference of shares in points, with its interval; ~ before one inside the noise."""
    if found.low is None or found.high is None:
        return f"~{scale * found.mean:+.1f}"
    return (
        f"{'~' if found.noise else ''}{scale * found.mean:+.1f} "
        f"({scale * found.low:+.1f} to {scale * found.high:+.1f})"
    )


def needs(found: Equal, tried: Sequence[int]) -> str:
    """Write how many labels random picks need, with the interval."""
    if found.low is None or found.high is None:
        return _labels(found.budget, tried)
    return f"{_labels(found.budget, tried)} ({_labels(found.low, tried)} to {_labels(found.high, tried)})"


def _labels(budget: float, tried: Sequence[int]) -> str:
    if budget == math.inf:
        return f">{tried[-1]:,}"
    return f"≤{tried[0]:,}" if budget <= tried[0] else f"{budget:,.0f}"
