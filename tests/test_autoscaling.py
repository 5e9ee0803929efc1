"""A real autoscaler, whose machines are processes here: a run asks for them, and lets them go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cluster import BIN, free_port
from test_pipeline import advance, picks_of, pictures

from selective_ray import labeling
from selective_ray.actors import pipeline
from selective_ray.progress import Reporter
from selective_ray.store import Run

# As in the description of a cluster, with machines of one CPU that are processes on this one.
KIND = "selective_ray_test_worker"
EMPTY = (
    *("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands"),
    *("worker_start_ray_commands", "initialization_commands", "cluster_synced_files", "rsync_exclude"),
    "rsync_filter",
)
OPTIONS = {
    "embed.encoder": "pca",
    "embed.image_size": 8,
    "embed.batch": 10,
    "resources.shard_rows": 50,
    "resources.workers": 2,
    "resources.autoscale": True,
    "density.k": 5,
    "selection.budget": 6,
}
DRIVER = """
import json, sys, threading, time
import ray
from selective_ray import config
from selective_ray.actors import pipeline
from selective_ray.actors.fixmatch import train
from selective_ray.progress import Reporter
from selective_ray.store import Run

address, images, run, options = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
reporter, began, timeline, ended = Reporter(quiet=True), time.monotonic(), [], threading.Event()

def look():
    while not ended.wait(0.25):
        count = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        stage = reporter.watch.name if reporter.watch else None
        if not timeline or timeline[-1][1:] != [count, stage]:
            timeline.append([round(time.monotonic() - began, 1), count, stage])

thread = threading.Thread(target=look)
thread.start()
try:
    time.sleep(1)
    settings, asked = config.load(options=json.loads(options))
    if images:
        where = pipeline.Source(images=images)
        pipeline.advance(Run(run), where, settings, asked, reporter, upto="selection")
    else:
        train(Run(run), settings, "fixmatch", reporter)
    done = time.monotonic()
    while timeline[-1][1] and time.monotonic() - done < 90:
        time.sleep(0.5)
finally:
    ended.set()
    thread.join()
print(json.dumps({"timeline": timeline, "warnings": reporter.warnings}))
"""


@pytest.fixture
def growing(tmp_path):
    """The address of a cluster without workers, and an autoscaler that may start two of one CPU each."""
    from ray._private.services import get_node_ip_address
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    described = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": "growing.Machines",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "auth": {"ssh_user": "nobody"},
        # As the provider names it.
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            KIND: {
                "resources": {"CPU": 1, "memory": 4 * 2**30},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in EMPTY},
    }
    file = tmp_path / "growing.json"
    file.write_text(json.dumps(described))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    environment.pop("RAY_ADDRESS", None)
    words = [str(BIN / "ray"), "start", "--head", f"--port={port}", "--num-cpus=0", "--block"]
    words += [f"--autoscaling-config={file}", "--include-dashboard=false", "--disable-usage-stats"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    client = {
        key: value
        for key, value in environment.items()
        if key not in ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
    }
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (said := (tmp_path / "head.log").read_text()):
            assert head.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.5)
        yield address, client, tmp_path / "head.log"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        _end_nodes(address)


def _end_nodes(address: str) -> None:
    """End what the autoscaler started and its end has left: processes that name this cluster's address."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
            if address in words and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def _driven(growing, images: str, run: Path, options: dict) -> list:
    """Work on the cluster that grows, from no machine to none; returns seconds, machines and stage."""
    address, environment, log = growing
    words = [sys.executable, "-c", DRIVER, address, images, str(run), json.dumps(options)]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:] + log.read_text()[-2000:]
    # Ray says things on the same stream.
    (told,) = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith('{"timeline"')]
    timeline = told["timeline"]
    print(json.dumps(timeline))
    assert timeline[0][1] == 0, "it starts at zero workers"
    assert timeline[-1][1] == 0, "idle machines go"
    return timeline


@pytest.mark.faults
def test_machines_come_for_embedding_and_go_after_the_run(growing, tmp_path, two_cpus):
    # So many that the second machine, which takes some ten seconds, comes while they are embedded.
    folder = pictures(tmp_path / "images", 8000)
    timeline = _driven(growing, str(folder), tmp_path / "run", OPTIONS)
    assert max(count for _, count, stage in timeline if stage == "embed") == 2, timeline
    # And nothing of it shows.
    source = pipeline.Source(images=str(folder))
    fixed = {**OPTIONS, "resources.autoscale": False}
    quiet = advance(tmp_path / "quiet", source=source, **fixed)
    assert picks_of(Run(str(tmp_path / "run"))) == picks_of(quiet)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.faults
def test_machines_come_for_a_training(growing, tmp_path, two_cpus):
    """Four workers are asked for, of which a machine has room for two."""
    source = pipeline.Source(images=str(pictures(tmp_path / "images", 60)))
    run = advance(tmp_path / "run", source=source, **{**OPTIONS, "resources.autoscale": False})
    lines = [f"{image},{'ab'[i % 2]}" for i, image in enumerate(pick["image_id"] for pick in picks_of(run))]
    (tmp_path / "labels.csv").write_text("\n".join(["image_id,label", *lines]))
    labeling.bring_labels(run, str(tmp_path / "labels.csv"), replace=False, reporter=Reporter(quiet=True))
    options = {
        "train.network": "wrn-10-1",
        "train.image_size": 8,
        "train.steps": 200,
        "train.batch": 8,
        "train.unlabeled_ratio": 2,
        "train.checkpoint_every": 50,
        "resources.autoscale": True,
        "resources.workers": 4,
    }
    timeline = _driven(growing, "", tmp_path / "run", options)
    assert max(count for _, count, stage in timeline if stage == "train") == 2, timeline
    assert run.manifest("training/fixmatch").summary["steps"] == 200
