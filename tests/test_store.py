"""Runs on disk: shards whole and once, the manifest last, and never another configuration's leftovers."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import unit
from hypothesis import given
from hypothesis import strategies as st

from selective_ray import store
from selective_ray.actors.brought import bring_file
from selective_ray.config import Config, Resources
from selective_ray.errors import UserError
from selective_ray.progress import Reporter, Watch
from selective_ray.schema import CLUSTERS, REJECTED, embeddings_schema, embeddings_table
from selective_ray.store import BEGUN, MANIFEST, Run, Stopwatch, differences, fingerprint, shard_name

WHAT = {"cluster": {"iterations": 100, "init": "random"}, "seed": 0}
INPUTS = {"embeddings": "0123456789abcdef"}


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"))
    run.prepare()
    return run


def clusters(first: int, n: int) -> pa.Table:
    ids = np.arange(first, first + n)
    return pa.table({"image_id": ids, "cluster_id": ids % 3, "sq_dist": ids / 100}).cast(CLUSTERS)


def finish(run: Run, table: str = "clusters", what: dict = WHAT, inputs: dict = INPUTS) -> store.Manifest:
    """Make a table of two shards, 5 and 3 rows."""
    assert run.begin(table, what, inputs) is None
    shards = [run.write_shard(table, 1, clusters(5, 3)), run.write_shard(table, 0, clusters(0, 5))]
    return run.finish(table, shards, seconds=1.5, peak_memory_bytes={"driver": 1}, summary={"clusters": 3})


def names(run: Run, table: str = "clusters") -> set[str]:
    return {path.name for path in Path(run.path(table)).iterdir()}


def message(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


# Fingerprints


def shuffled(value: dict, backwards: bool = True) -> dict:
    """The same content, its keys the other way round."""
    items = reversed(value.items()) if backwards else value.items()
    return {key: shuffled(inner) if isinstance(inner, dict) else inner for key, inner in items}


NESTED = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.booleans(),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@given(st.dictionaries(st.text(max_size=3), NESTED, max_size=5))
def test_fingerprints_ignore_the_order_of_keys(what):
    assert fingerprint("density", what, INPUTS) == fingerprint("density", shuffled(what), shuffled(INPUTS))


def test_fingerprints_tell_stages_values_and_inputs_apart():
    found = {
        fingerprint("density", {"k": 20}, {}),
        fingerprint("clusters", {"k": 20}, {}),
        fingerprint("density", {"k": 21}, {}),
        fingerprint("density", {"k": "20"}, {}),
        fingerprint("density", {"k": 20}, {"embeddings": "1"}),
        fingerprint("density", {"k": 20}, {"embeddings": "2"}),
    }
    assert len(found) == 6
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)


def test_differences_name_the_nested_keys():
    mine = {"seed": 1, "cluster": {"iterations": 100, "init": "random"}}
    theirs = {"seed": 1, "cluster": {"iterations": 50, "init": "random"}, "inputs": {"embeddings": "a"}}
    assert differences(mine, theirs) == [
        "cluster.iterations is 50 there and 100 here",
        "inputs is {'embeddings': 'a'} there and None here",
    ]
    assert differences(mine, shuffled(mine)) == []


# Files


def test_files_are_whole_and_leave_no_temporaries(run):
    run.write_bytes(b"one", "a", "b.bin")
    run.write_bytes(b"other", "a", "b.bin")
    assert run.read_bytes("a", "b.bin") == b"other" and names(run, "a") == {"b.bin"}
    assert run.exists("a", "b.bin") and not run.exists("a", "c.bin") and not run.exists("a")


WRITER = """
import sys
from selective_ray.store import Run
run = Run(sys.argv[1])
big = bytes(48 << 20)
print("ready", flush=True)
while True:
    run.write_bytes(big, "clusters", "part-00000.parquet")
"""


def test_a_writer_killed_midway_leaves_nothing_under_a_final_name(run):
    """Killed at many moments of its writing: the file is absent or whole, what is left over is a .tmp."""
    left_over = False
    for pause in (0.003, 0.01, 0.02, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, run.uri], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        folder = Path(run.path("clusters"))
        for path in folder.iterdir() if folder.exists() else ():
            if path.name.endswith(".tmp"):
                left_over = True
            else:
                assert path.name == shard_name(0) and path.stat().st_size == 48 << 20
            path.unlink()
    assert left_over


def test_temporaries_are_not_shards(run):
    run.write_shard("clusters", 2, clusters(0, 1))
    for name in ("part-00000.parquet.0a1b2c3d.tmp", "manifest.json.0a1b2c3d.tmp", "centroids.npy"):
        Path(run.path("clusters", name)).write_bytes(b"half")
    assert run.finished_shards("clusters") == [2]
    assert run.manifest("clusters") is None
    assert run.finished_shards("density") == []


# Shards


def test_shards_round_trip_with_their_schema_and_device(run):
    content = clusters(0, 5)
    shard = run.write_shard("clusters", 3, content, device="cuda: NVIDIA H100")
    assert (shard.name, shard.rows, shard.device) == ("part-00003.parquet", 5, "cuda: NVIDIA H100")
    found = run.read_shard("clusters", 3)
    assert found.equals(content) and found.schema.equals(CLUSTERS)
    assert run.read_shard("clusters", 3, ["sq_dist"]).column_names == ["sq_dist"]
    assert names(run) == {"part-00003.parquet"}


def test_an_empty_table_is_one_file_without_rows(run):
    assert run.write_shard("rejected", 0, REJECTED.empty_table()).rows == 0
    found = run.read_shard("rejected", 0)
    assert len(found) == 0 and found.schema.equals(REJECTED)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_round_trip(run, dtype):
    x = unit(np.random.default_rng(0).normal(size=(7, 5)))
    ids = np.arange(7) + 2**40
    schema = embeddings_schema(5, dtype)
    run.write_shard("embeddings", 0, embeddings_table(ids, x, schema))
    assert run.read_shard("embeddings", 0).schema.equals(schema)
    found_ids, found = run.read_embeddings(0)
    assert found_ids.dtype == np.int64 and (found_ids == ids).all()
    assert found.dtype == np.float32 and found.shape == (7, 5)
    assert (found == x.astype(dtype)).all()


def test_the_first_writer_of_a_shard_wins(run):
    first = run.write_shard("clusters", 0, clusters(0, 5))
    data = run.read_bytes("clusters", shard_name(0))
    late = run.write_shard("clusters", 0, clusters(7, 4))
    assert run.read_bytes("clusters", shard_name(0)) == data
    # What goes into the manifest is what is there.
    assert late == first == run.recorded_shard("clusters", 0)


def test_a_recorded_shard_is_what_its_writer_said(run):
    written = run.write_shard("clusters", 4, clusters(0, 9), device="cuda")
    recorded = run.recorded_shard("clusters", 4)
    assert recorded == written
    assert recorded.sha256 == hashlib.sha256(run.read_bytes("clusters", shard_name(4))).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all", None])
def test_a_damaged_shard_is_a_sentence_to_a_reader_and_made_again_by_a_writer(run, damage):
    run.write_shard("clusters", 0, clusters(0, 500))
    path = Path(run.path("clusters", shard_name(0)))
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    said = message(run.read_shard, "clusters", 0)
    assert str(path) in said and "run again" in said
    assert run.recorded_shard("clusters", 0) is None
    assert not path.exists()
    assert run.write_shard("clusters", 0, clusters(0, 500)) == run.recorded_shard("clusters", 0)


def test_a_missing_shard_is_a_sentence(run):
    finish(run)
    Path(run.path("clusters", shard_name(1))).unlink()
    assert shard_name(1) in message(run.read_shard, "clusters", 1)


# Manifests


def test_the_manifest_comes_last_and_says_what_is_there(run):
    assert run.begin("clusters", WHAT, INPUTS) is None
    assert names(run) == {BEGUN} and run.manifest("clusters") is None
    shards = [run.write_shard("clusters", 1, clusters(5, 3)), run.write_shard("clusters", 0, clusters(0, 5))]
    assert run.manifest("clusters") is None
    done = run.finish("clusters", shards, seconds=1.23456, peak_memory_bytes={"driver": 7}, summary={"c": 3})
    assert names(run) == {MANIFEST, shard_name(0), shard_name(1)}
    assert run.manifest("clusters") == done
    assert (done.stage, done.what, done.inputs, done.rows) == ("clusters", WHAT, INPUTS, 8)
    assert done.fingerprint == fingerprint("clusters", WHAT, INPUTS)
    assert [shard.name for shard in done.shards] == [shard_name(0), shard_name(1)]
    assert (done.seconds, done.peak_memory_bytes, done.summary) == (1.235, {"driver": 7}, {"c": 3})
    for shard in done.shards:
        assert hashlib.sha256(run.read_bytes("clusters", shard.name)).hexdigest() == shard.sha256
    written = json.loads(run.read_bytes("clusters", MANIFEST))
    assert written["schema_version"] == store.SCHEMA_VERSION
    assert set(written["code"]) == {"version", "commit"} and written["code"]["version"]


def test_what_only_the_work_could_tell_is_part_of_the_fingerprint(run):
    run.begin("clusters", WHAT, INPUTS)
    done = run.finish("clusters", [], seconds=0, peak_memory_bytes={}, summary={}, found={"content": "abc"})
    assert done.what == {**WHAT, "content": "abc"}
    assert done.fingerprint == fingerprint("clusters", {**WHAT, "content": "abc"}, INPUTS)


def test_the_same_configuration_is_complete(run):
    done = finish(run)
    assert run.begin("clusters", shuffled(WHAT), INPUTS) == done


def test_a_claim_without_shards_is_given_up_for_another(run):
    """As after a budget that turned out too large: what lies there was made for the old claim."""
    run.begin("clusters", WHAT, INPUTS)
    run.write_bytes(b"old", "clusters", "centroids.npy")
    other = {"cluster": {"iterations": 50, "init": "random"}, "seed": 3}
    assert run.begin("clusters", other, INPUTS) is None
    assert not run.exists("clusters", "centroids.npy")
    assert run.finish("clusters", [], seconds=0.0, peak_memory_bytes={}, summary={}).what == other


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_naming_fingerprints_keys_and_remedy(run, finished):
    if finished:
        finish(run)
    else:
        run.begin("clusters", WHAT, INPUTS)
        run.write_shard("clusters", 0, clusters(0, 5))
    before = {path: path.read_bytes() for path in Path(run.uri).rglob("*") if path.is_file()}
    other = {"cluster": {"iterations": 50, "init": "random"}, "seed": 3}
    said = message(run.begin, "clusters", other, {"embeddings": "fedcba9876543210"})
    assert fingerprint("clusters", WHAT, INPUTS) in said
    assert fingerprint("clusters", other, {"embeddings": "fedcba9876543210"}) in said
    assert "cluster.iterations is 100 there and 50 here" in said and "seed is 0 there and 3 here" in said
    assert "inputs.embeddings is 0123456789abcdef there and fedcba9876543210 here" in said
    assert "cluster.init" not in said
    assert "Choose another --run" in said and "--embeddings" not in said
    assert {path: path.read_bytes() for path in Path(run.uri).rglob("*") if path.is_file()} == before


def test_the_remedy_offers_the_embeddings_where_they_are_finished(run):
    finish(run, "embeddings")
    finish(run)
    assert f"--embeddings {run.uri}" in message(run.begin, "clusters", {**WHAT, "seed": 1}, INPUTS)


def test_what_was_begun_is_continued_not_begun_again(run):
    run.begin("clusters", WHAT, INPUTS)
    shard = run.write_shard("clusters", 0, clusters(0, 5))
    assert run.begin("clusters", WHAT, INPUTS) is None
    assert run.finished_shards("clusters") == [0] and run.recorded_shard("clusters", 0) == shard


@pytest.mark.parametrize("name", [MANIFEST, BEGUN])
@pytest.mark.parametrize("damage", [b"", b'{"stage": "clus', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_a_sentence(run, name, damage):
    run.write_bytes(damage, "clusters", name)
    said = message(run.begin, "clusters", WHAT, INPUTS)
    assert run.path("clusters", name) in said and "run again" in said


def test_another_version_of_the_store_is_a_sentence(run):
    finish(run)
    found = run.read_json("clusters", MANIFEST)
    run.write_json({**found, "schema_version": 99}, "clusters", MANIFEST)
    said = message(run.manifest, "clusters")
    assert "99" in said and "--run" in said


# Other runs


def test_a_run_refers_to_a_table_of_another_and_reads_it_there(run, tmp_path):
    done = finish(run)
    second, third = Run(str(tmp_path / "second")), Run(str(tmp_path / "third"))
    assert second.refer("clusters", run).refers_to == run.uri
    assert third.refer("clusters", second).refers_to == run.uri  # the owner, not the one in between
    for other in (second, third):
        found = other.manifest("clusters")
        assert (found.fingerprint, found.shards, found.rows) == (done.fingerprint, done.shards, done.rows)
        assert other.home("clusters").uri == run.uri and other.home("density").uri == other.uri
        assert other.read_shard("clusters", 1).equals(clusters(5, 3))
        assert names(other) == {MANIFEST}
    assert run.home("clusters").uri == run.uri and run.manifest("clusters") == done


def test_a_table_referred_to_that_is_gone_is_a_sentence(run, tmp_path):
    finish(run)
    other = Run(str(tmp_path / "other"))
    other.refer("clusters", run)
    Path(run.uri).rename(tmp_path / "moved")
    assert run.uri in message(other.read_shard, "clusters", 0)


def test_begin_reuses_an_earlier_run_only_for_the_very_same(run, tmp_path):
    done = finish(run)
    same, different = Run(str(tmp_path / "same")), Run(str(tmp_path / "different"))
    assert same.begin("clusters", WHAT, INPUTS, run).refers_to == run.uri
    assert different.begin("clusters", {**WHAT, "seed": 1}, INPUTS, run) is None
    assert names(different) == {BEGUN}
    begun = Run(str(tmp_path / "begun"))
    begun.begin("clusters", WHAT, INPUTS)
    assert begun.begin("clusters", WHAT, INPUTS, run) is None  # its own shards may be there
    assert same.fingerprints("clusters", "density") == {"clusters": done.fingerprint}


# Attempts


def test_a_stopwatch_adds_up_the_attempts(run, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: clock[0])
    run.begin("clusters", WHAT, INPUTS)
    first = Stopwatch(run, "clusters")
    clock[0] += 4
    first.note()  # within five seconds nothing is written
    assert run.read_json("clusters", BEGUN)["seconds"] == 0
    clock[0] += 3
    first.note()
    assert run.read_json("clusters", BEGUN)["seconds"] == 7
    clock[0] += 1  # not noted before the process died
    second = Stopwatch(run, "clusters")
    assert second.seconds() == 7
    clock[0] += 2.5
    assert second.seconds() == 9.5
    second.note()
    clock[0] += 5.5
    second.note()
    assert run.read_json("clusters", BEGUN)["seconds"] == 15
    assert run.begin("clusters", WHAT, INPUTS) is None  # a noted table is still this configuration's
    assert Stopwatch(Run(run.uri), "clusters").seconds() == 15


class CutShort(Reporter):
    """Ctrl-C after some shards."""

    @contextmanager
    def stage(self, *args, **options):
        watch = Watch(None, None)
        calls = iter(range(2))
        watch.advance = lambda units: next(calls)
        try:
            yield watch
        except StopIteration:
            raise KeyboardInterrupt from None


@pytest.mark.parametrize("shard_rows", [3, 2, None])
def test_shards_of_an_attempt_that_was_cut_short_do_not_mix_with_others(run, tmp_path, shard_rows):
    """Shards of two rows are there already when the command comes again with another number of rows."""
    x = unit(np.random.default_rng(0).normal(size=(10, 4)))
    np.save(tmp_path / "x.npy", x)
    source = str(tmp_path / "x.npy")
    with pytest.raises(KeyboardInterrupt):
        bring_file(run, source, Config(resources=Resources(shard_rows=2)), CutShort())
    assert run.finished_shards("embeddings")
    bring_file(run, source, Config(resources=Resources(shard_rows=shard_rows)), Reporter())
    shards = run.manifest("embeddings").shards
    ids, rows = zip(*(run.read_embeddings(i) for i in range(len(shards))), strict=True)
    assert np.concatenate(ids).tolist() == list(range(10))
    assert (np.concatenate(rows) == x).all()
    for table in ("images", "embeddings"):
        for i, shard in enumerate(run.manifest(table).shards):
            assert run.recorded_shard(table, i) == shard


def test_a_death_between_two_manifests_is_resumed(run, tmp_path):
    np.save(tmp_path / "x.npy", np.eye(3))
    source = str(tmp_path / "x.npy")
    bring_file(run, source, Config(), Reporter())
    manifests = {table: run.manifest(table) for table in ("images", "rejected", "embeddings")}
    # The last of the manifests was not written yet.
    what = manifests["embeddings"].what, manifests["embeddings"].inputs
    Path(run.path("embeddings", MANIFEST)).unlink()
    run.begin("embeddings", *what)
    bring_file(run, source, Config(), Reporter())
    assert run.manifest("embeddings").shards == manifests["embeddings"].shards
    assert run.manifest("images") == manifests["images"] and run.manifest("rejected") == manifests["rejected"]


# Places


def test_a_run_travels_by_its_uri(run):
    finish(run)
    there = pickle.loads(pickle.dumps(run))
    assert (there.uri, there.root, there.is_local) == (run.uri, run.root, True)
    assert there.manifest("clusters") == run.manifest("clusters")


def test_a_file_uri_is_the_path(run):
    finish(run)
    by_uri = Run(f"file://{run.uri}/")
    assert by_uri.root == run.root and by_uri.is_local
    assert by_uri.path("clusters", MANIFEST) == run.path("clusters", MANIFEST)
    assert by_uri.manifest("clusters") == run.manifest("clusters")
    by_uri.prepare()
    by_uri.write_shard("density", 0, clusters(0, 2))
    assert run.finished_shards("density") == [0]
    assert pickle.loads(pickle.dumps(by_uri)).root == run.root


def test_a_relative_path_is_anchored_when_it_is_opened(run, monkeypatch):
    monkeypatch.chdir(Path(run.uri).parent)
    relative = Run("run")
    monkeypatch.chdir("/")
    assert relative.uri == run.uri


@pytest.mark.parametrize("uri", ["nowhere://bucket/run", "s4://bucket/run"])
def test_a_place_of_an_unknown_kind_is_a_sentence(uri):
    assert uri in message(Run, uri) and "--run" in message(Run, uri)


def test_prepare_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    run = Run(str(tmp_path / "a" / "b"))
    run.prepare()
    assert list(Path(run.uri).iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("a file of somebody")
    for place in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/nope/run")):
        said = message(Run(str(place)).prepare)
        assert str(place) in said and "choose another --run" in said
    assert (tmp_path / "file").read_text() == "a file of somebody"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    assert "choose another --run" in message(Run(str(tmp_path / "run")).prepare)
