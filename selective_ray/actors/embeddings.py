"""The embed stage: waves of shards until every image is embedded, or rejected with a reason.

Ray Data drops a range of images whose task died three times or raised; the next wave tries it in smaller
pieces, down to the image at fault, which is rejected. A wave that makes no progress is ended, and another
begun with the shards that are left, the ranges that may have held it up in smaller pieces.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from selective_ray import checkpoints, encoders, learned, objects
from selective_ray.actors import since
from selective_ray.actors.pca import PCA_FILE, fitted_pca
from selective_ray.actors.placement import Placement, place
from selective_ray.actors.rejections import ENOUGH_TO_JUDGE, Rejections, nothing_usable, reasons_of
from selective_ray.actors.session import Session, peak_memory
from selective_ray.actors.wave import (
    ATTEMPTS,
    EncoderSpec,
    Pixels,
    Product,
    Range,
    Reading,
    Seen,
    WatchedWave,
    Work,
    write_embeddings,
)
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.memory import shards_per_wave
from selective_ray.progress import Reporter, Watch
from selective_ray.reading import Read
from selective_ray.store import Manifest, Run, Shard, Stopwatch

# Batches that one decode task makes: enough to outweigh a task's overhead, few enough to redo.
BATCHES_PER_TASK = 8
# Waves in a row without a single batch, after which the run gives up.
FRUITLESS_WAVES = 3


def identity(config: Config) -> dict[str, Any]:
    """Return what the embeddings depend on, as their manifest has it; hashes the checkpoint."""
    embed, access = config.embed, config.resources.access()
    transform = encoders.transform(embed.encoder, embed.image_size, access)
    what: dict[str, Any] = {
        "embed": {
            # Of a learned one the weights tell, not the folder that they are in.
            "encoder": "learned" if learned.is_name(embed.encoder) else embed.encoder,
            "weights": encoders.weights_id(embed.encoder, embed.checkpoint, access),
            "image_size": transform.size,
            "crop": transform.crop,
            "interpolation": transform.interpolation,
            "dtype": embed.dtype,
            "batch": embed.batch,
        }
    }
    if embed.encoder == encoders.PCA:
        return what | {"seed": config.seed}
    what["embed"] |= {"precision": embed.precision, "compile": embed.compile}
    return what


def embed(
    run: Run,
    config: Config,
    session: Session,
    reporter: Reporter,
    *,
    earlier: Run | None = None,
    check: Callable[[], None] = lambda: None,
    read: Read = objects.read,
) -> Manifest:
    """Embed every image of `images/` into `embeddings/`, or into `rejected/` with a reason.

    Finished shards of earlier attempts stay; those of an `earlier` run, which come first in the listing, are
    copied. `check` is called at every shard and may raise, as a lost lease does. Raises UserError where
    nothing can be embedded, too much is rejected, or no progress is made.
    """
    images = run.manifest("images")
    assert images is not None
    what = identity(config)
    # The listing's content, not its place: a folder that was moved as it is makes the same embeddings.
    inputs = {"images": images.what["content"]}
    run.begin("rejected", what, inputs)
    if done := run.begin("embeddings", what, inputs):
        return done
    stopwatch = Stopwatch(run, "embeddings")
    rows = [shard.rows for shard in images.shards]
    finished = _finished(run)
    if earlier:
        session.start()
        finished |= _copied(run, earlier, set(finished))
    todo = {shard: n for shard, n in enumerate(rows) if shard not in finished}
    rejections = Rejections(config.resources.max_rejected)
    for shard in finished:
        rejections.add(shard, rows[shard], *reasons_of(run, shard))
        rejections.keep(shard)
    made = what["embed"]
    pixels = Pixels(made["image_size"], made["crop"], made["batch"], made["interpolation"])
    how = Reading(config.resources.access(), images.what.get("images", {}).get("column"), read)
    work, steady = Work(), 0.0
    with reporter.stage("embed", images.rows, "images", images.rows - sum(todo.values())) as bar:
        if todo:
            session.start()
            spec = encoder_spec(run, config, pixels, rows, how)
            product = Product(
                doing="embedding",
                by="the encoder",
                nothing="the encoder gives no direction for it",
                write=functools.partial(write_embeddings, dtype=made["dtype"]),
            )
            waves = Waves(run, config, todo, pixels, spec, product, how, bar, rejections)
            for embedded, rejected, shard_work in waves.shards():
                finished[embedded.index] = (embedded, rejected)
                work += shard_work
                bar.tell(
                    "shard written",
                    shard=embedded.index,
                    rows=embedded.rows,
                    shards=len(finished),
                    rejected=rejections.reasons.total(),
                )
                check()
                stopwatch.note()
            steady = waves.busy_seconds
    rejections.check(1)
    return _finish(run, images, finished, stopwatch, work, speed(config, work, todo, steady))


def speed(config: Config, work: Work, todo: dict[int, int], seconds: float) -> dict[str, Any]:
    """Return how busy the encoders were, and how many decoding CPUs keep one busy; empty without work.

    Counted from the first batch that came to the last, in this attempt.
    """
    n = sum(todo.values())
    if not (n and seconds and work.decode_seconds and work.encode_seconds):
        return {}
    encoders_ = place(config.resources).encoders
    busy = min(1.0, work.encode_seconds / (encoders_ * seconds))
    return {
        "images_per_second": round(n / seconds, 1),
        "encoder_busy": round(busy, 3),
        # Encoders that wait a fifth of the time wait for pixels.
        "limit": "encoding" if busy > 0.8 else "decoding",
        "decoded_per_cpu_second": round(n / work.decode_seconds, 1),
        "encoded_per_encoder_second": round(n / work.encode_seconds, 1),
        "cpus_per_encoder": round(work.decode_seconds / work.encode_seconds, 2),
    }


def encoder_spec(run: Run, config: Config, pixels: Pixels, rows: list[int], how: Reading) -> EncoderSpec:
    """Return what an actor needs to load the encoder; pca is fitted where that is not yet done."""
    embed = config.embed
    checkpoint = embed.checkpoint and checkpoints.absolute(embed.checkpoint)
    name = checkpoints.absolute(embed.encoder) if learned.is_name(embed.encoder) else embed.encoder
    spec = EncoderSpec(
        *(name, checkpoint, pixels.size, embed.precision, embed.compile),
        batch=pixels.batch,
        access=how.access,
    )
    if embed.encoder != encoders.PCA:
        return spec
    patience = config.resources.start_seconds
    return replace(spec, pca=fitted_pca(run, pixels, rows, config.seed, how, patience))


def _finished(run: Run) -> dict[int, tuple[Shard, Shard]]:
    """Return the shards that earlier attempts left whole, with those of `rejected/`."""
    found = {}
    for shard in run.finished_shards("embeddings"):
        embedded = run.recorded_shard("embeddings", shard)
        rejected = run.recorded_shard("rejected", shard) if embedded else None
        if embedded and rejected:
            found[shard] = (embedded, rejected)
    # What was rejected in a shard that was then not written may be readable now.
    for shard in set(run.finished_shards("rejected")) - set(found):
        run.remove_shard("rejected", shard)
    return found


def _copied(run: Run, earlier: Run, have: set[int]) -> dict[int, tuple[Shard, Shard]]:
    """Copy the shards of an earlier run that are not here yet, and what its encoder was fitted to."""
    shards = [shard.index for shard in earlier.manifest("images").shards if shard.index not in have]
    home = earlier.home("embeddings")
    if home.exists("embeddings", PCA_FILE) and not run.exists("embeddings", PCA_FILE):
        run.write_bytes(home.read_bytes("embeddings", PCA_FILE), "embeddings", PCA_FILE)
    rejected = {shard.index: shard for shard, _ in since.copied(run, earlier, "rejected", shards)}
    embedded = since.copied(run, earlier, "embeddings", shards)
    return {shard.index: (shard, rejected[shard.index]) for shard, _ in embedded}


class Waves:
    """Runs waves until every shard is written."""

    def __init__(
        self,
        run: Run,
        config: Config,
        todo: dict[int, int],
        pixels: Pixels,
        spec: Any,
        product: Product,
        how: Reading,
        bar: Watch,
        rejections: Rejections,
    ) -> None:
        self.run, self.config, self.todo = run, config, todo
        self.pixels, self.spec, self.product, self.how = pixels, spec, product, how
        self.bar, self.rejections = bar, rejections
        # From the first batch of each wave to its end, start-up aside.
        self.busy_seconds = 0.0

    def shards(self) -> Iterator[tuple[Shard, Shard | None, Work]]:
        """Yield each shard as it is written, with the one that belongs to it."""
        step = BATCHES_PER_TASK * self.pixels.batch
        ranges = {shard: Range(shard, 0, n).cut(step) for shard, n in self.todo.items()}
        fruitless = 0
        while ranges:
            # Anew each time: nodes come and go.
            placement = place(self.config.resources)
            some = list(ranges)[: shards_per_wave(placement.encoders)]
            wave = self._wave([r for shard in some for r in ranges[shard]], placement)
            for kind, value in self._events(wave):
                if kind == "batch":
                    self._count(value)
                else:
                    del ranges[value[0].index]
                    self.rejections.keep(value[0].index)
                    yield value
            if not wave.ended_by_itself:
                self.bar.tell(f"a wave was ended by {wave.ending}; the shards that are left come again")
            self.bar.advance(-sum(seen for seen, _ in self.rejections.open.values()))
            self.rejections.forget_open()
            for failed in wave.failed():
                if failed.reason and not wave.ended_by_itself:
                    # Nothing is read of it, so it cannot have held up a wave.
                    continue
                if len(failed) == 1 and not wave.ended_by_itself and self._is_innocent(failed):
                    continue
                ranges[failed.shard].remove(failed)
                ranges[failed.shard] += _next_try(failed, self.pixels.batch, self.product)
                ranges[failed.shard].sort(key=lambda r: r.start)
            if wave.done:
                fruitless = 0
            elif not wave.lost_node:
                fruitless += 1
            if fruitless >= FRUITLESS_WAVES:
                raise UserError(
                    f"{self.product.doing} made no progress in {fruitless} attempts, the last ended by: "
                    f"{wave.ending}; see the logs of Ray, or give it more memory, a smaller embed.batch, or "
                    "fewer workers"
                )

    def _is_innocent(self, image: Range) -> bool:
        """Whether an image gets through alone, so that another held up its wave; or a node went meanwhile."""
        alone = self._wave([image], place(self.config.resources))
        return any(self._events(alone)) or alone.lost_node

    def _wave(self, ranges: list[Range], placement: Placement) -> WatchedWave:
        rows = {r.shard: self.todo[r.shard] for r in ranges}
        made = self.pixels, self.spec, self.product
        return WatchedWave(self.run, ranges, rows, *made, placement, self.how)

    def _events(self, wave: WatchedWave) -> Iterator[tuple[str, Any]]:
        resources = self.config.resources
        began = None
        for event in wave.events(resources.start_seconds, resources.stall_seconds):
            now = time.monotonic()
            began = began or now
            yield event
            self.busy_seconds += now - began
            began = now

    def _count(self, seen: Seen) -> None:
        self.bar.advance(len(seen.done))
        self.rejections.add(seen.done.shard, len(seen.done), seen.rejected, seen.examples)
        self.rejections.check(ENOUGH_TO_JUDGE)


def _next_try(failed: Range, batch: int, product: Product) -> list[Range]:
    """Return how to try a range again: in pieces, and a single image at last not at all."""
    if failed.reason:
        raise UserError(
            f"{product.by} fails even where there is nothing to read; see the logs of Ray, or set a smaller "
            "embed.batch"
        )
    if len(failed) > 1:
        return failed.split(batch)
    reason = f"reading it or {product.doing} it failed {ATTEMPTS} times or ended its process"
    return [replace(failed, reason=reason)]


def _finish(
    run: Run,
    images: Manifest,
    finished: dict[int, tuple[Shard, Shard]],
    stopwatch: Stopwatch,
    work: Work,
    speed: dict[str, Any],
) -> Manifest:
    """Count, and write the manifests of `rejected/` and `embeddings/`."""
    embedded = sum(kept.rows for kept, _ in finished.values())
    rejected = sum(out.rows for _, out in finished.values())
    if embedded + rejected != images.rows:
        raise UserError(
            f"{images.rows} images are listed, {embedded} embedded and {rejected} rejected: some were "
            f"lost; remove {run.path('embeddings')} and {run.path('rejected')} and run again"
        )
    reasons: Counter[str] = Counter()
    for shard, (_, out) in finished.items():
        if out.rows:
            reasons += reasons_of(run, shard)[0]
    peaks = {"driver": peak_memory(), "largest_worker": work.memory}
    if run.manifest("rejected") is None:
        run.finish(
            "rejected",
            [out for _, out in finished.values()],
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peaks,
            summary={"reasons": dict(reasons.most_common())},
        )
    if not embedded:
        raise UserError(nothing_usable(images.rows, reasons))
    first = next(shard for shard, (kept, _) in finished.items() if kept.rows)
    return run.finish(
        "embeddings",
        [kept for kept, _ in finished.values()],
        seconds=stopwatch.seconds(),
        peak_memory_bytes=peaks,
        summary={
            "embedded": embedded,
            "rejected": rejected,
            "dimension": run.read_embeddings(first)[1].shape[1],
            **speed,
        },
    )
