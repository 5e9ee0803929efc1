"""The page of an encoder that is learned: its loss, and what its features are like."""

from __future__ import annotations

from html import escape
from typing import Any

from selective_ray.charts import number, percent, timeline
from selective_ray.page import document


def render(name: str, steps: int, lines: list[dict[str, Any]]) -> str:
    """Draw the page of a training by the lines of its metrics; steps are those it is to take in all."""
    told = [line for line in lines if "loss" in line]
    watched = [line for line in lines if "effective_rank" in line]
    parts = [_sentence(steps, told, watched)]
    if any("neighbors_accuracy" in line for line in watched):
        parts.append(
            _section(
                "Images whose nearest neighbors are mostly of their class",
                _curves(watched, {"share": "neighbors_accuracy"}, shares=True),
            )
        )
    if told:
        parts.append(_section("Images that were found", _curves(told, {"share": "found"}, shares=True)))
        kinds = {"instances": "instance"} | ({"groups": "group"} if "group" in told[-1] else {})
        parts.append(_section("Loss", _curves(told, kinds, shares=False)))
    if watched:
        rank = _curves(watched, {"effective rank": "effective_rank"}, shares=False)
        note = (
            '<p class="note">How many directions the features fill. Near 1 they have collapsed: all images '
            "look alike.</p>"
        )
        parts.append(_section("Effective rank of the features", rank + note))
        note = (
            '<p class="note">Mean squared distance of two views of one image. Low is good as long as the '
            "rank is not.</p>"
        )
        apart = _curves(watched, {"views of an image": "alignment"}, shares=False)
        parts.append(_section("Alignment", apart + note))
    return document(f"Encoder {escape(name)}", "", "\n".join(parts))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>"


def _curves(lines: list[dict[str, Any]], kinds: dict[str, str], *, shares: bool) -> str:
    return timeline(
        {
            name: ([line["step"] for line in lines], [line[key] for line in lines])
            for name, key in kinds.items()
        },
        shares=shares,
    )


def _sentence(steps: int, told: list[dict[str, Any]], watched: list[dict[str, Any]]) -> str:
    done = told[-1]["step"] if told else 0
    words = f"{done:,} of {steps:,} steps are done."
    if watched:
        last = watched[-1]
        words += (
            f" At step {last['step']:,} the features have an effective rank of "
            f"{number(last['effective_rank'])} and a uniformity of {number(last['uniformity'])} (lower: more "
            "even)."
        )
        if "neighbors_accuracy" in last:
            words += (
                f" {percent(last['neighbors_accuracy'])} of the images with a label have mostly neighbors of "
                "their class."
            )
    return f'<p class="lead">{words}</p>'
