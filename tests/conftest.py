"""A private Ray of two CPUs for the tests that ask for one, and small worlds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import s3

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def two_cpus(tmp_path_factory):
    """A local Ray of two CPUs; every test that uses it works in its own run folder."""
    import ray

    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path_factory.mktemp("wandb"))}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # Workers find them as they would find a role's; the endpoint comes with the run.
    os.environ |= s3.credentials()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint():
    """An S3 server for all tests that ask for one; each makes a bucket of its own."""
    with s3.server() as endpoint:
        yield endpoint


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def blobs():
    """300 unit vectors of 8 dimensions around 12 centers, float32."""
    rng = np.random.default_rng(5)
    centers = rng.normal(size=(12, 8))
    return unit(centers[rng.integers(0, 12, 300)] + 0.25 * rng.normal(size=(300, 8)))
