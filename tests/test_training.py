"""Training: the same for any interruption and any number of workers, and sentences for what cannot be."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray.util import placement_group, remove_placement_group
from tensorboardX.proto import event_pb2
from test_chaos import SCRIPT
from test_cli import ask, refused
from test_faults import killer

from selective_ray import config, held_out, labeling, objects, training, trial, truth
from selective_ray.actors import pipeline
from selective_ray.actors import training as actors_training
from selective_ray.actors.fixmatch import train
from selective_ray.actors.training import _workers
from selective_ray.errors import UserError
from selective_ray.pixels import Pixels
from selective_ray.progress import Reporter
from selective_ray.store import Run
from selective_ray.training import Training

CLASSES = ("blue", "green", "red")
SMALL = {
    "train.network": "wrn-10-1",
    "train.image_size": 8,
    "train.steps": 12,
    "train.batch": 6,
    "train.unlabeled_ratio": 2,
    "train.threshold": 0.4,
    "train.average": 0.5,
    "train.checkpoint_every": 4,
    "train.evaluate_every": 6,
    "train.lr": 0.05,
    "resources.workers": 1,
}


ON_TWO = {"train.steps": 200, "train.checkpoint_every": 10, "train.precision": "float64"}
LONG = {"train.steps": 150, "train.checkpoint_every": 30, "train.evaluate_every": 50}


def paint(folder, count, seed):
    """Noisy images of one of three colors, in a folder for each."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 90, (20, 24, 3))
        pixels[..., 2 - i % 3] += 130
        (folder / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / CLASSES[i % 3] / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def labeled(two_cpus, tmp_path_factory):
    """A run of 90 images, one of which cannot be read, whose picks are labeled."""
    base = tmp_path_factory.mktemp("training")
    images = paint(base / "images", 90, 0)
    (images / "blue" / "broken.png").write_bytes(b"no image")
    run = Run(str(base / "run"))
    options = {"selection.budget": 9, "embed.encoder": "pca", "embed.image_size": 8, "resources.workers": 1}
    settings, asked = config.load(options=options)
    pipeline.advance(
        run, pipeline.Source(str(images)), settings, asked, Reporter(quiet=True), upto="selection"
    )
    lines = ["image_id,label"]
    for row in run.read_shard("selection", 0).to_pylist():
        lines.append(f"{row['image_id']},{row['uri'].split('/')[-2]}")
    (base / "labels.csv").write_text("\n".join(lines))
    labeling.bring_labels(run, str(base / "labels.csv"), replace=False, reporter=Reporter(quiet=True))
    return run


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return held_out.read(str(paint(tmp_path_factory.mktemp("held-out"), 30, 1)))


def trained(run, name, others=held_out.NONE, reporter=None, until=None, known=None, **options):
    settings, _ = config.load(options={**SMALL, **options}, own_embeddings=True)
    how = {"until": until, "held_out": others, "truth": known}
    return train(run, settings, name, reporter or Reporter(quiet=True), **how)


def state(run, name):
    found = Training(run, name).newest(print)
    return found[0], {
        f"{part}.{key}": value for part in ("network", "average") for key, value in found[1][part].items()
    }


def without_speed(lines):
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(labeled, others):
    done, _ = trained(labeled, "whole", others, known=truth.read([labeled], truth.FOLDERS), **LONG)
    return done


def test_training_learns_the_colors(labeled, whole):
    assert whole.summary["accuracy"] > 0.9
    lines = Training(labeled, "whole").metrics()
    told = [line for line in lines if "loss" in line]
    # Every step is in one line, and every image that was seen has a pseudo-label.
    assert [line["step"] for line in told] == list(np.cumsum([line["steps"] for line in told]))
    assert told[-1]["step"] == 150
    assert told[-1]["loss"] < told[0]["loss"]
    assert told[-1]["mask_rate"] > 0.5 and told[-1]["impurity"] < 0.2
    assert sum(told[-1]["confident"].values()) <= told[-1]["steps"] * 12
    judged = [line for line in lines if "accuracy" in line]
    assert [line["step"] for line in judged] == [50, 100, 150]
    assert np.sum(judged[-1]["confusion"]) == 30 and set(judged[-1]["by_class"]) == set(CLASSES)
    # What is kept of checkpoints is bounded.
    assert [step for step, _ in Training(labeled, "whole").checkpoints()] == [150, 120, 90]


def test_a_finished_training_is_not_begun_again(labeled, whole):
    again, summary = trained(labeled, "whole", **LONG)
    assert again == whole and summary == whole.summary


def test_a_killed_worker_costs_steps_and_not_the_training(labeled, others, whole):
    """It goes on from the newest checkpoint: the same weights to the bit, no gap and no line twice."""
    folder, reporter = Training(labeled, "killed"), Reporter(quiet=True)
    with killer("ray::RayTrainWorker", lambda: len(folder.checkpoints()) >= 2) as killed:
        done, _ = trained(
            labeled, "killed", others, reporter, known=truth.read([labeled], truth.FOLDERS), **LONG
        )
    assert killed and done is not None
    assert any("goes on from step" in words for words in reporter.warnings)
    (_, mine), (_, expected) = state(labeled, "killed"), state(labeled, "whole")
    assert all(torch.equal(mine[name], value) for name, value in expected.items())
    assert without_speed(folder.metrics()) == without_speed(Training(labeled, "whole").metrics())


def test_selections_are_compared_by_what_fixmatch_learns_from_them(labeled, monkeypatch):
    """The colors are told from six labels, and nothing is trained twice."""
    options = {**SMALL, "train.steps": 60}
    sets = [
        word
        for key, value in options.items()
        if key != "resources.workers"
        for word in ("--set", f"{key}={value}")
    ]
    words = "compare", "--run", labeled.uri, "--labels", "folders", "--seeds", 2, "--methods", "random", *sets
    words = *words, "--budgets", "6"
    result = ask(*words, "--fixmatch", "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    told = {one["method"]: one for one in json.loads(result.stdout)["methods"]}
    (usl, random) = (told[name]["figures"]["fixmatch"] for name in ("usl", "random"))
    assert len(usl) == len(random) == 2 and min(usl) > 0.8
    assert told["usl"]["difference"]["random"]["fixmatch"]["mean"] == pytest.approx(
        np.mean(usl) - np.mean(random)
    )
    assert "FixMatch was trained once" in labeled.read_bytes("comparison", "index.html").decode()
    monkeypatch.setattr(trial.Trial, "accuracy", None)
    again = json.loads(ask(*words, "--fixmatch", "--json").stdout)
    assert {one["method"]: one["figures"]["fixmatch"] for one in again["methods"]} == {
        "usl": usl,
        "random": random,
    }
    said = refused(2, *words)
    assert "compare does not take train." in said


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    folder = Training(Run(str(tmp_path)), "x")
    for step in (4, 8, 12, 16):
        folder.save(step, {"step": torch.tensor(step)})
    assert [step for step, _ in folder.checkpoints()] == [16, 12, 8]
    for _, name in folder.checkpoints()[:2]:
        data = bytearray(folder.run.read_bytes(folder.table, name))
        data[len(data) // 2] ^= 1
        folder.run.write_bytes(bytes(data), folder.table, name)
    said = []
    step, found = folder.newest(said.append)
    assert step == 8 and found["step"] == 8
    assert len(said) == 2 and "is damaged; the one before it is taken" in said[0]
    assert Training(folder.run, "y").newest(said.append) == (0, None)


def test_more_workers_than_there_is_room_for(two_cpus):
    reporter = Reporter(quiet=True)
    options = {"resources.workers": 6, "resources.start_seconds": 1.5}
    settings, _ = config.load(options=options, own_embeddings=True)
    workers, room, _ = _workers(settings, settings.train.batch, reporter)
    assert (workers, room) == (6, 4)
    assert any("waiting for 6 workers: the cluster has room for 4" in words for words in reporter.warnings)
    assert any("training with 4 workers" in words for words in reporter.warnings)


def test_machines_come_for_the_workers_that_are_asked_for(two_cpus):
    for asked, expected in ((6, 6), (None, 1)):
        reporter = Reporter(quiet=True)
        options = {"resources.workers": asked, "resources.autoscale": True, "resources.gpus_per_worker": 1.0}
        settings, _ = config.load(options=options, own_embeddings=True)
        workers, room, each = _workers(settings, settings.train.batch, reporter)
        assert (workers, room, each["GPU"]) == (expected, 1, 1.0) and not reporter.warnings


@pytest.mark.faults
def test_a_training_that_waits_for_its_place_says_why(labeled):
    """Another job has all CPUs: Ray would wait without a word."""
    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    reporter = Reporter(quiet=True)

    def let_go():
        until = time.monotonic() + 120
        while time.monotonic() < until and not any("in use" in words for words in reporter.warnings):
            time.sleep(0.1)
        remove_placement_group(held)

    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    done, _ = trained(labeled, "waits", reporter=reporter, **{"resources.stall_seconds": 4})
    assert done is not None and not thread.is_alive()
    said = [words for words in reporter.warnings if "nothing has come" in words]
    assert any("0.45 CPU" in words and "is in use" in words for words in said), said


def _failing(monkeypatch, tmp_path, errors, checkpoints):
    """What comes of a training whose attempts end by these errors, each after a checkpoint or none."""
    folder = Training(Run(str(tmp_path)), "x")
    attempts = []

    def fit(job, workers, each):
        if checkpoints:
            folder.save(10 * (len(attempts) + 1), {"step": torch.tensor(0)})
        attempts.append(errors[len(attempts)])
        return attempts[-1]

    monkeypatch.setattr(actors_training, "_fit", fit)
    job = SimpleNamespace(training=folder, until=100, desk=actors_training.Desk.remote())
    reporter = Reporter(quiet=True)
    try:
        actors_training._until_done(job, 1, {"CPU": 1}, reporter, lambda: None)
        return len(attempts), None, reporter.warnings
    except UserError as error:
        return len(attempts), str(error), reporter.warnings


def test_three_failures_without_a_checkpoint_end_a_training(monkeypatch, tmp_path, two_cpus):
    attempts, said, _ = _failing(monkeypatch, tmp_path, ["it broke"] * 9, checkpoints=False)
    assert attempts == 3 and "failed 3 times without a new checkpoint between, at step 0: it broke" in said


def test_failures_with_checkpoints_between_do_not(monkeypatch, tmp_path, two_cpus):
    attempts, said, warnings = _failing(monkeypatch, tmp_path, ["a node went"] * 5 + [None], checkpoints=True)
    assert (attempts, said, len(warnings)) == (6, None, 5)
    assert "goes on from step 50; 0 steps are taken again (a node went)" in warnings[-1]


def test_numbers_go_to_tensorboard(labeled, whole):
    """The same as in the lines of the metrics."""
    folder = Training(labeled, "whole")
    told = {}
    names = objects.names(labeled.path(folder.table, training.EVENTS))
    for name in names:
        for event in _events(labeled.read_bytes(folder.table, training.EVENTS, name)):
            for value in event.summary.value:
                assert told.setdefault((event.step, value.tag), value.simple_value) == value.simple_value
    expected = {
        (line["step"], key): value
        for line in folder.metrics()
        for key, value in line.items()
        if isinstance(value, float)
    }
    assert len(names) == 5 and told.keys() == expected.keys()
    assert [told[key] for key in expected] == pytest.approx(list(expected.values()))


def _events(data):
    """Read a file of TensorBoard: records of length, its checksum, content and its checksum."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def test_what_is_half_written_is_removed(tmp_path):
    folder = Training(Run(str(tmp_path)), "x")
    folder.save(4, {"step": torch.tensor(4)})
    for step in (4, 8):
        folder.write_metrics([{"step": step, "loss": 1.0}], 1)
    folder.run.write_bytes(b"", folder.table, training.EVENTS, "events.out.tfevents.0000000004.ab12.tmp")
    folder.run.write_bytes(b"", folder.table, "step-00000008-0123456789abcdef.pt.cd34.tmp")
    folder.clean(4)
    assert objects.names(folder.run.path(folder.table, training.EVENTS)) == ["events.out.tfevents.0000000004"]
    assert [name for name in objects.names(folder.run.path(folder.table)) if name.endswith(".tmp")] == []
    assert len(folder.checkpoints()) == 1


@pytest.mark.faults
def test_the_command_trains_in_parts(labeled, others, tmp_path):
    images = paint(tmp_path / "held-out", 30, 1)
    options = {key: value for key, value in SMALL.items() if key != "train.checkpoint_every"}
    sets = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    words = ["train", "--run", labeled.uri, "--name", "command", "--preset", "fixmatch-cifar10", *sets]
    words += ["--set", "train.checkpoint_every=4", "--validation", images, "--truth", "folders"]
    first = ask(*words, "--until", 4, "--json")
    assert first.exit_code == 0, first.stderr or first.exception
    told = json.loads(first.stdout)
    assert told["steps"] == 4 and not told["complete"] and labeled.manifest("training/command") is None
    # The newest checkpoint is damaged: the same command takes these steps again.
    (step, newest), *_ = Training(labeled, "command").checkpoints()
    labeled.write_bytes(b"damaged", "training/command", newest)
    again = json.loads(ask(*words, "--until", 4, "--json").stdout)
    assert step == 4 and again["steps"] == 4 and state(labeled, "command")[0] == 4
    rest = ask(*words)
    assert rest.exit_code == 0, rest.stderr or rest.exception
    for expected in (
        "9 labels of 3 classes, 12 steps\n",
        "% of these wrong",
        "accuracy ",
        "training-command.html",
    ):
        assert expected in rest.stdout, rest.stdout
    assert labeled.manifest("training/command").summary["steps"] == 12


def test_other_labels_or_another_recipe_are_refused(labeled, whole):
    with pytest.raises(UserError, match=r"train.lr is 0.05 there and 0.1 here.*another --name"):
        trained(labeled, "whole", **LONG, **{"train.lr": 0.1})


def test_bad_input_gets_a_sentence(labeled, tmp_path, two_cpus):
    with pytest.raises(UserError, match=r"train\.network = 'wrn-11-2' is not known"):
        trained(labeled, "x", **{"train.network": "wrn-11-2"})
    with pytest.raises(UserError, match="--name 'a/b' is no name"):
        trained(labeled, "a/b")
    settings, asked = config.load(
        options={"selection.budget": 9, "embed.encoder": "pca", "embed.image_size": 8}, own_embeddings=True
    )
    bare = Run(str(tmp_path / "bare"))
    source = pipeline.Source(embeddings=labeled.uri)
    pipeline.advance(bare, source, settings, asked, Reporter(quiet=True), upto="selection")
    with pytest.raises(UserError, match=r"has no labels; `selective-ray export`"):
        trained(bare, "x")
    file = tmp_path / "one.csv"
    file.write_text("image_id,label\n3,red\n4,red\n")
    labeling.bring_labels(bare, str(file), replace=False, reporter=Reporter(quiet=True))
    with pytest.raises(UserError, match=r"all 2 labels of .* are 'red': a classifier needs two classes"):
        trained(bare, "x")
    other = tmp_path / "other.pt"
    torch.save({"conv.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match="is of another network than wrn-10-1"):
        trained(labeled, "x", **{"train.checkpoint": str(other)})
    with pytest.raises(UserError, match="holds no folders of two classes"):
        held_out.read(str(paint(tmp_path / "one", 1, 0)))


def test_decoded_images_are_the_same_from_the_disk_and_from_the_store(labeled):
    ids = np.random.default_rng(0).permutation(90)
    ids = ids[ids != labeled.read_shard("rejected", 0)["image_id"][0].as_py()]
    direct = Pixels.of_run(labeled, size=10, limit=0)
    kept = Pixels.of_run(labeled, size=10, limit=1e9)
    expected = direct.get(ids)
    assert np.array_equal(kept.get(ids[:30]), expected[:30])
    assert np.array_equal(kept.get(ids), expected)
    # From now on the store is not asked.
    kept.how["read"] = None
    assert np.array_equal(kept.get(ids[::-1]), expected[::-1])
    assert direct.kept == 0


def test_metrics_are_lines_of_json(labeled, whole):
    text = labeled.read_bytes("training/whole", training.METRICS).decode()
    assert all(isinstance(json.loads(line)["step"], int) for line in text.splitlines())


@pytest.mark.faults
def test_another_number_of_workers_continues_from_the_last_whole_checkpoint(labeled, others):
    """One worker, a damaged checkpoint, then two workers: what one worker learns that is not interrupted."""
    exact = {"train.precision": "float64", "train.batch": 7}
    trained(labeled, "at-once", others, **exact)
    done, summary = trained(labeled, "in-parts", others, until=8, **exact)
    assert done is None and summary["steps"] == 8
    parts = Training(labeled, "in-parts")
    assert [step for step, _ in parts.checkpoints()] == [8, 4]
    newest = parts.checkpoints()[0][1]
    data = bytearray(labeled.read_bytes(parts.table, newest))
    data[len(data) // 2] ^= 1
    labeled.write_bytes(bytes(data), parts.table, newest)
    reporter = Reporter(quiet=True)
    done, _ = trained(labeled, "in-parts", others, reporter, **exact, **{"resources.workers": 2})
    assert done is not None
    assert any(newest in words and "is damaged" in words for words in reporter.warnings)
    step, mine = state(labeled, "in-parts")
    expected_step, expected = state(labeled, "at-once")
    assert step == expected_step == 12
    for name, value in expected.items():
        assert torch.allclose(value.double(), mine[name].double(), rtol=0, atol=1e-6), name
    told, lines = parts.metrics(), Training(labeled, "at-once").metrics()
    assert [line["step"] for line in told] == [line["step"] for line in lines]
    assert [line["loss"] for line in told if "loss" in line] == pytest.approx(
        [line["loss"] for line in lines if "loss" in line], abs=1e-6
    )


@pytest.mark.faults
def test_a_class_without_labels_is_told_of_and_numbers_go_to_weights_and_biases(labeled, tmp_path):
    file = tmp_path / "held-out.csv"
    image = paint(tmp_path / "images", 3, 0) / "red" / "002.png"
    file.write_text(f"uri,label\n{image},red\n{image},purple\n")
    reporter, options = Reporter(quiet=True), {"train.steps": 2, "resources.wandb": "tests"}
    done, _ = trained(labeled, "purple", held_out.read(str(file)), reporter, **options)
    assert any("no labeled image is of purple" in words for words in reporter.warnings)
    assert done.summary["accuracy"] <= 0.5
    identity = f"purple-{Training(labeled, 'purple').fingerprint()}"
    (offline,) = Path(os.environ["WANDB_DIR"]).glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")
    assert b"mask_rate" in offline.read_bytes()


# A command on a cluster of two nodes, of which something is killed after the second checkpoint of a training.
ON_NODES = """
import os, signal, subprocess, sys, time
from chaos import Machines
from selective_ray.store import Run
from selective_ray.training import Training

victim, uri, name, *words = sys.argv[1:]
machines = Machines()
cluster = machines.cluster

def begin():
    return subprocess.Popen([sys.executable, "-m", "selective_ray", *words, "--address", cluster.address])

try:
    command = begin()
    while len(Training(Run(uri), name).checkpoints()) < 2:
        assert command.poll() is None
        time.sleep(0.01)
    if victim == "node":
        cluster.remove_node(machines.nodes[0], allow_graceful=False)
    elif victim == "worker":
        pid = next(pid for pid, title in machines.workers() if title.startswith("ray::RayTrainWorker"))
        os.kill(pid, signal.SIGKILL)
    else:
        command.kill()
        command.wait()
        assert Run(uri).manifest(f"training/{name}") is None
        command = begin()
    assert command.wait() == 0
finally:
    machines.stop()
"""


def on_nodes(victim, uri, name, options, *words):
    """Run a command on two nodes while something is killed; returns how many steps were taken again."""
    sets = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    script = [sys.executable, "-c", ON_NODES, victim, uri, name, *map(str, words), *sets]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(SCRIPT.parent)}
    answer = subprocess.run(script, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [int(steps) for steps in re.findall(r"goes on from step \S+; (\d+)\s+steps", answer.stderr)]


@pytest.fixture(scope="module")
def undisturbed(labeled):
    """The weights that one worker learns of ON_TWO, to compare with."""
    trained(labeled, "undisturbed", **ON_TWO, **{"resources.workers": 1})
    return state(labeled, "undisturbed")


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["worker", "node", "driver"])
def test_killed_on_two_nodes(victim, labeled, undisturbed):
    """A worker; a node with its worker and the tasks that bring images; the command, which is given again."""
    options, name = {**SMALL, **ON_TWO, "resources.workers": 2}, f"two-nodes-{victim}"
    again = on_nodes(victim, labeled.uri, name, options, "train", "--run", labeled.uri, "--name", name)
    assert (again or victim == "driver") and all(steps <= 20 for steps in again)
    step, mine = state(labeled, name)
    assert step == undisturbed[0] == 200 and labeled.manifest(f"training/{name}") is not None
    for key, value in undisturbed[1].items():
        assert torch.allclose(value.double(), mine[key].double(), rtol=0, atol=1e-6), key
    steps = [line["steps"] for line in Training(labeled, name).metrics() if "steps" in line]
    assert sum(steps) == 200


@pytest.mark.faults
def test_the_driver_interrupted_and_killed_while_training(labeled):
    """The same command goes on from the newest checkpoint, and ends as one that was not disturbed."""
    options = {**SMALL, "train.steps": 240, "train.checkpoint_every": 10}
    sets = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    words = [sys.executable, "-m", "selective_ray", "train", "--run", labeled.uri, "--debug", *sets]
    words += ["--name", "driver"]
    folder = Training(labeled, "driver")
    for by in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        step = 20 + max((step for step, _ in folder.checkpoints()), default=0)
        driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not folder.checkpoints() or folder.checkpoints()[0][0] < step:
                assert driver.poll() is None, driver.stderr.read()
                time.sleep(0.002)
            driver.send_signal(by)
            said = driver.communicate(timeout=60)[1]
        finally:
            driver.kill()
        assert labeled.manifest(folder.table) is None, "it was finished before"
        if by != signal.SIGKILL:
            assert driver.returncode == 130 and "interrupted; run the same command again" in said
            assert "SIGTERM received" not in said, said
            assert not labeled.exists("lease.json"), "a polite end gives the lease back"
    answer = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "240 steps" in answer.stdout
    trained(labeled, "quiet", **options)
    (_, mine), (_, quiet) = state(labeled, "driver"), state(labeled, "quiet")
    assert all(torch.equal(mine[name], value) for name, value in quiet.items())
    assert without_speed(folder.metrics()) == without_speed(Training(labeled, "quiet").metrics())
