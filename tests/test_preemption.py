"""A spot machine that is taken away with a notice: its node is drained, and the run goes on without it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cluster import metadata_service, notice
from test_pipeline import advance, picks_of, pictures

from selective_ray.actors import pipeline
from selective_ray.store import Run

OPTIONS = {
    "embed.encoder": "pca",
    "embed.image_size": 8,
    "embed.batch": 10,
    "resources.shard_rows": 25,
    "resources.workers": 2,
    "density.k": 5,
    "selection.budget": 6,
}
SECONDS = 10
TAKEN_AWAY = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster
from selective_ray import config
from selective_ray.actors import pipeline
from selective_ray.progress import Reporter
from selective_ray.store import Run

images, run, options, signs = sys.argv[1:]
signs = Path(signs)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
(signs / "there").write_text(json.dumps([cluster.address, nodes[0].node_id]))
seen = []

def take():
    while not (signs / "take").exists():
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        # A node tells that it drains with its next sign of life.
        status = get_cluster_status(cluster.address)
        found = {node.node_id: node.node_status for node in [*status.active_nodes, *status.idle_nodes]}
        seen[:] = [found.get(nodes[0].node_id)]
        if seen[0] in ("DRAINING", None):
            break
        time.sleep(0.1)
    # What the machine's owner does when its time is up.
    cluster.remove_node(nodes[0], allow_graceful=False)

thread = threading.Thread(target=take, daemon=True)
thread.start()
settings, asked = config.load(options=json.loads(options))
pipeline.advance(
    Run(run), pipeline.Source(images=images), settings, asked, Reporter(quiet=True), upto="selection"
)
thread.join(60)
print(json.dumps({"seen": seen, "left": sum(node["Alive"] for node in ray.nodes())}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.faults
def test_a_warned_node_drains_and_the_run_goes_on(two_cpus, tmp_path):
    folder = pictures(tmp_path / "images", 400)
    run, signs = tmp_path / "run", tmp_path / "signs"
    signs.mkdir()
    words = [sys.executable, "-c", TAKEN_AWAY, str(folder), str(run), json.dumps(OPTIONS), str(signs)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    answers = [(404,)]
    with metadata_service(answers) as (endpoint, _):
        driver = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watcher = None
        try:
            address, node = json.loads(_wait(signs / "there", driver))
            watcher = subprocess.Popen(
                [
                    *(sys.executable, "-m", "selective_ray.actors.interruption"),
                    *("--endpoint", endpoint, "--node-id", node),
                ],
                env={**environment, "RAY_ADDRESS": address},
                stdout=subprocess.PIPE,
                text=True,
            )
            while len(list(run.glob("embeddings/part-*.parquet"))) < 2:
                assert driver.poll() is None, driver.stderr.read()
                time.sleep(0.02)
            answers.append(notice(SECONDS))
            said, _ = watcher.communicate(timeout=60)
            assert watcher.returncode == 0 and "EC2 will terminate this machine in" in said
            (signs / "take").write_text("")
            out, err = driver.communicate(timeout=240)
        finally:
            for process in (driver, watcher):
                if process:
                    process.kill()
    assert driver.returncode == 0, err[-3000:]
    # Ray says things on the same stream.
    (told,) = [json.loads(line) for line in out.splitlines() if line.startswith('{"seen"')]
    # Drained when it was taken, or idle enough to have gone by itself.
    assert told["seen"][0] in ("DRAINING", None) and told["left"] == 2, told
    quiet = advance(tmp_path / "quiet", source=pipeline.Source(images=str(folder)), **OPTIONS)
    assert picks_of(Run(str(run))) == picks_of(quiet)


def _wait(file: Path, process: subprocess.Popen) -> str:
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return file.read_text()
