"""The density stage: every actor measures its shards against all rows."""

from __future__ import annotations

from collections.abc import Callable

from selective_ray import density
from selective_ray.actors.session import peak_memory
from selective_ray.actors.shards import BLOCK_ROWS, Pool
from selective_ray.config import Config
from selective_ray.progress import Reporter
from selective_ray.store import Manifest, Run, Stopwatch

# Groups of queries in all: enough for a progress bar, few enough that each reads all rows.
GROUPS = 32


def measure(
    run: Run,
    config: Config,
    pool: Pool,
    reporter: Reporter,
    *,
    asked: bool = False,
    earlier: Run | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Measure every image's distance to its k nearest neighbors into `density/`.

    asked tells that density.k was chosen by a person and must not be lowered. Finished shards of earlier
    attempts stay.
    """
    embeddings = run.manifest("embeddings")
    assert embeddings is not None
    settings = config.density
    k, warning = density.possible_k(settings.k, embeddings.rows, settings.include_self, asked)
    if warning:
        reporter.warn(warning)
    what = {"density": {**settings.model_dump(), "mode": "exact", "k": k}}
    if done := run.begin("density", what, run.fingerprints("embeddings"), earlier):
        return done
    stopwatch = Stopwatch(run, "density")
    finished = {shard: run.recorded_shard("density", shard) for shard in run.finished_shards("density")}
    shards = {shard: found for shard, found in finished.items() if found}
    rows = [shard.rows for shard in embeddings.shards]
    memory = 0
    with reporter.stage("density", embeddings.rows, "images", sum(s.rows for s in shards.values())) as bar:
        pool.start()
        calls = []
        for actor, held in zip(pool.actors, pool.held, strict=True):
            for group in _groups([shard for shard in held if shard not in shards], rows):
                calls.append(
                    actor.measure.remote(
                        group, len(rows), k, settings.include_self, settings.estimator, settings.floor
                    )
                )
        for written, peak in pool.answers(calls):
            shards |= {shard.index: shard for shard in written}
            memory = max(memory, peak)
            bar.advance(sum(shard.rows for shard in written))
            check()
            stopwatch.note()
    return run.finish(
        "density",
        shards.values(),
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": memory},
        summary={"k": k, "neighbors": "exact"},
    )


def _groups(shards: list[int], rows: list[int]) -> list[list[int]]:
    """Gather adjacent shards whose rows are compared with all others at once."""
    most = min(BLOCK_ROWS, max(1, sum(rows) // GROUPS))
    groups: list[list[int]] = []
    for shard in shards:
        last = groups[-1] if groups else None
        if last and last[-1] == shard - 1 and sum(rows[i] for i in last) + rows[shard] <= most:
            last.append(shard)
        else:
            groups.append([shard])
    return groups
