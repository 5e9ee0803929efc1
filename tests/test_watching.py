"""Watching a run: metrics and the dashboard that shows them, structured logs, and a stage that is silent."""

import json
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from test_cli import ask
from test_pipeline import pictures

from selective_ray.actors import pipeline, watching
from selective_ray.config import Resources
from selective_ray.progress import Event, Reporter
from selective_ray.store import Run

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana.json"


def scraped() -> str:
    """What this machine's node offers to Prometheus."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()


def test_gauges_of_a_run_are_offered_to_prometheus(two_cpus):
    gauges = watching.Gauges("s3://bucket/runs/seen")
    gauges(Event("embed", "shard written", {"shards": 3, "rejected": 2, "rows": 20}, shard=7))
    gauges(Event("density", "certified", {"recall": 0.993}))
    gauges(Event("cluster", "iteration", {"objective": 0.25, "iteration": 4}))
    wanted = {"shards": 3.0, "rejected": 2.0, "recall": 0.993, "objective": 0.25}
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        found = dict(
            re.findall(
                r"^ray_selective_ray_(\w+)\{.*s3://bucket/runs/seen.*\} (\S+)$", scraped(), re.MULTILINE
            )
        )
        if found.keys() >= wanted.keys():
            break
        time.sleep(0.5)
    assert {name: float(value) for name, value in found.items()} == wanted


def test_the_rate_is_that_of_the_last_seconds(two_cpus, monkeypatch):
    told = []
    gauges = watching.Gauges("run")
    monkeypatch.setattr(gauges, "set", lambda *what: told.append(what))
    now = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    for seconds, images in ((0, 50), (3, 80), (6, 110), (11, 1110)):
        now[0] = 100.0 + seconds
        gauges(Event("embed", "", {"images": images, "share": images / 2000}))
    rates = [value for _, name, value in told if name == "images_per_second"]
    assert rates == [10.0, 200.0]
    assert [value for _, name, value in told if name == "share"] == [0.025, 0.04, 0.055, 0.555]


def test_the_dashboard_shows_every_gauge_and_no_other():
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = [re.search(rf"ray_{watching.PREFIX}_(\w+)\{{", text)[1] for text in expressions]
    assert sorted(shown) == sorted(watching.GAUGES)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_run_tells_its_stages_shards_and_numbers(two_cpus, tmp_path):
    folder = pictures(tmp_path / "images", 60)
    words = [
        "select",
        "--images",
        str(folder),
        "--run",
        str(tmp_path / "run"),
        "--budget",
        "6",
        "--log",
        "json",
    ]
    words += ["--encoder", "pca"]
    for key in ("embed.image_size=8", "embed.batch=4", "density.k=5", "resources.shard_rows=20"):
        words += ["--set", key]
    answer = ask(*words, "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["selected"] == 6
    lines = [json.loads(line) for line in answer.stderr.splitlines()]
    assert {line["run"] for line in lines} == {str(tmp_path / "run")}
    begun = [line["stage"] for line in lines if line["message"] == "begins"]
    assert begun == ["list", "embed", "density", "cluster", "select"]
    written = [line for line in lines if line["message"] == "shard written"]
    assert {line["shard"] for line in written} == {0, 1, 2}
    assert all(line["stage"] == "embed" and line["rows"] == 20 and line["rejected"] == 0 for line in written)
    objectives = [line["objective"] for line in lines if line["message"] == "iteration"]
    smallest = [line["smallest"] for line in lines if line["message"] == "iteration"]
    assert smallest == Run(str(tmp_path / "run")).manifest("clusters").summary["history"]["smallest"]
    assert objectives == Run(str(tmp_path / "run")).manifest("clusters").summary["history"]["inertia"]
    assert all(line["level"] in ("info", "warning") and line["time"] > 1e9 for line in lines)


def test_a_warning_is_a_line_of_its_stage(capsys):
    reporter = Reporter(structured=True)
    reporter.run = "r"
    with reporter.stage("density", 10, "images", 4):
        reporter.warn("something [odd]")
    reporter.tell("after")
    begins, warned, after = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (begins["images"], begins["of"], begins["stage"]) == (4, 10, "density")
    assert (warned["level"], warned["stage"], warned["message"]) == ("warning", "density", "something [odd]")
    assert after["stage"] is None and reporter.warnings == ["something [odd]"]


def test_a_silent_stage_is_noticed_with_the_reason_of_ray(two_cpus, tmp_path):
    """What it waits for is more than any machine has: as where a kind of machine does not come."""
    import ray

    @ray.remote(num_cpus=3, resources={"GPU_of_another_kind": 1})
    class Large:
        def answer(self):
            return 1

    waiting = Large.remote()
    call = waiting.answer.remote()
    reporter = Reporter(quiet=True)
    resources = Resources(stall_seconds=2.0)
    try:
        with watching.watched(Run(str(tmp_path)), reporter, resources), reporter.stage("embed", 5, "images"):
            deadline = time.monotonic() + 30
            while not any("3 CPU" in said for said in reporter.warnings) and time.monotonic() < deadline:
                time.sleep(0.2)
    finally:
        ray.kill(waiting)
        del call
    said = next(said for said in reporter.warnings if "3 CPU" in said)
    assert said.startswith("embed: nothing has come for ")
    assert "1 times 3 CPU and 1 GPU_of_another_kind waits, and no machine that is there has it" in said
    # Not again and again: the second time after twice as long.
    assert len(reporter.warnings) <= 5


def test_a_stage_that_goes_on_is_not_complained_of(two_cpus, tmp_path):
    reporter = Reporter(quiet=True)
    with watching.watched(Run(str(tmp_path)), reporter, Resources(stall_seconds=1.0)):
        with reporter.stage("embed", 50, "images") as watch:
            for _ in range(20):
                time.sleep(0.1)
                watch.advance(1)
        # Between stages nothing is expected.
        time.sleep(1)
    assert reporter.warnings == [] and reporter.followers == []


def test_a_head_that_is_gone_is_said(two_cpus, monkeypatch):
    def gone(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(watching, "get_cluster_status", gone)
    assert watching.why() == "Ray's head does not answer (no route to host)"


def test_a_wave_that_is_ended_is_told_of(two_cpus, tmp_path):
    from test_faults import poisonous

    from selective_ray import config
    from selective_ray.errors import UserError

    events = []
    folder = pictures(tmp_path / "images", 8)
    settings, asked = config.load(
        options={
            "embed.encoder": "pca",
            "embed.image_size": 8,
            "embed.batch": 4,
            "resources.stall_seconds": 1.0,
            "resources.start_seconds": 3.0,
        }
    )
    reporter = Reporter(quiet=True)
    reporter.followers.append(events.append)
    (tmp_path / "run" / "embeddings").mkdir(parents=True)
    pca = {"mean": np.zeros(192, np.float32), "components": np.eye(192, 4, dtype=np.float32)}
    np.savez(tmp_path / "run" / "embeddings" / "pca.npz", **pca)
    with pytest.raises(UserError, match="made no progress"):
        pipeline.advance(
            Run(str(tmp_path / "run")),
            pipeline.Source(images=str(folder)),
            settings,
            asked,
            reporter,
            upto="embeddings",
            read=poisonous("", "hang"),
        )
    said = [event.what for event in events if "a wave was ended by no image for 3 seconds" in event.what]
    assert len(said) == 3
    assert any("nothing has come" in warning for warning in reporter.warnings)
