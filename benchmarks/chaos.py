"""A whole selection from S3 while processes and machines are killed all the time, beside an undisturbed one.

    python benchmarks/chaos.py 20000 --every 5 --seed 0

s3_server.py serves the images and keeps the runs. Two nodes of one CPU each and a head without work are a Ray
cluster on this machine; the command is a process of its own, which is started again whenever it ends without
being done. Every so many seconds a worker process, drawn by seed, is killed (SIGKILL), every fourth time a
whole node, which another one replaces; twice the command itself. Where processes take longer to start than
the kills are apart, nothing can move: --kills ends them after so many. The picks and embeddings are then
those of the undisturbed run, to the bit, and every image is embedded or rejected, once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "access",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# The command itself is hit once from each of these kills on, and a node with every so many of them.
DRIVER_KILLS = (3, 7)
NODE_EVERY = 4
# Processes of Ray itself; a node ends with its agents, and nodes are killed as that.
NOT_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
# The same command again, at most so often.
ATTEMPTS = 20


@contextmanager
def server(n: int):
    """Serve so many images; yields the endpoint and a function that tells how many were sent so far."""
    words = [sys.executable, str(Path(__file__).with_name("s3_server.py")), "--port", "0", "--keys", str(n)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        endpoint = process.stdout.readline().strip()

        def sent() -> int:
            process.send_signal(signal.SIGUSR1)
            return json.loads(process.stdout.readline()).get("images", 0)

        try:
            yield endpoint, sent
        finally:
            process.kill()


class Machines:
    """A Ray cluster on this machine: a head without work, and nodes of one CPU that can be killed."""

    def __init__(self, nodes: int = 2) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.wanted = nodes
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(nodes)]
        self.session = self.cluster.head_node.get_session_dir_path()

    def workers(self) -> list[tuple[int, str]]:
        """Processes that work for this cluster now, with what they do, in order of their start."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                title = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
                works = title.startswith("ray::") and not title.startswith(NOT_WORK)
                if works and any(self.session in str(fd.readlink()) for fd in (process / "fd").iterdir()):
                    found.append((int(process.name), title))
            except OSError:
                continue
        return sorted(found)

    def replace(self, which: int) -> None:
        """Kill a node without a word, and bring another."""
        node = self.nodes.pop(which % len(self.nodes))
        self.cluster.remove_node(node, allow_graceful=False)
        self.bring()

    def bring(self) -> None:
        """Bring nodes until there are as many as in the beginning, or one does not start in time."""
        try:
            while len(self.nodes) < self.wanted:
                self.nodes.append(self.cluster.add_node(num_cpus=1))
        except Exception as error:  # Ray raises no narrower one where a node does not start in time
            print(f"a node did not start: {error}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        self.cluster.shutdown()


class Killer:
    """Kills something every so many seconds, at most so often; tells what."""

    def __init__(self, machines: Machines, every: float, seed: int, most: float = np.inf) -> None:
        self.machines, self.every, self.most = machines, every, most
        self.rng = np.random.default_rng(seed)
        self.killed: list[str] = []
        self.driver: subprocess.Popen | None = None
        self.given_up = False

    def until(self, done: Future) -> None:
        """Kill until the work is done; in the main thread, as Ray brings nodes in no other."""
        try:
            self._until(done)
        except BaseException:
            self.given_up = True
            if self.driver:
                self.driver.kill()
            raise

    def _until(self, done: Future) -> None:
        while not wait([done], timeout=self.every).done:
            number = len(self.killed) + 1
            drawn = int(self.rng.integers(2**31))
            self.machines.bring()
            workers = self.machines.workers()
            if not workers or number > self.most:
                # Between two attempts, while the first process starts, or after the last kill.
                continue
            # Due until it can be done: between two attempts there is no command.
            due = [*DRIVER_KILLS, np.inf][self.killed.count("the command")]
            if number >= due and self.driver and self.driver.poll() is None:
                self.driver.kill()
                self.killed.append("the command")
            elif number % NODE_EVERY == 0:
                self.machines.replace(drawn)
                self.killed.append("a node")
            else:
                pid, title = workers[drawn % len(workers)]
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.killed.append(title.partition("(")[0])


def command(run: str, budget: int, settings: dict[str, Any], address: str) -> list[str]:
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [
        *(sys.executable, "-m", "selective_ray", "select", "--images", "s3://images", "--run", run),
        *("--budget", str(budget), "--encoder", "pca", "--address", address, "--json", *sets),
    ]


def finish(words: list[str], killer: Killer | None = None) -> list[str]:
    """Run the command until it is done; returns how the attempts before ended."""
    ends: list[str] = []
    for _ in range(ATTEMPTS):
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
            if killer:
                killer.driver = driver
            out, err = driver.communicate()
        if driver.returncode == 0:
            return ends
        if killer is None or killer.given_up:
            raise SystemExit(err)
        ends.append(_ending(driver.returncode, out, err))
        print(f"attempt {len(ends)} ended: {ends[-1]}", file=sys.stderr, flush=True)
    raise SystemExit(f"not done after {ATTEMPTS} attempts: {ends}")


def _ending(status: int, out: str, err: str) -> str:
    """How an attempt ended: by a signal, or with a sentence; whatever else was said last is told as it is."""
    if status < 0:
        return f"signal {-status}"
    try:
        return json.loads(out)["error"]
    except ValueError:
        last = (out + err).strip().splitlines()[-1:]
        return f"status {status} without a sentence: {last}"


def compare(quiet: str, shaken: str) -> dict[str, Any]:
    """Whether two runs have the same embeddings and picks, and whether every image is in the second, once."""
    from selective_ray.store import Run

    runs = Run(quiet), Run(shaken)
    ids, x = ([], []), ([], [])
    for i, run in enumerate(runs):
        for shard in run.manifest("embeddings").shards:
            some, vectors = run.read_embeddings(shard.index)
            ids[i].append(some)
            x[i].append(vectors)
    mine, theirs = np.concatenate(x[1]), np.concatenate(x[0])
    rejected = [
        image_id
        for shard in runs[1].manifest("rejected").shards
        for image_id in runs[1].read_shard("rejected", shard.index)["image_id"].to_pylist()
    ]
    there = np.sort(np.concatenate([*ids[1], np.array(rejected, np.int64)]))
    picks = [run.read_shard("selection", 0).to_pylist() for run in runs]
    return {
        "images": runs[1].manifest("images").rows,
        "no image lost": np.array_equal(there, np.arange(runs[1].manifest("images").rows)),
        "same embeddings": np.array_equal(mine, theirs),
        "same picks": picks[0] == picks[1],
    }


def chaos(n: int, budget: int, kills: tuple[float, int, float], settings: dict[str, Any]) -> dict[str, Any]:
    """Run both, one with kills (seconds between two, seed, most); returns what came of it."""
    os.environ |= {**CREDENTIALS, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONWARNINGS": "ignore"}
    with server(n) as (endpoint, sent):
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        import boto3

        boto3.client("s3").create_bucket(Bucket="runs")
        machines = Machines()
        try:
            words = (settings, machines.cluster.address)
            began = time.monotonic()
            finish(command("s3://runs/quiet", budget, *words))
            quiet, read_quietly = time.monotonic() - began, sent()
            killer = Killer(machines, *kills)
            began = time.monotonic()
            with ThreadPoolExecutor(1) as beside:
                work = beside.submit(finish, command("s3://runs/shaken", budget, *words), killer)
                killer.until(work)
            ends = work.result()
            shaken, read = time.monotonic() - began, sent() - read_quietly
            found = compare("s3://runs/quiet", "s3://runs/shaken")
        finally:
            machines.stop()
    return {
        **found,
        "seconds": {"undisturbed": round(quiet, 1), "disturbed": round(shaken, 1)},
        "images read": {"undisturbed": read_quietly, "disturbed": read},
        "repeated": round((read - read_quietly) / n, 3),
        "kills": len(killer.killed),
        "killed": dict(Counter(killer.killed)),
        "attempts that ended": ends,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=int)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--every", type=float, default=5.0, help="seconds from kill to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=float, default=np.inf, help="kills at most (default: no end)")
    options = parser.parse_args()
    settings = {"embed.image_size": 16, "embed.batch": 64, "resources.shard_rows": 512}
    found = chaos(options.images, options.budget, (options.every, options.seed, options.kills), settings)
    print(json.dumps(found, indent=1))
    if not (found["no image lost"] and found["same embeddings"] and found["same picks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
