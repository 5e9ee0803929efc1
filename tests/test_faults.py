"""Faults: processes of every kind are killed in every stage, and the picks stay those of a quiet run.

`make test` kills the driver once in every stage; `make faults` does the rest.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import unit
from test_pipeline import advance, picks_of, pictures

from selective_ray import in_memory
from selective_ray.actors import pipeline
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.store import Run

N, BUDGET = 24_000, 600
# No tolerance and many rounds, so that every stage lasts a second or more.
SETTINGS = {
    "density.k": 10,
    "cluster.tolerance": 0.0,
    "cluster.iterations": 40,
    "selection.rounds": 12,
    "seed": 2,
}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(50, 32))
    file = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(file, unit(centers[rng.integers(0, 50, N)] + 0.6 * rng.normal(size=(N, 32))))
    return file


@pytest.fixture(scope="module")
def expected_of_vectors(vectors):
    return in_memory.select(np.load(vectors), BUDGET, settings=SETTINGS).rows.tolist()


def command(source: list[str], run: Path, settings: dict, budget: int) -> list[str]:
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [
        *(sys.executable, "-m", "selective_ray", "select", *source),
        *("--run", str(run), "--budget", str(budget), "--debug", *sets),
    ]


@pytest.mark.faults
def test_shard_holder_killed_among_swaps(two_cpus, vectors, tmp_path):
    how = {**SETTINGS, "selection.budget": BUDGET, "selection.method": "prototypes"}
    quiet = advance(tmp_path / "quiet", source=pipeline.Source(embeddings=str(vectors)), **how)
    run = tmp_path / "run"
    with killer("ray::ShardHolder", lambda: under_way(run, "selection", 0)) as killed:
        done = advance(run, source=pipeline.Source(embeddings=str(vectors)), **how)
    assert len(killed) == 1
    assert picks_of(done) == picks_of(quiet)


def under_way(run: Path, table: str, shards: int) -> bool:
    """Whether a table was begun, has some shards, and is not finished."""
    folder = run / table
    # Densities are finished group by group, clusters iteration by iteration; they become shards at the end.
    finished = {"density": "work/group-*", "clusters": "work/iteration-*"}.get(table, "part-*.parquet")
    return (
        (folder / "begun.json").exists()
        and len(list(folder.glob(finished))) >= shards
        and not (folder / "manifest.json").exists()
    )


def holding_rounds(done: list[float], until) -> Reporter:
    """A reporter that notes the rounds that are done, and holds the fourth until something has happened."""
    reporter = Reporter(quiet=True)

    def follow(event):
        if event.what == "rounds so far":
            done.append(event.numbers["done"])
            deadline = time.monotonic() + 60
            while len(done) == 3 and not until() and time.monotonic() < deadline:
                time.sleep(0.01)

    reporter.followers.append(follow)
    return reporter


def kill_driver_after_rounds(words: list[str], run: Path, rounds: int) -> None:
    """Start the command, and kill it when it has told of so many rounds of the selection."""
    words = [*words, "--log", "json"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        told = [line for line in iter(driver.stderr.readline, "") if _kill_at(driver, line, rounds)]
    assert told, "the rounds were never told of"
    assert not (run / "selection" / "manifest.json").exists(), "the selection was finished before the kill"


def _kill_at(driver: subprocess.Popen, line: str, rounds: int) -> bool:
    there = line.startswith("{") and json.loads(line)
    if there and there["message"] == "rounds so far" and there["done"] == rounds:
        driver.kill()
        return True
    return False


def kill_driver_in(
    words: list[str], run: Path, table: str, shards: int, number: int = signal.SIGKILL
) -> None:
    """Start the command, and kill it while it makes a table and has written some of its shards."""
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 180
        while not under_way(run, table, shards):
            assert driver.poll() is None, driver.stderr.read()
            assert time.monotonic() < deadline, f"{table} was never seen under way"
            time.sleep(0.002)
        driver.send_signal(number)
        driver.wait(60)
    finally:
        driver.kill()
        driver.stderr.close()
    assert not (run / table / "manifest.json").exists(), f"{table} was finished before the kill"


def finish(words: list[str]) -> str:
    answer = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_driver_killed_in_density_clusters_and_selection(vectors, expected_of_vectors, tmp_path):
    """Each time the same command continues at once, from what was finished."""
    run = tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, SETTINGS, BUDGET)
    kill_driver_in(words, run, "density", 1)
    measured = {path: path.stat().st_mtime_ns for path in (run / "density").glob("work/group-*")}
    kill_driver_in(words, run, "density", len(measured) + 1)
    for path, written in measured.items():
        assert path.stat().st_mtime_ns == written, "a finished group was redone"
    kill_driver_in(words, run, "clusters", 2)
    assert not (run / "density" / "work").exists()
    assert len(list((run / "clusters" / "work").glob("iteration-*.npz"))) >= 2
    kill_driver_after_rounds(words, run, 3)
    output = finish(words)
    assert "already complete: images, embeddings, rejected, density, clusters" in output
    assert [pick["image_id"] for pick in picks_of(Run(str(run)))] == expected_of_vectors
    assert not list(run.rglob("begun.json"))
    assert not (run / "clusters" / "work").exists()


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("many") / "images", 200)


EMBED = {
    "embed.encoder": "pca",
    "embed.image_size": 8,
    "embed.batch": 20,
    "density.k": 5,
    "resources.shard_rows": 20,
}


@pytest.fixture(scope="module")
def quiet(two_cpus, many_pictures, tmp_path_factory):
    """An undisturbed run over many pictures."""
    source = pipeline.Source(images=str(many_pictures))
    return advance(tmp_path_factory.mktemp("quiet") / "run", source=source, **EMBED)


def same_as(run: Run, quiet: Run) -> bool:
    """The same embeddings, to the bit, and the same picks."""
    shards = range(len(quiet.manifest("embeddings").shards))
    mine, theirs = (np.concatenate([r.read_embeddings(i)[1] for i in shards]) for r in (run, quiet))
    return np.array_equal(mine, theirs) and picks_of(run) == picks_of(quiet)


def test_driver_killed_while_embedding(quiet, many_pictures, tmp_path):
    run = tmp_path / "run"
    words = command(["--images", str(many_pictures)], run, EMBED, 6)
    kill_driver_in(words, run, "embeddings", 3)
    written = {path.name: path.stat().st_mtime_ns for path in (run / "embeddings").glob("*.parquet")}
    finish(words)
    for name, moment in written.items():
        assert (run / "embeddings" / name).stat().st_mtime_ns == moment, "a finished shard was redone"
    assert same_as(Run(str(run)), quiet)


def poisonous(poison: str, deed: str):
    """Reads files, but kills its process, hangs or raises at one of them; travels to workers by value."""

    def read(request, access) -> bytes:
        if request.uri.endswith(poison):
            import os
            import signal
            import time

            if deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "hang":
                time.sleep(3600)
            raise ArithmeticError("no decoder expects this")
        with open(request.uri, "rb") as file:  # noqa: PTH123
            return file.read()

    return read


def check_poison(deed, folder, quiet, tmp_path, **options):
    source = pipeline.Source(images=str(folder))
    read = poisonous("123.png", deed)
    # The components of the quiet run: a sample without the poison would give others.
    (tmp_path / "run" / "embeddings").mkdir(parents=True)
    shutil.copy(Path(quiet.root) / "embeddings" / "pca.npz", tmp_path / "run" / "embeddings")
    run = advance(tmp_path / "run", source=source, upto="embeddings", read=read, **EMBED, **options)
    assert run.manifest("embeddings").rows == 199
    rejected = run.read_shard("rejected", 6).to_pylist()
    assert [(row["image_id"], Path(row["uri"]).name) for row in rejected] == [(123, "123.png")]
    assert "3 times" in rejected[0]["reason"]
    for shard in range(10):
        ids, x = run.read_embeddings(shard)
        kept = ids != 123
        assert np.array_equal(
            x[kept], quiet.read_embeddings(shard)[1][np.isin(quiet.read_embeddings(shard)[0], ids)]
        )


@pytest.mark.faults
def test_image_that_kills_its_reader_is_rejected(quiet, many_pictures, tmp_path):
    """The shard is split down to the image at fault; its neighbors keep their embeddings to the bit."""
    check_poison("kill", many_pictures, quiet, tmp_path)


@pytest.mark.faults
def test_image_that_makes_its_reader_raise_is_rejected(quiet, many_pictures, tmp_path):
    check_poison("raise", many_pictures, quiet, tmp_path)


@pytest.mark.faults
def test_image_that_hangs_its_reader_is_rejected(quiet, many_pictures, tmp_path):
    check_poison(
        "hang",
        many_pictures,
        quiet,
        tmp_path,
        **{"resources.stall_seconds": 4.0, "resources.start_seconds": 60.0},
    )


@pytest.mark.faults
def test_image_that_ends_its_reader_is_left_out_of_the_sample_of_pca(two_cpus, many_pictures, tmp_path):
    run = advance(
        tmp_path / "run",
        source=pipeline.Source(images=str(many_pictures)),
        upto="embeddings",
        read=poisonous("123.png", "kill"),
        **EMBED,
    )
    assert run.manifest("embeddings").rows == 199


@pytest.mark.faults
def test_no_progress_at_all_ends_with_a_sentence(two_cpus, many_pictures, tmp_path):
    source = pipeline.Source(images=str(many_pictures))
    with pytest.raises(UserError, match="embedding made no progress in 3 attempts"):
        advance(
            tmp_path / "run",
            source=source,
            read=poisonous("", "hang"),
            **EMBED | {"embed.encoder": "resnet18", "embed.checkpoint": _checkpoint(tmp_path)},
            **{"resources.start_seconds": 1.0},
        )


def _checkpoint(folder: Path) -> str:
    import torch
    from torchvision import models

    torch.save(models.resnet18(weights=None).state_dict(), folder / "resnet18.pth")
    return str(folder / "resnet18.pth")


def pids_of(title: str) -> list[int]:
    """Processes of this test's Ray whose title begins so."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().decode(errors="replace").startswith(title) and any(
                session in str(link.readlink()) for link in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@contextmanager
def killer(title: str, when, times: int = 1):
    """Kill processes of a title, one at a time, whenever `when` holds; yields the list of those killed."""
    killed: list[int] = []
    stop = threading.Event()

    def watch():
        while not stop.wait(0.01) and len(killed) < times:
            if when():
                for pid in [pid for pid in pids_of(title) if pid not in killed][:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("title", "shards"),
    [
        ("ray::Wave", 2),
        ("ray::MapWorker(MapBatches(Encode))", 1),
        # Decoding runs ahead: when shards are written it is over.
        ("ray::MapBatches(decode_range)", 0),
    ],
)
def test_worker_killed_while_embedding(title, shards, quiet, many_pictures, tmp_path):
    run = tmp_path / "run"
    with killer(title, lambda: under_way(run, "embeddings", shards)) as killed:
        done = advance(run, source=pipeline.Source(images=str(many_pictures)), **EMBED)
    assert killed, f"no process {title} was there to kill"
    assert same_as(done, quiet)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("table", "shards", "times"), [("density", 1, 1), ("clusters", 1, 3), ("selection", 0, 1)]
)
def test_shard_holder_killed(table, shards, times, two_cpus, vectors, expected_of_vectors, tmp_path):
    run = tmp_path / "run"
    with killer("ray::ShardHolder", lambda: under_way(run, table, shards), times) as killed:
        done = advance(
            run, source=pipeline.Source(embeddings=str(vectors)), **SETTINGS, **{"selection.budget": BUDGET}
        )
    assert len(killed) == times
    assert [pick["image_id"] for pick in picks_of(done)] == expected_of_vectors


@pytest.mark.faults
def test_shard_holder_killed_while_sums_travel_by_ranges(
    two_cpus, vectors, expected_of_vectors, tmp_path, monkeypatch
):
    """Sums that lay with it, or were added there, are made again."""
    monkeypatch.setattr("selective_ray.kmeans.RANGE_ENTRIES", 32 * 100)
    run, source = tmp_path / "run", pipeline.Source(embeddings=str(vectors))
    with killer("ray::ShardHolder", lambda: under_way(run, "clusters", 1), 3) as killed:
        done = advance(run, source=source, **SETTINGS, **{"selection.budget": BUDGET})
    assert len(killed) == 3
    assert [pick["image_id"] for pick in picks_of(done)] == expected_of_vectors


@pytest.mark.faults
def test_shard_holder_killed_among_rounds(two_cpus, vectors, expected_of_vectors, tmp_path):
    """Its rows meet the picks of all rounds so far."""
    source, told = pipeline.Source(embeddings=str(vectors)), []
    with killer("ray::ShardHolder", lambda: len(told) >= 3) as killed:
        reporter = holding_rounds(told, lambda: killed)
        how = {**SETTINGS, "selection.budget": BUDGET, "reporter": reporter}
        done = advance(tmp_path / "run", source=source, **how)
    assert len(killed) == 1 and told[-1] == SETTINGS["selection.rounds"]
    assert [pick["image_id"] for pick in picks_of(done)] == expected_of_vectors


@pytest.mark.faults
def test_driver_interrupted_politely(vectors, expected_of_vectors, tmp_path):
    run = tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, SETTINGS, BUDGET)
    kill_driver_in(words, run, "clusters", 1, signal.SIGTERM)
    assert not (run / "lease.json").exists(), "a polite end gives the lease back"
    finish(words)
    assert [pick["image_id"] for pick in picks_of(Run(str(run)))] == expected_of_vectors


@pytest.mark.faults
def test_driver_killed_again_and_again(many_pictures, quiet, tmp_path):
    """Killed at random moments of its life until it ends by itself."""
    run = tmp_path / "run"
    words = command(["--images", str(many_pictures)], run, EMBED, 6)
    rng = np.random.default_rng(1)
    for attempt in range(4):
        driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            driver.wait(float(rng.uniform(3, 12 + 4 * attempt)))
            break
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
    finish(words)
    assert same_as(Run(str(run)), quiet)


@pytest.mark.faults
def test_second_command_is_refused_while_the_first_works(vectors, tmp_path):
    run = tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, SETTINGS, BUDGET)
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "density" / "begun.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = subprocess.run(
            [w for w in words if w != "--debug"], capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert f"in use by process {first.pid} on this machine" in second.stderr
        assert first.wait(120) == 0
    finally:
        first.kill()


@pytest.mark.faults
@pytest.mark.parametrize("table", ["rejected", "embeddings"])
def test_damaged_shard_of_an_unfinished_table_is_made_again(table, quiet, many_pictures, tmp_path):
    """A shard cut short by a full disk or a bad copy, found when the run continues."""
    run = tmp_path / "run"
    words = command(["--images", str(many_pictures)], run, EMBED, 6)
    kill_driver_in(words, run, "embeddings", 3)
    shard = sorted((run / table).glob("part-*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    finish(words)
    assert same_as(Run(str(run)), quiet)


NODE_KILLED = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from selective_ray import config
from selective_ray.actors import pipeline
from selective_ray.progress import Reporter
from selective_ray.store import Run

kind, source, run, until = sys.argv[1:5]
quiet = {"include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

reporter, rounds = Reporter(quiet=True), []

def follow(event):
    if event.what == "rounds so far":
        rounds.append(event)
        if until == "rounds" and len(rounds) == int(sys.argv[6]):
            # The kill is over before the next round.
            thread.join(60)

reporter.followers.append(follow)

def kill_one():
    while len(rounds if until == "rounds" else list(Path(run).glob(until))) < int(sys.argv[6]):
        time.sleep(0.002)
    table = "selection" if until == "rounds" else until.split("/")[0]
    if not (Path(run) / table / "manifest.json").exists():
        cluster.remove_node(nodes[0], allow_graceful=False)
        print("killed", flush=True)

thread = threading.Thread(target=kill_one, daemon=True)
thread.start()
options = json.loads(sys.argv[5])
settings, asked = config.load(options=options, own_embeddings=kind == "embeddings")
where = pipeline.Source(**{kind: source})
pipeline.advance(Run(run), where, settings, asked, reporter, upto="selection")
ray.shutdown()
cluster.shutdown()
"""


def kill_a_node(source: dict, run: Path, until: str, options: dict, count: int = 2) -> None:
    """Run on two nodes of one CPU each, and kill one when `count` files of the run match `until`, or after so
    many rounds of the selection."""
    (kind, where), options = *source.items(), {**options, "resources.workers": 2}
    words = [kind, where, str(run), until, json.dumps(options), str(count)]
    script = [sys.executable, "-c", NODE_KILLED, *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    answer = subprocess.run(script, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "killed" in answer.stdout, "the node was never killed"


@pytest.mark.faults
def test_a_whole_node_killed_while_embedding(quiet, many_pictures, tmp_path):
    """One of two nodes goes, with the encoder and whatever else ran there; the other finishes the work."""
    options = {**EMBED, "selection.budget": 6, "resources.stall_seconds": 20}
    kill_a_node({"images": str(many_pictures)}, tmp_path / "run", "embeddings/part-*.parquet", options)
    assert same_as(Run(str(tmp_path / "run")), quiet)


@pytest.mark.faults
def test_a_whole_node_killed_while_clustering(vectors, expected_of_vectors, tmp_path):
    """Its rows are read again on the other node, which has room for one holder in place of two."""
    options = {**SETTINGS, "selection.budget": BUDGET, "resources.shard_rows": 3000}
    kill_a_node({"embeddings": str(vectors)}, tmp_path / "run", "clusters/work/iteration-*", options)
    assert [pick["image_id"] for pick in picks_of(Run(str(tmp_path / "run")))] == expected_of_vectors


@pytest.mark.faults
def test_driver_killed_while_clustering_in_two_levels(two_cpus, vectors, tmp_path):
    settings = {"cluster.two_level": 100, "seed": 2, "resources.shard_rows": 3000}
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, settings, BUDGET)
    kill_driver_in(words, run, "clusters", 1)
    finish(words)
    source = pipeline.Source(embeddings=str(vectors))
    expected = advance(quiet, source=source, upto="clusters", **settings, **{"selection.budget": BUDGET})
    centroids = [np.load(Path(r.root) / "clusters" / "centroids.npy") for r in (expected, Run(str(run)))]
    assert np.array_equal(*centroids)


LISTS = {"density.mode": "ivf", "density.k": 10, "resources.shard_rows": 1000, "seed": 2}


@pytest.fixture(scope="module")
def expected_densities(two_cpus, vectors, tmp_path_factory):
    """Densities by inverted lists, of an undisturbed run."""
    return densities(
        advance(
            tmp_path_factory.mktemp("lists") / "run",
            source=pipeline.Source(embeddings=str(vectors)),
            upto="density",
            **LISTS,
        )
    )


def densities(run: Run) -> np.ndarray:
    shards = range(len(run.manifest("density").shards))
    return np.concatenate([run.read_shard("density", i)["mean_sq_dist"].to_numpy() for i in shards])


def work_under_way(run: Path, there: str, count: int, missing: str):
    folder = run / "density"
    return lambda: len(list(folder.glob(there))) >= count and not any(folder.glob(missing))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("there", "count", "missing"),
    [
        ("work/lists-*", 1, "work/group-*"),
        # The lists of all shards are there.
        ("work/lists-*", 24, "work/group-*"),
        ("work/group-*", 1, "part-*.parquet"),
        ("part-*.parquet", 1, "manifest.json"),
    ],
    ids=["finding lists", "moving rows", "joining", "writing"],
)
def test_owner_of_lists_killed(there, count, missing, expected_densities, vectors, tmp_path):
    run = tmp_path / "run"
    with killer("ray::ShardHolder", work_under_way(run, there, count, missing), 2) as killed:
        source = pipeline.Source(embeddings=str(vectors))
        done = advance(run, source=source, upto="density", **LISTS)
    assert killed, "no owner was there to kill"
    assert np.array_equal(densities(done), expected_densities)


@pytest.mark.faults
def test_a_whole_node_killed_while_joining(expected_densities, vectors, tmp_path):
    """Its groups are put together again on the other node, which has room for one owner in place of two."""
    options = {**LISTS, "selection.budget": 6}
    kill_a_node({"embeddings": str(vectors)}, tmp_path / "run", "density/work/group-*", options)
    assert np.array_equal(densities(Run(str(tmp_path / "run"))), expected_densities)


@pytest.mark.faults
def test_a_whole_node_killed_while_selecting(vectors, expected_of_vectors, tmp_path):
    """Its rows are read again on the other node, and meet the picks of all rounds so far."""
    run, options = tmp_path / "run", {**SETTINGS, "selection.budget": BUDGET}
    kill_a_node({"embeddings": str(vectors)}, run, "rounds", options, 3)
    assert [pick["image_id"] for pick in picks_of(Run(str(run)))] == expected_of_vectors


@pytest.mark.faults
def test_driver_killed_among_nested_budgets(vectors, two_cpus, tmp_path):
    settings = {**SETTINGS, "selection.budgets": [200, 400, 600]}
    source = pipeline.Source(embeddings=str(vectors))
    quiet = advance(tmp_path / "quiet", source=source, **settings, **{"selection.budget": None})
    run = tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, settings, 0)
    del words[words.index("--budget") : words.index("--budget") + 2]
    for table in ("clusters-200", "selection-400", "clusters"):
        kill_driver_in(words, run, table, 0)
    finish(words)
    assert picks_of(Run(str(run))) == picks_of(quiet)


@pytest.mark.faults
def test_driver_killed_while_joining(expected_densities, vectors, tmp_path):
    run = tmp_path / "run"
    words = command(["--embeddings", str(vectors)], run, LISTS, BUDGET)
    kill_driver_in(words, run, "density", 2)
    kept = {path: path.stat().st_mtime_ns for path in (run / "density").glob("work/*")}
    kill_driver_in(words, run, "density", 6)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, (
        "the quantizer, lists or a group was redone"
    )
    finish(words)
    assert np.array_equal(densities(Run(str(run))), expected_densities)
