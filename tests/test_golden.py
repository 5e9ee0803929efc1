"""Golden: selections of the published code, element for element, through the command.

The file lies outside the project; where it is not at hand these tests say so and are skipped.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from typer.testing import CliRunner

from selective_ray.cli import app

GOLDEN = SHARED / "golden" / "usl_synthetic.npz"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN.name} is not at hand")

COMMON = "--seed 3 --set density.k=20 --set cluster.iterations=50"
VARIANTS = {
    "cifar10": "--preset usl-cifar10",
    "noreg": "--preset usl-cifar10 --set selection.weight=0 --set selection.rounds=1",
    "cifar100": "--preset usl-cifar100",
    "moco_h8": "--preset usl-imagenet-moco --set selection.horizon_picks=8",
    "clip_h8": "--preset usl-imagenet-clip --set selection.horizon_picks=8",
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["A", "B"])
def test_selections_equal_the_published(name, golden, two_cpus, tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, golden[f"{name}_x"])
    m = len(golden[f"{name}_init"])
    source = file
    for variant, options in VARIANTS.items():
        run = tmp_path / variant
        command = f"select --embeddings {source} --run {run} --budget {m} {COMMON} {options}"
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        picks = pq.read_table(run / "selection" / "part-00000.parquet")
        assert picks["image_id"].to_pylist() == golden[f"{name}_sel_{variant}"].tolist(), variant
        assert picks["cluster_id"].to_pylist() == list(range(m))
        # The other variants use the embeddings, densities and clusters of the first.
        source = tmp_path / "cifar10"

    first = tmp_path / "cifar10"
    clusters = pq.read_table([*sorted((first / "clusters").glob("*.parquet"))])
    assert clusters["cluster_id"].to_pylist() == golden[f"{name}_labels"].tolist()
    densities = pq.read_table([*sorted((first / "density").glob("*.parquet"))])
    assert np.allclose(densities["mean_sq_dist"], golden[f"{name}_mean_sqdist"], rtol=1e-6, atol=0)
    centroids = np.load(first / "clusters" / "centroids.npy")
    assert np.allclose(centroids, golden[f"{name}_centroids"], atol=1e-6)


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_selections_in_memory_equal_the_published(name, variant, golden):
    from selective_ray import select

    words = [word for word in VARIANTS[variant].split() if word != "--set"]
    settings = {key: float(value) for key, value in (word.split("=") for word in words[2:])}
    if "selection.rounds" in settings:
        settings["selection.rounds"] = 1
    if "selection.horizon_picks" in settings:
        settings["selection.horizon_picks"] = 8
    selected = select(
        golden[f"{name}_x"],
        len(golden[f"{name}_init"]),
        preset=words[1],
        seed=3,
        settings={"density.k": 20, "cluster.iterations": 50} | settings,
    )
    assert selected.rows.tolist() == golden[f"{name}_sel_{variant}"].tolist()
