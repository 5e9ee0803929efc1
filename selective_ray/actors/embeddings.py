"""The embed stage: waves of shards until every image is embedded, or rejected with a reason.

Ray Data drops a range of images whose task died three times or raised; the next wave tries it in smaller
pieces, down to the image at fault, which is rejected. A wave that makes no progress is ended, and another
begun with the shards that are left, the ranges that may have held it up in smaller pieces.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from selective_ray import encoders, images
from selective_ray.actors.session import Session, peak_memory
from selective_ray.actors.wave import ATTEMPTS, EncoderSpec, Pixels, Range, Read, WatchedWave, place, uris_of
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.progress import Reporter, Watch
from selective_ray.store import Manifest, Run, Shard, Stopwatch

# Batches that one decode task makes: enough to outweigh a task's overhead, few enough to redo.
BATCHES_PER_TASK = 8
# Shards of one wave: bounds what a wave has in memory and what a restart of it repeats.
SHARDS_PER_WAVE = 64
# Waves in a row without a single batch, after which the run gives up.
FRUITLESS_WAVES = 3
PCA_FILE = "pca.npz"
PCA_SAMPLE = 4096


def _fitted_pca(
    run: Run, pixels: Pixels, rows: list[int], seed: int, read: Read, patience: float
) -> dict[str, np.ndarray]:
    """Return the components of `pca`: those kept beside the embeddings, else fitted to a seeded sample.

    The sample is drawn by row position, whatever the shards; rows are the images of each. Images that
    cannot be read, or whose reading ends its process or hangs, are left out of it.
    """
    if run.exists("embeddings", PCA_FILE):
        with np.load(io.BytesIO(run.read_bytes("embeddings", PCA_FILE)), allow_pickle=False) as stored:
            return dict(stored)
    n = sum(rows)
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(n, PCA_SAMPLE), replace=False))
    shards = np.searchsorted(np.cumsum(rows), chosen, side="right")
    first = np.cumsum([0, *rows])
    parts = [(int(shard), chosen[shards == shard] - first[shard]) for shard in np.unique(shards)]
    decoded: dict[int, ray.ObjectRef] = {}
    reasons: Counter[str] = Counter()
    while parts:
        calls = {
            sample_pixels.remote(run, shard, places, pixels, read): (shard, places) for shard, places in parts
        }
        parts = []
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, timeout=patience)
            for call in ready:
                shard, places = calls[call]
                try:
                    usable, rejected = ray.get(call)
                    reasons.update(rejected)
                    decoded[int(first[shard] + places[0])] = usable
                except ray.exceptions.RayError:
                    # Ray tried it three times: look for the image at fault, and do without that one.
                    parts += (
                        [(shard, places[i : i + 1]) for i in range(len(places))] if len(places) > 1 else []
                    )
            if not ready:
                for call in pending:
                    ray.cancel(call, force=True)
    sample = np.concatenate([decoded[place] for place in sorted(decoded)]) if decoded else np.empty((0, 1))
    if not len(sample):
        raise UserError(_nothing_usable(n, reasons))
    pca = encoders.fit_pca(sample)
    buffer = io.BytesIO()
    np.savez(buffer, **pca)
    run.write_bytes(buffer.getvalue(), "embeddings", PCA_FILE)
    return pca


@ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)
def sample_pixels(
    run: Run, shard: int, places: np.ndarray, pixels: Pixels, read: Read
) -> tuple[np.ndarray, list[str]]:
    """Decode some images of a shard: those that can be, uint8 [s, h, w, 3], and why the others cannot."""
    uris = uris_of(run.uri, shard)
    batch, rejected = images.read_batch(
        [uris[place] for place in places], size=pixels.size, crop=pixels.crop, read=read
    )
    return np.delete(batch, list(rejected), axis=0), list(rejected.values())


def _nothing_usable(n: int, reasons: Counter[str]) -> str:
    often = "; most often: {} ({} times)".format(*reasons.most_common(1)[0]) if reasons else ""
    return f"none of the {n} images could be used{often}; check --images"


def identity(config: Config) -> dict[str, Any]:
    """Return what the embeddings depend on, as their manifest has it; hashes the checkpoint."""
    embed = config.embed
    size, crop = encoders.transform(embed.encoder, embed.image_size)
    what: dict[str, Any] = {
        "embed": {
            "encoder": embed.encoder,
            "weights": _weights(embed.encoder, embed.checkpoint),
            "image_size": size,
            "crop": crop,
            "dtype": embed.dtype,
            "batch": embed.batch,
        }
    }
    return what | ({"seed": config.seed} if embed.encoder == encoders.PCA else {})


def _weights(encoder: str, checkpoint: str | None) -> str:
    if encoder == encoders.PCA:
        return "fitted"
    if checkpoint is None:
        return encoders.weights_id(encoder)
    try:
        with Path(checkpoint).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be read ({error.strerror}); check --checkpoint"
        ) from None


def embed(
    run: Run,
    config: Config,
    session: Session,
    reporter: Reporter,
    *,
    check: Callable[[], None] = lambda: None,
    read: Read = images.read,
) -> Manifest:
    """Embed every image of `images/` into `embeddings/`, or into `rejected/` with a reason.

    Finished shards of earlier attempts stay. `check` is called at every shard and may raise, as a lost lease
    does. Raises UserError where nothing can be embedded or no progress is made.
    """
    listed = run.manifest("images")
    assert listed is not None
    what = identity(config)
    # The listing's content, not its place: a folder that was moved as it is makes the same embeddings.
    inputs = {"images": listed.what["content"]}
    run.begin("rejected", what, inputs)
    if done := run.begin("embeddings", what, inputs):
        return done
    stopwatch = Stopwatch(run, "embeddings")
    rows = [shard.rows for shard in listed.shards]
    finished = _finished(run)
    todo = {shard: n for shard, n in enumerate(rows) if shard not in finished}
    size, crop = what["embed"]["image_size"], what["embed"]["crop"]
    pixels = Pixels(size, crop, config.embed.batch)
    memory = 0
    with reporter.stage("embed", listed.rows, "images", listed.rows - sum(todo.values())) as bar:
        if todo:
            session.start()
            spec = _spec(run, config, pixels, rows, read)
            for embedded, rejected, peak in _waves(run, config, todo, pixels, spec, read, bar):
                finished[embedded.index] = (embedded, rejected)
                memory = max(memory, peak)
                check()
                stopwatch.note()
    return _finish(run, listed, finished, stopwatch, memory)


def _spec(run: Run, config: Config, pixels: Pixels, rows: list[int], read: Read) -> EncoderSpec:
    embed = config.embed
    checkpoint = embed.checkpoint and str(Path(embed.checkpoint).absolute())
    spec = EncoderSpec(embed.encoder, checkpoint, pixels.size)
    if embed.encoder != encoders.PCA:
        return spec
    patience = config.resources.start_seconds
    return replace(spec, pca=_fitted_pca(run, pixels, rows, config.seed, read, patience))


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


def _waves(
    run: Run,
    config: Config,
    todo: dict[int, int],
    pixels: Pixels,
    spec: EncoderSpec,
    read: Read,
    bar: Watch,
) -> Iterator[tuple[Shard, Shard, int]]:
    """Run waves until every shard is written; yields each as it is."""
    step = BATCHES_PER_TASK * pixels.batch
    ranges = {shard: Range(shard, 0, n).cut(step) for shard, n in todo.items()}
    placement = place(config.resources)
    fruitless = 0
    while ranges:
        some = list(ranges)[:SHARDS_PER_WAVE]
        how = (pixels, spec, config.embed.dtype, placement, read)
        wave = WatchedWave(
            run, [r for shard in some for r in ranges[shard]], {shard: todo[shard] for shard in some}, *how
        )
        unfinished = 0
        for kind, value in wave.events(config.resources.start_seconds, config.resources.stall_seconds):
            if kind == "batch":
                bar.advance(len(value))
                unfinished += len(value)
            else:
                del ranges[value[0].index]
                unfinished -= todo[value[0].index]
                yield value
        bar.advance(-unfinished)
        for failed in wave.failed(placement.at_once):
            if failed.reason and not wave.ended_by_itself:
                # Nothing is read of it, so it cannot have held up a wave.
                continue
            if len(failed) == 1 and not wave.ended_by_itself:
                # Its neighbors may have held it up: tried alone, it is innocent if it gets through.
                alone = WatchedWave(run, [failed], {failed.shard: todo[failed.shard]}, *how)
                if any(alone.events(config.resources.start_seconds, config.resources.stall_seconds)):
                    continue
            ranges[failed.shard].remove(failed)
            ranges[failed.shard] += _next_try(failed, pixels.batch)
            ranges[failed.shard].sort(key=lambda r: r.start)
        fruitless = 0 if wave.done else fruitless + 1
        if fruitless >= FRUITLESS_WAVES:
            raise UserError(
                f"embedding made no progress in {fruitless} attempts, the last ended by: {wave.ending}; "
                "see the logs of Ray, or give it more memory, a smaller embed.batch, or fewer workers"
            )


def _next_try(failed: Range, batch: int) -> list[Range]:
    """Return how to try a range again: in pieces, and a single image at last not at all."""
    if failed.reason:
        raise UserError(
            "the encoder fails even where there is nothing to read; see the logs of Ray, or set a smaller "
            "embed.batch"
        )
    if len(failed) > 1:
        return failed.split(batch)
    reason = f"reading or encoding it failed {ATTEMPTS} times or ended its process"
    return [replace(failed, reason=reason)]


def _finish(
    run: Run,
    listed: Manifest,
    finished: dict[int, tuple[Shard, Shard]],
    stopwatch: Stopwatch,
    memory: int,
) -> Manifest:
    """Count, and write the manifests of `rejected/` and `embeddings/`."""
    reasons: Counter[str] = Counter()
    for shard, (_, rejected) in finished.items():
        if rejected.rows:
            reasons.update(run.read_shard("rejected", shard, ["reason"])["reason"].to_pylist())
    embedded = sum(shard.rows for shard, _ in finished.values())
    if embedded + reasons.total() != listed.rows:
        raise UserError(
            f"{listed.rows} images are listed, {embedded} embedded and {reasons.total()} rejected: some were "
            f"lost; remove {run.path('embeddings')} and {run.path('rejected')} and run again"
        )
    peaks = {"driver": peak_memory(), "largest_worker": memory}
    if run.manifest("rejected") is None:
        run.finish(
            "rejected",
            [rejected for _, rejected in finished.values()],
            seconds=stopwatch.seconds(),
            peak_memory_bytes=peaks,
            summary={"reasons": dict(reasons.most_common())},
        )
    if not embedded:
        raise UserError(_nothing_usable(listed.rows, reasons))
    first = next(shard for shard, (kept, _) in finished.items() if kept.rows)
    return run.finish(
        "embeddings",
        [kept for kept, _ in finished.values()],
        seconds=stopwatch.seconds(),
        peak_memory_bytes=peaks,
        summary={
            "embedded": embedded,
            "rejected": reasons.total(),
            "dimension": run.read_embeddings(first)[1].shape[1],
        },
    )
