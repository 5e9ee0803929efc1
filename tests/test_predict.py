"""Predictions: what the trained network says, whatever did the work; and the model in files."""

import json
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from test_cli import ask, line_of, refused
from test_faults import killer, under_way
from test_training import SMALL, paint

from selective_ray import classifiers, config, labeling
from selective_ray import model as files
from selective_ray.actors import pipeline
from selective_ray.actors.fixmatch import train
from selective_ray.actors.predictions import predict
from selective_ray.errors import UsageError, UserError
from selective_ray.fixmatch import Learner, Recipe
from selective_ray.pixels import Pixels
from selective_ray.progress import Reporter
from selective_ray.store import BEGUN, MANIFEST, Run
from selective_ray.training import Training

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs" / "predictions.md"


def predicted(run, reporter=None, *, workers=1, stall=300.0, name="fixmatch", **how):
    resources = {"resources.workers": workers, "resources.stall_seconds": stall}
    settings, _ = config.load(options={**resources, "embed.batch": 8})
    return predict(run, settings, name, reporter or Reporter(quiet=True), **how)


def rows_of(run: Run) -> pa.Table:
    return pa.concat_tables(run.read_shard("predictions", i) for i in run.finished_shards("predictions"))


@pytest.fixture(scope="module")
def trained(two_cpus, tmp_path_factory):
    """A run of 60 images in 4 shards, one image more that cannot be read, and a training of 2 steps."""
    base = tmp_path_factory.mktemp("predict")
    images = paint(base / "images", 60, 0)
    (images / "blue" / "broken.png").write_bytes(b"no image")
    run, source = Run(str(base / "run")), pipeline.Source(str(images))
    options = {"selection.budget": 9, "embed.encoder": "pca", "embed.image_size": 8, "resources.workers": 1}
    settings, asked = config.load(options={**options, "resources.shard_rows": 16})
    pipeline.advance(run, source, settings, asked, Reporter(quiet=True), upto="selection")
    lines = ["image_id,label"]
    for row in run.read_shard("selection", 0).to_pylist():
        lines.append(f"{row['image_id']},{row['uri'].split('/')[-2]}")
    (base / "labels.csv").write_text("\n".join(lines))
    labeling.bring_labels(run, str(base / "labels.csv"), replace=False, reporter=Reporter(quiet=True))
    settings, _ = config.load(options={**SMALL, "train.steps": 2}, own_embeddings=True)
    done, _ = train(run, settings, "fixmatch", Reporter(quiet=True))
    assert done is not None
    return run


@pytest.fixture(scope="module")
def done(trained):
    """Its predictions, by one worker."""
    return predicted(trained)[0]


@pytest.fixture
def copy(trained, done, tmp_path):
    """A copy of the run with its predictions, to be spoiled."""
    shutil.copytree(trained.root, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def learner_of(run: Run) -> Learner:
    """The network as the checkpoint has it."""
    learner = Learner(classifiers.build("wrn-10-1", 3), Recipe())
    learner.load(Training(run, "fixmatch").newest(print)[1])
    return learner


def test_predictions_are_the_averaged_networks_answers_to_every_image(trained, done):
    for shard in done.shards:
        ids = trained.read_shard("predictions", shard.index)["image_id"].to_pylist()
        assert ids == trained.read_embeddings(shard.index)[0].tolist()
    rows = rows_of(trained)
    ids = rows["image_id"].to_numpy()
    assert len(ids) == done.rows == 60 and len(done.shards) == 4
    pixels = Pixels.of_run(trained, size=8, limit=0).get(ids)
    probabilities = learner_of(trained).probabilities(pixels)
    classes = ["blue", "green", "red"]
    assert rows["label"].to_pylist() == [classes[i] for i in probabilities.argmax(1)]
    assert np.allclose(rows["confidence"].to_numpy(), probabilities.max(1), rtol=0, atol=1e-5)
    # It has learned something, and the summary counts it.
    true = [uri.split("/")[-2] for uri in trained.listed(ids)["uri"].to_pylist()]
    assert np.mean(np.array(true) == rows["label"].to_numpy()) > 0.9
    assert done.summary["classes"] == {name: rows["label"].to_pylist().count(name) for name in classes}
    assert done.summary["mean_confidence"] == pytest.approx(probabilities.max(1).mean(), abs=1e-4)
    assert done.summary["predicted"] == 60 and done.summary["unread"] == {}
    assert rows.schema.field("confidence").type == pa.float32()


def test_a_finished_prediction_is_not_made_again_and_status_shows_it(trained, done):
    again, complete = predicted(trained)
    assert complete and again == done
    found = json.loads(ask("predict", "--run", trained.uri, "--set", "embed.batch=8", "--json").stdout)
    assert found["already_complete"] and found["predicted"] == 60 and found["warnings"] == []
    said = ask("predict", "--run", trained.uri, "--set", "embed.batch=8").stdout
    assert "60 images by training 'fixmatch', step 2" in said and re.search(r"^ +\d+  green$", said, re.M)
    assert json.loads(ask("status", "--run", trained.uri, "--json").stdout)["predictions"]["rows"] == 60


def test_another_training_replaces_what_may_be_replaced_and_other_shards_have_the_same_rows(
    trained, done, tmp_path
):
    """The same images in two shards, and the same weights under another name, by two workers."""
    run = Run(str(tmp_path / "run"))
    for table in ("images", "embeddings", "rejected"):
        there = trained.manifest(table)
        run.begin(table, there.what, there.inputs)
        rows = pa.concat_tables(trained.read_shard(table, shard.index) for shard in there.shards)
        early = pc.less(rows["image_id"], 30)
        shards = [
            run.write_shard(table, i, rows.filter(some)) for i, some in enumerate((early, pc.invert(early)))
        ]
        run.finish(table, shards, seconds=0, peak_memory_bytes={}, summary=there.summary)
    for table in ("labels", "predictions"):
        shutil.copytree(Path(trained.root) / table, Path(run.root) / table)
    shutil.copytree(Path(trained.root) / "training" / "fixmatch", Path(run.root) / "training" / "other")
    with pytest.raises(UserError, match=r"'fixmatch' at step 2.*'other' at step 2 .*name.*--replace"):
        predicted(run, name="other")
    assert run.manifest("predictions") == done
    replaced, _ = predicted(run, name="other", replace=True, workers=2)
    assert replaced.summary["training"] == "other" and len(replaced.shards) == 2
    assert rows_of(run) == rows_of(trained)


def test_what_is_written_stays_and_an_image_that_is_gone_is_named(trained, done, copy, tmp_path):
    """First the store fails in the last shard; then an image of it is gone; then that is accepted."""
    copy.delete_folder("predictions")
    folder = Path(copy.root) / "predictions"
    last = Path(trained.listed(np.array([60]))["uri"][0].as_py())

    def read(request, access) -> bytes:
        while request.uri == str(last) and len(list(folder.glob("part-*.parquet"))) < 2:
            time.sleep(0.01)
        if request.uri == str(last):
            raise UserError("the store cannot be reached")
        return Path(request.uri).read_bytes()

    with pytest.raises(UserError, match="the store cannot be reached"):
        predicted(copy, read=read)
    assert copy.manifest("predictions") is None
    written = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert 2 <= len(written) < 4
    aside = last.rename(tmp_path / "aside")
    try:
        words = ("--run", copy.uri, "--set", "embed.batch=8", "--set", "resources.workers=1")
        said = line_of(ask("predict", *words), 1)
        assert f"1 of 60 images cannot be read any more and have no row in {copy.uri}/predictions" in said
        assert f"1 file not found, as {last}" in said and "--max-rejected 1.67%" in said
        assert copy.manifest("predictions") is None
        assert rows_of(copy) == rows_of(trained)[:59]
        reporter = Reporter(quiet=True)
        accepted, _ = predicted(copy, reporter, most=0.02)
        assert accepted.rows == 59 and accepted.summary["unread"] == {"file not found": 1}
        assert any(str(last) in words for words in reporter.warnings)
    finally:
        aside.rename(last)
    assert accepted.shards[:3] == done.shards[:3]
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_labels_that_have_changed_are_told_of(done, copy, tmp_path):
    picked = copy.read_shard("selection", 0)["image_id"].to_pylist()
    other = min(set(range(60)) - set(picked))
    (tmp_path / "more.csv").write_text(f"image_id,label\n{other},blue\n")
    labeling.bring_labels(copy, str(tmp_path / "more.csv"), replace=True, reporter=Reporter(quiet=True))
    reporter = Reporter(quiet=True)
    assert predicted(copy, reporter)[1]
    assert any("labels have changed since training 'fixmatch' began" in words for words in reporter.warnings)


def test_what_cannot_be_predicted_by_gets_a_sentence(trained, copy):
    assert "no training 'none'; give --name one of fixmatch" in refused(
        1, "predict", "--run", copy.uri, "--name", "none"
    )
    assert "--name 'a/b'" in refused(2, "predict", "--run", copy.uri, "--name", "a/b")
    folder = Path(copy.root) / "training"
    (folder / "new").mkdir()
    shutil.copy(folder / "fixmatch" / MANIFEST, folder / "new" / BEGUN)
    with pytest.raises(UserError, match="new has no checkpoint yet; let `selective-ray train` go on"):
        files.export(Training(copy, "new"), print)
    told = json.loads((folder / "fixmatch" / MANIFEST).read_text())
    told["what"]["train"]["network"] = "wrn-16-1"
    (folder / "fixmatch" / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"step 2 in .* is of another network than wrn-16-1 with 3 classes"):
        files.export(Training(copy, "fixmatch"), print)
    with pytest.raises(UsageError):
        files.begun(Training(copy, "../fixmatch"))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no training 'fixmatch'; run `selective-ray train` on it first"):
        files.begun(Training(copy, "fixmatch"))


# The model in files


def test_the_onnx_file_gives_what_the_network_gives(trained):
    import onnxruntime

    data = trained.read_bytes("training/fixmatch", files.ONNX)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for n in (1, 7):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        (found,) = session.run(["probabilities"], {"pixels": pixels})
        assert np.abs(found - learner_of(trained).probabilities(pixels)).max() < 1e-4
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == ["blue", "green", "red"]
    assert described["network"] == "wrn-10-1" and json.loads(described["step"]) == 2


def test_without_onnx_the_rest_is_written_and_the_sentence_says_how(copy, monkeypatch):
    training, said = Training(copy, "fixmatch"), []
    before = files.exported(training)
    copy.delete(training.table, files.ONNX)
    copy.delete(training.table, files.DESCRIPTION)
    assert files.exported(training) is None
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        without.setattr("importlib.util.find_spec", lambda name, package=None: None)
        model = files.export(training, said.append)
        assert len(said) == 1 and "pip install 'selective-ray[onnx]'" in said[0]
        assert files.exported(training) == model
    assert not copy.exists(training.table, files.ONNX)
    assert model.sha256[files.WEIGHTS] == before.sha256[files.WEIGHTS]
    # With the package there, it is missing.
    assert files.exported(training) is None


def test_a_training_that_diverged_is_told_of(copy):
    training, said = Training(copy, "fixmatch"), []
    step, state = training.newest(print)
    state["average"]["classifier.weight"][0, 0] = np.nan
    training.save(step + 1, state)
    assert files.exported(training) is None
    files.export(training, said.append)
    assert any("not all finite: the training diverged" in words for words in said)
    assert np.isnan(files.answers(np.array([[np.nan, 0, 1]], np.float32))).all()


def block(page: Path, word: str) -> str:
    """The indented lines of a page that a word is in, as they stand there."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page.read_text(), re.M)
    (found,) = (lines for lines in blocks if word in lines)
    return "\n".join(line.removeprefix("    ") for line in found.splitlines())


@pytest.mark.parametrize(("page", "word"), [(README, "load_state_dict"), (DOCS, "onnxruntime")])
def test_the_lines_of_the_pages_classify_a_file(page, word, trained, done, tmp_path, monkeypatch, capsys):
    code = block(page, word)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    row = rows_of(trained)[7:8].to_pylist()[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(trained.root)
    shutil.copy(trained.listed(np.array([row["image_id"]]))["uri"][0].as_py(), tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(code, {})
    label, confidence = capsys.readouterr().out.split()
    assert label == row["label"]
    # Pillow alone resizes as the package does, but for what Exif, transparency and large JPEGs ask for.
    assert float(confidence) == pytest.approx(row["confidence"], abs=1e-4 if page is README else 0.02)


def test_the_weights_are_plain(trained):
    weights = torch.load(Path(trained.root) / "training" / "fixmatch" / files.WEIGHTS, weights_only=True)
    network = classifiers.build("wrn-10-1", 3)
    network.load_state_dict(weights)
    assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())


@pytest.mark.faults
@pytest.mark.parametrize("title", ["ray::Wave", "ray::MapWorker(MapBatches(Encode))"])
def test_worker_killed_while_predicting(title, trained, done, copy, tmp_path):
    """What it was doing is done again; the answers are the same. The last image comes after the kill."""
    copy.delete_folder("predictions")
    last, flag = trained.listed(np.array([60]))["uri"][0].as_py(), tmp_path / "killed"

    def read(request, access) -> bytes:
        while request.uri == last and not flag.exists():
            time.sleep(0.01)
        return Path(request.uri).read_bytes()

    with killer(title, lambda: under_way(Path(copy.root), "predictions", 1)) as killed:

        def tell():
            while not killed:
                time.sleep(0.01)
            flag.touch()

        threading.Thread(target=tell, daemon=True).start()
        again, _ = predicted(copy, read=read, stall=30.0)
    assert killed and [s.sha256 for s in again.shards] == [s.sha256 for s in done.shards]
