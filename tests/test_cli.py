"""The command as a person meets it: one sentence and a status for every mistake, and nothing broken by it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paint
import pytest
from conftest import unit
from typer.testing import CliRunner, Result

from selective_ray import __version__
from selective_ray.cli import app

ROWS = 60


def ask(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def line_of(result: Result, status: int) -> str:
    """The one line on stderr of a command that ended with this status."""
    assert result.exit_code == status, result.stderr or result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception):", lines[0]), lines[0]
    assert len(lines[0]) < 600
    return lines[0]


def refused(status: int, *words: object) -> str:
    """The sentence with which a command fails, the same with --json, where stdout is an object too."""
    plain = ask(*words)
    said = line_of(plain, status)
    assert plain.stdout == ""
    as_json = ask(*words, "--json")
    assert line_of(as_json, status) == said
    assert json.loads(as_json.stdout)["error"] in said
    return said


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that is in a folder, to see that nothing of it changed."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """60 vectors of 4 dimensions, 6 pictures of which one is broken, and folders without any."""
    folder = tmp_path_factory.mktemp("given")
    np.save(folder / "x.npy", unit(np.random.default_rng(8).normal(size=(ROWS, 4))))
    (folder / "images").mkdir()
    for i in range(5):
        (folder / "images" / f"{i}.png").write_bytes(paint.png(paint.picture(24, 24, seed=i)))
    (folder / "images" / "broken.jpg").write_bytes(b"these are words")
    (folder / "empty").mkdir()
    (folder / "words").mkdir()
    (folder / "words" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def finished(two_cpus, given, tmp_path_factory) -> Path:
    """A finished run on the vectors."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = ask("select", "--embeddings", given / "x.npy", "--run", folder, "--budget", 5, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    return folder


# Wrong usage: 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--budget", "0"], "budget"),
        (["--budget", "-4"], "budget"),
        (["--budget", "many"], "budget"),
        (["--budget", "2.5"], "budget"),
        ([], "--budget"),
        (["--budget", "5", "--preset", "usl-cifar"], "usl-cifar10"),
        (["--budget", "5", "--encoder", "resnet5O"], "resnet50"),
        (["--budget", "5", "--set", "density.kk=3"], "density.k"),
        (["--budget", "5", "--set", "densty.k=3"], "density.k"),
        (["--budget", "5", "--set", "density.k"], "section.key=value"),
        (["--budget", "5", "--set", "density.k=0"], "density.k"),
        (["--budget", "5", "--set", "density.k=1"], "density.k"),
        (["--budget", "5", "--set", "selection.budget=6"], "selection.budget"),
        (["--budget", "5", "--seed", "1", "--set", "seed=2"], "seed"),
        (["--budget", "5", "--set", "seed=1", "--set", "seed=2"], "seed"),
        (["--budget", "5", "--seed", "-1"], "seed"),
        (["--budget", "5", "--config", "nope.toml"], "nope.toml"),
        (["--budget", "5", "--bugdet", "6"], "--budget"),
        (["--budget", "5", "surplus"], "surplus"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage_and_begins_nothing(given, run, words, expected):
    before = content(given)
    assert expected in refused(2, "select", "--images", given / "images", "--run", run, *words)
    assert not run.exists() and content(given) == before


@pytest.mark.parametrize("command", ["select", "embed", "density", "cluster"])
def test_one_source_is_needed_and_not_two(given, run, command):
    both = ("--images", given / "images", "--embeddings", given / "x.npy")
    for words in ((), both):
        said = refused(2, command, "--run", run, "--budget", 3, *words)
        assert "--images" in said and "--embeddings" in said
    assert not run.exists()


@pytest.mark.parametrize("command", ["select", "embed", "status"])
def test_a_run_is_needed(command):
    assert "--run" in refused(2, command)


def test_an_unknown_command_names_the_nearest():
    assert "select" in line_of(ask("selct"), 2)


def test_embed_and_density_need_no_budget_and_cluster_does(given, run):
    words = ("--embeddings", given / "nope.npy", "--run", run)
    assert "nope.npy" in refused(1, "embed", *words)
    assert "nope.npy" in refused(1, "density", *words)
    assert "--budget" in refused(2, "cluster", *words)


# Images that are not there: 1


@pytest.mark.parametrize(
    ("images", "expected"), [("empty", "is empty"), ("words", "notes.txt|is an image"), ("nope", "no folder")]
)
def test_a_folder_without_images_is_refused(given, run, images, expected):
    before = content(given)
    said = refused(1, "select", "--images", given / images, "--run", run, "--budget", 3)
    assert str(given / images) in said and re.search(expected, said)
    assert content(given) == before


def test_a_mistyped_folder_does_not_spoil_the_run(given, run):
    """The same command with the right folder gets further: to the next mistake, too large a budget."""
    refused(1, "select", "--images", given / "imagse", "--run", run, "--budget", 100)
    assert "budget 100" in refused(1, "select", "--images", given / "images", "--run", run, "--budget", 100)


def test_more_picks_than_images_are_refused_before_any_work(given, run):
    said = refused(1, "select", "--images", given / "images", "--run", run, "--budget", 7)
    assert "budget 7" in said and "6 images" in said
    assert not (run / "embeddings").exists()


# Embeddings that are none: 1


def with_row(value: float) -> np.ndarray:
    x = np.ones((9, 3), np.float32)
    x[[4, 7]] = value
    return x


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (with_row(np.nan), "2 of the rows.*NaN.*rows 4, 7"),
        (with_row(np.inf), "2 of the rows.*rows 4, 7"),
        (with_row(0), "2 of the rows.*zero.*rows 4, 7"),
        (np.ones(9), r"shape \[9\]"),
        (np.ones((3, 3, 3)), r"shape \[3, 3, 3\]"),
        (np.ones((0, 3)), "no embeddings"),
        (np.array([["a"]]), "not numbers"),
    ],
    ids=["nan", "inf", "zero", "1-d", "3-d", "no rows", "words"],
)
def test_unusable_embeddings_are_refused_and_mended_ones_taken(tmp_path, run, x, expected):
    path = tmp_path / "x.npy"
    np.save(path, x)
    before = path.read_bytes()
    words = ("select", "--embeddings", path, "--run", run, "--budget", 5)
    assert re.search(expected, refused(1, *words))
    assert path.read_bytes() == before
    # Mended, the same command gets further: to the next mistake.
    np.save(path, unit(np.random.default_rng(0).normal(size=(9, 3))))
    assert "density.k = 30" in refused(1, *words, "--set", "density.k=30")


@pytest.mark.parametrize("name", ["nope.npy", "nope.parquet", "nope", "empty", "images/0.png"])
def test_embeddings_that_are_neither_file_nor_run_are_refused(given, run, name):
    said = refused(1, "select", "--embeddings", given / name, "--run", run, "--budget", 3)
    assert name in said and "--embeddings" in said
    assert not any(path.is_file() for path in run.rglob("*"))


def test_an_asked_k_larger_than_the_data_is_refused(given, run):
    said = refused(
        1, "density", "--embeddings", given / "x.npy", "--run", run, "--set", f"density.k={ROWS + 1}"
    )
    assert f"density.k = {ROWS + 1}" in said and f"density.k to {ROWS}" in said
    assert not (run / "density").exists()


def test_a_preset_that_asks_for_more_than_there_is_says_so(given, run):
    words = ("--embeddings", given / "x.npy", "--run", run, "--preset", "usl-cifar10")
    assert "density.k = 400" in refused(1, "select", *words, "--budget", 3)


# Places


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_run_at_or_below_a_file_is_refused(given, tmp_path, place):
    (tmp_path / "file").write_text("a file of somebody")
    said = refused(1, "select", "--images", given / "images", "--run", tmp_path / place, "--budget", 3)
    assert str(tmp_path / place) in said and "--run" in said
    assert (tmp_path / "file").read_text() == "a file of somebody"


@pytest.mark.parametrize(("place", "status"), [("/proc/nope/run", 1), ("nowhere://bucket/run", 2)])
def test_a_run_where_nothing_can_be_written_is_refused(given, place, status):
    said = refused(status, "select", "--images", given / "images", "--run", place, "--budget", 3)
    assert place in said and "--run" in said


def test_a_run_without_a_name_is_not_the_folder_one_is_in(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--run" in refused(2, "select", "--images", given / "words", "--run", "", "--budget", 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["empty", "words", "nope", "x.npy"])
def test_status_and_report_of_something_else_are_refused(given, place):
    before = content(given)
    assert "is not a run" in refused(1, "status", "--run", given / place)
    assert "is not a run" in line_of(ask("report", "--run", given / place), 1)
    assert content(given) == before


def test_debug_shows_where(given, run):
    result = ask("select", "--images", given / "nope", "--run", run, "--budget", 3, "--debug")
    assert result.exit_code == 1 and "no folder" in str(result.exception)


# Words about itself


def test_help_and_version():
    assert ask("--version").stdout == f"{__version__}\n"
    commands = ask("--help")
    assert commands.exit_code == 0 and commands.stderr == ""
    for name in ("select", "embed", "density", "cluster", "report", "status", "evaluate", "demo"):
        assert re.search(rf"^ +{name} ", commands.stdout, re.MULTILINE)
        assert ask(name, "--help").exit_code == 0
    options = ask("select", "--help").stdout
    for option in ("images", "embeddings", "run", "budget", "preset", "config", "set", "seed", "encoder"):
        assert f"--{option} " in options
    assert ask("select", "-h").stdout == options


# Done: 0


def test_a_finished_run_says_what_it_did_and_is_quiet_otherwise(two_cpus, given, run):
    result = ask("select", "--embeddings", given / "x.npy", "--run", run, "--budget", 5)
    assert result.exit_code == 0 and result.stderr == ""
    assert "60 found, 60 embedded, 0 rejected, 5 clusters, 5 selected" in result.stdout
    assert f"{run}/selection/selection.csv" in result.stdout
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    with (run / "selection" / "selection.csv").open() as file:
        picked = list(csv.DictReader(file))
    assert [row["cluster_id"] for row in picked] == list("01234")
    assert all(row["uri"] == f"{given / 'x.npy'}#{row['image_id']}" for row in picked)
    assert not (run / "lease.json").exists()
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("begun.json"))


def test_a_finished_run_has_nothing_to_do_and_is_not_touched(given, finished):
    before = content(finished)
    words = ("select", "--embeddings", given / "x.npy", "--run", finished, "--budget", 5, "--seed", 3)
    again = ask(*words)
    assert again.exit_code == 0 and "nothing to do" in again.stdout and again.stderr == ""
    as_json = ask(*words, "--json")
    assert as_json.exit_code == 0 and as_json.stderr == ""
    found = json.loads(as_json.stdout)
    assert found["selected"] == 5 and found["run"] == str(finished)
    assert "selection" in found["already_complete"] and found["warnings"] == []
    assert content(finished) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--budget", "5", "--seed", "4"], "seed is 3 there and 4 here"),
        (["--budget", "6", "--seed", "3"], "budget is 5 there and 6 here"),
        (["--budget", "5", "--seed", "3", "--set", "density.k=7"], "density.k is 20 there and 7 here"),
        (["--budget", "5", "--seed", "3", "--set", "selection.density_cost=0.3"], "0.2 there and 0.3 here"),
        (
            ["--budget", "5", "--seed", "3", "--set", "selection.weight=3"],
            "selection.method is prototypes there and usl here",
        ),
        (["--budget", "5", "--seed", "3", "--set", "embed.dtype=float16"], "float32 there and float16 here"),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_not_touched(given, finished, words, expected):
    before = content(finished)
    said = refused(1, "select", "--embeddings", given / "x.npy", "--run", finished, *words)
    assert expected in said and "another --run" in said and str(finished) in said
    assert content(finished) == before


def test_a_run_of_another_source_is_refused_and_not_touched(given, finished, tmp_path):
    np.save(tmp_path / "y.npy", np.load(given / "x.npy")[::-1])
    before = content(finished)
    for source in (("--embeddings", tmp_path / "y.npy"), ("--images", given / "images")):
        said = refused(1, "select", *source, "--run", finished, "--budget", 5, "--seed", 3)
        assert "source" in said and "another --run" in said
    assert content(finished) == before


def test_status_tells_what_is_complete(finished, tmp_path):
    states = json.loads(ask("status", "--run", finished, "--json").stdout)
    assert {name: state["state"] for name, state in states.items()} == dict.fromkeys(
        ("images", "embeddings", "rejected", "density", "clusters", "selection"), "complete"
    )
    assert states["selection"]["rows"] == 5 and states["embeddings"]["rows"] == ROWS
    lines = ask("status", "--run", finished).stdout.splitlines()
    assert len(lines) == 6 and re.match(r"selection +complete +rows 5", lines[-1])


def test_a_budget_larger_than_the_embeddings_is_refused_and_a_smaller_one_then_taken(two_cpus, given, run):
    words = ("select", "--embeddings", given / "x.npy", "--run", run, "--budget")
    said = refused(1, *words, ROWS + 1)
    assert f"budget {ROWS + 1}" in said and f"{ROWS} or fewer" in said
    result = ask(*words, ROWS, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["selected"] == ROWS


def test_another_weight_reuses_the_embeddings_of_a_run_and_leaves_it_untouched(two_cpus, finished, run):
    before = content(finished)
    options = ("--budget", 5, "--seed", 3, "--set", "selection.weight=3")
    result = ask("select", "--embeddings", finished, "--run", run, *options, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    states = json.loads(ask("status", "--run", run, "--json").stdout)
    refers = {name for name, state in states.items() if state["refers_to"] == str(finished)}
    assert refers == {"images", "embeddings", "rejected", "density", "clusters"}
    assert content(finished) == before


def test_a_folder_of_images_some_of_them_broken(two_cpus, given, run):
    """Six files, five images: known only once they are read, when a budget of six turns out too large."""
    before = content(given)
    options = ("--encoder", "pca", "--set", "embed.image_size=8", "--set", "resources.workers=1")
    words = ("select", "--images", given / "images", "--run", run, *options, "--budget")
    too_many = ask(*words, 6)
    assert too_many.exit_code == 1 and "5 embedded images" in too_many.stderr.splitlines()[-1]
    # A smaller budget is then taken, and the default k, larger than the images allow, lowered with a warning.
    result = ask(*words, 5)
    assert "density.k" in line_of(result, 0) and "warning" in result.stderr and "to 5" in result.stderr
    assert "6 found, 5 embedded, 1 rejected" in result.stdout
    assert re.search(r"^rejected +1 ", result.stdout, re.MULTILINE)
    found = json.loads(ask(*words, 5, "--json").stdout)
    assert found["rejected"] == 1 and found["selected"] == 5
    assert any("density.k" in warning for warning in found["warnings"])
    with (run / "selection" / "selection.csv").open() as file:
        picked = {row["uri"] for row in csv.DictReader(file)}
    assert picked == {str(given / "images" / f"{i}.png") for i in range(5)}
    assert content(given) == before


# As a process


def command(*words: object, **options: object) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "selective_ray", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
        **options,
    )


def test_the_process_has_the_same_words_and_status(given, run):
    assert command("--version").stdout == f"{__version__}\n"
    wrong = command("select", "--images", given / "images", "--run", run, "--budget", 0)
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.splitlines()) == 1
    failed = command("status", "--run", given, "--json")
    assert failed.returncode == 1 and "is not a run" in json.loads(failed.stdout)["error"]
    assert len(failed.stderr.splitlines()) == 1


def test_a_process_with_its_own_ray_is_quiet(given, run):
    """Not a terminal: the summary on stdout, and not a word of Ray's or of progress on stderr."""
    words = ("--embeddings", given / "x.npy", "--run", run, "--budget", 4, "--set", "resources.workers=1")
    done = command("cluster", *words, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["clusters"] == 4
