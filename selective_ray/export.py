"""The picks of a run as files for people and labeling tools: CSV, JSONL, Label Studio, CVAT.

The same picks give the same bytes. Sources of the two tools' formats: Label Studio's guide to importing tasks
and to local storage, CVAT's specification of dataset manifests.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import pyarrow as pa

from selective_ray import images, objects, reading
from selective_ray.errors import UserError, named
from selective_ray.images import Rejected
from selective_ray.label_files import SKIPPED, plain_cell
from selective_ray.objects import Access, Request
from selective_ray.progress import Reporter
from selective_ray.store import Run

FORMATS = ("csv", "jsonl", "label-studio", "cvat")
# Label Studio's guide: about 100,000 tasks a project, and files of up to 50 MB.
TASKS_A_FILE, BYTES_A_FILE = 100_000, 50_000_000
# A file becomes a task of CVAT, which looks every image up in a list of all: its work grows with the square.
IMAGES_A_MANIFEST = 10_000
# Bytes of a JPEG in which its size and orientation are, unless it begins with a long profile or preview.
HEAD = 64 << 10
# Copies that are written at a time.
WRITERS = 16
# The name of a copy: the listing that its image id is of, and the id.
_COPY = re.compile(r"([0-9a-f]{8})-(\d{12})\.\w+")


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


def write_picks(
    run: Run, kind: str, out: str | None, copies: str | None, reporter: Reporter
) -> tuple[str, list[File]]:
    """Write the picks of a finished selection in one of FORMATS; returns the folder and the files.

    copies: a folder to which the picks are copied as files, which the files written then name. Raises
    UserError where the selection is not finished, a pick cannot be read, the tool cannot reach the picks, or
    a file of the same name holds something else: somebody may have filled it in.
    """
    if run.manifest("selection") is None:
        raise UserError(f"{run.uri} has no finished selection; run `selective-ray select` on it first")
    selection = selected(run)
    folder = _folder(out) if out else run.path("export")
    listed = run.listed(selection["image_id"].to_numpy())
    columns = (selection[name].to_pylist() for name in ("image_id", "uri", "cluster_id"))
    picks = [
        Pick(image, uri, cluster, _file(run, uri, offset))
        for image, uri, cluster, offset in zip(*columns, listed["offset"].to_pylist(), strict=True)
    ]
    sizes: list[tuple[int, int]] = []
    if copies:
        picks, sizes = _copied(run, picks, listed, _folder(copies), reporter)
    elif kind == "cvat":
        # What it cannot have is known before anything is read.
        next(cvat_files(picks, [(0, 0)] * len(picks)))
        sizes = _sizes(run, picks, listed, reporter)
    files = {
        "csv": lambda: [csv_file(picks)],
        "jsonl": lambda: [jsonl_file(picks)],
        "label-studio": lambda: list(label_studio_files(picks)),
        "cvat": lambda: list(cvat_files(picks, sizes)),
    }[kind]()
    for file in files:
        _write_once(f"{folder}/{file.name}", file.data, run.access)
    return folder, files


def selected(run: Run) -> pa.Table:
    """Return the picks, image_id, uri and cluster_id; no rows where nothing is selected yet."""
    schema = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("cluster_id", pa.int32())])
    manifest = run.manifest("selection")
    parts = [
        run.read_shard("selection", shard.index, schema.names).cast(schema)
        for shard in (manifest.shards if manifest else [])
    ]
    return pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()


def _folder(place: str) -> str:
    """Return a folder as a prefix of uris."""
    if objects.is_local(place):
        return objects.local_uri(os.path.abspath(objects.local_path(place))).rstrip("/")  # noqa: PTH100
    objects.split_uri(place)
    return place.rstrip("/")


def _file(run: Run, uri: str, offset: int | None) -> str | None:
    """Return the uri of the file that holds an image and nothing else; None where there is none."""
    if offset is not None or uri.startswith(f"{run.manifest('images').what.get('source')}#"):
        return None
    if objects.is_local(uri):
        return uri if objects.local_path(uri).startswith("/") else None
    known = (*(f"{scheme}://" for scheme in objects.SCHEMES), "http://", "https://")
    return uri if uri.lower().startswith(known) else None


def _write_once(uri: str, data: bytes, access: Access) -> None:
    try:
        if not objects.exists(uri, access):
            objects.write(uri, data, access)
        elif objects.read(Request(uri), access) != data:
            raise UserError(f"{uri} is there and holds something else; move it away, or choose another --out")
    except OSError as error:
        raise UserError(f"{uri} cannot be written ({error}); choose another --out") from None


def stamp_of(run: Run) -> str:
    """Name the listing that image ids are of, as in the names of copies."""
    return run.manifest("images").fingerprint[:8]


def _copied(
    run: Run, picks: list[Pick], listed: pa.Table, folder: str, reporter: Reporter
) -> tuple[list[Pick], list[tuple[int, int]]]:
    """Copy picks to a folder, named by their ids; returns the picks with these files, and their sizes."""
    stamp, copied, sizes = stamp_of(run), [], []
    with reporter.stage("copy", len(picks), "images") as bar, ThreadPoolExecutor(WRITERS) as pool:
        found = zip(picks, _fetched(run, picks, listed), strict=True)
        while some := list(itertools.islice(found, 4 * WRITERS)):
            writes = []
            for pick, data in some:
                width, height, extension = _extent(pick, data)
                own = posixpath.splitext(pick.uri)[1].lower()
                extension = own if own in images.EXTENSIONS else extension
                file = f"{folder}/{stamp}-{pick.image_id:012d}{extension}"
                writes.append(pool.submit(objects.write, file, data, run.access))
                copied.append(dataclasses.replace(pick, file=file))
                sizes.append((width, height))
            try:
                for write in writes:
                    write.result()
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error}); choose another --copies") from None
            bar.advance(len(some))
    return copied, sizes


def _sizes(run: Run, picks: list[Pick], listed: pa.Table, reporter: Reporter) -> list[tuple[int, int]]:
    """Return width and height of picks; of JPEGs, only the first bytes are read."""
    length = dict(zip(listed["uri"].to_pylist(), listed["size"].to_pylist(), strict=True))

    def head(request: Request, access: Access) -> bytes:
        if (length[request.uri] or 0) <= HEAD:
            return objects.read(request, access)
        start = objects.read(dataclasses.replace(request, stop=HEAD), access)
        if start[:2] == b"\xff\xd8":
            try:
                images.extent(start)
                return start
            except Rejected:
                pass
        return objects.read(request, access)

    sizes = []
    with reporter.stage("sizes", len(picks), "images") as bar:
        for pick, data in zip(picks, _fetched(run, picks, listed, head), strict=True):
            sizes.append(_extent(pick, data)[:2])
            bar.advance(1)
    return sizes


def _fetched(
    run: Run, picks: list[Pick], listed: pa.Table, read: reading.Read = objects.read
) -> Iterator[bytes]:
    """Read picks in order; raises UserError for one that cannot be read."""
    places = zip(picks, listed["offset"].to_pylist(), strict=True)
    if nowhere := [pick.uri for pick, offset in places if pick.file is None and offset is None]:
        raise UserError(
            f"{len(nowhere):,} picks have no image that could be read ({named(nowhere, ', ')}): the run was "
            "made from embeddings; bring them as Parquet with a column `uri`, or export csv or jsonl"
        )
    column = run.manifest("images").what.get("images", {}).get("column")
    found = reading.fetch(listed, run.access, column=column, read=read)
    for pick, data in zip(picks, found, strict=True):
        if isinstance(data, Rejected):
            raise UserError(f"{pick.uri} cannot be read: {data}; put it back and run again")
        yield data


def _extent(pick: Pick, data: bytes) -> tuple[int, int, str]:
    try:
        return images.extent(data)
    except Rejected as reason:
        raise UserError(f"{pick.uri} cannot be read: {reason}; put it back and run again") from None


def copy_of(name: str, stamp: str) -> int | None:
    """Return the image whose copy a name is of, None where it is none of this run's."""
    copy = _COPY.fullmatch(name.rsplit("/", 1)[-1])
    return int(copy[2]) if copy and copy[1] == stamp else None


# Formats


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
