"""A wave: one Ray Data pipeline that turns ranges of images into shards of embeddings, or of predictions.

    ranges ──► decode (CPU tasks) ──► encode (actors, GPU or CPU) ──► Wave: assemble in order, write shards

Ray Data keeps no order, its writer appends, and a dead actor can keep its place in the pool (ray#62746). So
every batch belongs to one shard and carries its place, one actor puts shards together and writes them, and
whoever watches that actor can end it with everything it started.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from selective_ray import encoders, reading
from selective_ray.actors.placement import Placement
from selective_ray.actors.session import alive_nodes, here, peak_memory, unwrapped
from selective_ray.errors import UserError
from selective_ray.objects import DIRECT, Access
from selective_ray.reading import Read
from selective_ray.schema import REJECTED, embeddings_schema, embeddings_table
from selective_ray.store import Run, Shard

# Attempts at a range of images, or at a single one, before Ray Data drops it.
ATTEMPTS = 3
# How often the cluster is looked at while no batch comes.
LOOK_AROUND_SECONDS = 2.0


@dataclass(frozen=True)
class Range:
    """Images [start, stop) of a shard, and why they are given up, if they are."""

    shard: int
    start: int
    stop: int
    reason: str = ""

    def __len__(self) -> int:
        return self.stop - self.start

    def split(self, batch: int) -> list[Range]:
        """Cut into batches, or a batch into its images."""
        return self.cut(batch if len(self) > batch else 1)

    def cut(self, step: int) -> list[Range]:
        """Cut into ranges of `step` images."""
        return [
            Range(self.shard, start, min(self.stop, start + step))
            for start in range(self.start, self.stop, step)
        ]


@dataclass(frozen=True)
class Pixels:
    """How images become batches: their size, crop, rows of a padded batch, and interpolation."""

    size: int
    crop: float
    batch: int
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Reading:
    """How images are read: the way to the stores, the column of Parquet files, and what reads a request.

    embedded: only the images of `embeddings/`, which could be read once.
    """

    access: Access
    column: str | None
    read: Read
    embedded: bool = False

    def listed(self, run: Run, shard: int) -> pa.Table:
        """Return the rows of a shard of `images/` that are read."""
        return listed(run, shard, self.embedded)

    def decoded(self, rows: pa.Table, pixels: Pixels) -> Iterator[tuple[np.ndarray | None, bytes, str]]:
        """Read and decode rows of a listing, as `reading.decoded` does."""
        how = {"access": self.access, "column": self.column, "read": self.read}
        shape = {"size": pixels.size, "crop": pixels.crop, "interpolation": pixels.interpolation}
        return reading.decoded(rows, **shape, **how)


@functools.lru_cache(maxsize=2)
def listed(run: Run, shard: int, embedded: bool = False) -> pa.Table:
    """Return a shard of `images/`, kept for the next ranges of the same shard."""
    rows = run.read_shard("images", shard)
    if not embedded:
        return rows
    ids = run.read_shard("embeddings", shard, ["image_id"])["image_id"]
    return rows.filter(pc.is_in(rows["image_id"], ids))


def decode_range(
    row: dict[str, np.ndarray], run: Run, pixels: Pixels, how: Reading
) -> Iterator[dict[str, Any]]:
    """Read and decode one range; yields its batches as rows of one, each image at its fixed slot.

    A batch that starts at `start` holds images start … start + batch of the shard; `slots` marks those that
    belong to this range. What a network makes of an image can then not depend on which range it came in.
    """
    shard, start, stop = (int(row[name][0]) for name in ("shard", "start", "stop"))
    given_up = str(row["reason"][0])
    stream = how.decoded(how.listed(run, shard).slice(start, 0 if given_up else stop - start), pixels)
    for first in range(start - start % pixels.batch, stop, pixels.batch):
        here = range(max(start, first), min(stop, first + pixels.batch))
        batch = np.zeros((1, pixels.batch, pixels.size, pixels.size, 3), np.uint8)
        slots = np.zeros((1, pixels.batch), bool)
        slots[0, here[0] - first : here[-1] + 1 - first] = True
        digests = np.zeros((1, pixels.batch, len(reading.NO_DIGEST)), np.uint8)
        reasons = dict.fromkeys(here, given_up) if given_up else {}
        refusal, began = "", time.process_time()
        try:
            for position, (image, digest, reason) in zip(here, stream, strict=False):
                digests[0, position - first] = np.frombuffer(digest, np.uint8)
                if image is None:
                    reasons[position] = reason
                else:
                    batch[0, position - first] = image
        except UserError as error:
            # Raised here, Ray would try the range again.
            refusal = str(error)
        yield {
            "shard": [shard],
            "start": [first],
            "pixels": batch,
            "slots": slots,
            "digests": digests,
            "rejected": [json.dumps(reasons)],
            "refusal": [refusal],
            "memory": [peak_memory()],
            "decode_seconds": [time.process_time() - began],
        }
        if refusal:
            return


@dataclass(frozen=True)
class EncoderSpec:
    """What an actor needs to load the encoder; `pca` is fitted beforehand and travels with it."""

    name: str
    checkpoint: str | None
    image_size: int
    precision: str = "auto"
    compile: bool = False
    pca: dict[str, np.ndarray] | None = None
    batch: int = 1
    access: Access = DIRECT

    def load(self, device: str) -> encoders.Encoder:
        """Load the encoder on a device."""
        return encoders.load(
            self.name,
            checkpoint=self.checkpoint,
            image_size=self.image_size,
            pca=self.pca,
            device=device,
            precision=self.precision,
            compile=self.compile,
            batch=self.batch,
            access=self.access,
        )


class Encode:
    """Turns batches of pixels into embeddings, or into answers of a classifier; one per actor.

    A block holds the batches of a decode task: on a GPU the next is copied while the last is computed.
    """

    def __init__(self, spec: Any, device: str) -> None:
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

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encode a block of k batches; pixels make room for embeddings float32 [k, batch, d]."""
        began = time.monotonic()
        refusals = [self.refusal or str(refusal) for refusal in block["refusal"]]
        if any(refusals):
            embeddings = np.zeros((*block["slots"].shape, 1), np.float32)
        else:
            embeddings = np.stack(list(self.encoder.stream(block["pixels"])))
        seconds = (time.monotonic() - began) / len(refusals)
        passed_on = ("shard", "start", "slots", "digests", "rejected", "decode_seconds")
        return {
            **{name: block[name] for name in passed_on},
            "embedding": embeddings,
            "memory": [max(int(memory), peak_memory()) for memory in block["memory"]],
            "encode_seconds": [seconds] * len(refusals),
            "device": [self.device] * len(refusals),
            "refusal": refusals,
        }


class Open:
    """A shard being put together: x float32 [n, d], which images are done, and why some have no numbers."""

    def __init__(self, rows: int) -> None:
        self.x = np.empty((rows, 0), np.float32)
        self.digests = np.zeros((rows, len(reading.NO_DIGEST)), np.uint8)
        self.done = np.zeros(rows, bool)
        self.rejected: dict[int, str] = {}
        self.device = "cpu"

    def add(
        self,
        start: int,
        slots: np.ndarray,
        embedding: np.ndarray,
        digests: np.ndarray,
        rejected: dict[int, str],
        nothing: str,
    ) -> dict[int, str]:
        """Take the slots of a batch that belong to its range; returns all that are rejected of them.

        nothing: the reason where there are pixels and no numbers come of them.
        """
        if not self.x.size:
            self.x = np.empty((len(self.done), embedding.shape[1]), np.float32)
        slot = np.flatnonzero(slots)
        self.x[start + slot] = embedding[slot]
        self.digests[start + slot] = digests[slot]
        self.done[start + slot] = True
        numberless = start + slot[~np.isfinite(embedding[slot]).all(axis=1)]
        reasons = dict.fromkeys(numberless.tolist(), nothing) | rejected
        self.rejected |= reasons
        return reasons


@dataclass(frozen=True)
class Seen:
    """What came of a batch: its images, those rejected, and up to a few of these as reason and uri."""

    done: Range
    rejected: Counter[str]
    examples: dict[str, list[str]]


@dataclass
class Work:
    """What a shard cost: seconds of decoding and encoding, and the largest process so far, in bytes."""

    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.decode_seconds + other.decode_seconds,
            self.encode_seconds + other.encode_seconds,
            max(self.memory, other.memory),
        )


@dataclass(frozen=True)
class Product:
    """What a wave makes: how a shard of it is written, and the words to tell of it.

    write takes the run, the number of a shard, its rows of the listing, and what came of them; it returns the
    shard, and another one that belongs to it, if any. nothing: see `Open.add`.
    """

    doing: str
    by: str
    nothing: str
    write: Callable[[Run, int, pa.Table, Open], tuple[Shard, Shard | None]]


@ray.remote(num_cpus=0)
class Wave:
    """Runs one Ray Data pipeline over some ranges, and writes the shards that they complete."""

    def run(
        self,
        run: Run,
        ranges: list[Range],
        rows: dict[int, int],
        pixels: Pixels,
        spec: Any,
        product: Product,
        placement: Placement,
        how: Reading,
    ) -> Iterator[tuple[str, Any]]:
        """Yield ("batch", Seen), ("shard", (what was written, Work)), and ("end", None) at last."""
        opened = {shard: Open(n) for shard, n in rows.items()}
        work = Work()
        for block in self._batches(run, ranges, pixels, spec, placement, how):
            for i, shard in enumerate(block["shard"].tolist()):
                if block["refusal"][i]:
                    raise UserError(str(block["refusal"][i]))
                open_shard = opened[shard]
                first, slots = int(block["start"][i]), block["slots"][i]
                reasons = {int(place): reason for place, reason in json.loads(block["rejected"][i]).items()}
                made = block["embedding"][i], block["digests"][i]
                reasons |= open_shard.add(first, slots, *made, reasons, product.nothing)
                open_shard.device = str(block["device"][i])
                work.decode_seconds += float(block["decode_seconds"][i])
                work.encode_seconds += float(block["encode_seconds"][i])
                work.memory = max(work.memory, int(block["memory"][i]), peak_memory())
                places = np.flatnonzero(slots) + first
                uris = how.listed(run, shard)["uri"]
                yield "batch", _seen(Range(shard, int(places[0]), int(places[-1]) + 1), uris, reasons)
                if open_shard.done.all():
                    written = product.write(run, shard, how.listed(run, shard), opened.pop(shard))
                    yield "shard", (*written, work)
                    work = Work(memory=work.memory)
        yield "end", None

    @staticmethod
    def _batches(
        run: Run, ranges: list[Range], pixels: Pixels, spec: Any, placement: Placement, how: Reading
    ) -> Iterator[dict[str, np.ndarray]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A range whose task fails is dropped and is missing from the batches that come out.
        context.max_errored_blocks = -1
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        plan = [{"shard": r.shard, "start": r.start, "stop": r.stop, "reason": r.reason} for r in ranges]
        # Not `from_arrow`: it looks at every table in a task of a whole CPU before anything is decoded.
        decoded = ray.data.from_items(plan, override_num_blocks=len(plan)).map_batches(
            functools.partial(decode_range, run=run, pixels=pixels, how=how),
            batch_size=1,
            num_cpus=placement.decode_cpus,
            memory=placement.decode_memory,
            max_retries=ATTEMPTS - 1,
        )
        encoded = decoded.map_batches(
            Encode,
            fn_constructor_args=(spec, placement.device),
            batch_size=None,
            # Where machines come one after the other, the first begins.
            compute=ray.data.ActorPoolStrategy(
                min_size=1 if placement.grows else placement.encoders, max_size=placement.encoders
            ),
            num_cpus=placement.encode_cpus,
            num_gpus=placement.gpus,
            memory=placement.encode_memory,
            max_task_retries=ATTEMPTS - 1,
        )
        # Prefetching would hold back each batch until the next one came.
        yield from encoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)


def _seen(done: Range, uris: pa.ChunkedArray, reasons: dict[int, str]) -> Seen:
    examples: dict[str, list[str]] = {}
    for place, reason in reasons.items():
        if len(some := examples.setdefault(reason, [])) < 3:
            some.append(uris[place].as_py())
    return Seen(done, Counter(reasons.values()), examples)


def write_embeddings(run: Run, shard: int, rows: pa.Table, content: Open, dtype: str) -> tuple[Shard, Shard]:
    """Write one shard of `rejected/` and then of `embeddings/`, so that the second tells of both."""
    ids = rows["image_id"].to_numpy()
    out = sorted(content.rejected)
    reasons = pa.table(
        {
            "image_id": ids[out],
            "uri": rows["uri"].take(pa.array(out, pa.int64())),
            "reason": [content.rejected[i] for i in out],
        },
        REJECTED,
    )
    kept = np.setdiff1d(np.arange(len(ids)), out)
    schema = embeddings_schema(content.x.shape[1], dtype, digest=True)
    table = embeddings_table(ids[kept], content.x[kept], schema, content.digests[kept])
    rejected = run.write_shard("rejected", shard, reasons)
    return run.write_shard("embeddings", shard, table, content.device), rejected


class WatchedWave:
    """One wave as the driver sees it: its events, then which ranges failed and how it ended."""

    def __init__(
        self,
        run: Run,
        ranges: list[Range],
        rows: dict[int, int],
        pixels: Pixels,
        spec: Any,
        product: Product,
        placement: Placement,
        how: Reading,
    ) -> None:
        self.arguments = (run, ranges, rows, pixels, spec, product, placement, how)
        self.ranges = ranges
        self.placement = placement
        self.done: dict[int, dict[int, int]] = {}
        self.ended_by_itself = False
        self.lost_node = False
        self.ending = ""

    def events(self, start_seconds: float, stall_seconds: float) -> Iterator[tuple[str, Any]]:
        """Yield "batch" and "shard" events; ends the wave where none comes for stall_seconds.

        The first may take start_seconds, in which processes start and load the encoder. A wave that the
        cluster has no room for any more, since a node went, is ended at once.
        """
        nodes = alive_nodes()
        # Ray Data keeps actors for the life of the cluster beside the process that first uses it; machines
        # that come and go would never be idle with these.
        wave = Wave.options(max_restarts=0, scheduling_strategy=here()).remote()
        events = wave.run.options(num_returns="streaming").remote(*self.arguments)
        try:
            while True:
                patience = stall_seconds if self.done else start_seconds
                if not self._wait(events, patience):
                    return
                with unwrapped():
                    kind, value = ray.get(next(events))
                if kind == "end":
                    self.ended_by_itself = True
                    self.ending = "the end of its images"
                    return
                if kind == "batch":
                    self.done.setdefault(value.done.shard, {})[value.done.start] = value.done.stop
                yield kind, value
        except StopIteration:
            self.ending = "an early end of its events"
        except ray.exceptions.RayError as error:
            self.ending = str(error).strip().splitlines()[-1]
        finally:
            # Its encoders belong to it and end with it.
            ray.kill(wave)
            self.lost_node = self.lost_node or bool(nodes - alive_nodes())

    def _wait(self, events: ray.ObjectRefGenerator, patience: float) -> bool:
        """Wait for the next event; False, with the ending said, where the wave must be ended."""
        deadline = time.monotonic() + patience
        while not ray.wait([events], timeout=min(patience, LOOK_AROUND_SECONDS))[0]:
            if not self.placement.fits():
                self.lost_node = True
                self.ending = "the loss of a node: what is left has no room for its encoders and a decoder"
                return False
            if time.monotonic() >= deadline:
                self.ending = f"no image for {patience:g} seconds"
                return False
        return True

    def failed(self) -> list[Range]:
        """Return the ranges to blame.

        A wave that ended by itself dropped what Ray had tried as often as it may. One that was ended leaves
        the ranges it had not come to as well; decoding starts in order, so that only as many of
        those not done as are decoded at once can have held it up. Where a node went, none is to blame.
        """
        if self.lost_node:
            return []
        left = [r for r in self.ranges if not self._is_done(r)]
        return left if self.ended_by_itself else left[: self.placement.at_once]

    def _is_done(self, r: Range) -> bool:
        done, position = self.done.get(r.shard, {}), r.start
        while position < r.stop and position in done:
            position = done[position]
        return position >= r.stop
