"""The commands for what follows the picks: files for people, their labels, training and its answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from selective_ray import config
from selective_ray.cli_options import (
    Address,
    ConfigFile,
    Debug,
    EndpointUrl,
    Json,
    Preset,
    RunUri,
    Seed,
    Set,
    answer,
    existing,
    numbers,
    sentences,
    share,
)
from selective_ray.errors import UsageError
from selective_ray.progress import Reporter


def export(
    run: RunUri,
    kind: Annotated[
        str, typer.Option("--format", help="csv, jsonl, label-studio or cvat.", show_default=True)
    ] = "csv",
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for the files (default: export/ in the run).")
    ] = None,
    copies: Annotated[
        str | None,
        typer.Option(
            "--copies", help="Copy the picks to this folder for the tool, as it cannot look into archives."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the picks as files for people and labeling tools."""
    with sentences(debug, as_json):
        from selective_ray import export as exporting

        if kind not in exporting.FORMATS:
            raise UsageError(f"--format {kind!r} is none; give one of {', '.join(exporting.FORMATS)}")
        if copies and kind in ("csv", "jsonl"):
            raise UsageError(f"--copies goes with label-studio and cvat; {kind} names images as the run does")
        where = existing(run, endpoint_url)
        folder, files = exporting.write_picks(where, kind, out, copies, Reporter(quiet=as_json))
        listed = [{"file": f"{folder}/{f.name}", "picks": f.picks, "root": f.root} for f in files]
        lines = (f"{folder}/{f.name}  {f.picks:,} picks{f' of {f.root}' if f.root else ''}" for f in files)
        answer({"run": where.uri, "format": kind, "files": listed}, lines, as_json)


def labels(
    run: RunUri,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="CSV, JSONL, an export of Label Studio (JSON, JSON-MIN) or CVAT (XML, ZIP)."
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Where an image is labeled already, let this file count.")
    ] = False,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring the labels that people gave into the run."""
    with sentences(debug, as_json):
        from selective_ray import labeling

        reporter = Reporter(quiet=as_json)
        where = existing(run, endpoint_url)
        found = labeling.bring_labels(where, file, replace=replace, reporter=reporter)
        answer(found, _label_lines(found), as_json, reporter)


def _label_lines(found: dict[str, Any]) -> Iterator[str]:
    brought = found["in_file"]
    yield (
        f"file       {found['format']}: {brought['images']:,} images, {brought['labels']:,} labeled, "
        f"{brought['skipped']:,} skipped"
    )
    yield (
        f"run        {found['labels']:,} labeled, {found['skipped']:,} skipped, "
        f"{found['unlabeled_picks']:,} of {found['picks']:,} picks left; "
        f"{found['outside_selection']:,} labels outside the selection"
        + ("" if found["changed"] else "; nothing changed")
    )
    yield from _class_lines(found["classes"])


def _class_lines(counts: dict[str, int], most: int = 20) -> Iterator[str]:
    classes = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    yield f"classes    {len(classes):,}"
    for name, count in classes[:most]:
        yield f"  {count:>7,}  {name}"
    if len(classes) > most:
        yield f"  and {len(classes) - most:,} smaller ones; --json lists them all"


def train(
    run: RunUri,
    name: Annotated[
        str, typer.Option("--name", help="Name of the training; its folder is training/NAME in the run.")
    ] = "fixmatch",
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            help="Held-out images: a folder with a folder for each class, or a CSV (uri, label).",
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth",
            help="True labels (a file, or `folders`), only to tell how many pseudo-labels are wrong.",
        ),
    ] = None,
    until: Annotated[int | None, typer.Option("--until", min=1, help="Stop at this step for now.")] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    seed: Seed = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Weights of a self-supervised network to begin from.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train FixMatch on the labels of a run and all its other images."""
    with sentences(debug, as_json):
        options = {
            "seed": seed,
            "train.checkpoint": checkpoint,
            "resources.endpoint_url": endpoint_url,
        }
        settings, _ = config.load(
            preset=preset, file=config_file, assignments=assignments, options=options, own_embeddings=True
        )
        from selective_ray import held_out
        from selective_ray import truth as true_labels
        from selective_ray.actors import fixmatch

        reporter = Reporter(quiet=as_json)
        where = existing(run, settings.resources.endpoint_url)
        images = held_out.read(validation, where.access) if validation else held_out.NONE
        known = true_labels.read([where], truth) if truth else None
        done, summary = fixmatch.train(
            *(where, settings, name, reporter),
            until=until,
            held_out=images,
            truth=known,
            address=address,
        )
        folder, page = where.path("training", name), where.path("report", f"training-{name}.html")
        complete = done is not None
        told = {"run": where.uri, "training": folder, "report": page, "complete": complete, **summary}
        answer(told, _training_lines(summary, folder, page, complete=complete), as_json, reporter)


def _training_lines(summary: dict[str, Any], folder: str, report: str, *, complete: bool) -> Iterator[str]:
    yield (
        f"training   {summary['labels']:,} labels of {summary['classes']:,} classes, "
        f"{summary['steps']:,} steps{'' if complete else ' so far'}"
    )
    if "loss" in summary:
        impurity = summary.get("impurity")
        yield (
            f"loss       {summary['loss']:.4f}, {100 * summary['mask_rate']:.1f} % of images pseudo-labeled"
            + ("" if impurity is None else f", {100 * impurity:.1f} % of these wrong")
        )
        yield f"speed      {summary['steps_per_second']:.2f} steps/s; {summary['seconds']:.1f} s in all"
    if "accuracy" in summary:
        yield (
            f"accuracy   {100 * summary['accuracy']:.2f} % at the last step, "
            f"{100 * summary['best_accuracy']:.2f} % at best; calibration error "
            f"{100 * summary['calibration_error']:.1f} %"
        )
    yield f"folder     {folder}"
    yield f"report     {report}"


def predict(
    run: RunUri,
    name: Annotated[str, typer.Option("--name", help="Name of the training that labels.")] = "fixmatch",
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove the labels of another training, or of an earlier step.")
    ] = False,
    max_rejected: Annotated[
        str | None,
        typer.Option(
            "--max-rejected", help="Share of images, as 1%, that may be unreadable by now (default: none)."
        ),
    ] = None,
    config_file: ConfigFile = None,
    assignments: Set = None,
    endpoint_url: EndpointUrl = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Label every image of a run by a trained network."""
    with sentences(debug, as_json):
        options = {
            "resources.endpoint_url": endpoint_url,
            "resources.max_rejected": None if max_rejected is None else share(max_rejected),
        }
        settings, asked = config.load(file=config_file, assignments=assignments, options=options)
        from selective_ray.actors import predictions

        reporter = Reporter(quiet=as_json)
        where = existing(run, settings.resources.endpoint_url)
        resources = settings.resources
        done, complete = predictions.predict(
            *(where, settings, name, reporter),
            most=resources.max_rejected if "resources.max_rejected" in asked else 0.0,
            replace=replace,
            address=address,
        )
        folder = where.path("predictions")
        told = {"run": where.uri, "predictions": folder, "already_complete": complete, **done.summary}
        told["seconds"] = done.seconds
        answer(told, _prediction_lines(told), as_json, reporter)


def _prediction_lines(summary: dict[str, Any]) -> Iterator[str]:
    if summary["already_complete"]:
        yield "already complete: predictions"
    unread = sum(summary["unread"].values())
    yield (
        f"predicted  {summary['predicted']:,} images by training {summary['training']!r}, step "
        f"{summary['step']:,}" + (f"; {unread:,} cannot be read any more" if unread else "")
    )
    yield from _class_lines(summary["classes"])
    yield f"confidence {100 * summary['mean_confidence']:.1f} % on average"
    yield f"seconds    {summary['seconds']:.1f}"
    yield f"folder     {summary['predictions']}"


def evaluate(
    runs: Annotated[list[str], typer.Option("--run", help="A finished run; repeat it to compare several.")],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="True labels to judge by: a file (CSV, JSONL, …), or `folders`: their names. Default: those "
            "that were brought into the run.",
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Random draws to compare with.", min=2)] = 20,
    # Drawing them adds 0.4 points of standard error at most, and their neighbors are found in seconds.
    sample: Annotated[int, typer.Option(help="Judge on so many images at most.", min=100)] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the sample.", min=0)] = 0,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge selections on their embeddings, against random draws and each other."""
    with sentences(debug, as_json):
        from selective_ray import judging, standings

        reporter = Reporter(quiet=as_json)
        wheres = [existing(run, endpoint_url) for run in runs]
        found = judging.evaluate(wheres, judging.How(labels, draws, sample, seed), reporter)
        answer({"judged": standings.as_json(found)}, standings.lines(found), as_json, reporter)


def compare(
    run: Annotated[str, typer.Option("--run", help="A run with embeddings.")],
    budgets: Annotated[
        str, typer.Option("--budgets", help="Increasing budgets to compare at, as 40,100,400.")
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="True labels to judge by: a file (CSV, JSONL, …), or `folders`: their names. Default: those "
            "that were brought into the run.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="Methods with commas between them, besides random and usl (default: all)."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0, 1, …", min=1)] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds in which active learning buys its labels.", min=1)] = 5,
    sample: Annotated[int, typer.Option(help="Compare on so many labeled images at most.", min=100)] = 50_000,
    fixmatch: Annotated[
        bool,
        typer.Option(
            "--fixmatch", help="Train FixMatch on the labels of each selection, too (--set train.steps=…)."
        ),
    ] = False,
    assignments: Set = None,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare ways to select on the embeddings of a run, by true labels: how much better than random?"""
    with sentences(debug, as_json):
        from selective_ray import comparing, comparison

        reporter = Reporter(quiet=as_json)
        names = comparison.METHODS if methods is None else tuple(word.strip() for word in methods.split(","))
        plan = comparison.Plan(
            *(labels, names, tuple(numbers(budgets)), seeds, rounds, sample),
            set=tuple(assignments or ()),
            fixmatch=fixmatch,
        )
        found = comparing.compare(existing(run, endpoint_url), plan, reporter)
        answer(comparison.as_json(found), comparison.lines(found), as_json, reporter)
