"""The command `selective-ray`: options in, sentences and exit status out."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from selective_ray import __version__, config
from selective_ray.errors import UsageError, UserError
from selective_ray.objects import Access
from selective_ray.progress import Reporter, one_line
from selective_ray.store import BEGUN, BROUGHT, OPTIONAL, PREDICTED, TABLES, Run

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

Images = Annotated[
    str | None,
    typer.Option(
        "--images",
        help="Folder or prefix (s3://, gs://, az://) of images, tar archives or Parquet files with image "
        "bytes; or one such file; or a list of uris (.txt, .parquet).",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", help="Only images whose path below --images fits the pattern; may be repeated."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="No images whose path below --images fits the pattern; repeatable."),
]
Column = Annotated[
    str | None, typer.Option("--column", help="Column of images, or of uris, of Parquet files.")
]
Since = Annotated[
    str | None,
    typer.Option("--since", help="Embed only images that this earlier run does not have; keep its ids."),
]
EndpointUrl = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3-compatible store in place of Amazon's.")
]
MaxRejected = Annotated[
    str | None,
    typer.Option("--max-rejected", help="Stop when more than this share of the images is rejected, as 1%."),
]
Embeddings = Annotated[
    str | None,
    typer.Option("--embeddings", help=".npy [n, d], Parquet with a column `embedding`, or an earlier run."),
]
RunUri = Annotated[str, typer.Option("--run", help="Folder that holds the run; continued if it is there.")]
Budget = Annotated[int | None, typer.Option("--budget", help="How many images to select.")]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--budgets", help="Increasing budgets, as 1000,5000: each selection contains the one before."
    ),
]
Labeled = Annotated[
    str | None,
    typer.Option(
        "--labeled", help="CSV file (uri or image_id) of images that have labels: not picked, kept away from."
    ),
]
KeepUtilities = Annotated[
    bool, typer.Option("--keep-utilities", help="Write the utility of every image to utilities/.")
]
Preset = Annotated[
    str | None, typer.Option("--preset", help=f"Published constants: {', '.join(config.PRESETS)}.")
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file with the sections of the configuration.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice (default 0).")]
Encoder = Annotated[
    str | None, typer.Option("--encoder", help="torchvision network, or pca (default resnet50).")
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights of the encoder, in place of the published ones.")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster (default: RAY_ADDRESS, else a private instance).")
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@contextmanager
def _sentences(debug: bool, as_json: bool = False) -> Iterator[None]:
    """Turn errors into one line and an exit status: 1 failed, 2 wrong usage."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        if as_json:
            print(json.dumps({"error": str(error)}))  # noqa: T201
        _fail(one_line(error), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if as_json:
            print(json.dumps({"error": text}))  # noqa: T201
        _fail(f"{text}; run again with --debug to see where, or to continue", 1)


def _fail(message: str, status: int) -> None:
    print(f"selective-ray: {message}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(status)


def _advance(
    upto: str,
    *,
    images: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    column: str | None,
    since: str | None,
    endpoint_url: str | None,
    max_rejected: str | None,
    embeddings: str | None,
    run: str,
    budget: int | None,
    budgets: str | None,
    labeled: str | None,
    keep_utilities: bool,
    preset: str | None,
    config_file: str | None,
    assignments: list[str] | None,
    seed: int | None,
    encoder: str | None,
    checkpoint: str | None,
    address: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the stages up to a table and print what was done."""
    with _sentences(debug, as_json):
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
                "selection.budgets": None if budgets is None else _numbers(budgets),
                "selection.labeled": labeled,
                "selection.keep_utilities": keep_utilities or None,
                "seed": seed,
                "embed.encoder": encoder,
                "embed.checkpoint": checkpoint,
                "images.include": include or None,
                "images.exclude": exclude or None,
                "images.column": column,
                "resources.endpoint_url": endpoint_url,
                "resources.max_rejected": None if max_rejected is None else _share(max_rejected),
            },
            own_embeddings=embeddings is not None,
        )
        if upto in ("clusters", "selection") and not settings.selection.every_budget():
            raise UsageError("give --budget M, the number of images to select")
        from selective_ray.actors import pipeline

        reporter = Reporter(quiet=as_json)
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
        _print_summary(pipeline.summarize(where), complete, reporter, as_json, time.monotonic() - started)


def _share(text: str) -> float:
    """Read a share: 1% or 0.01."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-rejected {text!r} is no share; give it as 1% or 0.01") from None


def _numbers(text: str) -> list[int]:
    """Read whole numbers with commas between them."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {text!r} are no whole numbers; give them as 1000,5000") from None


def _print_summary(
    summary: dict[str, Any], complete: list[str], reporter: Reporter, as_json: bool, seconds: float
) -> None:
    if as_json:
        print(json.dumps({**summary, "already_complete": complete, "warnings": reporter.warnings}))  # noqa: T201
        return
    made = [table for table in summary["made_here"] if table not in complete]
    if complete:
        print(f"already complete: {', '.join(complete)}")  # noqa: T201
    if not made:
        print("nothing to do")  # noqa: T201
    for line in _lines(summary, made, seconds):
        print(line)  # noqa: T201


def _lines(summary: dict[str, Any], made: list[str], seconds: float) -> Iterator[str]:
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
        keep_utilities: KeepUtilities = False,
        preset: Preset = None,
        config_file: ConfigFile = None,
        assignments: Set = None,
        seed: Seed = None,
        encoder: Encoder = None,
        checkpoint: Checkpoint = None,
        address: Address = None,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        _advance(
            upto,
            images=images,
            include=include,
            exclude=exclude,
            column=column,
            since=since,
            endpoint_url=endpoint_url,
            max_rejected=max_rejected,
            embeddings=embeddings,
            run=run,
            budget=budget,
            budgets=budgets,
            labeled=labeled,
            keep_utilities=keep_utilities,
            preset=preset,
            config_file=config_file,
            assignments=assignments,
            seed=seed,
            encoder=encoder,
            checkpoint=checkpoint,
            address=address,
            as_json=as_json,
            debug=debug,
        )

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
    with _sentences(debug):
        from selective_ray import report as page

        where = _existing(run, endpoint_url)
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
    """Say which stages of a run are complete."""
    with _sentences(debug, as_json):
        where = _existing(run, endpoint_url)
        states = {}
        for table in (*where.tables(), *BROUGHT, *PREDICTED):
            manifest = where.manifest(table)
            shards = where.finished_shards(table)
            optional = table in (*OPTIONAL, *BROUGHT, *PREDICTED)
            if optional and not manifest and not where.exists(table, BEGUN):
                continue
            if manifest:
                states[table] = {
                    "state": "complete",
                    "rows": manifest.rows,
                    "seconds": manifest.seconds,
                    "fingerprint": manifest.fingerprint,
                    "refers_to": manifest.refers_to,
                }
            elif where.exists(table, BEGUN):
                states[table] = {"state": "begun", "shards": len(shards)}
            else:
                states[table] = {"state": "not begun"}
        if as_json:
            print(json.dumps(states))  # noqa: T201
            return
        for table, state in states.items():
            rest = ", ".join(
                f"{key} {value}" for key, value in state.items() if key != "state" and value is not None
            )
            print(f"{table:<11} {state['state']:<10} {rest}".rstrip())  # noqa: T201


@app.command("export")
def write_export(
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
    with _sentences(debug, as_json):
        from selective_ray import export

        if kind not in export.FORMATS:
            raise UsageError(f"--format {kind!r} is none; give one of {', '.join(export.FORMATS)}")
        if copies and kind in ("csv", "jsonl"):
            raise UsageError(f"--copies goes with label-studio and cvat; {kind} names images as the run does")
        where = _existing(run, endpoint_url)
        folder, files = export.write_picks(where, kind, out, copies, Reporter(quiet=as_json))
        if as_json:
            listed = [{"file": f"{folder}/{f.name}", "picks": f.picks, "root": f.root} for f in files]
            print(json.dumps({"run": where.uri, "format": kind, "files": listed}))  # noqa: T201
            return
        for file in files:
            root = f" of {file.root}" if file.root else ""
            print(f"{folder}/{file.name}  {file.picks:,} picks{root}")  # noqa: T201


@app.command("labels")
def bring_labels(
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
    with _sentences(debug, as_json):
        from selective_ray import labeling

        reporter = Reporter(quiet=as_json)
        where = _existing(run, endpoint_url)
        found = labeling.bring_labels(where, file, replace=replace, reporter=reporter)
        if as_json:
            print(json.dumps({**found, "warnings": reporter.warnings}))  # noqa: T201
            return
        for line in _label_lines(found):
            print(line)  # noqa: T201


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


@app.command()
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
    with _sentences(debug, as_json):
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
        from selective_ray.actors import training

        reporter = Reporter(quiet=as_json)
        where = _existing(run, settings.resources.endpoint_url)
        images = held_out.read(validation, where.access) if validation else held_out.NONE
        known = true_labels.read([where], truth) if truth else None
        done, summary = training.train(
            *(where, settings, name, reporter),
            until=until,
            held_out=images,
            truth=known,
            address=address,
        )
        folder, page = where.path("training", name), where.path("report", f"training-{name}.html")
        if as_json:
            told = {
                "run": where.uri,
                "training": folder,
                "report": page,
                "complete": done is not None,
                **summary,
            }
            print(json.dumps({**told, "warnings": reporter.warnings}))  # noqa: T201
            return
        for line in _training_lines(summary, folder, page, complete=done is not None):
            print(line)  # noqa: T201


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


@app.command()
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
    with _sentences(debug, as_json):
        options = {
            "resources.endpoint_url": endpoint_url,
            "resources.max_rejected": None if max_rejected is None else _share(max_rejected),
        }
        settings, asked = config.load(file=config_file, assignments=assignments, options=options)
        from selective_ray.actors import predictions

        reporter = Reporter(quiet=as_json)
        where = _existing(run, settings.resources.endpoint_url)
        resources = settings.resources
        done, complete = predictions.predict(
            *(where, settings, name, reporter),
            most=resources.max_rejected if "resources.max_rejected" in asked else 0.0,
            replace=replace,
            address=address,
        )
        folder = where.path("predictions")
        if as_json:
            told = {"run": where.uri, "predictions": folder, "already_complete": complete, **done.summary}
            print(json.dumps({**told, "seconds": done.seconds, "warnings": reporter.warnings}))  # noqa: T201
            return
        if complete:
            print("already complete: predictions")  # noqa: T201
        for line in _prediction_lines(done.summary, done.seconds, folder):
            print(line)  # noqa: T201


def _prediction_lines(summary: dict[str, Any], seconds: float, folder: str) -> Iterator[str]:
    unread = sum(summary["unread"].values())
    yield (
        f"predicted  {summary['predicted']:,} images by training {summary['training']!r}, step "
        f"{summary['step']:,}" + (f"; {unread:,} cannot be read any more" if unread else "")
    )
    yield from _class_lines(summary["classes"])
    yield f"confidence {100 * summary['mean_confidence']:.1f} % on average"
    yield f"seconds    {seconds:.1f}"
    yield f"folder     {folder}"


def _existing(run: str, endpoint_url: str | None) -> Run:
    where = Run(run, Access(endpoint_url))
    if not any(where.exists(table, name) for table in TABLES for name in ("manifest.json", BEGUN)):
        raise UserError(f"{run} is not a run; check --run")
    return where


@app.command()
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
    with _sentences(debug, as_json):
        from selective_ray import judging, standings

        reporter = Reporter(quiet=as_json)
        wheres = [_existing(run, endpoint_url) for run in runs]
        found = judging.evaluate(wheres, judging.How(labels, draws, sample, seed), reporter)
        if as_json:
            print(json.dumps({"judged": standings.as_json(found), "warnings": reporter.warnings}))  # noqa: T201
            return
        for line in standings.lines(found):
            print(line)  # noqa: T201


@app.command()
def demo(
    folder: Annotated[
        str, typer.Option("--folder", help="Where the images and the runs of the demo go.")
    ] = "demo",
    seeds: Annotated[int, typer.Option(help="Seeds of the selection.", min=5)] = 5,
    draws: Annotated[int, typer.Option(help="Random draws to compare with.", min=10)] = 20,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Select 40 of 1,797 handwritten digits and compare with random draws."""
    with _sentences(debug, as_json):
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
