"""The command `plan`: what a run will take, before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from selective_ray import config, machines, objects, planning
from selective_ray.cli_options import (
    Address,
    Budget,
    Budgets,
    Checkpoint,
    Column,
    ConfigFile,
    Debug,
    Embeddings,
    Encoder,
    EndpointUrl,
    Exclude,
    Images,
    Include,
    Json,
    Preset,
    Seed,
    Set,
    answer,
    numbers,
    sentences,
)
from selective_ray.errors import UsageError, UserError
from selective_ray.progress import Reporter
from selective_ray.store import differences
from selective_ray.survey import Survey


def plan(
    images: Images = None,
    include: Include = None,
    exclude: Exclude = None,
    column: Column = None,
    endpoint_url: EndpointUrl = None,
    embeddings: Embeddings = None,
    budget: Budget = None,
    budgets: Budgets = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    seed: Seed = None,
    encoder: Encoder = None,
    checkpoint: Checkpoint = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="KIND:COUNT,…",
            help="Machines to plan for, as gpu_small:4,decode:2: kinds of --cluster, or instance types of "
            "the table of prices; may be repeated. `here` is what was probed (default: here).",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="Description for Ray's launcher (default: cluster.yaml, if it is there)."
        ),
    ] = None,
    prices: Annotated[
        str | None, typer.Option("--prices", help="Table of machines and prices in place of the own one.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many images there are, in place of listing all.")
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option("--probe", help="File that keeps what is measured; read again where it is there."),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=64, help="How many images the probe embeds.")
    ] = 2_048,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--scratch", help="Folder or prefix for the probe, which all machines of --address see."
        ),
    ] = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run will take: time, memory, requests and money of every stage, by a probe of the images."""
    with sentences(debug, as_json):
        if bool(images) == bool(embeddings):
            raise UsageError("give either --images URI or --embeddings FILE|RUN")
        settings, _ = config.load(
            preset=preset,
            file=config_file,
            assignments=assignments,
            options={
                "selection.budget": budget,
                "selection.budgets": None if budgets is None else numbers(budgets),
                "seed": seed,
                "embed.encoder": encoder,
                "embed.checkpoint": checkpoint,
                "images.include": include or None,
                "images.exclude": exclude or None,
                "images.column": column,
                "resources.endpoint_url": endpoint_url,
            },
            own_embeddings=embeddings is not None,
        )
        if not settings.selection.every_budget():
            raise UsageError("give --budget M, the number of images to select")
        table = machines.read_prices(prices)
        head, kinds = _kinds(cluster, table)
        asked = on or ["here"]
        fleets = machines.chosen([word for word in asked if word != "here"], head, kinds, table)
        reporter = Reporter(quiet=as_json)
        surveyed, n, rates, here = _probed(
            *(probe, images, embeddings, settings, reporter),
            address=address,
            scratch=scratch,
            count=count,
            sample=sample,
        )
        if n < max(settings.selection.every_budget()):
            raise UserError(f"the budget exceeds the {n:,} images that can be embedded; lower --budget")
        if "here" in asked:
            fleets = [here, *fleets]
        made = [
            planning.plan(
                *(rates, settings, fleet),
                survey=surveyed,
                n=n,
                # Files on this machine cost nothing to ask for.
                requests={} if objects.is_local(images or embeddings or "") else table.requests,
                kinds=kinds.values() or [table.machine(name, name) for name in table.instances],
            )
            for fleet in fleets
        ]
        told = {
            "images": surveyed.images if surveyed else n,
            "bytes": surveyed.nbytes if surveyed else 0,
            "prices": table.date.isoformat(),
            "probe": asdict(rates),
            "plans": [asdict(one) for one in made],
        }
        answer(told, _lines(made, rates, table), as_json, reporter)
        if any(one.refused for one in made):
            raise typer.Exit(1)


def _kinds(
    cluster: str | None, table: machines.Prices
) -> tuple[machines.Machine | None, dict[str, machines.Machine]]:
    if cluster is None and not Path("cluster.yaml").is_file():
        return None, {}
    return machines.read_cluster(cluster or "cluster.yaml", table)


def _probed(
    file: str | None,
    images: str | None,
    embeddings: str | None,
    settings: config.Config,
    reporter: Reporter,
    *,
    count: int | None,
    **how: Any,
) -> tuple[Survey | None, int, planning.Rates, machines.Fleet]:
    """Probe, or read what a probe of the same source and encoder has measured."""
    what = {
        "source": images or embeddings,
        "images": settings.images.model_dump(mode="json"),
        "embed": settings.embed.model_dump(mode="json"),
        "clusters": max(settings.selection.every_budget()),
    }
    if file and Path(file).is_file():
        kept = json.loads(Path(file).read_text())
        if kept["what"] != what:
            keys = "; ".join(differences(what, kept["what"]))
            raise UserError(f"{file} holds another probe ({keys}); give another --probe")
        surveyed = Survey(**kept["survey"]) if kept["survey"] else None
        rates = planning.Rates(**kept["rates"])
        here = machines.Fleet(tuple((machines.Machine(**one), 1) for one in kept["here"]))
        if surveyed and count:
            surveyed = surveyed.scaled(count)
        n = round(surveyed.images * (1 - rates.rejected)) if surveyed else count or kept["n"]
        return surveyed, n, rates, here
    from selective_ray.actors import pipeline
    from selective_ray.actors.probe import probe

    source = pipeline.Source(images, embeddings)
    surveyed, n, rates, here = probe(source, settings, reporter, count=count, **how)
    if file:
        content: dict[str, Any] = {
            "what": what,
            "survey": asdict(surveyed) if surveyed else None,
            "n": n,
            "rates": asdict(rates),
            "here": [asdict(replace(kind, network=1e18)) for kind, _ in here.machines],
        }
        Path(file).write_text(json.dumps(content, indent=1) + "\n")
    return surveyed, n, rates, here


def _lines(made: list[planning.Planned], rates: planning.Rates, table: machines.Prices) -> Iterator[str]:
    first = made[0]
    source = f", {first.nbytes / 1e9:,.1f} GB to read" if first.nbytes else ""
    yield f"images     {first.images:,}{source}; {first.run_bytes / 1e9:,.1f} GB to write"
    if rates.embed_rows:
        yield (
            f"probe      {rates.decode_rows:,.0f} images/s decoded by a CPU, {rates.encode_rows:,.0f} "
            f"embedded by an encoder, {rates.embed_rows:,.0f} by all of the {rates.cpus:g} CPUs; "
            f"d = {rates.d}; {rates.rejected:.1%} rejected"
        )
    for one in made:
        yield ""
        yield f"on {one.on}"
        if one.refused:
            yield from (f"  does not fit: {why}" for why in one.refused)
            continue
        yield (
            f"  {'stage':<9}{'minutes':>9}  {'limited by':<11}{'machine-hours':>14}{'workers':>9}"
            f"{'GB each':>9}{'object store, GB':>18}{'requests':>14}{'dollars':>10}"
        )
        for stage in one.stages:
            hours = sum(stage.machine_seconds.values()) / 3600
            yield (
                f"  {stage.name:<9}{stage.seconds / 60:>9,.1f}  {stage.limit:<11}{hours:>14,.2f}"
                f"{stage.workers:>9}{stage.worker_bytes / 1e9:>9,.1f}{stage.store_bytes / 1e9:>18,.1f}"
                f"{sum(stage.requests.values()):>14,}{stage.dollars:>10,.2f}"
            )
        spilled = f"; {one.disk_bytes / 1e9:,.0f} GB spilled to disks" if one.disk_bytes else ""
        yield (
            f"  in all   {one.seconds / 60:>9,.1f} minutes, {one.dollars:,.2f} dollars at the prices of "
            f"{table.date}{spilled}"
        )
