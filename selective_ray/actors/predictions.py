"""The predict stage: a trained network labels every image of a run, in the waves that also embed.

A wave reads the images of `embeddings/`; what cannot be read any more has no row, and its shard is tried
again by the next command, until the person accepts it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import model as files
from selective_ray import objects
from selective_ray.actors.embeddings import Waves, speed
from selective_ray.actors.model import exported
from selective_ray.actors.rejections import Rejections
from selective_ray.actors.session import Session, peak_memory
from selective_ray.actors.wave import Open, Pixels, Product, Reading, Work
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.lease import FILE as LEASE
from selective_ray.lease import Lease
from selective_ray.model import Model
from selective_ray.progress import Reporter
from selective_ray.reading import Read
from selective_ray.schema import PREDICTIONS
from selective_ray.store import BEGUN, MANIFEST, Manifest, Run, Shard, Stopwatch, fingerprint
from selective_ray.training import Training

TABLE = "predictions"


@dataclass(frozen=True)
class ClassifierSpec:
    """What an actor needs to load the network."""

    training: Training
    model: Model

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.model.network

    def load(self, device: str) -> Any:
        """Load it on a device."""
        return files.load(self.training, self.model, device)


def predict(
    run: Run,
    config: Config,
    name: str,
    reporter: Reporter,
    *,
    most: float = 0.0,
    replace: bool = False,
    address: str | None = None,
    read: Read = objects.read,
) -> tuple[Manifest, bool]:
    """Label every image of `embeddings/`; returns the manifest, and whether it was there already.

    By the newest checkpoint of the training; `most` is the share of images that may be without a row.
    Finished shards of earlier attempts stay. Raises UserError where there is no such training or no
    checkpoint, where the predictions there are others and not to be replaced, or where more images than that
    cannot be read any more.
    """
    training = Training(run, name)
    begun = files.begun(training)
    if begun["inputs"].get("labels") != run.fingerprints("labels").get("labels"):
        reporter.warn(
            f"the labels have changed since training {name!r} began; train again, under another --name, to "
            "predict by them"
        )
    with Lease(run, reporter.say) as lease, Session(address, [run.path(LEASE)]) as session:
        model = exported(training, session, reporter)
        what = {
            "predict": {
                "name": name,
                "training": model.training,
                "step": model.step,
                "weights": model.sha256[files.WEIGHTS][:16],
                "precision": model.precision,
                "batch": config.embed.batch,
            }
        }
        # The labels are those that were trained on.
        inputs = {"labels": begun["inputs"]["labels"], **run.fingerprints("images", "rejected")}
        _make_way(run, what, inputs, replace=replace)
        if done := run.begin(TABLE, what, inputs):
            return done, True
        stopwatch = Stopwatch(run, TABLE)
        rows = {shard.index: shard.rows for shard in run.manifest("embeddings").shards}
        finished = _finished(run, rows)
        todo = {shard: n for shard, n in rows.items() if shard not in finished}
        # Without a share that was asked for, all the others are labeled first.
        rejections = Rejections(most or 1.0)
        for shard, there in finished.items():
            rejections.add(shard, there.rows, Counter(), {})
            rejections.keep(shard)
        total = sum(rows.values())
        work, steady = Work(), 0.0
        with reporter.stage("predict", total, "images", total - sum(todo.values())) as bar:
            if todo:
                session.start()
                column = run.manifest("images").what["images"].get("column")
                how = Reading(config.resources.access(), column, read, embedded=True)
                product = Product(
                    doing="predicting",
                    by="the network",
                    nothing="the network gives no finite numbers for it",
                    write=functools.partial(write_predictions, classes=tuple(model.classes)),
                )
                pixels = Pixels(model.image_size, model.crop, config.embed.batch, model.interpolation)
                spec = ClassifierSpec(training, model)
                waves = Waves(run, config, todo, pixels, spec, product, how, bar, rejections)
                for written, _, shard_work in waves.shards():
                    finished[written.index] = written
                    work += shard_work
                    lease.check()
                    stopwatch.note()
                steady = waves.busy_seconds
        _check_unread(run, total, sum(shard.rows for shard in finished.values()), rejections, most, reporter)
        done = run.finish(
            TABLE,
            finished.values(),
            seconds=stopwatch.seconds(),
            peak_memory_bytes={"driver": peak_memory(), "largest_worker": work.memory},
            summary={
                "training": name,
                "step": model.step,
                **_counted(run, list(finished.values()), model.classes),
                "unread": dict(rejections.reasons.most_common()),
                **speed(config, work, todo, steady),
            },
        )
        return done, False


def _make_way(run: Run, what: dict[str, Any], inputs: dict[str, str], *, replace: bool) -> None:
    """Remove the predictions of another network, if that was asked for, or raise UserError."""
    theirs = run.read_json(TABLE, MANIFEST) or (run.finished_shards(TABLE) and run.read_json(TABLE, BEGUN))
    if not theirs or theirs["fingerprint"] == fingerprint(TABLE, what, inputs):
        return
    if not replace:
        there, here = theirs["what"]["predict"], what["predict"]
        differing = [key for key in here if here[key] != there.get(key)] or ["images"]
        raise UserError(
            f"{run.path(TABLE)} is by training {there['name']!r} at step {there['step']:,}, and would now be "
            f"by {here['name']!r} at step {here['step']:,} (another "
            f"{', '.join(differing)}); --replace removes it and labels anew"
        )
    run.delete_folder(TABLE)


def _finished(run: Run, rows: dict[int, int]) -> dict[int, Shard]:
    """Return the shards that are there and lack no image; the others make way for another try."""
    found = {}
    for shard in run.finished_shards(TABLE):
        there = run.recorded_shard(TABLE, shard)
        if there and there.rows == rows.get(shard):
            found[shard] = there
        else:
            run.remove_shard(TABLE, shard)
    for shard in [shard for shard, n in rows.items() if not n and shard not in found]:
        found[shard] = run.write_shard(TABLE, shard, PREDICTIONS.empty_table())
    return found


def write_predictions(
    run: Run, shard: int, rows: pa.Table, content: Open, classes: tuple[str, ...]
) -> tuple[Shard, None]:
    """Write one shard of `predictions/`: the images that could be read, in the order of the listing."""
    kept = np.setdiff1d(np.arange(len(rows)), sorted(content.rejected))
    said, confidence = content.x[kept].T
    table = pa.table(
        {
            "image_id": rows["image_id"].take(pa.array(kept)),
            "label": pa.array(classes).take(pa.array(said.astype(np.int64))),
            "confidence": np.ascontiguousarray(confidence),
        },
        PREDICTIONS,
    )
    return run.write_shard(TABLE, shard, table, content.device), None


def _check_unread(
    run: Run, total: int, predicted: int, rejections: Rejections, most: float, reporter: Reporter
) -> None:
    """Tell which images have no row; raises UserError where they are more than the share that may."""
    unread = total - predicted
    if not unread:
        return
    reasons = [
        f"{count:,} {reason}, as {', '.join(rejections.examples[reason])}"
        for reason, count in rejections.reasons.most_common(3)
    ]
    words = (
        f"{unread:,} of {total:,} images cannot be read any more and have no row in {run.path(TABLE)}: "
        f"{'; '.join(reasons)}"
    )
    if not predicted:
        raise UserError(f"{words}; restore them and run again")
    if unread > most * total:
        share = math.ceil(1e4 * unread / total) / 100
        raise UserError(
            f"{words}. All others are labeled; restore these and run again, or do without them by "
            f"--max-rejected {share:g}%"
        )
    reporter.warn(words)


def _counted(run: Run, shards: list[Shard], classes: list[str]) -> dict[str, Any]:
    """Count the images of each class, and average how sure the network is."""
    counts, confidence = Counter(dict.fromkeys(classes, 0)), 0.0
    for shard in shards:
        rows = run.read_shard(TABLE, shard.index, ["label", "confidence"])
        for found in pc.value_counts(rows["label"]).to_pylist():
            counts[found["values"]] += found["counts"]
        confidence += float(rows["confidence"].to_numpy().sum(dtype=np.float64))
    predicted = counts.total()
    return {
        "predicted": predicted,
        "classes": dict(counts),
        "mean_confidence": round(confidence / max(1, predicted), 6),
    }
