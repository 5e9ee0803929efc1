"""The rows of a holder by inverted list, the join of a group, and what both leave in `density/work/`.

What is kept there survives a dead driver: the lists of the rows of each shard, and the densities of each
finished group, sorted by image id so that the holder of a shard reads little more than its own rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from selective_ray import density, ivf, joining, objects
from selective_ray.actors.session import peak_memory
from selective_ray.errors import UserError
from selective_ray.joining import Block, Cells
from selective_ray.neighbors import Nearest
from selective_ray.schema import DENSITY, neighbors_schema, sq_dist_column
from selective_ray.store import Run

if TYPE_CHECKING:
    from selective_ray.actors.shards import ShardHolder

WORK = "work"
# Row groups of the file of a group: a holder reads those that may have rows of its shards.
ROW_GROUPS = 16


@dataclass(frozen=True)
class Joining:
    """How rows are joined in one round; a later round only joins the rows that probe more than in `before`.

    centroids float32 [lists, d] by reference, None in exact mode. It travels with every call, so that a
    holder that was started again needs nothing else.
    """

    k: int
    include_self: bool
    estimator: str
    floor: float
    collapse: bool
    keep_neighbors: bool
    list_rows: int
    centroids: ray.ObjectRef | None
    reach: float
    probes: int | None
    round: int
    before: float | None

    @property
    def needed(self) -> int:
        """Nearest rows that are searched, the row itself among them."""
        return density.neighbors_needed(self.k, self.include_self)

    def file(self, kind: str, number: int) -> str:
        """Name of a file below `density/work/`."""
        return f"{kind}-{self.round}-{number:05d}"


class RowsByList:
    """The rows of a holder, ordered by the list they are in; of equal ones the first, where they collapse."""

    def __init__(self, holder: ShardHolder, how: Joining) -> None:
        self.holder, self.how = holder, how
        parts = [self._assigned(shard, rows) for shard, rows in holder.rows.items()]
        names = ("lists", "counts", "probes")
        whole = ivf.Assignment(*(np.concatenate([getattr(p, name) for p, _ in parts]) for name in names))
        self.assignment, self.wanted = whole, np.concatenate([wanted for _, wanted in parts])
        self.rows: np.ndarray | None = None
        if how.collapse:
            self.rows, place = joining.distinct(holder.x)
            self.weights = np.bincount(place)
            self.assignment, self.wanted = whole.take(self.rows), self.wanted[self.rows]
        self.order: tuple[np.ndarray, np.ndarray] | None = None

    def _assigned(self, shard: int, rows: slice) -> tuple[ivf.Assignment, np.ndarray]:
        """Return the lists of a shard's rows, and which rows this round is for."""
        how, x = self.how, self.holder.x[rows]
        wanted = np.ones(len(x), bool)
        nothing = np.empty(0, np.int32)
        if how.centroids is None:
            first = self.holder.first_row + rows.start
            lists = np.arange(first, first + len(x)) // how.list_rows
            if how.collapse:
                # Equal rows must meet.
                lists = joining.hashes(x) % np.uint64(-(-self.holder.n // how.list_rows))
            return ivf.Assignment(lists.astype(np.int32), np.zeros(len(x), np.int32), nothing), wanted
        run, name = self.holder.run, how.file("lists", shard)
        if run.exists("density", WORK, name):
            with np.load(io.BytesIO(run.read_bytes("density", WORK, name)), allow_pickle=False) as there:
                return ivf.Assignment(there["lists"], there["counts"], there["probes"]), there["wanted"]
        centroids, propose = ray.get(how.centroids), self.holder.propose
        assigned = ivf.assign(x, centroids, reach=how.reach, probes=how.probes, propose=propose)
        if how.before is not None:
            wanted = assigned.counts > ivf.assign(x, centroids, reach=how.before, propose=propose).counts
        buffer = io.BytesIO()
        np.savez(buffer, lists=assigned.lists, counts=assigned.counts, probes=assigned.probes, wanted=wanted)
        run.write_bytes(buffer.getvalue(), "density", WORK, name)
        return assigned, wanted

    def sizes(self) -> np.ndarray:
        """Count the rows of each list."""
        if self.how.centroids is None:
            lists = -(-self.holder.n // self.how.list_rows)
        else:
            lists = len(ray.get(self.how.centroids))
        return np.bincount(self.assignment.lists, minlength=lists)

    def _cells(self, cells: Cells) -> np.ndarray:
        keys = self.holder.image_ids if self.rows is None else joining.hashes(self.holder.x)[self.rows]
        return cells.of(self.assignment.lists, keys)

    def work(self, cells: Cells, sizes: np.ndarray) -> np.ndarray:
        """Return the products of each group's rows held here."""
        group = cells.group_of(self._cells(cells))
        if self.how.centroids is None:
            each = np.full(len(group), float(sizes.sum()))
        else:
            row = np.repeat(np.arange(len(group)), self.assignment.counts)
            each = np.bincount(row, weights=sizes[self.assignment.probes], minlength=len(group))
        return np.bincount(group, weights=each * self.wanted, minlength=cells.groups)

    def slice(self, cells: Cells, group: int) -> Block:
        """Return the rows held here that belong to a group."""
        if self.order is None:
            mine = self._cells(cells)
            order = np.argsort(mine, kind="stable")
            self.order = order, mine[order]
        order, mine = self.order
        first, last = np.searchsorted(mine, cells.first_of_group[group : group + 2])
        rows = order[first:last]
        counts = probes = None
        if self.how.centroids is not None:
            # Only what these rows probe, in cells.
            counts, probes = cells.probed(self.assignment.take(rows))
            # Half of what they take: there are more of them than of anything but coordinates.
            probes = probes.astype(np.int32)
        at, weights = (rows, None) if self.rows is None else (self.rows[rows], self.weights[rows])
        x = self.holder.x[at].astype(self.holder.dtype, copy=False)
        ids, wanted = self.holder.image_ids[at], self.wanted[rows]
        return Block(ids, x, mine[first:last], wanted, counts, probes, weights)


@dataclass(frozen=True)
class Joined:
    """What the join of a group tells: of how many images the neighbors were found, by how many products, in
    how many bytes; and what it found of sampled rows: image_ids int64 [s], sq_dists float64 [s, needed]."""

    group: int
    images: int
    products: int
    memory: int
    image_ids: np.ndarray
    sq_dists: np.ndarray

    def metadata(self) -> dict[bytes, bytes]:
        """Return it as the metadata of the group's file."""
        lists = {"image_ids": self.image_ids.tolist(), "sq_dists": self.sq_dists.tolist()}
        return {b"joined": json.dumps({**vars(self), **lists}).encode()}


def read_joined(run: Run, how: Joining, group: int) -> Joined | None:
    """Return what the join of a group told, None where it is not finished."""
    if not run.exists("density", WORK, how.file("group", group)):
        return None
    with _open(run, how, group) as file:
        kept = json.loads(pq.read_schema(file).metadata[b"joined"])
    lists = np.array(kept.pop("image_ids"), np.int64), np.array(kept.pop("sq_dists"), np.float64)
    return Joined(*kept.values(), lists[0], lists[1].reshape(len(lists[0]), how.needed))


def join_group(
    run: Run,
    how: Joining,
    cells: Cells,
    group: int,
    blocks: list[ray.ObjectRef],
    sampled: np.ndarray,
    kernel: Callable[..., Nearest] = Nearest,
) -> Joined:
    """Find the neighbors of the rows of a group; leave one density a row, and its neighbors if kept."""
    if there := read_joined(run, how, group):
        # An attempt whose answer was lost.
        return there
    block = ray.get(blocks[group])

    def fetch(groups: list[int]) -> Iterator[Block]:
        for i, wanted in enumerate(groups):
            # The next starts to travel while this one is joined.
            ray.wait([blocks[group] for group in groups[i : i + 2]], timeout=0, fetch_local=True)
            yield ray.get(blocks[wanted])

    found, products = joining.join(block, fetch, cells, group, how.needed, kernel)
    if np.isinf(found.sq_dists).any():
        least = int(np.isfinite(found.sq_dists).sum(axis=1).min()) - (not how.include_self)
        raise density.too_few_distinct(how.k, least)
    ids = block.image_ids[block.wanted]
    columns: dict[str, Any] = {
        "image_id": ids,
        "sq_dist": density.sq_dists_of(found, k=how.k, estimator=how.estimator),
    }
    if how.keep_neighbors:
        kept = found if how.include_self else found.without(block.first_ids[block.wanted])
        columns["neighbors"] = pa.FixedSizeListArray.from_arrays(pa.array(kept.image_ids.ravel()), how.k)
        near = kept.sq_dists.astype(np.float32).ravel()
        columns["sq_dists"] = pa.FixedSizeListArray.from_arrays(pa.array(near), how.k)
    table = pa.table(columns)
    if how.before is not None:
        earlier = _read(run, replace(how, round=how.round - 1), group)
        same = earlier.filter(pa.array(~np.isin(earlier["image_id"].to_numpy(), ids)))
        table = pa.concat_tables([table, same])
    here = np.isin(ids, sampled)
    joined = Joined(group, block.images, products, peak_memory(), ids[here], found.sq_dists[here])
    table = table.sort_by("image_id").replace_schema_metadata(joined.metadata())
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", row_group_size=max(1, -(-len(table) // ROW_GROUPS)))
    run.write_bytes(buffer.getvalue(), "density", WORK, how.file("group", group), replace=False)
    return joined


def _open(run: Run, how: Joining, group: int) -> BinaryIO:
    return objects.open_seekable(run.path("density", WORK, how.file("group", group)), run.access)


def _read(run: Run, how: Joining, group: int, first: int | None = None, last: int | None = None) -> pa.Table:
    some = None if first is None else [("image_id", ">=", first), ("image_id", "<=", last)]
    with _open(run, how, group) as file:
        return pq.read_table(file, filters=some, partitioning=None)


def read_groups(run: Run, how: Joining, groups: int, image_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Read what was found of some images out of all groups: image_ids int64 [n] ascending."""
    found: dict[str, np.ndarray] = {}
    seen = np.zeros(len(image_ids), bool)
    if not len(image_ids):
        return {"sq_dist": np.empty(0, np.float32)}
    for group in range(groups):
        part = _read(run, how, group, int(image_ids[0]), int(image_ids[-1])).combine_chunks()
        row = np.searchsorted(image_ids, part["image_id"].to_numpy())
        mine = image_ids[row] == part["image_id"].to_numpy()
        row = row[mine]
        for name in part.column_names[1:]:
            column = part[name].combine_chunks()
            values = column.to_numpy() if name == "sq_dist" else _rows_of(column)
            if name not in found:
                found[name] = np.empty((len(image_ids), *values.shape[1:]), values.dtype)
            found[name][row] = values[mine]
        seen[row] = True
    if not seen.all():
        raise UserError(
            f"{int((~seen).sum())} images have no density, the first is image {image_ids[~seen][0]}; remove "
            f"{run.path('density')} and run again"
        )
    return found


def _rows_of(lists: pa.FixedSizeListArray) -> np.ndarray:
    return lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size)


def density_table(how: Joining, found: dict[str, np.ndarray], ids: np.ndarray, n: int, d: int) -> pa.Table:
    """Return a shard of `density/`."""
    columns = {"image_id": ids, sq_dist_column(how.estimator): found["sq_dist"]}
    if how.estimator == "kth":
        columns["log_density"] = density.log_density(found["sq_dist"], k=how.k, n=n, d=d, floor=how.floor)
    return pa.table(columns, DENSITY[how.estimator])


def neighbors_table(found: dict[str, np.ndarray], ids: np.ndarray) -> pa.Table:
    """Return a shard of `neighbors/`."""
    k = found["neighbors"].shape[1]
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(found[name].ravel()), k)
        for name in ("neighbors", "sq_dists")
    ]
    return pa.table([pa.array(ids), *lists], neighbors_schema(k))
