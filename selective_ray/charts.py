"""The charts of the report, as SVG for the page: map, histograms, curves.

Drawn 440 units wide, so that on a phone a unit is nearly a pixel and text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Of the images, so many lie within the distances that the page states.
COVERAGE_SHARES = (0.5, 0.9, 0.99)
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 46, 12, 30, 42


@dataclass(frozen=True)
class Histogram:
    """Shares of all images and of the picks in bins [b] between edges [b + 1]."""

    edges: np.ndarray
    everything: np.ndarray
    picks: np.ndarray
    median_everything: float
    median_picks: float


@dataclass(frozen=True)
class Coverage:
    """How near a sample of the images is to a pick, and to the nearest of as many random rows.

    Shares within radii [r]: of the picks [r], of each random draw [draws, r]. Distances that hold
    COVERAGE_SHARES of the images: to the picks [3], to each draw [draws, 3].
    """

    radii: np.ndarray
    near_pick: np.ndarray
    near_drawn: np.ndarray
    pick_distances: np.ndarray
    drawn_distances: np.ndarray
    rows: int
    picks: int
    shards: int


@dataclass(frozen=True)
class Strip:
    """A share as the picks of some seeds have it [p], and random draws [q]."""

    name: str
    picks: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class Rival:
    """A share as a method has it at some budgets, each for some seeds [s]."""

    name: str
    budgets: list[int]
    values: list[np.ndarray]


@dataclass(frozen=True)
class Scatter:
    """Positions on the two main axes: a sample of rows [s, 2] and of picks [p, 2], which are `which` [p]."""

    rows: np.ndarray
    picks: np.ndarray
    which: np.ndarray
    variance: np.ndarray


def dots(s: Scatter, titles: list[str], links: list[str | None], rows: int) -> str:
    """Map: up to `rows` rows as dots, every pick as a mark with its escaped title and its link, if any."""
    everything = np.concatenate([s.rows[:rows], s.picks])
    low, high = everything.min(axis=0), everything.max(axis=0)
    extent = np.maximum(high - low, 1e-9)
    inner = WIDTH - 20
    scale = inner / max(extent[0], extent[1] / 1.1)
    height = float(np.clip(extent[1] * scale, 120, inner * 1.1)) + 20

    def place(points: np.ndarray) -> np.ndarray:
        middle = (low + high) / 2
        return np.round((points - middle) * scale * [1, -1] + [WIDTH / 2, height / 2], 1)

    # One path of dots: a third of the bytes of circles, and one element to draw.
    path = "".join(f"M{x:g} {y:g}h0" for x, y in place(s.rows[:rows]))
    radius = 4 if len(s.picks) <= 200 else 3 if len(s.picks) <= 800 else 2
    marks = []
    for (x, y), title, link in zip(place(s.picks), titles, links, strict=True):
        mark = f'<circle cx="{x:g}" cy="{y:g}" r="{radius}"><title>{title}</title></circle>'
        marks.append(f'<a href="{link}">{mark}</a>' if link else mark)
    return f"""<figure class="chart map">
<svg viewBox="0 0 {WIDTH} {height:.0f}" aria-label="Map of the images and the picks">
<path class="dots" d="{path}"/>
<g class="marks">{"".join(marks)}</g></svg>
<figcaption>{_legend("images", "picks")}</figcaption></figure>"""


def histogram(h: Histogram, label: str, *, log: bool) -> str:
    """Bars for all images, a line for the picks."""
    height = 250
    base = height - BOTTOM
    x = _axis(h.edges[0], h.edges[-1], log)
    top = max(h.everything.max(), h.picks.max())
    ticks = [tick for tick in _ticks(0, top * 100, 4) if tick <= top * 100 * 1.001]

    def y(share: float) -> float:
        return base - (base - TOP) * share / top

    bars = "".join(
        f'<rect x="{x(low) + 0.5:.1f}" y="{y(share):.1f}" width="{max(x(high) - x(low) - 1, 0.5):.1f}" '
        f'height="{base - y(share):.1f}"><title>{number(low)} to {number(high)}: {percent(share)} of '
        f"the images, {percent(picked)} of the picks</title></rect>"
        for low, high, share, picked in zip(h.edges, h.edges[1:], h.everything, h.picks, strict=False)
    )
    steps = "".join(
        f"V{y(share):.1f}H{x(edge):.1f}" for edge, share in zip(h.edges[1:], h.picks, strict=True)
    )
    return _chart(
        height,
        x,
        _log_ticks(h.edges[0], h.edges[-1]) if log else _ticks(h.edges[0], h.edges[-1], 6),
        label,
        [(y(tick / 100), f"{tick:g}%") for tick in ticks],
        f'<g class="bars">{bars}</g><path class="line" d="M{x(h.edges[0]):.1f} {base}{steps}V{base}"/>',
        _legend("share of all images", "share of the picks", line=True),
    )


def curves(c: Coverage) -> str:
    """Share of the images within a distance: of a pick, and of random draws as a band."""
    height = 280
    base = height - BOTTOM
    x = _axis(0, float(c.radii[-1]), False)

    def points(shares: np.ndarray) -> list[str]:
        return [f"{x(r):.1f} {base - (base - TOP) * s:.1f}" for r, s in zip(c.radii, shares, strict=True)]

    low, high, mean = (f(c.near_drawn, axis=0) for f in (np.min, np.max, np.mean))
    drawing = (
        f'<path class="band" d="M{"L".join(points(low) + points(high)[::-1])}Z"/>'
        f'<path class="random" d="M{"L".join(points(mean))}"/>'
        f'<path class="line" d="M{"L".join(points(c.near_pick))}"/>'
    )
    return _chart(
        height,
        x,
        _ticks(0, float(c.radii[-1]), 6),
        "distance to the nearest (0 to 2)",
        [(base - (base - TOP) * share / 100, f"{share}%") for share in (0, 25, 50, 75, 100)],
        drawing,
        '<span class="key random"></span>random draws: mean, lowest and highest '
        '<span class="key line"></span>picks',
    )


def strips(some: list[Strip]) -> str:
    """Shares in lines below each other: of random draws as a band with their mean, of the picks as dots."""
    line = 38
    height = TOP + line * len(some) + BOTTOM
    every = 100 * np.concatenate([np.concatenate([strip.picks, strip.drawn]) for strip in some])
    x = _axis(max(0.0, float(every.min()) - 2), min(100.0, float(every.max()) + 2), False)
    drawing = []
    for i, strip in enumerate(some):
        y = TOP + line * (i + 0.6)
        drawing.append(f'<text x="{LEFT}" y="{y - 10:.1f}">{strip.name}</text>')
        if len(strip.drawn):
            low, high, mean = (x(100 * float(f(strip.drawn))) for f in (np.min, np.max, np.mean))
            drawing.append(
                f'<rect class="band" x="{low:.1f}" y="{y - 5:.1f}" width="{high - low:.1f}" height="10"/>'
                f'<path class="random" d="M{mean:.1f} {y - 7:.1f}v14"/>'
            )
        dots = "".join(f'<circle cx="{x(100 * float(v)):.1f}" cy="{y:.1f}" r="4"/>' for v in strip.picks)
        drawing.append(f'<g class="marks">{dots}</g>')
    ticks = _ticks(float(every.min()), float(every.max()), 6)
    return _chart(
        height,
        x,
        ticks,
        "percent",
        [],
        "".join(drawing),
        '<span class="key random"></span>random draws: mean, lowest and highest '
        '<span class="key mark"></span>picks',
    )


def course(inertia: list[float], share: list[float]) -> str:
    """Mean squared distance to a centroid by iteration, two at least, and the share of distances computed.

    Both on one scale from 0: the first as a share of where it began.
    """
    height = 250
    base = height - BOTTOM
    x = _axis(1, len(inertia), False)
    top = max(1.0, *share)

    def path(values: list[float]) -> str:
        points = (f"{x(i):.1f} {base - (base - TOP) * v / top:.1f}" for i, v in enumerate(values, 1))
        return "L".join(points)

    drawing = (
        f'<path class="random" d="M{path(share)}"/>'
        f'<path class="line" d="M{path([value / (inertia[0] or 1.0) for value in inertia])}"/>'
    )
    ticks = [tick for tick in _ticks(1, len(inertia), 6) if tick == int(tick)]
    return _chart(
        height,
        x,
        ticks,
        "iteration",
        [(base - (base - TOP) * level / 100 / top, f"{level}%") for level in (0, 25, 50, 75, 100)],
        drawing,
        '<span class="key random"></span>distances computed, of all '
        '<span class="key line"></span>mean squared distance to the centroid, of the first',
    )


def timeline(series: dict[str, tuple[list[float], list[float]]], *, shares: bool) -> str:
    """Draw up to two curves over steps, by name: steps and values from 0 on, or shares of 1."""
    height = 250
    base = height - BOTTOM
    steps = [step for xs, _ in series.values() for step in xs]
    x = _axis(min(steps), max(steps), False)
    top = 1.0 if shares else max(1e-9, *(value for _, ys in series.values() for value in ys))

    def drawn(kind: str, xs: list[float], ys: list[float]) -> str:
        points = "L".join(
            f"{x(step):.1f} {base - (base - TOP) * y / top:.1f}" for step, y in zip(xs, ys, strict=True)
        )
        # A path of one point shows nothing.
        return f'<path class="{kind}" d="M{points}{"h1" if len(xs) == 1 else ""}"/>'

    kinds = ("line", "random")
    levels = (0, 0.25, 0.5, 0.75, 1) if shares else [tick for tick in _ticks(0, top, 4) if tick <= top]
    return _chart(
        height,
        x,
        [tick for tick in _ticks(min(steps), max(steps), 6) if tick == int(tick)],
        "step",
        [
            (base - (base - TOP) * level / top, percent(level) if shares else number(level))
            for level in levels
        ],
        "".join(drawn(kind, *curve) for kind, curve in zip(kinds, series.values(), strict=False)),
        " ".join(
            f'<span class="key {kind}"></span>{name}' for kind, name in zip(kinds, series, strict=False)
        ),
    )


def rivalry(rival: Rival, budgets: list[int], random: list[np.ndarray]) -> str:
    """Draw a share over the budget: the mean and every seed of a method, and random picks as a band."""
    height = 230
    base = height - BOTTOM
    x = _axis(budgets[0], max(budgets[-1], budgets[0] * 2), True)
    every = 100 * np.concatenate([*rival.values, *random])
    low, high = max(0.0, float(every.min()) - 1), min(100.0, float(every.max()) + 1)

    def y(share: float) -> float:
        return base - (base - TOP) * (100 * share - low) / ((high - low) or 1.0)

    def points(at: list[int], shares: list[float]) -> list[str]:
        return [f"{x(budget):.1f} {y(share):.1f}" for budget, share in zip(at, shares, strict=True)]

    least, most, mean = ([float(f(some)) for some in random] for f in (np.min, np.max, np.mean))
    ours = points(rival.budgets, [float(some.mean()) for some in rival.values])
    marks = "".join(
        f'<circle cx="{x(budget):.1f}" cy="{y(float(value)):.1f}" r="2.5"/>'
        for budget, some in zip(rival.budgets, rival.values, strict=True)
        for value in some
    )
    drawing = (
        f'<path class="band" d="M{"L".join(points(budgets, least) + points(budgets, most)[::-1])}Z"/>'
        f'<path class="random" d="M{"L".join(points(budgets, mean))}"/>'
        f'<path class="line" d="M{"L".join(ours)}"/><g class="marks">{marks}</g>'
    )
    levels = [tick for tick in _ticks(low, high, 4) if low <= tick <= high]
    return _chart(
        height,
        x,
        [float(budget) for budget in budgets],
        "labels",
        [(y(level / 100), f"{level:g}%") for level in levels],
        drawing,
        '<span class="key random"></span>random: mean, lowest and highest '
        f'<span class="key line"></span>{rival.name}: mean and seeds',
    )


def _chart(
    height: int,
    x: Callable[[float], float],
    x_ticks: list[float],
    label: str,
    y_ticks: list[tuple[float, str]],
    drawing: str,
    legend: str,
) -> str:
    base = height - BOTTOM
    grid = "".join(
        f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
        f'class="end">{text}</text>'
        for y, text in y_ticks
    ) + "".join(
        f'<path class="tick" d="M{x(tick):.1f} {base}v4"/><text x="{x(tick):.1f}" y="{base + 17}" '
        f'class="mid">{number(tick)}</text>'
        for tick in x_ticks
    )
    return f"""<figure class="chart"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">
{grid}{drawing}<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" class="mid">{label}</text></svg>
<figcaption>{legend}</figcaption></figure>"""


def _legend(everything: str, picks: str, *, line: bool = False) -> str:
    return (
        f'<span class="key {"bar" if line else "dot"}"></span>{everything} '
        f'<span class="key {"line" if line else "mark"}"></span>{picks}'
    )


def _axis(low: float, high: float, log: bool) -> Callable[[float], float]:
    turn = math.log if log else float
    start, width = turn(low), (turn(high) - turn(low)) or 1.0
    return lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (turn(value) - start) / width


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    ticks = ticks[:: -(-len(ticks) // 7) or 1]
    return ticks if len(ticks) >= 3 else _ticks(low, high, 5)


def number(value: float) -> str:
    """Three significant digits, thousands in groups."""
    value = float(value)
    if not math.isfinite(value) or 1e-3 <= abs(value) < 1000 or value == 0:
        return f"{value:.3g}" if abs(value) < 999.5 or not math.isfinite(value) else "1,000"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.2e}"


def percent(share: float) -> str:
    """Two significant digits where the share is small."""
    hundredths = 100 * float(share)
    digits = ".0f" if hundredths >= 9.95 or hundredths == 0 else ".2g"
    return f"{hundredths:{digits}}%"
