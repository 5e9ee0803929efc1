"""A whole selection from S3 while workers, a node and the command are killed: a short benchmarks/chaos.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


def _chaos():
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.faults
def test_a_selection_survives_kills_of_everything():
    # As many kills as take both commands and two nodes: a slow machine is done with them at some time, too,
    # and on a fast one so many images are not embedded before they come.
    words = [*("10000", "--budget", "20"), *("--every", "2.5", "--seed", "1", "--kills", "8")]
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    assert found["images"] == 10_000 and found["no image lost"]
    assert found["same embeddings"] and found["same picks"]
    assert found["killed"]["the command"] == 2 and found["killed"]["a node"] >= 2, found


def test_what_is_lost_or_changed_is_told(tmp_path):
    """The comparison itself: of runs that are the same, and of one that lacks an image."""
    import numpy as np
    import pyarrow as pa

    from selective_ray.schema import REJECTED, embeddings_schema, embeddings_table, selection_schema
    from selective_ray.store import Run

    def made(name, ids, shift=0.0):
        run = Run(str(tmp_path / name))
        run.prepare()
        x = np.eye(4, 3, dtype=np.float32)[: len(ids)] + np.float32(shift)
        contents = {
            "images": pa.table({"image_id": [0, 1, 2, 3]}),
            "embeddings": embeddings_table(np.array(ids), x, embeddings_schema(3, "float32")),
            "rejected": pa.table({"image_id": [3], "uri": ["3.png"], "reason": ["x"]}, REJECTED),
            "selection": selection_schema("mean").empty_table(),
        }
        for table, content in contents.items():
            run.begin(table, {}, {})
            shard = run.write_shard(table, 0, content)
            run.finish(table, [shard], seconds=1, peak_memory_bytes={}, summary={})
        return run.uri

    compare = _chaos().compare
    quiet = made("quiet", [0, 1, 2])
    assert all(compare(quiet, made("same", [0, 1, 2])).values())
    assert not compare(quiet, made("lost", [0, 1]))["no image lost"]
    assert not compare(quiet, made("twice", [0, 1, 1]))["no image lost"]
    assert not compare(quiet, made("other", [0, 1, 2], 0.5))["same embeddings"]
