"""Plans: by hand on round rates, laws, what does not fit, and the probe through the command."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import s3
from conftest import unit
from test_cli import ask, line_of
from test_pipeline import pictures

from selective_ray import config, ivf, kmeans, machines
from selective_ray.actors import probe as probing
from selective_ray.errors import UsageError, UserError
from selective_ray.listing import Source
from selective_ray.machines import Fleet, Machine
from selective_ray.objects import Access
from selective_ray.planning import Rates, plan
from selective_ray.survey import Survey, survey

ROOT = Path(__file__).parents[1]
SURVEY = Survey(
    images=65_536 * 100,
    nbytes=65_536 * 100 * 100_000,
    list_requests=6_554,
    get_requests=65_536 * 100,
    listed=1_000,
    seconds=1.0,
    whole=True,
    parts=True,
)
RATES = Rates(
    cpus=2,
    gpus=0,
    workers=2,
    d=128,
    ray_seconds=10,
    list_rows=20_000,
    encoder_seconds=30,
    embed_rows=100,
    decode_rows=400,
    encode_rows=100 / 1.5,
    encode_flops=1e9,
    pixel_bytes=3 * 224 * 224,
    holder_seconds=5,
    join_products=1e8,
    row_seconds=1e-5,
    products=1e9,
    later_share=0.2,
    iterations=21,
    cluster_seconds=1e-6,
    select_seconds=2e-6,
    select_clusters=200,
    cluster_start=0.5,
    select_start=1.5,
)
HERE = Fleet(((Machine("here", cpus=2, memory=16e9, store=7e9, disk=1e12), 1),))


def settings(**options):
    return config.load(options={"selection.budget": 1000, **options})[0]


def by_stage(planned):
    return {stage.name: stage for stage in planned.stages}


def test_a_plan_by_hand():
    stages = by_stage(plan(RATES, settings(), HERE, survey=SURVEY))
    n = 65_536 * 100
    assert stages["list"].seconds == pytest.approx(10 + n / 40_000)
    # 100 shards are one wave of two encoders, 64 each, and two of one: each wave starts its encoders.
    assert stages["embed"].seconds == pytest.approx(30 + n / 100)
    one = replace(HERE.machines[0][0], cpus=1)
    alone = by_stage(plan(RATES, settings(), Fleet(((one, 1),)), survey=SURVEY))
    assert alone["embed"].seconds == pytest.approx(2 * 30 + n / 50)
    assert stages["embed"].limit == "encoding"
    search = replace(ivf.plan(n, 128, 20), workers=2)
    assert stages["density"].seconds == pytest.approx(5 + search.products / 1e8 + n * 1e-5 / 2)
    assert stages["density"].worker_bytes == search.holder_bytes(n // 2, 2)
    assert stages["density"].store_bytes == search.moved_bytes(4)
    assert stages["cluster"].seconds == pytest.approx(0.5 + n * 1000 * (1 + 20 * 0.2) / 1e9 + n * 1e-6 / 2)
    assert stages["cluster"].worker_bytes == kmeans.holder_bytes(n // 2, 128, 1000)
    # Prototypes compare rows with all picks, five times those of the stand-in; rounds of USL with few.
    assert stages["select"].seconds == pytest.approx(1.5 + 5 * n * 2e-6 / 2)
    rounds = by_stage(plan(RATES, settings(**{"selection.method": "usl"}), HERE, survey=SURVEY))
    assert rounds["select"].seconds == pytest.approx(1.5 + n * 2e-6 / 2)
    assert stages["embed"].requests == {"get": n + 200, "put": 300}


def test_twice_the_machines_take_half_the_time_and_as_many_hours():
    one = Machine("a", cpus=2, memory=64e9, store=30e9, disk=1e12, network=1e12, hour=1.0)
    plans = [plan(RATES, settings(), Fleet(((one, count),)), survey=SURVEY) for count in (2, 4)]
    for name, stage in by_stage(plans[0]).items():
        twice = by_stage(plans[1])[name]
        fixed = {"list": 10, "embed": 30, "density": 5, "cluster": 0.5, "select": 1.5}[name]
        network = 21 * 128 * 1000 * 8 * 4 / 1e12 if name == "cluster" else 0
        assert stage.seconds - fixed == pytest.approx(2 * (twice.seconds - fixed), rel=1e-3, abs=network * 3)
        assert stage.machine_seconds == {"a": 2 * stage.seconds}


def test_stages_after_embedding_leave_machines_without_gpus_alone():
    table = machines.read_prices()
    head, kinds = machines.read_cluster(str(ROOT / "cluster.yaml"), table)
    (fleet,) = machines.chosen(["gpu_small:4,decode:2"], head, kinds, table)
    planned = plan(RATES, settings(), fleet, survey=SURVEY, requests=table.requests)
    stages = by_stage(planned)
    assert set(stages["list"].machine_seconds) == {"decode"}
    assert set(stages["embed"].machine_seconds) == {"decode", "gpu_small"}
    assert set(stages["density"].machine_seconds) == {"gpu_small"}
    # Four L4 at 3e13 operations a second, 1e9 for an image; 128 CPUs less what the encoders take.
    decoding = (128 - 0.4) * 400 * min(1.0, 100 / (2 / (1 / 400 + 1.5 / 100)))
    assert stages["embed"].limit == ("decoding" if decoding < 4 * 3e4 else "encoding")
    assert stages["embed"].seconds == pytest.approx(30 + SURVEY.images / min(decoding, 4 * 3e4))
    assert stages["density"].workers == 4
    gets = stages["embed"].requests["get"]
    hours = sum(kinds[k].hour * s / 3600 for k, s in stages["embed"].machine_seconds.items())
    puts = stages["embed"].requests["put"]
    assert stages["embed"].dollars == pytest.approx(hours + gets * 0.0004 / 1000 + puts * 0.005 / 1000)
    assert planned.dollars > sum(stage.dollars for stage in planned.stages)


def test_what_does_not_fit_is_refused_with_what_would():
    small = Machine("small", cpus=4, memory=8e9, store=3e9, disk=1e11, hour=1.0)
    large = Machine("large", cpus=8, memory=64e9, store=30e9, disk=1e11, hour=4.0)
    fleet = Fleet(((small, 2),))
    planned = plan(RATES, settings(), fleet, n=50_000_000, kinds=[small, large])
    (why,) = planned.refused
    assert "8 workers that hold the embeddings take" in why and "small:2 has memory for" in why
    for kind in (small, large):
        count = int(why.split(f"{kind.name}:")[-1].split(" ")[0].rstrip(";"))
        assert not plan(RATES, settings(), Fleet(((kind, count),)), n=50_000_000).refused
        assert plan(RATES, settings(), Fleet(((kind, count - 1),)), n=50_000_000).refused


def test_more_than_the_object_stores_hold_goes_to_disks_or_is_refused():
    machine = Machine("a", cpus=2, memory=64e9, store=1e9, disk=1e12, hour=1.0)
    planned = plan(RATES, settings(), Fleet(((machine, 1),)), n=10_000_000)
    moved = replace(ivf.plan(10_000_000, 128, 20), workers=2).moved_bytes(4)
    assert not planned.refused and planned.disk_bytes == moved - 1_000_000_000
    (why,) = plan(RATES, settings(), Fleet(((replace(machine, disk=1e9), 1),)), n=10_000_000).refused
    assert "do not fit into the object stores of a:1" in why and "a:4 would do" in why


def test_workers_that_are_asked_for_count_unless_machines_come_for_them():
    machine = Machine("a", cpus=8, memory=64e9, store=30e9, disk=1e12, hour=1.0)
    for options, workers in (({"resources.workers": 3}, 3), ({}, 8)):
        stages = by_stage(plan(RATES, settings(**options), Fleet(((machine, 1),)), n=10_000_000))
        assert stages["density"].workers == workers
    grows = settings(**{"resources.workers": 3, "resources.autoscale": True})
    stages = by_stage(plan(RATES, grows, Fleet(((machine, 2),)), n=10_000_000))
    assert stages["density"].workers == 16


def test_two_levels_of_clusters_cost_a_root_of_them():
    fleet = Fleet(((Machine("a", cpus=2, memory=1e12, store=1e12, disk=1e12), 1),))
    many = settings(**{"selection.budget": 90_000})
    stage = by_stage(plan(RATES, many, fleet, n=1_000_000))["cluster"]
    compared = 300 * (1 + 0.2 * 9) + 300 * 10 + 90_000 * (1 + 0.2 * 2)
    assert stage.seconds == pytest.approx(0.5 + 1e6 * compared / 1e9 + 1e6 * 1e-6 / 2)


def test_machines_are_those_of_the_description_at_the_prices_of_the_table(tmp_path):
    table = machines.read_prices()
    head, kinds = machines.read_cluster(str(ROOT / "cluster.yaml"), table)
    assert head.hour == table.instances["m7i.2xlarge"]["hour"]
    assert {name: (kind.gpus, kind.most) for name, kind in kinds.items()} == {
        "decode": (0, 32),
        "gpu_small": (1, 16),
        "gpu_large": (4, 8),
    }
    assert kinds["decode"].hour == table.instances["c6id.8xlarge"]["spot"]
    assert kinds["gpu_large"].store <= 200e9
    with pytest.raises(UsageError, match="there is no kind 'gpu'"):
        machines.chosen(["gpu:3"], head, kinds, table)
    with pytest.raises(UsageError, match="at most 8 of gpu_large"):
        machines.chosen(["gpu_large:9"], head, kinds, table)
    with pytest.raises(UsageError, match="form KIND:COUNT"):
        machines.chosen(["gpu_large"], head, kinds, table)
    other = tmp_path / "prices.toml"
    other.write_text(machines.PRICES.read_text().replace("c6id.8xlarge", "c6id.9xlarge"))
    with pytest.raises(UserError, match="which decode is"):
        machines.read_cluster(str(ROOT / "cluster.yaml"), machines.read_prices(str(other)))
    other.write_text("hour = 3")
    with pytest.raises(UsageError, match="is no table of prices"):
        machines.read_prices(str(other))


def test_a_survey_counts_all_and_samples_by_seed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(700):
        (folder / f"{i:04d}.png").write_bytes(b"x" * (i + 1))
    found, rows = survey(Source(str(folder)), sample=128, seed=3)
    assert (found.images, found.nbytes, found.whole) == (700, 700 * 701 // 2, True)
    assert found.get_requests == 700 and not found.parts
    assert len(rows) <= 128 and rows["uri"].to_pylist() == sorted(rows["uri"].to_pylist())
    again = survey(Source(str(folder)), sample=128, seed=3)[1]
    assert again.equals(rows) and not survey(Source(str(folder)), sample=128, seed=4)[1].equals(rows)
    assert len(survey(Source(str(folder)), sample=5_000)[1]) == 700
    twice = found.scaled(1400)
    assert (twice.nbytes, twice.get_requests) == (700 * 701, 1400)


def test_archives_that_were_not_opened_count_as_the_others(tmp_path):
    import io
    import tarfile

    for name in range(6):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(100):
                info = tarfile.TarInfo(f"{i:03d}.png")
                info.size = 10
                tar.addfile(info, io.BytesIO(b"0123456789"))
    found, _ = survey(Source(str(tmp_path)), sample=64, seconds=0.0)
    assert 100 <= found.listed < 600 and (found.images, found.nbytes, found.whole) == (600, 6000, True)
    # Members that lie near each other are read together.
    assert found.get_requests == 6 and found.parts


def test_bytes_of_parquet_files_and_lists_are_looked_up(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "some.parquet"
    pq.write_table(pa.table({"image": [b"\xff" * 100] * 50}), file)
    found, _ = survey(Source(str(file)), sample=64)
    assert (found.images, found.nbytes) == (50, file.stat().st_size)
    names = []
    for i in range(40):
        names.append(str(tmp_path / f"{i:02d}.png"))
        Path(names[-1]).write_bytes(b"x" * 30)
    (tmp_path / "list.txt").write_text("\n".join(names))
    found, _ = survey(Source(str(tmp_path / "list.txt")), sample=64)
    assert (found.images, found.nbytes) == (40, 40 * 30)


def test_a_folder_that_is_not_listed_in_time_is_not_whole(tmp_path, monkeypatch):
    from selective_ray import listing

    monkeypatch.setattr(listing, "PIECE_ROWS", 50)
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    found, _ = survey(Source(str(tmp_path)), sample=64, seconds=0.0)
    assert not found.whole and found.images < 200
    with pytest.raises(UserError, match="give --count"):
        probing.probe(
            probing.pipeline.Source(images=str(tmp_path)), settings(), probing.Reporter(quiet=True), seconds=0
        )


def test_a_stand_in_is_as_spread_as_what_it_stands_for():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, 32))
    x = unit(centers[rng.integers(0, 20, 2000)] + 0.3 * rng.normal(size=(2000, 32)))
    made = probing.stand_in(x, 5000, seed=1)
    assert made.shape == (5000, 32) and np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert len(np.unique(made, axis=0)) == 5000
    nearest = (2 - 2 * (made @ x.T)).min(axis=1)
    among = np.sort(2 - 2 * (x @ x.T), axis=1)[:, 1]
    # No farther from the others than these are from each other.
    assert np.median(nearest) < np.median(among)
    assert np.array_equal(made, probing.stand_in(x, 5000, seed=1))


def test_the_command_probes_plans_and_keeps_what_it_measured(two_cpus, tmp_path):
    images = pictures(tmp_path / "images", 120)
    words = ["plan", "--images", str(images), "--budget", "6", "--encoder", "pca"]
    words += ["--set", "embed.image_size=8", "--set", "density.k=5", "--cluster", str(ROOT / "cluster.yaml")]
    words += ["--probe", str(tmp_path / "probe.json"), "--set", "resources.workers=1"]
    told = json.loads(ask(*words, "--json").stdout)
    assert told["images"] == 120
    assert told["bytes"] == sum(file.stat().st_size for file in images.iterdir())
    (made,) = told["plans"]
    assert [stage["name"] for stage in made["stages"]] == ["list", "embed", "density", "cluster", "select"]
    assert all(math.isfinite(stage["seconds"]) and stage["seconds"] >= 0 for stage in made["stages"])
    assert made["refused"] == [] and made["dollars"] == 0
    kept = (tmp_path / "probe.json").read_text()
    answer = ask(*words, "--count", "50000000000", "--on", "gpu_large:8,decode:16", "--on", "decode:1")
    assert (tmp_path / "probe.json").read_text() == kept
    assert "images     50,000,000,000" in answer.stdout and "on gpu_large:8,decode:16" in answer.stdout
    assert answer.exit_code == 1 and "does not fit: " in answer.stdout
    words[words.index("pca")] = "resnet18"
    line = line_of(ask(*words), 1)
    assert "holds another probe (embed.encoder is pca there and resnet18 here)" in line
    assert len(list(images.iterdir())) == 120


def test_embeddings_that_are_there_are_planned_from(two_cpus, blobs, tmp_path):
    np.save(tmp_path / "x.npy", blobs)
    words = ["plan", "--embeddings", str(tmp_path / "x.npy"), "--budget", "12", "--set", "density.k=5"]
    words += ["--set", "resources.workers=1"]
    told = json.loads(ask(*words, "--json").stdout)
    assert [stage["name"] for stage in told["plans"][0]["stages"]] == ["density", "cluster", "select"]
    assert told["images"] == 300 and told["probe"]["d"] == 8


def test_the_page_shows_what_the_functions_say(capsys):
    spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = (ROOT / "docs" / "planning.md").read_text()
    fleets = ["g6e.12xlarge:2", "g6e.12xlarge:16"]
    module.table(str(ROOT / "jobs" / "configs" / "fifty_million.toml"), 50_000_000, fleets)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 2 * 6
    assert [line for line in printed if line not in shown] == []
    for name, n, fleet in (
        ("imagenet", 1_281_167, "gpu_small:4,decode:2"),
        ("fifty_million", 50_000_000, "gpu_large:8,decode:16"),
    ):
        file = ROOT / "jobs" / "configs" / f"{name}.toml"
        module.table(str(file), n, [fleet])
        minutes = capsys.readouterr().out.splitlines()[-1].split("**")[3]
        assert f"Minutes:  {minutes}, five of them until machines are up" in file.read_text()
        assert f"{n} and" in " ".join(file.read_text().replace("#", "").split())


def test_images_in_a_bucket_are_surveyed(s3_endpoint, monkeypatch):
    for key, value in s3.credentials().items():
        monkeypatch.setenv(key, value)
    s3.fill(s3_endpoint, "surveyed", {f"{i:03d}.png": b"x" * 7 for i in range(30)})
    found, rows = survey(Source("s3://surveyed"), Access(s3_endpoint), sample=64)
    assert (found.images, found.nbytes, found.get_requests, len(rows)) == (30, 210, 30, 30)
    assert found.parts and found.list_requests == 1
