"""Who else watches a run: gauges for Ray's metrics, and someone who notices that nothing comes any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.metrics import Gauge

from selective_ray.config import Resources
from selective_ray.errors import first_line
from selective_ray.progress import Event, Reporter
from selective_ray.store import Run

# What is told of, each with the tags `run` and `stage`; docs/grafana.json shows them.
GAUGES = {
    "images_per_second": "Images a second, over the last seconds",
    "share": "Share of the stage that is done",
    "shards": "Shards of the stage that are written",
    "rejected": "Images that were rejected",
    "recall": "Share of the true neighbors that the density stage finds, by a sample",
    "objective": "Mean squared distance of the images to their centroids, in the last iteration",
    "silent_seconds": "Seconds since something was last heard of the stage",
}
PREFIX = "selective_ray"
# Images a second are those of so many seconds.
RATE_SECONDS = 5.0
# How often it is looked whether anything comes, and the silence that is said first, unless less is allowed.
LOOK_SECONDS = 1.0
SILENCE_SECONDS = 60.0


class Gauges:
    """Follows a run and keeps Ray's gauges of it."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.gauges: dict[str, Gauge] = {}
        self.counted: dict[str, tuple[float, float]] = {}

    def __call__(self, event: Event) -> None:
        """Take what an event tells."""
        numbers = dict(event.numbers)
        if "images" in numbers:
            now, done = time.monotonic(), numbers["images"]
            then, before = self.counted.setdefault(event.stage, (now, done))
            if now - then >= RATE_SECONDS:
                self.counted[event.stage] = now, done
                numbers["images_per_second"] = max(0.0, done - before) / (now - then)
        for name in GAUGES.keys() & numbers.keys():
            self.set(event.stage, name, numbers[name])

    def set(self, stage: str, name: str, value: float) -> None:
        """Set a gauge of a stage; nothing while there is no Ray."""
        if not ray.is_initialized():
            return
        if name not in self.gauges:
            self.gauges[name] = Gauge(f"{PREFIX}_{name}", GAUGES[name], tag_keys=("run", "stage"))
        self.gauges[name].set(value, {**self.tags, "stage": stage})


@contextmanager
def watched(run: Run, reporter: Reporter, resources: Resources) -> Iterator[None]:
    """Follow a run by gauges, and warn where a stage is silent, with the reason that Ray gives.

    First after a minute, or half of `stall_seconds` where that is less; then after twice as long each time.
    """
    gauges = Gauges(run.uri)
    reporter.followers.append(gauges)
    ended = threading.Event()
    patience = min(SILENCE_SECONDS, resources.stall_seconds / 2)
    listener = threading.Thread(target=_listen, args=(reporter, gauges, ended, patience), daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        listener.join()
        reporter.followers.remove(gauges)


def _listen(reporter: Reporter, gauges: Gauges, ended: threading.Event, patience: float) -> None:
    heard, told = 0.0, patience
    while not ended.wait(min(LOOK_SECONDS, patience)):
        watch = reporter.watch
        if watch is None or not ray.is_initialized():
            continue
        if watch.heard != heard:
            heard, told = watch.heard, patience
        silent = time.monotonic() - heard
        gauges.set(watch.name, "silent_seconds", silent)
        if silent > told:
            told = 2 * silent
            reporter.warn(f"{watch.name}: nothing has come for {silent:.0f} s; {why()}")


def why() -> str:
    """Say in words what Ray knows of why nothing comes: what waits for machines, and how these are coming."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    except Exception as error:  # whatever Ray's own client raises while its head is gone
        return f"Ray's head does not answer ({first_line(error)})"
    nodes = [*status.active_nodes, *status.idle_nodes]
    totals = [node.total_resources() for node in nodes]
    demands = status.resource_demands
    parts = []
    waiting = (*demands.ray_task_actor_demand, *demands.placement_group_demand)
    # What Ray Train will begin with once there are machines for it.
    wished = demands.cluster_constraint_demand
    for demand in (*waiting, *wished):
        for asked in demand.bundles_by_count:
            bundle = {name: amount for name, amount in asked.bundle.items() if amount}
            possible = any(
                all(total.get(name, 0) >= amount for name, amount in bundle.items()) for total in totals
            )
            if not possible:
                parts.append(
                    f"{asked.count} times {_words(bundle)} waits, and no machine that is there has it"
                )
            elif demand in waiting:
                parts.append(f"{asked.count} times {_words(bundle)} waits, and what has it is in use")
    if not parts:
        parts.append("all that was asked for has its place, and works or waits for a store")
    for launch in status.pending_launches:
        parts.append(f"{launch.count} machines of {launch.ray_node_type_name} are asked for")
    for kind in sorted({node.ray_node_type_name for node in status.pending_nodes}):
        count = sum(node.ray_node_type_name == kind for node in status.pending_nodes)
        parts.append(f"{count} machines of {kind} are starting")
    for launch in status.failed_launches[-1:]:
        parts.append(f"machines of {launch.ray_node_type_name} do not start: {launch.details}")
    if status.failed_nodes:
        parts.append(f"{len(status.failed_nodes)} machines were lost")
    return "; ".join(parts)


def _words(bundle: dict[str, float]) -> str:
    words = [
        f"{amount / 1e9:.1f} GB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in sorted(bundle.items())
        if not name.startswith(("node:", "bundle", "implicit"))
    ]
    return " and ".join(words) or "something"
