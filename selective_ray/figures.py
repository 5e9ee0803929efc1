"""What selections are judged by, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# With the words for people. These are shares of rows whose label is told right.
ACCURACIES = {
    "linear_probe": "linear probe",
    "nearest_neighbor": "nearest neighbor",
    "five_neighbors": "5 nearest neighbors",
    "label_propagation": "label propagation",
}
FIGURES = {
    **ACCURACIES,
    "coverage": "coverage",
    "classes": "classes with a pick",
    "spread": "spread of class counts",
}
# With what only a comparison tells, on request.
COMPARED = {**FIGURES, "fixmatch": "FixMatch"}
# Between 0 and 1.
SHARES = (*ACCURACIES, "coverage")
IN_PERCENT = {*SHARES, "fixmatch"}


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample, None where that is one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def shown(name: str, mean: float, spread: float | None) -> str:
    """Write a figure and its standard deviation: shares in percent."""
    if name in IN_PERCENT:
        return f"{100 * mean:.1f} %" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def difference(name: str, value: float) -> str:
    """Write a difference of two figures."""
    # Adding zero takes the sign off a negative one.
    return f"{round(100 * value if name in IN_PERCENT else value, 1) + 0.0:+.1f}"
