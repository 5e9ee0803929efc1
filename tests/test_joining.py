"""The density stage by inverted lists, on real Ray: same bits for any layout, certificate, bad input."""

import numpy as np
import oracle
import pytest
from conftest import unit
from test_pipeline import advance

from selective_ray import config, ivf
from selective_ray.actors import pipeline
from selective_ray.actors.density import measure
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import Session
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.schema import embeddings_schema, embeddings_table
from selective_ray.store import Run

N = 3000
LISTS = {"density.mode": "ivf", "density.lists": 24, "density.k": 8, "selection.budget": None, "seed": 4}


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(40, 24))
    x = unit(centers[rng.integers(0, 40, N)] + 0.7 * rng.normal(size=(N, 24)))
    x[100:110] = x[99]
    # Held by another worker.
    x[2000] = x[99]
    return x


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    file = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(file, vectors)
    return str(file)


def measured(run, file, **options):
    return advance(run, source=pipeline.Source(embeddings=file), upto="density", **{**LISTS, **options})


def column(run, name="mean_sq_dist", table="density"):
    shards = range(len(run.manifest(table).shards))
    return np.concatenate([run.read_shard(table, i)[name].to_numpy(zero_copy_only=False) for i in shards])


@pytest.fixture(scope="module")
def reference(two_cpus, file, tmp_path_factory):
    """One shard, one worker."""
    options = {"resources.workers": 1, "resources.shard_rows": N}
    return measured(tmp_path_factory.mktemp("reference") / "run", file, **options)


@pytest.mark.parametrize(("workers", "shard_rows"), [(2, 500), (7, 130)])
def test_same_bits_for_any_workers_and_shards(workers, shard_rows, reference, file, tmp_path):
    options = {"resources.workers": workers, "resources.shard_rows": shard_rows}
    run = measured(tmp_path / "run", file, **options)
    assert np.array_equal(column(run), column(reference))
    mine, theirs = run.manifest("density"), reference.manifest("density")
    assert mine.fingerprint == theirs.fingerprint
    assert mine.summary["certificate"] == theirs.summary["certificate"]
    assert not run.exists("density", "work", "quantizer.npz")


def test_equals_the_join_in_memory(reference, vectors):
    from test_ivf import joined

    plan = ivf.plan(N, 24, 8, mode="ivf", lists=24)
    training, _ = ivf.draw(plan, 4)
    centroids = ivf.train(vectors[training], 24, 4)
    found, *_ = joined(vectors, centroids, reference.manifest("density").summary["reach"], k=8)
    assert np.array_equal(column(reference), (found.sum(axis=1) / 8).astype(np.float32))


def test_certificate_tells_the_truth(reference, vectors):
    """Its recall, read off a sample, against that of all rows."""
    exact = np.sort(oracle.sq_dists(vectors, vectors), axis=1)[:, :8].mean(axis=1)
    summary = reference.manifest("density").summary
    assert summary["neighbors"] == "ivf"
    assert summary["certificate"]["recall"] >= 0.99
    error = column(reference) / np.maximum(exact, 1e-12) - 1
    assert error[exact > 1e-9].mean() == pytest.approx(
        summary["certificate"]["mean_relative_error"], abs=2e-3
    )
    assert (error[exact > 1e-9] > -1e-6).all(), "a distance smaller than the exact one"


def test_missed_recall_is_made_good_where_that_adds_lists(two_cpus, file, vectors, tmp_path, monkeypatch):
    """A reach that was planned too short is raised, and the outcome is that of the longer reach at once."""
    from test_ivf import joined

    monkeypatch.setattr(ivf, "PLANNED_MISSES", 40)
    run = measured(tmp_path / "run", file)
    summary = run.manifest("density").summary
    assert summary["rounds"] > 1
    assert summary["certificate"]["recall"] >= 0.99
    joined_in = summary["joined"]
    assert joined_in[0] == N and len(joined_in) == summary["rounds"]
    assert 0 < max(joined_in[1:]) < N, "rows that probe no more lists were joined again"
    plan = ivf.plan(N, 24, 8, mode="ivf", lists=24)
    centroids = ivf.train(vectors[ivf.draw(plan, 4)[0]], 24, 4)
    found, *_ = joined(vectors, centroids, summary["reach"], k=8)
    assert np.array_equal(column(run), (found.sum(axis=1) / 8).astype(np.float32))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("mode", ["exact", "ivf"])
def test_neighbors_are_kept(mode, include_self, two_cpus, file, vectors, tmp_path):
    options = {"density.keep_neighbors": True, "density.include_self": include_self, "density.mode": mode}
    if mode == "exact":
        options["density.lists"] = None
    run = measured(tmp_path / "run", file, **options, **{"resources.shard_rows": 700})
    ids = np.stack(column(run, "neighbors", "neighbors"))
    sq_dists = np.stack(column(run, "sq_dists", "neighbors"))
    assert ids.shape == (N, 8)
    true = oracle.sq_dists(vectors, vectors)
    assert np.allclose(true[np.arange(N)[:, None], ids], sq_dists, rtol=1e-6, atol=1e-12)
    assert (np.diff(sq_dists, axis=1) >= 0).all()
    if include_self:
        assert np.allclose(sq_dists[:, 0], 0)
    else:
        assert not (ids == np.arange(N)[:, None]).any(), "an image is its own neighbor"
    assert np.allclose(sq_dists.mean(axis=1, dtype=np.float64), column(run), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "ivf"])
def test_collapsed_duplicates(mode, two_cpus, file, vectors, tmp_path):
    options = {"density.duplicates": "collapse", "density.mode": mode, "density.recall": 0.999}
    options |= {"resources.shard_rows": 500, "resources.workers": 2, "density.keep_neighbors": True}
    if mode == "exact":
        options |= {"density.lists": None}
    run = measured(tmp_path / "run", file, **options)
    distinct, inverse = np.unique(vectors, axis=0, return_inverse=True)
    exact = np.sort(oracle.sq_dists(distinct, distinct), axis=1)[:, :8].mean(axis=1)[inverse.ravel()]
    found = column(run)
    copies = [*range(99, 110), 2000]
    assert len(set(found[copies].tolist())) == 1
    assert found[99] > 0
    names = np.stack(column(run, "neighbors", "neighbors"))
    assert (names[copies] == names[99]).all()
    assert not np.isin(names, copies[1:]).any(), "a copy is a neighbor"
    assert np.allclose(found[99:110], exact[99:110], rtol=1e-6)
    assert np.mean(np.isclose(found, exact, rtol=1e-6)) > (0.99 if mode == "ivf" else 0.9999)
    summary = run.manifest("density").summary
    assert summary["joined"][0] == N, "copies count as images"
    if mode == "ivf":
        assert summary["certificate"]["recall"] >= 0.999
        assert summary["rounds"] <= 2
        assert summary["reach"] < 1, "probing everything for neighbors that do not count"


def test_half_precision_embeddings(two_cpus, file, vectors, tmp_path):
    run = measured(
        tmp_path / "run", file, **{"embed.dtype": "float16", "density.mode": "exact", "density.lists": None}
    )
    x = vectors.astype(np.float16).astype(np.float32)
    exact = np.sort(oracle.sq_dists(x, x), axis=1)[:, :8].mean(axis=1)
    assert np.allclose(column(run), exact, rtol=1e-5, atol=1e-12)


def test_probes_as_told_are_certified_with_a_warning(two_cpus, file, tmp_path, capsys):
    options, reporter, told = {**LISTS, "density.probes": 1}, Reporter(), []
    reporter.followers.append(told.append)
    source = pipeline.Source(embeddings=file)
    run = advance(tmp_path / "run", source=source, upto="density", reporter=reporter, **options)
    summary = run.manifest("density").summary
    assert summary["probes"] == 1
    assert summary["certificate"]["recall"] < 0.99
    said = capsys.readouterr().err
    assert "density.probes = 1 found" in said and "raise the probes or leave them out" in said
    (began,) = (event.numbers for event in told if event.what == "workers")
    assert began["workers"] == 2 and began["lists"] == 24
    assert began["worker_bytes"] == summary["worker_bytes"] > 2**28


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density.probes": 1, "density.recall": 0.99}, r"density\.probes = 1 reaches a recall of about 0\."),
        ({"density.lists": 3001}, r"density\.lists = 3001 exceeds the 3000 embeddings"),
        (
            {"density.k": 3001, "density.mode": "exact", "density.lists": None},
            r"set density\.k to 3000 or fewer",
        ),
    ],
)
def test_what_cannot_be_reached_is_said(options, words, two_cpus, file, tmp_path):
    with pytest.raises(UserError, match=words):
        measured(tmp_path / "run", file, **options)


def test_collapse_that_leaves_too_few(two_cpus, tmp_path):
    x = np.repeat(unit(np.random.default_rng(0).normal(size=(5, 4))), 4, axis=0)
    np.save(tmp_path / "x.npy", x)
    options = {"density.duplicates": "collapse", "density.mode": "exact", "density.lists": None}
    with pytest.raises(UserError, match=r"exceeds the 5 neighbors that the distinct embeddings have"):
        measured(tmp_path / "run", str(tmp_path / "x.npy"), **options)


def test_memory_that_is_not_there_is_said_before_the_work(two_cpus, file, tmp_path, monkeypatch):
    monkeypatch.setattr(ivf.Plan, "holder_bytes", lambda self, rows, workers: 10**15)
    with pytest.raises(UserError, match=r"2 workers .* take 1000000\.0 GB each, .* has room for 0"):
        measured(tmp_path / "run", file, **{"resources.shard_rows": 500})


def test_neighbors_without_the_image_itself_are_one_fewer(two_cpus, file, tmp_path):
    exact = {"density.mode": "exact", "density.lists": None, "density.include_self": False}
    with pytest.raises(UserError, match=r"exceeds the 2999 neighbors .* set density\.k to 2999 or fewer"):
        measured(tmp_path / "run", file, **exact, **{"density.k": N})


def measured_of(run, shards, workers):
    """Measure densities of shards of embeddings as another program may have written them: (image_ids, x)."""
    run.prepare()
    run.begin("embeddings", {"embed": {"dtype": "float32"}}, {})
    written = [
        run.write_shard("embeddings", i, embeddings_table(ids, x, embeddings_schema(x.shape[1], "float32")))
        for i, (ids, x) in enumerate(shards)
    ]
    summary = {"dimension": shards[0][1].shape[1]}
    run.finish("embeddings", written, seconds=1, peak_memory_bytes={}, summary=summary)
    settings, _ = config.load(options={"resources.workers": workers, "density.k": 5}, own_embeddings=True)
    with Session() as session:
        pool = Pool(run, settings.resources, session)
        try:
            measure(run, settings, pool, Reporter(quiet=True))
        finally:
            pool.stop()


def test_shards_of_other_dimensions_are_said(two_cpus, vectors, tmp_path):
    """Also where each worker has shards of one dimension only."""
    shards = [(np.arange(50), vectors[:50, :8]), (np.arange(50, 100), vectors[:50, :9])]
    with pytest.raises(UserError, match=r"shard 1 of .* has rows of 9 numbers, and others of 8"):
        measured_of(Run(str(tmp_path / "run")), shards, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_is_there_twice_is_said(workers, two_cpus, vectors, tmp_path):
    """Also where two workers have it, one each."""
    shards = [(np.arange(50), vectors[:50]), (np.arange(49, 99), vectors[:50])]
    with pytest.raises(UserError, match=r"image 49 is there twice or out of order in .*embeddings"):
        measured_of(Run(str(tmp_path / "run")), shards, workers)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_embeddings_are_said(damage, two_cpus, file, tmp_path):
    options = {
        "source": pipeline.Source(embeddings=file),
        "resources.shard_rows": 1000,
        "selection.budget": None,
    }
    run = advance(tmp_path / "run", upto="embeddings", **options)
    shard = tmp_path / "run" / "embeddings" / "part-00001.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    words = {"missing": "is missing", "changed": "is not what was written: its checksum differs"}[damage]
    with pytest.raises(UserError, match=rf"part-00001\.parquet {words}"):
        measured(tmp_path / "run", file)
    assert run.manifest("density") is None
