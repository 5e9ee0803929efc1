"""Runs judged through the command: figures against plain ones, and every way in which labels are given."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from conftest import unit
from sklearn.datasets import load_digits
from test_cli import ask, content, refused
from test_report import Made, Page, make

from selective_ray import evaluation, figures, labeling, report
from selective_ray import truth as truths
from selective_ray.progress import Reporter
from selective_ray.schema import neighbors_schema

NAMES = "abcdefgh"
DRAWS = 4


class World(NamedTuple):
    """300 vectors of 8 classes, some rare; three seeds of one selection and one of another budget."""

    folder: Path
    x: np.ndarray
    labels: np.ndarray
    runs: list[Made]

    @property
    def uris(self) -> list[str]:
        return [f"/data/{NAMES[label]}/{i:03d}.png" for i, label in enumerate(self.labels)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    labels = rng.choice(8, 300, p=np.arange(1, 9) / 36)
    x = unit(rng.normal(size=(8, 16))[labels] + 0.9 * rng.normal(size=(300, 16)))
    world = World(folder, x, labels, [])
    for seed in range(3):
        world.runs.append(
            make(folder / str(seed), x, 16, world.uris, settings={"seed": seed, "selection.method": "usl"})
        )
    world.runs.append(make(folder / "10", x, 10, world.uris))
    return world


def judge(*words: object, runs: list[Made]) -> dict:
    options = [word for made in runs for word in ("--run", made.run.uri)]
    result = ask("evaluate", *options, *words, "--draws", DRAWS, "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    return json.loads(result.stdout)


def truth(path: Path, labels: dict[int, str]) -> Path:
    """A file of labels by row number; ids of `make` are not row numbers."""
    lines = ["image_id,label", *(f"{2 * row + 1},{name}" for row, name in labels.items())]
    path.write_text("\n".join(lines))
    return path


def names(world: World, rows) -> dict[int, str]:
    return {int(row): NAMES[world.labels[row]] for row in rows}


def accuracy_by_hand(world: World, rows: np.ndarray, judged: np.ndarray) -> float:
    nearest = rows[np.argmax(world.x[judged].astype(np.float64) @ world.x[rows].T, axis=1)]
    return (world.labels[nearest] == world.labels[judged]).mean()


# All labels are known


def test_picks_and_draws_by_hand(world):
    (made, *_) = world.runs
    (found,) = judge("--labels", "folders", runs=[made])["judged"]
    assert (found["images"], found["sampled"], found["judged"], found["labeled"]) == (300,) * 4
    (group,) = found["selections"]
    rows = np.sort(made.selected.rows)
    rng = np.random.default_rng(0)
    draws = [rng.choice(300, 16, replace=False) for _ in range(DRAWS)]
    for which, selections in (("picks", [rows]), ("random", draws)):
        expected = [accuracy_by_hand(world, s, np.setdiff1d(np.arange(300), s)) for s in selections]
        assert group[which]["nearest_neighbor"]["values"] == expected
    assert group["random"]["nearest_neighbor"]["mean"] == pytest.approx(np.mean(expected))
    assert group["random"]["nearest_neighbor"]["std"] == pytest.approx(np.std(expected, ddof=1))
    assert group["picks"]["nearest_neighbor"]["std"] is None
    counts = np.bincount(world.labels[rows], minlength=8)
    (run,) = group["runs"]
    assert run["class_counts"] == dict(zip(NAMES, counts.tolist(), strict=True))
    assert group["picks"]["classes"]["mean"] == np.count_nonzero(counts)
    assert group["picks"]["spread"]["mean"] == pytest.approx(counts.std())
    assert group["without_a_pick"].keys() == {NAMES[c] for c in np.flatnonzero(counts == 0)}
    # Neighbors of `make`: 10 with the image itself, of which the other 9 count.
    sq_dists = np.sort(2 - 2 * world.x.astype(np.float64) @ world.x.T, axis=1)[:, 1:10].mean(axis=1)
    sq_radius = np.sort(sq_dists)[(300 - 1) // 2]
    assert found["radius"] ** 2 == pytest.approx(sq_radius, rel=1e-5)
    to_pick = (2 - 2 * world.x.astype(np.float64) @ world.x[rows].T).min(axis=1)
    assert group["picks"]["coverage"]["mean"] == (to_pick <= sq_radius).mean()


def test_seeds_are_repetitions_and_runs_do_not_change_each_other(world):
    (found,) = judge("--labels", "folders", runs=world.runs)["judged"]
    three, other = found["selections"]
    assert [run["seed"] for run in three["runs"]] == [0, 1, 2] and three["budget"] == 16
    assert (other["budget"], len(other["runs"])) == (10, 1)
    for made, group, place in ((world.runs[1], three, 1), (world.runs[3], other, 0)):
        (alone,) = judge("--labels", "folders", runs=[made])["judged"]
        (only,) = alone["selections"]
        assert only["random"] == group["random"]
        for name, values in only["picks"].items():
            assert values["values"] == [group["picks"][name]["values"][place]]
    for name in figures.FIGURES:
        values = three["picks"][name]["values"]
        assert len(set(values)) > 1 or name == "classes"
        assert three["picks"][name]["mean"] == pytest.approx(np.mean(values))
        assert three["picks"][name]["std"] == pytest.approx(np.std(values, ddof=1))


def test_a_file_tells_what_folders_tell_for_any_shards(world, tmp_path):
    by_id = truth(tmp_path / "ids.csv", names(world, range(300)))
    by_uri = tmp_path / "uris.jsonl"
    said = ({"uri": uri, "label": NAMES[c]} for uri, c in zip(world.uris, world.labels, strict=True))
    by_uri.write_text("\n".join(map(json.dumps, said)))
    (folders,) = judge("--labels", "folders", runs=world.runs[:1])["judged"]
    for shard_rows, file in ((300, by_id), (37, by_uri)):
        how = {"shard_rows": shard_rows, "settings": {"selection.method": "usl"}}
        made = make(tmp_path / str(shard_rows), world.x, 16, world.uris, **how)
        for sample in (300, 100):
            (found,) = judge("--labels", file, "--sample", sample, runs=[made])["judged"]
            (same,) = judge("--labels", "folders", "--sample", sample, runs=world.runs[:1])["judged"]
            assert found["labels"] == str(file) and found["sampled"] == sample
            for group in (*found["selections"], *same["selections"]):
                del group["runs"]
            assert found["selections"] == same["selections"]
    (sampled,) = found["selections"]
    (whole,) = folders["selections"]
    for name in figures.ACCURACIES:
        # A third of the images tells about the same.
        assert sampled["picks"][name]["mean"] == pytest.approx(whole["picks"][name]["mean"], abs=0.15)
    assert found["judged"] == 100


def test_kept_neighbors_are_taken_and_make_no_difference(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    before = judge("--labels", "folders", runs=[made])["judged"]
    ids = np.arange(300) * 2 + 1
    sq_dists = 2 - 2 * world.x.astype(np.float64) @ world.x.T
    order = np.argsort(sq_dists, axis=1)[:, :20]
    lists = {
        "neighbors": pa.FixedSizeListArray.from_arrays(pa.array(ids[order].ravel()), 20),
        "sq_dists": pa.FixedSizeListArray.from_arrays(
            pa.array(np.take_along_axis(sq_dists, order, 1).ravel().astype(np.float32)), 20
        ),
    }
    table = pa.table([pa.array(ids), *lists.values()], neighbors_schema(20))
    made.run.begin("neighbors", {}, {})
    shards = [made.run.write_shard("neighbors", i, table.slice(i * 100, 100)) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "graph_neighbors", lambda x: pytest.fail("they are there"))
        made.run.finish("neighbors", shards, seconds=0, peak_memory_bytes={}, summary={})
        assert judge("--labels", "folders", runs=[made])["judged"] == before


def test_a_folder_is_the_last_one_inside_of_an_archive_or_around_it():
    uris = {
        "/data/train/cat/1.png": "cat",
        "s3://bucket/dog/x#1.png": "dog",
        "s3://bucket/a/part-0.tar#cat/1.png": "cat",
        "s3://bucket/a/part-0.tar#train/hot dog/1.png": "hot dog",
        "s3://bucket/bird/part-0.tar#000.png": "bird",
        "s3://bucket/bird/part-0.parquet#12": "bird",
        "alone.png": None,
    }
    assert truths.folders(pa.chunked_array([list(uris)])).to_pylist() == list(uris.values())


# Some labels are known


def test_labels_of_a_run_tell_what_the_picks_are(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    found = judge(runs=[made])
    (judged,) = found["judged"]
    assert list(judged["selections"][0]["picks"]) == ["coverage"] == list(judged["selections"][0]["random"])
    assert "there are none" in found["warnings"][0] and "--labels" in found["warnings"][0]
    file = truth(tmp_path / "labels.csv", names(world, made.selected.rows))
    labeling.bring_labels(made.run, str(file), replace=False, reporter=Reporter(quiet=True))
    found = judge(runs=[made])
    (judged,) = found["judged"]
    (group,) = judged["selections"]
    assert list(group["picks"]) == ["coverage", "classes", "spread"] and list(group["random"]) == ["coverage"]
    assert len(found["warnings"]) == 1 and "not picked" in found["warnings"][0]
    assert sum(group["runs"][0]["class_counts"].values()) == 16


def test_where_some_are_labeled_only_they_are_judged_and_no_picks(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    rows = np.sort(made.selected.rows)
    others = np.setdiff1d(np.arange(300), rows)[::4]
    file = truth(tmp_path / "some.csv", names(world, [*rows[1:], *others]))
    found = judge("--labels", file, runs=[made])
    (judged,) = found["judged"]
    (group,) = judged["selections"]
    assert (judged["labeled"], judged["judged"], judged["sampled"]) == (15 + len(others), len(others), 300)
    expected = accuracy_by_hand(world, rows[1:], others)
    assert group["picks"]["nearest_neighbor"]["values"] == [expected]
    assert "15 of the 16 picks" in found["warnings"][0]
    rng = np.random.default_rng(0)
    draw = rng.choice(others, 15, replace=False)
    expected = accuracy_by_hand(world, draw, np.setdiff1d(others, draw))
    assert group["random"]["nearest_neighbor"]["values"][0] == expected
    # As many as nothing can be drawn from.
    few = truth(tmp_path / "few.csv", names(world, [*rows, *others[:10]]))
    found = judge("--labels", few, runs=[made])
    (group,) = found["judged"][0]["selections"]
    assert group["random"] == {} and group["picks"]["nearest_neighbor"]["mean"] >= 0
    assert "10 labeled images" in found["warnings"][0] and "draws of 16" in found["warnings"][0]


# What is left, and what is said


def test_figures_are_kept_and_nothing_else_is_touched(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    before = content(tmp_path / "run")
    judge("--labels", "folders", runs=[made])
    after = content(tmp_path / "run")
    assert {name for name in after if after[name] != before.get(name)} >= {"evaluation/manifest.json"}
    assert all(after[name] == before[name] for name in before)
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"evaluation"}
    manifest = made.run.manifest("evaluation")
    table = made.run.read_shard("evaluation", 0)
    assert manifest.rows == len(table) == (1 + DRAWS) * len(figures.FIGURES)
    assert manifest.inputs["selection"] == made.run.manifest("selection").fingerprint
    assert table.filter(pa.compute.is_null(table["draw"]))["run"].unique().to_pylist() == [made.run.uri]
    # Again, and with other labels.
    judge("--labels", "folders", runs=[made])
    assert content(tmp_path / "run") == after
    judge("--labels", truth(tmp_path / "some.csv", names(world, range(200))), runs=[made])
    assert len(made.run.finished_shards("evaluation")) == 1
    assert made.run.manifest("evaluation").fingerprint != manifest.fingerprint


def test_the_report_shows_what_was_found_as_long_as_it_is_of_this_selection(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    report.write(made.run)
    without = Page((tmp_path / "run" / "report" / "index.html").read_text())
    assert "evaluation" not in without.sections
    (judged,) = judge("--labels", "folders", runs=[made, world.runs[1]])["judged"]
    (group,) = judged["selections"]
    found = Page((tmp_path / "run" / "report" / "index.html").read_text())
    words = found.sections["evaluation"]
    for which in ("picks", "random"):
        values = group[which]["linear_probe"]
        assert f"{100 * values['mean']:.1f} % ± {100 * values['std']:.1f}" in words
    assert f"{DRAWS}, each of" in words and "those of 2 seeds" in words
    missing = [name for name, count in group["runs"][0]["class_counts"].items() if count == 0]
    assert ("Every class has a pick" in words) == (not missing)
    assert f"No pick is of {', '.join(missing)}." in words or not missing
    # Two dots of the seeds for every share; the other sections stay as they were.
    drawn = found.text.split('<section id="evaluation">')[1].split("</section>")[0]
    assert drawn.count("<circle") == 2 * len(figures.SHARES)
    assert {name: without.sections[name] for name in without.sections} == {
        name: words for name, words in found.sections.items() if name != "evaluation"
    }
    made.run.write_json(
        made.run.read_json("selection", "manifest.json") | {"fingerprint": "other"},
        "selection",
        "manifest.json",
    )
    report.write(made.run)
    assert "evaluation" not in Page((tmp_path / "run" / "report" / "index.html").read_text()).sections


def test_budgets_that_contain_each_other_are_judged_one_by_one(world, tmp_path):
    made = make(tmp_path / "run", world.x, 16, world.uris)
    smaller = make(tmp_path / "10", world.x, 10, world.uris)
    for table in ("clusters", "selection"):
        (tmp_path / "10" / table).rename(tmp_path / "run" / f"{table}-10")
    small, large = judge("--labels", "folders", runs=[made])["judged"][0]["selections"]
    assert (small["budget"], large["budget"]) == (10, 16)
    rows = np.sort(smaller.selected.rows)
    expected = accuracy_by_hand(world, rows, np.setdiff1d(np.arange(300), rows))
    assert small["picks"]["nearest_neighbor"]["values"] == [expected]
    assert set(made.run.read_shard("evaluation", 0)["budget"].to_pylist()) == {10, 16}


def test_runs_of_different_embeddings_are_judged_apart(world, tmp_path):
    other = make(tmp_path / "half", world.x, 16, world.uris, dtype="float16")
    found = judge("--labels", "folders", runs=[world.runs[0], other])
    first, second = found["judged"]
    assert first["embeddings"] != second["embeddings"]
    assert "2 different embeddings" in found["warnings"][0]


def test_a_person_reads_a_table(world):
    words = [word for made in world.runs[:3] for word in ("--run", made.run.uri)]
    said = ask("evaluate", *words, "--labels", "folders", "--draws", DRAWS)
    assert said.exit_code == 0 and said.stderr == ""
    lines = said.stdout.splitlines()
    assert "300, all of them" in lines[0] and "8 classes, from the names of folders" in lines[1]
    assert any(line.endswith("budget 16, seeds 0, 1, 2") for line in lines)
    head = next(line for line in lines if "difference" in line)
    assert "picks" in head and "random, 16" in head
    for name in figures.FIGURES.values():
        (line,) = (line for line in lines[lines.index(head) :] if line.startswith(name + " "))
        assert line.count("±") == 2 and ("+" in line or "-" in line)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({400: "a"}, "not in"),
        ({row: "a" for row in range(300)}, "two classes"),
        ({0: "a"}, "two classes"),
        ("picks", "not picked"),
        ("one more", "of an image that was not picked"),
        ("others", "labels none of the 16 picks"),
    ],
)
def test_labels_that_cannot_tell_are_refused_with_a_sentence(world, tmp_path, rows, expected):
    made = world.runs[0]
    picked = made.selected.rows
    others = np.setdiff1d(np.arange(300), picked)
    given = {
        "picks": names(world, picked),
        "one more": names(world, [*picked, others[0]]),
        "others": names(world, others),
    }
    file = truth(tmp_path / "truth.csv", rows if isinstance(rows, dict) else given[rows])
    before = content(world.folder)
    said = refused(1, "evaluate", "--run", made.run.uri, "--labels", file)
    assert expected in said and str(file) in said
    assert content(world.folder) == before


def test_what_is_not_finished_or_given_twice_is_refused(world, tmp_path):
    run = world.runs[0].run.uri
    assert "given twice" in refused(2, "evaluate", "--run", run, "--run", run)
    assert "no file" in refused(1, "evaluate", "--run", run, "--labels", tmp_path / "nope.csv")
    made = make(tmp_path / "same", world.x, 16, [f"/data/all/{i}.png" for i in range(300)])
    assert "same selection, with seed 0" in refused(1, "evaluate", "--run", run, "--run", made.run.uri)
    assert "in one folder, 'all'" in refused(1, "evaluate", "--run", made.run.uri, "--labels", "folders")
    for table in ("selection", "embeddings"):
        made.run.delete(table, "manifest.json")
        assert f"no finished {table}" in refused(1, "evaluate", "--run", made.run.uri)
    assert "--draws" in refused(2, "evaluate", "--run", run, "--draws", 1)


def test_real_runs_on_digits(two_cpus, tmp_path):
    """Two seeds through every stage, the second on the first one's embeddings; USL is better than chance."""
    digits = load_digits()
    x, labels = digits.data[:800] - digits.data.mean(axis=0), digits.target[:800]
    np.save(tmp_path / "x.npy", x)
    first, second = tmp_path / "0", tmp_path / "1"
    options = ("--budget", 30, "--set", "density.keep_neighbors=true", "--set", "resources.shard_rows=300")
    for source, run, seed in ((tmp_path / "x.npy", first, 0), (first, second, 1)):
        done = ask("select", "--embeddings", source, "--run", run, "--seed", seed, *options)
        assert done.exit_code == 0, done.stderr
    lines = [f"{tmp_path / 'x.npy'}#{i},{label}" for i, label in enumerate(labels)]
    (tmp_path / "truth.csv").write_text("\n".join(["uri,label", *lines]))
    words = ("--run", first, "--run", second, "--labels", tmp_path / "truth.csv", "--json")
    result = ask("evaluate", *words)
    assert result.exit_code == 0, result.stderr or result.exception
    (judged,) = json.loads(result.stdout)["judged"]
    (group,) = judged["selections"]
    assert (judged["images"], judged["labeled"], judged["classes"]) == (800, 800, 10)
    assert [run["seed"] for run in group["runs"]] == [0, 1]
    for name in (*figures.SHARES, "classes"):
        assert group["picks"][name]["mean"] > group["random"][name]["mean"], name
    for run in (first, second):
        assert "evaluation" in Page((run / "report" / "index.html").read_text()).sections
    done = ask("select", "--embeddings", first, "--run", second, "--seed", 1, *options)
    assert done.exit_code == 0 and "nothing to do" in done.stdout
