"""How far a run is: of folders as stages leave them while they work."""

import json
import re
import time

import pyarrow as pa
import pytest
from test_cli import ask

from selective_ray import run_status
from selective_ray.lease import Lease
from selective_ray.schema import IMAGES
from selective_ray.store import Run


@pytest.fixture
def run(tmp_path):
    """1,000 images in shards of 256, listed; embedding is under way."""
    where = Run(str(tmp_path / "run"))
    where.prepare()
    where.begin("images", {"images": {}}, {})
    shards = []
    for index, first in enumerate(range(0, 1000, 256)):
        ids = range(first, min(first + 256, 1000))
        rows = [{name: None for name in IMAGES.names} | {"image_id": i, "uri": f"{i:04d}.png"} for i in ids]
        rows = [{**row, "version": ""} for row in rows]
        shards.append(where.write_shard("images", index, pa.Table.from_pylist(rows, IMAGES)))
    where.finish("images", shards, seconds=1.0, peak_memory_bytes={"driver": 1}, summary={})
    where.begin("embeddings", {"embed": {}}, where.fingerprints("images"))
    begun = where.read_json("embeddings", "begun.json")
    where.write_json({**begun, "seconds": 64.0}, "embeddings", "begun.json")
    for index in range(2):
        where.write_bytes(b"x", "embeddings", f"part-{index:05d}.parquet")
    return where


def test_a_stage_under_way(run):
    states = run_status.states(run)
    assert states["images"]["state"] == "complete" and states["images"]["rows"] == 1000
    assert states["embeddings"] == {
        "state": "begun",
        "shards": 2,
        "seconds": 64.0,
        "share": 0.512,
        "rows_per_second": 8.0,
        "seconds_left": 61,
    }
    assert states["selection"] == {"state": "not begun"}
    assert "labels" not in states and "predictions" not in states
    (line,) = (line for line in ask("status", "--run", run.uri).stdout.splitlines() if "embeddings" in line)
    assert re.fullmatch(
        r"embeddings +begun +shards 2, seconds 64\.0, 51\.2% done, 8\.0 rows/s, 1 min left", line
    )


def test_iterations_and_groups(run):
    run.begin("density", {"density": {}}, {})
    run.begin("clusters", {"cluster": {}}, {})
    for name in ("group-0-00000", "group-0-00007", "lists-0-00003", "quantizer.bin"):
        run.write_bytes(b"x", "density", "work", name)
    for number in (11, 12):
        run.write_bytes(b"x", "clusters", "work", f"iteration-{number:06d}.npz")
    states = run_status.states(run)
    assert states["density"]["groups"] == 2 and states["clusters"]["iterations"] == 12


def test_who_is_at_work(run):
    assert run_status.sign_of_life(run) is None
    with Lease(run):
        alive = run_status.sign_of_life(run)
        assert alive["seconds_ago"] < 30
        assert "sign of life" in ask("status", "--run", run.uri).stdout
        assert json.loads(ask("status", "--run", run.uri, "--json").stdout)["at_work"]["pid"] == alive["pid"]
    run.write_json({"host": "gone", "pid": 7, "heartbeat": time.time() - 100}, "lease.json")
    assert "most likely ended" in ask("status", "--run", run.uri).stdout
    run.write_bytes(b"{", "lease.json")
    assert run_status.sign_of_life(run) is None
