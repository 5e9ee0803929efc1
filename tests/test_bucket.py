"""Images in a bucket, behind a proxy that breaks requests: the same embeddings, or a clear end."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from test_listing import tar
from test_pipeline import advance, picks_of, pictures
from typer.testing import CliRunner

from selective_ray import objects
from selective_ray.actors import pipeline
from selective_ray.cli import app
from selective_ray.errors import UserError
from selective_ray.objects import Access
from selective_ray.store import Run

BUCKET = "bucket-test"
SHARDS = {"resources.shard_rows": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty pictures, of which the last is a copy of the first."""
    folder = pictures(tmp_path_factory.mktemp("in") / "images")
    (folder / "060.png").write_bytes((folder / "000.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def quiet(two_cpus, folder, tmp_path_factory):
    """What the same images give from a local folder."""
    source = pipeline.Source(images=str(folder))
    return advance(tmp_path_factory.mktemp("quiet") / "run", source=source, **SHARDS)


@pytest.fixture(scope="module")
def bucket(two_cpus, s3_endpoint, folder, tmp_path_factory):
    """A proxy before a bucket that holds the images loose, as an archive, as Parquet, and as a list."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    archive = tar(tmp_path_factory.mktemp("tar") / "a.tar", files).read_bytes()
    parquet = io.BytesIO()
    values = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": values, "label": range(61)}), parquet, row_group_size=25)
    uris = "\n".join(f"s3://{BUCKET}/loose/{name}" for name in files)
    s3.fill(
        s3_endpoint,
        BUCKET,
        {
            **{f"loose/{name}": data for name, data in files.items()},
            **{"archive/a.tar": archive, "parquet/a.parquet": parquet.getvalue()},
            "list.txt": uris.encode(),
        },
    )
    with s3.FaultProxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(bucket):
    bucket.clear()
    yield bucket
    bucket.rule = s3.never


def embed(proxy, run, place: str, **options) -> Run:
    return advance(
        run,
        source=pipeline.Source(images=f"s3://{BUCKET}/{place}"),
        upto=options.pop("upto", "embeddings"),
        **{"resources.endpoint_url": proxy.endpoint, "resources.silence_seconds": 2.0, **SHARDS, **options},
    )


def vectors(run: Run) -> tuple[np.ndarray, np.ndarray]:
    parts = [run.read_embeddings(shard.index) for shard in run.manifest("embeddings").shards]
    ids, x = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(x)


def same(run: Run, quiet: Run) -> bool:
    return all(map(np.array_equal, vectors(run), vectors(quiet)))


@pytest.mark.parametrize(
    "place",
    [
        "archive/",
        *(
            pytest.param(place, marks=pytest.mark.faults)
            for place in ("parquet/", "list.txt", "archive/a.tar")
        ),
    ],
)
def test_every_kind_of_source_gives_the_same_embeddings(place, proxy, quiet, tmp_path):
    run = embed(proxy, tmp_path / "run", place)
    assert same(run, quiet)
    if place.startswith("archive"):
        assert run.read_shard("images", 0)["uri"][3].as_py() == f"s3://{BUCKET}/archive/a.tar#003.png"
        # Neighbors in an archive are read by one request, not by one each.
        assert proxy.requests["archive/a.tar"] < 30


def test_a_whole_run_in_a_bucket(proxy, quiet):
    """Images and run on the store, by the command; equal to the local run, and continued like one."""
    run = f"s3://{BUCKET}/runs/whole"
    words = [
        *("select", "--images", f"s3://{BUCKET}/loose", "--run", run, "--budget", "6", "--encoder", "pca"),
        *("--endpoint-url", proxy.endpoint, "--json"),
    ]
    for key in ("embed.image_size=8", "embed.batch=4", "density.k=5", "resources.shard_rows=20"):
        words += ["--set", key]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["images"] == summary["embedded"] == 61 and summary["duplicates"] == 1
    where = Run(run, Access(proxy.endpoint))
    assert same(where, quiet)
    names = [[Path(pick["uri"]).name for pick in picks_of(made)] for made in (where, quiet)]
    assert names[0] == names[1]
    assert where.read_shard("duplicates", 0).to_pylist() == [{"image_id": 60, "first_image_id": 0}]
    assert b"data:image/jpeg" in where.read_bytes("report", "index.html")
    for table in ("images", "embeddings", "selection"):
        for name in objects.names(where.path(table), where.access):
            text = where.read_bytes(table, name)
            assert s3.SECRET_KEY.encode() not in text and s3.ACCESS_KEY.encode() not in text
    proxy.clear()
    again = CliRunner().invoke(app, words)
    assert set(json.loads(again.stdout)["already_complete"]) >= {"embeddings", "selection"}
    assert not any(key.startswith("loose/") for key in proxy.requests)


def test_bursts_of_faults_leave_no_trace(proxy, quiet, tmp_path):
    """A third of all requests slow down, break off, or come short, in listing and in reading."""
    proxy.rule = s3.either(
        s3.some(0.2, s3.SLOW_DOWN, seed=1),
        s3.some(0.1, s3.Reset(0.5), seed=2),
        s3.some(0.1, s3.Truncate(0.7), seed=3),
    )
    assert same(embed(proxy, tmp_path / "run", "loose/"), quiet)
    assert proxy.requests.total() > 1.2 * 61


def test_what_is_gone_or_changed_is_rejected_as_such(proxy, quiet, folder, tmp_path):
    run = tmp_path / "run"
    # Listed, then killed before the first image was read.
    proxy.rule = s3.only(lambda request: request.key.startswith("loose/"), s3.always(s3.EXPIRED_TOKEN))
    with pytest.raises(UserError, match=r"does not accept the credentials \(ExpiredToken\); renew them"):
        embed(proxy, run, "loose/")
    assert Run(str(run)).manifest("images").rows == 61
    proxy.rule = s3.only(
        lambda request: request.key == "loose/007.png" and request.method == "GET", s3.always(s3.NO_SUCH_KEY)
    )
    upstream = f"http://{proxy.upstream}"
    s3.fill(upstream, BUCKET, {"loose/031.png": (folder / "030.png").read_bytes()})
    try:
        done = embed(proxy, run, "loose/")
    finally:
        s3.fill(upstream, BUCKET, {"loose/031.png": (folder / "031.png").read_bytes()})
    rejected = [row for shard in range(4) for row in done.read_shard("rejected", shard).to_pylist()]
    assert [(row["image_id"], row["reason"]) for row in rejected] == [
        (7, "file not found"),
        (31, "changed since it was listed"),
    ]
    # The components of pca are fitted to a sample, which lacks the two.
    assert done.manifest("embeddings").rows == 59


@pytest.mark.faults
def test_a_run_that_goes_wrong_stops_and_says_why(proxy, tmp_path):
    proxy.rule = s3.only(lambda request: request.key[-5:] in ("1.png", "2.png"), s3.always(s3.ACCESS_DENIED))
    with pytest.raises(UserError) as caught:
        embed(proxy, tmp_path / "run", "loose/", **{"resources.max_rejected": 0.01})
    for words in (" of 61 images are rejected", "--max-rejected", "permission denied", "loose/001.png"):
        assert words in str(caught.value)
    proxy.rule = s3.never
    done = embed(proxy, tmp_path / "run", "loose/", **{"resources.max_rejected": 0.5})
    assert done.manifest("embeddings").summary["rejected"] + done.manifest("embeddings").rows == 61


@pytest.mark.faults
def test_since_an_earlier_run_only_what_is_new_is_embedded(proxy, quiet, folder, tmp_path):
    """Earlier images keep their ids and bits; a changed one keeps its embedding, and is counted."""
    upstream = f"http://{proxy.upstream}"
    some = {f"grows/{i:03d}.png": (folder / f"{i:03d}.png").read_bytes() for i in (*range(0, 40, 2), 50)}
    s3.fill(upstream, BUCKET, some)
    first = embed(proxy, tmp_path / "first", "grows/", **{"resources.shard_rows": 8})
    rest = {f"grows/{i:03d}.png": (folder / f"{i:03d}.png").read_bytes() for i in range(60)}
    changed = {"grows/050.png": (folder / "051.png").read_bytes()}
    s3.fill(upstream, BUCKET, {key: body for key, body in rest.items() if key not in some} | changed)
    proxy.clear()
    source = pipeline.Source(images=f"s3://{BUCKET}/grows/", since=first.uri)
    options = {"resources.endpoint_url": proxy.endpoint, "resources.shard_rows": 16}
    both = advance(tmp_path / "both", source=source, upto="embeddings", **options)
    read = {key for key in proxy.requests if key.startswith("grows/")}
    assert read == set(rest) - set(some)
    summary = both.manifest("images").summary
    assert (summary["images"], summary["new"], summary["changed"]) == (60, 39, 1)
    ids, x = vectors(both)
    assert np.array_equal(ids, np.arange(60))
    assert np.array_equal(x[:21], vectors(first)[1])
    uris = both.listed(ids)["uri"].to_pylist()
    assert uris[:21] == first.listed(np.arange(21))["uri"].to_pylist()
    assert uris[21:] == sorted(f"s3://{BUCKET}/{key}" for key in set(rest) - set(some))
    # Again, nothing is new; and with another encoder it is refused.
    source = pipeline.Source(images=f"s3://{BUCKET}/grows/", since=both.uri)
    third = advance(tmp_path / "third", source=source, upto="embeddings", **options)
    assert third.manifest("images").summary["images"] == 60 and same(third, both)
    with pytest.raises(UserError, match=r"embedded differently.*leave out --since"):
        advance(tmp_path / "other", source=source, upto="embeddings", **options, **{"embed.image_size": 9})


@pytest.mark.faults
def test_a_listing_that_was_killed_goes_on(proxy, quiet, tmp_path, monkeypatch):
    """What was listed is not listed again, and the rows are those of an undisturbed listing."""
    from selective_ray.actors import images

    monkeypatch.setattr(images, "JOURNAL_SECONDS", 0.0)
    run = tmp_path / "run"
    options = {"images.exclude": ("*9.png",)}
    # The archive lists its members after the loose files; there the first attempt ends.
    proxy.rule = s3.only(lambda request: request.key == "archive/a.tar", s3.always(s3.EXPIRED_TOKEN))
    with pytest.raises(UserError, match="does not accept the credentials"):
        embed(proxy, run, "", **options)
    assert Run(str(run)).exists("images", "listing", "journal.json")
    proxy.clear()
    proxy.rule = s3.never
    done = embed(proxy, run, "", **options)
    listings = [request for request in proxy.seen if request.query.get("list-type")]
    assert not listings, "the bucket was listed again"
    assert not Run(str(run)).exists("images", "listing", "journal.json")
    uris = done.listed(np.arange(done.manifest("images").rows))["uri"].to_pylist()
    assert uris == sorted(uris) and len(uris) == len(set(uris)) == sum(
        done.manifest("images").summary[key] for key in ("images",)
    )


@pytest.mark.faults
def test_a_report_does_without_pictures_that_cannot_be_had(two_cpus, tmp_path):
    """Brought embeddings whose uris name a store that does not answer."""
    x = np.random.default_rng(0).normal(size=(30, 4))
    file = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"embedding": x.tolist(), "uri": [f"s3://none/{i}.jpg" for i in range(30)]}), file
    )
    source = pipeline.Source(embeddings=str(file))
    run = advance(tmp_path / "run", source=source, **{"resources.endpoint_url": "http://127.0.0.1:9"})
    page = run.read_bytes("report", "index.html").decode()
    # Long reasons are cut in the middle.
    assert "unreadable: s3://none cannot b" in page
