"""The images that are labeled already: a CSV file in, image ids out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import objects
from selective_ray.errors import UserError
from selective_ray.objects import DIRECT, Access
from selective_ray.store import Run


@dataclass(frozen=True)
class Labeled:
    """The images that a file names, each once: their uris, or their image ids, in the order of the file."""

    file: str
    uris: list[str]
    image_ids: list[int]

    def __len__(self) -> int:
        return len(self.uris) or len(self.image_ids)


NONE = Labeled("", [], [])


def read(file: str, access: Access = DIRECT) -> Labeled:
    """Read a CSV file with a column `uri` or `image_id`; where it has both, the uris count.

    Ids belong to one run, uris to the images. Raises UserError where the file cannot be read, has neither
    column, or names an image twice.
    """
    try:
        text = objects.read(objects.Request(file), access).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}; check --labeled") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); check --labeled") from None
    rows = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(rows, [])]
    column = next((name for name in ("uri", "image_id") if name in header), None)
    if column is None:
        raise UserError(f"{file} has no column uri or image_id; name one of them in its first line")
    place = header.index(column)
    values: dict[str, int] = {}
    for row in rows:
        if not any(row):
            continue
        value = row[place].strip() if place < len(row) else ""
        if not value or (column == "image_id" and not (value.isascii() and value.isdecimal())):
            raise UserError(f"line {rows.line_num} of {file} has no {column}: {value!r}; correct it")
        value = value.lstrip("0") or "0" if column == "image_id" else value
        if value in values:
            raise UserError(
                f"{file} names {column} {value} twice, in lines {values[value]} and {rows.line_num}; keep one"
            )
        values[value] = rows.line_num
    if not values:
        raise UserError(f"{file} names no image; leave --labeled out")
    if column == "uri":
        return Labeled(file, list(values), [])
    return Labeled(file, [], [int(value) for value in values])


def find(run: Run, labeled: Labeled) -> np.ndarray:
    """Return the image ids of the labeled images, int64 ascending; reads the run's uris shard by shard.

    Raises UserError where the run does not list one of them.
    """
    images = run.manifest("images")
    assert images is not None
    if labeled.image_ids:
        unknown = [number for number in labeled.image_ids if number >= images.rows]
        if unknown:
            raise UserError(
                f"{labeled.file} names image_id {unknown[0]}{_more(unknown)}, and {run.uri} lists "
                f"{images.rows:,} images, numbered from 0; correct the file"
            )
        return np.sort(np.array(labeled.image_ids, np.int64))
    if not len(labeled):
        return np.empty(0, np.int64)
    wanted = pa.array(labeled.uris, pa.string())
    found = [run.read_shard("images", 0, ["image_id", "uri"]).slice(0, 0)]
    for shard in images.shards:
        listed = run.read_shard("images", shard.index, ["image_id", "uri"])
        found.append(listed.filter(pc.is_in(listed["uri"], wanted)))
    there = pa.concat_tables(found)
    listed_uris = set(there["uri"].to_pylist())
    unknown = [uri for uri in labeled.uris if uri not in listed_uris]
    if unknown:
        raise UserError(
            f"{labeled.file} names {unknown[0]}{_more(unknown)}, which {run.uri} does not list; uris are as "
            "in its images/ and selection.csv"
        )
    return np.sort(there["image_id"].to_numpy())


def check_embedded(run: Run, image_ids: np.ndarray) -> None:
    """Raise UserError where one of the labeled images, int64 ascending, was rejected when it was embedded."""
    rejected = run.manifest("rejected")
    assert rejected is not None
    there = [run.read_shard("rejected", shard.index)["image_id"].to_numpy() for shard in rejected.shards]
    lost = np.intersect1d(image_ids, np.concatenate(there)).tolist()
    if lost:
        raise UserError(
            f"labeled image {lost[0]}{_more(lost)} could not be read when {run.uri} was embedded (see "
            "rejected/); take it out of --labeled"
        )


def _more(unknown: list) -> str:
    return f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
