"""The select stage: the rounds' loop here, nominations and repulsion on the actors that hold the shards."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import ray

from selective_ray import density, selection
from selective_ray.actors.session import peak_memory
from selective_ray.actors.shards import Judging, Pool
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.schema import Picks, selection_schema, sq_dist_column
from selective_ray.store import Manifest, Run, Stopwatch

CSV = "selection.csv"


def select(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Pick one image of each cluster into `selection/`, as Parquet and CSV, ordered by cluster."""
    inputs = run.fingerprints("density", "clusters")
    what = {"selection": config.selection.model_dump()}
    if done := run.begin("selection", what, inputs):
        return done
    stopwatch = Stopwatch(run, "selection")
    settings, repulsion = config.selection, config.selection.repulsion()
    column = sq_dist_column(config.density.estimator)
    history: list[ray.ObjectRef] = []
    with reporter.stage("select", settings.rounds, "rounds") as bar:
        pool.start()
        scaled = settings.scale == "median"
        unit = density.median(functools.partial(_half_counts, pool, column)) if scaled else 1.0
        judging = Judging(column, unit, config.density.floor, settings.momentum, repulsion)

        def nominate(weight: float) -> Picks:
            """Send references to the earlier picks, m·d floats a round; merge one Picks an actor."""
            return pool.fold(lambda actor: actor.nominate.remote(weight, judging, history), Picks.merge)

        def fetch(picks: Picks) -> selection.PickedVectors:
            places, x = zip(*pool.all(lambda actor: actor.vectors.remote(picks)), strict=True)
            return selection.PickedVectors(picks.cluster_ids, _in_place(places, x))

        def watch(number: int) -> None:
            bar.advance(1)
            check()
            stopwatch.note()

        picks = selection.rounds(
            nominate,
            fetch,
            lambda picked: history.append(ray.put(picked)),
            n_rounds=settings.rounds,
            weight=settings.weight,
            unit=lambda picked: selection.repulsion_unit(picked, repulsion) if scaled else 1.0,
            watch=watch,
        )
        answers = pool.all(lambda actor: actor.measured.remote(picks, judging, history))
        places, sq_dists, repulsions, peaks = zip(*answers, strict=True)
    if len(picks.image_ids) != settings.budget:
        raise UserError(
            f"{len(picks.image_ids)} clusters hold images, and the budget is {settings.budget}; "
            f"remove {run.path('clusters')} and run again"
        )
    table = pa.table(
        {
            "image_id": picks.image_ids,
            "uri": run.listed(picks.image_ids)["uri"],
            "cluster_id": picks.cluster_ids,
            column: _in_place(places, sq_dists),
            "repulsion": _in_place(places, repulsions),
            "utility": picks.utilities,
        },
        selection_schema(config.density.estimator),
    )
    run.write_bytes(_csv(table), "selection", CSV)
    shard = run.write_shard("selection", 0, table)
    return run.finish(
        "selection",
        [shard],
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": max(peaks)},
        summary={"selected": len(table)},
    )


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
