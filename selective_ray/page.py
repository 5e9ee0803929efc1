"""The page of `report`: one self-contained HTML file with inline SVG, that fetches and runs nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from selective_ray.charts import (
    COVERAGE_SHARES,
    Coverage,
    Histogram,
    Scatter,
    Strip,
    course,
    curves,
    dots,
    histogram,
    number,
    percent,
    strips,
)
from selective_ray.figures import FIGURES, SHARES, deviation, difference, shown
from selective_ray.store import Manifest, stage_of

NAME, URI, VALUE = 64, 1_000, 200
ROWS_SHOWN = 150
# Pictures beyond these are folded away: a phone shows two in a row.
UNFOLDED = 60


# How images are chosen by methods that do not take one of each cluster.
METHODS = {
    "random": "They were drawn at random.",
    "stratified": "They were drawn at random, as many of every class as could be. This is an oracle: it was "
    "told the labels of the images it chose from, and serves only to compare others with.",
    "k-center": "One after the other, each was the image least like any chosen before it.",
    "rdss": "One after the other, each was the image most like all others and least like those chosen before "
    "it.",
    "probcover": "One after the other, each was the image that most others resemble to which none chosen "
    "before is near.",
    "max-herding": "One after the other, each was the image that brought most others nearer to a chosen one.",
}
# What a cluster gives with the methods that do.
OF_CLUSTERS = {
    "usl": "the image that the most others look like",
    "k-medoid": "the image in its middle",
    "prototypes": "the image in its middle; then images were swapped for others wherever all images together "
    "then look more like one that was chosen",
    "typiclust": "the image that is nearest to the others of its group",
    "usl-t": "the image that stands for it best, by a network that learned the groups",
}
# What the utility of a pick is.
UTILITIES = {
    "usl": "what was maximized: density less weighted repulsion",
    "k-medoid": "the share of all images to which no other pick is nearer",
    "prototypes": "the share of all images that it represents best",
    "usl-t": "how sure the trained heads are of its cluster or, where the densest is picked, its squared "
    "distance to its neighbors, negative",
    "typiclust": "one over the mean squared distance to the nearest images of its cluster",
    "k-center": "the squared distance to the nearest pick before it, of the first the largest there is",
    "rdss": "its mean likeness to all images less that to the picks before it",
    "probcover": "how many images it covered that no pick before it did",
    "max-herding": "by how much it raised the likeness of all images to a pick",
    "random": "0",
    "stratified": "0",
}


@dataclass(frozen=True)
class Picks:
    """The selection with the size of each pick's cluster and its density; all of length m."""

    image_ids: np.ndarray
    uris: list[str]
    cluster_ids: np.ndarray
    cluster_sizes: np.ndarray
    densities: np.ndarray
    repulsions: np.ndarray
    utilities: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A small JPEG, or the reason why there is none."""

    jpeg: bytes | None
    reason: str


@dataclass(frozen=True)
class Rejected:
    """Images left out: how many, counts by reason, the first rows (image_id, uri, reason)."""

    rows: int
    reasons: list[tuple[str, int]]
    first: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Evaluation:
    """How the picks do by true labels: values of each figure, of the picks of some seeds and of random draws.

    class_counts: the picks of each class. judged, labeled: on how many images, of how many with a label.
    """

    picks: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]
    class_counts: dict[str, int]
    judged: int
    labeled: int


@dataclass(frozen=True)
class Facts:
    """Everything the page says but for the pictures."""

    stages: dict[str, Manifest]
    picks: Picks
    density: Histogram
    cluster_sizes: Histogram
    smallest_cluster: int
    largest_cluster: int
    coverage: Coverage
    scatter: Scatter
    rejected: Rejected
    evaluation: Evaluation | None = None

    @property
    def images(self) -> int:
        """Images that were selected from."""
        return self.stages["density"].rows

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """Return a value of the configuration, wherever a stage recorded it."""
        for manifest in self.stages.values():
            values = manifest.what.get(section)
            if isinstance(values, dict) and key in values:
                return values[key]
        return default


def render(facts: Facts, pictures: dict[int, Picture], *, map_rows: int) -> str:
    """Draw the page; pictures maps positions in the picks to what is shown of them, in this order."""
    m = len(facts.picks.image_ids)
    sections = [
        ("summary", "What was done", _summary(facts)),
        ("picks", f"The {'pick' if m == 1 else 'picks'}", _grid(facts, pictures)),
        ("coverage", "How near the images are to a pick", _coverage(facts)),
        *(
            [("evaluation", "What the picks tell of the rest", _evaluation(facts.evaluation))]
            if facts.evaluation
            else []
        ),
        ("map", "Map", _map(facts, pictures, map_rows)),
        ("density", "Density", _density(facts)),
        ("clusters", "Cluster sizes", _cluster_sizes(facts)),
        ("rejected", "Rejected files", _rejected(facts.rejected)),
        ("stages", "Time and memory", _stages(facts)),
        ("configuration", "Configuration", _configuration(facts)),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections[1:])
    drawn = [
        f'<section id="{key}"><h2>{escape(title)}</h2>\n{content}\n</section>'
        for key, title, content in sections
    ]
    first = [key for key, *_ in sections].index("density")
    beside = "\n".join(drawn[first : first + 2])
    body = "\n".join([*drawn[:first], f'<div class="pair">{beside}</div>', *drawn[first + 2 :]])
    title = f"{_amount(m, 'image')} selected of {facts.images:,}"
    return document(title, f"<nav>{links}</nav>", body)


def document(title: str, below: str, body: str) -> str:
    """Put a page together: its title, what stands below that, and the content."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} · selective_ray</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>{below}</header>
<main>
{body}
</main>
</body>
</html>
"""


# Words


def _summary(facts: Facts) -> str:
    m, n = len(facts.picks.image_ids), facts.images
    left_out = facts.rejected.rows
    unread = f" ({_amount(left_out, 'further file')} could not be used)" if left_out else ""
    chosen = (
        f"Out of {_amount(n, 'image')}{unread}, {m:,} {'was' if m == 1 else 'were'} chosen to be labeled "
        f"by people: {percent(m / n)} of them."
    )
    apart = facts.setting("selection", "weight", 1) and facts.setting("selection", "rounds", 2) > 1
    noted = facts.stages["selection"].summary
    before, marked = noted.get("selected_before", 0), noted.get("labeled_before", 0)
    if before:
        chosen += f" {before:,} of these had been chosen for a smaller budget."
    if marked:
        chosen += f" {_amount(marked, 'image')} had labels before."
    groups = facts.stages["clusters"].summary.get("clusters", m)
    giving = (
        f"each of the {m - before:,} largest without an earlier one" if before or marked else "each group"
    )
    method = facts.setting("selection", "method", "usl")
    given = OF_CLUSTERS.get(method, "")
    if method == "usl" and apart:
        given += ", passing over those close to what other groups gave"
    how = METHODS.get(method) or (
        f"The images were sorted by what they show into {_amount(groups, 'group')}, and {giving} gave "
        f"{given}."
    )
    return f'<p class="lead">{chosen} {how} {_headline(facts.coverage)}</p>'


def _headline(coverage: Coverage) -> str:
    ours, drawn = coverage.pick_distances[0], coverage.drawn_distances[:, 0]
    verdict = {
        -1: "so the chosen images stand for the rest better than chance would.",
        0: "so by this measure chance would have done as well.",
        1: "so by this measure chance would have done better.",
    }[verdict_of(ours, drawn)]
    return (
        f"Half of the images lie within {_distance(ours)} of a selected image; with randomly drawn images it "
        f"is {_distance(drawn.mean())}, {verdict}"
    )


def verdict_of(ours: float, drawn: np.ndarray) -> int:
    """-1 where the picks are nearer than every random draw, 1 where they are farther than every one."""
    if ours < drawn.min() - 1e-9:
        return -1
    return int(ours > drawn.max() + 1e-9)


def _coverage(facts: Facts) -> str:
    c = facts.coverage
    m = len(facts.picks.image_ids)
    means, lows, highs = (f(c.drawn_distances, axis=0) for f in (np.mean, np.min, np.max))
    rows = [
        (
            f"{share:.0%} of the images",
            _exact(ours, _distance),
            f"{_exact(mean, _distance)} <small>({_distance(low)} to {_distance(high)})</small>",
        )
        for share, ours, mean, low, high in zip(
            COVERAGE_SHARES, c.pick_distances, means, lows, highs, strict=True
        )
    ]
    picks = "all picks" if c.picks == m else f"{c.picks:,} of the {m:,} picks"
    shards = len(facts.stages["embeddings"].shards)
    source = "" if c.shards == shards else f" from {c.shards} of {shards:,} shards, spread evenly"
    everything = "All" if c.rows == facts.images else "A seeded sample of"
    return f"""<p>The line shows the share of the images that have a selected image within a given distance;
the band shows the same for {len(c.drawn_distances)} seeded random draws of as many images. Distances are
between unit vectors: 0 is the same, 1.41 is unrelated, 2 is the opposite.</p>
<div class="split">{curves(c)}
{table(("", "to a pick", "to a random image"), rows)}</div>
<p class="note">{everything} {c.rows:,} images{source}, against {picks} and {len(c.drawn_distances)} draws of
{c.picks:,} images.</p>"""


def _evaluation(e: Evaluation) -> str:
    told = [name for name in SHARES if name in e.picks]
    seeds = len(next(iter(e.picks.values())))
    draws = len(next(iter(e.drawn.values()))) if e.drawn else 0
    rows = []
    for name, title in FIGURES.items():
        if name in e.picks:
            both = [values[name] for values in (e.picks, e.drawn) if name in values]
            cells = [shown(name, float(values.mean()), deviation(values)) for values in both]
            apart = difference(name, float(both[0].mean() - both[1].mean())) if len(both) == 2 else ""
            rows.append((escape(title), cells[0], *(cells[1:] or [""]), apart))
    classifiers = (
        f"""Classifiers that know the labels of the picks only told those of {_amount(e.judged, "image")} from
the embeddings. """
        if e.judged
        else ""
    )
    repeated = f" The picks are those of {seeds} seeds, this run among them." if seeds > 1 else ""
    against = f" The random draws are {draws}, each of as many images as there are picks." if draws else ""
    chart = strips([Strip(FIGURES[name], e.picks[name], e.drawn.get(name, np.empty(0))) for name in told])
    return f"""<p>{classifiers}Coverage is the share of images that have a pick as near as images have
neighbors.{repeated}{against} Numbers are means and standard deviations.</p>
<div class="split">{chart}
{table(("", "picks", "random", "difference"), rows)}</div>
{_class_counts(e)}"""


def _class_counts(e: Evaluation) -> str:
    if not e.class_counts:
        return ""
    missing = [name for name, count in e.class_counts.items() if not count]
    names = ", ".join(_text(name, NAME) for name in missing[:ROWS_SHOWN])
    more = f" and {len(missing) - ROWS_SHOWN:,} more" if len(missing) > ROWS_SHOWN else ""
    without = f"No pick is of {names}{more}." if missing else "Every class has a pick."
    counts = sorted(e.class_counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(_text(name, NAME), f"{count:,}") for name, count in counts[:ROWS_SHOWN]]
    return f"""<p>{without} ({_amount(e.labeled, "image")} of this run {"has" if e.labeled == 1 else "have"} a
label.)</p>
<details{" open" if len(counts) <= 12 else ""}><summary>Picks by class</summary>
{table(("Class", "Picks"), rows)}</details>"""


def _map(facts: Facts, pictures: dict[int, Picture], map_rows: int) -> str:
    s = facts.scatter
    m = len(facts.picks.image_ids)
    rows = min(map_rows, len(s.rows))
    images = f"All {rows:,}" if rows == facts.images else f"A seeded sample of {rows:,}"
    shown = "every pick" if len(s.picks) == m else f"{len(s.picks):,} of the {m:,} picks"
    titles, links = [], []
    for pick in s.which.tolist():
        name = _text(_basename(facts.picks.uris[pick]), NAME)
        titles.append(f"{name}, cluster {facts.picks.cluster_ids[pick]}")
        links.append(f"#image-{facts.picks.image_ids[pick]}" if pick in pictures else None)
    return f"""<p>{images} images as small dots and {shown} as large ones, on the two axes along
which the images differ most. The axes carry {percent(s.variance[0])} and {percent(s.variance[1])} of all
differences, so what is close here need not be alike. Point at a pick for its name, click it for its
picture.</p>
{dots(s, titles, links, rows)}"""


def _density(facts: Facts) -> str:
    k = facts.setting("density", "k")
    neighbors = f"its {k:,} nearest neighbors" if isinstance(k, int) else "its nearest neighbors"
    measured = {
        "mean": f"the mean squared distance to {neighbors}",
        "kth": f"the squared distance to the last of {neighbors}",
    }[facts.setting("density", "estimator", "mean")]
    itself = ", the image itself counted as the first" if facts.setting("density", "include_self") else ""
    h = facts.density
    return f"""<p>The density of an image is 1 / {measured}{itself}: high where many images look alike.
Its median is {_exact(h.median_everything)} over all images and {_exact(h.median_picks)} over the picks.</p>
{histogram(h, "density (logarithmic)", log=True)}
{_certificate(facts)}"""


def _certificate(facts: Facts) -> str:
    """Say how the neighbors were found, and what it cost to compare only those that may be near."""
    summary = facts.stages["density"].summary
    found = summary.get("certificate")
    if not found:
        return "<p>Every image was compared with every other.</p>"
    share, low, high = (f"{100 * found[key]:.1f}" for key in ("recall", "recall_low", "recall_high"))
    mean, most = (f"{100 * found[key]:.2g}" for key in ("mean_relative_error", "largest_relative_error"))
    return f"""<p>Images were compared with those of nearby lists only; there are {summary["lists"]:,} lists.
Of the true neighbors of {_amount(found["rows"], "image")} drawn at random {share} % were found (95 % interval
{low} to {high} %). Mean squared distances came out larger by {mean} % on average and {most} % at most, and
the order of densities agrees with the exact one to {found["rank_correlation"]:.5f} (rank correlation).</p>"""


def _cluster_sizes(facts: Facts) -> str:
    h = facts.cluster_sizes
    m = len(facts.picks.image_ids)
    log = bool(h.edges[-1] > 30 * h.edges[0])
    label = "images in the cluster" + (" (logarithmic)" if log else "")
    if m == 1:
        return f"<p>One cluster holds all {_amount(facts.images, 'image')}.</p>"
    return f"""<p>The {m:,} clusters hold {facts.smallest_cluster:,} to {facts.largest_cluster:,} images;
half hold {number(h.median_picks)} or more. Half of all images are in clusters of
{number(h.median_everything)} or more. Every cluster gives one pick, so images of small clusters are picked
more often than those of large ones.</p>
{histogram(h, label, log=log)}
{_iterations(facts)}"""


def _iterations(facts: Facts) -> str:
    """Say how the clusters were found, where the run has recorded it."""
    summary = facts.stages["clusters"].summary
    inertia = summary.get("history", {}).get("inertia", [])
    if len(inertia) < 2:
        return ""
    repaired = summary["empty_clusters_repaired"]
    return f"""<p>K-Means took {len(inertia)} iterations, which brought the mean squared distance of an image
to its centroid from {_exact(inertia[0])} to {_exact(inertia[-1])}
{f" and started {_amount(repaired, 'empty cluster')} again" if repaired else ""}.</p>
{course(inertia, summary["history"]["share"])}"""


def _rejected(rejected: Rejected) -> str:
    if not rejected.rows:
        return "<p>None: every file could be read.</p>"
    shown = rejected.reasons[:20]
    rest = rejected.rows - sum(count for _, count in shown)
    counts = [*shown, *([("other reasons", rest)] if rest else [])]
    reasons = [(_text(reason, VALUE), f"{count:,}") for reason, count in counts]
    rows = [
        (f"{image_id}", f"<bdi title={_attribute(uri, URI)}>{_text(uri, 120)}</bdi>", _text(reason, VALUE))
        for image_id, uri, reason in rejected.first
    ]
    which = "All of them" if len(rejected.first) == rejected.rows else f"The first {len(rejected.first)}"
    return f"""<p>{_amount(rejected.rows, "file")} could not be used and took no part in the selection.</p>
{table(("Reason", "Files"), reasons)}
<details{" open" if len(rejected.first) <= 10 else ""}><summary>{which}</summary>
{table(("Image", "File", "Reason"), rows, "names")}</details>"""


def _stages(facts: Facts) -> str:
    rows = []
    for name, manifest in facts.stages.items():
        memory = "<br>".join(
            f"{_text(who, 30)} {_bytes(amount)}"
            for who, amount in list(manifest.peak_memory_bytes.items())[:5]
        )
        devices = sorted({shard.device for shard in manifest.shards})
        reused = f"<br><small>of {_text(manifest.refers_to, 60)}</small>" if manifest.refers_to else ""
        rows.append(
            (
                f"{escape(name)}{reused}",
                f"{manifest.rows:,}",
                f"{len(manifest.shards):,}",
                _seconds(manifest.seconds),
                memory,
                _text(", ".join(devices), 60),
                f"<code>{escape(manifest.fingerprint)}</code>",
            )
        )
    # `rejected` is made with `embeddings`, and `utilities` with `selection`: their time counts once.
    own = [
        manifest.seconds
        for name, manifest in facts.stages.items()
        if not manifest.refers_to and stage_of(name) not in ("rejected", "utilities")
    ]
    code = facts.stages["selection"].code
    commit = f", commit {escape(str(code.get('commit'))[:12])}" if code.get("commit") else ""
    heads = ("Table", "Rows", "Shards", "Time", "Peak memory", "Device", "Fingerprint")
    return (
        f"<p>{_seconds(sum(own))} in all, by selective_ray {escape(str(code.get('version')))}{commit}.</p>"
        + table(heads, rows)
    )


def _configuration(facts: Facts) -> str:
    settings: dict[tuple[str, str], list[str]] = {}
    notes: dict[tuple[str, str], list[str]] = {}
    for name, manifest in facts.stages.items():
        for key, value in _flat(manifest.what):
            settings.setdefault((key, value), []).append(name)
        # The course of the iterations is drawn.
        noted = {key: value for key, value in manifest.summary.items() if key != "history"}
        for key, value in _flat(noted):
            notes.setdefault((key, value), []).append(name)
    return (
        "<p>Everything that the answer depends on, defaults included.</p>"
        + _pairs(settings, "Key")
        + (f"<h3>What the stages noted</h3>{_pairs(notes, 'Note')}" if notes else "")
    )


def _pairs(pairs: dict[tuple[str, str], list[str]], title: str) -> str:
    rows = [
        (_text(key, 60), _text(value, VALUE), escape(", ".join(names)))
        for (key, value), names in pairs.items()
    ]
    more = len(pairs) - ROWS_SHOWN
    rest = f'<p class="note">And {more:,} more, in the manifests.</p>' if more > 0 else ""
    return table((title, "Value", "Tables"), rows[:ROWS_SHOWN], "names") + rest


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]], kind: str = "numbers") -> str:
    """Lay out cells of HTML; the first of each row names it. Wider than the screen, it scrolls by itself."""
    head = "".join(f"<th scope=col>{title}</th>" for title in heads)
    body = "\n".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    rows_and_head = f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{rows_and_head}</table></div>'


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and (value or not prefix):
        nested = (_flat(inner, f"{prefix}.{key}".lstrip(".")) for key, inner in value.items())
        return [pair for pairs in nested for pair in pairs]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, default=str))]


# The picks


def _grid(facts: Facts, pictures: dict[int, Picture]) -> str:
    m = len(facts.picks.image_ids)
    method = facts.setting("selection", "method", "usl")
    words = (
        "Largest cluster first" + ("." if method in METHODS else "; every image stands for its cluster.")
        if len(pictures) == m
        else f"{len(pictures):,} of the {m:,} picks, largest cluster first: those of the largest and the "
        "smallest clusters, and a seeded sample of the others. All are in the table of the selection."
    )
    figures = [_figure(facts.picks, pick, picture) for pick, picture in pictures.items()]
    few = " few" if len(figures) <= 12 else ""
    units = ", both in units of what is usual here" if facts.setting("selection", "scale") == "median" else ""
    meant = f"and utility is {UTILITIES[method]}"
    if method == "usl":
        meant = f"repulsion how close the picks of other clusters are, {meant}{units}"
    rest = figures[UNFOLDED:]
    folded = f"""<details><summary>Show the other {len(rest):,}, down to the smallest cluster</summary>
<div class="grid">
{"".join(rest)}
</div></details>"""
    return f"""<p>{words} Density says how many images look alike here, {meant}.</p>
<div class="grid{few}">
{"".join(figures[:UNFOLDED])}
</div>
{folded if rest else ""}"""


def _figure(picks: Picks, pick: int, picture: Picture) -> str:
    uri = picks.uris[pick]
    name = _text(_basename(uri), NAME)
    values = "".join(
        f"<dt>{key}</dt><dd>{value}</dd>"
        for key, value in (
            ("cluster", f"{picks.cluster_ids[pick]}"),
            ("size", f"{picks.cluster_sizes[pick]:,}"),
            ("density", _exact(picks.densities[pick])),
            ("repulsion", _exact(picks.repulsions[pick])),
            ("utility", _exact(picks.utilities[pick])),
        )
    )
    return (
        f'<figure id="image-{picks.image_ids[pick]}">{_shown(picture, name)}<figcaption>'
        f"<span class=name title={_attribute(uri, URI)}><bdi>{name}</bdi></span>"
        f"<dl>{values}</dl></figcaption></figure>\n"
    )


def _shown(picture: Picture, name: str) -> str:
    if picture.jpeg is None:
        label = f'role=img aria-label="no picture of {name}"'
        return f'<div class="frame missing" {label}>{_text(picture.reason, 60)}</div>'
    width, height = Image.open(io.BytesIO(picture.jpeg)).size
    small = " class=pixels" if max(width, height) < 48 else ""
    data = base64.b64encode(picture.jpeg).decode()
    return (
        f'<div class=frame><img{small} src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'alt="{name}"></div>'
    )


# Numbers and names


def _distance(value: float) -> str:
    return f"{value:.3f}"


def _exact(value: float, shown: Callable[[float], str] = number) -> str:
    return f'<data value="{float(value)!r}">{shown(value)}</data>'


def _amount(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 99.95 else f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def _bytes(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


def _basename(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _text(text: str, limit: int) -> str:
    """Escape a name: control characters spelled out, its middle left out where it is too long."""
    visible = "".join(
        repr(c)[1:-1] if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text[: 2 * limit + 2]
    )
    if len(text) > limit:
        head = limit // 2
        tail = "".join(
            repr(c)[1:-1] if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text[head + 1 - limit :]
        )
        visible = f"{visible[:head]}…{tail}"
    return escape(visible, quote=True)


def _attribute(text: str, limit: int) -> str:
    return f'"{_text(text, limit)}"'


STYLE = """
:root{--ink:#1c2430;--soft:#566173;--paper:#fff;--panel:#f5f7fa;--rule:#dde3ea;--all:#8fb3d9;--pick:#c2410c;
--random:#55606f;--band:#55606f40;--link:#0b5cad;--ring:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#a3aebd;--paper:#12161c;--panel:#1b212a;--rule:#323b47;
--all:#4a7db3;--pick:#ffab40;--random:#b4bfcc;--band:#b4bfcc40;--link:#7ab8f5;--ring:#12161c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Noto Sans",sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 1rem}
header{padding-top:2rem}
h1{font-size:clamp(1.5rem,5vw,2.2rem);line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:0 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:.9rem}
a{color:var(--link)}
section{margin:2.4rem 0}
p{max-width:72ch;margin:.4rem 0 .9rem}
.lead{font-size:1.12rem}
.note,small,figcaption{color:var(--soft)}
.note,figcaption{font-size:.85rem}
figure{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:.75rem}
.grid.few{grid-template-columns:repeat(auto-fill,minmax(132px,200px))}
.grid figure{background:var(--panel);border:1px solid var(--rule);border-radius:8px;overflow:hidden;
min-width:0}
.grid figure:target{outline:3px solid var(--pick)}
.frame{aspect-ratio:1;display:flex;align-items:center;justify-content:center;background:var(--rule)}
.frame img{width:100%;height:100%;object-fit:contain;display:block}
.pixels{image-rendering:pixelated}
.missing{color:var(--soft);font-size:.85rem;text-align:center;padding:.5rem;overflow-wrap:anywhere;
border-bottom:1px dashed var(--soft)}
.grid figcaption{padding:.45rem .6rem .55rem;font-size:.78rem;line-height:1.4}
.name{display:block;color:var(--ink);font-weight:600;overflow-wrap:anywhere;margin-bottom:.2rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 .5rem;margin:0}
dd{margin:0;text-align:right;color:var(--ink);font-variant-numeric:tabular-nums}
.chart{max-width:640px}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.map svg{background:var(--panel);border:1px solid var(--rule);border-radius:8px}
svg text{fill:var(--soft);font-size:12px}
.end{text-anchor:end}.mid{text-anchor:middle}
.rule,.tick{stroke:var(--rule);fill:none}
.bars rect{fill:var(--all)}
.line{fill:none;stroke:var(--pick);stroke-width:2;stroke-linejoin:round}
.random{fill:none;stroke:var(--random);stroke-width:1.5;stroke-dasharray:5 3}
.band{fill:var(--band)}
.dots{stroke:var(--all);stroke-width:2.6;stroke-linecap:round;fill:none;opacity:.75}
.marks circle{fill:var(--pick);stroke:var(--ring);stroke-width:1.2}
.key{display:inline-block;width:1.3em;height:.8em;margin:0 .4em 0 .9em;vertical-align:-.02em}
.key:first-child{margin-left:0}
.key.bar{background:var(--all)}
.key.line{height:0;border-top:3px solid var(--pick);vertical-align:.25em}
.key.random{height:0;border-top:2px dashed var(--random);vertical-align:.25em}
.key.dot,.key.mark{width:.7em;height:.7em;border-radius:50%;background:var(--all)}
.key.mark{background:var(--pick)}
.split,.pair{display:grid;gap:0 1.5rem;align-items:start}
.split>*,.pair>*{min-width:0}
.pair section{margin-bottom:0}
@media(min-width:900px){.split{grid-template-columns:minmax(0,640px) minmax(0,1fr)}
.pair{grid-template-columns:1fr 1fr}}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.3rem 0}
th,td{padding:.35rem .9rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{color:var(--soft);font-weight:500}
tbody th{font-weight:500}
td{overflow-wrap:anywhere}
.numbers td{font-variant-numeric:tabular-nums;white-space:nowrap}
.names td,.names th{min-width:5rem}
code{font:.85em ui-monospace,Menlo,Consolas,monospace}
.confusion td{text-align:right;padding:.25rem .5rem}
summary{cursor:pointer;color:var(--link);margin:.6rem 0}
"""
