"""Picks out and labels in: real runs, real files, and what the tools make of the one and of the other."""

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import paint
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from PIL import Image
from test_cli import ask, content, line_of, refused
from test_labels import annotation, cvat, task
from test_listing import tar
from test_pipeline import pictures

from selective_ray import export, labeling, objects, reading
from selective_ray.labels import Labels
from selective_ray.lease import Lease
from selective_ray.objects import Access
from selective_ray.progress import Reporter
from selective_ray.store import Run

SETTINGS = ("--encoder", "pca", "--set", "embed.image_size=8", "--set", "density.k=4")
CLASSES = ("cat", "hot dog", "Käse")


def select(*words: object) -> None:
    result = ask("select", *words, *SETTINGS)
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="module")
def made(two_cpus, tmp_path_factory) -> Path:
    """A run of 14 local images, of which one is a copy and one broken; 5 picks."""
    folder = tmp_path_factory.mktemp("made")
    pictures(folder / "in" / "a", 6)
    (folder / "in" / "b").mkdir()
    for i in range(6):
        (folder / "in" / "b" / f"{i:03d}.png").write_bytes(paint.png(paint.picture(16, 12, seed=i)))
    (folder / "in" / "a" / "copy.png").write_bytes((folder / "in" / "a" / "000.png").read_bytes())
    (folder / "in" / "broken.png").write_bytes(b"no image")
    select("--images", folder / "in", "--run", folder / "run", "--budget", 5)
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Run:
    return Run(shutil.copytree(made, tmp_path / "run").as_posix())


@pytest.fixture(scope="module")
def bucket(two_cpus, s3_endpoint, tmp_path_factory) -> str:
    """A run in a bucket, of images in it: 6 loose, 4 in an archive, 3 in Parquet; all are picked."""
    folder = pictures(tmp_path_factory.mktemp("in") / "images", 13)
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    # Much larger than its headers, and lying on its side.
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3)).astype(np.uint8)
    wide = paint.oriented(noise, 6)
    assert len(wide) > export.HEAD
    parquet = io.BytesIO()
    pq.write_table(pa.table({"image": files[10:13]}), parquet)
    archive = tar(tmp_path_factory.mktemp("tar") / "a.tar", {f"x/{i}.png": files[i] for i in range(6, 10)})
    loose = {f"in/{i}.png": files[i] for i in range(1, 6)}
    inside = {"in/a.tar": archive.read_bytes(), "in/b.parquet": parquet.getvalue()}
    s3.fill(s3_endpoint, "annotation-test", {**loose, **inside, "in/wide.jpg": wide})
    uri = "s3://annotation-test"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment(s3_endpoint).items():
            patch.setenv(name, value)
        select("--images", f"{uri}/in", "--run", f"{uri}/run", "--budget", 13, "--endpoint-url", s3_endpoint)
        yield s3_endpoint


def picks_of(run: Run) -> list[dict]:
    return run.read_shard("selection", 0).select(["image_id", "uri", "cluster_id"]).to_pylist()


def truth(run: Run) -> Labels:
    """What the people of these tests say: the last pick is skipped, the others have classes."""
    *labeled, last = picks_of(run)
    return Labels(
        {pick["image_id"]: CLASSES[pick["image_id"] % 3] for pick in labeled}, frozenset({last["image_id"]})
    )


def bring(run: Run, file: object, *words: object) -> dict:
    result = ask("labels", "--run", run.uri, file, "--json", *words)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows(path: Path, *of: tuple) -> Path:
    lines = ["image_id,uri,label,skipped", *(",".join(str(word) for word in row) for row in of)]
    return write(path, "\n".join(lines))


# People and tools at work


def fill_in_csv(data: bytes, said: Labels) -> bytes:
    table = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    for row in table:
        row["label"] = said.labels.get(int(row["image_id"]), "")
        row["skipped"] = "x" if int(row["image_id"]) in said.skipped else ""
    out = io.StringIO()
    writer = csv.DictWriter(out, table[0].keys(), delimiter=";")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue().encode()


def fill_in_jsonl(data: bytes, said: Labels) -> bytes:
    lines = []
    for line in data.decode().splitlines():
        row = json.loads(line)
        row |= {"label": said.labels.get(row["image_id"]), "skipped": row["image_id"] in said.skipped}
        lines.append(json.dumps(row))
    return "\n".join(lines).encode()


def label_in_label_studio(data: bytes, said: Labels) -> bytes:
    tasks = []
    for i, given in enumerate(json.loads(data), 1):
        assert given.keys() == {"data"}
        label = said.labels.get(given["data"]["image_id"])
        tasks.append(task(i, given["data"], annotation(label) if label else annotation(cancelled=True)))
    return json.dumps(tasks).encode()


def label_in_cvat(data: bytes, said: Labels, uris: dict[str, int]) -> bytes:
    """Uris: the image id of each file, by its name in CVAT, which is all that comes back."""
    version, kind, *images = (json.loads(line) for line in data.decode().splitlines())
    assert version == {"version": "1.1"} and kind == {"type": "images"}
    tags = []
    for image in images:
        name = image["name"] + image["extension"]
        tags.append((name, [said.labels.get(uris[name], "skipped")]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("annotations.xml", cvat(*tags))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "label-studio", "cvat"])
def test_round_trip(kind, run, made):
    said = truth(run)
    result = ask("export", "--run", run.uri, "--format", kind, "--json")
    assert result.exit_code == 0, result.stderr
    (file,) = json.loads(result.stdout)["files"]
    data = Path(file["file"]).read_bytes()
    assert Path(file["file"]).parent == Path(run.path("export")) and file["picks"] == 5
    root = made.parent / "in"
    filled = {
        "csv": fill_in_csv,
        "jsonl": fill_in_jsonl,
        "label-studio": label_in_label_studio,
        "cvat": lambda *given: label_in_cvat(
            *given,
            {str(Path(p["uri"]).relative_to(file["root"] or root)): p["image_id"] for p in picks_of(run)},
        ),
    }[kind](data, said)
    back = Path(run.path("back"))
    back.write_bytes(filled)
    found = bring(run, back)
    assert (found["labels"], found["skipped"], found["unlabeled_picks"]) == (4, 1, 0)
    assert found["outside_selection"] == 0 and found["changed"] and not found["warnings"]
    assert found["classes"] == {
        name: sum(label == name for label in said.labels.values()) for name in sorted({*said.labels.values()})
    }
    assert labeling.read_labels(run) == said
    table = run.read_shard("labels", 0)
    assert table.schema.names == ["image_id", "label"] and table.schema.types == [pa.int64(), pa.string()]
    (uri,) = run.read_shard("skipped", 0)["uri"].to_pylist()
    assert uri == picks_of(run)[-1]["uri"]
    # The same file again, and the export as it was written, change nothing.
    before = content(Path(run.root))
    assert bring(run, back)["changed"] is False
    assert ask("export", "--run", run.uri, "--format", kind).exit_code == 0
    assert content(Path(run.root)) == before


def test_the_manifest_has_the_sizes_that_people_see(run, made):
    ask("export", "--run", run.uri, "--format", "cvat")
    lines = Path(run.path("export", "cvat-001.jsonl")).read_text().splitlines()[2:]
    for image in map(json.loads, lines):
        # Below the deepest folder that holds all picks.
        (file,) = made.parent.glob(f"in/**/{image['name']}{image['extension']}")
        assert Image.open(file).size == (image["width"], image["height"])


@pytest.mark.parametrize("kind", ["label-studio", "cvat"])
def test_round_trip_of_copies_of_what_is_in_archives(kind, bucket):
    """Images of a bucket, some inside of archives: refused with the remedy, then copied as files."""
    run = Run("s3://annotation-test/run", Access(bucket))
    there = ("--run", run.uri, "--endpoint-url", bucket)
    words = ("export", *there, "--format", kind, "--out", f"s3://annotation-test/{kind}")
    said = refused(1, *words)
    assert "7 of the 13 picks" in said and "--copies" in said
    result = ask(*words, "--copies", "s3://annotation-test/copies", "--json")
    assert result.exit_code == 0, result.stderr
    (file,) = json.loads(result.stdout)["files"]
    data = (
        s3.client(bucket)
        .get_object(Bucket="annotation-test", Key=file["file"].split("/", 3)[3])["Body"]
        .read()
    )
    stamp = run.manifest("images").fingerprint[:8]
    extension = {".png": ".png", ".jpg": ".jpg"}
    names = {
        f"copies/{stamp}-{p['image_id']:012d}{extension.get(p['uri'][-4:], '.png')}": p["image_id"]
        for p in picks_of(run)
    }
    for name, image_id in names.items():
        copy = s3.client(bucket).get_object(Bucket="annotation-test", Key=name)["Body"].read()
        listed = run.listed(np.array([image_id]))
        assert [copy] == list(reading.fetch(listed, run.access))
    truly = truth(run)
    if kind == "cvat":
        assert file["root"] == "s3://annotation-test"
        lines = [json.loads(line) for line in data.decode().splitlines()[2:]]
        assert {line["name"] + line["extension"] for line in lines} == names.keys()
        assert [(line["width"], line["height"]) for line in lines if line["extension"] == ".jpg"] == [
            (500, 300)
        ]
        filled = label_in_cvat(data, truly, names)
    else:
        given = {one["data"]["image"]: one["data"]["image_id"] for one in json.loads(data)}
        assert given == {f"s3://annotation-test/{name}": image_id for name, image_id in names.items()}
        filled = label_in_label_studio(data, truly)
    s3.client(bucket).put_object(Bucket="annotation-test", Key=f"{kind}/back", Body=filled)
    result = ask("labels", *there, f"s3://annotation-test/{kind}/back", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["labels"] == 12 and labeling.read_labels(run) == truly


def test_sizes_are_read_from_the_first_bytes_in_a_bucket(bucket, monkeypatch):
    """The whole of an image that is larger than its headers is not asked for."""
    run = Run("s3://annotation-test/run", Access(bucket))
    listed = run.read_shard("images", 0)
    listed = listed.filter(pa.compute.is_null(listed["offset"]))
    picks = [export.Pick(i, uri, 0, uri) for i, uri in enumerate(listed["uri"].to_pylist())]
    asked = []
    read = objects.read
    monkeypatch.setattr(objects, "read", lambda *a: asked.append(a[0]) or read(*a))
    sizes = export._sizes(run, picks, listed, Reporter(quiet=True))
    assert sizes == [(12, 12)] * 5 + [(500, 300)]
    (wide,) = [request for request in asked if request.uri.endswith("wide.jpg")]
    assert wide.stop == export.HEAD


# Several files


def test_files_add_up_and_a_label_outweighs_a_skip(run, tmp_path):
    first, second, third = (pick["image_id"] for pick in picks_of(run)[:3])
    one = rows(tmp_path / "1.csv", (first, "", "cat", ""), (second, "", "", "x"))
    two = rows(tmp_path / "2.csv", (second, "", "dog", ""), (first, "", "", "x"), (third, "", "cat", ""))
    bring(run, one)
    found = bring(run, two)
    assert labeling.read_labels(run) == Labels({first: "cat", second: "dog", third: "cat"}, frozenset())
    assert found["classes"] == {"cat": 2, "dog": 1} and found["unlabeled_picks"] == 2
    manifest = run.manifest("labels")
    assert manifest.summary["last_file"] == {"file": "2.csv", "format": "CSV", "labels": 2}
    # The other way round comes to the same, by fingerprint.
    other = Run(shutil.copytree(run.root, tmp_path / "other").as_posix())
    for table in ("labels", "skipped"):
        other.delete_folder(table)
    bring(other, two)
    bring(other, one)
    assert other.manifest("labels").fingerprint == manifest.fingerprint


def test_another_label_is_refused_and_counts_with_replace(run, tmp_path):
    first, second = (pick["image_id"] for pick in picks_of(run)[:2])
    bring(run, rows(tmp_path / "1.csv", (first, "", "cat", ""), (second, "", "dog", "")))
    other = rows(tmp_path / "2.csv", (first, "", "bird", ""), (second, "", "", "yes"))
    before = content(Path(run.root))
    said = refused(1, "labels", "--run", run.uri, other)
    assert f"image {first} is 'cat' there, 'bird' here" in said and "--replace" in said
    assert content(Path(run.root)) == before
    bring(run, other, "--replace")
    assert labeling.read_labels(run) == Labels({first: "bird"}, frozenset({second}))


def test_only_the_last_shard_is_there_whatever_was_cut_short(run, tmp_path, monkeypatch):
    first, second = (pick["image_id"] for pick in picks_of(run)[:2])
    one, two = (rows(tmp_path / f"{i}.csv", (i, "", "cat", "")) for i in (first, second))
    bring(run, one)

    def killed(*_, **__):
        raise KeyboardInterrupt

    # After the manifest is written, and before it.
    for step, ids in (("delete", [first, second]), ("finish", [first])):
        with monkeypatch.context() as patch:
            patch.setattr(Run, step, killed)
            with pytest.raises(KeyboardInterrupt):
                run.replace(
                    "labels",
                    pa.table({"image_id": ids, "label": ["cat"] * len(ids)}),
                    what={"labels": {"content": step}},
                    inputs={},
                    seconds=0.0,
                    peak_memory_bytes={"driver": 0},
                    summary={},
                )
        assert len(run.finished_shards("labels")) > 1
        assert labeling.read_labels(run).labels == {first: "cat", second: "cat"}
    bring(run, two)
    assert labeling.read_labels(run).labels == {first: "cat", second: "cat"}
    shards = run.manifest("labels").shards
    assert [shard.index for shard in shards] == run.finished_shards("labels")
    assert not run.exists("labels", "begun.json")
    run.verify_shard("labels", shards[0].index)


def test_files_that_nobody_here_wrote_are_left_alone(run, tmp_path):
    Path(run.path("labels")).mkdir()
    theirs = Path(run.path("labels", "part-00000.parquet"))
    theirs.write_bytes(b"a person's")
    said = refused(1, "labels", "--run", run.uri, rows(tmp_path / "1.csv", (0, "", "cat", "")))
    assert "move it away" in said and theirs.read_bytes() == b"a person's"


def test_a_run_in_use_takes_no_labels(run, tmp_path):
    file = rows(tmp_path / "1.csv", (0, "", "cat", ""))
    with Lease(run):
        assert "in use" in refused(1, "labels", "--run", run.uri, file)
    bring(run, file)


def test_status_knows_of_labels(run, tmp_path):
    assert "labels" not in ask("status", "--run", run.uri).stdout
    bring(run, rows(tmp_path / "1.csv", (0, "", "cat", ""), (1, "", "", "x")))
    states = json.loads(ask("status", "--run", run.uri, "--json").stdout)
    assert states["labels"]["rows"] == states["skipped"]["rows"] == 1


# Checked against the run


def uris(run: Run) -> list[str]:
    return run.read_shard("images", 0)["uri"].to_pylist()


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ([(14, "", "cat", "")], "not in"),
        ([(0, "", "cat", ""), (99, "", "cat", "")], "1 of 2 lines about images that are not in"),
        ([("", "s3://elsewhere/1.png", "cat", "")], "line 2 ('s3://elsewhere/1.png')"),
        ([(0, "{1}", "cat", "")], "image 0 is '{0}' here and '{1}' there (line 2)"),
        (
            [(0, "", "cat", ""), ("", "{0}", "dog", "")],
            "image 0 ('{0}') is 'cat' (line 2) and 'dog' (line 3)",
        ),
        ([(0, "", "", ""), (1, "", "", "")], "2 images and labels none of them"),
        ([], "names no images"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_and_changes_nothing(run, tmp_path, of, expected):
    names = uris(run)
    of = [tuple(str(word).replace("{0}", names[0]).replace("{1}", names[1]) for word in row) for row in of]
    file = rows(tmp_path / "labels.csv", *of)
    before = content(Path(run.root))
    said = refused(1, "labels", "--run", run.uri, file)
    assert expected.replace("{0}", names[0]).replace("{1}", names[1]) in said
    assert content(Path(run.root)) == before


def test_names_that_fit_several_images_mean_the_picked_one_or_none(run, tmp_path):
    """Both folders have the names 000.png to 005.png."""
    picked = {Path(pick["uri"]).name: pick for pick in picks_of(run)}
    twice = {name for name in picked if sum(Path(p["uri"]).name == name for p in picks_of(run)) == 1}
    name = next(iter(sorted(twice - {"copy.png"})))
    bring(run, rows(tmp_path / "1.csv", ("", name, "cat", "")))
    assert labeling.read_labels(run).labels == {picked[name]["image_id"]: "cat"}
    missing = next(f"00{i}.png" for i in range(6) if f"00{i}.png" not in picked)
    said = refused(1, "labels", "--run", run.uri, rows(tmp_path / "2.csv", ("", missing, "cat", "")))
    assert f"a/{missing}" in said and f"b/{missing}" in said and "image ids" in said


def test_what_is_mostly_a_mistake_is_warned_of(run, tmp_path):
    """Spelling, one class, images that are equal, that were rejected, and outside of the selection."""
    names = uris(run)
    copy, original, broken = (
        next(i for i, uri in enumerate(names) if uri.endswith(end))
        for end in ("copy.png", "a/000.png", "broken.png")
    )
    picked = {pick["image_id"] for pick in picks_of(run)}
    others = [i for i in range(14) if i not in (copy, original, broken)][:2]
    labeled = [(copy, "airplane"), (original, "airplan"), (broken, "Air Plane"), (others[0], "dog")]
    found = bring(run, rows(tmp_path / "1.csv", *((i, "", label, "") for i, label in labeled)))
    spelling, rejected, equal = found["warnings"]
    assert "'Air Plane' (1 images) and 'airplan' (1)" in spelling
    assert "1 labeled images are in" in rejected and "rejected" in rejected
    assert f"{copy} ('airplane')" in equal and f"{original} ('airplan')" in equal
    assert found["outside_selection"] == len({i for i, _ in labeled} - picked)
    plain = ask("labels", "--run", run.uri, tmp_path / "1.csv")
    assert plain.stderr.count("warning") == 3 and "nothing changed" in plain.stdout
    one = Run(shutil.copytree(run.root, tmp_path / "one").as_posix())
    for table in ("labels", "skipped"):
        one.delete_folder(table)
    (warning,) = bring(one, rows(tmp_path / "2.csv", (others[0], "", "dog", "")))["warnings"]
    assert "two classes" in warning


def test_wrong_usage_and_missing_things_get_a_sentence(run, tmp_path):
    assert "label-studio" in refused(2, "export", "--run", run.uri, "--format", "coco")
    assert "--copies" in refused(2, "export", "--run", run.uri, "--copies", tmp_path / "c")
    assert "no file" in refused(1, "labels", "--run", run.uri, tmp_path / "none.csv")
    assert "cannot be read" in refused(1, "labels", "--run", run.uri, tmp_path)
    assert "is not a run" in refused(1, "export", "--run", tmp_path / "none")
    assert "is not a run" in refused(1, "labels", "--run", tmp_path / "none", tmp_path / "x")
    assert "FILE" in line_of(ask("labels", "--run", run.uri), 2)
    run.delete_folder("selection")
    assert "run `selective-ray select`" in refused(1, "export", "--run", run.uri)
    # Labels need no selection.
    assert bring(run, rows(tmp_path / "1.csv", (0, "", "cat", "")))["outside_selection"] == 1


def test_a_file_that_somebody_filled_in_is_not_written_over(run, tmp_path):
    out = tmp_path / "out"
    assert ask("export", "--run", run.uri, "--out", out).exit_code == 0
    (out / "selection.csv").write_bytes(fill_in_csv((out / "selection.csv").read_bytes(), truth(run)))
    before = content(out)
    assert "holds something else" in refused(1, "export", "--run", run.uri, "--out", out)
    assert content(out) == before


def test_a_pick_that_is_gone_is_named(run, made):
    gone = Path(picks_of(run)[0]["uri"])
    aside = gone.with_suffix(".aside")
    gone.rename(aside)
    try:
        said = refused(1, "export", "--run", run.uri, "--format", "cvat")
        assert str(gone) in said and "file not found" in said
        assert not Path(run.path("export")).exists()
    finally:
        aside.rename(gone)


def test_embeddings_without_images_go_to_csv_and_not_to_tools(two_cpus, tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    evil = ["=1+1", *(f"s3://b/{i}.png" for i in range(6)), "1.png"]
    pq.write_table(pa.table({"embedding": x.tolist(), "uri": evil}), tmp_path / "x.parquet")
    for kind, expected in (("npy", "8 of the 8"), ("parquet", "2 of the 8")):
        words = ("--embeddings", tmp_path / f"x.{kind}", "--run", tmp_path / kind, "--budget", 8)
        assert ask("select", *words, "--set", "density.k=4").exit_code == 0
        assert expected in refused(1, "export", "--run", tmp_path / kind, "--format", "label-studio")
        copies = ("--format", "label-studio", "--copies", tmp_path / "copies")
        assert "no image that could be read" in refused(1, "export", "--run", tmp_path / kind, *copies)
        assert ask("export", "--run", tmp_path / kind).exit_code == 0
    run = Run(str(tmp_path / "parquet"))
    with Path(run.path("export", "selection.csv")).open(newline="") as file:
        assert {row["uri"] for row in csv.DictReader(file)} == {"'=1+1", *evil[1:]}
    # An own uri is meant, not the end of another.
    bring(run, write(tmp_path / "1.csv", "uri,label\n1.png,cat\n'=1+1,dog\ns3://b/3.png,dog\n"))
    assert labeling.read_labels(run).labels == {7: "cat", 0: "dog", 4: "dog"}


def test_labels_are_read_only_by_whom_they_are_for(run, tmp_path):
    """Another selection on a run with labels neither needs nor changes them."""
    bring(run, rows(tmp_path / "1.csv", (0, "", "cat", "")))
    before = content(Path(run.path("labels")))
    words = ("--embeddings", run.uri, "--run", tmp_path / "again", "--budget", 3, "--set", "density.k=4")
    assert ask("select", *words).exit_code == 0
    assert not (tmp_path / "again" / "labels").exists()
    assert content(Path(run.path("labels"))) == before


def test_copies_of_another_run_are_refused(run, tmp_path):
    """The name of a copy says of which listing its image id is."""
    stamp = run.manifest("images").fingerprint[:8]
    for of in (stamp, "0" * 8):
        path = tmp_path / f"{of}.xml"
        path.write_bytes(cvat((f"x/{of}-000000000001.png", ["cat"])))
    assert "not in" in refused(1, "labels", "--run", run.uri, tmp_path / f"{'0' * 8}.xml")
    bring(run, tmp_path / f"{stamp}.xml")
    assert labeling.read_labels(run).labels == {1: "cat"}
