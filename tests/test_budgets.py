"""Labeled images, nested budgets and kept utilities: through the command, and against the oracle."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from selective_ray import density
from selective_ray.cli import app

# Published units, so that the oracle needs no unit of its own.
SETTINGS = {"density.k": 10, "selection.scale": "none", "selection.weight": 0.3, "cluster.tolerance": 0}
ORACLE = {"rounds": 10, "weight": 0.3, "momentum": 0.9, "alpha": 1.0, "horizon_picks": 8}


def ask(*words, status=0):
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*map(str, words), *sets])
    assert result.exit_code == status, result.output
    return result.output


def read(run: Path, table: str) -> dict[str, np.ndarray]:
    content = pq.read_table(sorted((run / table).glob("*.parquet")))
    return {name: content[name].to_numpy() for name in content.column_names}


def expected(x, run: Path, clusters: str, fixed, count: int) -> list[int]:
    """What the oracle picks beside the fixed images, by the clusters and densities of a run."""
    utility = density.relative(read(run, "density")["mean_sq_dist"], unit=1.0, floor=1e-6)
    labels = read(run, clusters)["cluster_id"]
    return oracle.select(x, labels, utility, fixed=fixed, count=count, **ORACLE).tolist()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """400 unit vectors around 15 centers of unequal weight."""
    rng = np.random.default_rng(11)
    blob = rng.choice(15, 400, p=np.arange(1, 16) / 120)
    x = rng.normal(size=(15, 8))[blob] + 0.3 * rng.normal(size=(400, 8))
    file = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(file, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    return file


@pytest.fixture(scope="module")
def nested(two_cpus, vectors, tmp_path_factory):
    run = tmp_path_factory.mktemp("nested") / "run"
    ask("select", "--embeddings", vectors, "--run", run, "--budgets", "8,20,30")
    return run


def test_each_budget_contains_the_one_before(nested, vectors):
    x = np.load(vectors)
    before = np.empty(0, np.int64)
    for budget, suffix in ((8, "-8"), (20, "-20"), (30, "")):
        picks = read(nested, f"selection{suffix}")
        labels = read(nested, f"clusters{suffix}")["cluster_id"]
        assert len(picks["image_id"]) == len(set(picks["image_id"].tolist())) == budget
        assert labels.max() + 1 == budget
        new = np.setdiff1d(picks["image_id"], before)
        assert len(new) == budget - len(before)
        assert np.array_equal(labels[picks["image_id"]], picks["cluster_id"])
        assert np.all(np.diff(picks["cluster_id"]) >= 0)
        assert not np.isin(labels[new], labels[before]).any(), (
            "a cluster that holds an earlier pick is closed"
        )
        open_ = np.setdiff1d(np.arange(budget), labels[before])
        left = np.setdiff1d(open_, labels[new])
        sizes = np.bincount(labels)
        assert not len(left) or sizes[left].max() <= sizes[labels[new]].min(), "the largest are filled"
        assert sorted(expected(x, nested, f"clusters{suffix}", before, budget - len(before))) == new.tolist()
        before = np.sort(picks["image_id"])
    picks = read(nested, "selection")
    for budget, suffix in ((8, "-8"), (20, "-20")):
        smaller = read(nested, f"selection{suffix}")["image_id"]
        assert sorted(picks["image_id"][picks["budget"] <= budget]) == sorted(smaller)
    with (nested / "selection" / "selection.csv").open(newline="") as file:
        assert [int(row["budget"]) for row in csv.DictReader(file)] == picks["budget"].tolist()


def test_the_smallest_of_several_budgets_is_what_it_is_alone(nested, vectors, tmp_path):
    run = tmp_path / "run"
    ask("select", "--embeddings", nested, "--run", run, "--budget", 8)
    assert json.loads((run / "clusters" / "manifest.json").read_text())["refers_to"] == str(nested)
    alone, first = read(run, "selection"), read(nested, "selection-8")
    assert all(np.array_equal(alone[name], first[name]) for name in alone)
    # The list grows: the same as if it had been asked for at once; the run that used this one keeps its own.
    ask("select", "--embeddings", nested, "--run", run, "--budgets", "8,20")
    ask("select", "--embeddings", nested, "--run", run, "--budgets", "8,20,30")
    for table in ("selection-8", "selection-20", "selection"):
        mine, theirs = read(run, table), read(nested, table)
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), table
    assert "30 selected" in ask("select", "--embeddings", nested, "--run", run, "--budgets", "8,20,30")
    states = json.loads(CliRunner().invoke(app, ["status", "--run", str(run), "--json"]).output)
    for table in ("clusters-8", "selection-8", "clusters-20", "selection-20", "clusters", "selection"):
        assert states[table]["state"] == "complete", table
    page = (run / "report" / "index.html").read_text()
    assert "30 images selected" in page and "selection-20" in page


def test_a_run_that_was_extended_still_serves_those_that_refer_to_it(vectors, two_cpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ask("select", "--embeddings", vectors, "--run", first, "--budget", 8)
    ask("cluster", "--embeddings", first, "--run", second, "--budget", 8)
    ask("select", "--embeddings", vectors, "--run", first, "--budgets", "8,20")
    ask("select", "--embeddings", first, "--run", second, "--budget", 8)
    mine, theirs = read(second, "selection"), read(first, "selection-8")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("8,25",), "does not begin with these"),
        (("8,15,20,30",), "does not begin with these"),
        (("8,20",), "does not begin with these"),
        (("8,20,30,40", "--set", "selection.alpha=0.5"), "selection.alpha is 1.0 there and 0.5 here"),
        (("8,20,30,40", "--seed", "1"), "seed is 0 there and 1 here"),
    ],
)
def test_another_list_is_refused_and_changes_nothing(words, why, nested, vectors):
    before = {path: path.stat().st_mtime_ns for path in nested.rglob("*") if path.is_file()}
    assert why in ask("select", "--embeddings", vectors, "--run", nested, "--budgets", *words, status=1)
    assert {path: path.stat().st_mtime_ns for path in nested.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("shard_rows", "workers"), [(400, 1), (150, 2), (57, 2)])
def test_labeled_images_repel_and_close_their_clusters(shard_rows, workers, vectors, two_cpus, tmp_path):
    x = np.load(vectors)
    # Two of them are neighbors.
    marked = np.array([3, 200, 201, 399, int(np.argsort(x @ x[3])[-2])])
    file = tmp_path / "labeled.csv"
    file.write_text("image_id,label\n" + "".join(f"{number},a\n" for number in marked))
    run = tmp_path / "run"
    resources = (f"resources.shard_rows={shard_rows}", f"resources.workers={workers}")
    words = [word for resource in resources for word in ("--set", resource)]
    ask("select", "--embeddings", vectors, "--run", run, "--budget", 10, "--labeled", file, *words)
    labels, picks = read(run, "clusters")["cluster_id"], read(run, "selection")
    assert labels.max() + 1 == 10 + len(marked)
    assert not np.isin(picks["image_id"], marked).any()
    assert not np.isin(picks["cluster_id"], labels[marked]).any()
    assert picks["image_id"].tolist() == expected(x, run, "clusters", marked, 10)
    # The same images in another order are the same, others are not.
    file.write_text("image_id\n" + "".join(f"{number}\n" for number in marked[::-1]))
    assert "nothing to do" in ask(
        "select", "--embeddings", vectors, "--run", run, "--budget", 10, "--labeled", file
    )
    file.write_text("image_id\n1\n2\n3\n4\n5\n")
    words = ("select", "--embeddings", vectors, "--run", run, "--budget", 10, "--labeled", file)
    assert "selection.labeled is" in ask(*words, status=1)


def test_utilities_of_all_images(vectors, nested, tmp_path):
    run = tmp_path / "run"
    words = ("--embeddings", nested, "--run", run, "--budget", 8, "--keep-utilities", "--keep-neighbors")
    assert "nothing is pruned" in ask("select", *words)
    assert read(run, "neighbors")["image_id"].tolist() == list(range(400))
    picks, utilities = read(run, "selection"), read(run, "utilities")
    assert picks["image_id"].tolist() == read(nested, "selection-8")["image_id"].tolist()
    assert utilities["image_id"].tolist() == list(range(400))
    labels = read(nested, "clusters-8")["cluster_id"]
    for cluster, image, repulsion, utility in zip(
        *(picks[name] for name in ("cluster_id", "image_id", "repulsion", "utility")), strict=True
    ):
        assert utility == utilities["utility"][labels == cluster].max()
        assert (repulsion, utility) == (utilities["repulsion"][image], utilities["utility"][image])
    manifest = json.loads((run / "selection" / "manifest.json").read_text())
    assert manifest["summary"]["pruned"] is False
    assert min(manifest["summary"]["distances_computed"]) >= 1


def test_what_was_computed_is_reported(nested):
    summary = json.loads((nested / "selection" / "manifest.json").read_text())["summary"]
    assert summary["pruned"] is True
    assert len(summary["distances_computed"]) == 9
    assert 0 < sum(summary["distances_computed"]) < 9


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--budgets", "8,8"), 2, "budgets must increase, and 8 follows 8"),
        (("--budgets", "8,20,10"), 2, "budgets must increase, and 10 follows 20"),
        (("--budgets", "8,many"), 2, "no whole numbers"),
        (("--budgets", "0,8"), 2, "selection.budgets"),
        (("--budgets", ""), 2, "no whole numbers"),
        (("--budgets", "8,20", "--budget", "8"), 2, "disagree"),
        (("--budgets", "8,401"), 1, "budget 401 exceeds the 400"),
        (
            ("--budget", "397", "--labeled", "FILE"),
            1,
            "budget 397 exceeds the 396 embedded images besides the 4",
        ),
        (("--budget", "8", "--labeled", "none.csv"), 1, "there is no file none.csv"),
    ],
)
def test_mistakes(words, status, said, vectors, two_cpus, tmp_path):
    file = tmp_path / "labeled.csv"
    file.write_text("image_id\n1\n2\n3\n4\n")
    words = [file if word == "FILE" else word for word in words]
    assert said in ask("select", "--embeddings", vectors, "--run", tmp_path / "run", *words, status=status)


def test_labeled_images_that_were_never_listed(vectors, two_cpus, tmp_path):
    file = tmp_path / "labeled.csv"
    file.write_text("image_id\n1\n400\n")
    words = ("select", "--embeddings", vectors, "--run", tmp_path / "run", "--budget", 5, "--labeled", file)
    assert "names image_id 400" in ask(*words, status=1)


def test_tables_of_different_runs(vectors, nested, tmp_path):
    np.save(tmp_path / "y.npy", np.load(vectors)[::-1].copy())
    words = ("--embeddings", tmp_path / "y.npy", "--run", tmp_path / "run")
    ask("embed", *words)
    shutil.copytree(nested / "density", tmp_path / "run" / "density")
    assert "inputs.embeddings is" in ask("select", *words, "--budget", 8, status=1)
