"""The select stage: what was picked, by whichever method, becomes the table `selection/`."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selective_ray import selection
from selective_ray.actors import draws, greedy, prototypes, rounds, typiclust, usl_t
from selective_ray.actors.picking import Asked, in_place
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import peak_memory
from selective_ray.config import METHOD_KEYS, Config
from selective_ray.errors import UserError
from selective_ray.methods import GREEDY
from selective_ray.progress import Reporter
from selective_ray.schema import selection_schema, sq_dist_column
from selective_ray.store import Manifest, Run, Stopwatch, nested
from selective_ray.truth import Truth

CSV = "selection.csv"
METHODS = {
    "usl": rounds,
    "prototypes": prototypes,
    "k-medoid": prototypes,
    "typiclust": typiclust,
    "usl-t": usl_t,
    "random": draws,
    "stratified": draws,
    **dict.fromkeys(GREEDY, greedy),
}


@dataclass(frozen=True)
class Step:
    """One budget of those that contain each other: its tables, and what repels from the start.

    labeled int64 are the image ids that have labels; smaller is the selection of the budget before, if any;
    truth: the labels of images, for an oracle.
    """

    budget: int
    clusters: str
    utilities: str
    selection: str
    labeled: np.ndarray
    smaller: str | None
    truth: Truth | None = None


def steps(config: Config, labeled: np.ndarray, truth: Truth | None = None) -> list[Step]:
    """Return what is to be selected, smallest budget first; the last has the tables without a number."""
    made: list[Step] = []
    budgets = config.selection.every_budget()
    for budget in budgets:
        tables = (
            stage if budget == budgets[-1] else nested(stage, budget)
            for stage in ("clusters", "utilities", "selection")
        )
        made.append(Step(budget, *tables, labeled, made[-1].selection if made else None, truth))
    return made


def what_of(config: Config, step: Step) -> dict[str, Any]:
    """Return what a selection depends on, as its manifest has it; of the labeled, their image ids."""
    method = config.selection.method
    # What other methods take is left out, so that runs from before there were any are continued.
    keys = {*METHOD_KEYS[method], *(() if method == "usl" else ("method",))}
    settings = config.selection.model_dump(include=keys) | {"budget": step.budget}
    if step.truth:
        settings["labels"] = step.truth.digest
    if method == "usl-t":
        settings["pick"] = config.usl_t.pick
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
    largest clusters that are open get what is left of the budget. The selection holds the smaller one. Some
    methods pick without clusters, which then say only where the picks lie.
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
    settings = config.selection
    column = sq_dist_column(config.density.estimator)
    before, budgets_before = _picked(run, step)
    fixed = np.union1d(step.labeled, before)
    count = step.budget - len(before)
    if settings.keep_utilities:
        reporter.warn(
            "keeping the utility of every image compares every image with every pick in every round, "
            "and nothing is pruned"
        )
    method = METHODS[settings.method]
    with reporter.stage("select", method.expected(settings, count), method.UNITS) as bar:
        pool.start()
        fixed_clusters, sizes = _clusters(run, pool, step.clusters, fixed)

        def watch(words: str) -> None:
            bar.advance(1)
            bar.tell(f"{method.UNITS} so far", done=bar.done)
            if words:
                bar.say(words)
            check()
            stopwatch.note()

        asked = Asked(
            config=config,
            clusters=step.clusters,
            column=column,
            fixed=fixed,
            fixed_clusters=fixed_clusters,
            sizes=sizes,
            count=count,
            open=selection.largest_open(sizes, fixed_clusters, count) if len(fixed) else None,
            table=step.selection,
            truth=step.truth,
        )
        started = time.monotonic()
        chosen = method.pick(pool, asked, watch)
        seconds_of_rounds = time.monotonic() - started
        if len(chosen.image_ids) != count:
            raise UserError(
                f"{len(chosen.image_ids)} clusters hold images and are open, and {count} are needed for the "
                f"budget of {step.budget}; remove {run.path(step.clusters)} and run again"
            )
        ids = np.concatenate([before, chosen.image_ids])
        clusters, _ = _clusters(run, pool, step.clusters, ids)
        order = np.lexsort((ids, clusters))
        ids, clusters = ids[order], clusters[order]
        answers = pool.all(lambda actor: actor.sq_dists_of.remote(column, ids))
        places, sq_dists, peaks = zip(*answers, strict=True)
        sq_dists = in_place(places, sq_dists)
        memory = {"driver": peak_memory(), "largest_worker": max(peaks)}
        repulsions, utilities = chosen.judge(ids, sq_dists)
        if chosen.write and not run.begin(step.utilities, what, inputs):
            run.finish(
                step.utilities,
                chosen.write(step.utilities),
                seconds=stopwatch.seconds(),
                peak_memory_bytes=memory,
                summary={},
            )
    columns = {
        "image_id": ids,
        "uri": run.listed(ids)["uri"],
        "cluster_id": clusters,
        column: sq_dists,
        "repulsion": repulsions,
        "utility": utilities,
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
            **chosen.summary,
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


def _clusters(run: Run, pool: Pool, table: str, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the clusters of some images, int32 [p], and the sizes of all clusters, int64 [c]."""
    count = run.manifest(table).summary["clusters"]
    sent = ray.put(image_ids)
    answers = pool.all(lambda actor: actor.clusters_of.remote(table, sent, count))
    places, clusters, sizes = zip(*answers, strict=True)
    assert sum(map(len, places)) == len(image_ids)
    return in_place(places, clusters), np.sum(sizes, axis=0)


def _csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return text.getvalue().encode()
