"""USL-T on Ray: heads are trained on Ray Train, the images put into their clusters, and one of each picked.

images, their neighbors ──► heads (training/usl-t/) ──► clusters/ ──► the surest or densest of each cluster
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selective_ray import encoders, objects, selection
from selective_ray.actors import embeddings as embedding
from selective_ray.actors import training
from selective_ray.actors.embeddings import Waves
from selective_ray.actors.kmeans import CENTROIDS
from selective_ray.actors.picking import Asked, Chosen
from selective_ray.actors.pool import Pool
from selective_ray.actors.rejections import Rejections
from selective_ray.actors.session import peak_memory
from selective_ray.actors.training_worker import Shape
from selective_ray.actors.usl_t_worker import HEADS, TRUNK, Clustering, Pairs, export, spec_colors
from selective_ray.actors.wave import EncoderSpec, Open, Pixels, Product, Reading
from selective_ray.config import Config, Selection, UslT
from selective_ray.errors import UserError
from selective_ray.heads import Trained, heads_table
from selective_ray.progress import Reporter
from selective_ray.schema import CLUSTERS, Picks
from selective_ray.store import Manifest, Run, Shard, Stopwatch
from selective_ray.training import Training
from selective_ray.truth import rejected

NAME = "usl-t"
UNITS = "rounds"


def cluster(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    budget: int,
    labeled: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Train heads, and write the cluster of every image by them into `clusters/`.

    Raises UserError where the run has no images to make views of, or where the encoder is not the one that
    its embeddings are by.
    """
    settings = config.usl_t
    clusters = settings.clusters or budget + labeled
    what = {"usl_t": settings.trained_by() | {"clusters": clusters}, "seed": config.seed}
    what["usl_t"]["confidence_of_all"] = settings.confidence_of_all
    inputs = run.fingerprints("images", "embeddings", "neighbors")
    if done := run.begin("clusters", what, inputs):
        return done
    _check(run, config, budget + labeled, clusters)
    stopwatch = Stopwatch(run, "clusters")
    place = Training(run, NAME)
    del what["usl_t"]["confidence_of_all"]
    place.begin(what, inputs)
    spec, shape = _spec(run, config)
    memory = _train(run, config, pool, spec, shape, clusters, reporter, check)
    if not run.exists(place.table, HEADS):
        # The last worker ended between its checkpoint and these.
        ray.get(_export.remote(place, settings))
    made = replace(Trained.from_bytes(run.read_bytes(place.table, HEADS)), of_all=settings.confidence_of_all)
    with reporter.stage("cluster", run.manifest("embeddings").rows, "images") as bar:
        if settings.network == "frozen":
            pool.start()
            sent = ray.put(made)
            answers = pool.all(lambda actor: actor.write_heads.remote("clusters", sent))
            shards = [shard for written, _ in answers for shard in written]
            memory = max(memory, *(peak for _, peak in answers))
            bar.advance(run.manifest("embeddings").rows)
        else:
            pool.stop()
            shards, largest = _through(run, config, made, spec, shape, bar, check)
            memory = max(memory, largest)
    buffer = io.BytesIO()
    np.save(buffer, made.centroids)
    run.write_bytes(buffer.getvalue(), "clusters", CENTROIDS)
    sizes = np.zeros(clusters, np.int64)
    for shard in shards:
        column = run.read_shard("clusters", shard.index, ["cluster_id"])["cluster_id"].to_numpy()
        sizes += np.bincount(column, minlength=clusters)
    return run.finish(
        "clusters",
        shards,
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": memory},
        summary={
            "clusters": clusters,
            "iterations": settings.steps,
            "smallest_cluster": int(sizes.min()),
            "largest_cluster": int(sizes.max()),
            "empty_clusters": int((sizes == 0).sum()),
        },
    )


def _check(run: Run, config: Config, needed: int, clusters: int) -> None:
    if "images" not in run.manifest("images").what:
        raise UserError(
            f"{run.uri} was made of embeddings that were brought, without images to make views of; usl-t "
            "needs a run of --images"
        )
    if clusters < needed:
        raise UserError(
            f"usl_t.clusters = {clusters:,} are fewer than the {needed:,} that the budget and the labeled "
            "images take; raise it, or leave it out"
        )
    embedded = run.manifest("embeddings")
    if clusters > embedded.rows:
        raise UserError(
            f"{clusters:,} clusters are more than the {embedded.rows:,} embedded images; lower them"
        )
    here, there = embedding.identity(config)["embed"], embedded.what["embed"]
    keys = ("encoder", "weights", "image_size", "crop", "interpolation")
    if differing := [key for key in keys if here[key] != there[key]]:
        raise UserError(
            f"views are to be embedded as the images of {run.uri} were, by {there['encoder']}, and "
            f"{', '.join(differing)} differ: give --encoder, --checkpoint and embed.image_size of that run"
        )


def _spec(run: Run, config: Config) -> tuple[EncoderSpec, Shape]:
    """Return how the views are encoded, and how images become pixels."""
    made = run.manifest("embeddings").what["embed"]
    pixels = Pixels(made["image_size"], made["crop"], made["batch"], made["interpolation"])
    home = run.home("embeddings")
    rows = [shard.rows for shard in run.manifest("images").shards]
    how = Reading(
        config.resources.access(), run.manifest("images").what["images"].get("column"), objects.read
    )
    spec = embedding.encoder_spec(home, config, pixels, rows, how)
    return spec, Shape(made["image_size"], made["crop"], made["interpolation"])


def _train(
    run: Run,
    config: Config,
    pool: Pool,
    spec: EncoderSpec,
    shape: Shape,
    clusters: int,
    reporter: Reporter,
    check: Callable[[], None],
) -> int:
    """Train until the last step; returns the memory of the largest worker, in bytes."""
    settings, place = config.usl_t, Training(run, NAME)
    if place.newest_step() >= settings.steps:
        return 0
    embedded = run.manifest("embeddings")
    start = None
    if settings.heads == "cosine":
        # Each head from other images, drawn by position.
        rng = np.random.default_rng(config.seed)
        positions = np.stack(
            [rng.choice(embedded.rows, clusters, replace=False) for _ in range(settings.count)]
        )
        pool.start()
        start = pool.rows_at(np.unique(positions))[1][np.searchsorted(np.unique(positions), positions)]
    # Its processes would take the room of the workers.
    pool.stop()
    out = np.sort(rejected(run))
    plan = Pairs(run, run.manifest("images").rows, out, settings.batch, settings.neighbors, config.seed)
    course = Clustering(settings, spec, clusters, start, embedded.rows)
    return training.until_done(
        *(run, NAME, config, course, plan),
        settings=settings,
        until=settings.steps,
        reporter=reporter,
        check=check,
        shape=shape,
    )


@ray.remote(num_cpus=0)
def _export(place: Training, settings: UslT) -> list[str]:
    """Where torch is, so that the driver does without."""
    said: list[str] = []
    export(place, settings, said.append)
    return said


# All images through the trained network


@dataclass(frozen=True)
class _Judge:
    """What an actor needs to put images into clusters by a network that learned."""

    training: Training
    spec: EncoderSpec
    made: Trained

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.spec.name

    def load(self, device: str) -> Any:
        """Load it on a device: pixels uint8 [b, s, s, 3] to cluster, confidence, sq_dist float32 [b, 3]."""
        import torch

        from selective_ray.inference import Inference

        trunk = encoders.network(self.spec.name, self.spec.checkpoint, self.spec.image_size, self.spec.access)
        data = self.training.run.read_bytes(self.training.table, TRUNK)
        trunk.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        mean, std = spec_colors(self.spec)
        finish = lambda features: np.stack(self.made.judge(features), 1).astype(np.float32)  # noqa: E731
        return Inference(
            trunk, mean=mean, std=std, device=device, precision=self.spec.precision, finish=finish
        )


def _through(
    run: Run,
    config: Config,
    made: Trained,
    spec: EncoderSpec,
    shape: Shape,
    bar: Any,
    check: Callable[[], None],
) -> tuple[list[Shard], int]:
    """Put every image into its cluster by the network that learned; returns shards and peak memory."""
    rows = {shard.index: shard.rows for shard in run.manifest("embeddings").shards}
    finished = {
        shard: there
        for shard in run.finished_shards("clusters")
        if (there := run.recorded_shard("clusters", shard))
    }
    for shard in [shard for shard, n in rows.items() if not n and shard not in finished]:
        finished[shard] = run.write_shard("clusters", shard, CLUSTERS.empty_table())
    todo = {shard: n for shard, n in rows.items() if shard not in finished}
    bar.advance(sum(rows.values()) - sum(todo.values()))
    memory = 0
    if todo:
        column = run.manifest("images").what["images"].get("column")
        how = Reading(config.resources.access(), column, objects.read, embedded=True)
        product = Product(
            doing="clustering",
            by="the network",
            nothing="the network gives no finite numbers for it",
            write=_write_clusters,
        )
        pixels = Pixels(shape.size, shape.crop, config.embed.batch, shape.interpolation)
        judge = _Judge(Training(run, NAME), spec, made)
        # None may be missing: every image needs its cluster.
        waves = Waves(run, config, todo, pixels, judge, product, how, bar, Rejections(0.0))
        for written, _, work in waves.shards():
            finished[written.index] = written
            memory = max(memory, work.memory)
            check()
    return list(finished.values()), memory


def _write_clusters(run: Run, shard: int, rows: pa.Table, content: Open) -> tuple[Shard, None]:
    clusters, confidence, sq_dists = content.x.T
    table = heads_table(rows["image_id"].to_numpy(), clusters.astype(np.int32), confidence, sq_dists)
    return run.write_shard("clusters", shard, table, content.device), None


# Picking


def expected(settings: Selection, count: int) -> int:
    """Return how many rounds there are at least."""
    return 1


def pick(pool: Pool, asked: Asked, watch: Callable[[str], None]) -> Chosen:
    """Pick the surest, or the densest, image of each open cluster.

    Of more clusters than are needed, the largest count. Where fewer hold images, the largest give another
    one, and so on, until there are as many as were asked for.
    """
    by_density = asked.config.usl_t.pick == "density"
    left = asked.sizes.copy()
    picks: list[Picks] = []
    count = 0
    while count < asked.count:
        open_ = selection.largest_open(left, asked.fixed_clusters, asked.count - count)
        taken = np.sort(np.concatenate([asked.fixed, *(part.image_ids for part in picks)]))
        if not len(open_):
            break
        found = pool.fold(
            functools.partial(_best, asked.clusters, asked.column if by_density else "", open_, taken),
            Picks.merge,
        )
        picks.append(found)
        count += len(found.image_ids)
        # A cluster that was asked again has given all that it had.
        left[np.setdiff1d(open_, found.cluster_ids)] = 0
        left[found.cluster_ids] -= 1
        watch("")
    ids = np.concatenate([part.image_ids for part in picks])
    utilities = dict(
        zip(ids.tolist(), np.concatenate([part.utilities for part in picks]).tolist(), strict=True)
    )
    clusters = np.concatenate([part.cluster_ids for part in picks])
    return Chosen(
        image_ids=ids,
        summary={"second_picks": count - len(np.unique(clusters))},
        judge=lambda wanted, _: (
            np.zeros(len(wanted)),
            np.array([utilities.get(i, 0.0) for i in wanted.tolist()]),
        ),
    )


def _best(table: str, column: str, open_: np.ndarray, taken: np.ndarray, actor: Any) -> ray.ObjectRef:
    return actor.best_of_heads.remote(table, column, open_, taken)
