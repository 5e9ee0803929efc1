"""Whether a cluster is fit for a run: every machine is looked at, and what they say is laid side by side."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selective_ray import objects
from selective_ray.errors import UserError
from selective_ray.objects import Access, Request

PACKAGES = ("selective_ray", "ray", "torch", "torchvision", "faiss-gpu", "pyarrow", "numpy", "obstore")
# Ray's raylet holds a socket for each worker, each of which holds files: below this they run out.
OPEN_FILES = 65_535
# A lease that is not renewed for a minute is taken over: clocks must agree far better than that.
CLOCK_SECONDS = 5.0
# The object store maps /dev/shm; where that is smaller, Ray falls back to the disk, many times slower.
SHM_SHARE = 0.9
PATIENCE_SECONDS = 90


@dataclass(frozen=True)
class Line:
    """One thing that was checked: fit, not fit, or not there to be checked (None), and what was seen."""

    what: str
    fit: bool | None
    seen: str


def check(prefix: str | None, access: Access, say: Callable[[str], None]) -> Iterator[Line]:
    """Look at every machine of the cluster that is connected; yields a line for each thing.

    prefix: where runs are to be written, None: not checked. Machines without CPUs run no work, and are not
    asked for more than their versions.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    working = [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
    names = _names(nodes)
    say(f"looking at {len(nodes)} machines")
    looks = _everywhere(_look, nodes)
    yield _versions(looks, names)
    yield _silent(looks, names)
    there = {node: look for node, look in looks.items() if look}
    yield _limits("open files", there, names, "open_files", OPEN_FILES, "raise it with `ulimit -n`")
    yield _shared_memory(there, nodes, names)
    yield _clocks(there, names)
    yield _token(there, names)
    if not working:
        yield Line("results", None, "no machine runs work now; those that come are not looked at")
        return
    say("computing the same on every machine")
    yield _results(_everywhere(_compute, working), names)
    with_gpu = [node for node in working if node["Resources"].get("GPU", 0) >= 1]
    if with_gpu:
        say("comparing GPUs with CPUs")
        found = _everywhere(_on_gpu, with_gpu, num_gpus=1)
        yield _all_agree("GPU results", found, names)
        yield _all_agree("FAISS on GPUs", _everywhere(_faiss_on_gpu, with_gpu, num_gpus=1), names)
    else:
        yield Line("GPU results", None, "no machine has a GPU")
    yield _together(working, with_gpu, names)
    if prefix:
        say("writing and reading the bucket from every machine")
        answers = _everywhere(_bucket, working, arguments=(prefix, access))
        yield _all_agree(f"read, write, conditional put at {prefix}", answers, names)
    else:
        yield Line("bucket", None, "give --run to check where runs are written")


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Name nodes by their addresses, and where several share one, by their ids as well."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for node, address in zip(nodes, addresses, strict=True)
    }


def _everywhere(
    task: Any, nodes: list[dict[str, Any]], *, num_gpus: float = 0, arguments: tuple = ()
) -> dict[str, Any]:
    """Run a task on each node; its answer, an error in words, or None where none came in time."""
    calls = {
        node["NodeID"]: task.options(
            num_gpus=num_gpus, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in nodes
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=PATIENCE_SECONDS)
    answers: dict[str, Any] = {}
    for node, call in calls.items():
        try:
            answers[node] = ray.get(call, timeout=0)
        except ray.exceptions.GetTimeoutError:
            answers[node] = None
            ray.cancel(call, force=True)
        except Exception as error:
            answers[node] = f"failed: {str(error).strip().splitlines()[-1][:300]}"
    return answers


# What machines are asked


@ray.remote(num_cpus=0, max_retries=0)
def _look() -> dict[str, Any]:
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": shm,
        "time": time.time(),
        "token": os.environ.get("RAY_AUTH_MODE", "") == "token",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _examples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4_000, 64)) + 2 * rng.normal(size=(40, 64))[rng.integers(0, 40, 4_000)]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x, x[:100].copy()


@ray.remote(num_cpus=0, max_retries=0)
def _compute() -> str:
    """Digest of what the kernels find: the same on all machines, whatever their products round."""
    from selective_ray.assignment import Assignment
    from selective_ray.neighbors import neighbors

    x, centroids = _examples()
    assignment = Assignment(x)
    assignment.assign(centroids)
    found = neighbors(x[:500], [(np.arange(len(x)), x)], 20)
    parts = assignment.labels, found.image_ids, found.sq_dists
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:12]


@ray.remote(num_cpus=0, max_retries=0)
def _on_gpu() -> str:
    """Compare a network, K-Means and a join on the GPU with the CPU: "ok", or what differs."""
    import torch

    from selective_ray.assignment import Assignment
    from selective_ray.assignment_torch import AssignmentOnDevice
    from selective_ray.neighbors import Nearest
    from selective_ray.neighbors_torch import NearestOnDevice

    if not torch.cuda.is_available():
        return "Ray counts a GPU, and torch sees none"
    x, centroids = _examples()
    both = Assignment(x), AssignmentOnDevice(x, "cuda")
    for one in both:
        one.assign(centroids)
    if not np.array_equal(both[0].labels, both[1].labels):
        return "K-Means assigns other labels on the GPU"
    joins = Nearest(x[:500], 20), NearestOnDevice(x[:500], 20, device="cuda")
    for one in joins:
        one.offer(np.arange(len(x)), x)
    if not np.array_equal(*(one.found().image_ids for one in joins)):
        return "the join finds other neighbors on the GPU"
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    images = torch.rand(4, 3, 64, 64)
    with torch.inference_mode():
        here, there = network(images), network.cuda()(images.cuda()).cpu()
    if not torch.allclose(here, there, rtol=1e-2, atol=1e-2):
        return "a network computes other features on the GPU"
    return "ok"


@ray.remote(num_cpus=0, max_retries=0)
def _faiss_on_gpu() -> str:
    """Build and search an index on the GPU, in a process of its own: FAISS and torch bring different CUDA."""
    code = (
        "import faiss, numpy as np; x = np.random.default_rng(0).random((2000, 32), np.float32); "
        "index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(32)); "
        "index.add(x); assert (index.search(x[:50], 1)[1][:, 0] == np.arange(50)).all()"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return "ok" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended"])[-1][:200]


@ray.remote(num_cpus=0, max_retries=0)
def _bucket(prefix: str, access: Access) -> str:
    """Write, read, and write again on condition that there is nothing. "ok", or what went wrong."""
    uri = f"{prefix.rstrip('/')}/.check-{secrets.token_hex(6)}"
    try:
        objects.write(uri, b"first", access)
        objects.write(uri, b"second", access, replace=False)
        found = objects.read(Request(uri), access)
        objects.delete(uri, access)
    except (OSError, UserError) as error:
        return str(error)
    if objects.is_local(uri):
        return "ok" if found else "nothing was written"
    return (
        "ok" if found == b"first" else "a conditional put overwrites: two writers of a run are not kept apart"
    )


@ray.remote(num_cpus=0)
class _Member:
    """One of two processes that add up a number by torch's collectives, as training does."""

    def address(self) -> tuple[str, int]:
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def add(self, rank: int, where: tuple[str, int], backend: str) -> str:
        import datetime

        import torch
        from torch import distributed

        patience = datetime.timedelta(seconds=PATIENCE_SECONDS / 2)
        method = f"tcp://{where[0]}:{where[1]}"
        distributed.init_process_group(backend, init_method=method, rank=rank, world_size=2, timeout=patience)
        total = torch.ones(1, device="cuda" if backend == "nccl" else "cpu") * (rank + 1)
        distributed.all_reduce(total)
        distributed.destroy_process_group()
        return "ok" if total.item() == 3 else f"1 and 2 made {total.item()}"


# What their answers mean


def _listed(names: dict[str, str], wrong: dict[str, Any]) -> str:
    shown = [f"{names[node]}: {seen}" for node, seen in wrong.items()]
    return "; ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _versions(looks: dict[str, Any], names: dict[str, str]) -> Line:
    here = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    wrong = {
        node: ", ".join(f"{k} {v} ({here[k]} here)" for k, v in look["versions"].items() if v != here[k])
        for node, look in looks.items()
        if isinstance(look, dict) and look["versions"] != here
    }
    same = f"python {here['python']}, ray {here['ray']}, torch {here['torch']}, faiss {here['faiss-gpu']}"
    return Line("versions", not wrong, _listed(names, wrong) or f"{same} on all {len(looks)} machines")


def _silent(looks: dict[str, Any], names: dict[str, str]) -> Line:
    wrong = {
        node: look or f"no answer in {PATIENCE_SECONDS} s"
        for node, look in looks.items()
        if not isinstance(look, dict)
    }
    for node in wrong:
        looks[node] = None
    return Line("machines", not wrong, _listed(names, wrong) or f"all {len(looks)} answer")


def _limits(what: str, looks: dict, names: dict[str, str], key: str, least: int, remedy: str) -> Line:
    wrong = {node: f"{look[key]:,}" for node, look in looks.items() if look[key] < least}
    if wrong:
        return Line(what, False, f"{_listed(names, wrong)}; {least:,} are needed, {remedy}")
    return Line(what, True, f"{min(look[key] for look in looks.values()):,} or more")


def _shared_memory(looks: dict, nodes: list[dict[str, Any]], names: dict[str, str]) -> Line:
    stores = {node["NodeID"]: node["Resources"].get("object_store_memory", 0) for node in nodes}
    wrong = {
        node: f"{look['shm'] / 1e9:.1f} GB for an object store of {stores[node] / 1e9:.1f} GB"
        for node, look in looks.items()
        if look["shm"] < SHM_SHARE * stores[node]
    }
    if wrong:
        return Line("/dev/shm", False, f"{_listed(names, wrong)}; give a container --shm-size")
    return Line("/dev/shm", True, f"{min(look['shm'] for look in looks.values()) / 1e9:.1f} GB or more")


def _clocks(looks: dict, names: dict[str, str]) -> Line:
    now = time.time()
    # They were asked within PATIENCE_SECONDS: those that agree with each other are right, not those with us.
    told = np.array([look["time"] for look in looks.values()])
    ahead = {node: look["time"] - float(np.median(told)) for node, look in looks.items()}
    wrong = {
        node: f"{seconds:+.1f} s"
        for node, seconds in ahead.items()
        if abs(seconds) > CLOCK_SECONDS and abs(looks[node]["time"] - now) > CLOCK_SECONDS
    }
    return Line("clocks", not wrong, _listed(names, wrong) or f"within {CLOCK_SECONDS:.0f} s of each other")


def _token(looks: dict, names: dict[str, str]) -> Line:
    wrong = {node: "RAY_AUTH_MODE is not token" for node, look in looks.items() if not look["token"]}
    if len(wrong) == len(looks) == 1:
        return Line(
            "token", None, "one machine without RAY_AUTH_MODE=token; needed where others can reach it"
        )
    return Line("token", not wrong, _listed(names, wrong) or "required on every machine")


def _results(answers: dict[str, Any], names: dict[str, str]) -> Line:
    said = {answer for answer in answers.values() if answer}
    if len(said) == 1 and None not in answers.values() and not said.pop().startswith("failed"):
        return Line("results", True, f"K-Means and neighbors to the same bit on {len(answers)} machines")
    wrong = {node: answer or "no answer" for node, answer in answers.items()}
    return Line("results", False, f"they differ: {_listed(names, wrong)}")


def _all_agree(what: str, answers: dict[str, Any], names: dict[str, str]) -> Line:
    wrong = {
        node: answer or f"no answer in {PATIENCE_SECONDS} s"
        for node, answer in answers.items()
        if answer != "ok"
    }
    return Line(what, not wrong, _listed(names, wrong) or f"fine from {len(answers)} machines")


def _together(working: list[dict[str, Any]], with_gpu: list[dict[str, Any]], names: dict[str, str]) -> Line:
    """Add two numbers across two machines, as gradients are; by NCCL where two machines have GPUs."""
    backend = "nccl" if len(with_gpu) > 1 else "gloo"
    pair = (with_gpu if backend == "nccl" else working)[:2]
    if len(pair) < 2:
        return Line("NCCL or gloo between machines", None, "only one machine runs work now")
    members = [
        _Member.options(
            num_gpus=1 if backend == "nccl" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for node in pair
    ]
    what = f"{backend} between machines"
    try:
        where = ray.get(members[0].address.remote(), timeout=PATIENCE_SECONDS)
        calls = [member.add.remote(rank, where, backend) for rank, member in enumerate(members)]
        said = ray.get(calls, timeout=PATIENCE_SECONDS)
    except Exception as error:
        said = [str(error).strip().splitlines()[-1][:300]]
    finally:
        for member in members:
            ray.kill(member)
    wrong = [answer for answer in said if answer != "ok"]
    between = " and ".join(names[node["NodeID"]] for node in pair)
    return Line(what, not wrong, wrong[0] if wrong else f"adds up between {between}")
