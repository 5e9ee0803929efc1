"""An encoder learned from the images of a source, on Ray Train, and what its workers do in a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from selective_ray import batches, learned, listing, pretraining_page
from selective_ray import truth as true_labels
from selective_ray.actors import training
from selective_ray.actors.images import list_source
from selective_ray.actors.session import Session, unwrapped
from selective_ray.actors.training_worker import Job, Place
from selective_ray.actors.watching import watched
from selective_ray.batches import Plan
from selective_ray.config import Config, Pretrain
from selective_ray.errors import UserError
from selective_ray.lease import FILE as LEASE
from selective_ray.lease import Lease
from selective_ray.memory import peak_memory
from selective_ray.progress import Reporter
from selective_ray.store import Manifest, Run
from selective_ray.training import Training

# Images by which a network is watched while it learns: enough for two digits of each figure.
WATCHED = 1024
# Neighbors that vote for the class of an image (Wu et al., 2018, take 200 of 50,000).
VOTERS = 20
# Features whose effective rank is under this lie on little more than a line.
COLLAPSED = 2.0


def pretrain(
    run: Run,
    images: str,
    config: Config,
    name: str,
    reporter: Reporter,
    *,
    until: int | None = None,
    truth: str | None = None,
    address: str | None = None,
) -> tuple[Manifest | None, dict[str, Any]]:
    """List the images, where that is not done, and learn an encoder of them until a step, or to the end.

    truth: a file of labels or `folders`, for no other use than to tell how well neighbors share their class.
    Returns the manifest of a finished training, and its numbers. Raises UserError where there are too few
    images, or where it fails again and again.
    """
    training.check(name, config)
    settings = config.pretrain
    what = {
        "pretrain": settings.model_dump(exclude={"evaluate_every", "checkpoint_every"}),
        "seed": config.seed,
    }
    _check_network(settings)
    place = Training(run, name)
    run.prepare()
    paths = [run.path(LEASE), *([str(Path(images).absolute())] if "://" not in images else [])]
    with (
        Lease(run, reporter.say) as lease,
        Session(address, paths) as session,
        watched(run, reporter, config.resources),
    ):
        listed = list_source(
            run, listing.Source(images, **config.images.model_dump()), config, session, reporter
        )
        left_out = true_labels.rejected(run)
        if listed.rows - len(left_out) < settings.batch:
            raise UserError(
                f"a step is of pretrain.batch = {settings.batch:,} images, and there are "
                f"{listed.rows - len(left_out):,}; set a smaller one"
            )
        if done := place.begin(what, {"images": listed.what["content"]}):
            return done, done.summary
        session.start()
        stop = min(settings.steps, until or settings.steps)
        course = Contrast(settings, *_watched(run, config.seed, listed.rows, left_out, truth))
        plan = Plan(np.empty(0, np.int64), listed.rows, np.sort(left_out), 0, settings.batch, config.seed)
        started = time.monotonic()
        memory = training.until_done(
            *(run, name, config, course, plan),
            settings=settings,
            until=stop,
            reporter=reporter,
            check=lease.check,
            forgiving=True,
        )
        made = learned.exported(place) or _exported(place, reporter)
        lines = place.metrics()
        page = pretraining_page.render(name, settings.steps, lines)
        run.write_bytes(page.encode(), "report", f"training-{name}.html")
        summary = _summary(stop, lines, made, time.monotonic() - started)
        if stop < settings.steps:
            return None, summary
        peaks = {"driver": peak_memory(), "worker": memory}
        done = run.finish(
            place.table, [], seconds=summary["seconds"], peak_memory_bytes=peaks, summary=summary
        )
        return done, summary


def _check_network(settings: Pretrain) -> None:
    from selective_ray import classifiers

    classifiers.trunk(settings.network, settings.image_size)


def _exported(place: Training, reporter: Reporter) -> learned.Learned:
    """Write the encoder in a task, where torch is."""
    with unwrapped():
        made, said = ray.get(_export.remote(place))
    for message in said:
        reporter.warn(message)
    return made


@ray.remote(num_cpus=0)
def _export(place: Training) -> tuple[learned.Learned, list[str]]:
    said: list[str] = []
    return learned.export(place, said.append), said


def _watched(
    run: Run, seed: int, n: int, left_out: np.ndarray, source: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw the images to watch by: ids int64 [s], and their classes int64 [s] where these are known."""
    rng = np.random.default_rng(seed)
    known = None if source is None else true_labels.read([run], source)
    if known is not None and known.image_ids is not None:
        ids = known.image_ids
    else:
        # A few more than are wanted, as some come twice; no array of all ids.
        ids = np.arange(n) if n <= 10 * WATCHED else np.unique(rng.integers(0, n, 5 * WATCHED))
    most = WATCHED if known is None else 4 * WATCHED
    ids = np.sort(rng.permutation(np.setdiff1d(ids, left_out))[:most])
    if known is None:
        return ids, None
    classes = known.of(run, ids)
    return ids[classes >= 0], classes[classes >= 0]


@dataclass(frozen=True)
class Contrast:
    """What is learned, and the images int64 [s] by which it is watched, with their classes where known."""

    settings: Pretrain
    watched: np.ndarray
    classes: np.ndarray | None

    def begin(self, job: Job, place: Place) -> _Lesson:
        """Build the networks and the optimizer of a worker."""
        return _Lesson(self, job, place)


class _Lesson:
    """One worker's part of contrastive learning."""

    def __init__(self, course: Contrast, job: Job, place: Place) -> None:
        from selective_ray import classifiers
        from selective_ray.contrastive import Learner, Recipe, projected
        from selective_ray.views import Views

        self.course, self.job, self.place = course, job, place
        settings = course.settings
        network = projected(settings.method, *classifiers.trunk(settings.network, settings.image_size))
        how = {"device": place.device, "precision": settings.precision}
        network, average = classifiers.replicas(network, workers=place.workers, **how)
        self.learner = Learner(
            network, Recipe(**settings.recipe()), Views(**settings.views()), average=average, **how
        )
        self.state, self.load = self.learner.state, self.learner.load
        self.mine = slice(place.rank, None, place.workers)
        self.sums: Any = None
        self.steps, self.replaced, self.told = 0, 0, False

    def step(self, t: int, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Take step t on the images of this worker's slots."""
        import torch

        from selective_ray.contrastive import VIEWS
        from selective_ray.views import DRAWS

        plan = self.job.plan
        draws = [
            batches.draws(plan.seed, t, plan.slots, DRAWS, batches.VIEWS + view)[self.mine]
            for view in range(VIEWS[self.course.settings.method])
        ]
        found = self.learner.step(t, pixels, draws, plan.slots)
        sums = torch.stack([found["instance"].double(), found["group"].double(), found["found"].double()])
        # On a GPU nothing waits for these before a line is due.
        self.sums = sums if self.sums is None else self.sums + sums
        self.steps += 1
        self.replaced += int((plan.step(t)[self.mine] != ids).sum())

    def line(self) -> tuple[dict[str, Any], str]:
        """Add up what all workers saw since the last line."""
        values = self.place.summed(np.array([*self.sums.cpu().numpy(), self.replaced]))
        steps, self.sums, self.replaced, self.steps = self.steps, None, 0, 0
        settings = self.course.settings
        instance, group, found, replaced = values[:4]
        line = {"instance": float(instance / steps)}
        if settings.method == "cld":
            line["group"] = float(group / steps)
        line["loss"] = float((instance + settings.group_weight * group) / steps)
        line["found"] = float(found / (steps * settings.batch))
        line["replaced"] = int(replaced)
        if replaced and not self.told:
            self.told = True
            self.place.say(
                f"{replaced:,.0f} of {steps * settings.batch:,} images cannot be read, and others take their "
                "places; `selective-ray embed` writes which and why to rejected/"
            )
        return line, f"loss {line['loss']:.3f}, {100 * line['found']:.0f} % found"

    def evaluate(self) -> dict[str, Any] | None:
        """Watch the features of some images, the same each time; the first worker does."""
        import torch

        from selective_ray import contrastive
        from selective_ray.views import DRAWS, view

        if self.place.rank:
            return None
        course, job, learner = self.course, self.job, self.learner
        source = job.pixels()
        plain, pairs, kept = [], ([], []), []
        for start in range(0, len(course.watched), 256):
            ids = course.watched[start : start + 256]
            pixels, unread = source.tried(ids)
            whole = np.setdiff1d(np.arange(len(ids)), list(unread))
            kept.append(start + whole)
            images = learner.on_device(pixels[whole])
            plain.append(learner.features(images.float() / 255))
            if start < WATCHED:
                for i, views in enumerate(pairs):
                    draws = batches.draws(job.plan.seed, start, len(ids), DRAWS, batches.VIEWS + 50 + i)[
                        whole
                    ]
                    views.append(learner.features(view(images, draws, learner.how)))
        x = torch.cat(plain)
        some = x[:WATCHED]
        rank = contrastive.effective_rank(some)
        found = {
            "alignment": round(contrastive.alignment(*map(torch.cat, pairs)), 5),
            "uniformity": round(contrastive.uniformity(some), 5),
            "effective_rank": round(rank, 2),
        }
        if course.classes is not None:
            found["neighbors_accuracy"] = round(
                _accuracy(x.cpu().numpy(), course.classes[np.concatenate(kept)]), 5
            )
        if rank < COLLAPSED:
            self.place.say(
                f"the features have collapsed (effective rank {rank:.1f}): they hardly tell images apart any "
                "more; train again, under another --name, with a smaller pretrain.lr or a larger batch"
            )
        return found

    def export(self) -> None:
        """Write the trunk as an encoder."""
        learned.export(self.job.training, self.place.say)


def _accuracy(x: np.ndarray, classes: np.ndarray) -> float:
    """Share of unit rows [n, d] whose nearest others are mostly of their class, int64 [n]."""
    cosines = x @ x.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argpartition(-cosines, min(VOTERS, len(x) - 1) - 1, axis=1)[:, :VOTERS]
    votes = np.zeros((len(x), classes.max() + 1), np.int64)
    np.add.at(votes, (np.arange(len(x))[:, None], classes[near]), 1)
    return float((votes.argmax(axis=1) == classes).mean())


def _summary(
    steps: int, lines: list[dict[str, Any]], made: learned.Learned, seconds: float
) -> dict[str, Any]:
    """What a training came to, by its metrics."""
    summary: dict[str, Any] = {
        "steps": steps,
        "method": made.method,
        "network": made.network,
        "dimension": made.dimension,
        "seconds": round(seconds, 3),
    }
    for key in ("loss", "found", "steps_per_second", "effective_rank", "alignment", "uniformity"):
        if told := [line[key] for line in lines if key in line]:
            summary[key] = told[-1]
    if judged := [line["neighbors_accuracy"] for line in lines if "neighbors_accuracy" in line]:
        summary["neighbors_accuracy"] = judged[-1]
    return summary
