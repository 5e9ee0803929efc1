"""Trainings with Ray Train: workers that share every step, and Ray Data streams that bring its images.

    plan of steps ──► read or decode (tasks) ──► worker 0: slots 0, w, 2 w, …  ──┐
    plan of steps ──► read or decode (tasks) ──► worker 1: slots 1, w + 1, …   ──┴► one step, gradients added

Which images a step sees, and their random numbers, are functions of the seed and the step. So each worker
has a stream of its own over its slots, in order; after a failure the workers begin anew at the step of the
newest checkpoint, as many as there is room for then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray

from selective_ray.actors.placement import gpus_each
from selective_ray.actors.session import alive_nodes, cpus, dashboard, gpus, here
from selective_ray.actors.training_worker import Course, Job, Shape, work
from selective_ray.batches import Plan
from selective_ray.config import Config, Pretrain, Train
from selective_ray.errors import UsageError, UserError, first_line
from selective_ray.progress import Reporter
from selective_ray.store import Run
from selective_ray.training import NAME

# A worker's CPU, as Ray counts it: however many there are, tasks that bring images find room beside them.
WORKER_CPUS = 0.45
# glibc gives every tensor of 32 MB and more back to the system, which clears its pages anew at each step: a
# third of the time of WRN-28-2 on two cores. So a worker on CPUs keeps what it has once had, in one arena.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Failures in a row without a new checkpoint that end a training.
FAILURES = 3


@ray.remote(num_cpus=0)
class Desk:
    """Where workers leave word for the driver."""

    def __init__(self) -> None:
        self.step, self.words = -1, ""
        self.messages: list[str] = []
        self.refused, self.memory = "", 0
        # Ray Data keeps actors for the life of the cluster where it is first used. Where a worker runs, they
        # would hold up its machine ever after.
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.from_items([{"id": 0}]).take_all()

    def note(self, step: int, words: str, memory: int) -> None:
        """Tell how far the workers are."""
        self.step, self.words, self.memory = step, words, max(self.memory, memory)

    def say(self, message: str) -> None:
        """Leave a message for the person."""
        self.messages.append(message)

    def refuse(self, message: str) -> None:
        """Say why the training cannot go on."""
        self.refused = message

    def read(self) -> tuple[int, str, list[str], str, int]:
        """Return step, words, all messages, the refusal, and the largest worker's memory."""
        return self.step, self.words, self.messages, self.refused, self.memory


def check(name: str, config: Config) -> None:
    """Raise UsageError where a training cannot have this name, or its board is not there."""
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r} is no name for a folder; use letters, digits, dots and hyphens")
    if config.resources.wandb and not importlib.util.find_spec("wandb"):
        raise UsageError("resources.wandb needs Weights & Biases; install it with `pip install wandb`")


def until_done(
    run: Run,
    name: str,
    config: Config,
    course: Course,
    plan: Plan,
    *,
    settings: Train | Pretrain,
    until: int,
    reporter: Reporter,
    check: Any,
    forgiving: bool = False,
    shape: Shape | None = None,
) -> int:
    """Train until a step, again after failures; returns the memory of the largest worker, in bytes.

    settings: the section of the configuration that the training is of. check: raises where the run has been
    taken over. forgiving: whether others stand in for images that cannot be read. shape: that of images, else
    squares of settings.image_size. Raises UserError where the training fails again and again.
    """
    workers, room, each = _workers(config, settings.batch, reporter)
    job = Job(
        run=run,
        name=name,
        course=course,
        plan=plan,
        shape=shape or Shape(settings.image_size),
        steps=settings.steps,
        until=until,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        cache_bytes=config.resources.cache * 2**30,
        column=run.manifest("images").what["images"].get("column"),
        threads=max(1, cpus() // min(workers, room)),
        tasks=max(1, cpus() // min(workers, room)),
        board=config.resources.wandb,
        desk=_desk(),
        forgiving=forgiving,
    )
    return _until_done(job, workers, each, reporter, check)


def _desk() -> Any:
    """Start the desk on the driver's machine, so that none of those that come and go takes it along."""
    return Desk.options(scheduling_strategy=here()).remote()


def _workers(config: Config, batch: int, reporter: Reporter) -> tuple[int, int, dict[str, float]]:
    """Return how many workers may share the steps, how many now, and what each takes of the cluster.

    With `autoscale` machines come for as many as were asked for. Else it waits, with a message, for a cluster
    that grows; and begins with fewer where it does not.
    """
    resources = config.resources
    asked = resources.workers
    began, told = time.monotonic(), False
    while True:
        per_gpu = gpus_each(resources) if gpus() or resources.gpus_per_worker else 0.0
        each = {"CPU": WORKER_CPUS} | ({"GPU": per_gpu} if per_gpu else {})
        room = (
            int(gpus() / per_gpu + 1e-6)
            if per_gpu
            else int(ray.cluster_resources().get("CPU", 0) / WORKER_CPUS)
        )
        wanted = asked or (room if per_gpu else len(alive_nodes()))
        wanted = min(wanted, batch)
        if resources.autoscale:
            # Ray Train asks for their machines, and begins with the first.
            return min(asked or max(1, wanted), batch), max(1, room), each
        if 1 <= wanted <= room:
            return wanted, room, each
        if time.monotonic() - began > resources.start_seconds:
            if not room:
                raise UserError(
                    "the cluster has no room for a worker; add machines, or lower resources.gpus_per_worker"
                )
            reporter.warn(
                f"training with {room:,} workers: {wanted:,} were asked for, the cluster has no more (the "
                "others join when it has)"
            )
            return wanted, room, each
        if not told:
            told = True
            reporter.warn(
                f"waiting for {wanted:,} workers: the cluster has room for {room:,} (up to "
                f"{resources.start_seconds:g} s; lower resources.workers, or add machines)"
            )
        time.sleep(1)


def _until_done(job: Job, workers: int, each: dict[str, float], reporter: Reporter, check: Any) -> int:
    """Train, again after failures; returns the memory of the largest worker, in bytes."""
    failures, before = 0, job.training.newest_step()
    if before >= job.until:
        return 0
    with (
        reporter.stage("train", job.until, "steps", before) as watch,
        _watching(job, watch, before, reporter),
    ):
        while True:
            check()
            error = _fit(job, workers, each)
            reached, *_, refused, memory = ray.get(job.desk.read.remote())
            if refused:
                raise UserError(refused)
            if error is None:
                return memory
            now = job.training.newest_step()
            failures = 1 if now > before else failures + 1
            before = max(before, now)
            if failures >= FAILURES:
                raise UserError(
                    f"training failed {FAILURES} times without a new checkpoint between, at step {before:,}: "
                    f"{error}; run the same command again to go on from there"
                )
            reporter.warn(
                f"training was interrupted and goes on from step {before:,}; {max(0, reached - before):,} "
                f"steps are taken again ({error})"
            )


@contextlib.contextmanager
def _watching(job: Job, watch: Any, first: int, reporter: Reporter) -> Iterator[None]:
    """Show what the workers leave on the desk, until the block ends."""
    ended = threading.Event()
    shown, said, spoken = first, 0, ""

    def look() -> None:
        nonlocal shown, said, spoken
        with contextlib.suppress(ray.exceptions.RayError):
            step, words, messages, *_ = ray.get(job.desk.read.remote())
            for message in messages[said:]:
                reporter.warn(message)
            said = len(messages)
            if step > shown:
                watch.advance(step - shown)
                shown = step
            # What says nothing new is no sign of life.
            if words != spoken:
                watch.say(words)
                spoken = words

    def keep_looking() -> None:
        while not ended.wait(0.5):
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _fit(job: Job, workers: int, each: dict[str, float]) -> str | None:
    """Run the workers; returns why they failed, or None."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave Ctrl-C to the command: Ray's handler would end it without a word."""

        def _create_default_callbacks(self) -> list[Any]:
            """Leave out what asks a dashboard that is not there, and holds a training up at its end."""
            made = super()._create_default_callbacks()
            if dashboard():
                return made
            return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=(1, workers) if workers > 1 else 1,
                use_gpu="GPU" in each,
                resources_per_worker=each,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                # Ray would continue an earlier one of the same name.
                name=uuid.uuid4().hex,
                storage_path=folder,
                worker_runtime_env={} if "GPU" in each else {"env_vars": KEEP_MEMORY},
            ),
        )
        try:
            trainer.fit()
            return None
        except ray.train.TrainingFailedError as error:
            return _cause(error)


def _cause(error: BaseException) -> str:
    """The innermost reason of a failure in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), None) or error.__cause__ or error
    return first_line(inner) if str(inner) else type(inner).__name__
