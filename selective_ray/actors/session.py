"""A connection to Ray: the cluster that was named, else a private one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selective_ray.errors import UserError
from selective_ray.memory import peak_memory as peak_memory


class Session:
    """The connection of one command: to `address`, else RAY_ADDRESS, else a private instance on this machine.

    It is made when the first stage needs it, so that a complete run starts nothing. A process that is
    connected already (a test) stays so. everywhere: paths and URIs that the work needs; those of files must
    be there on every machine.
    """

    def __init__(self, address: str | None = None, everywhere: Iterable[str | None] = ()) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.everywhere = [path for path in everywhere if path and "://" not in path]
        self.ours = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            ray.shutdown()

    def start(self) -> None:
        """Connect unless connected; raise UserError where the cluster cannot be reached."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray warns in every worker of a machine without GPUs.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray would try a task that runs out of memory again without end.
        os.environ.setdefault("RAY_task_oom_retries", "3")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if self.address and self.address != "local":
                ray.init(address=self.address, **quiet)
            else:
                # No machine of a private instance is ever taken away.
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = (
                f"at {self.address}; check --address and RAY_ADDRESS" if self.address else "on this machine"
            )
            raise UserError(f"Ray could not be started or reached {where}: {error}") from None
        self.ours = True
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            # Ray has put its own in its place, which ends with a stack trace in place of a sentence.
            signal.signal(signal.SIGTERM, on_sigterm)
        _check_everywhere(self.everywhere)


@ray.remote(num_cpus=0)
def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def _check_everywhere(paths: list[str]) -> None:
    """Raise UserError where a machine of the cluster does not see a path."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2 or not paths:
        return
    here = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    answers = ray.get([_missing.options(scheduling_strategy=node).remote(paths) for node in here])
    for address, missing in zip(nodes.values(), answers, strict=True):
        if missing:
            raise UserError(
                f"machine {address} of the cluster does not see {missing[0]}; with more than one machine, "
                "give paths in object storage (as s3://BUCKET/…), or on a file system that all of them mount"
            )


def cpus() -> int:
    """CPUs of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus() -> float:
    """GPUs of the cluster."""
    return ray.cluster_resources().get("GPU", 0.0)


def here() -> NodeAffinitySchedulingStrategy:
    """Where this process runs: for what no other machine, which comes and goes, may take along."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def dashboard() -> bool:
    """Whether the cluster has a dashboard, which Ray's own helpers ask about actors."""
    return bool(ray._private.worker.get_dashboard_url())


def alive_nodes() -> frozenset[str]:
    """Ids of the nodes that the cluster has."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def in_order_of_arrival(task: Any, calls: Iterable[tuple]) -> Iterator[Any]:
    """Call a remote function with each of many arguments, a few at a time; yields answers as they come."""
    running: list[ray.ObjectRef] = []
    for arguments in calls:
        running.append(task.remote(*arguments))
        if len(running) >= 4 * cpus():
            ready, running = ray.wait(running)
            with unwrapped():
                yield from ray.get(ready)
    while running:
        ready, running = ray.wait(running)
        with unwrapped():
            yield from ray.get(ready)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a UserError of a task or actor as itself."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
