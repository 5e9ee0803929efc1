"""A probe of a source: a sample of its images is embedded, and a stand-in of many rows selected from.

By the stages themselves, on the cluster that is there, so that what is measured is what a run does.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selective_ray import embeddings, encoders, ivf, listing
from selective_ray.actors import embeddings as embedding
from selective_ray.actors import pipeline
from selective_ray.actors.session import Session, cpus, gpus
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.machines import Fleet, Machine
from selective_ray.planning import Rates
from selective_ray.progress import Reporter
from selective_ray.schema import IMAGES
from selective_ray.store import Manifest, Run
from selective_ray.survey import Survey, survey

# Images that are read, decoded and embedded.
SAMPLE = 2_048
# Rows of the stand-in, which is selected from; and a smaller one, which tells what does not grow with rows.
# Of fewer rows the groups that are joined are so small that a product takes twice as long. By brute force,
# and of many dimensions, fewer rows do.
STAND_IN, SMALL = 131_072, 4_096
STAND_IN_EXACT, STAND_IN_ENTRIES = 32_768, 1 << 26
# Clusters at least by which iterations are counted.
LEAST_CLUSTERS = 256
# A row of the stand-in lies between a sampled one and one of so many nearest.
BETWEEN = 8


def probe(
    source: pipeline.Source,
    config: Config,
    reporter: Reporter,
    *,
    address: str | None = None,
    scratch: str | None = None,
    count: int | None = None,
    sample: int = SAMPLE,
    seconds: float = 60.0,
) -> tuple[Survey | None, int, Rates, Fleet]:
    """Probe images, or embeddings that are there.

    scratch: a folder or prefix that all machines see; None: a temporary folder. count: how many images there
    are, where the source is too large to be listed in so many seconds; sample: how many of them are embedded.
    Returns what was surveyed, the number of rows, the rates, and the machines of the cluster. Raises
    UserError where nothing can be embedded.
    """
    if config.resources.autoscale:
        # What is there is probed, not what may come.
        here = {"autoscale": False, "workers": None, "gpus_per_worker": None}
        config = config.model_copy(update={"resources": config.resources.model_copy(update=here)})
    access = config.resources.access()
    surveyed, rows, x, n = None, None, None, 0
    if source.images:
        chosen = listing.Source(source.images, **config.images.model_dump())
        surveyed, rows = survey(chosen, access, sample=sample, seed=config.seed, seconds=seconds)
        if count is None and not surveyed.whole:
            raise UserError(
                f"{source.images} holds more than the {surveyed.images:,} images that were listed in "
                f"{seconds:g} s; give --count, how many it holds"
            )
        reporter.say(f"{surveyed.images:,} images, {surveyed.nbytes / 1e9:,.1f} GB")
    else:
        x, n = _sample_of(source.embeddings, config, sample)
        surveyed, n = None, count or n
    with _scratch(scratch) as place, Session(address, [place]) as session:
        began = time.monotonic()
        session.start()
        here = _here()
        rates = Rates(here.total("cpus"), here.total("gpus"), 1, 0, ray_seconds=time.monotonic() - began)
        if surveyed:
            reporter.say(f"embedding {len(rows):,} of them")
            rates, x = _embed(rows, surveyed, config, rates, Run(f"{place}/sample", access), session)
            surveyed = surveyed.scaled(count) if count else surveyed
            n = round(surveyed.images * (1 - rates.rejected))
        reporter.say("selecting from a stand-in")
        return surveyed, n, _select(x, n, config, rates, f"{place}/stand-in", access), here


@contextmanager
def _scratch(given: str | None) -> Any:
    if given and "://" in given:
        place = Run(f"{given.rstrip('/')}/probe-{time.time_ns():x}")
        try:
            yield place.uri
        finally:
            place.delete_folder()
        return
    with tempfile.TemporaryDirectory(prefix="probe-", dir=given) as folder:
        yield folder


def _here() -> Fleet:
    """Return the machines of this cluster, of which nothing is known to cost."""
    machines = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU"):
            kept = has.get("memory", 0.0), has.get("object_store_memory", 0.0)
            machines.append((Machine("here", has["CPU"], *kept, disk=_disk(), gpus=has.get("GPU", 0.0)), 1))
    return Fleet(tuple(machines))


def _disk() -> float:
    return float(shutil.disk_usage(tempfile.gettempdir()).free)


def _sample_of(path: str | None, config: Config, sample: int) -> tuple[np.ndarray, int]:
    """Draw rows of embeddings that are there, at unit length; also how many there are."""
    rng = np.random.default_rng(config.seed)
    if path and path.endswith((".npy", ".parquet")):
        n, _, blocks = embeddings.read(str(Path(path).absolute()))
        share = min(1.0, 2 * sample / n)
        parts = (embeddings.unit_rows(x[rng.random(len(x)) < share])[0] for x, _ in blocks)
    else:
        run = Run(path or "", config.resources.access())
        manifest = run.manifest("embeddings")
        if manifest is None:
            raise UserError(f"{path} is neither a .npy or .parquet file nor a run with finished embeddings")
        n = manifest.rows
        some = rng.permutation([shard.index for shard in manifest.shards])[:4]
        parts = (run.read_embeddings(int(shard))[1] for shard in some)
    x = np.concatenate(list(parts))
    return x[np.sort(rng.permutation(len(x))[:sample])], n


def _embed(
    rows: pa.Table, surveyed: Survey, config: Config, rates: Rates, run: Run, session: Session
) -> tuple[Rates, np.ndarray]:
    """Embed the sample by the stage; returns the rates and the embeddings."""
    run.prepare()
    run.begin("images", {"images": config.images.model_dump(mode="json"), "content": "sample"}, {})
    began = time.monotonic()
    table = rows.add_column(0, "image_id", pa.array(np.arange(len(rows)), pa.int64())).cast(IMAGES)
    shard = run.write_shard("images", 0, table)
    listing.digest(rows)
    written = (time.monotonic() - began) / len(rows)
    memory = {"driver": 0}
    run.finish("images", [shard], seconds=0.0, peak_memory_bytes=memory, summary={"images": len(rows)})
    done = embedding.embed(run, config, session, Reporter(quiet=True))
    seen = done.summary
    what = done.what["embed"]
    size = what["image_size"]
    operations = ray.remote(num_cpus=1)(encoders.operations).remote(
        *(what["encoder"], config.embed.checkpoint, size, config.resources.access(), seen["dimension"])
    )
    # Decoders are done with the sample before the encoders have loaded; in a run both share the CPUs.
    decode, encode = seen["decoded_per_cpu_second"], seen["encoded_per_encoder_second"]
    encoders_ = gpus() or cpus()
    return (
        replace(
            rates,
            d=seen["dimension"],
            list_rows=1 / (surveyed.seconds / surveyed.listed + written),
            encoder_seconds=max(0.0, done.seconds - len(rows) / (encoders_ * encode)),
            embed_rows=min(gpus() * encode, cpus() * decode)
            if gpus()
            else cpus() / (1 / decode + 1 / encode),
            decode_rows=decode,
            encode_rows=encode,
            encode_flops=float(ray.get(operations)),
            pixel_bytes=3 * size * size,
            rejected=seen["rejected"] / len(rows),
        ),
        run.read_embeddings(0)[1],
    )


def stand_in(x: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Make so many unit rows, float32 [rows, d], that lie among those of x as further ones would.

    Each lies between a row and one of its nearest, as far to the side as these are apart.
    """
    rng = np.random.default_rng(seed)
    near = np.argsort(-(x @ x.T), axis=1)[:, 1 : 1 + BETWEEN] if len(x) > 1 else np.zeros((1, 1), np.int64)
    first = rng.integers(0, len(x), rows)
    second, third = (near[first, rng.integers(0, near.shape[1], rows)] for _ in range(2))
    t = rng.random((2, rows, 1), np.float32)
    made = x[first] + t[0] * (x[second] - x[first]) + (t[1] - 0.5) * (x[third] - x[first])
    made += rng.normal(0, 1e-3, made.shape).astype(np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def _select(x: np.ndarray, n: int, config: Config, rates: Rates, place: str, access: Any) -> Rates:
    """Select from stand-ins of two sizes: what differs is what rows take.

    The smaller one comes twice: once with processes that have yet to start, which the other two find there.
    Where its clusters are smaller than those of the run, it is clustered once more, to count iterations.
    """
    exact = ivf.plan_for(config.density, n, x.shape[1], config.density.k).exact
    most = STAND_IN_EXACT if exact else min(STAND_IN, STAND_IN_ENTRIES // x.shape[1])
    small, large = min(max(n // 2, 1), SMALL), min(n, most)
    budget = max(config.selection.every_budget(), default=1)
    clusters = max(1, min(budget, small // 8))
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for attempt, rows in enumerate((small, small, large)):
            np.save(f"{folder}/x.npy", stand_in(x, rows, config.seed))
            settings = _settings(config, n, x.shape[1], rows, min(budget, max(clusters, rows // 16)))
            run = Run(f"{place}-{attempt}", access)
            source = pipeline.Source(embeddings=f"{folder}/x.npy")
            pipeline.advance(run, source, settings, set(), Reporter(quiet=True), upto="selection")
            found.append({table: run.manifest(table) for table in ("density", "clusters", "selection")})
        # Iterations until the tolerance depend on how many rows a cluster has: here as many as in the run.
        fewer = max(LEAST_CLUSTERS, round(budget * large / n))
        if fewer < settings.selection.budget:
            settings = _settings(config, n, x.shape[1], large, fewer)
            run = Run(f"{place}-iterations", access)
            pipeline.advance(run, source, settings, set(), Reporter(quiet=True), upto="clusters")
        iterations = run.manifest("clusters").summary["iterations"]
    cold, before, last = found
    workers = min(config.resources.workers or int(rates.gpus or rates.cpus), len(last["density"].shards))
    history = last["clusters"].summary["history"]["seconds"]
    rows = large - small

    def grows(seconds: Any) -> float:
        """Seconds of a worker for a row."""
        return max(0.0, (seconds(last) - seconds(before)) * workers / max(1, rows))

    def starts(seconds: Any, made: dict[str, Manifest]) -> float:
        """Seconds that no row takes."""
        return max(0.0, seconds(made) - grows(seconds) * small / workers)

    def joined(made: dict[str, Manifest]) -> np.ndarray:
        summary = made["density"].summary
        return np.array([summary["products"], summary["phases"]["joining"]])

    # Not of the larger one alone: a group takes time however few its rows.
    more, longer = joined(last) - joined(before) if rows else joined(last)
    join_products = float(more / max(1e-3, longer))

    def beside(made: dict[str, Manifest]) -> float:
        return made["density"].seconds - float(joined(made)[0]) / join_products

    def clustering(made: dict[str, Manifest]) -> float:
        return made["clusters"].seconds - sum(made["clusters"].summary["history"]["seconds"])

    def selecting(made: dict[str, Manifest]) -> float:
        return made["selection"].seconds

    return replace(
        rates,
        d=x.shape[1],
        workers=workers,
        join_products=join_products,
        row_seconds=grows(beside),
        holder_seconds=starts(beside, cold),
        products=large * last["clusters"].summary["clusters"] / max(1e-3, history[0]),
        later_share=float(np.mean(history[1:]) / max(1e-3, history[0])) if len(history) > 1 else 1.0,
        iterations=iterations,
        cluster_seconds=grows(clustering),
        select_seconds=grows(selecting),
        select_clusters=last["clusters"].summary["clusters"],
        cluster_start=starts(clustering, before),
        select_start=starts(selecting, before),
    )


def _settings(config: Config, n: int, d: int, rows: int, budget: int) -> Config:
    """Return the configuration for a stand-in: searched as all n rows would be, in lists as long."""
    settings = config.density
    k = min(settings.k, rows - 1)
    search = ivf.plan_for(settings, n, d, settings.k)
    lists = None if search.exact else max(16, round(search.lists * rows / n))
    return config.model_copy(
        update={
            "density": settings.model_copy(
                update={"k": k, "mode": "exact" if search.exact else "ivf", "lists": lists}
            ),
            "cluster": config.cluster.model_copy(update={"two_level": rows + 1}),
            "selection": config.selection.model_copy(
                update={"budget": budget, "budgets": (), "labeled": None}
            ),
            "resources": config.resources.model_copy(update={"shard_rows": None}),
        }
    )
