"""ProbCover: each pick is the image with most others within a radius that no earlier pick covers.

Source: Yehuda et al., Active Learning Through a Covering Lens (NeurIPS 2022). It is `max_herding` with a
kernel that is 1 within the radius and 0 beyond.

Deviations: an image sees its kept neighbors and those that keep it, not all within the radius. The paper
takes the largest radius at which most balls are pure by the labels of K-Means with as many clusters as
classes, which are not known here: it is a setting, else the root of the median mean squared distance to the
neighbors. Among rows that cover as many, and when everything is covered, the one wins that adds most to
MaxHerding's value with that width, the published code's being any.
"""

from __future__ import annotations

import numpy as np

from selective_ray import max_herding
from selective_ray.max_herding import gaussian

# An image that is covered weighs as much as this many that are only nearer to a pick.
OUTWEIGHS = 1 << 16
ONE = 1 << 40


def top_hat(sq_dists: np.ndarray, radius: float) -> np.ndarray:
    """Return the kernel in fixed point, int64 [e]: ONE within the radius, and less than 1 / OUTWEIGHS more
    the nearer it is."""
    inside = sq_dists.astype(np.float64) <= radius**2
    return ONE * inside + gaussian(sq_dists, radius) // (max_herding.ONE * OUTWEIGHS // ONE)
