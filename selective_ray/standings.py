"""The figures of judged selections, for machines and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from selective_ray.figures import FIGURES, deviation, difference, shown
from selective_ray.judging import Group, Judged

# Classes without a pick that are named.
MISSING_NAMED = 20


def as_json(found: Iterable[Judged]) -> list[dict[str, Any]]:
    """Return all figures, for machines: by set of embeddings, then by group of selections."""
    return [
        {
            "embeddings": judged.embeddings,
            "images": judged.images,
            "sampled": judged.sampled,
            "judged": judged.judged,
            "labels": judged.truth.source if judged.labeled else None,
            "labeled": judged.labeled,
            "classes": len(judged.truth.classes),
            "radius": judged.radius,
            "selections": [
                {
                    "runs": [
                        {"run": s.run.uri, "seed": s.seed, "class_counts": counts}
                        for s, counts in zip(group.selections, group.class_counts, strict=True)
                    ],
                    "budget": group.selections[0].budget,
                    "method": group.selections[0].method,
                    "picks": {name: _numbers(group.picks, name) for name in _names(group.picks)},
                    "random": {name: _numbers(group.draws, name) for name in _names(group.draws)},
                    "difference": {
                        name: _difference(name, group)
                        for name in _names(group.draws)
                        if name in group.picks[0]
                    },
                    "without_a_pick": _without_a_pick(group),
                }
                for group in judged.groups
            ],
        }
        for judged in found
    ]


def _names(figures: list[dict[str, float]]) -> list[str]:
    return [name for name in FIGURES if figures and all(name in one for one in figures)]


def _numbers(figures: list[dict[str, float]], name: str) -> dict[str, Any]:
    values = [one[name] for one in figures]
    return {"mean": float(np.mean(values)), "std": deviation(values), "values": values}


def _without_a_pick(group: Group) -> dict[str, int]:
    """Count the selections of a group in which a class has no pick."""
    missing = Counter(name for counts in group.class_counts for name, count in counts.items() if not count)
    return dict(sorted(missing.items(), key=lambda item: (-item[1], item[0])))


def lines(found: Iterable[Judged]) -> Iterator[str]:
    """Tell a person what was found: a table with a row a figure, for each set of embeddings."""
    for number, judged in enumerate(found):
        if number:
            yield ""
        yield from _head(judged)
        yield ""
        yield from _grid(judged)
        for letter, group in zip(_letters(judged), judged.groups, strict=True):
            several = len(group.selections)
            names = [
                name if several == 1 or count == several else f"{name} ({count} of {several})"
                for name, count in _without_a_pick(group).items()
            ]
            if names:
                more = len(names) - MISSING_NAMED
                yield (
                    f"no pick    {f'{letter}: ' if letter else ''}{', '.join(names[:MISSING_NAMED])}"
                    + (f" and {more:,} more" if more > 0 else "")
                )


def _head(judged: Judged) -> Iterator[str]:
    part = "all of them" if judged.sampled == judged.images else f"{judged.sampled:,} of them drawn"
    yield f"images     {judged.images:,}, {part}"
    if judged.labeled:
        classes = f"{len(judged.truth.classes):,} classes, from {judged.truth.source}"
        told = f"; accuracy on {judged.judged:,} images, picks left out" if judged.judged else ""
        yield f"labels     {judged.labeled:,} in {classes}{told}"
    yield f"coverage   images with a pick within {judged.radius:.3f}, the median distance to neighbors"
    for letter, group in zip(_letters(judged), judged.groups, strict=True):
        first = group.selections[0]
        seeds = ", ".join(str(selection.seed) for selection in group.selections)
        yield (
            f"{letter or 'picks':<10} {first.run.uri}, budget {first.budget:,}, "
            f"{'seed' if len(group.selections) == 1 else 'seeds'} {seeds}"
            + (", by an oracle that knows the labels" if first.method == "stratified" else "")
        )


def _letters(judged: Judged) -> list[str]:
    """Name the columns of several groups; one needs no name."""
    return [""] if len(judged.groups) == 1 else [f"#{i}" for i in range(1, len(judged.groups) + 1)]


def _grid(judged: Judged) -> Iterator[str]:
    columns = [["", *FIGURES.values()]]
    for letter, group in zip(_letters(judged), judged.groups, strict=True):
        columns.append([letter or "picks", *(_cell(name, group.picks) for name in FIGURES)])
        if group.draws:
            columns.append(["difference", *(_apart(name, group) for name in FIGURES)])
    for sizes, draws in {group.sizes: group.draws for group in judged.groups if group.draws}.items():
        head = f"random, {' or '.join(f'{size:,}' for size in sizes)}"
        columns.append([head, *(_cell(name, draws) for name in FIGURES)])
    widths = [max(map(len, column)) for column in columns]
    for first, *rest in zip(*columns, strict=True):
        if any(rest):
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            yield "   ".join([first.ljust(widths[0]), *cells])


def _cell(name: str, figures: list[dict[str, float]]) -> str:
    if name not in _names(figures):
        return ""
    values = [one[name] for one in figures]
    return shown(name, float(np.mean(values)), deviation(values))


def _apart(name: str, group: Group) -> str:
    both = name in _names(group.picks) and name in _names(group.draws)
    return difference(name, _difference(name, group)) if both else ""


def _difference(name: str, group: Group) -> float:
    means = (np.mean([one[name] for one in figures]) for figures in (group.picks, group.draws))
    return float(np.subtract(*means))
