"""The command that learns an encoder from images without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from selective_ray import config, learned
from selective_ray.cli_options import (
    Address,
    Column,
    ConfigFile,
    Debug,
    EndpointUrl,
    Exclude,
    Include,
    Json,
    Preset,
    RunUri,
    Seed,
    Set,
    answer,
    sentences,
)
from selective_ray.progress import Reporter
from selective_ray.store import Run


def pretrain(
    images: Annotated[
        str, typer.Option("--images", help="Folder, prefix, archive or list of images, as for `select`.")
    ],
    run: RunUri,
    method: Annotated[str | None, typer.Option("--method", help="simclr (default), moco or cld.")] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the training; its folder is training/NAME in the run.")
    ] = learned.NAME,
    include: Include = None,
    exclude: Exclude = None,
    column: Column = None,
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth", help="True labels (a file, or `folders`), only to tell how well neighbors share them."
        ),
    ] = None,
    until: Annotated[int | None, typer.Option("--until", min=1, help="Stop at this step for now.")] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    seed: Seed = None,
    endpoint_url: EndpointUrl = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Learn an encoder from images without labels; the run is then a name for --encoder."""
    with sentences(debug, as_json):
        options = {
            "seed": seed,
            "pretrain.method": method,
            "images.include": include or None,
            "images.exclude": exclude or None,
            "images.column": column,
            "resources.endpoint_url": endpoint_url,
        }
        settings, _ = config.load(
            preset=preset, file=config_file, assignments=assignments, options=options, own_embeddings=True
        )
        from selective_ray.actors import pretraining

        reporter = Reporter(quiet=as_json)
        where = Run(run, settings.resources.access())
        done, summary = pretraining.pretrain(
            *(where, images, settings, name, reporter), until=until, truth=truth, address=address
        )
        folder, page = where.path("training", name), where.path("report", f"training-{name}.html")
        encoder = where.uri if name == learned.NAME else folder
        complete = done is not None
        told = {"run": where.uri, "encoder": encoder, "report": page, "complete": complete, **summary}
        answer(told, _lines(told, folder), as_json, reporter)


def _lines(told: dict[str, Any], folder: str) -> Iterator[str]:
    yield (
        f"learned    {told['network']} by {told['method']}, {told['dimension']:,} features, "
        f"{told['steps']:,} steps{'' if told['complete'] else ' so far'}"
    )
    if "loss" in told:
        yield f"loss       {told['loss']:.4f}, {100 * told['found']:.1f} % of images found"
        yield f"speed      {told['steps_per_second']:.2f} steps/s; {told['seconds']:.1f} s in all"
    if "effective_rank" in told:
        yield (
            f"features   effective rank {told['effective_rank']:.1f}, alignment {told['alignment']:.3f}, "
            f"uniformity {told['uniformity']:.3f}"
        )
    if "neighbors_accuracy" in told:
        yield f"neighbors  {100 * told['neighbors_accuracy']:.1f} % of images are among their class"
    yield f"encoder    --encoder {told['encoder']}"
    yield f"folder     {folder}"
    yield f"report     {told['report']}"
