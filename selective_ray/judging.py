"""Selections of finished runs, judged on their embeddings: against random draws, and side by side.

Shards are read here one after the other, and only rows of a sample and the picks are kept: few enough for
seconds in one process, where actors would take longer to start. Picks and draws are judged on the same rows.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from selective_ray import density, evaluation, report, truth
from selective_ray.errors import UsageError, UserError
from selective_ray.evaluation import GRAPH_NEIGHBORS, Ground
from selective_ray.lease import Lease
from selective_ray.memory import peak_memory
from selective_ray.progress import Reporter
from selective_ray.schema import EVALUATION, Neighbors, sq_dist_column
from selective_ray.store import Run, stage_of
from selective_ray.truth import Truth

# Draws are taken from the sample: it holds so many times the picks at least.
SAMPLE_OF_PICKS = 4


@dataclass(frozen=True)
class Selection:
    """What one run selected for one budget: image_ids int64 [m] ascending.

    kind is all that it was made with but for the seed: selections of one kind are repetitions.
    """

    run: Run
    table: str
    fingerprint: str
    budget: int
    seed: int
    kind: str
    image_ids: np.ndarray
    method: str = "usl"


@dataclass(frozen=True)
class Group:
    """Selections of one kind, and their figures: a dict for each, and for each random draw of their size."""

    selections: list[Selection]
    picks: list[dict[str, float]]
    draws: list[dict[str, float]]
    # How many picks are judged, and drawn.
    sizes: tuple[int, ...]
    # Of each selection, the number of picks of every class; nothing where no label is known.
    class_counts: list[dict[str, int]]


@dataclass(frozen=True)
class Judged:
    """What was found on one set of embeddings."""

    embeddings: str
    images: int
    sampled: int
    judged: int
    radius: float
    truth: Truth
    labeled: int
    groups: list[Group]


@dataclass(frozen=True)
class How:
    """How selections are judged: by which labels, a file, `folders`, or None for those in the runs; against
    how many random draws; on how many images at most, unless picks are many."""

    labels: str | None
    draws: int
    sample: int
    seed: int


def evaluate(runs: Sequence[Run], how: How, reporter: Reporter) -> list[Judged]:
    """Judge the selections of runs, and leave the figures in `evaluation/` of each and in its report.

    Runs with the same embeddings are judged on the same images, against the same draws. Raises UserError
    where a run is not finished, or where the labels are not of its images, or tell nothing.
    """
    started = time.monotonic()
    if len(set(runs)) < len(runs):
        raise UsageError("a --run is given twice; give each once")
    by_embeddings: dict[str, list[Selection]] = {}
    for run in runs:
        found = _selections(run)
        by_embeddings.setdefault(run.manifest("embeddings").fingerprint, []).extend(found)
    for selections in by_embeddings.values():
        _check_different(selections)
    if len(by_embeddings) > 1:
        reporter.warn(
            f"the runs have {len(by_embeddings)} different embeddings: each is judged on its own, and their "
            "figures are not comparable"
        )
    found = [_judge(selections, how, reporter) for selections in by_embeddings.values()]
    for judged in found:
        for run in runs:
            _leave(run, judged, how, time.monotonic() - started, reporter)
    return found


def _selections(run: Run) -> list[Selection]:
    """Return what a run selected; several where its budgets contain each other."""
    embeddings, last = run.manifest("embeddings"), run.manifest("selection")
    if embeddings is None:
        raise UserError(f"{run.uri} has no finished embeddings; run `selective-ray select` on it first")
    if last is None:
        raise UserError(f"{run.uri} has no finished selection; run `selective-ray select` on it first")
    found = []
    for table in run.tables():
        manifest = run.manifest(table)
        if stage_of(table) != "selection" or manifest is None:
            continue
        made = [embeddings.fingerprint, manifest.what]
        clusters = run.manifest(table.replace("selection", "clusters", 1))
        for stage in (run.manifest("density"), clusters):
            made.append(stage and {key: value for key, value in stage.what.items() if key != "seed"})
        shards = [run.read_shard(table, shard.index, ["image_id"]) for shard in manifest.shards]
        found.append(
            Selection(
                *(run, table, manifest.fingerprint, manifest.rows),
                seed=clusters.what.get("seed", 0) if clusters else 0,
                kind=json.dumps(made, sort_keys=True),
                image_ids=np.sort(pa.concat_tables(shards)["image_id"].to_numpy()),
                method=manifest.what.get("selection", {}).get("method", "usl"),
            )
        )
    return found


def _check_different(selections: list[Selection]) -> None:
    """Raise UserError where two runs are one and the same selection: as two seeds they would deceive."""
    first: dict[str, Selection] = {}
    for one in selections:
        other = first.setdefault(one.fingerprint, one)
        if other.run != one.run:
            raise UserError(
                f"{other.run.uri} and {one.run.uri} hold the same selection, with seed {one.seed}; leave "
                "one out"
            )


# On one set of embeddings


def _judge(selections: list[Selection], how: How, reporter: Reporter) -> Judged:
    run = selections[0].run
    runs = list(dict.fromkeys(selection.run for selection in selections))
    true = truth.read(runs, how.labels)
    n = run.manifest("embeddings").rows
    labeled = n if true.image_ids is None else len(true.image_ids)
    picked = np.unique(np.concatenate([selection.image_ids for selection in selections]))
    largest = max(len(selection.image_ids) for selection in selections)
    size = min(n, max(how.sample, SAMPLE_OF_PICKS * largest))
    rng = np.random.default_rng(how.seed)
    positions = np.sort(rng.choice(n, size, replace=False)) if size < n else np.arange(n)
    others = np.empty(0, np.int64)
    if labeled < n:
        # Where labels are few they may be mostly those of the picks, and no fair sample of anything.
        others = np.setdiff1d(true.image_ids, picked)
        others = np.sort(rng.choice(others, size, replace=False)) if size < len(others) else others
    telling = _telling(true, labeled, n, len(others), how, reporter)
    sq_radius = _sq_radius(runs)
    asked = {one.fingerprint: _asked(one, true, telling, reporter) for one in selections}
    reporter.say(f"evaluate: reading {size + len(others) + len(picked):,} of {n:,} embeddings")
    image_ids, x, sampled = read_rows(run, positions, np.union1d(picked, others))
    labels = true.of(run, image_ids)
    judged = np.zeros(len(x), bool)
    if telling:
        judged = sampled if labeled == n else np.isin(image_ids, others)
        reporter.say(f"evaluate: finding the neighbors of {len(x):,} images among each other")
    graph = evaluation.graph(_neighbors(run, image_ids, x)) if telling else None
    ground = Ground(x, labels, len(true.classes), judged, sampled, sq_radius, graph)
    rows = {key: np.searchsorted(image_ids, ids) for key, ids in asked.items()}
    groups = _groups(selections, rows, ground, true.classes, telling, how, reporter)
    return Judged(
        *(run.manifest("embeddings").fingerprint, n, size, int(judged.sum()), math.sqrt(sq_radius)),
        *(true, labeled, groups),
    )


def _telling(true: Truth, labeled: int, n: int, others: int, how: How, reporter: Reporter) -> bool:
    """Whether the labels can tell how well the picks do; raises UserError where a person said they can."""
    if len(true.classes) < 2:
        why = (
            f"all of them are {true.classes[0]!r}, and it takes two classes" if labeled else "there are none"
        )
    elif labeled < n and others < 2:
        why = f"{others or 'none'} of them {'is' if others == 1 else 'are'} of an image that was not picked"
    else:
        return True
    if how.labels is not None:
        raise UserError(
            f"the labels of {true.source} cannot tell how good a selection is: {why}; give those of more "
            "images"
        )
    counted = "what the picks cover, and their classes" if labeled else "what the picks cover"
    reporter.warn(
        f"only {counted} can be told from the labels that were brought into the run ({why}); to judge by "
        "accuracy, give true labels of many images with --labels FILE, or --labels folders"
    )
    return False


def _asked(selection: Selection, true: Truth, telling: bool, reporter: Reporter) -> np.ndarray:
    """Return the picks that are judged, int64 [p]: those that have a label, where labels tell."""
    picks = selection.image_ids
    known = picks[true.of(selection.run, picks) >= 0] if telling else picks
    if not len(known):
        raise UserError(
            f"{true.source} labels none of the {len(picks):,} picks of {selection.run.uri}; give their "
            "labels too"
        )
    if len(known) < len(picks):
        reporter.warn(
            f"{len(known):,} of the {len(picks):,} picks of {selection.run.uri} are labeled: only they are "
            "judged, against draws of as many"
        )
    return known


def read_rows(
    run: Run, positions: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read some embeddings, shard by shard: those at the positions among all, and those of wanted image ids.

    Both ascending. Returns image_ids int64 [h] ascending, x float32 [h, d], and which are at the positions.
    """
    ends = np.cumsum([0, *(shard.rows for shard in run.manifest("embeddings").shards)])
    # Image ids are dense, and shard i holds those of shard i of the listing, less the rejected.
    last_ids = np.cumsum([shard.rows for shard in run.manifest("images").shards]) - 1
    ids, x, sampled = [], [], []
    for shard in range(len(ends) - 1):
        here = positions[slice(*np.searchsorted(positions, ends[shard : shard + 2]))] - ends[shard]
        after, to = (last_ids[shard - 1] if shard else -1), last_ids[shard]
        asked = wanted[slice(*np.searchsorted(wanted, [after, to], side="right"))]
        if not len(here) and not len(asked):
            continue
        shard_ids, shard_x = run.read_embeddings(shard)
        kept = np.union1d(here, np.flatnonzero(np.isin(shard_ids, asked)))
        ids.append(shard_ids[kept])
        x.append(shard_x[kept])
        sampled.append(np.isin(kept, here))
    image_ids = np.concatenate(ids)
    lost = np.setdiff1d(wanted, image_ids)
    if len(lost):
        raise UserError(
            f"{len(lost):,} picks or labeled images of {run.uri}, as image {lost[0]}, have no embedding; "
            "make the run again under a new --run"
        )
    return image_ids, np.concatenate(x), np.concatenate(sampled)


def _sq_radius(runs: list[Run]) -> float:
    """Return the median, over all images, of the mean squared distance to the neighbors of `density/`.

    Of the first run that has it. The image itself does not count as its neighbor. With the k-th estimator,
    the distance of the k-th.
    """
    run = next((run for run in runs if run.manifest("density")), None)
    if run is None:
        raise UserError(
            f"{runs[0].uri} has no finished density, which says what near is; run `selective-ray density` "
            "on it"
        )
    manifest = run.manifest("density")
    settings = manifest.what["density"]
    column = sq_dist_column(settings["estimator"])

    def count(high: int | None) -> np.ndarray:
        shards = range(len(manifest.shards))
        values = (run.read_shard("density", shard, [column])[column].to_numpy() for shard in shards)
        return functools.reduce(np.add, (density.half_counts(part, high) for part in values))

    k = settings["k"]
    itself = settings["estimator"] == "mean" and settings["include_self"] and k > 1
    return density.median(count) * (k / (k - 1) if itself else 1)


def _neighbors(run: Run, image_ids: np.ndarray, x: np.ndarray) -> Neighbors:
    """Return the nearest other rows of every row: those the run has kept, if all its rows are here."""
    manifest = run.manifest("neighbors")
    if manifest is None or len(x) < manifest.rows or len(x) <= GRAPH_NEIGHBORS:
        return evaluation.graph_neighbors(x)
    found = []
    for shard in range(len(manifest.shards)):
        kept = run.read_shard("neighbors", shard).combine_chunks()
        ids = kept["image_id"].to_numpy()
        lists = [kept[name].combine_chunks().flatten().to_numpy() for name in ("sq_dists", "neighbors")]
        sq_dists, others = (values.reshape(len(ids), -1) for values in lists)
        if others.shape[1] <= GRAPH_NEIGHBORS:
            return evaluation.graph_neighbors(x)
        found.append(Neighbors(sq_dists.astype(np.float64), others).without(ids))
    image_of = np.concatenate([part.image_ids[:, :GRAPH_NEIGHBORS] for part in found])
    sq_dists = np.concatenate([part.sq_dists[:, :GRAPH_NEIGHBORS] for part in found])
    return Neighbors(sq_dists, np.where(image_of < 0, -1, np.searchsorted(image_ids, image_of)))


def _groups(
    selections: list[Selection],
    rows: dict[str, np.ndarray],
    ground: Ground,
    classes: list[str],
    telling: bool,
    how: How,
    reporter: Reporter,
) -> list[Group]:
    """Judge every selection by its rows, and for every size of one as many random draws."""
    kinds: dict[str, list[Selection]] = {}
    for selection in selections:
        kinds.setdefault(selection.kind, []).append(selection)
    sizes = sorted({len(known) for known in rows.values()})
    # What is drawn has no labels that can be trusted to be a fair sample, unless they tell.
    blind = ground if telling else replace(ground, labels=np.full(len(ground.x), -1))
    pool = np.flatnonzero(ground.judged if telling else ground.covered)
    drawn: dict[int, list[dict[str, float]]] = {}
    with reporter.stage("evaluate", len(selections) + how.draws * len(sizes), "selections") as bar:
        for size in sizes:
            rng = np.random.default_rng(how.seed)
            # Two images at least are left to be judged.
            possible = size + (2 if telling else 0) <= len(pool)
            if not possible:
                reporter.warn(
                    f"there are no random draws of {size:,}: {len(pool):,} labeled images may be drawn, and "
                    "two must be left to judge by; give --labels for more images"
                )
            drawn[size] = []
            for _ in range(how.draws if possible else 0):
                drawn[size].append(evaluation.judge(blind, rng.choice(pool, size, replace=False)))
                bar.advance(1)
        groups = []
        for some in kinds.values():
            picks, counts = [], []
            for selection in some:
                mine = rows[selection.fingerprint]
                picks.append(evaluation.judge(ground, mine))
                codes = ground.labels[mine]
                counted = evaluation.class_counts(codes[codes >= 0], ground.classes).tolist()
                counts.append(dict(zip(classes, counted, strict=True)))
                bar.advance(1)
            own = tuple(sorted({len(rows[selection.fingerprint]) for selection in some}))
            groups.append(Group(some, picks, [one for size in own for one in drawn[size]], own, counts))
    return groups


# What is left in the run


def _leave(run: Run, judged: Judged, how: How, seconds: float, reporter: Reporter) -> None:
    """Write `evaluation/` of a run, and its report again if it has one."""
    mine = [(g, s) for g in judged.groups for s in g.selections if s.run == run]
    if not mine:
        return
    content = pa.Table.from_pylist([row for group, _ in mine for row in _table(group)], EVALUATION)
    tables = sorted({"embeddings", "density", *(selection.table for _, selection in mine)})
    what = {
        "labels": judged.truth.digest,
        "draws": how.draws,
        "sample": how.sample,
        "seed": how.seed,
        # What is judged with it shares its images.
        "beside": sorted(s.fingerprint for g in judged.groups for s in g.selections),
    }
    counts = {
        selection.table: group.class_counts[group.selections.index(selection)] for group, selection in mine
    }
    summary = {
        "images": judged.images,
        "sampled": judged.sampled,
        "judged": judged.judged,
        "labeled": judged.labeled,
        "radius": judged.radius,
        "class_counts": counts,
    }
    try:
        with Lease(run, reporter.say):
            run.replace(
                "evaluation",
                content,
                what={"evaluation": what},
                inputs=run.fingerprints(*tables),
                seconds=seconds,
                peak_memory_bytes={"driver": peak_memory()},
                summary=summary,
            )
    except (UserError, OSError) as error:
        reporter.warn(f"the figures of {run.uri} could not be written: {error}")
        return
    if run.exists("report", "index.html"):
        clusters = run.manifest("clusters")
        try:
            report.write(run, seed=clusters.what["seed"] if clusters else 0, say=reporter.say)
        except (UserError, OSError) as error:
            reporter.warn(f"the report of {run.uri} could not be written again: {error}")


def _table(group: Group) -> Iterator[dict[str, Any]]:
    """Lay out the figures of a group: a row for each, of each selection and of each draw."""
    budget = group.selections[0].budget
    for selection, figures in zip(group.selections, group.picks, strict=True):
        for name, value in figures.items():
            made = {"run": selection.run.uri, "seed": selection.seed, "draw": None}
            yield {"budget": budget, **made, "figure": name, "value": value}
    for draw, figures in enumerate(group.draws):
        for name, value in figures.items():
            yield {"budget": budget, "run": None, "seed": None, "draw": draw, "figure": name, "value": value}
