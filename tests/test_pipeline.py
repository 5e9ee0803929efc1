"""The whole run through real Ray: painted files in, the same picks out whatever did the work."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import paint
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import selective_ray
from selective_ray import config, objects
from selective_ray.actors import pipeline
from selective_ray.actors.pool import Pool
from selective_ray.cli import app
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.store import Run

OPTIONS = {
    "embed.encoder": "pca",
    "embed.image_size": 8,
    "embed.batch": 4,
    "selection.budget": 6,
    "density.k": 5,
    "resources.workers": 2,
}


def pictures(folder: Path, n: int = 60) -> Path:
    """n small pictures of a few kinds, told apart by color and by a bright corner."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    colors = rng.integers(0, 200, (6, 3))
    for i in range(n):
        pixels = np.clip(colors[i % 6] + rng.normal(0, 12, (12, 12, 3)), 0, 255)
        pixels[:4, : 4 + i % 3] += 50
        (folder / f"{i:03d}.png").write_bytes(paint.png(np.clip(pixels, 0, 255).astype(np.uint8)))
    return folder


def advance(
    run: Path | str, *, upto: str = "selection", read=objects.read, source=None, reporter=None, **options
):
    settings, asked = config.load(
        options={**OPTIONS, **options}, own_embeddings=bool(source and source.embeddings)
    )
    where = Run(str(run))
    reporter = reporter or Reporter(quiet=True)
    pipeline.advance(where, source, settings, asked, reporter, upto=upto, read=read)
    return where


def picks_of(run: Run) -> list[dict]:
    return run.read_shard("selection", 0).to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("in") / "images")


@pytest.fixture(scope="module")
def undisturbed(two_cpus, folder, tmp_path_factory):
    """A run of one shard by one worker."""
    return advance(
        tmp_path_factory.mktemp("run") / "one",
        source=pipeline.Source(images=str(folder)),
        **{"resources.shard_rows": 60, "resources.workers": 1},
    )


@pytest.mark.parametrize(("shard_rows", "workers"), [(30, 2), (9, 1), (8, 7)])
def test_same_embeddings_and_picks_for_any_shards_and_workers(
    shard_rows, workers, undisturbed, folder, tmp_path
):
    run = advance(
        tmp_path / "run",
        source=pipeline.Source(images=str(folder)),
        **{"resources.shard_rows": shard_rows, "resources.workers": workers},
    )
    shards = len(run.manifest("embeddings").shards)
    assert shards == -(-60 // shard_rows)
    parts = [run.read_embeddings(i) for i in range(shards)]
    ids, x = undisturbed.read_embeddings(0)
    assert np.array_equal(np.concatenate([i for i, _ in parts]), ids)
    assert np.array_equal(np.concatenate([x for _, x in parts]), x)
    assert picks_of(run) == picks_of(undisturbed)
    for table in ("embeddings", "density", "clusters"):
        assert run.manifest(table).fingerprint == undisturbed.manifest(table).fingerprint


def test_labeled_image_that_cannot_be_read_is_said_before_density(two_cpus, tmp_path):
    folder = pictures(tmp_path / "images", 30)
    (folder / "zz.png").write_bytes(b"no picture")
    (tmp_path / "labeled.csv").write_text("image_id\n3\n30\n")
    options = {"selection.labeled": str(tmp_path / "labeled.csv"), "selection.budget": 4}
    with pytest.raises(UserError, match=r"labeled image 30 could not be read .* take it out of --labeled"):
        advance(tmp_path / "run", source=pipeline.Source(images=str(folder)), **options)
    assert not (tmp_path / "run" / "density").exists()


def test_memory_of_clusters_is_reckoned_after_density(two_cpus, undisturbed, folder, tmp_path, monkeypatch):
    """More than what the workers began with: they begin anew, or it is refused before any iteration."""
    source, run = pipeline.Source(images=str(folder)), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("selective_ray.kmeans.holder_bytes", lambda rows, d, m: 10**15)
        with pytest.raises(UserError, match=r"take 1000000\.0 GB each, .* has room for 0"):
            advance(run, source=source)
    assert Run(str(run)).manifest("density") and not (run / "clusters" / "work").exists()
    stated = []
    start = Pool.start

    def noted(pool, *how):
        start(pool, *how)
        stated.append(pool.memory)

    monkeypatch.setattr("selective_ray.kmeans.holder_bytes", lambda rows, d, m: 700_000_000)
    monkeypatch.setattr(Pool, "start", noted)
    done = advance(tmp_path / "another", source=source)
    assert stated[0] < 700_000_000 and set(stated[1:]) == {700_000_000}
    assert picks_of(done) == picks_of(undisturbed)


def test_order_of_the_files_on_disk_does_not_matter(undisturbed, folder, tmp_path):
    """The same files, written in another order below the same path."""
    aside = tmp_path / "aside"
    shutil.copytree(folder, aside)
    files = sorted(folder.iterdir())
    for file in files:
        file.unlink()
    for i in np.random.default_rng(1).permutation(len(files)):
        shutil.copy2(aside / files[i].name, files[i])
    run = advance(tmp_path / "run", source=pipeline.Source(images=str(folder)))
    assert picks_of(run) == picks_of(undisturbed)


def test_picks_equal_those_in_memory(undisturbed):
    x = undisturbed.read_embeddings(0)[1]
    selected = selective_ray.select(x, 6, settings={"density.k": 5})
    picks = picks_of(undisturbed)
    assert selected.rows.tolist() == [pick["image_id"] for pick in picks]
    assert selected.utilities.tolist() == [pick["utility"] for pick in picks]
    assert selected.repulsions.tolist() == [pick["repulsion"] for pick in picks]
    assert selected.sq_dists.tolist() == [pick["mean_sq_dist"] for pick in picks]


def test_tables_and_manifests_keep_the_contract(undisturbed, folder):
    root = Path(undisturbed.root)
    columns = {
        "images": "image_id uri offset length size version",
        "embeddings": "image_id embedding digest",
        "rejected": "image_id uri reason",
        "density": "image_id mean_sq_dist",
        "clusters": "image_id cluster_id sq_dist",
        "selection": "image_id uri cluster_id mean_sq_dist repulsion utility",
    }
    for table, names in columns.items():
        assert pq.read_schema(root / table / "part-00000.parquet").names == names.split()
        manifest = json.loads((root / table / "manifest.json").read_text())
        assert {"stage", "schema_version", "what", "inputs", "fingerprint", "code", "shards", "rows"} <= set(
            manifest
        )
        assert {"seconds", "peak_memory_bytes", "summary"} <= set(manifest)
        assert {"name", "rows", "sha256", "device"} == set(manifest["shards"][0])
        assert not (root / table / "begun.json").exists()
    assert np.load(root / "clusters" / "centroids.npy").shape[0] == 6
    iterations = undisturbed.manifest("clusters").summary["iterations"]
    assert f"K-Means took {iterations} iterations" in (root / "report" / "index.html").read_text()
    picks = picks_of(undisturbed)
    clusters = [pick["cluster_id"] for pick in picks]
    assert len(picks) == 6 and clusters == sorted(clusters) and set(clusters) <= set(range(6))
    assert {Path(pick["uri"]).parent for pick in picks} == {folder}
    with (root / "selection" / "selection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["image_id"]), row["uri"], float(row["utility"])) for row in rows] == [
        (pick["image_id"], pick["uri"], pick["utility"]) for pick in picks
    ]
    x = undisturbed.read_embeddings(0)[1]
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    assert (root / "report" / "index.html").stat().st_size > 10_000
    assert not list(root.rglob("*.tmp")), "temporaries are gone"
    assert not (root / "lease.json").exists()


def test_a_complete_run_is_left_alone(undisturbed, folder):
    root = Path(undisturbed.root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    command = f"select --images {folder} --run {root} --budget 6 --encoder pca"
    for key in ("embed.image_size=8", "embed.batch=4", "density.k=5"):
        command += f" --set {key}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert (
        "already complete: images, embeddings, rejected, duplicates, density, clusters, selection"
        in result.output
    )
    assert "nothing to do" in result.output
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_new_images_after_the_listing_are_not_part_of_the_run(undisturbed, folder):
    extra = folder / "zzz.png"
    extra.write_bytes(paint.png(np.zeros((5, 5, 3), np.uint8)))
    try:
        run = advance(undisturbed.root, source=pipeline.Source(images=str(folder)))
        assert run.manifest("images").rows == 60
    finally:
        extra.unlink()


def test_every_kind_of_image_and_every_broken_file(two_cpus, tmp_path):
    """Broken files become rows with a reason; odd names survive; nothing is lost or changed."""
    source = tmp_path / "in"
    source.mkdir()
    good, broken = paint.kinds(source), paint.broken(source)
    for name in ("with space", "quote'\"", "new\nline", "<script>alert(1)<", "ünïcödé-日本"):
        (source / f"{name}.png").write_bytes(paint.png(np.full((9, 9, 3), len(name) * 8, np.uint8)))
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*") if path.is_file()
    }
    run = advance(
        tmp_path / "run", source=pipeline.Source(images=str(source)), **{"resources.shard_rows": 10}
    )
    listed, embedded = run.manifest("images").rows, run.manifest("embeddings")
    assert listed == len(before) == len(good) + len(broken) + 5
    assert embedded.summary["rejected"] == len(broken)
    assert embedded.rows == listed - len(broken)
    rejected = [row for i in range(4) for row in run.read_shard("rejected", i).to_pylist()]
    assert {Path(row["uri"]).name for row in rejected} == {Path(path).name for path in broken.values()}
    reasons = {Path(row["uri"]).name: row["reason"] for row in rejected}
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["text.jpg"] == "not an image"
    assert "too many pixels" in reasons["bomb.png"]
    for i in range(len(embedded.shards)):
        ids = set(run.read_shard("images", i)["image_id"].to_pylist())
        out = set(run.read_shard("rejected", i)["image_id"].to_pylist())
        assert set(run.read_embeddings(i)[0].tolist()) == ids - out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert "<script>alert" not in (tmp_path / "run" / "report" / "index.html").read_text()


def test_nothing_usable_ends_with_the_reason(two_cpus, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(b"")
    command = f"select --images {source} --run {tmp_path / 'run'} --budget 1 --encoder pca"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert "none of the 3 images could be used; most often: empty file" in result.stderr


def test_another_seed_weight_and_budget_reuse_the_embeddings(undisturbed, tmp_path):
    source = pipeline.Source(embeddings=undisturbed.uri)
    weight = advance(tmp_path / "weight", source=source, **{"selection.weight": 3.0})
    assert weight.manifest("clusters").refers_to == undisturbed.uri
    assert not list((tmp_path / "weight").glob("embeddings/*.parquet"))
    budget = advance(tmp_path / "budget", source=source, **{"selection.budget": 9, "seed": 4})
    assert budget.manifest("density").refers_to == undisturbed.uri
    assert budget.manifest("clusters").refers_to is None
    assert len(picks_of(budget)) == 9
    assert all(Path(pick["uri"]).exists() for pick in picks_of(budget))
    # A run that refers can be referred to.
    again = advance(tmp_path / "again", source=pipeline.Source(embeddings=budget.uri), **{"seed": 4})
    assert again.manifest("embeddings").refers_to == undisturbed.uri


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_brought_embeddings(kind, undisturbed, tmp_path):
    import pyarrow as pa

    x = undisturbed.read_embeddings(0)[1]
    file = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(file, x)
    else:
        pq.write_table(pa.table({"embedding": x.tolist(), "uri": [f"s3://b/{i}" for i in range(60)]}), file)
    run = advance(
        tmp_path / "run", source=pipeline.Source(embeddings=str(file)), **{"resources.shard_rows": 16}
    )
    picks = picks_of(run)
    assert [pick["image_id"] for pick in picks] == [pick["image_id"] for pick in picks_of(undisturbed)]
    expected = "s3://b/{}" if kind == "parquet" else f"{file}#{{}}"
    assert [pick["uri"] for pick in picks] == [expected.format(pick["image_id"]) for pick in picks]


def test_kth_estimator(undisturbed, tmp_path):
    run = advance(
        tmp_path / "run", source=pipeline.Source(embeddings=undisturbed.uri), **{"density.estimator": "kth"}
    )
    density = run.read_shard("density", 0)
    assert density.column_names == ["image_id", "kth_sq_dist", "log_density"]
    x = undisturbed.read_embeddings(0)[1].astype(np.float64)
    fifth = np.sort(((x[:, None] - x) ** 2).sum(axis=2), axis=1)[:, 4]
    assert np.allclose(density["kth_sq_dist"], fifth, rtol=1e-6)
    assert picks_of(run)[0]["kth_sq_dist"] > 0


def test_every_budget_gives_so_many_picks_each_from_its_own_cluster(undisturbed, tmp_path):
    """With prototypes a pick may have moved into the cluster of another."""
    source = pipeline.Source(embeddings=undisturbed.uri)
    for m in (1, 2, 59, 60):
        for method in ("usl", "prototypes"):
            options = {"selection.budget": m, "selection.method": method}
            picks = picks_of(advance(tmp_path / f"{method}-{m}", source=source, **options))
            assert len({pick["image_id"] for pick in picks}) == m
            assert method == "prototypes" or [pick["cluster_id"] for pick in picks] == list(range(m))


def test_a_report_that_fails_does_not_fail_the_run(undisturbed, tmp_path):
    """A folder stands where the page should go."""
    (tmp_path / "run" / "report" / "index.html" / "in the way").mkdir(parents=True)
    reporter = Reporter(quiet=True)
    settings, asked = config.load(options=OPTIONS, own_embeddings=True)
    run = Run(str(tmp_path / "run"))
    pipeline.advance(
        run, pipeline.Source(embeddings=undisturbed.uri), settings, asked, reporter, upto="selection"
    )
    assert len(picks_of(run)) == 6
    assert "the report could not be written" in reporter.warnings[0]
