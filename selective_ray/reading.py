"""Read images as they were listed: many requests in flight at a time, members of an archive together.

Out come the bytes in the order of the rows, or why there are none.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selective_ray import images, listing, objects
from selective_ray.errors import UserError
from selective_ray.images import Rejected
from selective_ray.objects import DIRECT, Access, Changed, Request, Unreachable

Read = Callable[[Request, Access], bytes]

# Requests and bytes under way ahead of the one that is decoded. A size that was not listed counts as a
# megabyte.
IN_FLIGHT = 32
AHEAD_BYTES = 64 << 20
UNKNOWN_BYTES = 1 << 20
# Members of an archive that lie this close are read by one request, up to this many bytes.
GAP_BYTES = 256 << 10
SPAN_BYTES = 8 << 20
# A row group up to this size is read once and kept; of a larger one, only what is needed is kept.
ROW_GROUP_BYTES = 256 << 20
# Of an image whose bytes could not be read.
NO_DIGEST = bytes(16)


@dataclass
class _Part:
    """One request, and which of its bytes are which row's."""

    request: Request
    nbytes: int
    pieces: list[tuple[int, int | None]] = field(default_factory=list)


@dataclass
class _Rows:
    """Rows of a Parquet file."""

    uri: str
    version: str
    rows: list[int]
    nbytes: int = SPAN_BYTES

    @property
    def pieces(self) -> list[int]:
        return self.rows


def _parts(rows: pa.Table) -> Iterator[_Part | _Rows]:
    """Cut rows of a listing, in order, into requests."""
    part: _Part | _Rows | None = None
    columns = (rows[name].to_pylist() for name in ("uri", "offset", "length", "size", "version"))
    for uri, offset, length, size, version in zip(*columns, strict=True):
        if offset is None:
            if part:
                yield part
            part = None
            nbytes = UNKNOWN_BYTES if size is None else size
            yield _Part(Request(uri, version), nbytes, [(0, None)])
            continue
        archive = listing.archive_of(uri)
        if length is None:
            if not (isinstance(part, _Rows) and part.uri == archive):
                if part:
                    yield part
                part = _Rows(archive, version, [])
            part.rows.append(offset)
            continue
        stop = offset + length
        if isinstance(part, _Part) and part.request.uri == archive:
            start, end = part.request.start, part.request.stop or 0
            if end <= offset <= end + GAP_BYTES and stop - start <= SPAN_BYTES:
                part.request = Request(archive, version, start, stop)
                part.nbytes = stop - start
                part.pieces.append((offset - start, stop - start))
                continue
        if part:
            yield part
        part = _Part(Request(archive, version, offset, stop), length, [(0, length)])
    if part:
        yield part


def requests(rows: pa.Table) -> int:
    """Count the requests by which rows of a listing are read in their order."""
    return sum(1 for _ in _parts(rows))


def fetch(
    rows: pa.Table, access: Access = DIRECT, *, column: str | None = None, read: Read = objects.read
) -> Iterator[bytes | Rejected]:
    """Read the images of rows of a listing (schema LISTED), in order: the bytes, or why there are none.

    column names the images of Parquet files, where it was given. Raises UserError where the store or the
    credentials are at fault, not the image.
    """
    waiting: deque[tuple[_Part | _Rows, Future | None]] = deque()
    ahead = delivered = 0
    with ThreadPoolExecutor(IN_FLIGHT) as pool:

        def take() -> Iterator[bytes | Rejected]:
            nonlocal ahead, delivered
            part, future = waiting.popleft()
            ahead -= part.nbytes
            try:
                if isinstance(part, _Rows):
                    found = _parquet_rows(part, column, access)
                else:
                    data = future.result()
                    found = [data[start:stop] for start, stop in part.pieces]
                delivered += 1
                yield from found
            except (OSError, Rejected) as error:
                if isinstance(error, Unreachable) and not delivered:
                    _answers(part, error, access)
                reason = Rejected(_reason(error))
                yield from [reason] * len(part.pieces)

        for part in _parts(rows):
            while waiting and (ahead + part.nbytes > AHEAD_BYTES or len(waiting) >= IN_FLIGHT):
                yield from take()
            ahead += part.nbytes
            future = None if isinstance(part, _Rows) else pool.submit(read, part.request, access)
            waiting.append((part, future))
        while waiting:
            yield from take()


def _answers(part: _Part | _Rows, error: Exception, access: Access) -> None:
    """Raise UserError where the whole store is out of reach: no image can be blamed for that."""
    base, _ = objects.split_uri(part.uri if isinstance(part, _Rows) else part.request.uri)
    try:
        next(objects.list_keys(base, "", access), None)
    except OSError:
        raise UserError(
            f"{base} cannot be reached: {error}; run the same command again to continue"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, Rejected | Changed | Unreachable):
        return str(error)
    return f"cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"


def _parquet_rows(part: _Rows, asked: str | None, access: Access) -> list[bytes | Rejected]:
    """Read the images of some rows of a Parquet file."""
    _, version = objects.version(part.uri, access)
    if version != part.version:
        raise Changed("changed since it was listed")
    file = _open_parquet(part.uri, version, access)
    column = listing.image_column(file.schema_arrow, asked)
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    wanted = np.unique(part.rows)
    values: dict[int, bytes | None] = {}
    for group in np.unique(np.searchsorted(ends, wanted, side="right")):
        first = int(ends[group]) - file.metadata.row_group(int(group)).num_rows
        here = wanted[(wanted >= first) & (wanted < ends[group])]
        for start, batch in _images_of(part.uri, version, int(group), column, access):
            inside = here[(here >= first + start) & (here < first + start + len(batch))]
            values |= {
                int(row): value.as_py()
                for row, value in zip(inside, batch.take(pa.array(inside - first - start)), strict=True)
            }
            if first + start + len(batch) > here[-1]:
                break
    nothing = Rejected("no image bytes in its row")
    return [values[row] or nothing for row in part.rows]


def _images_of(
    uri: str, version: str, group: int, column: str, access: Access
) -> Iterator[tuple[int, pa.Array]]:
    """Yield the images of a row group: the place of the first in the group, and binary values."""
    file = _open_parquet(uri, version, access)
    chunks = [file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns)]
    if sum(c.total_uncompressed_size for c in chunks if _top(c.path_in_schema) == column) <= ROW_GROUP_BYTES:
        yield 0, _row_group(uri, version, group, column, access)
        return
    start = 0
    for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
        yield start, _bytes(batch[column])
        start += len(batch)


def _top(path: str) -> str:
    return path.split(".")[0]


def _bytes(values: pa.Array) -> pa.Array:
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    return values.cast(pa.large_binary())


# The next range of images is mostly of the same row group.
@functools.lru_cache(maxsize=1)
def _row_group(uri: str, version: str, group: int, column: str, access: Access) -> pa.Array:
    read = _open_parquet(uri, version, access).read_row_group(group, columns=[column])
    return _bytes(read[column].combine_chunks())


@functools.lru_cache(maxsize=4)
def _open_parquet(uri: str, version: str, access: Access) -> pq.ParquetFile:
    return listing.open_parquet(uri, access)


def decoded(
    rows: pa.Table,
    *,
    size: int,
    crop: float,
    interpolation: str = "bilinear",
    access: Access = DIRECT,
    column: str | None = None,
    read: Read = objects.read,
) -> Iterator[tuple[np.ndarray | None, bytes, str]]:
    """Read and decode the images of rows of a listing, in order.

    Yields pixels uint8 [size, size, 3] or None, the digest of the bytes (BLAKE2b, 16 bytes), and the reason
    where there are no pixels.
    """
    for data in fetch(rows, access, column=column, read=read):
        digest = NO_DIGEST
        try:
            if isinstance(data, Rejected):
                raise data
            digest = hashlib.blake2b(data, digest_size=len(NO_DIGEST)).digest()
            yield images.decode(data, size=size, crop=crop, interpolation=interpolation), digest, ""
        except Rejected as rejected:
            yield None, digest, str(rejected)
