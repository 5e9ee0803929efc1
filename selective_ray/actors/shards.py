"""The actors that hold the embeddings: one step of density, K-Means or selection over the shards of each.

An actor that dies is started again by Ray, reads its shards again, and its call is repeated: everything a
call needs comes with it, so nothing is lost but time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import ray

from selective_ray import density, kmeans, selection
from selective_ray.actors.session import Session, cpus, peak_memory, unwrapped
from selective_ray.distances import sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.schema import CLUSTERS, DENSITY, Partial, Picks, sq_dist_column
from selective_ray.selection import Candidates, Repulsion
from selective_ray.store import Run, Shard

# Rows of one block that all queries are compared with, and of one group of queries.
BLOCK_ROWS = 16_384
# Blocks are kept for the next group of queries while all of them together are smaller than this.
KEPT_BYTES = 1 << 30
# How often an actor may die before the run gives up, and a call be repeated.
RESTARTS = 20


@dataclass(frozen=True)
class Judging:
    """How rows are judged: the column of `density/`, its unit and floor, and the repulsion."""

    column: str
    unit: float
    floor: float
    momentum: float
    repulsion: Repulsion


@ray.remote(num_cpus=1, max_restarts=RESTARTS, max_task_retries=RESTARTS)
class ShardHolder:
    """Holds some shards of a run, in ascending order, and answers for their rows."""

    def __init__(self, run: Run, shards: list[int], n: int, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self.run, self.shards, self.n = run, shards, n
        parts = [run.read_embeddings(shard) for shard in shards]
        self.image_ids = np.concatenate([ids for ids, _ in parts])
        self.x = np.concatenate([x for _, x in parts])
        ends = np.cumsum([len(ids) for ids, _ in parts])
        self.rows = {
            shard: slice(end - len(ids), end)
            for shard, (ids, _), end in zip(shards, parts, ends, strict=True)
        }
        self.kept: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.clustering: kmeans.Rows | None = None
        self.candidates: Candidates | None = None

    def pid(self) -> int:
        """Return the process that holds them."""
        return os.getpid()

    # Density

    def measure(
        self, shards: list[int], total_shards: int, k: int, include_self: bool, estimator: str, floor: float
    ) -> tuple[list[Shard], int]:
        """Write the density of some of the shards held here: the shards written and the peak memory."""
        slices = [self.rows[shard] for shard in shards]
        queries = self.x[slices[0].start : slices[-1].stop]
        needed = density.neighbors_needed(k, include_self)
        found = density.neighbors(queries, self._blocks(total_shards), needed)
        sq_dists = density.sq_dists_of(found, k=k, estimator=estimator)
        columns = {sq_dist_column(estimator): sq_dists}
        if estimator == "kth":
            columns["log_density"] = density.log_density(
                sq_dists, k=k, n=self.n, d=self.x.shape[1], floor=floor
            )
        written = []
        for shard, rows in zip(shards, slices, strict=True):
            part = slice(rows.start - slices[0].start, rows.stop - slices[0].start)
            content = {
                "image_id": self.image_ids[rows],
                **{key: value[part] for key, value in columns.items()},
            }
            written.append(self.run.write_shard("density", shard, pa.table(content, DENSITY[estimator])))
        return written, peak_memory()

    def _blocks(self, total_shards: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all rows of the run in blocks of about BLOCK_ROWS."""
        if self.kept is not None:
            yield from self.kept
            return
        keep = [] if self.n * self.x.shape[1] * 4 <= KEPT_BYTES else None
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for shard in range(total_shards):
            parts.append(self.run.read_embeddings(shard))
            if sum(len(ids) for ids, _ in parts) >= BLOCK_ROWS or shard == total_shards - 1:
                block = np.concatenate([ids for ids, _ in parts]), np.concatenate([x for _, x in parts])
                if keep is not None:
                    keep.append(block)
                yield block
                parts = []
        self.kept = keep

    # Clusters

    def kmeans_step(self, centroids: np.ndarray, candidates: int) -> Partial:
        """Assign the rows held here; return their Partial."""
        self.kept = None
        if self.clustering is None:
            self.clustering = kmeans.Rows(self.x, self.image_ids, self.n)
        return self.clustering.step(centroids, candidates)

    def rows_at(self, positions: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return rows of shards held here, by position within the shard."""
        return {
            shard: self.x[self.rows[shard].start + rows]
            for shard, rows in positions.items()
            if shard in self.rows
        }

    def write_clusters(self, assigned_by: np.ndarray, centroids: np.ndarray) -> tuple[list[Shard], int]:
        """Write the clusters of the shards held here: labels by `assigned_by`, distances to `centroids`."""
        labels = kmeans.assign(self.x, assigned_by)
        sq_dists = sq_dists_direct(self.x, np.arange(len(self.x)), centroids, labels)
        columns = {
            "image_id": self.image_ids,
            "cluster_id": labels,
            "sq_dist": sq_dists.astype(np.float32),
        }
        self.clustering = None
        written = [
            self.run.write_shard(
                "clusters", shard, pa.table({key: value[rows] for key, value in columns.items()}, CLUSTERS)
            )
            for shard, rows in self.rows.items()
        ]
        return written, peak_memory()

    # Selection

    def half_counts(self, column: str, high: int | None) -> np.ndarray:
        """Count the densities of the rows held here, for their median."""
        return density.half_counts(self._column("density", column), high)

    def nominate(self, weight: float, judging: Judging, history: list[ray.ObjectRef]) -> Picks:
        """Nominate among the rows held here, after the picks of all earlier rounds have repelled them."""
        return self._candidates(judging, history).nominate(weight)

    def vectors(self, picks: Picks) -> tuple[np.ndarray, np.ndarray]:
        """Return the picks held here: their places in `picks` int64 [p], and x float32 [p, d]."""
        place, rows = selection.find(self.image_ids, picks)
        return place, self.x[rows]

    def measured(
        self, picks: Picks, judging: Judging, history: list[ray.ObjectRef]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return places of the picks held here, their squared distances and repulsions, and peak memory."""
        place, rows = selection.find(self.image_ids, picks)
        repulsions = self._candidates(judging, history).exact_repulsion(rows)
        return place, self._column("density", judging.column)[rows], repulsions, peak_memory()

    def _candidates(self, judging: Judging, history: list[ray.ObjectRef]) -> Candidates:
        """Return the rows with all rounds so far behind them, whatever this actor has already seen."""
        if self.candidates is None:
            sq_dists = self._column("density", judging.column)
            self.candidates = Candidates(
                self.x,
                self.image_ids,
                self._column("clusters", "cluster_id"),
                density.relative(sq_dists, unit=judging.unit, floor=judging.floor),
                momentum=judging.momentum,
                parameters=judging.repulsion,
            )
        for picked in history[len(self.candidates.history) :]:
            self.candidates.repel(ray.get(picked))
        return self.candidates

    def _column(self, table: str, column: str) -> np.ndarray:
        """Read one column of a table for the rows held here; its ids are compared with theirs."""
        parts = [self.run.read_shard(table, shard, ["image_id", column]) for shard in self.shards]
        content = pa.concat_tables(parts)
        if not np.array_equal(content["image_id"].to_numpy(), self.image_ids):
            raise UserError(
                f"{self.run.path(table)} does not hold the images of {self.run.path('embeddings')}; "
                f"remove {self.run.path(table)} and run again"
            )
        return content[column].to_numpy()


class Pool:
    """The actors that together hold all shards of a run's embeddings; started when first needed."""

    def __init__(self, run: Run, workers: int | None, session: Session) -> None:
        self.run, self.workers, self.session = run, workers, session
        self.actors: list[Any] = []
        self.held: list[list[int]] = []

    def start(self) -> None:
        """Start the actors unless they run; each holds a contiguous share of the shards."""
        if self.actors:
            return
        self.session.start()
        embeddings = self.run.manifest("embeddings")
        assert embeddings is not None
        shards = len(embeddings.shards)
        count = min(self.workers or cpus(), shards)
        self.held = [part.tolist() for part in np.array_split(np.arange(shards), count)]
        # One thread an actor, and as many actors as CPUs: products are independent of each other.
        threads = max(1, cpus() // count)
        share = min(1.0, cpus() / count)
        self.actors = [
            ShardHolder.options(num_cpus=share).remote(self.run, held, embeddings.rows, threads)
            for held in self.held
        ]

    def each(self, call: Callable[[Any], ray.ObjectRef]) -> Iterator[Any]:
        """Make one call on every actor and yield the answers as they come, so that few are held at a time."""
        yield from self.answers([call(actor) for actor in self.actors])

    @staticmethod
    def answers(pending: list[ray.ObjectRef]) -> Iterator[Any]:
        """Yield the answers of calls as they come; a UserError of an actor is raised as itself."""
        while pending:
            (ready,), pending = ray.wait(pending, num_returns=1)
            try:
                with unwrapped():
                    answer = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                raise UserError(
                    f"a worker ended {RESTARTS} times, most likely for lack of memory; give it more, or "
                    f"fewer --set resources.workers ({str(error).splitlines()[0]})"
                ) from None
            yield answer

    def stop(self) -> None:
        """End the actors and free what they hold."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
