"""A run from its source to its report: every stage that is not complete yet, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from selective_ray import listing, objects, report
from selective_ray.actors import density, duplicates, embeddings, kmeans, selection, since
from selective_ray.actors.brought import bring_file, refer_to_run
from selective_ray.actors.images import list_source
from selective_ray.actors.session import Session
from selective_ray.actors.shards import Pool
from selective_ray.config import Config
from selective_ray.density import possible_k
from selective_ray.errors import UserError
from selective_ray.lease import Lease
from selective_ray.objects import Access
from selective_ray.progress import Reporter
from selective_ray.reading import Read
from selective_ray.store import TABLES, Run


@dataclass(frozen=True)
class Source:
    """Where the images or embeddings come from: one of the two; images perhaps since an earlier run."""

    images: str | None = None
    embeddings: str | None = None
    since: str | None = None


def advance(
    run: Run,
    source: Source,
    config: Config,
    asked: set[str],
    reporter: Reporter,
    *,
    upto: str,
    address: str | None = None,
    read: Read = objects.read,
) -> None:
    """Bring a run up to a table (embeddings, density, clusters or selection), doing only what is missing.

    `selection` adds the report. asked are the keys of the configuration that a person chose. Raises
    UserError where the run is in use, was made with another configuration, or the data do not allow it.
    """
    earlier = _earlier_run(source, config.resources.access())
    before = Run(source.since, config.resources.access()) if source.since else None
    if before:
        since.check(before, embeddings.identity(config))
    run.prepare()
    with Lease(run, reporter.say) as lease, Session(address) as session:
        if earlier:
            refer_to_run(run, earlier)
        elif source.embeddings:
            bring_file(run, source.embeddings, config, reporter)
        else:
            chosen = listing.Source(source.images or "", **config.images.model_dump())
            listed = list_source(run, chosen, config, session, reporter, before)
            if upto in ("clusters", "selection"):
                _check_budget(config, listed.rows, "images found")
            if upto in ("density", "selection"):
                settings = config.density
                possible_k(settings.k, listed.rows, settings.include_self, "density.k" in asked)
            embeddings.embed(run, config, session, reporter, earlier=before, check=lease.check, read=read)
            duplicates.find(run, session)
        if upto in ("clusters", "selection"):
            _check_budget(config, run.manifest("embeddings").rows, "embedded images")
        use_gpus = config.resources.gpus_per_worker != 0
        pool = Pool(run, config.resources.workers, session, use_gpus=use_gpus)
        if upto in ("density", "selection"):
            density.measure(run, config, pool, reporter, asked=asked, earlier=earlier, check=lease.check)
        if upto in ("clusters", "selection"):
            kmeans.cluster(run, config, pool, reporter, earlier=earlier, check=lease.check)
        if upto == "selection":
            selection.select(run, config, pool, reporter, check=lease.check)
            pool.stop()
            if not run.exists("report", "index.html"):
                write_report(run, config.seed, reporter)


def _earlier_run(source: Source, access: Access) -> Run | None:
    """Return the run that --embeddings names, None where it names a file."""
    if not source.embeddings or source.embeddings.endswith((".npy", ".parquet")):
        return None
    earlier = Run(source.embeddings, access)
    if earlier.manifest("embeddings") is None:
        raise UserError(
            f"{source.embeddings} is neither a .npy or .parquet file nor a run with finished embeddings; "
            "check --embeddings"
        )
    return earlier


def _check_budget(config: Config, n: int, what: str) -> None:
    budget = config.selection.budget
    if budget and budget > n:
        raise UserError(f"budget {budget} exceeds the {n} {what}; lower --budget to {n} or fewer")


def write_report(run: Run, seed: int, reporter: Reporter) -> bool:
    """Write `report/index.html`; where that fails, say so and let the run be."""
    try:
        report.write(run, seed=seed, say=reporter.say)
    except Exception as error:
        reporter.warn(
            f"the report could not be written ({type(error).__name__}: {error}); the run is complete"
        )
        return False
    return True


def summarize(run: Run) -> dict[str, Any]:
    """Return the counts and seconds of all tables that are finished."""
    manifests = {table: run.manifest(table) for table in TABLES}
    found = {table: manifest for table, manifest in manifests.items() if manifest}
    counts: dict[str, Any] = {}
    for table in ("images", "embeddings", "rejected", "duplicates", "clusters", "selection"):
        if table in found:
            counts |= {key: value for key, value in found[table].summary.items() if key != "version"}
    return {
        "run": run.uri,
        **counts,
        # These three are made together with others.
        "made_here": [
            table
            for table in found
            if table not in ("rejected", "duplicates", "neighbors") and not found[table].refers_to
        ],
        "seconds": {table: manifest.seconds for table, manifest in found.items()},
        "report": run.path("report", "index.html") if run.exists("report", "index.html") else None,
    }
