"""The pool of the actors that hold the embeddings: how many, on what, and what happens when some are lost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray

from selective_ray.actors.placement import gpus_each
from selective_ray.actors.session import Session, cpus, gpus, unwrapped
from selective_ray.actors.shards import RESTARTS, ShardHolder
from selective_ray.config import Resources
from selective_ray.errors import UserError
from selective_ray.store import Run

# How often the cluster is looked at while an answer is waited for.
LOOK_AROUND_SECONDS = 2.0


class Shrunk(Exception):
    """The cluster has lost nodes, and has no room for the actors that were started on it."""


class Pool:
    """The actors that together hold all shards of a run's embeddings; started when first needed."""

    def __init__(self, run: Run, resources: Resources, session: Session) -> None:
        self.run, self.resources, self.session = run, resources, session
        self.actors: list[Any] = []
        self.held: list[list[int]] = []
        # CPUs that each takes, and that the cluster had when they were started.
        self.share, self.room = 1.0, 0.0
        self.stated: Callable[[int, int], int] = self._rows_alone
        # Bytes that each may take.
        self.memory = 0

    def start(self, stated: Callable[[int, int], int] | None = None) -> None:
        """Start the actors unless they run; each holds a contiguous share of the shards.

        stated gives the bytes that an actor of so many rows takes, one of so many actors; those that run with
        fewer are started anew. Raises UserError where they are not there.
        """
        self.stated = stated or self.stated
        if self.actors:
            if self._bytes() <= self.memory:
                return
            self.stop()
        self.session.start()
        rows = self._rows()
        each = gpus_each(self.resources)
        grows = self.resources.autoscale
        count = min(self.resources.workers or (max(1, int(gpus() / each)) if each else cpus()), len(rows))
        if not grows:
            # More workers than GPUs share them: else some would wait for ever.
            each = min(each, gpus() / count)
        self.held = [part.tolist() for part in np.array_split(np.arange(len(rows)), count)]
        ends = np.cumsum([0, *rows]).tolist()
        dtype = self.run.manifest("embeddings").what["embed"]["dtype"]
        self.memory = self._bytes()
        if not grows:
            self._check_room(count)
        # One for each GPU; else as many as CPUs, of one thread each: products are independent of each other.
        # On a cluster that grows what is lost comes again, and there is always room.
        self.share = 1.0 if grows else min(1.0, cpus() / count)
        self.room = 0.0 if grows else ray.cluster_resources().get("CPU", 0.0)
        self.actors = [
            ShardHolder.options(num_cpus=self.share, num_gpus=each, memory=self.memory).remote(
                *(self.run, held, [rows[shard] for shard in held], ends[held[0]], ends[-1], dtype)
            )
            for held in self.held
        ]

    def _rows(self) -> list[int]:
        embeddings = self.run.manifest("embeddings")
        assert embeddings is not None
        return [shard.rows for shard in embeddings.shards]

    def _bytes(self) -> int:
        """Bytes that the actor takes which takes most."""
        rows = self._rows()
        return max(self.stated(sum(rows[shard] for shard in held), len(self.held)) for held in self.held)

    def _rows_alone(self, rows: int, _: int) -> int:
        return rows * (4 * self.run.manifest("embeddings").summary["dimension"] + 160) + 2**28

    def _check_room(self, count: int) -> None:
        there = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
        room = sum(int(bytes_ // self.memory) for bytes_ in there)
        if room < count:
            raise UserError(
                f"{count} workers that hold the embeddings take {self.memory / 1e9:.1f} GB each, and the "
                f"memory of the cluster ({sum(there) / 1e9:.1f} GB on {len(there)} machines) has room for "
                f"{room}; use larger machines or more of them, or another number of --set resources.workers"
            )

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fetch rows by their position among all, in the order given: image_ids int64 [p], float32 [p, d]."""
        answers = self.all(lambda actor: actor.rows_at.remote(positions))
        places, image_ids, x = (np.concatenate(part) for part in zip(*answers, strict=True))
        order = np.argsort(places)
        return image_ids[order], x[order]

    def each(self, call: Callable[[Any], ray.ObjectRef]) -> Iterator[Any]:
        """Make one call on every actor and yield the answers as they come, so that few are held at a time.

        Raises Shrunk where the cluster has lost the room for the actors.
        """
        pending = [call(actor) for actor in self.actors]
        while pending:
            ready = self.wait(pending, 1)[0]
            pending.remove(ready)
            yield self.answer(ready)

    def fold(self, call: Callable[[Any], ray.ObjectRef], merge: Callable[[Any, Any], Any]) -> Any:
        """Make one call on every actor and merge the answers; with new actors where the cluster shrinks."""
        while True:
            try:
                return functools.reduce(merge, self.each(call))
            except Shrunk:
                self.restart()

    def added(
        self,
        call: Callable[[Any], ray.ObjectRef],
        add: Callable[[Any, list[ray.ObjectRef]], ray.ObjectRef],
        turn: int,
    ) -> Any:
        """Make one call on every actor, and have the answers added by the one whose turn it is."""
        while True:
            parts = [call(actor) for actor in self.actors]
            added = add(self.actors[turn % len(self.actors)], parts)
            try:
                self.wait([added])
                return self.answer(added)
            except Shrunk:
                self.restart()

    def all(self, call: Callable[[Any], ray.ObjectRef]) -> list[Any]:
        """Make one call on every actor and return the answers, as they came."""
        while True:
            try:
                return list(self.each(call))
            except Shrunk:
                self.restart()

    def wait(self, calls: list[ray.ObjectRef], count: int | None = None) -> list[ray.ObjectRef]:
        """Wait for some or all calls and return those done; raises Shrunk rather than wait for ever."""
        count = count or len(calls)
        while True:
            ready, _ = ray.wait(calls, num_returns=count, timeout=LOOK_AROUND_SECONDS, fetch_local=False)
            if len(ready) >= count:
                return ready
            if ray.cluster_resources().get("CPU", 0.0) < min(self.room, self.share * len(self.actors)) - 1e-6:
                raise Shrunk

    @staticmethod
    def answer(call: ray.ObjectRef) -> Any:
        """Return the answer of a call; a UserError of an actor is raised as itself."""
        try:
            with unwrapped():
                return ray.get(call)
        except ray.exceptions.RayActorError as error:
            raise UserError(
                f"a worker ended {RESTARTS} times, most likely for lack of memory; give it more, or "
                f"fewer --set resources.workers ({str(error).splitlines()[0]})"
            ) from None

    def train(self, lists: int, seed: int, positions: np.ndarray) -> np.ndarray:
        """Train the centroids of inverted lists on one actor, which gets the rows from all of them."""
        while True:
            drawn = [actor.rows_at.remote(positions) for actor in self.actors]
            call = self.actors[0].train.remote(lists, seed, *drawn)
            try:
                self.wait([call])
                return self.answer(call)
            except Shrunk:
                self.restart()

    def restart(self) -> None:
        """Start anew, with as many actors as the cluster has room for now."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End the actors and free what they hold."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
