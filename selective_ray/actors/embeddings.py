"""The embed stage: Ray Data feeds decoded batches to encoder actors; shards are assembled here, in order.

    plan of ranges ──► decode (CPU tasks) ──► encode (actors, GPU or CPU) ──► Wave: assemble, write shards

Ray Data keeps no order, its writer appends, and a dead actor can keep its place in the pool (ray#62746). So
every batch belongs to one shard and carries its place; one actor, the wave, puts shards together and writes
them; and the driver watches that wave, ends it when it makes no progress, and begins another with the
shards that are left. Ray Data drops a range of images whose task died three times or raised; the next wave
tries it in smaller pieces, down to the image at fault, which is rejected.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selective_ray import encoders, images
from selective_ray.actors.images import table_of
from selective_ray.actors.session import Session, cpus, gpus, peak_memory, unwrapped
from selective_ray.config import Config, Resources
from selective_ray.errors import UserError
from selective_ray.progress import Reporter, Watch
from selective_ray.schema import REJECTED, embeddings_schema
from selective_ray.store import Manifest, Run, Shard, Stopwatch

# Batches that one decode task makes: enough to outweigh a task's overhead, few enough to redo.
BATCHES_PER_TASK = 8
# Shards of one wave: bounds what a wave has in memory and what a restart of it repeats.
SHARDS_PER_WAVE = 256
# Attempts at a range of images before it is split, and at a single image before it is rejected.
ATTEMPTS = 3
# Waves in a row without a single batch, after which the run gives up.
FRUITLESS_WAVES = 3
PCA_FILE = "pca.npz"
PCA_SAMPLE = 4096

Read = Callable[[str], bytes]


@dataclass(frozen=True)
class Range:
    """Images [start, stop) of a shard, how often they failed, and why they are given up, if they are."""

    shard: int
    start: int
    stop: int
    failures: int = 0
    reason: str = ""

    def __len__(self) -> int:
        return self.stop - self.start

    def split(self, batch: int) -> list[Range]:
        """Cut into batches, or a batch into its images."""
        return self.cut(batch if len(self) > batch else 1)

    def cut(self, step: int) -> list[Range]:
        """Cut into ranges of `step` images that have not failed yet."""
        return [
            Range(self.shard, start, min(self.stop, start + step))
            for start in range(self.start, self.stop, step)
        ]


@dataclass(frozen=True)
class Pixels:
    """How files become batches: image size, crop, rows of a padded batch."""

    size: int
    crop: float
    batch: int


@functools.lru_cache(maxsize=2)
def _uris(run: Run, shard: int) -> list[str]:
    return run.read_shard("images", shard, ["uri"])["uri"].to_pylist()


def decode_range(
    row: dict[str, np.ndarray], run: Run, pixels: Pixels, read: Read
) -> Iterator[dict[str, Any]]:
    """Read and decode one range; yields its batches as rows of one, each image at its fixed slot.

    A batch that starts at `start` holds images start … start + batch of the shard; `slots` marks those that
    belong to this range. What a network makes of an image can then not depend on which range it came in.
    """
    shard, start, stop = (int(row[name][0]) for name in ("shard", "start", "stop"))
    given_up = str(row["reason"][0])
    uris = _uris(run, shard)
    for first in range(start - start % pixels.batch, stop, pixels.batch):
        here = range(max(start, first), min(stop, first + pixels.batch))
        batch = np.zeros((1, pixels.batch, pixels.size, pixels.size, 3), np.uint8)
        slots = np.zeros((1, pixels.batch), bool)
        inside = slice(here[0] - first, here[-1] + 1 - first)
        slots[0, inside] = True
        if given_up:
            reasons = dict.fromkeys(here, given_up)
        else:
            batch[0, inside], rejected = images.read_batch(
                [uris[i] for i in here], size=pixels.size, crop=pixels.crop, read=read
            )
            reasons = {here[slot]: reason for slot, reason in rejected.items()}
        yield {
            "shard": [shard],
            "start": [first],
            "pixels": batch,
            "slots": slots,
            "rejected": [json.dumps(reasons)],
            "memory": [peak_memory()],
        }


class Encode:
    """Turns batches of pixels into embeddings; one per actor."""

    def __init__(self, spec: EncoderSpec, device: str) -> None:
        if spec.name != encoders.PCA:
            import torch

            # More threads would change the last bits; more actors do the same work.
            if device == "cpu":
                torch.set_num_threads(1)
        self.device, self.refusal = device, ""
        try:
            self.encoder = spec.load(device)
        except UserError as error:
            # Raised here, Ray would start the actor again; so it answers every batch with the reason.
            self.refusal = str(error)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encode a row of one batch; pixels make room for embeddings float32 [1, batch, d]."""
        if self.refusal:
            embedding = np.zeros((len(row["slots"][0]), 1), np.float32)
        else:
            embedding = self.encoder.encode(row["pixels"][0])
        memory = max(int(row["memory"][0]), peak_memory())
        kept = {name: row[name] for name in ("shard", "start", "slots", "rejected")}
        return {
            **kept,
            "embedding": embedding[None],
            "memory": [memory],
            "device": [self.device],
            "refusal": [self.refusal],
        }


@dataclass(frozen=True)
class EncoderSpec:
    """What an actor needs to load the encoder; `pca` is fitted beforehand and travels with it."""

    name: str
    checkpoint: str | None
    image_size: int
    pca: dict[str, np.ndarray] | None = None

    def load(self, device: str) -> encoders.Encoder:
        """Load the encoder on a device."""
        return encoders.load(
            self.name, checkpoint=self.checkpoint, image_size=self.image_size, pca=self.pca, device=device
        )


class _Open:
    """A shard being put together: x float32 [n, d] and which images are done."""

    def __init__(self, rows: int) -> None:
        self.x = np.empty((rows, 0), np.float32)
        self.done = np.zeros(rows, bool)
        self.rejected: dict[int, str] = {}
        self.device = "cpu"

    def add(self, start: int, slots: np.ndarray, embedding: np.ndarray, rejected: dict[int, str]) -> None:
        """Take the slots of a batch that belong to its range."""
        if not self.x.size:
            self.x = np.empty((len(self.done), embedding.shape[1]), np.float32)
        slot = np.flatnonzero(slots)
        self.x[start + slot] = embedding[slot]
        self.done[start + slot] = True
        self.rejected |= rejected
        for position in start + slot[~np.isfinite(embedding[slot]).all(axis=1)]:
            self.rejected.setdefault(int(position), "the encoder gives no direction for it")


@ray.remote(num_cpus=0)
class Wave:
    """Runs one Ray Data pipeline over some ranges, and writes the shards that they complete."""

    def run(
        self,
        run: Run,
        ranges: list[Range],
        rows: dict[int, int],
        pixels: Pixels,
        spec: EncoderSpec,
        dtype: str,
        placement: Placement,
        read: Read,
    ) -> Iterator[tuple[str, Any]]:
        """Yield ("batch", images), ("shard", (embeddings, rejected, memory)), and last ("left", ranges)."""
        opened = {shard: _Open(n) for shard, n in rows.items()}
        memory = 0
        for block in self._batches(run, ranges, pixels, spec, placement, read):
            for i, shard in enumerate(block["shard"].tolist()):
                if block["refusal"][i]:
                    raise UserError(str(block["refusal"][i]))
                open_shard = opened[shard]
                reasons = {int(slot): reason for slot, reason in json.loads(block["rejected"][i]).items()}
                open_shard.add(int(block["start"][i]), block["slots"][i], block["embedding"][i], reasons)
                open_shard.device = str(block["device"][i])
                memory = max(memory, int(block["memory"][i]), peak_memory())
                yield "batch", int(np.count_nonzero(block["slots"][i]))
                if open_shard.done.all():
                    yield "shard", (*_write(run, shard, opened.pop(shard), dtype), memory)
        yield (
            "left",
            [r for r in ranges if r.shard in opened and not opened[r.shard].done[r.start : r.stop].all()],
        )

    @staticmethod
    def _batches(
        run: Run, ranges: list[Range], pixels: Pixels, spec: EncoderSpec, placement: Placement, read: Read
    ) -> Iterator[dict[str, np.ndarray]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A range whose task fails is dropped and comes back in `left`; nothing is lost silently.
        context.max_errored_blocks = -1
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        plan = [
            pa.table({"shard": [r.shard], "start": [r.start], "stop": [r.stop], "reason": [r.reason]})
            for r in ranges
        ]
        decoded = ray.data.from_arrow(plan).map_batches(
            functools.partial(decode_range, run=run, pixels=pixels, read=read),
            batch_size=1,
            num_cpus=placement.decode_cpus,
            max_retries=ATTEMPTS - 1,
        )
        encoded = decoded.map_batches(
            Encode,
            fn_constructor_args=(spec, placement.device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=placement.encoders),
            num_cpus=placement.encode_cpus,
            num_gpus=placement.gpus,
            max_task_retries=ATTEMPTS - 1,
        )
        yield from encoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


def _write(run: Run, shard: int, content: _Open, dtype: str) -> tuple[Shard, Shard]:
    """Write one shard of `rejected/` and then of `embeddings/`, so that the second tells of both."""
    listed = run.read_shard("images", shard, ["image_id", "uri"])
    ids = listed["image_id"].to_numpy()
    out = sorted(content.rejected)
    reasons = pa.table(
        {
            "image_id": ids[out],
            "uri": listed["uri"].take(pa.array(out, pa.int64())),
            "reason": [content.rejected[i] for i in out],
        },
        REJECTED,
    )
    kept = np.setdiff1d(np.arange(len(ids)), out)
    table = table_of(ids[kept], content.x[kept], embeddings_schema(content.x.shape[1], dtype))
    rejected = run.write_shard("rejected", shard, reasons)
    return run.write_shard("embeddings", shard, table, content.device), rejected


@dataclass(frozen=True)
class Placement:
    """Where encoders and decoders run."""

    encoders: int
    encode_cpus: float
    decode_cpus: float
    gpus: float
    device: str


def place(resources: Resources) -> Placement:
    """Choose encoders and their share of the cluster.

    On GPUs: one encoder each, and every CPU decodes. Without: encoders and decoders share the CPUs, half a
    logical CPU each, and whichever is behind gets the time.
    """
    per_worker = resources.gpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if gpus() else 0.0
    if per_worker > 0:
        if gpus() < per_worker:
            raise UserError(
                f"resources.gpus_per_worker = {per_worker}, but the cluster has {gpus():g} GPUs; set it to 0"
            )
        encoders_ = resources.workers or max(1, int(gpus() / per_worker))
        return Placement(encoders_, 0.1, 1.0, per_worker, "cuda")
    encoders_ = resources.workers or cpus()
    # At least one decoder must find room beside all encoders.
    share = min(0.5, cpus() / (encoders_ + 1))
    return Placement(encoders_, share, share, 0.0, "cpu")


def _fitted_pca(
    run: Run, pixels: Pixels, rows: list[int], seed: int, read: Read, stall_seconds: float
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
            ready, pending = ray.wait(pending, timeout=stall_seconds)
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
    uris = _uris(run, shard)
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
    stall_seconds = config.resources.stall_seconds
    return replace(spec, pca=_fitted_pca(run, pixels, rows, config.seed, read, stall_seconds))


def _finished(run: Run) -> dict[int, tuple[Shard, Shard]]:
    """Return the shards that earlier attempts left whole, with those of `rejected/`."""
    found = {}
    for shard in run.finished_shards("embeddings"):
        embedded = run.recorded_shard("embeddings", shard)
        rejected = run.recorded_shard("rejected", shard) if embedded else None
        if embedded and rejected:
            found[shard] = (embedded, rejected)
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
    fruitless = 0
    while ranges:
        some = list(ranges)[:SHARDS_PER_WAVE]
        wave = _WaveRun(
            run,
            [r for shard in some for r in ranges[shard]],
            {shard: todo[shard] for shard in some},
            pixels,
            spec,
            config.embed.dtype,
            place(config.resources),
            read,
        )
        unfinished = 0
        for kind, value in wave.events(config.resources.stall_seconds):
            if kind == "batch":
                bar.advance(value)
                unfinished += value
            else:
                shard = value[0].index
                del ranges[shard]
                unfinished -= todo[shard]
                yield value
        bar.advance(-unfinished)
        fruitless = 0 if wave.progressed else fruitless + 1
        for failed in wave.left:
            if failed.shard not in ranges:
                continue
            # Ray has tried a dropped range as often as it may; a wave that was ended tried it once.
            failures = failed.failures + (ATTEMPTS if wave.ended_by_itself else 1)
            ranges[failed.shard].remove(failed)
            if failures < ATTEMPTS:
                ranges[failed.shard].append(replace(failed, failures=failures))
                continue
            fruitless = 0
            if len(failed) > 1:
                ranges[failed.shard] += failed.split(pixels.batch)
            else:
                reason = f"reading or encoding it failed {ATTEMPTS} times or ended its process"
                ranges[failed.shard].append(replace(failed, failures=0, reason=reason))
        if fruitless >= FRUITLESS_WAVES:
            raise UserError(
                f"embedding made no progress in {fruitless} attempts, the last ended by: {wave.ending}; "
                "see the logs of Ray, or give it more memory or fewer --set resources.workers"
            )


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


class _WaveRun:
    """One wave as the driver sees it: its events, then what is left and how it ended."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.left: list[Range] = list(arguments[1])
        self.progressed = False
        self.ended_by_itself = False
        self.ending = ""

    def events(self, stall_seconds: float) -> Iterator[tuple[str, Any]]:
        """Yield "batch" and "shard" events; ends the wave where none comes for stall_seconds."""
        wave = Wave.options(max_restarts=0).remote()
        events = wave.run.options(num_returns="streaming").remote(*self.arguments)
        try:
            while True:
                if not ray.wait([events], timeout=stall_seconds)[0]:
                    self.ending = f"no image for {stall_seconds:g} seconds"
                    return
                with unwrapped():
                    kind, value = ray.get(next(events))
                if kind == "left":
                    self.left, self.ended_by_itself = value, True
                    self.ending = f"{len(value)} ranges of images failed"
                    return
                self.progressed |= kind == "shard"
                yield kind, value
        except StopIteration:
            self.ending = "the end of its events"
        except ray.exceptions.RayError as error:
            self.ending = str(error).strip().splitlines()[-1]
        finally:
            # Its encoders belong to it and end with it.
            ray.kill(wave)
