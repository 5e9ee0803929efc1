"""FixMatch on Ray Train: the labels of a run and all its other images, and what its workers do in a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from selective_ray import batches, checkpoints, labeling, model, propagation, training_page
from selective_ray.actors import training
from selective_ray.actors.model import exported
from selective_ray.actors.session import Session
from selective_ray.actors.training_worker import Job, Place
from selective_ray.actors.watching import watched
from selective_ray.batches import Plan
from selective_ray.config import Config, Train
from selective_ray.errors import UserError, named
from selective_ray.held_out import NONE, HeldOut
from selective_ray.lease import FILE as LEASE
from selective_ray.lease import Lease
from selective_ray.memory import peak_memory
from selective_ray.objects import Access
from selective_ray.pixels import Pixels, folder_of
from selective_ray.progress import Reporter
from selective_ray.store import Manifest, Run
from selective_ray.training import Training
from selective_ray.truth import Truth, rejected


def train(
    run: Run,
    config: Config,
    name: str,
    reporter: Reporter,
    *,
    until: int | None = None,
    held_out: HeldOut = NONE,
    truth: Truth | None = None,
    address: str | None = None,
) -> tuple[Manifest | None, dict[str, Any]]:
    """Train until a step, or to the end; returns the manifest of a finished training, and its numbers.

    truth: classes of images, for no other use than to tell how many pseudo-labels are wrong. Raises
    UserError where there is nothing to train on, or where it fails again and again.
    """
    training.check(name, config)
    labels = _labels(run, reporter)
    classes = tuple(sorted(set(labels.values())))
    _check_network(config.train, len(classes), run.access)
    _warn_of_missing(classes, held_out, truth, reporter)
    settings = config.train
    # The key is left out where it is 0, so that trainings from before it was there are continued.
    without = {"checkpoint", "evaluate_every", "checkpoint_every"}
    without |= set() if settings.propagate else {"propagate"}
    if settings.propagate:
        given = len(labels)
        labels = propagation.propagated(run, labels, settings.propagate)
        reporter.warn(
            f"{len(labels) - given:,} images are taught the label of another in their cluster, which nobody "
            "gave them (train.propagate): compare only with trainings that do so, too"
        )
    what = {
        "train": settings.model_dump(exclude=without)
        | {"checkpoint": settings.checkpoint and checkpoints.sha256(settings.checkpoint, run.access)},
        "classes": list(classes),
        "seed": config.seed,
    }
    place = Training(run, name)
    with (
        Lease(run, reporter.say) as lease,
        Session(address, [run.path(LEASE)]) as session,
        watched(run, reporter, config.resources),
    ):
        inputs = run.fingerprints("images", "rejected", "labels")
        if done := place.begin(what, inputs):
            return done, done.summary
        session.start()
        stop = min(settings.steps, until or settings.steps)
        targets = np.array([classes.index(labels[i]) for i in sorted(labels)], np.int64)
        course = FixMatch(settings, classes, targets, held_out, _truth(run, classes, truth))
        started = time.monotonic()
        memory = training.until_done(
            *(run, name, config, course, _plan(run, config, labels)),
            settings=settings,
            until=stop,
            reporter=reporter,
            check=lease.check,
        )
        exported(place, session, reporter)
        lines = place.metrics()
        page = training_page.render(name, settings.steps, lines, list(classes))
        run.write_bytes(page.encode(), "report", f"training-{name}.html")
        summary = _summary(course, stop, lines, time.monotonic() - started)
        if stop < settings.steps:
            return None, summary
        peaks = {"driver": peak_memory(), "worker": memory}
        done = run.finish(
            place.table, [], seconds=summary["seconds"], peak_memory_bytes=peaks, summary=summary
        )
        return done, summary


def _labels(run: Run, reporter: Reporter) -> dict[int, str]:
    """Return the labels of images that can be read; raises UserError where they are too few."""
    images = run.manifest("images")
    if images is None or run.manifest("embeddings") is None:
        raise UserError(f"{run.uri} has no finished embeddings; run `selective-ray select` on it first")
    if "images" not in images.what:
        raise UserError(
            f"{run.uri} was made of embeddings that were brought, without images to train on; make a run "
            "with --images"
        )
    labels = labeling.read_labels(run).labels
    unreadable = set(rejected(run).tolist())
    if lost := sorted(labels.keys() & unreadable):
        reporter.warn(f"{len(lost):,} labeled images cannot be read, and are left out: {named(lost, ', ')}")
    labels = {image: label for image, label in labels.items() if image not in unreadable}
    if not labels:
        raise UserError(
            f"{run.uri} has no labels; `selective-ray export` writes the picks for people to label, and "
            "`selective-ray labels` brings back what they said"
        )
    if len(only := set(labels.values())) == 1:
        raise UserError(
            f"all {len(labels):,} labels of {run.uri} are {next(iter(only))!r}: a classifier needs two "
            "classes; label more images"
        )
    return labels


def _check_network(settings: Train, classes: int, access: Access) -> None:
    """Raise where there is no such network, or its checkpoint is of another."""
    from selective_ray import classifiers

    network = classifiers.build(settings.network, classes)
    if settings.checkpoint:
        classifiers.begin_from(network, settings.network, settings.checkpoint, access)


def _warn_of_missing(
    classes: tuple[str, ...], held_out: HeldOut, truth: Truth | None, reporter: Reporter
) -> None:
    missing = (set(held_out.labels) | set(truth.classes if truth else ())) - set(classes)
    if missing:
        reporter.warn(
            f"no labeled image is of {named(sorted(missing), ', ')}: every image of "
            f"{'that class' if len(missing) == 1 else 'these classes'} will be answered wrong"
        )


def _plan(run: Run, config: Config, labels: dict[int, str]) -> Plan:
    return Plan(
        labeled_ids=np.array(sorted(labels), np.int64),
        images=run.manifest("images").rows,
        rejected=np.sort(rejected(run)),
        labeled=config.train.batch,
        unlabeled=config.train.batch * config.train.unlabeled_ratio,
        seed=config.seed,
    )


def _truth(run: Run, classes: tuple[str, ...], truth: Truth | None) -> np.ndarray | None:
    """Return the class of every image, int32 [n]: -1 where it is not known, -2 where no label is of it."""
    if truth is None:
        return None
    place = {name: i for i, name in enumerate(classes)}
    # The last is that of images without a truth.
    codes = np.array([*(place.get(name, -2) for name in truth.classes), -1], np.int32)
    shards = (run.read_shard("images", s.index, ["image_id"]) for s in run.manifest("images").shards)
    return np.concatenate([codes[truth.of(run, rows["image_id"].to_numpy())] for rows in shards])


@dataclass(frozen=True)
class FixMatch:
    """What is learned: `classes`, from the labels `targets` int64 [l] of the plan's labeled images.

    truth int32 [n]: the class of every image, for no other use than to tell how many pseudo-labels are wrong;
    -1 where it is not known, -2 where no label is of it.
    """

    settings: Train
    classes: tuple[str, ...]
    targets: np.ndarray
    held_out: HeldOut
    truth: np.ndarray | None

    def begin(self, job: Job, place: Place) -> _Lesson:
        """Build the network, its average and the optimizer of a worker."""
        return _Lesson(self, job, place)


class _Lesson:
    """One worker's part of FixMatch."""

    def __init__(self, course: FixMatch, job: Job, place: Place) -> None:
        from selective_ray import classifiers
        from selective_ray.fixmatch import Learner, Recipe

        self.course, self.job, self.place = course, job, place
        settings = course.settings
        network = classifiers.build(settings.network, len(course.classes))
        if settings.checkpoint:
            classifiers.begin_from(network, settings.network, settings.checkpoint, job.run.access)
        how = {"device": place.device, "precision": settings.precision}
        network, average = classifiers.replicas(network, workers=place.workers, **how)
        self.learner = Learner(network, Recipe(**settings.recipe()), average=average, **how)
        self.state, self.load = self.learner.state, self.learner.load
        self.tally = _Tally(len(course.classes))
        self.mine = slice(place.rank, None, place.workers)
        self.known = len(range(place.rank, job.plan.labeled, place.workers))

    def step(self, t: int, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Take step t on the images of this worker's slots, the labeled ones first."""
        from selective_ray.augment import STRONG_DRAWS, WEAK_DRAWS

        course, plan, known = self.course, self.job.plan, self.known
        draws = batches.draws(plan.seed, t, plan.slots, WEAK_DRAWS, batches.WEAK)
        hard = batches.draws(plan.seed, t, plan.slots, STRONG_DRAWS, batches.STRONG)
        labeled, unlabeled = np.split(draws, [plan.labeled])
        places = np.searchsorted(plan.labeled_ids, ids[:known])
        found = self.learner.step(
            t,
            pixels[:known],
            course.targets[places],
            pixels[known:],
            (np.concatenate([labeled[self.mine], unlabeled[self.mine]]), hard[plan.labeled :][self.mine]),
            (plan.labeled, plan.unlabeled),
        )
        self.tally.add(found, None if course.truth is None else course.truth[ids[known:]])

    def line(self) -> tuple[dict[str, Any], str]:
        """Add up what all workers saw since the last line."""
        line = self.tally.line(self.place, self.course)
        return line, f"loss {line['loss']:.3f}, {100 * line['mask_rate']:.0f} % confident"

    def evaluate(self) -> dict[str, Any] | None:
        """Judge the averaged network on the images that were held out; workers take turns."""
        held_out = self.course.held_out
        if not len(held_out.labels):
            return None
        from selective_ray.fixmatch import Judged, judge

        names = [*self.course.classes, *sorted(set(held_out.labels) - set(self.course.classes))]
        true = np.array([names.index(label) for label in held_out.labels], np.int64)
        size = self.job.shape.size
        identity = (self.job.run.uri, held_out.source, held_out.version, size)
        pixels = Pixels(
            folder_of(*identity),
            np.array([len(true)], np.int64),
            lambda shard: held_out.rows,
            size=size,
            limit=self.job.cache_bytes,
            access=self.job.run.access,
        )

        def answers() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            mine = np.arange(len(true))[self.place.rank :: self.place.workers]
            for start in range(0, len(mine), 256):
                some = mine[start : start + 256]
                found = self.learner.probabilities(pixels.get(some))
                yield np.pad(found, ((0, 0), (0, len(names) - found.shape[1]))), true[some]

        judged = judge(answers(), len(names))
        judged = Judged(*map(self.place.summed, (judged.confusion, judged.confidence)))
        by_class = {
            name: None if np.isnan(share) else round(float(share), 4)
            for name, share in zip(names, judged.by_class, strict=True)
        }
        return {
            "accuracy": round(judged.accuracy, 6),
            "by_class": by_class,
            "calibration_error": round(judged.calibration_error, 4),
            "confusion": judged.confusion.tolist(),
        }

    def export(self) -> None:
        """Write the averaged network as a model."""
        model.export(self.job.training, self.place.say)


class _Tally:
    """What the steps since the last line of the metrics saw."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self.sums: Any = None
        self.known = self.wrong = 0

    def add(self, found: dict[str, Any], truth: np.ndarray | None) -> None:
        """Count a step; truth int32 [u] of the unlabeled images, -1 where not known."""
        import torch

        self.steps += 1
        losses = torch.stack([found["supervised"].double(), found["unsupervised"].double()])
        sums = torch.cat([losses, found["pseudo_labels"].double(), found["confident"].double()])
        # On a GPU nothing waits for these before a line is due.
        self.sums = sums if self.sums is None else self.sums + sums
        if truth is not None:
            taught = found["taught"].cpu().numpy()
            judged = (taught >= 0) & (truth != -1)
            self.known += int(judged.sum())
            self.wrong += int((taught[judged] != truth[judged]).sum())

    def line(self, place: Place, course: FixMatch) -> dict[str, Any]:
        """Return the means over all workers' parts, and begin anew."""
        steps = self.steps
        values = place.summed(np.concatenate([self.sums.cpu().numpy(), [self.known, self.wrong]]))
        losses, rest, (known, wrong) = values[:2] / steps, values[2:-2], values[-2:]
        pseudo_labels, confident = np.split(rest, 2)
        line: dict[str, Any] = {
            "supervised": float(losses[0]),
            "unsupervised": float(losses[1]),
            "loss": float(losses[0] + course.settings.unlabeled_weight * losses[1]),
            "mask_rate": float(confident.sum() / max(1, pseudo_labels.sum())),
            "confident": dict(zip(course.classes, confident.astype(int).tolist(), strict=True)),
        }
        if course.truth is not None:
            line["impurity"] = float(wrong / known) if known else None
        self.clear()
        return line


def _summary(course: FixMatch, steps: int, lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a training came to, by its metrics."""
    judged = [line for line in lines if "accuracy" in line]
    told = [line for line in lines if "loss" in line]
    summary: dict[str, Any] = {
        "steps": steps,
        "labels": len(course.targets),
        "classes": len(course.classes),
        "seconds": round(seconds, 3),
    }
    if told:
        summary |= {key: told[-1][key] for key in ("loss", "mask_rate", "impurity") if key in told[-1]}
        summary["steps_per_second"] = told[-1]["steps_per_second"]
    if judged:
        last = judged[-1]
        summary |= {key: last[key] for key in ("accuracy", "calibration_error")}
        summary["best_accuracy"] = max(line["accuracy"] for line in judged)
    return summary
