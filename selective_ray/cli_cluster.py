"""The commands for a cluster: run something on one, and look whether it is fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from selective_ray.cli_options import Address, Debug, EndpointUrl, Json, sentences
from selective_ray.errors import UsageError
from selective_ray.objects import Access
from selective_ray.progress import Reporter

# What runs on a cluster; the other commands only look into a run.
SUBMITTED = ("select", "embed", "density", "cluster", "pretrain", "train", "predict")


def submit(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND …", help=f"One of {', '.join(SUBMITTED)}, and its options."),
    ],
    job_address: Annotated[
        str | None,
        typer.Option(
            "--job-address",
            help="The Jobs API of the cluster (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265).",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log of the job.")] = True,
    debug: Debug = False,
) -> None:
    """Run a command on a Ray cluster as a job, and follow it; the job goes on without this process."""
    with sentences(debug):
        if words[0] not in SUBMITTED:
            raise UsageError(f"{words[0]!r} is not run on a cluster; give one of {', '.join(SUBMITTED)}")
    # Wrong usage is told here, before anything is sent.
    context.find_root().command.commands[words[0]].make_context(words[0], words[1:])
    with sentences(debug):
        from selective_ray.actors import submission

        reporter = Reporter()
        try:
            status = submission.submit(words, job_address, reporter.tell, wait=wait)
        except KeyboardInterrupt:
            reporter.tell("the job goes on")
            raise typer.Exit(130) from None
        if status:
            raise typer.Exit(status)


def check(
    address: Address = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Folder or prefix where runs are to be written.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell whether a cluster is fit: versions, limits, clocks, results, collectives, and the bucket."""
    with sentences(debug, as_json):
        from selective_ray.actors import check as fit
        from selective_ray.actors.session import Session

        # Processes of the cluster work in other folders.
        run = str(Path(run).absolute()) if run and "://" not in run else run
        reporter = Reporter(quiet=as_json)
        lines = []
        with Session(address) as session:
            session.start()
            for line in fit.check(run, Access(endpoint_url), reporter.say):
                lines.append(line)
                if not as_json:
                    mark = {True: "ok", False: "NOT FIT", None: "-"}[line.fit]
                    print(f"{mark:<8} {line.what:<28} {line.seen}", flush=True)  # noqa: T201
        wrong = [line.what for line in lines if line.fit is False]
        if as_json:
            print(json.dumps({"fit": not wrong, "checked": [asdict(line) for line in lines]}))  # noqa: T201
        else:
            print(f"not fit: {', '.join(wrong)}" if wrong else "fit for a run")  # noqa: T201
        if wrong:
            raise typer.Exit(1)
