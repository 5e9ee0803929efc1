"""The page of a comparison, for people: which method to use, how much it saves, and how sure that is."""

from __future__ import annotations

from html import escape

import numpy as np

from selective_ray.charts import Rival, number, rivalry
from selective_ray.comparison import AGAINST, MAIN, SEES_LABELS, Compared, needs, written
from selective_ray.figures import ACCURACIES, COMPARED, FIGURES, deviation, shown
from selective_ray.page import document, table
from selective_ray.paired import DRAWS, LEVEL, Difference, difference


def render(found: Compared) -> str:
    """Draw the page."""
    sections = [
        ("summary", "What came out", _summary(found)),
        *((name, _title(name), _figure(found, name)) for name in found.main),
        ("others", "Other figures", _others(found)),
        ("how", "How it was measured", _how(found)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections[1:])
    body = "\n".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>\n{content}\n</section>'
        for key, title, content in sections
    )
    title = f"{len(found.plan.methods)} ways to choose which of {found.compared:,} images to label"
    return document(title, f"<nav>{links}</nav>", body)


def _seeds(found: Compared) -> str:
    return "one seed" if found.plan.seeds == 1 else f"{found.plan.seeds} seeds"


def _name(method: str) -> str:
    return escape(method) + (" *" if method in SEES_LABELS else "")


def _summary(found: Compared) -> str:
    rivals = [method for method in found.ranked() if method not in SEES_LABELS]
    best = rivals[0]
    words = [f"Of the methods that see no label before all are picked, <b>{escape(best)}</b> did best"]
    second = next((method for method in rivals if method != best), None)
    if second:
        apart = difference(found.score(best), found.score(second))
        words.append(
            f", ahead of {escape(second)} by {written(apart)} points"
            + (": inside the noise, so these two cannot be told apart here." if apart.noise else ".")
        )
    else:
        words.append(".")
    lead = f'<p class="lead">{"".join(words)} {_saving(found, best)}</p>'
    rows = []
    for method in found.ranked():
        score = found.score(method)
        against = [
            _cell(difference(score, found.score(other))) if method != other else "" for other in AGAINST
        ]
        rows.append((_name(method), shown("linear_probe", float(score.mean()), deviation(score)), *against))
    heads = ("method", "mean accuracy", *(f"points to {other}" for other in AGAINST))
    note = (
        "Mean of linear probe and label propagation over all budgets, ± standard deviation over "
        f"{_seeds(found)}. {_marks(found)}"
    )
    return f'{lead}{table(heads, rows)}<p class="note">{note}</p>'


def _saving(found: Compared, method: str) -> str:
    """Say for the smallest budget what a method is worth in labels."""
    if method == "random":
        return "No method did better than drawing the images at random."
    budget, figure = found.plan.budgets[0], MAIN[0]
    ours, drawn = (float(found.values(one, budget, figure).mean()) for one in (method, "random"))
    apart = found.difference(method, "random", budget, figure)
    words = (
        f"With {budget:,} labels its linear probe tells {100 * ours:.1f} % of the other images right, and "
        f"that of random picks {100 * drawn:.1f} %: {written(apart)} points"
    )
    if apart.noise:
        return f"{words}, inside the noise."
    equal = found.equal_budget(method, budget, figure)
    tried = found.random_budgets(figure)
    times = "" if not np.isfinite(equal.budget) else f", {equal.budget / budget:.1f} times as many"
    return f"{words}. Random picks need {needs(equal, tried)} labels for that{times}."


def _marks(found: Compared) -> str:
    oracles = (
        "* sees labels before all are picked: stratified is an oracle that knows them all, the others are "
        f"active learning in {found.plan.rounds} rounds. "
        if set(found.plan.methods) & set(SEES_LABELS)
        else ""
    )
    return f"{oracles}~ inside the noise."


def _cell(found: Difference, scale: float = 100.0) -> str:
    words = written(found, scale)
    return f'<span class="note">{words}</span>' if found.noise else words


def _figure(found: Compared, figure: str) -> str:
    methods, budgets = found.ranked(), found.plan.budgets
    values = [
        (
            _name(method),
            *(
                shown(figure, float(some.mean()), deviation(some))
                for some in (found.values(method, budget, figure) for budget in budgets)
            ),
        )
        for method in methods
    ]
    heads = ("method", *(f"{budget:,} labels" for budget in budgets))
    parts = [_curves(found, figure), table(heads, values)]
    for other in AGAINST:
        rows = []
        for method in methods:
            if method == other:
                continue
            cells = (found.difference(method, other, budget, figure) for budget in budgets)
            rows.append((_name(method), *(f"{_cell(one)}, {one.wins} : {one.losses}" for one in cells)))
        parts.append(f"<h3>Points to {other}</h3>{table(heads, rows)}")
    parts.append(
        f'<p class="note">Mean difference over the same seeds, its {100 * LEVEL:.0f} % interval, and how '
        f"many seeds were won and lost. {_marks(found)}</p>"
    )
    tried = found.random_budgets(figure)
    rows = []
    for method in methods:
        if method == "random":
            continue
        equals = [found.equal_budget(method, budget, figure) for budget in budgets]
        rows.append(
            (
                _name(method),
                *(
                    needs(one, tried)
                    + (
                        f", {one.budget / b:.1f} times"
                        if np.isfinite(one.budget) and one.budget > tried[0]
                        else ""
                    )
                    for one, b in zip(equals, budgets, strict=True)
                ),
            )
        )
    parts.append(f"<h3>Labels that random picks need for the same</h3>{table(heads, rows)}")
    return "\n".join(parts)


def _curves(found: Compared, figure: str) -> str:
    """Draw each method beside random picks."""
    tried = found.random_budgets(figure)
    random = [found.values("random", budget, figure) for budget in tried]
    rivals = [
        Rival(
            _name(method),
            list(found.plan.budgets),
            [found.values(method, budget, figure) for budget in found.plan.budgets],
        )
        for method in found.ranked()
        if method != "random"
    ]
    charts = "\n".join(rivalry(rival, tried, random) for rival in rivals)
    return f'<div class="pair">{charts}</div>'


def _title(name: str) -> str:
    words = COMPARED[name]
    return words[0].upper() + words[1:]


def _others(found: Compared) -> str:
    names = [name for name in FIGURES if name not in found.main]
    heads = ("method", *(FIGURES[name] for name in names), "seconds")
    parts = []
    for budget in found.plan.budgets:
        rows = []
        for method in found.ranked():
            cells = []
            for name in names:
                some = found.values(method, budget, name)
                cells.append(shown(name, float(some.mean()), deviation(some)))
            seconds = found.values(method, budget, "seconds")
            rows.append((_name(method), *cells, number(float(np.median(seconds)))))
        parts.append(f"<h3>{budget:,} labels</h3>{table(heads, rows)}")
    note = (
        "Spread: standard deviation of the number of picks of each class, of "
        f"{found.classes:,} classes. Seconds: the median over the seeds, K-Means included for the methods "
        "that take clusters, the search for neighbors left out, which is made once for all. "
    )
    return "\n".join(parts) + f'<p class="note">{note}{_marks(found)}</p>'


def _trained(found: Compared) -> list[str]:
    if not found.plan.fixmatch:
        return []
    asked = ", ".join(word for word in found.plan.set if word.startswith("train.")) or "as `train` does"
    return [
        "FixMatch was trained once for each selection, on the labels of its picks and on the pixels of all "
        f"{found.compared:,} images, with equal steps for all methods ({escape(asked)}); it "
        "had to tell the images that were not picked. More of a training than of a linear probe is chance.",
    ]


def _how(found: Compared) -> str:
    part = (
        "all that have a label" if found.compared == found.labeled else "drawn from those that have a label"
    )
    words = [
        f"Each method picked from the same {found.compared:,} images ({part}; {found.images:,} are in the "
        f"run), in {found.classes:,} classes, with {_seeds(found)}, which vary all that is random. The "
        f"labels of the picks, from {escape(found.source)}, then had to tell those of all other images, by "
        f"{', '.join(ACCURACIES.values())}.",
        f"An interval holds the mean difference in {100 * LEVEL:.0f} % of {DRAWS:,} drawings of as many "
        "seeds from these: it says how far other seeds may go, on these images and with this encoder, and "
        "nothing about other images.",
        "How many labels random picks need is read off their mean curve, linear in the logarithm of the "
        f"number of labels, at {', '.join(f'{b:,}' for b in found.random_budgets(MAIN[0]))} labels.",
        *_trained(found),
        "All single values are in comparison/ of the run, as Parquet.",
    ]
    return "".join(f"<p>{sentence}</p>" for sentence in words)
