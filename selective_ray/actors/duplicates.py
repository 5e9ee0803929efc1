"""Images that are equal byte for byte: found by the digests beside the embeddings, kept in `duplicates/`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from selective_ray.actors.session import Session, in_order_of_arrival, peak_memory
from selective_ray.schema import DUPLICATES
from selective_ray.store import Manifest, Run, Shard, Stopwatch

# Digests that one task compares: those of a share of all values.
ROWS_PER_TASK = 4_000_000


def find(run: Run, session: Session) -> Manifest | None:
    """Write `duplicates/` of a run with embeddings of its own: each copy with the smallest id of its kind."""
    embedded = run.manifest("embeddings")
    if embedded is None or embedded.refers_to:
        return run.manifest("duplicates")
    if done := run.begin("duplicates", {}, run.fingerprints("embeddings")):
        return done
    stopwatch = Stopwatch(run, "duplicates")
    session.start()
    shares = -(-embedded.rows // ROWS_PER_TASK)
    shards = [shard.index for shard in embedded.shards]
    calls = [(run, shards, share, shares) for share in range(shares)]
    answers = list(in_order_of_arrival(_compare, calls))
    return run.finish(
        "duplicates",
        [shard for shard, _ in answers],
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": max(peak for _, peak in answers)},
        summary={"duplicates": sum(shard.rows for shard, _ in answers)},
    )


@ray.remote(num_cpus=1, max_retries=2)
def _compare(run: Run, shards: list[int], share: int, shares: int) -> tuple[Shard, int]:
    """Write the copies among the images whose digest falls into a share of all values."""
    parts = []
    for shard in shards:
        rows = run.read_shard("embeddings", shard, ["image_id", "digest"])
        if shares > 1:
            heads = np.array([int.from_bytes(d[:4]) for d in rows["digest"].to_pylist()], np.int64)
            rows = rows.filter(pa.array(heads % shares == share))
        parts.append(rows)
    rows = pa.concat_tables(parts)
    kinds = rows.group_by("digest").aggregate([("image_id", "min"), ("image_id", "count")])
    kinds = kinds.filter(pc.greater(kinds["image_id_count"], 1)).drop_columns("image_id_count")
    rows = rows.join(kinds, "digest", join_type="inner")
    rows = rows.filter(pc.not_equal(rows["image_id"], rows["image_id_min"])).sort_by("image_id")
    copies = pa.table([rows["image_id"], rows["image_id_min"]], DUPLICATES)
    return run.write_shard("duplicates", share, copies), peak_memory()
