"""One page about a finished selection, for people: what was picked, from what, and how near the rest is.

Reads the tables shard by shard and holds counts, a sample of the embeddings and the picks: memory depends on
m and on the samples, not on n. The page itself is drawn in `page`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import charts, images, page, reading
from selective_ray.distances import blocks, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.images import Rejected
from selective_ray.schema import sq_dist_column
from selective_ray.store import OPTIONAL, TABLES, Manifest, Run

MAX_BYTES = 15_000_000
# Samples come from so many shards of embeddings at most: 8.6 GB to read at 65,536 rows of 512 numbers.
SHARDS_READ = 64
SAMPLE_ROWS = 10_000
# Picks compared with random draws of as many rows.
COMPARED_PICKS = 4_000
RANDOM_DRAWS = 5
RADII = 120
MAP_ROWS, MAP_PICKS = 4_000, 2_000
# Of the pictures, so many are of the largest and as many of the smallest clusters.
PICTURES, EXTREME_PICTURES = 600, 50
# Few pictures may be larger.
LARGE_PICTURES, LARGE_PIXELS = 150, 176
# What is tried in turn until the page is small enough: pictures, their pixels, rows on the map.
SIZES = ((PICTURES, 112, MAP_ROWS), (PICTURES, 64, 2_000), (300, 48, 1_000), (60, 32, 500), (0, 0, 200))
REJECTED_ROWS, REASONS = 100, 1_000
# Fine bins over the logarithm of the density, merged into `BARS` over the range that holds data.
LOG_DENSITIES = np.linspace(-3, 14, 17_001)
BARS = 32


def write(
    run: Run, *, seed: int = 0, say: Callable[[str], None] = lambda message: None, max_bytes: int = MAX_BYTES
) -> str:
    """Write `report/index.html` of a run whose selection is complete; returns its path.

    The same tables, images and seed give the same page. Raises UserError where a table is missing or damaged;
    an image that cannot be read leaves a placeholder.
    """
    stages = {}
    for table in run.tables():
        manifest = run.manifest(table)
        if manifest is None and (table in OPTIONAL or table not in TABLES):
            continue
        if manifest is None:
            raise UserError(f"{run.uri} has no finished {table}, so there is nothing to report; run select")
        stages[table] = manifest
    say(f"report: counting {stages['density'].rows:,} rows")
    picks, sizes, density, places = _count(run, stages)
    say("report: reading a sample of the embeddings")
    coverage, scatter = _sample(run, stages["embeddings"], picks.image_ids, places, seed)
    facts = page.Facts(
        stages=stages,
        picks=picks,
        density=density,
        cluster_sizes=_size_histogram(sizes),
        smallest_cluster=int(sizes.min()),
        largest_cluster=int(sizes.max()),
        coverage=coverage,
        scatter=scatter,
        rejected=_rejected(run, stages["rejected"]),
        evaluation=_evaluation(run, stages["selection"]),
    )
    shown = pictured(picks.cluster_sizes, seed, PICTURES)
    say(f"report: shrinking {len(shown)} images")
    pixels = LARGE_PIXELS if len(shown) <= LARGE_PICTURES else SIZES[0][1]
    pictures = _pictures(run, picks.image_ids[shown], pixels)
    by_pick = dict(zip(shown.tolist(), pictures, strict=True))
    run.write_bytes(_fitting(facts, by_pick, seed, max_bytes), "report", "index.html")
    return run.path("report", "index.html")


def _fitting(facts: page.Facts, by_pick: dict[int, page.Picture], seed: int, max_bytes: int) -> bytes:
    """Draw the page, with fewer and smaller pictures until it is under max_bytes or has none left."""
    content = b""
    for count, pixels, map_rows in SIZES:
        some = pictured(facts.picks.cluster_sizes, seed, count).tolist()
        if count < PICTURES or content:
            by_pick = {pick: _smaller(by_pick[pick], pixels) for pick in some}
        content = page.render(facts, by_pick, map_rows=map_rows).encode()
        if len(content) < max_bytes:
            break
    return content


# Pictures


def pictured(cluster_sizes: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Choose which picks are shown, largest cluster first: int64 [min(m, count)].

    The largest and the smallest clusters come first, then a seeded sample of the others; a smaller count
    shows a part of what a larger one does.
    """
    order = np.argsort(-cluster_sizes, kind="stable")
    ends = min(EXTREME_PICTURES, len(order) // 2)
    middle = np.random.default_rng(seed).permutation(np.arange(ends, len(order) - ends))
    extremes = np.stack([np.arange(ends), len(order) - 1 - np.arange(ends)], axis=1).ravel()
    return order[np.sort(np.concatenate([extremes, middle])[:count])]


def _pictures(run: Run, image_ids: np.ndarray, pixels: int) -> list[page.Picture]:
    """Read the images of a run and shrink them; what cannot be read leaves words."""
    rows = run.listed(image_ids)
    own = [_own_row(row) for row in rows.select(["uri", "offset"]).to_pylist()]
    column = run.manifest("images").what.get("images", {}).get("column")
    of_images = rows.filter(pa.array([number is None for number in own]))
    # A page without a picture is better than one that waits for a store that does not answer.
    impatient = replace(run.access, attempts=0, silence_seconds=min(5.0, run.access.silence_seconds))
    found: Iterator[bytes | Rejected] = reading.fetch(of_images, impatient, column=column)
    pictures = []
    for number in own:
        try:
            data = next(found) if number is None else Rejected(f"row {number:,}")
        except UserError as error:
            data = Rejected(str(error))
            found = itertools.repeat(data)
        try:
            if isinstance(data, Rejected):
                raise data
            pictures.append(page.Picture(images.thumbnail(data, size=pixels), ""))
        except Rejected as rejected:
            pictures.append(page.Picture(None, f"{'unreadable: ' if number is None else ''}{rejected}"))
    return pictures


def _own_row(row: dict[str, Any]) -> int | None:
    """Return the number of an embedding that a person brought without an image, else None."""
    found = re.search(r"\.(?:npy|parquet)#(\d+)$", row["uri"])
    return int(found[1]) if found and row["offset"] is None else None


def _smaller(picture: page.Picture, pixels: int) -> page.Picture:
    if picture.jpeg is None:
        return picture
    return page.Picture(images.thumbnail(picture.jpeg, size=pixels), "")


# Figures of all rows


def _count(
    run: Run, stages: dict[str, Manifest]
) -> tuple[page.Picks, np.ndarray, charts.Histogram, np.ndarray]:
    """Read density and clusters once.

    Returns the picks, the sizes of the clusters int64 [m], the densities of all and of the picks, and where
    the picks are: int64 [m, 2] of shard and row.
    """
    settings = stages["density"].what.get("density", {})
    column, floor = sq_dist_column(settings.get("estimator", "mean")), settings.get("floor", 1e-12)
    shards = range(len(stages["selection"].shards))
    selection = pa.concat_tables(run.read_shard("selection", shard) for shard in shards).combine_chunks()
    image_ids, cluster_ids = selection["image_id"].to_numpy(), selection["cluster_id"].to_numpy()
    by_id = np.argsort(image_ids)
    places = np.full((len(image_ids), 2), -1)
    sizes = np.zeros(int(cluster_ids.max()) + 1, np.int64)
    counts = np.zeros(len(LOG_DENSITIES) - 1, np.int64)
    for shard in range(len(stages["density"].shards)):
        density = run.read_shard("density", shard, ["image_id", column])
        clusters = run.read_shard("clusters", shard, ["image_id", "cluster_id"])
        ids = density["image_id"].to_numpy()
        if not np.array_equal(ids, clusters["image_id"].to_numpy()):
            raise UserError(
                f"shard {shard} of density and of clusters hold different images; use a new --run"
            )
        counts += _log_counts(_density(density[column].to_numpy(), floor))
        found = np.bincount(clusters["cluster_id"].to_numpy(), minlength=len(sizes))
        found[: len(sizes)] += sizes
        sizes = found
        place = by_id[np.searchsorted(image_ids[by_id], ids).clip(max=len(by_id) - 1)]
        rows = np.flatnonzero(image_ids[place] == ids)
        places[place[rows], 0], places[place[rows], 1] = shard, rows
    if (places < 0).any():
        lost = image_ids[places[:, 0] < 0]
        raise UserError(f"{len(lost)} picks, as image {lost[0]}, have no density; use a new --run")
    densities = _density(selection[column].to_numpy(), floor)
    picks = page.Picks(
        image_ids,
        selection["uri"].to_pylist(),
        cluster_ids,
        sizes[cluster_ids],
        densities,
        selection["repulsion"].to_numpy(),
        selection["utility"].to_numpy(),
    )
    return picks, sizes[sizes > 0], _density_histogram(counts, _log_counts(densities)), places


def _density(sq_dists: np.ndarray, floor: float) -> np.ndarray:
    return 1 / np.maximum(sq_dists.astype(np.float64), floor)


def _log_counts(densities: np.ndarray) -> np.ndarray:
    low, high = LOG_DENSITIES[[0, -1]]
    return np.histogram(np.log10(densities.clip(10**low, 10**high)).clip(low, high), LOG_DENSITIES)[0]


def _density_histogram(everything: np.ndarray, picks: np.ndarray) -> charts.Histogram:
    """Merge the fine bins into at most BARS; a thousandth of the rows at either end joins the outermost."""
    share = np.cumsum(everything) / everything.sum()
    first, last = int(np.searchsorted(share, 0.001)), int(np.searchsorted(share, 0.999))
    width = max(1, -(-(last + 1 - first) // BARS))
    bars = -(-(last + 1 - first) // width)
    edges = LOG_DENSITIES[(first + width * np.arange(bars + 1)).clip(max=len(LOG_DENSITIES) - 1)]
    bar = ((np.arange(len(everything)) - first) // width).clip(0, bars - 1)
    return charts.Histogram(
        10**edges,
        np.bincount(bar, everything, bars) / everything.sum(),
        np.bincount(bar, picks, bars) / picks.sum(),
        _median_density(everything),
        _median_density(picks),
    )


def _median_density(counts: np.ndarray) -> float:
    """Return the middle of the fine bin that holds the median: within 0.12 % of it."""
    half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return float(10 ** ((LOG_DENSITIES[half] + LOG_DENSITIES[half + 1]) / 2))


def _size_histogram(sizes: np.ndarray) -> charts.Histogram:
    """Count images, and clusters, by the size of their cluster, in bins of whole numbers."""
    low, high = int(sizes.min()), int(sizes.max())
    if high > 30 * low:
        edges = np.unique(np.round(np.geomspace(low, high + 1, BARS // 2)).astype(np.int64))
    else:
        width = -(-(high + 1 - low) // (BARS - 8))
        edges = np.arange(low, high + width + 1, width)
    ascending = np.sort(sizes)
    middle = int(np.searchsorted(np.cumsum(ascending), sizes.sum() / 2))
    return charts.Histogram(
        edges.astype(np.float64),
        np.histogram(sizes, edges, weights=sizes)[0] / sizes.sum(),
        np.histogram(sizes, edges)[0] / len(sizes),
        float(ascending[middle]),
        float(ascending[len(sizes) // 2]),
    )


# A sample of the embeddings


def _sample(
    run: Run, manifest: Manifest, image_ids: np.ndarray, places: np.ndarray, seed: int
) -> tuple[charts.Coverage, charts.Scatter]:
    """Draw rows, and as often as RANDOM_DRAWS as many rows as there are picks, and read all in one pass.

    Rows and draws are independent, as rows and picks are: a row that is itself drawn is at distance 0.
    """
    rng = np.random.default_rng(seed)
    rows_of = np.array([shard.rows for shard in manifest.shards])
    shards = spread(rng, np.flatnonzero(rows_of))
    sample = _draw(rng, shards, rows_of, SAMPLE_ROWS)
    holders = spread(rng, np.unique(places[:, 0]))
    compared = rng.permutation(np.flatnonzero(np.isin(places[:, 0], holders)))[:COMPARED_PICKS]
    draws = [_draw(rng, shards, rows_of, len(compared)) for _ in range(RANDOM_DRAWS)]
    ids, vectors = _vectors(run, [sample, places[compared], *draws])
    if not np.array_equal(ids[1], image_ids[compared]):
        raise UserError("density and embeddings hold different images in the same shard; use a new --run")
    x, picked, *drawn = vectors

    near_pick = np.sort(nearest(x, picked))
    near_drawn = [np.sort(nearest(x, other)) for other in drawn]
    radii = np.linspace(0, max(near_pick[-1], *(dists[-1] for dists in near_drawn)) or 1, RADII)
    coverage = charts.Coverage(
        radii,
        _within(near_pick, radii),
        np.array([_within(dists, radii) for dists in near_drawn]),
        _quantiles(near_pick),
        np.array([_quantiles(dists) for dists in near_drawn]),
        rows=len(x),
        picks=len(picked),
        shards=len(shards),
    )
    some = rng.permutation(len(x))[:MAP_ROWS]
    center, axes, variance = principal_axes(x[some])
    return coverage, charts.Scatter(
        (x[some] - center) @ axes,
        (picked[:MAP_PICKS] - center) @ axes,
        compared[:MAP_PICKS],
        variance,
    )


def spread(rng: np.random.Generator, shards: np.ndarray) -> np.ndarray:
    """Choose SHARDS_READ of the shards, evenly spread from a random first one."""
    if len(shards) <= SHARDS_READ:
        return shards
    step = len(shards) / SHARDS_READ
    return shards[((np.arange(SHARDS_READ) + rng.random()) * step).astype(np.int64)]


def _draw(rng: np.random.Generator, shards: np.ndarray, rows_of: np.ndarray, count: int) -> np.ndarray:
    """Draw row positions of some shards without replacement: int64 [p, 2] of shard and row."""
    ends = np.cumsum(rows_of[shards])
    drawn = rng.choice(ends[-1], min(count, ends[-1]), replace=False)
    place = np.searchsorted(ends, drawn, side="right")
    return np.stack([shards[place], drawn - ends[place] + rows_of[shards][place]], axis=1)


def _vectors(run: Run, wanted: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Read what is at places [p, 2] of shard and row, every shard once: image_ids int64 [p] and embeddings
    float32 [p, d] for each array of places."""
    places = np.concatenate(wanted)
    ids, x = np.empty(len(places), np.int64), np.empty((len(places), 0), np.float32)
    for shard in np.unique(places[:, 0]).tolist():
        shard_ids, shard_x = run.read_embeddings(shard)
        if not x.shape[1]:
            x = np.empty((len(places), shard_x.shape[1]), np.float32)
        here = places[:, 0] == shard
        ids[here], x[here] = shard_ids[places[here, 1]], shard_x[places[here, 1]]
    ends = np.cumsum([len(places) for places in wanted])[:-1]
    return np.split(ids, ends), np.split(x, ends)


def nearest(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance from each row to the nearest of the others, float64 [n]: a product finds it, differences
    measure it."""
    column = np.empty(len(x), np.int64)
    half_norms = np.einsum("md,md->m", others, others) / 2
    for part in blocks(len(x), len(others)):
        column[part] = np.argmin(half_norms - x[part] @ others.T, axis=1)
    return np.sqrt(sq_dists_direct(x, np.arange(len(x)), others, column))


def _within(ascending: np.ndarray, radii: np.ndarray) -> np.ndarray:
    return np.searchsorted(ascending, radii, side="right") / len(ascending)


def _quantiles(ascending: np.ndarray) -> np.ndarray:
    return np.quantile(ascending, charts.COVERAGE_SHARES, method="inverted_cdf")


def principal_axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [d], the two main axes [d, 2], and the share of the variance that each carries [2].

    By power iteration over a few more directions than two; what the axes carry is measured, not assumed.
    """
    center = x.mean(axis=0, dtype=np.float64)
    centered = x.astype(np.float64) - center
    d = x.shape[1]
    directions = np.random.default_rng(0).standard_normal((d, min(d, 10)))
    for _ in range(12):
        directions, _ = np.linalg.qr(centered.T @ (centered @ directions) + 1e-30 * directions)
    _, _, turned = np.linalg.svd(centered @ directions, full_matrices=False)
    axes = np.zeros((d, 2))
    axes[:, : min(d, 2)] = (directions @ turned.T)[:, :2]
    # The same way up every time.
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1, 1)
    total = (centered**2).sum()
    share = ((centered @ axes) ** 2).sum(axis=0) / total if total > 0 else np.zeros(2)
    return center, axes, share


# The evaluation


def _evaluation(run: Run, selection: Manifest) -> page.Evaluation | None:
    """Read what was found by true labels; None where that was not asked for, or was another selection."""
    manifest = run.manifest("evaluation")
    if manifest is None or manifest.inputs.get("selection") != selection.fingerprint:
        return None
    rows = pa.concat_tables(run.read_shard("evaluation", shard.index) for shard in manifest.shards)
    rows = rows.filter(pc.equal(rows["budget"], selection.rows))
    drawn = pc.is_valid(rows["draw"])
    picks, draws = (
        {
            figure: part.filter(pc.equal(part["figure"], figure))["value"].to_numpy()
            for figure in part["figure"].unique().to_pylist()
        }
        for part in (rows.filter(pc.invert(drawn)), rows.filter(drawn))
    )
    noted = manifest.summary
    counts = noted["class_counts"].get("selection", {})
    return page.Evaluation(picks, draws, counts, noted["judged"], noted["labeled"])


# The rejected


def _rejected(run: Run, manifest: Manifest) -> page.Rejected:
    """Count by reason, for the first REASONS of them, and keep the first rows."""
    reasons: Counter[str] = Counter()
    first: list[tuple[int, str, str]] = []
    for shard in range(len(manifest.shards)):
        rows = run.read_shard("rejected", shard)
        for reason, count in Counter(rows["reason"].to_pylist()).items():
            if reason in reasons or len(reasons) < REASONS:
                reasons[reason] += count
        head = rows.slice(0, REJECTED_ROWS - len(first)).to_pylist()
        first += [(row["image_id"], row["uri"], row["reason"]) for row in head]
    return page.Rejected(manifest.rows, reasons.most_common(), first)
