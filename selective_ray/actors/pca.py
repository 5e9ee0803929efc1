"""The encoder `pca`, fitted to a seeded sample of the images of a run."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import ray

from selective_ray import encoders
from selective_ray.actors.rejections import nothing_usable
from selective_ray.actors.session import unwrapped
from selective_ray.actors.wave import ATTEMPTS, Pixels, Reading, listed
from selective_ray.errors import UserError
from selective_ray.store import Run

PCA_FILE = "pca.npz"
PCA_SAMPLE = 4096


def fitted_pca(
    run: Run, pixels: Pixels, rows: list[int], seed: int, how: Reading, patience: float
) -> dict[str, np.ndarray]:
    """Return the components of `pca`: those kept beside the embeddings, else fitted to a seeded sample.

    The sample is drawn by row position, whatever the shards; rows are the images of each. Images that
    cannot be read, or whose reading ends its process or hangs, are left out of it.
    """
    if run.exists("embeddings", PCA_FILE):
        with np.load(io.BytesIO(run.read_bytes("embeddings", PCA_FILE)), allow_pickle=False) as stored:
            return dict(stored)
    n = sum(rows)
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(n, PCA_SAMPLE), replace=False))
    shards = np.searchsorted(np.cumsum(rows), chosen, side="right")
    first = np.cumsum([0, *rows])
    parts = [(int(shard), chosen[shards == shard] - first[shard]) for shard in np.unique(shards)]
    decoded: dict[int, ray.ObjectRef] = {}
    reasons: Counter[str] = Counter()
    while parts:
        calls = {
            sample_pixels.remote(run, shard, places, pixels, how): (shard, places) for shard, places in parts
        }
        parts = []
        pending = list(calls)
        while pending:
            ready, pending = ray.wait(pending, timeout=patience)
            for call in ready:
                shard, places = calls[call]
                try:
                    with unwrapped():
                        usable, rejected = ray.get(call)
                    reasons.update(rejected)
                    decoded[int(first[shard] + places[0])] = usable
                except ray.exceptions.RayError:
                    # Ray tried it three times: look for the image at fault, and do without that one.
                    parts += (
                        [(shard, places[i : i + 1]) for i in range(len(places))] if len(places) > 1 else []
                    )
            if not ready:
                for call in pending:
                    ray.cancel(call, force=True)
    sample = np.concatenate([decoded[place] for place in sorted(decoded)]) if decoded else np.empty((0, 1))
    if not len(sample):
        raise UserError(nothing_usable(n, reasons))
    pca = encoders.fit_pca(sample)
    buffer = io.BytesIO()
    np.savez(buffer, **pca)
    run.write_bytes(buffer.getvalue(), "embeddings", PCA_FILE)
    return pca


@ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)
def sample_pixels(
    run: Run, shard: int, places: np.ndarray, pixels: Pixels, how: Reading
) -> tuple[np.ndarray, list[str]]:
    """Decode some images of a shard: those that can be, uint8 [s, h, w, 3], and why the others cannot."""
    rows = listed(run, shard).take(pa.array(places))
    usable, reasons = [np.empty((0, pixels.size, pixels.size, 3), np.uint8)], []
    for image, _, reason in how.decoded(rows, pixels):
        if image is None:
            reasons.append(reason)
        else:
            usable.append(image[None])
    return np.concatenate(usable), reasons
