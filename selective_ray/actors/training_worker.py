"""A worker of a training: its part of every step, and the images for it.

Which images a step sees, and their random numbers, are functions of the seed and the step. So each worker
has a stream of its own over its slots, in order, which begins at the step of the newest checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from selective_ray import batches, model
from selective_ray.batches import Plan
from selective_ray.config import Train
from selective_ray.errors import UserError
from selective_ray.held_out import HeldOut
from selective_ray.memory import peak_memory
from selective_ray.pixels import Pixels, folder_of
from selective_ray.store import Run
from selective_ray.training import Training

# CPU of a task that brings images.
TASK_CPUS = 0.05
# Pixels that a task brings at a time, and at most so many steps of them.
BLOCK_BYTES, BLOCK_STEPS = 16 << 20, 32
# Blocks of one Ray Data pipeline; then comes the next.
BLOCKS = 1024
# Steps from one line of the metrics to the next.
LINE_STEPS = 50


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    run: Run
    name: str
    train: Train
    plan: Plan
    classes: tuple[str, ...]
    targets: np.ndarray
    held_out: HeldOut
    truth: np.ndarray | None
    until: int
    cache_bytes: float
    column: str | None
    threads: int
    tasks: int
    board: str | None
    desk: Any

    @property
    def training(self) -> Training:
        """Where it is kept."""
        return Training(self.run, self.name)


def work(told: dict[str, Any]) -> None:
    """Train from the newest checkpoint on: one worker's part of it."""
    job: Job = told["job"]
    try:
        _Worker(job).run()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            ray.get(job.desk.refuse.remote(str(error.cause)))
        raise
    except UserError as error:
        ray.get(job.desk.refuse.remote(str(error)))
        raise


class _Worker:
    """One of the processes that share every step."""

    def __init__(self, job: Job) -> None:
        import copy

        import torch

        from selective_ray import classifiers
        from selective_ray.fixmatch import Learner, Recipe

        context = ray.train.get_context()
        self.job, self.rank, self.workers = job, context.get_world_rank(), context.get_world_size()
        self.device = str(ray.train.torch.get_device())
        if self.device == "cpu":
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.plan.seed)
        network = classifiers.build(job.train.network, len(job.classes))
        if job.train.checkpoint:
            classifiers.begin_from(network, job.train.network, job.train.checkpoint, job.run.access)
        if job.train.precision == "float64":
            network = network.double()
        average = copy.deepcopy(network)
        if self.workers > 1:
            network = classifiers.synchronized(network, self.device)
        self.learner = Learner(
            *(network, Recipe(**job.train.recipe())),
            device=self.device,
            precision=job.train.precision,
            average=average,
        )
        self.say = (lambda words: job.desk.say.remote(words)) if self.rank == 0 else (lambda words: None)
        self.first, state = job.training.newest(self.say)
        if state:
            self.learner.load(state)
        self.lines = job.training.metrics(self.first) if self.rank == 0 else []
        self.written = len(self.lines)
        if self.rank == 0:
            job.training.drop_events(self.first)
        self.board = _board(job) if job.board and self.rank == 0 else None
        self.tally = _Tally(len(job.classes))
        self.began = time.monotonic()

    def run(self) -> None:
        """Take every step that is left."""
        job, every = self.job, self.job.train
        plan = job.plan
        mine = slice(self.rank, None, self.workers)
        known = np.arange(plan.labeled)[mine]
        self.began = time.monotonic()
        from selective_ray.augment import STRONG_DRAWS, WEAK_DRAWS

        for t, ids, pixels in stream(job, self.first, self.rank, self.workers):
            draws = batches.draws(plan.seed, t, plan.slots, WEAK_DRAWS, batches.WEAK)
            hard = batches.draws(plan.seed, t, plan.slots, STRONG_DRAWS, batches.STRONG)
            labeled, unlabeled = np.split(draws, [plan.labeled])
            places = np.searchsorted(plan.labeled_ids, ids[: len(known)])
            found = self.learner.step(
                t,
                pixels[: len(known)],
                job.targets[places],
                pixels[len(known) :],
                (np.concatenate([labeled[mine], unlabeled[mine]]), hard[plan.labeled :][mine]),
                (plan.labeled, plan.unlabeled),
            )
            self.tally.add(found, None if job.truth is None else job.truth[ids[len(known) :]])
            done = t + 1
            last = done == job.until
            saved = last or done % every.checkpoint_every == 0
            # A training that goes on from a checkpoint begins a line there.
            if saved or done % LINE_STEPS == 0:
                self._line(done)
            if done % every.evaluate_every == 0 or done == every.steps:
                self._evaluate(done)
            if saved and self.rank == 0:
                self._save(done)
                if last:
                    model.export(job.training, self.say)
            if saved or done % every.evaluate_every == 0:
                self.began = time.monotonic()

        if self.board:
            self.board.finish()

    def _save(self, step: int) -> None:
        """Write the metrics, and then the checkpoint that they lead up to."""
        new = self.lines[self.written :]
        self.job.training.write_metrics(self.lines, len(new))
        self.written = len(self.lines)
        for line in new if self.board else ():
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            self.board.log(numbers, step=line["step"])
        self.job.training.save(step, self.learner.state())

    def _line(self, step: int) -> None:
        """Add up what all workers saw since the last line."""
        line = self.tally.line(self.workers, self.job, self.device)
        seconds = time.monotonic() - self.began
        self.began = time.monotonic()
        if self.rank == 0:
            line["steps_per_second"] = round(line["steps"] / seconds, 3)
            self.lines.append({"step": step, **line})
            words = f"loss {line['loss']:.3f}, {100 * line['mask_rate']:.0f} % confident"
            self.job.desk.note.remote(step, words, peak_memory())

    def _evaluate(self, step: int) -> None:
        """Judge the averaged network on the images that were held out; workers take turns."""
        held_out = self.job.held_out
        if not len(held_out.labels):
            return
        from selective_ray.fixmatch import Judged, judge

        names = [*self.job.classes, *sorted(set(held_out.labels) - set(self.job.classes))]
        true = np.array([names.index(label) for label in held_out.labels], np.int64)
        size = self.job.train.image_size
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
            mine = np.arange(len(true))[self.rank :: self.workers]
            for start in range(0, len(mine), 256):
                some = mine[start : start + 256]
                found = self.learner.probabilities(pixels.get(some))
                yield np.pad(found, ((0, 0), (0, len(names) - found.shape[1]))), true[some]

        judged = judge(answers(), len(names))
        judged = Judged(
            *(_summed(part, self.workers, self.device) for part in (judged.confusion, judged.confidence))
        )
        if self.rank == 0:
            by_class = {
                name: None if np.isnan(share) else round(float(share), 4)
                for name, share in zip(names, judged.by_class, strict=True)
            }
            self.lines.append(
                {
                    "step": step,
                    "accuracy": round(judged.accuracy, 6),
                    "by_class": by_class,
                    "calibration_error": round(judged.calibration_error, 4),
                    "confusion": judged.confusion.tolist(),
                }
            )


def _board(job: Job) -> Any:
    """Return the run of Weights & Biases that shows this training, the same after every interruption."""
    import wandb

    identity = job.training.fingerprint()
    return wandb.init(project=job.board, id=f"{job.name}-{identity}", name=job.name, resume="allow")


def _summed(values: np.ndarray, workers: int, device: str) -> np.ndarray:
    """Add up an array over all workers."""
    if workers == 1:
        return values
    import torch

    total = torch.from_numpy(values).to(device)
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()


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

    def line(self, workers: int, job: Job, device: str) -> dict[str, Any]:
        """Return the means over all workers' parts, and begin anew."""
        steps = self.steps
        values = np.concatenate([self.sums.cpu().numpy(), [self.known, self.wrong]])
        values = _summed(values, workers, device)
        losses, rest, (known, wrong) = values[:2] / steps, values[2:-2], values[-2:]
        pseudo_labels, confident = np.split(rest, 2)
        line: dict[str, Any] = {
            "steps": steps,
            "supervised": float(losses[0]),
            "unsupervised": float(losses[1]),
            "loss": float(losses[0] + job.train.unlabeled_weight * losses[1]),
            "mask_rate": float(confident.sum() / max(1, pseudo_labels.sum())),
            "confident": dict(zip(job.classes, confident.astype(int).tolist(), strict=True)),
        }
        if job.truth is not None:
            line["impurity"] = float(wrong / known) if known else None
        self.clear()
        return line


def stream(job: Job, first: int, rank: int, workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the steps from `first` on, in order: t, and what is in the slots of one worker.

    Image ids int64 [s], and pixels uint8 [s, h, w, 3].
    """
    slots = len(range(rank, job.plan.labeled, workers)) + len(range(rank, job.plan.unlabeled, workers))
    per_step = slots * job.train.image_size**2 * 3
    steps = max(1, min(BLOCK_STEPS, BLOCK_BYTES // max(1, per_step)))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    source = (job.run, job.train.image_size, job.cache_bytes, job.column)
    for start in range(first, job.until, BLOCKS * steps):
        stop = min(job.until, start + BLOCKS * steps)
        count = -(-(stop - start) // steps)
        bring = functools.partial(
            _bring, source=source, plan=job.plan, start=start, stop=stop, steps=steps, part=(rank, workers)
        )
        # Not `range`: it reads by tasks of a whole CPU, which a small machine with a worker has not got.
        numbers = ray.data.from_items([{"id": i} for i in range(count)], override_num_blocks=count)
        found = numbers.map_batches(
            bring, batch_size=None, num_cpus=TASK_CPUS, compute=ray.data.TaskPoolStrategy(size=job.tasks)
        )
        for block in found.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            yield from zip(block["step"].tolist(), block["image_id"], block["pixels"], strict=True)


@functools.lru_cache(maxsize=2)
def _pixels(run: Run, size: int, limit: float, column: str | None) -> Pixels:
    return Pixels.of_run(run, size=size, limit=limit, column=column)


def _bring(
    rows: dict[str, np.ndarray],
    source: tuple[Run, int, float, str | None],
    plan: Plan,
    start: int,
    stop: int,
    steps: int,
    part: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Bring the images of some blocks of steps: part r of w."""
    rank, workers = part
    pixels = _pixels(*source)
    firsts = [start + row * steps for row in rows["id"].tolist()]
    wanted = [t for first in firsts for t in range(first, min(stop, first + steps))]
    ids = []
    for t in wanted:
        known, rest = np.split(plan.step(t), [plan.labeled])
        ids.append(np.concatenate([known[rank::workers], rest[rank::workers]]))
    image_ids = np.stack(ids)
    found = pixels.get(image_ids.reshape(-1))
    return {
        "step": np.array(wanted),
        "image_id": image_ids,
        "pixels": found.reshape(*image_ids.shape, *found.shape[1:]),
    }
