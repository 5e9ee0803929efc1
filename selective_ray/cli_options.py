"""What the commands share: options, answers, and how a failure becomes one line and an exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from selective_ray.config import METHOD_KEYS
from selective_ray.errors import UsageError, UserError
from selective_ray.objects import Access
from selective_ray.presets import PRESETS
from selective_ray.progress import Reporter, one_line
from selective_ray.store import BEGUN, TABLES, Run

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
Method = Annotated[
    str | None,
    typer.Option("--method", help=f"How to select: {', '.join(METHOD_KEYS)} (default prototypes)."),
]
KeepUtilities = Annotated[
    bool, typer.Option("--keep-utilities", help="Write the utility of every image to utilities/.")
]
KeepNeighbors = Annotated[
    bool, typer.Option("--keep-neighbors", help="Write the k neighbors of every image to neighbors/.")
]
Preset = Annotated[str | None, typer.Option("--preset", help=f"Published constants: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file with the sections of the configuration.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice (default 0).")]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="Network by name, a run of `pretrain`, or pca (default resnet50)."),
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights of the encoder, in place of the published ones.")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster (default: RAY_ADDRESS, else a private instance).")
]
Log = Annotated[
    Literal["text", "json"],
    typer.Option("--log", help="Progress and warnings on stderr as text, or a JSON object a line."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@contextmanager
def sentences(debug: bool, as_json: bool = False) -> Iterator[None]:
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


def share(text: str) -> float:
    """Read a share: 1% or 0.01."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-rejected {text!r} is no share; give it as 1% or 0.01") from None


def numbers(text: str) -> list[int]:
    """Read whole numbers with commas between them."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {text!r} are no whole numbers; give them as 1000,5000") from None


def existing(run: str, endpoint_url: str | None) -> Run:
    """Return a run that is there; raises UserError where it is not."""
    where = Run(run, Access(endpoint_url))
    if not any(where.exists(table, name) for table in TABLES for name in ("manifest.json", BEGUN)):
        raise UserError(f"{run} is not a run; check --run")
    return where


def answer(
    told: dict[str, Any], lines: Iterable[str], as_json: bool, reporter: Reporter | None = None
) -> None:
    """Print what was done: one object, with what there was to warn of, or lines for a person."""
    if as_json:
        print(json.dumps({**told, "warnings": reporter.warnings} if reporter else told))  # noqa: T201
        return
    for line in lines:
        print(line)  # noqa: T201
