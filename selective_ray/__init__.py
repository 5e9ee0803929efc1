"""Pick the images worth labeling out of a pile of unlabeled ones.

    from selective_ray import select
    picks = select(embeddings, budget=40).rows

`embeddings` is an array [n, d]; `selective-ray` is the command for images and for clusters.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "select"]


def __getattr__(name: str) -> Any:
    """Import `select` when it is first asked for: it brings FAISS along."""
    if name == "select":
        from selective_ray.in_memory import select

        return select
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
