"""The command `selective-ray`: options in, sentences and exit status out."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from selective_ray import __version__, cli_cluster, cli_labels, cli_plan, cli_pretrain, config
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
    KeepNeighbors,
    KeepUtilities,
    Labeled,
    Log,
    MaxRejected,
    Method,
    Preset,
    RunUri,
    Seed,
    Set,
    Since,
    answer,
    existing,
    numbers,
    sentences,
    share,
)
from selective_ray.errors import UsageError, UserError
from selective_ray.progress import Reporter
from selective_ray.store import Run

# The common base of what typer says of missing, unknown and malformed options; typer exports only this heir.
_WrongUsage = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Says wrong usage in one line, like every other mistake."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        try:
            status = super().main(words, **{**options, "standalone_mode": False})
        except _WrongUsage as error:
            message = error.format_message()
            if words:
                if "--json" in words:
                    print(json.dumps({"error": message}))  # noqa: T201
                message = f"selective-ray: {' '.join(message.split())}"
            print(message, file=sys.stderr)  # noqa: T201
            status = 2
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    cls=_Commands,
    help="Pick the images worth labeling out of a pile of unlabeled ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _lines(summary: dict[str, Any], complete: list[str], seconds: float) -> Iterator[str]:
    made = [table for table in summary["made_here"] if table not in complete]
    if complete:
        yield f"already complete: {', '.join(complete)}"
    if not made:
        yield "nothing to do"
    counts = []
    if "images" in summary:
        counts.append(f"{summary['images']:,} found")
    if "embedded" in summary:
        counts.append(f"{summary['embedded']:,} embedded")
        counts.append(f"{summary['rejected']:,} rejected")
    if "clusters" in summary:
        counts.append(f"{summary['clusters']:,} clusters")
    if "selected" in summary:
        counts.append(f"{summary['selected']:,} selected")
    yield f"images     {', '.join(counts)}"
    for reason, count in summary.get("reasons", {}).items():
        yield f"rejected   {count:,} {reason}"
    if summary.get("duplicates"):
        yield f"copies     {summary['duplicates']:,} images are equal, byte for byte, to an earlier one"
    if "embeddings" in made and "encoder_busy" in summary:
        yield (
            f"embedding  {summary['images_per_second']:,.0f} images/s, encoders busy "
            f"{100 * summary['encoder_busy']:.0f} %: {summary['limit']} was the limit; an encoder keeps "
            f"{summary['cpus_per_encoder']:g} decoding CPUs busy"
        )
    if made:
        stages = ", ".join(f"{table} {summary['seconds'][table]:.1f}" for table in made)
        yield f"seconds    {stages}; {seconds:.1f} in all"
    if "selected" in summary:
        yield f"selection  {summary['run']}/selection/selection.csv"
    if summary.get("report"):
        yield f"report     {summary['report']}"


def _stage_command(upto: str, help_text: str) -> Callable[..., None]:
    def command(
        run: RunUri,
        images: Images = None,
        include: Include = None,
        exclude: Exclude = None,
        column: Column = None,
        since: Since = None,
        endpoint_url: EndpointUrl = None,
        max_rejected: MaxRejected = None,
        embeddings: Embeddings = None,
        budget: Budget = None,
        budgets: Budgets = None,
        labeled: Labeled = None,
        method: Method = None,
        keep_neighbors: KeepNeighbors = False,
        keep_utilities: KeepUtilities = False,
        preset: Preset = None,
        config_file: ConfigFile = None,
        assignments: Set = None,
        seed: Seed = None,
        encoder: Encoder = None,
        checkpoint: Checkpoint = None,
        address: Address = None,
        log: Log = "text",
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        with sentences(debug, as_json):
            started = time.monotonic()
            if bool(images) == bool(embeddings):
                raise UsageError("give either --images URI or --embeddings FILE|RUN")
            if since and not images:
                raise UsageError("--since goes with --images: it leaves out what an earlier run has of them")
            settings, asked = config.load(
                preset=preset,
                file=config_file,
                assignments=assignments,
                options={
                    "selection.budget": budget,
                    "selection.budgets": None if budgets is None else numbers(budgets),
                    "selection.labeled": labeled,
                    "selection.method": method,
                    "selection.keep_utilities": keep_utilities or None,
                    "density.keep_neighbors": keep_neighbors or None,
                    "seed": seed,
                    "embed.encoder": encoder,
                    "embed.checkpoint": checkpoint,
                    "images.include": include or None,
                    "images.exclude": exclude or None,
                    "images.column": column,
                    "resources.endpoint_url": endpoint_url,
                    "resources.max_rejected": None if max_rejected is None else share(max_rejected),
                },
                own_embeddings=embeddings is not None,
            )
            if upto in ("clusters", "selection") and not settings.selection.every_budget():
                raise UsageError("give --budget M, the number of images to select")
            from selective_ray.actors import pipeline

            reporter = Reporter(quiet=as_json and log == "text", structured=log == "json")
            where = Run(run, settings.resources.access())
            complete = [table for table in where.tables() if where.manifest(table)]
            pipeline.advance(
                where,
                pipeline.Source(images, embeddings, since),
                settings,
                asked,
                reporter,
                upto=upto,
                address=address,
            )
            summary = pipeline.summarize(where)
            lines = _lines(summary, complete, time.monotonic() - started)
            answer({**summary, "already_complete": complete}, lines, as_json, reporter)

    command.__doc__ = help_text
    return command


for _name, _upto, _help in (
    (
        "select",
        "selection",
        "Pick the images worth labeling: every stage that is not complete, and the report.",
    ),
    ("embed", "embeddings", "List and embed the images."),
    ("density", "density", "Embed, and measure how dense the neighborhood of every image is."),
    ("cluster", "clusters", "Embed, and cluster into as many clusters as the budget."),
):
    app.command(_name)(_stage_command(_upto, _help))


@app.command()
def report(run: RunUri, endpoint_url: EndpointUrl = None, debug: Debug = False) -> None:
    """Write the report of a finished run again."""
    with sentences(debug):
        from selective_ray import report as page

        where = existing(run, endpoint_url)
        selection = where.manifest("selection")
        if selection is None:
            raise UserError(f"{run} has no finished selection; run `selective-ray select` on it first")
        clusters = where.manifest("clusters")
        page.write(where, seed=clusters.what["seed"] if clusters else 0)
        print(where.path("report", "index.html"))  # noqa: T201


@app.command()
def status(
    run: RunUri, endpoint_url: EndpointUrl = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Say how far a run is: its stages, and who works on it. No cluster is needed."""
    with sentences(debug, as_json):
        from selective_ray import run_status

        where = existing(run, endpoint_url)
        found, alive = run_status.states(where), run_status.sign_of_life(where)
        answer({**found, **({"at_work": alive} if alive else {})}, run_status.lines(found, alive), as_json)


app.command()(cli_pretrain.pretrain)
for _name, _command in (
    ("export", cli_labels.export),
    ("labels", cli_labels.labels),
    ("train", cli_labels.train),
    ("predict", cli_labels.predict),
    ("evaluate", cli_labels.evaluate),
    ("compare", cli_labels.compare),
):
    app.command(_name)(_command)

app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)(cli_cluster.submit)
app.command()(cli_cluster.check)
app.command()(cli_plan.plan)


@app.command()
def demo(
    folder: Annotated[
        str, typer.Option("--folder", help="Where the images and the runs of the demo go.")
    ] = "demo",
    seeds: Annotated[int, typer.Option(help="Seeds of the selection.", min=5)] = 5,
    draws: Annotated[int, typer.Option(help="Random draws to compare with.", min=10)] = 20,
    train: Annotated[
        bool,
        typer.Option("--train", help="The long story: learn an encoder, select by it, train on the labels."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Select 40 of 1,797 handwritten digits and compare with random draws."""
    with sentences(debug, as_json):
        if train:
            from selective_ray.actors import demo_training

            demo_training.tell(Path(folder), as_json=as_json)
            return
        from selective_ray.actors import demo as story

        story.tell(Path(folder), seeds=seeds, draws=draws, as_json=as_json)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


def main() -> None:
    """Run the command; SIGTERM, as schedulers send it, ends it like Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    app()
