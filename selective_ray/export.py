"""Picks as the files that people and labeling tools take: CSV, JSONL, Label Studio's tasks, CVAT's manifest.

The same picks give the same bytes. Sources of the two tools' formats: Label Studio's guide to importing tasks
and to local storage, CVAT's specification of dataset manifests.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from selective_ray import objects
from selective_ray.answers import SKIPPED, plain_cell
from selective_ray.errors import UserError, named

FORMATS = ("csv", "jsonl", "label-studio", "cvat")
# Label Studio's guide: about 100,000 tasks a project, and files of up to 50 MB.
TASKS_A_FILE, BYTES_A_FILE = 100_000, 50_000_000
# A file becomes a task of CVAT, which looks every image up in a list of all: its work grows with the square.
IMAGES_A_MANIFEST = 10_000


@dataclass(frozen=True)
class Pick:
    """A picked image: its uri in the run, and that of the file that holds nothing else, if there is one."""

    image_id: int
    uri: str
    cluster_id: int
    file: str | None = None


@dataclass(frozen=True)
class File:
    """A file of an export: its name, its bytes, how many picks it holds, and where their names begin."""

    name: str
    data: bytes
    picks: int
    root: str | None = None


def csv_file(picks: Sequence[Pick]) -> File:
    """Write picks as CSV, with empty columns for label and skipped; safe to open in a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image_id", "uri", "cluster_id", "label", SKIPPED])
    writer.writerows([pick.image_id, plain_cell(pick.uri), pick.cluster_id, "", ""] for pick in picks)
    return File("selection.csv", text.getvalue().encode(), len(picks))


def jsonl_file(picks: Sequence[Pick]) -> File:
    """Write picks as JSON objects, one a line, with a label of null."""
    lines = (
        json.dumps(
            {"image_id": pick.image_id, "uri": pick.uri, "cluster_id": pick.cluster_id, "label": None},
            ensure_ascii=False,
        )
        for pick in picks
    )
    return File("selection.jsonl", "".join(f"{line}\n" for line in lines).encode(), len(picks))


def label_studio_files(
    picks: Sequence[Pick], tasks: int = TASKS_A_FILE, nbytes: int = BYTES_A_FILE
) -> Iterator[File]:
    """Write picks as tasks of Label Studio, at most so many and so many bytes a file.

    image_id and uri travel with a task, and come back with every export. Raises UserError where a pick is in
    no file of its own.
    """
    _need_files(picks, "Label Studio")
    lines: list[bytes] = []
    size = number = 0
    for pick in picks:
        data = {
            "image": label_studio_url(pick.file),
            "image_id": pick.image_id,
            "uri": pick.uri,
            "cluster_id": pick.cluster_id,
        }
        line = json.dumps({"data": data}, ensure_ascii=False).encode()
        if lines and (len(lines) == tasks or size + len(line) + 4 > nbytes):
            number += 1
            yield _tasks(lines, number)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 2
    yield _tasks(lines, number + 1)


def _tasks(lines: list[bytes], number: int) -> File:
    return File(f"label-studio-{number:03d}.json", b"[\n" + b",\n".join(lines) + b"\n]", len(lines))


def label_studio_url(uri: str) -> str:
    """Write the uri of a file as Label Studio names it: in a bucket that is connected, or on its machine."""
    if objects.is_local(uri):
        # Below its document root, which is / where nobody has set another.
        return f"/data/local-files/?d={quote(os.fsencode(objects.local_path(uri)).lstrip(b'/'))}"
    if uri.startswith(("http://", "https://")):
        return uri
    base, key = objects.split_uri(uri)
    scheme, _, place = base.partition("://")
    if scheme in ("s3", "gs"):
        return uri
    return f"azure-blob://{place.partition('@')[0]}/{key}"


def cvat_files(
    picks: Sequence[Pick], sizes: Sequence[tuple[int, int]], images: int = IMAGES_A_MANIFEST
) -> Iterator[File]:
    """Write picks as manifests of CVAT, at most so many images each, one bucket or local folder each.

    sizes are the pixels of each pick, width and height as it is seen. Names begin at the bucket, or at the
    deepest folder that holds all local picks; there a manifest belongs. Raises UserError where a pick is in
    no file of its own, or at an address of the web.
    """
    _need_files(picks, "CVAT")
    _need_buckets(picks)
    of_root = defaultdict(list)
    local = [posixpath.dirname(objects.local_path(p.file)) for p in picks if objects.is_local(p.file)]
    folder = posixpath.commonpath(local) if local else ""
    for pick, size in zip(picks, sizes, strict=True):
        if objects.is_local(pick.file):
            of_root[folder].append((posixpath.relpath(objects.local_path(pick.file), folder), size))
        else:
            base, key = objects.split_uri(pick.file)
            of_root[base].append((key, size))
    number = 0
    for root, named_sizes in of_root.items():
        for start in range(0, len(named_sizes), images):
            some = named_sizes[start : start + images]
            number += 1
            yield File(f"cvat-{number:03d}.jsonl", _manifest(some), len(some), root)


def _manifest(named_sizes: list[tuple[str, tuple[int, int]]]) -> bytes:
    lines: list[dict] = [{"version": "1.1"}, {"type": "images"}]
    for key, (width, height) in named_sizes:
        name, extension = posixpath.splitext(key)
        lines.append({"name": name, "extension": extension, "width": width, "height": height})
        lines[-1]["meta"] = {"related_images": []}
    return "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()


def _need_files(picks: Sequence[Pick], tool: str) -> None:
    inside = [pick.uri for pick in picks if pick.file is None]
    if inside:
        raise UserError(
            f"{tool} cannot show {len(inside):,} of the {len(picks):,} picks, which are no files of their "
            f"own ({named(inside, ', ')}); give --copies FOLDER, to which the picks are copied as files"
        )


def _need_buckets(picks: Sequence[Pick]) -> None:
    elsewhere = [pick.file for pick in picks if pick.file.startswith(("http://", "https://"))]
    if elsewhere:
        raise UserError(
            f"a manifest of CVAT names files in a bucket or a shared folder; {len(elsewhere):,} picks are "
            f"at addresses of the web ({named(elsewhere, ', ')}); export csv, and give CVAT the addresses"
        )
