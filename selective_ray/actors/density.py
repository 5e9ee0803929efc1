"""The density stage: rows move to the owners of their inverted lists, which join them with what they probe.

    quantizer ──► lists of all rows ──► groups of lists ──► join, group by group ──► certificate ──► shards

The quantizer, the lists, and every finished group lie in `density/work/` until the stage is complete, so that
a dead driver costs the groups that were being joined, and a dead holder the groups it owned. In exact mode a
list is a run of rows, and every row probes all.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from selective_ray import certificate, density, ivf, joining
from selective_ray.actors.joining import WORK, Joined, Joining, read_joined
from selective_ray.actors.pool import Pool, Shrunk
from selective_ray.actors.session import peak_memory
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.joining import Cells
from selective_ray.progress import Reporter, Watch
from selective_ray.schema import Neighbors
from selective_ray.store import Manifest, Run, Stopwatch

QUANTIZER = "quantizer.npz"
# How many workers the groups were made for, so that other workers go on with the same groups.
WORKERS = "workers.json"
# Joins that each holder has before it, so that it need not wait for the driver.
AHEAD = 2
# Share of the rows that is on its way to the owners of their groups at the same time.
MOVING = 1 / 8


def measure(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    asked: set[str] = frozenset(),
    earlier: Run | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Measure every image's distance to its k nearest neighbors into `density/`.

    asked are the keys of the configuration that a person chose: a k must then not be lowered, nor a recall
    missed. Raises UserError where the data or the cluster's memory do not allow what is asked.
    """
    embeddings = run.manifest("embeddings")
    assert embeddings is not None
    settings, n = config.density, embeddings.rows
    k, warning = density.possible_k(settings.k, n, settings.include_self, "density.k" in asked)
    if warning:
        reporter.warn(warning)
    plan = ivf.plan_for(settings, n, embeddings.summary["dimension"], k)
    what = _what(config, plan, k)
    inputs = run.fingerprints("embeddings")
    if done := run.begin("density", what, inputs, earlier):
        if settings.keep_neighbors:
            run.begin("neighbors", what, inputs, earlier)
        return done
    stopwatch = Stopwatch(run, "density")
    with reporter.stage("density", n, "images") as bar:
        stage = _Stage(run, config, pool, plan, k, asked, bar, check, stopwatch)
        return stage.run_all(what, inputs, reporter)


def _what(config: Config, plan: ivf.Plan, k: int) -> dict[str, Any]:
    settings = {**config.density.model_dump(), "mode": "exact" if plan.exact else "ivf", "k": k}
    if plan.exact:
        for key in ("lists", "probes", "recall"):
            # None of these can matter.
            del settings[key]
        return {"density": settings}
    return {"density": {**settings, "lists": plan.lists}, "seed": config.seed}


@dataclass(frozen=True)
class _Sample:
    """Rows with their exact neighbors: image_ids int64 [s], neighbors of which one may be the row itself."""

    image_ids: np.ndarray
    x: np.ndarray
    exact: Neighbors

    def half(self, first: bool) -> _Sample:
        part = slice(None, len(self.image_ids) // 2) if first else slice(len(self.image_ids) // 2, None)
        exact = Neighbors(self.exact.sq_dists[part], self.exact.image_ids[part])
        return _Sample(self.image_ids[part], self.x[part], exact)


class _Stage:
    """One run of the stage."""

    def __init__(
        self,
        run: Run,
        config: Config,
        pool: Pool,
        plan: ivf.Plan,
        k: int,
        asked: set[str],
        bar: Watch,
        check: Callable[[], None],
        stopwatch: Stopwatch,
    ) -> None:
        self.run, self.config, self.pool, self.plan, self.asked = run, config, pool, plan, asked
        self.bar, self.check, self.stopwatch = bar, check, stopwatch
        settings = config.density
        self.how = Joining(
            *(k, settings.include_self, settings.estimator, settings.floor),
            collapse=settings.duplicates == "collapse",
            keep_neighbors=settings.keep_neighbors,
            list_rows=0,
            centroids=None,
            reach=0.0,
            probes=settings.probes,
            round=0,
            before=None,
        )
        self.memory = 0
        self.products = 0
        self.counted: set[tuple[int, int]] = set()
        # Images whose neighbors were found, by round.
        self.images: list[int] = []
        self.phase, self.phases = ("", 0.0), {}

    def run_all(self, what: dict[str, Any], inputs: dict[str, str], reporter: Reporter) -> Manifest:
        """Search, certify, search further where that does not suffice, and write."""
        self._begin("starting")
        self.pool.start(self.plan.holder_bytes)
        workers, each = len(self.pool.actors), self.pool.memory
        self.bar.tell("workers", workers=workers, worker_bytes=each, lists=self.plan.lists)
        reporter.say(
            f"density: {workers} workers, {each / 1e9:.2f} GB each at most; "
            + ("every row with every other" if self.plan.exact else f"{self.plan.lists} lists")
        )
        self.plan = replace(self.plan, workers=self._workers())
        self.how = replace(self.how, list_rows=self.plan.group_rows)
        summary: dict[str, Any] = {"k": self.how.k, "neighbors": "exact"}
        if self.plan.exact:
            cells, _ = self._search(np.empty(0, np.int64))
        else:
            cells, summary = self._search_lists(reporter)
        answers = self.pool.all(lambda actor: actor.write_density.remote(self.how, cells.groups, self.plan.n))
        self.memory = max(self.memory, *(peak for *_, peak in answers))
        done = {
            "seconds": self.stopwatch.seconds(),
            "peak_memory_bytes": {"driver": peak_memory(), "largest_worker": self.memory},
        }
        if self.how.keep_neighbors and not self.run.begin("neighbors", what, inputs):
            kept = [shard for _, shards, _ in answers for shard in shards]
            self.run.finish("neighbors", kept, **done, summary={"k": self.how.k})
        self._begin("")
        summary |= {"products": self.products, "joined": self.images, "groups": cells.groups}
        summary |= {"phases": self.phases, "worker_bytes": self.pool.memory}
        written = [shard for shards, _, _ in answers for shard in shards]
        finished = self.run.finish("density", written, **done, summary=summary)
        self.run.delete_folder("density", WORK)
        return finished

    def _workers(self) -> int:
        """Return the number of workers that the groups are made for: those of the first attempt."""
        if self.run.exists("density", WORK, WORKERS):
            return int(json.loads(self.run.read_bytes("density", WORK, WORKERS)))
        workers = len(self.pool.actors)
        self.run.write_bytes(json.dumps(workers).encode(), "density", WORK, WORKERS)
        return workers

    def _begin(self, phase: str) -> None:
        """Say what is done now, and count the seconds of what was done before."""
        now = time.monotonic()
        if self.phase[0]:
            self.phases[self.phase[0]] = round(self.phases.get(self.phase[0], 0.0) + now - self.phase[1], 2)
        self.phase = phase, now
        self.bar.say(phase)

    # Lists

    def _search_lists(self, reporter: Reporter) -> tuple[Cells, dict[str, Any]]:
        settings = self.config.density
        quantizer = self._quantizer()
        sample, centroids = quantizer.sample, quantizer.centroids
        self.how = replace(self.how, centroids=ray.put(centroids), reach=quantizer.reach)
        if settings.probes:
            self._check_probes(sample.half(first=True), centroids)
        certified = sample.half(first=False)
        while True:
            cells, sampled = self._search(certified.image_ids)
            found = self._sampled(sampled, certified)
            reached = certificate.certify(found, certified.exact.sq_dists)
            self.bar.tell("certified", recall=reached.recall)
            if settings.probes or reached.recall >= settings.recall or self.how.reach >= ivf.WHOLE_SPHERE:
                break
            self.how = self._further(sample, centroids)
            reporter.say(
                f"density: recall {reached.recall:.4f} of {settings.recall} asked; probing within "
                f"{self.how.reach:.3f} where that adds lists"
            )
        if reached.recall < settings.recall:
            reporter.warn(
                f"density.probes = {settings.probes} found {100 * reached.recall:.1f} % of neighbors, "
                f"and density.recall is {settings.recall}; raise the probes or leave them out"
            )
        return cells, {
            "k": self.how.k,
            "neighbors": "ivf",
            "lists": self.plan.lists,
            "reach": None if settings.probes else self.how.reach,
            "probes": settings.probes,
            "rounds": self.how.round + 1,
            "certificate": asdict(reached),
        }

    def _quantizer(self) -> _Quantizer:
        """Train the quantizer and find the exact neighbors of the samples, or read what is kept of both."""
        if self.run.exists("density", WORK, QUANTIZER):
            return _Quantizer.read(self.run.read_bytes("density", WORK, QUANTIZER))
        self._begin("training the lists")
        training, both = ivf.draw(self.plan, self.config.seed)
        centroids = self.pool.train(self.plan.lists, self.config.seed, training)
        image_ids, x = self.pool.rows_at(both)
        self._begin("exact neighbors of a sample")
        sent, needed = ray.put(x), self.how.needed
        if self.how.collapse:
            exact, _ = self.pool.fold(
                lambda actor: actor.distinct_here.remote(sent, needed), joining.merge_distinct
            )
            if np.isinf(exact.sq_dists).any():
                there = int(np.isfinite(exact.sq_dists).sum(axis=1).min())
                raise density.too_few_distinct(self.how.k, there - (not self.how.include_self))
            # A copy is joined as the first that is equal to it.
            image_ids = exact.image_ids[:, 0]
        else:
            exact = self.pool.fold(lambda actor: actor.neighbors_here.remote(sent, needed), Neighbors.merge)
        sample = _Sample(image_ids, x, exact)
        reach = 0.0
        if not self.config.density.probes:
            reach = ivf.reach_for(
                self._excesses(sample.half(first=True), centroids), self.config.density.recall
            )
        quantizer = _Quantizer(centroids, sample, reach)
        self.run.write_bytes(quantizer.write(), "density", WORK, QUANTIZER)
        return quantizer

    def _targets(self, sample: _Sample, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lists of a sample's neighbors, and which of these are not the row itself."""
        ids = sample.exact.image_ids
        sent = [ray.put(ids.ravel()), ray.put(centroids)]
        answers = self.pool.all(lambda actor: actor.lists_of.remote(*sent))
        places, lists = (np.concatenate(part) for part in zip(*answers, strict=True))
        targets = np.empty(ids.size, np.int64)
        targets[places] = lists
        return targets.reshape(ids.shape), ids != sample.image_ids[:, None]

    def _excesses(self, sample: _Sample, centroids: np.ndarray) -> np.ndarray:
        targets, others = self._targets(sample, centroids)
        return ivf.excess(sample.x, centroids, targets)[others]

    def _check_probes(self, sample: _Sample, centroids: np.ndarray) -> None:
        """Raise UserError where a number of probes cannot reach the recall, and both were asked for."""
        settings = self.config.density
        if "density.recall" not in self.asked:
            return
        targets, others = self._targets(sample, centroids)
        rank = ivf.ranks(sample.x, centroids, targets)[others]
        expected = float((rank < settings.probes).mean())
        if expected < settings.recall:
            enough = int(np.quantile(rank, settings.recall, method="higher")) + 1
            raise UserError(
                f"density.probes = {settings.probes} reaches a recall of about {expected:.3f}, and "
                f"density.recall = {settings.recall} was asked for; set density.probes to {enough} or leave "
                "it out"
            )

    def _further(self, sample: _Sample, centroids: np.ndarray) -> Joining:
        """Return how to search on where the recall was missed: farther, for fewer misses than so far."""
        before, misses = self.how.reach, (1 - self.config.density.recall) / 2 ** (self.how.round + 1)
        reach = max(ivf.reach_for(self._excesses(sample, centroids), 1 - misses), 1.1 * before, 1e-6)
        return replace(self.how, reach=min(reach, ivf.WHOLE_SPHERE), round=self.how.round + 1, before=before)

    def _sampled(self, sampled: list[tuple[np.ndarray, np.ndarray]], sample: _Sample) -> np.ndarray:
        """Return the distances found of the sample's rows, in their order."""
        if self.how.round == 0:
            self.found = np.full(sample.exact.sq_dists.shape, np.nan)
        for image_ids, sq_dists in sampled:
            # Two of the sample may be copies of one image.
            row, at = np.nonzero(sample.image_ids[:, None] == image_ids)
            self.found[row] = sq_dists[at]
        return self.found

    # Groups

    def _search(self, sampled: np.ndarray) -> tuple[Cells, list[tuple[np.ndarray, np.ndarray]]]:
        """Join every group that has not been; also what was found of the sampled images."""
        while True:
            try:
                return self._search_with(self.pool.actors, sampled)
            except Shrunk:
                # With other holders; what is finished stays.
                self.pool.restart()

    def _search_with(
        self, actors: list[Any], sampled: np.ndarray
    ) -> tuple[Cells, list[tuple[np.ndarray, np.ndarray]]]:
        self._begin("finding the lists of all rows")
        sizes = sum(self.pool.each(lambda actor: actor.assign.remote(self.how)))
        cells = joining.cells(sizes, self.plan.group_rows)
        kept = {group: read_joined(self.run, self.how, group) for group in range(cells.groups)}
        found = [joined for joined in kept.values() if joined]
        todo = [group for group, joined in kept.items() if not joined]
        self._count(found)
        if todo:
            sent = [ray.put(cells), ray.put(sizes)]
            work = sum(self.pool.each(lambda actor: actor.work.remote(self.how, *sent)))
            owners = _owners(work, len(actors))
            self._begin("moving rows to the owners of their lists")
            blocks = self._move(actors, cells, owners, sent[0])
            self._begin("joining")
            queues = [deque(g for g in todo if owners[g] == owner) for owner in range(len(actors))]
            known = ray.put(blocks), ray.put(sampled)
            for joined in self._join(actors, queues, sent[0], *known):
                self._count([joined])
                found.append(joined)
                self.check()
                self.stopwatch.note()
        return cells, [(joined.image_ids, joined.sq_dists) for joined in found]

    def _count(self, joined: list[Joined]) -> None:
        new = [one for one in joined if (self.how.round, one.group) not in self.counted]
        self.counted |= {(self.how.round, one.group) for one in new}
        if self.how.before is None:
            self.bar.advance(sum(one.images for one in new))
            for one in new:
                self.bar.tell("group joined", group=one.group, images=one.images, groups=len(self.counted))
        self.images += [0] * (self.how.round + 1 - len(self.images))
        self.images[self.how.round] += sum(one.images for one in new)
        self.memory = max([self.memory, *(one.memory for one in new)])
        self.products += sum(one.products for one in new)

    def _move(
        self, actors: list[Any], cells: Cells, owners: np.ndarray, sent: ray.ObjectRef
    ) -> list[ray.ObjectRef]:
        """Move the rows of every group to its owner; returns the groups by reference."""
        blocks: list[ray.ObjectRef] = []
        step = max(len(actors), int(MOVING * cells.groups))
        for start in range(0, cells.groups, step):
            some = list(range(start, min(start + step, cells.groups)))
            parts = [
                actor.slices.options(num_returns=len(some)).remote(self.how, sent, some) for actor in actors
            ]
            parts = parts if len(some) > 1 else [[part] for part in parts]
            here = [
                actors[owners[group]].gather.remote(self.how, *(part[i] for part in parts))
                for i, group in enumerate(some)
            ]
            self.pool.wait(here)
            blocks += here
        return blocks

    def _join(self, actors: list[Any], queues: list[deque[int]], *known: ray.ObjectRef) -> Iterator[Joined]:
        """Join groups where they are owned; who has none left takes from the end of the longest queue."""
        cells, blocks, sampled = known
        running: dict[ray.ObjectRef, int] = {}

        def give(owner: int) -> None:
            queue = queues[owner] or max(queues, key=len)
            if queue:
                group = queue.popleft() if queue is queues[owner] else queue.pop()
                call = actors[owner].join.remote(self.how, cells, group, blocks, sampled)
                running[call] = owner

        for owner in [*range(len(actors))] * AHEAD:
            give(owner)
        while running:
            call = self.pool.wait(list(running), 1)[0]
            owner = running.pop(call)
            give(owner)
            yield self.pool.answer(call)


def _owners(work: np.ndarray, actors: int) -> np.ndarray:
    """Share out groups, neighbors together, by their work: int64 [groups]."""
    middle = np.cumsum(work) - work / 2
    return np.minimum(actors - 1, (middle / max(work.sum(), 1) * actors).astype(np.int64))


@dataclass(frozen=True)
class _Quantizer:
    """What is kept of the lists: centroids float32 [lists, d], the samples, and the first reach."""

    centroids: np.ndarray
    sample: _Sample
    reach: float

    def write(self) -> bytes:
        buffer = io.BytesIO()
        exact = self.sample.exact
        np.savez(
            buffer,
            centroids=self.centroids,
            image_ids=self.sample.image_ids,
            x=self.sample.x,
            sq_dists=exact.sq_dists,
            neighbors=exact.image_ids,
            reach=self.reach,
        )
        return buffer.getvalue()

    @staticmethod
    def read(data: bytes) -> _Quantizer:
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            sample = _Sample(kept["image_ids"], kept["x"], Neighbors(kept["sq_dists"], kept["neighbors"]))
            return _Quantizer(kept["centroids"], sample, float(kept["reach"]))
