"""The page of a training: its curves, what it is sure of, and where it errs."""

from __future__ import annotations

from html import escape
from typing import Any

from selective_ray.charts import number, percent, timeline
from selective_ray.page import document, table

# A confusion matrix of more classes is no picture any more: the pairs most often confused are.
MATRIX_CLASSES = 40
PAIRS = 30


def render(name: str, steps: int, lines: list[dict[str, Any]], classes: list[str]) -> str:
    """Draw the page of a training by the lines of its metrics; steps are those it is to take in all."""
    told = [line for line in lines if "loss" in line]
    judged = [line for line in lines if "accuracy" in line]
    parts = [_sentence(steps, told, judged)]
    if judged:
        parts.append(
            _section("Accuracy on the images that were held out", _curve(judged, "accuracy", "accuracy"))
        )
        parts.append(_section("Where it errs", _confusion(judged[-1])))
    if told:
        losses = {
            "labeled images": _points(told, "supervised"),
            "unlabeled images": _points(told, "unsupervised"),
        }
        parts.append(_section("Loss", timeline(losses, shares=False)))
        shares = {"images with a pseudo-label": _points(told, "mask_rate")}
        known = [line for line in told if line.get("impurity") is not None]
        if known:
            shares["of these wrong"] = _points(known, "impurity")
        parts.append(_section("Pseudo-labels", timeline(shares, shares=True) + _balance(told[-1], classes)))
    return document(f"Training {escape(name)}", "", "\n".join(parts))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>"


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _curve(lines: list[dict[str, Any]], key: str, name: str) -> str:
    return timeline({name: _points(lines, key)}, shares=True)


def _sentence(steps: int, told: list[dict[str, Any]], judged: list[dict[str, Any]]) -> str:
    done = told[-1]["step"] if told else 0
    words = f"{done:,} of {steps:,} steps are done."
    if judged:
        last, best = judged[-1], max(judged, key=lambda line: line["accuracy"])
        words += (
            f" {percent(last['accuracy'])} of the held-out images are classified right at step "
            f"{last['step']:,} (at best {percent(best['accuracy'])}, at step {best['step']:,}); confidence "
            f"is off by {percent(last['calibration_error'])} on average."
        )
    return f'<p class="lead">{words}</p>'


def _confusion(line: dict[str, Any]) -> str:
    names, counts = list(line["by_class"]), line["confusion"]
    if len(names) > MATRIX_CLASSES:
        wrong = [
            (count, names[i], names[j])
            for i, row in enumerate(counts)
            for j, count in enumerate(row)
            if i != j and count
        ]
        rows = [
            (escape(true), escape(said), f"{count:,}") for count, true, said in sorted(wrong, reverse=True)
        ]
        return table(("is", "was answered", "images"), rows[:PAIRS])
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = max(1, sum(row))
        cells = (f'<span style="opacity:{0.35 + 0.65 * (count > 0):.2f}">{count:,}</span>' for count in row)
        share = line["by_class"][name]
        rows.append(
            (escape(name), *cells, "" if share is None else percent(share), f"{total if sum(row) else 0:,}")
        )
    heads = ("is, answered as", *map(escape, names), "right", "images")
    return f'<div class="confusion">{table(heads, rows)}</div>'


def _balance(line: dict[str, Any], classes: list[str]) -> str:
    """How the pseudo-labels of the last steps spread over the classes."""
    counts = line["confident"]
    total = max(1, sum(counts.values()))
    rows = sorted(((counts.get(name, 0), name) for name in classes), reverse=True)
    some = [(escape(name), f"{count:,}", percent(count / total)) for count, name in rows[:MATRIX_CLASSES]]
    words = f"<h3>Pseudo-labels of the last {line['steps']:,} steps, by class</h3>"
    evenly = f'<p class="note">Evenly spread, each would have {number(100 / max(1, len(classes)))}%.</p>'
    return words + table(("class", "images", "share"), some) + evenly
