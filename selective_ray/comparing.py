"""The comparison of methods on the embeddings of a run, by true labels: every method, budget and seed.

A cell is one method, budget and seed: its picks, judged as `evaluation` does, all on the same images. It is
kept in `comparison/cells/` as soon as it is known and never made twice; so the work can be cut short, and
methods, budgets and seeds added later. It is done in this process: the images, or a sample of them, fit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from selective_ray import (
    active,
    checkpoints,
    comparison_page,
    config,
    density,
    evaluation,
    in_memory,
    judging,
    truth,
)
from selective_ray.comparison import AGAINST, SEES_LABELS, Cell, Compared, Plan
from selective_ray.config import METHOD_KEYS, Config
from selective_ray.errors import UsageError, UserError, named
from selective_ray.lease import Lease
from selective_ray.memory import peak_memory
from selective_ray.progress import Reporter
from selective_ray.schema import COMPARISON
from selective_ray.store import Run, fingerprint
from selective_ray.trial import Trial
from selective_ray.truth import Truth

OF_CLUSTERS = ("usl", "prototypes", "k-medoid", "typiclust")
# Random picks are also judged at budgets that double up to so many times the largest, to find the one at
# which they are as accurate as a method; of all images at most a share.
DOUBLED, LARGEST_SHARE = 3, 0.25
# Raised when a cell of the same settings would come out otherwise.
VERSION = 3


def compare(run: Run, plan: Plan, reporter: Reporter) -> Compared:
    """Compare methods on a run, and leave the numbers in its `comparison/`, with a page.

    Raises UserError where the run has no embeddings, or the labels do not tell; UsageError where what is
    asked for cannot be.
    """
    started = time.monotonic()
    plan = replace(plan, methods=tuple(dict.fromkeys((*AGAINST, *plan.methods))))
    plan.check()
    if run.manifest("embeddings") is None:
        raise UserError(f"{run.uri} has no finished embeddings; run `selective-ray embed` on it first")
    ground = _Ground(run, plan, truth.read([run], plan.labels), reporter)
    with Lease(run, reporter.say) as lease:
        cells, picks, wanted = [], {}, list(_wanted(plan, len(ground.image_ids)))
        kept = {key: run.read_json("comparison", "cells", f"{key}.json") for key in map(ground.key, wanted)}
        done = sum(one is not None for one in kept.values())
        with reporter.stage("compare", len(wanted), "selections", done) as bar:
            for one in wanted:
                found = kept[ground.key(one)]
                if found is None:
                    found = ground.judge(*one)
                    run.write_json(found, "comparison", "cells", f"{ground.key(one)}.json")
                    bar.advance(1)
                    lease.check()
                cells.append(Cell(*one, found["figures"], found["seconds"]))
                picks[one] = np.array(found["image_ids"], np.int64)
        if plan.fixmatch:
            trained = {one: picks[one] for one in wanted if one[1] in plan.budgets}
            for cell, accuracy in _trained(ground, trained, reporter, lease.check).items():
                cells[wanted.index(cell)].figures["fixmatch"] = accuracy
        found = Compared(
            *(
                run.uri,
                run.path("comparison", "index.html"),
                ground.truth.source,
                run.manifest("embeddings").rows,
                ground.labeled,
            ),
            *(len(ground.image_ids), len(ground.truth.classes), plan, cells),
        )
        content = pa.Table.from_pylist([row for cell in cells for row in _rows(cell)], COMPARISON)
        run.replace(
            "comparison",
            content,
            what={"comparison": {**_plain(plan), "cells": _digest(list(kept))}},
            inputs=run.fingerprints("embeddings"),
            seconds=time.monotonic() - started,
            peak_memory_bytes={"driver": peak_memory()},
            summary={"images": found.images, "compared": found.compared, "made": len(wanted) - done},
        )
        run.write_bytes(comparison_page.render(found).encode(), "comparison", "index.html")
    return found


def _trained(
    ground: _Ground, picks: dict[tuple[str, int, int], np.ndarray], reporter: Reporter, check: Any
) -> dict[tuple[str, int, int], float]:
    """Train FixMatch on the labels of every cell's picks, image ids int64 [m]; returns the accuracies."""
    how, run = ground.config.train, ground.run
    without = {"evaluate_every", "checkpoint_every", "propagate"}
    what = how.model_dump(exclude=without)
    if how.checkpoint:
        what["checkpoint"] = checkpoints.sha256(how.checkpoint, run.access)
    keys = {one: fingerprint("fixmatch", {"cell": ground.key(one), "train": what}, {}) for one in picks}
    kept = {one: run.read_json("comparison", "fixmatch", f"{key}.json") for one, key in keys.items()}
    found = {one: answer["accuracy"] for one, answer in kept.items() if answer is not None}
    with reporter.stage("fixmatch", len(picks), "trainings", len(found)) as bar:
        for one, image_ids in picks.items():
            if one not in found:
                rows = np.searchsorted(ground.image_ids, image_ids)
                found[one] = ground.trial.accuracy(rows, one[2], check)
                answer: dict[str, Any] = dict(zip(("method", "budget", "seed"), one, strict=True))
                answer["accuracy"] = found[one]
                run.write_json(answer, "comparison", "fixmatch", f"{keys[one]}.json")
                bar.advance(1)
    return found


def _wanted(plan: Plan, n: int) -> list[tuple[str, int, int]]:
    """List the cells, those that share clusters next to each other."""
    if plan.budgets[-1] >= n:
        raise UserError(
            f"a budget of {plan.budgets[-1]:,} leaves none of the {n:,} labeled images to judge by; lower "
            "--budgets"
        )
    cells = [(m, b, s) for b in plan.budgets for s in range(plan.seeds) for m in plan.methods]
    more = [plan.budgets[-1] << doubled for doubled in range(1, DOUBLED + 1)]
    return cells + [("random", b, s) for b in more if b <= LARGEST_SHARE * n for s in range(plan.seeds)]


def _rows(cell: Cell) -> list[dict[str, Any]]:
    made = {"method": cell.method, "sees_labels": cell.method in SEES_LABELS}
    made |= {"budget": cell.budget, "seed": cell.seed}
    values = {**cell.figures, "seconds": cell.seconds}
    return [{**made, "figure": name, "value": value} for name, value in values.items()]


def _plain(plan: Plan) -> dict[str, Any]:
    return {**vars(plan), "methods": list(plan.methods), "budgets": list(plan.budgets), "set": list(plan.set)}


def _digest(things: list[Any]) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]


class _Ground:
    """What all cells share: the images that have a label, or a sample of them, and what is found in them."""

    def __init__(self, run: Run, plan: Plan, true: Truth, reporter: Reporter) -> None:
        self.run, self.plan, self.truth, self.reporter = run, plan, true, reporter
        if len(true.classes) < 2:
            what = f"all are {true.classes[0]!r}" if true.classes else "there are none"
            raise UserError(
                f"the labels of {true.source} cannot tell one selection from another ({what}); give those of "
                "many images of two classes or more with --labels FILE, or --labels folders"
            )
        ids = true.image_ids if true.image_ids is not None else _embedded(run)
        self.labeled = len(ids)
        embedded = run.manifest("embeddings").rows
        if len(ids) < embedded:
            reporter.warn(
                f"{len(ids):,} of {embedded:,} images have a label: the methods are compared on these alone"
            )
        if len(ids) > plan.sample:
            reporter.warn(
                f"the methods are compared on {plan.sample:,} of the {len(ids):,} labeled images, drawn at "
                "random, as if there were no others; for more, give --sample"
            )
            ids = np.sort(np.random.default_rng(0).choice(ids, plan.sample, replace=False))
        self.image_ids = ids
        self.config, asked = _settings(run, plan.set, plan.fixmatch)
        self.k, lowered = density.possible_k(
            *(self.config.density.k, len(ids), self.config.density.include_self, "density.k" in asked)
        )
        if lowered:
            reporter.warn(lowered)
        self.fixed = {
            "embeddings": run.manifest("embeddings").fingerprint,
            "labels": true.digest,
            "images": _digest(ids.tolist()),
            "version": VERSION,
        }
        # Of clusters, which methods share: the seconds they took.
        self.clocked: dict[tuple[int, int], float] = {}

    def key(self, cell: tuple[str, int, int]) -> str:
        """Return the fingerprint of a cell: all that its picks and figures depend on."""
        method, budget, seed = cell
        what = {"method": method, "budget": budget, "seed": seed, **self.fixed}
        what["density"] = {**self.config.density.model_dump(include=SETTINGS["density"]), "k": self.k}
        if method in active.METHODS:
            what["rounds"] = self.plan.rounds
        else:
            what["selection"] = self.config.selection.model_dump(include={*METHOD_KEYS[method]} - {"labels"})
        if method in OF_CLUSTERS:
            what["cluster"] = self.config.cluster.model_dump()
        return fingerprint("comparison", what, {})

    def judge(self, method: str, budget: int, seed: int) -> dict[str, Any]:
        """Pick, and judge the picks: what is kept of a cell."""
        selection = self.config.selection.model_copy(update={"method": method, "budget": budget})
        config = self.config.model_copy(update={"selection": selection, "seed": seed})
        rows, ground = self.rows, self.ground
        seconds = 0.0
        if method in OF_CLUSTERS:
            started = time.monotonic()
            rows.clusters(config, budget)
            seconds = self.clocked.setdefault((budget, seed), time.monotonic() - started)
        started = time.monotonic()
        if method in active.METHODS:
            share = {"budget": budget, "rounds": self.plan.rounds, "seed": seed}
            picks = active.picks(method, rows.x, ground.standard, ground.labels, **share)
        else:
            labels = ground.labels if method == "stratified" else None
            picks = rows.picks(config, budget, labels)[0]
        seconds += time.monotonic() - started
        return {
            "method": method,
            "budget": budget,
            "seed": seed,
            "figures": evaluation.judge(ground, np.sort(picks)),
            "seconds": round(seconds, 4),
            "image_ids": self.image_ids[picks].tolist(),
        }

    @cached_property
    def rows(self) -> in_memory.Rows:
        """The rows with their neighbors, found when the first cell is missing."""
        self.reporter.say(f"compare: reading {len(self.image_ids):,} embeddings, and finding neighbors")
        ids, x, _ = judging.read_rows(self.run, np.empty(0, np.int64), self.image_ids)
        assert np.array_equal(ids, self.image_ids)
        return in_memory.Rows(x, self.config.density, self.k, self.image_ids)

    @cached_property
    def ground(self) -> evaluation.Ground:
        """What picks are judged on: all rows."""
        rows, all_of_them = self.rows, np.ones(len(self.image_ids), bool)
        itself = self.config.density.estimator == "mean" and self.config.density.include_self and self.k > 1
        # Without the image itself among its neighbors, as `evaluate` has it.
        sq_radius = density.median(lambda high: density.half_counts(rows.sq_dists, high))
        return evaluation.Ground(
            *(rows.x, self.truth.of(self.run, self.image_ids), len(self.truth.classes)),
            *(all_of_them, all_of_them, sq_radius * (self.k / (self.k - 1) if itself else 1)),
            evaluation.graph(evaluation.graph_neighbors(rows.x)),
        )

    @cached_property
    def trial(self) -> Trial:
        """What classifiers are trained and judged on: the images themselves."""
        how, cache = self.config.train, self.config.resources.cache * 2**30
        self.reporter.say(f"fixmatch: reading {len(self.image_ids):,} images, {how.steps:,} steps a training")
        labels = self.truth.of(self.run, self.image_ids)
        return Trial(self.run, self.image_ids, labels, how, cache)


# What is taken over from a run; neighbors are searched exactly here.
SETTINGS = {
    "density": {"k", "include_self", "estimator", "floor", "duplicates"},
    "cluster": {"iterations", "tolerance", "init", "two_level", "final_assignment"},
    "selection": {key for keys in METHOD_KEYS.values() for key in keys} - {"labels", "keep_utilities"},
}


def _settings(run: Run, assignments: Sequence[str], fixmatch: bool) -> tuple[Config, set[str]]:
    """Return the configuration that a run was made with, where it is known, under what is asked for now."""
    given = {assignment.partition("=")[0].strip() for assignment in assignments}
    known = {f"{section}.{key}" for section, keys in SETTINGS.items() for key in keys}
    if fixmatch:
        known |= {f"train.{key}" for key in config.Train.model_fields} - {"train.propagate"}
    if other := sorted(given - known):
        raise UsageError(
            f"compare does not take {named(other, ', ')}; --set is for keys of [density], [cluster] and "
            "[selection] that methods share, and with --fixmatch for those of [train]"
        )
    asked: dict[str, Any] = {}
    for table, section in (("density", "density"), ("clusters", "cluster"), ("selection", "selection")):
        made = run.manifest(table)
        for key, value in (made.what.get(section, {}) if made else {}).items():
            if key in SETTINGS[section] and f"{section}.{key}" not in given:
                asked[f"{section}.{key}"] = value
    return config.load(assignments=list(assignments), options=asked)


def _embedded(run: Run) -> np.ndarray:
    shards = run.manifest("embeddings").shards
    parts = [run.read_shard("embeddings", shard.index, ["image_id"])["image_id"] for shard in shards]
    return np.concatenate([part.to_numpy() for part in parts])
