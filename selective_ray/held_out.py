"""Labeled images that are held out: a folder with one folder a class, or a file with uris and labels."""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass

import pyarrow as pa

from selective_ray import label_files, listing, objects
from selective_ray.errors import UserError
from selective_ray.objects import DIRECT, Access, Request
from selective_ray.schema import LISTED


@dataclass(frozen=True)
class HeldOut:
    """Where to read the images (schema LISTED), and their classes in the same order."""

    rows: pa.Table
    labels: list[str]
    source: str = ""
    version: str = ""


NONE = HeldOut(LISTED.empty_table(), [])


def read(source: str, access: Access = DIRECT) -> HeldOut:
    """List held-out images; raises UserError where there are none, or where they have no classes."""
    if source.endswith((".csv", ".jsonl")):
        rows, labels = _file(source, access)
    else:
        rows, labels = _folders(source, access)
    text = repr((rows.column("uri").to_pylist(), rows.column("version").to_pylist(), labels))
    return HeldOut(rows, labels, source, hashlib.sha256(text.encode()).hexdigest()[:16])


def _file(source: str, access: Access) -> tuple[pa.Table, list[str]]:
    try:
        _, answers = label_files.parse(objects.read(Request(source), access), source)
    except FileNotFoundError:
        raise UserError(f"there is no file {source}; check --validation") from None
    said = [answer for answer in answers if answer.label]
    if not said or any(answer.uri is None for answer in said):
        raise UserError(
            f"{source} must give the uri and the label of each held-out image; check --validation"
        )
    base = posixpath.dirname(source)
    uris = [
        answer.uri if "://" in answer.uri or answer.uri.startswith("/") else posixpath.join(base, answer.uri)
        for answer in said
    ]
    n = len(uris)
    nothing = pa.nulls(n, pa.int64())
    rows = pa.table([pa.array(uris), nothing, nothing, nothing, pa.array([""] * n)], LISTED)
    return rows, [answer.label for answer in said]


def _folders(source: str, access: Access) -> tuple[pa.Table, list[str]]:
    chosen = listing.Source(source)
    tasks, parts = [listing.first_task(chosen, access)], []
    while tasks:
        for found in listing.expand(tasks.pop(), chosen, access):
            tasks += found.tasks
            parts += [] if found.rows is None else [found.rows]
    rows = pa.concat_tables([LISTED.empty_table(), *parts]).sort_by("uri")
    labels = [posixpath.basename(posixpath.dirname(uri)) for uri in rows["uri"].to_pylist()]
    if len(rows) == 0 or len(set(labels)) < 2:
        raise UserError(
            f"{source} holds no folders of two classes or more with images in them; give --validation such a "
            "folder, or a CSV file with uri and label"
        )
    return rows, labels
