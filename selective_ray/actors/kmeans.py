"""The cluster stage: Lloyd's loop here, its step a sum over the actors that hold the shards.

Before every iteration its centroids are kept in `clusters/work/`, so that a dead driver costs one iteration.
"""

from __future__ import annotations

import io
import operator
import zipfile
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np
import ray

from selective_ray import kmeans, objects, starts, two_level
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import peak_memory
from selective_ray.config import Config
from selective_ray.progress import Reporter, Watch
from selective_ray.schema import Partial
from selective_ray.store import Manifest, Run, Stopwatch
from selective_ray.two_level import Reached, Split

CENTROIDS = "centroids.npy"
WORK = "work"
# Iterations that are kept: the last one, and the one before should that be damaged.
KEPT = 2


def what_of(config: Config, budget: int, labeled: int) -> dict[str, Any]:
    """Return what a clustering depends on, as its manifest has it."""
    two_levels = budget + labeled >= config.cluster.two_level
    return {
        "selection": {"budget": budget, **({"labeled": labeled} if labeled else {})},
        "cluster": config.cluster.model_dump(exclude=set() if two_levels else {"two_level"}),
        "seed": config.seed,
    }


def cluster(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    budget: int,
    labeled: int = 0,
    table: str = "clusters",
    earlier: Run | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Cluster the embeddings into a table `clusters/` and its `centroids.npy`.

    There are as many clusters as the budget and the labeled images, so that enough are free of these.
    """
    embeddings = run.manifest("embeddings")
    assert embeddings is not None
    n, m = embeddings.rows, budget + labeled
    settings = config.cluster
    what = what_of(config, budget, labeled)
    if done := run.begin(table, what, run.fingerprints("embeddings"), earlier):
        return done
    stopwatch = Stopwatch(run, table)
    kept = _Kept(run, table)
    expected = two_level.ITERATIONS if m >= settings.two_level else settings.iterations
    with reporter.stage("cluster", expected, "iterations", kept.done) as bar:
        d = embeddings.summary["dimension"]
        pool.start(lambda rows, _: kmeans.holder_bytes(rows, d, m))

        def watch(iteration: kmeans.Iteration) -> None:
            _say(bar, iteration)
            check()
            stopwatch.note()

        try:
            clustering = two_level.cluster(
                _Steps(pool, config, n).steps(),
                n=n,
                m=m,
                split_from=settings.two_level,
                iterations=settings.iterations,
                tolerance=settings.tolerance,
                final_assignment=settings.final_assignment,
                reached=kept.reached,
                watch=watch,
                keep=kept.keep,
            )
        except kmeans.TooFewDistinct as error:
            raise kmeans.TooFewDistinct(error.distinct, n, labeled) from None
        written = [ray.put(clustering.assigned_by), ray.put(clustering.centroids)]
        answers = pool.all(lambda actor: actor.write_clusters.remote(table, *written))
    buffer = io.BytesIO()
    np.save(buffer, clustering.centroids)
    run.write_bytes(buffer.getvalue(), table, CENTROIDS)
    history = clustering.history
    last = history[-1]
    finished = run.finish(
        table,
        [shard for shards, _ in answers for shard in shards],
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": max(peak for _, peak in answers)},
        summary={
            "clusters": m,
            "iterations": last.number,
            "mean_sq_dist_to_centroid": last.inertia,
            "smallest_cluster": last.smallest,
            "largest_cluster": last.largest,
            "empty_clusters_repaired": sum(iteration.empty for iteration in history),
            "share_of_distances": round(sum(iteration.share for iteration in history) / len(history), 4),
            "history": {
                key: [getattr(iteration, key) for iteration in history]
                for key in ("inertia", "shift", "empty", "smallest", "largest", "share", "seconds")
            },
        },
    )
    run.delete_folder(table, WORK)
    return finished


def _say(bar: Watch, iteration: kmeans.Iteration) -> None:
    bar.advance(1)
    bar.tell(
        "iteration",
        iteration=iteration.number,
        objective=iteration.inertia,
        shift=iteration.shift,
        empty=iteration.empty,
        smallest=iteration.smallest,
        largest=iteration.largest,
        share_of_distances=iteration.share,
    )
    bar.say(
        f"mean squared distance {iteration.inertia:.4f}, shift {iteration.shift:.1e}, clusters of "
        f"{iteration.smallest:,} to {iteration.largest:,}"
        + (f", {iteration.empty:,} empty" if iteration.empty else "")
        + f", {iteration.share:.0%} of distances"
    )


class _Steps:
    """The steps of clustering, as calls of the actors; values go to every node once."""

    def __init__(self, pool: Pool, config: Config, n: int) -> None:
        self.pool, self.config, self.n = pool, config, n
        self.sent: dict[str, tuple] = {}

    def steps(self) -> two_level.Steps:
        return two_level.Steps(self.full, self.inside, self.start, self.start_inside)

    def _put(self, name: str, value: object) -> ray.ObjectRef:
        """Return a reference to a value, the same as long as the value is the same object."""
        if name not in self.sent or self.sent[name][0] is not value:
            self.sent[name] = value, ray.put(value)
        return self.sent[name][1]

    def full(self, centroids: np.ndarray, candidates: int, clusters: slice) -> Partial:
        """One Partial of some clusters from each actor, for all its shards, added."""
        sent = self._put("centroids", centroids)
        return self._add(
            lambda actor: actor.kmeans_step.remote(sent, candidates, clusters), clusters, len(centroids)
        )

    def inside(self, split: Split, centroids: np.ndarray, candidates: int, clusters: slice) -> Partial:
        sent = self._put("split", split), self._put("centroids", centroids)
        return self._add(
            lambda actor: actor.kmeans_step_inside.remote(*sent, candidates, clusters),
            clusters,
            len(centroids),
        )

    def _add(self, call: Callable[[Any], ray.ObjectRef], clusters: slice, c: int) -> Partial:
        """Add what all actors contribute to all clusters here, and to a range of them each on another actor:
        only the sum comes here, however many actors there are."""
        width = clusters.stop - clusters.start
        if width in (0, c):
            return self.pool.fold(call, Partial.__add__)
        turn = clusters.start // width
        return self.pool.added(call, lambda actor, parts: actor.add.remote(*parts), turn)

    def start(self, count: int) -> np.ndarray:
        seed = self.config.seed
        if self.config.cluster.init == "random":
            return self._rows(kmeans.initial_rows(self.n, count, seed))
        offered: list[ray.ObjectRef] = []

        def draw(cost: int, wanted: float) -> np.ndarray:
            calls = self.pool.all(lambda actor: actor.start_draw.remote(offered, cost, wanted, seed))
            return np.concatenate(calls)

        positions = starts.draw_starts(
            self._rows,
            lambda candidates: offered.append(ray.put(candidates)),
            lambda: self.pool.fold(lambda actor: actor.start_cost.remote(offered), operator.add),
            draw,
            lambda: self.pool.fold(lambda actor: actor.start_weights.remote(offered), np.add),
            n=self.n,
            m=count,
            seed=seed,
        )
        return self._rows(positions)

    def start_inside(self, split: Split) -> np.ndarray:
        sent = self._put("split", split)
        draws = self.pool.all(lambda actor: actor.draw_inside.remote(sent, self.config.seed))
        return self._rows(two_level.merge_draws(draws, split.first))

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        return self.pool.rows_at(positions)[1]


class _Kept:
    """What a table's `work/` holds of the last iterations; `reached` is where an earlier attempt came to."""

    def __init__(self, run: Run, table: str) -> None:
        self.run, self.table = run, table
        self.names = objects.names(run.path(table, WORK), run.access)
        found = (self._read(name) for name in reversed(self.names))
        # Damaged on its way to the disk: the one before is as good.
        self.reached = next((reached for reached in found if reached), None)
        self.done = len(self.reached.history) if self.reached else 0

    def keep(self, reached: Reached) -> None:
        """Keep what the next iteration starts with."""
        split = reached.split or Split(np.empty((0, 0), np.float32), np.empty(0, np.int64))
        buffer = io.BytesIO()
        np.savez(
            buffer,
            phase=reached.phase,
            centroids=reached.centroids,
            history=np.array([astuple(done) for done in reached.history]),
            coarse=split.centroids,
            first=split.first,
        )
        name = f"iteration-{reached.number:06d}.npz"
        self.run.write_bytes(buffer.getvalue(), self.table, WORK, name)
        self.names = [*(old for old in self.names if old != name), name]
        for old in self.names[:-KEPT]:
            self.run.delete(self.table, WORK, old)
        self.names = self.names[-KEPT:]

    def _read(self, name: str) -> Reached | None:
        data = self.run.read_bytes(self.table, WORK, name)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as kept:
                history = [_iteration(numbers) for numbers in kept["history"].tolist()]
                split = Split(kept["coarse"], kept["first"]) if len(kept["first"]) else None
                return Reached(str(kept["phase"]), kept["centroids"], history, split)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def _iteration(numbers: list[float]) -> kmeans.Iteration:
    number, inertia, shift, empty, smallest, largest, *rest = numbers
    return kmeans.Iteration(int(number), inertia, shift, int(empty), int(smallest), int(largest), *rest)
