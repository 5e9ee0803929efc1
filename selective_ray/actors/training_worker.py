"""A worker of a training: its part of every step, and the images for it.

Which images a step sees, and their random numbers, are functions of the seed and the step. So each worker
has a stream of its own over its slots, in order, which begins at the step of the newest checkpoint. What is
learned is the course of a job: FixMatch (`actors/fixmatch.py`), or features without labels
(`actors/pretraining.py`). This is what all courses share.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import ray

from selective_ray.batches import Plan
from selective_ray.errors import UserError
from selective_ray.memory import peak_memory
from selective_ray.pixels import Pixels
from selective_ray.store import Run
from selective_ray.training import Training

# CPU of a task that brings images.
TASK_CPUS = 0.05
# Pixels that a task brings at a time, and at most so many steps of them.
BLOCK_BYTES, BLOCK_STEPS = 16 << 20, 32
# Blocks of one Ray Data pipeline; then comes the next.
BLOCKS = 1024
# Images that are tried in the place of one that cannot be read.
SUBSTITUTES = 20
# Steps from one line of the metrics to the next.
LINE_STEPS = 50
# Seconds from one word to the driver, of how far the steps are, to the next.
NOTE_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """Where a worker stands among those that share every step; it says what a person should hear."""

    rank: int
    workers: int
    device: str
    say: Callable[[str], None]

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Add up an array over all workers."""
        if self.workers == 1:
            return values
        import torch

        total = torch.from_numpy(values).to(self.device)
        torch.distributed.all_reduce(total)
        return total.cpu().numpy()


class Lesson(Protocol):
    """A worker's part of a course; all workers call the same methods in the same order."""

    def step(self, t: int, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Take step t on the images of this worker's slots."""

    def line(self) -> tuple[dict[str, Any], str]:
        """Return what the steps since the last line saw, on all workers, and the same in a few words."""

    def evaluate(self) -> dict[str, Any] | None:
        """Judge the network; None where there is nothing to judge it by."""

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""

    def export(self) -> None:
        """Write what the training was for; the first worker does, after the last checkpoint."""


class Course(Protocol):
    """What is learned, by which settings and from which images."""

    def begin(self, job: Job, place: Place) -> Lesson:
        """Build the networks of a worker."""


@dataclass(frozen=True)
class Shape:
    """How images become pixels: of the shorter side `crop` is kept, and resized to size."""

    size: int
    crop: float = 1.0
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    run: Run
    name: str
    course: Course
    plan: Plan
    shape: Shape
    # Of the whole training; it may stop before, at `until`.
    steps: int
    until: int
    evaluate_every: int
    checkpoint_every: int
    cache_bytes: float
    column: str | None
    threads: int
    tasks: int
    board: str | None
    desk: Any
    # Whether others stand in for images that cannot be read; else they end the training.
    forgiving: bool = False

    @property
    def training(self) -> Training:
        """Where it is kept."""
        return Training(self.run, self.name)

    def pixels(self) -> Pixels:
        """Return the images of the run, on the disk of this machine."""
        return _pixels(self.run, self.shape, self.cache_bytes, self.column)


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
        import torch

        context = ray.train.get_context()
        self.job, self.rank = job, context.get_world_rank()
        say = (lambda words: job.desk.say.remote(words)) if self.rank == 0 else (lambda words: None)
        device = str(ray.train.torch.get_device())
        self.place = Place(self.rank, context.get_world_size(), device, say)
        if device == "cpu":
            # Those that share a machine share its CPUs.
            torch.set_num_threads(
                max(1, min(job.threads, (os.cpu_count() or 1) // context.get_local_world_size()))
            )
        torch.manual_seed(job.plan.seed)
        self.lesson = job.course.begin(job, self.place)
        self.first, state = job.training.newest(say)
        if state:
            self.lesson.load(state)
        self.lines = job.training.metrics(self.first) if self.rank == 0 else []
        self.written = len(self.lines)
        if self.rank == 0:
            job.training.clean(self.first)
        self.board = _board(job) if job.board and self.rank == 0 else None
        self.steps, self.began = 0, time.monotonic()
        self.words, self.noted = "", 0.0

    def run(self) -> None:
        """Take every step that is left."""
        job = self.job
        self.began = time.monotonic()
        for t, ids, pixels in stream(job, self.first, self.rank, self.place.workers):
            self.lesson.step(t, ids, pixels)
            self.steps += 1
            done = t + 1
            last = done == job.until
            saved = last or done % job.checkpoint_every == 0
            evaluated = done % job.evaluate_every == 0
            # A training that goes on from a checkpoint begins a line there.
            if saved or done % LINE_STEPS == 0:
                self._line(done)
            if self.rank == 0 and (last or time.monotonic() - self.noted > NOTE_SECONDS):
                self.noted = time.monotonic()
                job.desk.note.remote(done, self.words, peak_memory())
            beside = time.monotonic()
            if evaluated or done == job.steps:
                self._evaluate(done)
            if saved and self.rank == 0:
                self._save(done)
                if last:
                    self.lesson.export()
            # What is not a step does not count in their rate.
            self.began += time.monotonic() - beside
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
        self.job.training.save(step, self.lesson.state())

    def _line(self, step: int) -> None:
        """Note what all workers saw since the last line."""
        line, self.words = self.lesson.line()
        steps, seconds = self.steps, time.monotonic() - self.began
        self.steps, self.began = 0, time.monotonic()
        if self.rank == 0:
            rate = round(steps / seconds, 3)
            self.lines.append({"step": step, "steps": steps, **line, "steps_per_second": rate})

    def _evaluate(self, step: int) -> None:
        found = self.lesson.evaluate()
        if found and self.rank == 0:
            self.lines.append({"step": step, **found})


def _board(job: Job) -> Any:
    """Return the run of Weights & Biases that shows this training, the same after every interruption."""
    import wandb

    identity = job.training.fingerprint()
    return wandb.init(project=job.board, id=f"{job.name}-{identity}", name=job.name, resume="allow")


def stream(job: Job, first: int, rank: int, workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the steps from `first` on, in order: t, and what is in the slots of one worker.

    Image ids int64 [s], and pixels uint8 [s, h, w, 3].
    """
    slots = len(range(rank, job.plan.labeled, workers)) + len(range(rank, job.plan.unlabeled, workers))
    per_step = slots * job.shape.size**2 * 3
    steps = max(1, min(BLOCK_STEPS, BLOCK_BYTES // max(1, per_step)))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    source = (job.run, job.shape, job.cache_bytes, job.column)
    how = {"source": source, "plan": job.plan, "part": (rank, workers), "forgiving": job.forgiving}
    for start in range(first, job.until, BLOCKS * steps):
        stop = min(job.until, start + BLOCKS * steps)
        count = -(-(stop - start) // steps)
        bring = functools.partial(_bring, start=start, stop=stop, steps=steps, **how)
        # Not `range`: it reads by tasks of a whole CPU, which a small machine with a worker has not got.
        numbers = ray.data.from_items([{"id": i} for i in range(count)], override_num_blocks=count)
        found = numbers.map_batches(
            bring, batch_size=None, num_cpus=TASK_CPUS, compute=ray.data.TaskPoolStrategy(size=job.tasks)
        )
        for block in found.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            yield from zip(block["step"].tolist(), block["image_id"], block["pixels"], strict=True)


@functools.lru_cache(maxsize=2)
def _pixels(run: Run, shape: Shape, limit: float, column: str | None) -> Pixels:
    return Pixels.of_run(run, limit=limit, column=column, **asdict(shape))


def _bring(
    rows: dict[str, np.ndarray],
    source: tuple[Run, Shape, float, str | None],
    plan: Plan,
    start: int,
    stop: int,
    steps: int,
    part: tuple[int, int],
    forgiving: bool,
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
    if forgiving:
        found = _readable(pixels, plan, wanted, np.arange(plan.slots)[rank::workers], image_ids)
    else:
        found = pixels.get(image_ids.reshape(-1))
    return {
        "step": np.array(wanted),
        "image_id": image_ids,
        "pixels": found.reshape(*image_ids.shape, *found.shape[1:]),
    }


def _readable(
    pixels: Pixels, plan: Plan, steps: list[int], slots: np.ndarray, image_ids: np.ndarray
) -> np.ndarray:
    """Return the images int64 [steps, slots]; in it others take the places of those that cannot be read."""
    flat = image_ids.reshape(-1)
    found, unread = pixels.tried(flat)
    for attempt in range(SUBSTITUTES):
        if not unread:
            return found
        rows = np.array(sorted(unread))
        for row in rows:
            at, slot = divmod(int(row), len(slots))
            flat[row] = plan.instead(steps[at], slots[slot : slot + 1], attempt)[0]
        found[rows], still = pixels.tried(flat[rows])
        unread = {int(rows[row]): reason for row, reason in still.items()}
    raise UserError(
        f"{SUBSTITUTES} images in a row cannot be read, the last as {next(iter(unread.values()))}; look at "
        "what --images names"
    )
