"""What a worker does while heads are trained (USL-T): images and their neighbors, and what is kept."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from selective_ray import batches, encoders, objects
from selective_ray.actors.training_worker import Job, Place
from selective_ray.actors.wave import EncoderSpec
from selective_ray.batches import nth_left
from selective_ray.config import UslT
from selective_ray.heads import Trained
from selective_ray.pixels import folder_of
from selective_ray.store import Run, Shard
from selective_ray.training import Training

HEADS, TRUNK = "heads.npz", "trunk.pt"
# Purpose of the random numbers that draw a neighbor.
NEIGHBOR = 200


@dataclass(frozen=True)
class Pairs:
    """A plan (`batches.Plan`) of `batch` images a step, and a neighbor of each in as many slots after."""

    run: Run
    images: int
    rejected: np.ndarray
    batch: int
    neighbors: int
    seed: int

    @property
    def labeled(self) -> int:
        """Slots that come first, and are shared by the workers apart from the others."""
        return self.batch

    @property
    def unlabeled(self) -> int:
        """The other slots."""
        return self.batch

    @property
    def slots(self) -> int:
        """All of them."""
        return 2 * self.batch

    def step(self, t: int) -> np.ndarray:
        """Return the image ids of step t, int64 [slots]."""
        n = self.images - len(self.rejected)
        where = t * self.batch + np.arange(self.batch)
        ids = nth_left(batches.stream(where, n, self.seed, batches.UNLABELED), self.rejected)
        drawn = batches.draws(self.seed, t, self.batch, 1, NEIGHBOR)[:, 0]
        return np.concatenate([ids, _neighbors(self.run, ids, drawn, self.neighbors)])


def _neighbors(run: Run, ids: np.ndarray, drawn: np.ndarray, most: int) -> np.ndarray:
    """Draw for each image one of its nearest neighbors, or itself, with equal chance."""
    ends = np.cumsum([shard.rows for shard in _shards(run)])
    shards = np.searchsorted(ends, ids, side="right")
    out = ids.copy()
    for shard in np.unique(shards):
        here = np.flatnonzero(shards == shard)
        image_ids, near = _kept(run, _shards(run)[shard].index)
        rows = near[np.searchsorted(image_ids, ids[here])][:, : most + 1]
        # Itself is among the neighbors, or is one more.
        others = np.where(rows == ids[here, None], -1, rows)
        count = (others >= 0).sum(axis=1)
        place = np.floor(drawn[here] * (np.minimum(count, most) + 1)).astype(np.int64)
        order = np.argsort(others < 0, axis=1, kind="stable")
        chosen = np.take_along_axis(others, order, axis=1)
        some = place > 0
        out[here[some]] = chosen[some, place[some] - 1]
    return out


@functools.lru_cache(maxsize=2)
def _shards(run: Run) -> tuple[Shard, ...]:
    return tuple(run.manifest("images").shards)


@functools.lru_cache(maxsize=4096)
def _kept(run: Run, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Map the neighbors of a shard on this machine's disk: image ids [n], and ids of neighbors [n, k]."""
    folder = folder_of("neighbors", run.uri, run.manifest("neighbors").fingerprint)
    files = [folder / f"{shard:05d}.{kind}.npy" for kind in ("ids", "neighbors")]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = run.read_shard("neighbors", shard, ["image_id", "neighbors"]).combine_chunks()
        ids = rows["image_id"].to_numpy()
        near = rows["neighbors"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
        for file, values in zip(files, (ids, near), strict=True):
            objects.write(str(file), _npy(values))
    ids, near = (np.load(file, mmap_mode="r") for file in files)
    return ids, near


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@dataclass(frozen=True)
class Clustering:
    """What is learned: heads of so many clusters, from start float32 [h, c, d] where they are of cosines.

    images: how many there are in all.
    """

    settings: UslT
    spec: EncoderSpec
    clusters: int
    start: np.ndarray | None
    images: int

    def begin(self, job: Job, place: Place) -> _Lesson:
        """Build the heads of a worker, and its encoder."""
        return _Lesson(self, job, place)


class _Lesson:
    """One worker's part of training heads."""

    def __init__(self, course: Clustering, job: Job, place: Place) -> None:
        import torch

        from selective_ray.usl_t import Learner, Recipe

        self.course, self.job, self.place = course, job, place
        settings, spec = course.settings, course.spec
        trunk = encode = None
        if settings.network == "frozen":
            encode = spec.load(place.device).encode
        else:
            trunk = encoders.network(spec.name, spec.checkpoint, spec.image_size, spec.access)
        mean, std = spec_colors(spec)
        self.learner = Learner(
            Recipe(**settings.recipe()),
            clusters=course.clusters,
            count=settings.count,
            start=None if course.start is None else torch.from_numpy(course.start),
            scale=settings.scale,
            encode=encode,
            trunk=trunk,
            colors=(mean, std),
            strong=settings.strong,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            images=course.images,
            image_size=spec.image_size,
            device=place.device,
        )
        self.state, self.load = self.learner.state, self.learner.load
        self.mine = slice(place.rank, None, place.workers)
        self.known = len(range(place.rank, job.plan.labeled, place.workers))
        self.sums: Any = None
        self.steps = 0

    def step(self, t: int, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Take step t on the images of this worker's slots, and on their neighbors after them."""
        import torch

        plan, known = self.job.plan, self.known
        draws = [
            batches.draws(plan.seed, t, plan.labeled, self.learner.draws, batches.VIEWS + i)[self.mine]
            for i in range(2)
        ]
        found = self.learner.step(t, pixels[:known], pixels[known:], draws, plan.labeled, plan.seed)
        sums = torch.stack([value.double() for value in found])
        self.sums = sums if self.sums is None else self.sums + sums
        self.steps += 1

    def line(self) -> tuple[dict[str, Any], str]:
        """Add up what all workers saw since the last line."""
        values = self.place.summed(self.sums.cpu().numpy())
        steps, self.steps, self.sums = self.steps, 0, None
        settings, sizes = self.course.settings, self.learner.sizes[0].cpu().numpy()
        globals_, locals_, confident = values[:3] / steps
        line = {
            "global": float(globals_),
            "local": float(locals_),
            "loss": float(globals_ + settings.local_weight * locals_),
            "confident": float(confident / (settings.batch * settings.count)),
            "clusters_used": int((sizes >= 1).sum()),
            "largest_share": float(sizes.max() / sizes.sum()),
            "repaired": self.learner.repaired,
        }
        return line, f"loss {line['loss']:.3f}, {line['clusters_used']:,} clusters in use"

    def evaluate(self) -> None:
        """Do without: lines tell which clusters are in use."""

    def export(self) -> None:
        """Write the heads, and the network where it learned, too."""
        export(self.job.training, self.course.settings, self.place.say)


def export(place: Training, settings: UslT, say: Callable[[str], None]) -> None:
    """Write the heads of the newest checkpoint, and the network where it learned, too."""
    import torch

    _, state = place.newest(say)
    learned = {key: value for key, value in state["learning"].items() if key.startswith("1.")}
    if learned:
        buffer = io.BytesIO()
        torch.save({key.removeprefix("1."): value for key, value in learned.items()}, buffer)
        place.run.write_bytes(buffer.getvalue(), place.table, TRUNK)
    weight, bias = (
        None if value is None else value.float().numpy()
        for value in (state["learning"]["0.weight"], state["learning"].get("0.bias"))
    )
    made = Trained(weight, bias, settings.scale if bias is None else 1.0, settings.confidence_of_all)
    place.run.write_bytes(made.to_bytes(), place.table, HEADS)


def spec_colors(spec: EncoderSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of the pixels that an encoder wants."""
    wanted = encoders.transform(spec.name, spec.image_size, spec.access)
    return wanted.mean, wanted.std
