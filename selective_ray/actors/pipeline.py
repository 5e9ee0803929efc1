"""A run from its source to its report: every stage that is not complete yet, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selective_ray import label_files, labeled, labeling, learned, listing, objects, report, truth
from selective_ray.actors import density, duplicates, embeddings, kmeans, selection, since, usl_t
from selective_ray.actors.brought import bring_file, refer_to_run
from selective_ray.actors.images import list_source
from selective_ray.actors.pool import Pool
from selective_ray.actors.session import Session
from selective_ray.actors.watching import watched
from selective_ray.config import OF_NEIGHBORS, Config
from selective_ray.density import possible_k
from selective_ray.errors import UsageError, UserError
from selective_ray.lease import FILE as LEASE
from selective_ray.lease import Lease
from selective_ray.objects import Access
from selective_ray.progress import Reporter
from selective_ray.reading import Read
from selective_ray.store import Run, stage_of


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
    access = config.resources.access()
    file = config.selection.labeled
    marked = labeled.read(file, access) if file and upto in ("clusters", "selection") else labeled.NONE
    oracle = config.selection.labels if upto in ("clusters", "selection") else None
    if oracle and oracle != truth.FOLDERS:
        # Before any work: it may not be there, or say nothing.
        label_files.parse(labeling.read_file(oracle, access), oracle)
    if upto == "selection" and config.selection.method in OF_NEIGHBORS and not config.density.keep_neighbors:
        raise UsageError(
            f"{config.selection.method} takes the neighbors of every image, and they are not kept: add --set "
            "density.keep_neighbors=true (where the run has densities already, with another --run)"
        )
    earlier = _earlier_run(source, access)
    before = Run(source.since, access) if source.since else None
    if before:
        since.check(before, embeddings.identity(config))
    run.prepare()
    # The lease lies in the run's folder: a machine that does not see it sees another folder.
    # A checkpoint that came with a job lies where each process of the job works; the others do not move.
    given = [path for path in (source.images, source.embeddings, source.since) if path and "://" not in path]
    encoder = config.embed.encoder
    if source.images and learned.is_name(encoder):
        # Before any work: there may be none.
        learned.find(encoder, access)
        given += [encoder] if "://" not in encoder else []
    reporter.run = run.uri
    paths = [run.path(LEASE), config.embed.checkpoint, *(str(Path(path).absolute()) for path in given)]
    with (
        Lease(run, reporter.say) as lease,
        Session(address, paths) as session,
        watched(run, reporter, config.resources),
    ):
        if earlier:
            refer_to_run(run, earlier)
        elif source.embeddings:
            bring_file(run, source.embeddings, config, reporter)
        else:
            chosen = listing.Source(source.images or "", **config.images.model_dump())
            listed = list_source(run, chosen, config, session, reporter, before)
            if upto in ("clusters", "selection"):
                _check_budget(config, len(marked), listed.rows, "images found")
                labeled.find(run, marked)
            if upto in ("density", "selection"):
                settings = config.density
                possible_k(settings.k, listed.rows, settings.include_self, "density.k" in asked)
            embeddings.embed(run, config, session, reporter, earlier=before, check=lease.check, read=read)
            duplicates.find(run, session)
        steps: list[selection.Step] = []
        if upto in ("clusters", "selection"):
            _check_budget(config, len(marked), run.manifest("embeddings").rows, "embedded images")
            told = truth.read([run], oracle) if oracle else None
            fixed = labeled.find(run, marked)
            labeled.check_embedded(run, fixed)
            steps = selection.steps(config, fixed, told)
            _check_extends(run, config, steps)
        pool = Pool(run, config.resources, session)
        # The neighbors of images are what their clusters are trained to agree with.
        if upto in ("density", "selection") or config.selection.method == "usl-t":
            density.measure(run, config, pool, reporter, asked=asked, earlier=earlier, check=lease.check)
        for step in steps:
            how = {"budget": step.budget, "labeled": len(marked), "check": lease.check}
            if config.selection.method == "usl-t":
                usl_t.cluster(run, config, pool, reporter, **how)
            else:
                where = {"table": step.clusters, "earlier": earlier}
                kmeans.cluster(run, config, pool, reporter, **where, **how)
            if upto == "selection":
                last = step is steps[-1] and run.manifest(step.selection) is None
                if last and run.exists("report", "index.html"):
                    # It is about a smaller budget.
                    run.delete("report", "index.html")
                selection.select(run, config, step, pool, reporter, check=lease.check)
        pool.stop()
        if upto == "selection" and not run.exists("report", "index.html"):
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


def _check_budget(config: Config, marked: int, n: int, what: str) -> None:
    budget = config.selection.every_budget()[-1]
    if budget + marked > n:
        room = max(0, n - marked)
        besides = f" besides the {marked} labeled" if marked else ""
        raise UserError(
            f"budget {budget} exceeds the {room} {what}{besides}; "
            + (f"lower --budget to {room} or fewer" if room else "there is nothing left to label")
        )


def _check_extends(run: Run, config: Config, steps: list[selection.Step]) -> None:
    """Refuse budgets that do not begin with those this run was made for, before anything is made or moved."""
    tables = [table for table in run.tables() if stage_of(table) in ("clusters", "selection")]
    if len(steps) == 1 and len(tables) == 2:
        # Another budget in place of one is told of where its tables are begun.
        return
    there = {table: manifest for table in tables if (manifest := run.manifest(table))}
    made = sorted({manifest.what["selection"]["budget"] for manifest in there.values()})
    asked = [step.budget for step in steps]
    if made != asked[: len(made)]:
        lists = (", ".join(f"{budget:,}" for budget in budgets) for budgets in (made, asked))
        raise UserError(
            "{0} was made for the budgets {1}, and {2} does not begin with these; add larger ones, or "
            "choose another --run, with --embeddings {0} to use its embeddings again".format(run.uri, *lists)
        )
    for table, manifest in there.items():
        step = steps[asked.index(manifest.what["selection"]["budget"])]
        if stage_of(table) == "clusters":
            run.check_same(table, kmeans.what_of(config, step.budget, len(step.labeled)))
        else:
            run.check_same(table, selection.what_of(config, step))


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
    manifests = {table: run.manifest(table) for table in run.tables()}
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
            if stage_of(table) not in ("rejected", "duplicates", "neighbors", "utilities")
            and not found[table].refers_to
        ],
        "seconds": {table: manifest.seconds for table, manifest in found.items()},
        "report": run.path("report", "index.html") if run.exists("report", "index.html") else None,
    }
