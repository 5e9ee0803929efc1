"""The actors that hold the embeddings: one step of density, K-Means or selection over the shards of each.

An actor that dies is started again by Ray, reads its shards again, and its call is repeated: everything a
call needs comes with it, so nothing is lost but time.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from selective_ray import (
    density,
    ivf,
    joining,
    kmeans,
    methods,
    prototypes,
    random_picks,
    selection,
    starts,
    two_level,
    typiclust,
)
from selective_ray.actors.joining import (
    Joined,
    Joining,
    RowsByList,
    density_table,
    join_group,
    neighbors_table,
    read_groups,
)
from selective_ray.actors.session import peak_memory
from selective_ray.assignment import Assignment
from selective_ray.distances import blocks, sq_dists_direct
from selective_ray.errors import UserError
from selective_ray.greedy import Met, Pick
from selective_ray.heads import Trained, heads_table
from selective_ray.joining import Block, Cells
from selective_ray.methods import Terms
from selective_ray.neighbors import Nearest
from selective_ray.prototypes import Costs, Gains, Medoids, Offered, Proposals, Represented
from selective_ray.random_picks import Drawn
from selective_ray.repulsion import Repulsion
from selective_ray.schema import CLUSTERS, UTILITIES, Neighbors, Partial, Picks
from selective_ray.selection import Candidates
from selective_ray.store import Run, Shard
from selective_ray.two_level import Split

# How often an actor may die before the run gives up, and a call be repeated.
RESTARTS = 20

# What prototypes see rows by: the density's column, and the mean of all rows.
Seen = tuple[str, np.ndarray | None]


@dataclass(frozen=True)
class Judging:
    """How rows are judged: by which clusters, column of `density/`, unit and floor, and by what repulsion.

    open int32: the clusters that take part, None: all. prune: see `Candidates`.
    """

    clusters: str
    column: str
    unit: float
    floor: float
    momentum: float
    repulsion: Repulsion
    open: np.ndarray | None
    prune: bool


def _kernels() -> tuple[Callable[..., Nearest], Callable[..., Iterator[tuple]], Callable[..., Assignment]]:
    """How neighbors, lists and nearest centroids are found: in torch where this process has a GPU."""
    if not ray.get_gpu_ids():
        return Nearest, ivf.propose, Assignment
    # An import of seconds, for those who have a GPU.
    from selective_ray import assignment_torch, neighbors_torch

    on_device = assignment_torch.AssignmentOnDevice
    return neighbors_torch.NearestOnDevice, neighbors_torch.propose, on_device


# What others need goes out beside the work, so that two holders never wait for each other.
@ray.remote(num_cpus=1, max_restarts=RESTARTS, max_task_retries=RESTARTS, concurrency_groups={"move": 1})
class ShardHolder:
    """Holds some shards of a run, in ascending order, and answers for their rows."""

    def __init__(
        self, run: Run, shards: list[int], rows: list[int], first_row: int, n: int, dtype: str
    ) -> None:
        self.run, self.shards, self.first_row, self.n, self.dtype = run, shards, first_row, n, dtype
        ends = np.cumsum(rows).tolist()
        self.rows = {
            shard: slice(end - count, end) for shard, count, end in zip(shards, rows, ends, strict=True)
        }
        self.count = ends[-1]
        self.nearest, self.propose, self.assignment = _kernels()
        self.loading = threading.Lock()
        self.held: tuple[np.ndarray, np.ndarray] | None = None
        self.by_list: RowsByList | None = None
        self.starting: starts.Oversampling | None = None
        self.clustering: kmeans.Rows | None = None
        self.inside: kmeans.Rows | None = None
        self.candidates: Candidates | None = None
        self.judged_by = ""
        self.represented: Represented | None = None
        # The rows of a greedy method, and the table that they are picked for.
        self.greedy: tuple[str, Met] | None = None

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids of the rows held, int64 [n] ascending."""
        return self._load()[0]

    @property
    def x(self) -> np.ndarray:
        """The rows held, float32 [n, d]."""
        return self._load()[1]

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the shards at the first call that needs them: what is wrong with them is then told to it."""
        with self.loading:
            if self.held is None:
                d = self.run.manifest("embeddings").summary["dimension"]
                image_ids, x = np.empty(self.count, np.int64), np.empty((self.count, d), np.float32)
                for shard, where in self.rows.items():
                    self.run.verify_shard("embeddings", shard)
                    image_ids[where], part = self.run.read_embeddings(shard)
                    if part.shape[1] != d:
                        raise UserError(
                            f"shard {shard} of {self.run.path('embeddings')} has rows of {part.shape[1]} "
                            f"numbers, and others of {d}; embed again with a new --run"
                        )
                    x[where] = part
                steps = np.diff(image_ids, prepend=self._last_before())
                if (steps <= 0).any():
                    twice = int(image_ids[steps <= 0][0])
                    raise UserError(
                        f"image {twice} is there twice or out of order in {self.run.path('embeddings')}; "
                        "embed again with a new --run"
                    )
                self.held = image_ids, x
        return self.held

    def _last_before(self) -> int:
        """Return the last image id before those held here, -1 where there is none; another holder has it."""
        before = self.run.manifest("embeddings").shards[: self.shards[0]]
        last = next((shard.index for shard in reversed(before) if shard.rows), None)
        if last is None:
            return -1
        return self.run.read_shard("embeddings", last, ["image_id"])["image_id"][-1].as_py()

    def pid(self) -> int:
        """Return the process that holds them."""
        return os.getpid()

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows by their position among all: places in `positions`, image_ids, and x, of those held."""
        place = np.flatnonzero((positions >= self.first_row) & (positions < self.first_row + self.count))
        rows = positions[place] - self.first_row
        return place, self.image_ids[rows], self.x[rows]

    # Density

    def train(self, lists: int, seed: int, *samples: tuple) -> np.ndarray:
        """Train the centroids of the lists on the rows that the holders drew."""
        places, _, x = zip(*samples, strict=True)
        return ivf.train(np.concatenate(x)[np.argsort(np.concatenate(places))], lists, seed)

    def neighbors_here(self, queries: np.ndarray, needed: int) -> Neighbors:
        """Find the nearest rows of some queries among the rows held here."""
        nearest = self.nearest(queries, needed)
        nearest.offer(self.image_ids, self.x)
        return nearest.found()

    def distinct_here(self, queries: np.ndarray, needed: int) -> tuple[Neighbors, np.ndarray]:
        """Find the nearest rows of some queries among those held here that differ; with their hashes."""
        nearest, (rows, _) = self.nearest(queries, needed), joining.distinct(self.x)
        for some in blocks(len(rows), self.x.shape[1]):
            nearest.offer(self.image_ids[rows[some]], self.x[rows[some]])
        found = nearest.found()
        at = np.minimum(np.searchsorted(self.image_ids, found.image_ids.ravel()), self.count - 1)
        return found, joining.hashes(self.x[at]).reshape(found.image_ids.shape)

    def lists_of(self, image_ids: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lists of the images held here: places in image_ids, and lists."""
        place, rows = selection.find(self.image_ids, image_ids)
        return place, ivf.assign(self.x[rows], centroids, propose=self.propose).lists

    def _density(self, how: Joining) -> RowsByList:
        if self.by_list is None or self.by_list.how != how:
            self.by_list = RowsByList(self, how)
        return self.by_list

    def assign(self, how: Joining) -> np.ndarray:
        """Find and keep the lists that the rows held here are in and probe; returns the sizes of lists."""
        return self._density(how).sizes()

    def work(self, how: Joining, cells: Cells, sizes: np.ndarray) -> np.ndarray:
        """Return what the join costs for each group, as far as its rows are held here, in products."""
        return self._density(how).work(cells, sizes)

    @ray.method(concurrency_group="move")
    def slices(self, how: Joining, cells: Cells, groups: list[int]) -> tuple[Block, ...] | Block:
        """Return the rows held here of some groups."""
        blocks = tuple(self._density(how).slice(cells, group) for group in groups)
        return blocks if len(blocks) > 1 else blocks[0]

    @ray.method(concurrency_group="move")
    def gather(self, how: Joining, *parts: Block) -> Block:
        """Own a group: put its rows together."""
        return joining.gather(parts, how.collapse)

    def join(
        self, how: Joining, cells: Cells, group: int, blocks: list[ray.ObjectRef], sampled: np.ndarray
    ) -> Joined:
        """Find the neighbors of the rows of a group and write their densities."""
        return join_group(self.run, how, cells, group, blocks, sampled, self.nearest)

    def write_density(self, how: Joining, groups: int, n: int) -> tuple[list[Shard], list[Shard], int]:
        """Write the densities of the shards held here; also their neighbors, if kept, and peak memory."""
        self.by_list = None
        written, kept = [], []
        ids = self.image_ids
        if how.collapse:
            firsts, place = joining.distinct(self.x)
            ids = ids[firsts]
        found = read_groups(self.run, how, groups, ids)
        if how.collapse:
            found = {key: values[place] for key, values in found.items()}
        for shard, rows in self.rows.items():
            part = {key: values[rows] for key, values in found.items()}
            ids = self.image_ids[rows]
            written.append(
                self.run.write_shard("density", shard, density_table(how, part, ids, n, self.x.shape[1]))
            )
            if how.keep_neighbors:
                kept.append(self.run.write_shard("neighbors", shard, neighbors_table(part, ids)))
        return written, kept, peak_memory()

    # Clusters

    def start_cost(self, history: list[ray.ObjectRef]) -> int:
        """Sum the squared distances of the rows held here to the nearest candidate for a start."""
        return self._starting(history).cost()

    def start_draw(self, history: list[ray.ObjectRef], cost: int, wanted: float, seed: int) -> np.ndarray:
        """Draw candidates among the rows held here: their positions among all."""
        return self._starting(history).draw(cost, wanted, seed)

    def start_weights(self, history: list[ray.ObjectRef]) -> np.ndarray:
        """Count the rows held here that are nearest to each candidate."""
        weights = self._starting(history).weights()
        self.starting = None
        return weights

    def _starting(self, history: list[ray.ObjectRef]) -> starts.Oversampling:
        """Return the rows with all rounds so far behind them, whatever this actor has already seen."""
        if self.starting is None:
            positions = np.arange(self.first_row, self.first_row + self.count)
            self.starting = starts.Oversampling(self.x, positions, self.n)
        for drawn in history[self.starting.rounds :]:
            self.starting.offer(ray.get(drawn))
        return self.starting

    def kmeans_step(self, centroids: np.ndarray, candidates: int, clusters: slice) -> Partial:
        """Assign the rows held here, unless they are; return their Partial of some clusters."""
        return self._clustering().step(centroids, candidates, clusters)

    @ray.method(concurrency_group="move")
    def add(self, *parts: Partial) -> Partial:
        """Add what several holders contribute to some clusters."""
        return functools.reduce(Partial.__add__, parts)

    def _clustering(self) -> kmeans.Rows:
        self.inside = None
        if self.clustering is None:
            self.clustering = kmeans.Rows(self.x, self.image_ids, self.n, self.assignment(self.x))
        return self.clustering

    def kmeans_step_inside(
        self, split: Split, centroids: np.ndarray, candidates: int, clusters: slice
    ) -> Partial:
        """Assign the rows held here within their coarse clusters; return their Partial of some clusters."""
        return self._split(split).step(centroids, candidates, clusters)

    def draw_inside(self, split: Split, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw rows of each coarse cluster from those held here."""
        positions = np.arange(self.first_row, self.first_row + self.count)
        return self._split(split).assignment.draw(positions, seed)

    def _split(self, split: Split) -> kmeans.Rows:
        if self.inside is None:
            rows = self._clustering()
            self.inside = two_level.inside(rows, rows.labels(split.centroids), split.first, self.n)
            self.clustering = None
        return self.inside

    def write_clusters(
        self, table: str, assigned_by: np.ndarray, centroids: np.ndarray
    ) -> tuple[list[Shard], int]:
        """Write the clusters of the shards held here: labels by `assigned_by`, distances to `centroids`."""
        labels = self._clustering().labels(assigned_by)
        sq_dists = sq_dists_direct(self.x, np.arange(len(self.x)), centroids, labels)
        columns = {
            "image_id": self.image_ids,
            "cluster_id": labels,
            "sq_dist": sq_dists.astype(np.float32),
        }
        self.clustering = None
        written = [
            self.run.write_shard(
                table, shard, pa.table({key: value[rows] for key, value in columns.items()}, CLUSTERS)
            )
            for shard, rows in self.rows.items()
        ]
        return written, peak_memory()

    def write_heads(self, table: str, heads: Trained) -> tuple[list[Shard], int]:
        """Write the clusters of the shards held here as trained heads tell them; also peak memory."""
        clusters, confidence, sq_dists = heads.judge(self.x)
        written = [
            self.run.write_shard(
                table,
                shard,
                heads_table(self.image_ids[rows], clusters[rows], confidence[rows], sq_dists[rows]),
            )
            for shard, rows in self.rows.items()
        ]
        return written, peak_memory()

    # Selection

    def half_counts(self, column: str, high: int | None) -> np.ndarray:
        """Count the densities of the rows held here, for their median."""
        return density.half_counts(self._column("density", column), high)

    def bar(self, weight: float, judging: Judging, history: list[ray.ObjectRef]) -> tuple[Picks, int]:
        """Return the last picks among the rows held here, with what their utilities now are at least.

        Also returns how many pairs of row and pick have been compared for it.
        """
        candidates = self._candidates(judging, history)
        before = candidates.compared
        return candidates.bar(weight), candidates.compared - before

    def nominate(
        self, weight: float, bar: Picks, judging: Judging, history: list[ray.ObjectRef]
    ) -> tuple[Picks, int]:
        """Nominate among the rows held here, after the picks of all earlier rounds have repelled them.

        Also returns how many pairs of row and pick have been compared for it.
        """
        candidates = self._candidates(judging, history)
        before = candidates.compared
        return candidates.nominate(weight, bar), candidates.compared - before

    def clusters_of(
        self, table: str, image_ids: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return places in image_ids and clusters of the images held here, and the sizes of all clusters."""
        clusters = self._column(table, "cluster_id")
        place, rows = selection.find(self.image_ids, image_ids)
        return place, clusters[rows], np.bincount(clusters, minlength=count)

    def vectors(self, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images held here: their places in image_ids int64 [p], and x float32 [p, d]."""
        place, rows = selection.find(self.image_ids, image_ids)
        return place, self.x[rows]

    def sq_dists_of(self, column: str, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Return places of the images held here, what their density is the inverse of, and peak memory."""
        place, rows = selection.find(self.image_ids, image_ids)
        return place, self._column("density", column)[rows], peak_memory()

    def repulsions_of(
        self, image_ids: np.ndarray, judging: Judging, history: list[ray.ObjectRef]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return places of the images held here, and their repulsions."""
        place, rows = selection.find(self.image_ids, image_ids)
        return place, self._candidates(judging, history).exact_repulsion(rows)

    def write_utilities(
        self, table: str, weight: float, judging: Judging, history: list[ray.ObjectRef]
    ) -> list[Shard]:
        """Write repulsion and utility of all rows held here, as they were when the last round picked."""
        repulsion, utility = self._candidates(judging, history).judged(weight)
        columns = {"image_id": self.image_ids, "repulsion": repulsion, "utility": utility}
        return [
            self.run.write_shard(
                table, shard, pa.table({key: value[rows] for key, value in columns.items()}, UTILITIES)
            )
            for shard, rows in self.rows.items()
        ]

    def _candidates(self, judging: Judging, history: list[ray.ObjectRef]) -> Candidates:
        """Return the rows with all rounds so far behind them, whatever this actor has already seen."""
        if self.candidates is None or self.judged_by != judging.clusters:
            sq_dists = self._column("density", judging.column)
            self.candidates = Candidates(
                self.x,
                self.image_ids,
                self._column(judging.clusters, "cluster_id"),
                density.relative(sq_dists, unit=judging.unit, floor=judging.floor),
                momentum=judging.momentum,
                parameters=judging.repulsion,
                open=judging.open,
                prune=judging.prune,
            )
            self.judged_by = judging.clusters
        for picked in history[len(self.candidates.history) :]:
            self.candidates.repel(ray.get(picked))
        return self.candidates

    def nearest_to_centroids(self, table: str, open: np.ndarray | None) -> Picks:
        """Return the row held here that is nearest to the centroid of each open cluster."""
        clusters = self._column(table, "cluster_id")
        rows = np.arange(len(clusters)) if open is None else np.flatnonzero(np.isin(clusters, open))
        sq_dists = self._column(table, "sq_dist")[rows].astype(np.float64)
        return Picks.none().merge(Picks(clusters[rows], self.image_ids[rows], -sq_dists))

    def best_of_heads(self, table: str, column: str, open: np.ndarray, taken: np.ndarray) -> Picks:
        """Return the surest row held here of each open cluster; the densest, by a column of `density/`.

        taken int64 ascending: image ids that are not to be picked.
        """
        clusters = self._column(table, "cluster_id")
        rows = np.flatnonzero(np.isin(clusters, open) & ~np.isin(self.image_ids, taken))
        utilities = -self._column("density", column) if column else self._column(table, "confidence")
        chosen = Picks(clusters[rows], self.image_ids[rows], utilities[rows].astype(np.float64))
        return Picks.none().merge(chosen)

    def summed(self) -> np.ndarray:
        """Add up the rows held here, in fixed point."""
        return prototypes.summed(self.x, self.n)

    def represent(self, medoids: Medoids, seen: Seen, share: float, draw: int) -> Costs:
        """Sum what the rows held here, or a share of them, contribute to the cost of picks."""
        return self._represented(*seen).represent(medoids, share, draw)

    def propose(self, medoids: Medoids, seen: Seen, means: np.ndarray, draw: int) -> Proposals:
        """Propose rows held here for picks."""
        return self._represented(*seen).propose(medoids, means, draw)

    def gains(self, medoids: Medoids, seen: Seen, offered: Offered) -> Gains:
        """Return what candidates gain among the rows held here."""
        return self._represented(*seen).gains(medoids, offered)

    def _represented(self, column: str, mean: np.ndarray | None) -> Represented:
        if self.represented is None:
            sq_dists = self._column("density", column)
            self.represented = Represented(self.x, self.image_ids, sq_dists, self.n, mean)
        return self.represented

    def draw(self, count: int, seed: int, without: np.ndarray) -> Drawn:
        """Draw some of the rows held here."""
        positions = np.arange(self.first_row, self.first_row + self.count)
        return random_picks.draw(self.image_ids, positions, count, seed, without)

    def feature_sums(self, terms: Terms) -> np.ndarray:
        """Add up the random features of the rows held here."""
        return terms.random_features(self.x.shape[1]).sums(self.x, self.n)

    def picks_of(self, table: str, terms: Terms, image_ids: np.ndarray) -> list[Pick]:
        """Return the images held here as picks of a greedy method."""
        _, rows = selection.find(self.image_ids, image_ids)
        return [self._greedy(table, terms).rows.pick_of(row) for row in rows.tolist()]

    def greedy_best(self, table: str, terms: Terms, since: int, picked: list[Pick]) -> Pick | None:
        """Let the rows held here meet picks, and return the best; None where they miss earlier ones."""
        return self._greedy(table, terms).best(since, picked)

    def _greedy(self, table: str, terms: Terms) -> Met:
        if self.greedy is None or self.greedy[0] != table:
            self.greedy = (
                table,
                Met(methods.rows_of(terms, self.x, self.image_ids, self._neighbors(), self.first_row)),
            )
        return self.greedy[1]

    def _neighbors(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Read the neighbors of all images, shard by shard: those held here may be neighbors of any."""
        for shard in self.run.manifest("neighbors").shards:
            content = self.run.read_shard("neighbors", shard.index).combine_chunks()
            lists = (content[name].combine_chunks() for name in ("neighbors", "sq_dists"))
            k = content.schema.field("neighbors").type.list_size
            yield (
                content["image_id"].to_numpy(),
                *(part.flatten().to_numpy().reshape(-1, k) for part in lists),
            )

    @ray.method(concurrency_group="move")
    def rows_of_clusters(self, table: str, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows held here of some clusters int32 ascending: x, image_ids, and their clusters."""
        labels = self._column(table, "cluster_id")
        rows = np.flatnonzero(np.isin(labels, clusters))
        return self.x[rows], self.image_ids[rows], labels[rows]

    def typical(self, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Picks:
        """Pick the most typical row of each of some clusters, whose rows the holders sent."""
        return typiclust.picks(*(np.concatenate(part) for part in zip(*parts, strict=True)))

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
