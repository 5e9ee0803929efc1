"""The select stage: the rounds' loop here, nominations and repulsion on the actors that hold the shards."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selective_ray import density, selection
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import peak_memory
from selective_ray.actors.shards import Judging
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.repulsion import PickedVectors, repulsion_unit
from selective_ray.schema import Picks, selection_schema, sq_dist_column
from selective_ray.store import Manifest, Run, Stopwatch, nested

CSV = "selection.csv"


@dataclass(frozen=True)
class Step:
    """One budget of those that contain each other: its tables, and what repels from the start.

    labeled int64 are the image ids that have labels; smaller is the selection of the budget before, if any.
    """

    budget: int
    clusters: str
    utilities: str
    selection: str
    labeled: np.ndarray
    smaller: str | None


def steps(config: Config, labeled: np.ndarray) -> list[Step]:
    """Return what is to be selected, smallest budget first; the last has the tables without a number."""
    made: list[Step] = []
    budgets = config.selection.every_budget()
    for budget in budgets:
        tables = (
            stage if budget == budgets[-1] else nested(stage, budget)
            for stage in ("clusters", "utilities", "selection")
        )
        made.append(Step(budget, *tables, labeled, made[-1].selection if made else None))
    return made


def what_of(config: Config, step: Step) -> dict[str, Any]:
    """Return what a selection depends on, as its manifest has it; of the labeled, their image ids."""
    settings = config.selection.model_dump(exclude={"budgets", "labeled"}) | {"budget": step.budget}
    if len(step.labeled):
        settings["labeled"] = hashlib.sha256(step.labeled.astype("<i8").tobytes()).hexdigest()[:16]
    return {"selection": settings}


def select(
    run: Run,
    config: Config,
    step: Step,
    pool: Pool,
    reporter: Reporter,
    *,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Pick one image of each open cluster into `selection/`, as Parquet and CSV, ordered by cluster.

    Images that are labeled, and those of a smaller budget, close their clusters and repel like picks; the
    largest clusters that are open get what is left of the budget. The selection holds the smaller one.
    """
    inputs = {
        "density": run.manifest("density").fingerprint,
        "clusters": run.manifest(step.clusters).fingerprint,
        **({"smaller": run.manifest(step.smaller).fingerprint} if step.smaller else {}),
    }
    what = what_of(config, step)
    if done := run.begin(step.selection, what, inputs):
        return done
    stopwatch = Stopwatch(run, step.selection)
    settings, repulsion = config.selection, config.selection.repulsion()
    column = sq_dist_column(config.density.estimator)
    before, budgets_before = _picked(run, step)
    fixed = np.union1d(step.labeled, before)
    count = step.budget - len(before)
    if settings.keep_utilities:
        reporter.warn(
            "keeping the utility of every image compares every image with every pick in every round, "
            "and nothing is pruned"
        )
    history: list[ray.ObjectRef] = []
    compared: list[int] = []
    pairs_in_all, weight_at_last = 1, 0.0
    with reporter.stage("select", settings.rounds, "rounds") as bar:
        pool.start()
        scaled = settings.scale == "median"
        unit = density.median(functools.partial(_half_counts, pool, column)) if scaled else 1.0
        fixed_clusters, sizes = _clusters(run, pool, step, fixed)
        judged = Judging(
            *(step.clusters, column, unit, config.density.floor, settings.momentum, repulsion),
            open=selection.largest_open(sizes, fixed_clusters, count) if len(fixed) else None,
            prune=not settings.keep_utilities,
        )
        judging = ray.put(judged)
        started = time.monotonic()

        def nominate(weight: float) -> Picks:
            """Send references to the earlier picks, m·d floats a round; merge two Picks an actor."""
            nonlocal weight_at_last
            bar, first = pool.fold(lambda actor: actor.bar.remote(weight, judging, history), _merge)
            sent = ray.put(bar)
            picks, pairs = pool.fold(
                lambda actor: actor.nominate.remote(weight, sent, judging, history), _merge
            )
            compared.append(first + pairs)
            weight_at_last = weight
            return picks

        def fetch(picks: Picks) -> PickedVectors:
            nonlocal pairs_in_all
            ids = np.concatenate([fixed, picks.image_ids])
            clusters = np.concatenate([fixed_clusters, picks.cluster_ids])
            order = np.lexsort((ids, clusters))
            places, x = zip(*pool.all(lambda actor: actor.vectors.remote(ids[order])), strict=True)
            pairs_in_all = int(sizes.sum()) * len(ids)
            return PickedVectors(clusters[order], ids[order], _in_place(places, x))

        def watch(number: int) -> None:
            bar.advance(1)
            if number > 1:
                bar.say(f"{100 * compared[-1] / pairs_in_all:.2f} % of distances to picks computed")
            check()
            stopwatch.note()

        picks = selection.rounds(
            nominate,
            fetch,
            lambda picked: history.append(ray.put(picked)),
            n_rounds=settings.rounds,
            weight=settings.weight,
            unit=lambda picked: repulsion_unit(picked, repulsion) if scaled else 1.0,
            watch=watch,
        )
        seconds_of_rounds = time.monotonic() - started
        if len(picks.image_ids) != count:
            raise UserError(
                f"{len(picks.image_ids)} clusters hold images and are open, and {count} are needed for the "
                f"budget of {step.budget}; remove {run.path(step.clusters)} and run again"
            )
        ids = np.concatenate([before, picks.image_ids])
        clusters = np.concatenate([fixed_clusters[np.searchsorted(fixed, before)], picks.cluster_ids])
        order = np.lexsort((ids, clusters))
        ids, clusters = ids[order], clusters[order]
        answers = pool.all(lambda actor: actor.measured.remote(ids, judging, history))
        places, sq_dists, repulsions, peaks = zip(*answers, strict=True)
        memory = {"driver": peak_memory(), "largest_worker": max(peaks)}
        if settings.keep_utilities and not run.begin(step.utilities, what, inputs):
            written = pool.all(
                lambda actor: actor.write_utilities.remote(step.utilities, weight_at_last, judging, history)
            )
            run.finish(
                step.utilities,
                [shard for shards in written for shard in shards],
                seconds=stopwatch.seconds(),
                peak_memory_bytes=memory,
                summary={},
            )
    sq_dists, repulsions = _in_place(places, sq_dists), _in_place(places, repulsions)
    densities = density.relative(sq_dists, unit=unit, floor=config.density.floor)
    columns = {
        "image_id": ids,
        "uri": run.listed(ids)["uri"],
        "cluster_id": clusters,
        column: sq_dists,
        "repulsion": repulsions,
        "utility": densities - weight_at_last * repulsions,
    }
    if step.smaller:
        columns["budget"] = np.concatenate([budgets_before, np.full(count, step.budget)])[order]
    schema = selection_schema(config.density.estimator, nested=step.smaller is not None)
    table = pa.table(columns, schema)
    run.write_bytes(_csv(table), step.selection, CSV)
    shard = run.write_shard(step.selection, 0, table)
    return run.finish(
        step.selection,
        [shard],
        seconds=stopwatch.seconds(),
        peak_memory_bytes=memory,
        summary={
            "selected": len(table),
            **({"labeled_before": len(step.labeled)} if len(step.labeled) else {}),
            **({"selected_before": len(before)} if len(before) else {}),
            **({"clusters_closed": len(np.unique(fixed_clusters))} if len(fixed) else {}),
            # Of those that every image has to every pick, round by round from the second on.
            "distances_computed": [round(pairs / pairs_in_all, 6) for pairs in compared[1:]],
            "pruned": judged.prune,
            "seconds_of_rounds": round(seconds_of_rounds, 3),
        },
    )


def _picked(run: Run, step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Return what the smaller budget has selected, and the smallest budget of each, int64 [p] both."""
    if step.smaller is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    there = run.read_shard(step.smaller, 0)
    image_ids = there["image_id"].to_numpy()
    if "budget" in there.column_names:
        return image_ids, there["budget"].to_numpy()
    return image_ids, np.full(len(image_ids), run.manifest(step.smaller).what["selection"]["budget"])


def _clusters(run: Run, pool: Pool, step: Step, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the clusters of some images, int32 [p], and the sizes of all clusters, int64 [c]."""
    count = run.manifest(step.clusters).summary["clusters"]
    sent = ray.put(image_ids)
    answers = pool.all(lambda actor: actor.clusters_of.remote(step.clusters, sent, count))
    places, clusters, sizes = zip(*answers, strict=True)
    found = np.concatenate(places)
    if len(found) < len(image_ids):
        lost = np.setdiff1d(np.arange(len(image_ids)), found)
        raise UserError(
            f"labeled image {image_ids[lost[0]]}{f' and {len(lost) - 1:,} more' if len(lost) > 1 else ''} "
            f"could not be read when {run.uri} was embedded (see rejected/); take it out of --labeled"
        )
    return _in_place(places, clusters), np.sum(sizes, axis=0)


def _merge(mine: tuple[Picks, int], theirs: tuple[Picks, int]) -> tuple[Picks, int]:
    return mine[0].merge(theirs[0]), mine[1] + theirs[1]


def _half_counts(pool: Pool, column: str, high: int | None) -> np.ndarray:
    return pool.fold(lambda actor: actor.half_counts.remote(column, high), np.add)


def _in_place(places: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Put what the actors answered in the order of the picks."""
    return np.concatenate(values)[np.argsort(np.concatenate(places))]


def _csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return text.getvalue().encode()
