"""Sources of images, listed into sorted pieces of the image table: folders, buckets, tar archives, Parquet
files with image bytes, and lists of uris.

A source begins as one task; expanding a task yields rows, and further tasks where it meets an archive or
where a bucket is worth listing from several places at once. What a task yields depends on nothing but the
task, so that it can be expanded anywhere and again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_ray import folders, objects
from selective_ray.errors import UsageError, UserError
from selective_ray.images import EXTENSIONS
from selective_ray.objects import DIRECT, Access, is_local, local_path, local_uri, local_version
from selective_ray.schema import LISTED

# Rows of a piece, and keys that one task lists before it hands on the rest of its range.
PIECE_ROWS = 20_000
# Characters that cut the rest of a range: what follows a character of the same kind in most names.
_KINDS = ("0123456789abcdef", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# Compressed archives have no offsets.
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", re.IGNORECASE)
_LISTS = (".txt", ".list", ".lst")
_URI_COLUMNS = ("uri", "url", "path", "file", "filename", "file_name")
_BYTES_COLUMNS = ("image", "img", "image_bytes", "bytes", "jpg", "jpeg", "png", "content", "data")


@dataclass(frozen=True)
class Source:
    """What a person points at: a folder, a prefix, an archive, a Parquet file or a list; and which of it.

    include and exclude are shell patterns (`*` also matches `/`) on the path below the source; with no
    include everything is in. column names the column of images, or of uris, of Parquet files.
    """

    uri: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    column: str | None = None


@dataclass(frozen=True)
class Task:
    """A part of a source: keys in (after, upto] of a bucket, a local folder, an archive, Parquet, a list."""

    kind: Literal["keys", "folder", "archive", "parquet", "list"]
    uri: str
    version: str = ""
    after: str = ""
    upto: str = ""


@dataclass(frozen=True)
class Found:
    """What expanding a task yields.

    rows have the schema LISTED and are sorted by uri; others are files that are no images, repeated are the
    lines of a list that name an image again.
    """

    rows: pa.Table | None = None
    tasks: tuple[Task, ...] = ()
    others: int = 0
    repeated: int = 0


def shard_rows(n: int, asked: int | None) -> int:
    """Rows of a shard: about 64 shards, none so small that its overhead shows or too large to redo."""
    return asked or min(65_536, max(256, -(-n // 64)))


def first_task(source: Source, access: Access = DIRECT) -> Task:
    """Return the task that a source begins as; raises UsageError or UserError where it is none."""
    uri = source.uri
    if not uri:
        raise UsageError("--images is empty; give a folder, a bucket's prefix, an archive or a list of uris")
    if not is_local(uri):
        _, key = objects.split_uri(uri)
        kind = _kind_of(key)
        return Task(kind, uri, objects.version(uri, access)[1]) if kind else Task("keys", uri)
    scheme = re.match(r"file://([^/]*)", uri, re.IGNORECASE)
    if scheme and scheme[1] not in ("", "localhost"):
        raise UsageError(f"cannot read images from {uri!r}: it names another machine; copy them to a folder")
    # resolve() would put what a link points to on this machine into every uri, absolute() would keep "..".
    root = os.path.abspath(local_path(uri))  # noqa: PTH100
    try:
        status = Path(root).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no folder {local_uri(root)}; check the path") from None
    except OSError as error:
        raise folders.unreadable(root, error) from None
    if stat.S_ISDIR(status.st_mode):
        return Task("folder", local_uri(root))
    kind = _kind_of(root)
    if kind is None:
        raise UserError(
            f"{local_uri(root)} is a file, not a folder; give the folder that holds the images, a .tar or "
            f".parquet file, or a list of uris ({', '.join(_LISTS)})"
        )
    return Task(kind, local_uri(root), local_version(status))


def _kind_of(name: str) -> Literal["archive", "parquet", "list"] | None:
    lower = name.lower()
    if _COMPRESSED.search(lower):
        raise UserError(
            f"{name} is compressed, so its images cannot be read one by one; unpack it, or make a plain .tar"
        )
    if lower.endswith(".tar"):
        return "archive"
    if lower.endswith(".parquet"):
        return "parquet"
    return "list" if lower.endswith(_LISTS) else None


def expand(task: Task, source: Source, access: Access = DIRECT) -> Iterator[Found]:
    """List what a task holds; raises UserError where it cannot be listed."""
    kinds = {
        "keys": _keys,
        "folder": _folder,
        "archive": _archive,
        "parquet": _parquet,
        "list": _uris,
    }
    try:
        yield from kinds[task.kind](task, source, access)
    except FileNotFoundError:
        raise UserError(f"there is no {task.uri}; check --images") from None
    except PermissionError as error:
        raise UserError(
            f"cannot list {task.uri}: {error.strerror or error}; get the right to read it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot list {task.uri}: {error.strerror or error}; run again to continue") from None


def nothing_found(source: Source, others: int) -> UserError:
    """Return the error for a source without a single image."""
    if source.include or source.exclude:
        return UserError(f"no image of {source.uri} passes --include and --exclude; check the patterns")
    if not others:
        return UserError(f"{source.uri} is empty; give a folder or prefix that holds images")
    return UserError(
        f"none of the {others:,} files in {source.uri} is an image; files count as images by their extension "
        f"({' '.join(EXTENSIONS)}): rename them, or give the folder that holds the images"
    )


# Buckets


def _keys(task: Task, source: Source, access: Access) -> Iterator[Found]:
    """List a range of keys; after PIECE_ROWS of them the rest becomes tasks, cut where names may go on.

    Only S3 begins a listing in the middle without going through what is before; elsewhere one task goes on.
    """
    base, prefix = objects.split_uri(task.uri)
    first = last = ""
    files = _Files(source, len(task.uri.rstrip("/")) + 1)
    for keys, sizes, versions in objects.list_keys(base, prefix, access, task.after):
        first, last = first or keys[0], keys[-1]
        for key, size, version in zip(keys, sizes, versions, strict=True):
            if task.upto and key > task.upto:
                yield files.found()
                return
            files.add(f"{base}/{key}", size, version)
        if files.seen >= PIECE_ROWS:
            yield files.found()
            if base.startswith("s3://"):
                cuts = [cut for cut in _cuts(first, last, len(prefix)) if not task.upto or cut < task.upto]
                yield Found(
                    tasks=tuple(
                        Task("keys", task.uri, after=after, upto=upto)
                        for after, upto in itertools.pairwise([last, *cuts, task.upto])
                    )
                )
                return
    yield files.found()


def _cuts(first: str, last: str, prefix: int) -> list[str]:
    """Return keys in ascending order that cut the range after `last`, as an odometer would go on.

    Characters are counted up from the first one in which the keys seen so far differ. A bad guess costs an
    empty range, one request; the cut ranges hold every key whatever the guess.
    """
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    cuts = []
    for place in range(min(same, len(last) - 1), max(prefix, same - 4) - 1, -1):
        kind = next((kind for kind in _KINDS if last[place] in kind), "")
        cuts += [last[:place] + character for character in kind if character > last[place]]
    return cuts


class _Files:
    """The files of one task: images become rows, archives and Parquet files further tasks."""

    def __init__(self, source: Source, root: int) -> None:
        self.source, self.root = source, root
        self.rows: list[tuple[str, int, str]] = []
        self.tasks: list[Task] = []
        self.seen = self.others = 0

    def add(self, uri: str, size: int, version: str) -> None:
        """Count a file, unless it is hidden or left out."""
        self.seen += 1
        below = uri[self.root :]
        if below.startswith(".") or "/." in below or uri.endswith("/"):
            return
        lower = below.lower()
        if lower.endswith(EXTENSIONS):
            if passes(below, self.source):
                self.rows.append((uri, size, version))
        elif lower.endswith((".tar", ".parquet")) and not excluded(below, self.source):
            self.tasks.append(Task("archive" if lower.endswith(".tar") else "parquet", uri, version))
        elif _COMPRESSED.search(lower) and not excluded(below, self.source):
            raise UserError(
                f"{uri} is compressed, so its images cannot be read one by one; unpack it, make it a plain "
                f".tar, or leave it out with --exclude '*{os.path.splitext(below)[1]}'"  # noqa: PTH122
            )
        else:
            self.others += 1

    def found(self) -> Found:
        """Return what was added since the last time."""
        self.rows.sort()
        uris, sizes, versions = zip(*self.rows, strict=True) if self.rows else ((), (), ())
        rows = table(uris, sizes, versions) if self.rows else None
        answer = Found(rows, tuple(self.tasks), self.others)
        self.rows, self.tasks, self.others, self.seen = [], [], 0, 0
        return answer


def passes(below: str, source: Source) -> bool:
    """Whether the patterns let a path below the source in."""
    included = not source.include or any(fnmatch.fnmatchcase(below, pattern) for pattern in source.include)
    return included and not excluded(below, source)


def excluded(below: str, source: Source) -> bool:
    """Whether a pattern leaves a path below the source out."""
    return any(fnmatch.fnmatchcase(below, pattern) for pattern in source.exclude)


def table(
    uris: Sequence[str],
    sizes: Sequence[int | None],
    versions: Sequence[str],
    offsets: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> pa.Table:
    """Return rows of a listing, schema LISTED."""
    nothing = [None] * len(uris)
    return pa.table(
        {
            "uri": uris,
            "offset": nothing if offsets is None else offsets,
            "length": nothing if lengths is None else lengths,
            "size": sizes,
            "version": versions,
        },
        LISTED,
    )


def digest(rows: pa.Table) -> int:
    """Return the sum of the SHA-256 of rows modulo 2^128, in which neither order nor shards show."""
    total = 0
    for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        total += int.from_bytes(hashlib.sha256(repr(row).encode()).digest()[:16])
    return total % 2**128


# Local folders


def _folder(task: Task, source: Source, access: Access) -> Iterator[Found]:
    """List a folder and those in it in order of their uris; hidden ones are passed over."""
    root = local_path(task.uri)
    files = _Files(source, len(local_uri(root).rstrip("/")) + 1)
    for path, status in folders.walk(root):
        files.add(local_uri(path), status.st_size, local_version(status))
        if len(files.rows) >= PIECE_ROWS:
            yield files.found()
    yield files.found()


# Archives


def member(archive: str, name: str) -> str:
    """Return the uri of a member of an archive, or of a row of a Parquet file: `<archive>#<name>`."""
    return f"{archive}#{name}"


def archive_of(uri: str) -> str:
    """Return the archive, or the Parquet file, of a member's uri."""
    return uri[: uri.index("#")]


def _archive(task: Task, source: Source, access: Access) -> Iterator[Found]:
    """List the images of a tar archive by their offsets; reads its headers, and what lies between small ones.

    A name that occurs twice means the last one, as tar has it. Names are data: nothing is ever unpacked.
    """
    _no_fragment(task.uri)
    root = _root_length(task.uri, source)
    rows: dict[str, tuple[int, int]] = {}
    others = count = 0
    try:
        with objects.open_seekable(task.uri, access) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                count += 1
                # It would keep every header that it has read.
                tar.members = []
                parts = info.name.removeprefix("./").split("/")
                if not info.isreg() or any(part.startswith(".") for part in parts):
                    continue
                name = info.name
                try:
                    name.encode()
                except UnicodeEncodeError:
                    name = quote(os.fsencode(name))
                uri = member(task.uri, name)
                if not info.name.lower().endswith(EXTENSIONS):
                    others += 1
                elif passes(uri[root:], source):
                    rows[uri] = (info.offset_data, info.size)
            _check_end(file, tar, task.uri, count)
    except tarfile.TarError as error:
        raise UserError(
            f"{task.uri} is damaged after {count:,} members ({error}); replace it, or leave it out with "
            "--exclude"
        ) from None
    uris = sorted(rows)
    for start in range(0, max(1, len(uris)), PIECE_ROWS):
        some = uris[start : start + PIECE_ROWS]
        offsets, lengths = zip(*(rows[uri] for uri in some), strict=True) if some else ((), ())
        piece = table(some, lengths, [task.version] * len(some), offsets, lengths) if some else None
        yield Found(piece, others=others if start == 0 else 0)


def _check_end(file: Any, tar: tarfile.TarFile, uri: str, count: int) -> None:
    """Raise UserError where the archive breaks off inside its last member, which tarfile passes over."""
    file.seek(0, os.SEEK_END)
    if tar.offset > file.tell():
        raise UserError(
            f"{uri} is damaged after {count:,} members (it ends early); replace it, or leave it out with "
            "--exclude"
        )


def _no_fragment(uri: str) -> None:
    if "#" in uri:
        raise UserError(f"the name of {uri} has a '#', which separates archive and member; rename it")


def _root_length(uri: str, source: Source) -> int:
    """Return where the path below the source begins in the uris of an archive."""
    whole = _whole_uri(source).rstrip("/")
    return len(whole) + 1 if uri.startswith(whole + "/") else uri.rfind("/") + 1


def _whole_uri(source: Source) -> str:
    if is_local(source.uri):
        return local_uri(os.path.abspath(local_path(source.uri)))  # noqa: PTH100
    return source.uri


# Parquet


def _parquet(task: Task, source: Source, access: Access) -> Iterator[Found]:
    """List the rows of a Parquet file with image bytes as images, or take its column of uris as a list."""
    _no_fragment(task.uri)
    with open_parquet(task.uri, access) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        itself = task.uri == _whole_uri(source)
        if not itself and source.column not in (None, *schema.names):
            yield Found(others=1)
            return
        column = image_column(schema, source.column)
        if column is None and not itself:
            # A table that describes the images beside it.
            yield Found(others=1)
            return
        if column is None:
            uris = _uri_column(schema, source.column, task.uri)
            values: list[str] = []
            for batch in file.iter_batches(columns=[uris]):
                values += [str(value) for value in batch[uris].to_pylist() if value is not None]
            yield from _listed(values, task, source)
            return
    if not passes(task.uri[_root_length(task.uri, source) :], source):
        return
    # Widths are fixed so that uris sort as rows do.
    for start in range(0, n, PIECE_ROWS):
        stop = min(n, start + PIECE_ROWS)
        rows = range(start, stop)
        uris = [member(task.uri, f"{row:010d}") for row in rows]
        yield Found(table(uris, [None] * len(uris), [task.version] * len(uris), rows))


def open_parquet(uri: str, access: Access) -> pq.ParquetFile:
    """Open a Parquet file; raises UserError where it is none."""
    try:
        return pq.ParquetFile(objects.open_seekable(uri, access, buffer_size=1 << 16), pre_buffer=False)
    except pa.ArrowException as error:
        raise UserError(f"{uri} is not a Parquet file or is damaged ({_line(error)}); replace it") from None


def image_column(schema: pa.Schema, asked: str | None) -> str | None:
    """Find the column of image bytes: binary, or a struct with `bytes`; None where there is none.

    Raises UserError where several could be meant.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if asked is not None:
        if asked not in schema.names:
            raise UserError(f"there is no column {asked!r}; the columns are {', '.join(schema.names)}")
        return asked if asked in found else None
    if len(found) > 1:
        usual = [name for name in found if name.lower() in _BYTES_COLUMNS]
        if len(usual) != 1:
            raise UserError(f"columns {', '.join(found)} all hold bytes; say which are images with --column")
        return usual[0]
    return found[0] if found else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _uri_column(schema: pa.Schema, asked: str | None, uri: str) -> str:
    def is_text(name: str) -> bool:
        kind = schema.field(name).type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    text = [name for name in schema.names if is_text(name)]
    for name in (asked,) if asked else _URI_COLUMNS:
        if name in text:
            return name
    raise UserError(
        f"{uri} has no column of image bytes and none of uris ({', '.join(_URI_COLUMNS)}); its columns are "
        f"{', '.join(schema.names)}: name one with --column, or leave the file out with --exclude"
    )


# Lists of uris


def _uris(task: Task, source: Source, access: Access) -> Iterator[Found]:
    """Take a text file as a list of uris, one a line."""
    with objects.open_seekable(task.uri, access) as file:
        lines = [line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in file]
    yield from _listed([line for line in lines if line.strip()], task, source)


def _listed(values: list[str], task: Task, source: Source) -> Iterator[Found]:
    """Sort a list of uris, each once; their sizes and versions are not known."""
    here = Path(local_path(task.uri)).parent if is_local(task.uri) else None
    uris = []
    for value in values:
        if "://" not in value and here is None and not value.startswith("/"):
            raise UserError(f"{value!r} in {task.uri} is neither a uri nor an absolute path; write it out")
        if is_local(value):
            value = local_uri(os.path.abspath((here or Path("/")) / local_path(value)))  # noqa: PTH100
        else:
            objects.split_uri(value)
        if passes(value, source):
            uris.append(value)
    unique = pc.unique(pa.array(uris, pa.string())).sort()
    for start in range(0, len(unique), PIECE_ROWS):
        some = unique.slice(start, PIECE_ROWS)
        yield Found(table(some, [None] * len(some), [""] * len(some)))
    yield Found(repeated=len(uris) - len(unique))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
