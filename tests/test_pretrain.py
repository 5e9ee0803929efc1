"""Encoders that are learned: the same for any interruption, used by their run's name, read by other tools."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_faults import killer
from test_training import CLASSES, on_nodes, paint, without_speed

from selective_ray import checkpoints, classifiers, config, encoders, learned
from selective_ray.actors import pipeline
from selective_ray.actors.pretraining import Contrast, pretrain
from selective_ray.actors.training_worker import Place, _readable
from selective_ray.batches import Plan
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.store import Run
from selective_ray.training import Training

SMALL = {
    "pretrain.network": "wrn-10-1",
    "pretrain.image_size": 8,
    "pretrain.steps": 12,
    "pretrain.batch": 16,
    "pretrain.queue": 32,
    "pretrain.groups": 3,
    "pretrain.lr": 0.05,
    "pretrain.checkpoint_every": 4,
    "pretrain.evaluate_every": 6,
    "resources.workers": 1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ninety images, two of which cannot be read."""
    folder = paint(tmp_path_factory.mktemp("pretrain") / "images", 90, 0)
    (folder / "blue" / "broken.png").write_bytes(b"no image")
    (folder / "green" / "empty.png").write_bytes(b"")
    return folder


def taught(images, run, name="pretrain", reporter=None, until=None, known=None, **options):
    settings, _ = config.load(options={**SMALL, **options}, own_embeddings=True)
    run = Run(str(run))
    reporter = reporter or Reporter(quiet=True)
    return pretrain(run, str(images), settings, name, reporter, until=until, truth=known)


@pytest.fixture(scope="module")
def run(two_cpus, images, tmp_path_factory):
    """A run with an encoder by CLD, which does what MoCo does, too."""
    place = tmp_path_factory.mktemp("run") / "run"
    done, _ = taught(images, place, known="folders", **{"pretrain.method": "cld"})
    assert done.summary["method"] == "cld"
    return Run(str(place))


def alone(place, method, network, size=8, steps=1, said=None):
    """An encoder learned in this process, and what its worker says; without the stream of images."""
    options = {**SMALL, "pretrain.method": method, "pretrain.network": network, "pretrain.batch": 4}
    settings = config.load(options=options)[0].pretrain.model_copy(update={"image_size": size})
    one = Training(Run(str(place)), "pretrain")
    one.run.prepare()
    what = {"pretrain": settings.model_dump(exclude={"evaluate_every", "checkpoint_every"}), "seed": 0}
    one.begin(what, {"images": "none"})
    plan = Plan(np.empty(0, np.int64), 9, np.empty(0, np.int64), 0, 4, 0)
    job = SimpleNamespace(plan=plan, run=one.run, training=one)
    torch.manual_seed(0)
    lesson = Contrast(settings, np.arange(6), None).begin(
        job, Place(0, 1, "cpu", ([] if said is None else said).append)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (9, size, size, 3), dtype=np.uint8)
    job.pixels = lambda: SimpleNamespace(tried=lambda ids: (pixels[ids], {}))
    for t in range(steps):
        lesson.step(t, plan.step(t), pixels[plan.step(t)])
    one.save(steps, lesson.state())
    lesson.export()
    return one, lesson


def weights(run):
    step, state = Training(run, "pretrain").newest(print)
    return step, state["network"] | {"queue": state["queue"]}


def test_lines_tell_whether_it_works(run):
    lines = Training(run, "pretrain").metrics()
    told = [line for line in lines if "loss" in line]
    assert [line["step"] for line in told] == [4, 8, 12]
    assert all(line["steps"] == 4 and 0 <= line["found"] <= 1 and "group" in line for line in told)
    # Two of 92 images cannot be read, and others took their places.
    assert 0 < sum(line["replaced"] for line in told) < 12 * 16 / 4
    watched = [line for line in lines if "effective_rank" in line]
    assert [line["step"] for line in watched] == [6, 12]
    assert all(1 <= line["effective_rank"] <= 64 and line["uniformity"] <= 0 for line in watched)
    assert all(0 <= line["neighbors_accuracy"] <= 1 for line in watched)
    page = run.read_bytes("report", "training-pretrain.html").decode()
    assert "Effective rank" in page and "have mostly neighbors" in page


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_worker_of_the_other_methods(method, tmp_path):
    one, lesson = alone(tmp_path / "run", method, "wrn-10-1", steps=3)
    line, words = lesson.line()
    assert ("group" in line) is False and line["loss"] == pytest.approx(line["instance"]) and "loss" in words
    found = lesson.evaluate()
    assert 1 <= found["effective_rank"] <= 5 and "neighbors_accuracy" not in found
    assert learned.exported(one).method == method


def test_a_collapse_is_said(tmp_path):
    said = []
    _, lesson = alone(tmp_path / "run", "simclr", "wrn-10-1", said=said)
    lesson.evaluate()
    assert said == []
    for value in lesson.learner.network.parameters():
        torch.nn.init.zeros_(value)
    lesson.learner.network.trunk.norm.bias.data += torch.arange(64.0)
    lesson.evaluate()
    assert len(said) == 1 and "the features have collapsed" in said[0]


def test_the_run_is_an_encoder(run, images, tmp_path):
    """By its name in `embed`, the same by its weights wherever it is moved to."""
    name = f"{run.uri}/training/pretrain"
    settings, asked = config.load(options={"embed.encoder": name, "resources.workers": 1})
    pipeline.advance(
        (embedded := Run(str(tmp_path / "run"))),
        pipeline.Source(str(images)),
        settings,
        asked,
        Reporter(quiet=True),
        upto="embeddings",
    )
    manifest = embedded.manifest("embeddings")
    assert manifest.rows == 90 and manifest.summary["dimension"] == 64
    made = learned.find(name)[0]
    assert manifest.what["embed"]["weights"] == f"sha256:{made.sha256}" and made.image_size == 8
    _, x = embedded.read_embeddings(0)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    # Features of a network that has seen the colors tell them apart.
    uris = embedded.listed(embedded.read_embeddings(0)[0])["uri"].to_pylist()
    classes = np.array([CLASSES.index(uri.split("/")[-2]) for uri in uris])
    cosines = x @ x.T
    np.fill_diagonal(cosines, -1)
    assert (classes[cosines.argmax(axis=1)] == classes).mean() > 0.9


def test_damaged_weights_are_told(run, tmp_path):
    folder = tmp_path / "training" / "pretrain"
    folder.mkdir(parents=True)
    for name in (learned.DESCRIPTION, learned.WEIGHTS):
        data = run.read_bytes("training", "pretrain", name)
        (folder / name).write_bytes(data if name == learned.DESCRIPTION else data[:-1])
    assert learned.find(str(tmp_path))[0] == learned.find(run.root)[0]
    with pytest.raises(UserError, match="is not what was written"):
        learned.load(str(tmp_path), 8)
    with pytest.raises(UserError, match="no run with a learned encoder"):
        encoders.transform(f"{tmp_path}/training", None)


def test_published_layouts_are_read_by_name(tmp_path):
    """What is written as SCAN's, MoCo's and CLD's checkpoints is taken as theirs."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for method, name, network, wide, prefix in (
        ("simclr", "simclr", "cifar-resnet18", 512, "backbone."),
        ("cld", "cld", "cifar-resnet18", 128, ""),
        ("moco", "moco-v2", "resnet50", 2048, "encoder_q."),
    ):
        one, _ = alone(tmp_path / method, method, network, size=32)
        file = one.run.path("training", "pretrain", learned.PUBLISHED)
        published = encoders.load(name, checkpoint=file, image_size=32)
        assert published.dimension == wide and np.isfinite(published.encode(pixels)).all()
        # Its normalization may be another: it is the weights that are the same.
        theirs = checkpoints.located(checkpoints.read(file), (prefix,) if prefix else ())
        ours = learned.load(one.run.root, 32).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_published_layout_begins_a_training(tmp_path):
    one, _ = alone(tmp_path / "run", "moco", "wrn-10-1")
    network = classifiers.build("wrn-10-1", 3)
    classifiers.begin_from(network, "wrn-10-1", one.run.path("training", "pretrain", learned.PUBLISHED))
    trunk = learned.load(one.run.root, 8).state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in network.state_dict().items() if key in trunk)


def test_others_take_the_places_of_what_cannot_be_read():
    """By the seed, the step and the slot alone, whichever worker has it."""
    plan = Plan(np.empty(0, np.int64), 30, np.array([3]), 0, 6, 1)
    unread = {5, 8, 11}

    def tried(ids):
        bad = {row: "broken" for row, i in enumerate(ids.tolist()) if i in unread}
        return np.broadcast_to(ids[:, None, None, None], (len(ids), 2, 2, 3)).astype(np.uint8), bad

    pixels, steps = SimpleNamespace(tried=tried), list(range(10))
    whole = np.stack([plan.step(t) for t in steps])
    found = _readable(pixels, plan, steps, np.arange(6), whole)
    assert not np.isin(whole, [3, *unread]).any() and np.array_equal(found[:, 0, 0, 0], whole.reshape(-1))
    before = np.stack([plan.step(t) for t in steps])
    assert np.array_equal(whole == before, ~np.isin(before, list(unread)))
    for rank in range(2):
        part = before[:, rank::2].copy()
        _readable(pixels, plan, steps, np.arange(6)[rank::2], part)
        assert np.array_equal(part, whole[:, rank::2])
    unread = set(range(30))
    with pytest.raises(UserError, match="20 images in a row cannot be read, the last as broken"):
        _readable(pixels, plan, steps, np.arange(6), whole)


def test_bad_input(two_cpus, images, tmp_path):
    with pytest.raises(UserError, match="and there are 92; set a smaller one"):
        taught(images, tmp_path / "run", **{"pretrain.batch": 500, "pretrain.queue": 500})
    with pytest.raises(UserError, match="must hold the keys of a step"):
        config.load(options={"pretrain.queue": 10})
    with pytest.raises(UserError, match=r"pretrain\.network = 'resnet19' is not known"):
        taught(images, tmp_path / "run", **{"pretrain.network": "resnet19"})


@pytest.mark.faults
def test_a_killed_worker_costs_steps_and_not_the_training(two_cpus, images, tmp_path):
    options = {"pretrain.steps": 120, "pretrain.checkpoint_every": 20, "pretrain.method": "cld"}
    # Some evaluations fall on a checkpoint, and some between two.
    options["pretrain.evaluate_every"] = 30
    reporter = Reporter(quiet=True)
    # The other is ended elsewhere, politely, between two evaluations.
    for until in (80, None):
        taught(images, tmp_path / "whole", until=until, known="folders", **options)
    one = Training(Run(str(tmp_path / "killed")), "pretrain")
    with killer("ray::RayTrainWorker", lambda: len(one.checkpoints()) >= 2) as killed:
        done, _ = taught(images, one.run.root, reporter=reporter, known="folders", **options)
    assert killed and done is not None
    assert any("goes on from step" in words for words in reporter.warnings)
    whole = Training(Run(str(tmp_path / "whole")), "pretrain")
    (step, mine), (_, theirs) = weights(one.run), weights(whole.run)
    assert step == 120 and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert without_speed(one.metrics()) == without_speed(whole.metrics())


@pytest.mark.faults
def test_a_whole_node_killed_while_learning(images, tmp_path):
    """One of two nodes goes, with its worker and the tasks that bring images; one worker goes on."""
    options = {**SMALL, "pretrain.steps": 200, "pretrain.checkpoint_every": 10, "resources.workers": 2}
    run = str(tmp_path / "run")
    again = on_nodes("node", run, "pretrain", options, "pretrain", "--images", images, "--run", run)
    assert again and all(steps <= 20 for steps in again)
    place = Training(Run(str(tmp_path / "run")), "pretrain")
    assert sum(line["steps"] for line in place.metrics() if "steps" in line) == 200
    assert place.run.manifest(place.table) is not None and place.newest(print)[0] == 200


@pytest.mark.faults
def test_a_killed_driver_is_followed_by_the_same_command(images, tmp_path):
    options = {**SMALL, "pretrain.steps": 120, "pretrain.checkpoint_every": 20, "pretrain.method": "moco"}
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "selective_ray", "pretrain", "--images", str(images), "--json", *words]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    how = {"stdout": subprocess.PIPE, "env": environment}
    place = Training(Run(str(tmp_path / "run")), "pretrain")
    process = subprocess.Popen([*command, "--run", place.run.root], start_new_session=True, **how)
    deadline = time.monotonic() + 120
    while len(place.checkpoints()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    assert place.run.manifest(place.table) is None
    for run in (place.run.root, str(tmp_path / "whole")):
        done = subprocess.run([*command, "--run", run], check=True, **how)
        assert json.loads(done.stdout)["complete"]
    (step, mine), (_, theirs) = weights(place.run), weights(Run(run))
    assert step == 120 and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert without_speed(place.metrics()) == without_speed(Training(Run(run), "pretrain").metrics())
