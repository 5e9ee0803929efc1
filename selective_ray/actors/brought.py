"""Embeddings that a person brings in a file, or that an earlier run has, as those of this run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from selective_ray import embeddings, listing
from selective_ray.actors.session import peak_memory
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.listing import shard_rows
from selective_ray.progress import Reporter
from selective_ray.schema import IMAGES, REJECTED, embeddings_schema, embeddings_table
from selective_ray.store import Run, Shard, Stopwatch


def bring_file(run: Run, path: str, config: Config, reporter: Reporter) -> None:
    """Take the embeddings of a file as those of the run: `images/`, `embeddings/` and an empty `rejected/`.

    image_id is the row number. A file that was taken already is read again only if it has been touched
    since; other content is another run.
    """
    source = str(Path(path).absolute())
    n, d, blocks = embeddings.read(source)
    status = Path(source).stat()
    version = f"{status.st_mtime_ns}-{status.st_size}"
    there = run.manifest("images")
    same = there and there.what["source"] == source and there.summary.get("version") == version
    content = there.what["content"] if same else _digest(blocks, path)
    dtype = {"embed": {"dtype": config.embed.dtype}}
    done = run.begin("images", {"source": source, "content": content}, {})
    inputs = {"images": content}
    finished = [run.begin(table, dtype, inputs) for table in ("embeddings", "rejected")]
    if done and all(finished):
        return
    # Shards of an attempt that was cut short may be of another length.
    if not done:
        run.clear("images")
    run.clear("embeddings")
    stopwatch = Stopwatch(run, "embeddings")
    rows = done.shards[0].rows if done else shard_rows(n, config.resources.shard_rows)
    schema = embeddings_schema(d, config.embed.dtype)
    listed: list[Shard] = []
    embedded: list[Shard] = []
    first = 0
    with reporter.stage("read", n, "rows") as bar:
        for x, uris in _in_shards(embeddings.read(source)[2], rows):
            unit, _, _ = embeddings.unit_rows(x)
            ids = np.arange(first, first + len(x))
            first += len(x)
            bar.advance(len(x))
            table = listing.table(uris, [None] * len(x), [""] * len(x))
            table = table.add_column(0, "image_id", pa.array(ids, pa.int64())).cast(IMAGES)
            listed.append(run.write_shard("images", len(listed), table))
            embedded.append(run.write_shard("embeddings", len(embedded), embeddings_table(ids, unit, schema)))
    memory = {"driver": peak_memory()}
    summary = {"images": n, "version": version}
    if not done:
        run.finish("images", listed, seconds=0.0, peak_memory_bytes=memory, summary=summary)
    if not finished[1]:
        nothing = run.write_shard("rejected", 0, REJECTED.empty_table())
        run.finish("rejected", [nothing], seconds=0.0, peak_memory_bytes=memory, summary={})
    run.finish(
        "embeddings",
        embedded,
        seconds=stopwatch.seconds(),
        peak_memory_bytes=memory,
        summary={"embedded": n, "rejected": 0, "dimension": d},
    )


def refer_to_run(run: Run, other: Run) -> None:
    """Use images, embeddings and rejected of an earlier run, ids and uris kept."""
    tables = ("images", "rejected", "embeddings", "duplicates")
    for table in tables:
        theirs = other.manifest(table)
        if theirs is None and table == "duplicates":
            # Embeddings that a person brought have no bytes to compare.
            continue
        if theirs is None:
            raise UserError(
                f"{other.uri} has no finished {table}; complete that run first, or name another with "
                "--embeddings"
            )
        mine = run.manifest(table)
        if mine is None:
            if run.finished_shards(table) or run.exists(table, "begun.json"):
                raise UserError(f"{run.path(table)} was begun from another source; choose another --run")
        elif mine.fingerprint != theirs.fingerprint:
            raise UserError(
                f"{run.path(table)} holds {mine.fingerprint}, and {other.path(table)} holds "
                f"{theirs.fingerprint}; choose another --run"
            )
    for table in tables:
        if run.manifest(table) is None and other.manifest(table):
            run.refer(table, other)


def _digest(blocks: Iterable[tuple[np.ndarray, list[str]]], path: str) -> str:
    """Hash rows and uris, however they are blocked; raises UserError that counts the unusable rows."""
    vectors, uris = hashlib.sha256(), hashlib.sha256()
    not_finite, zero, first = [], [], 0
    for x, names in blocks:
        _, *unusable = embeddings.unit_rows(x, first)
        not_finite.append(unusable[0])
        zero.append(unusable[1])
        first += len(x)
        vectors.update(np.ascontiguousarray(x).data)
        for name in names:
            uris.update(f"{name}\0".encode())
    embeddings.complain(np.concatenate(not_finite), np.concatenate(zero), path)
    return _joined((vectors, uris))


def _joined(digests: Iterable[Any]) -> str:
    """Hash the hashes of columns, each over all rows, so that no cut into shards or blocks shows."""
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()[:16]


def _in_shards(
    blocks: Iterable[tuple[np.ndarray, list[str]]], rows: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Cut blocks of any length into shards of `rows`, the last one shorter."""
    x: np.ndarray | None = None
    uris: list[str] = []
    for block, names in blocks:
        x = block if x is None else np.concatenate([x, block])
        uris += names
        whole = len(x) - len(x) % rows
        for start in range(0, whole, rows):
            yield x[start : start + rows], uris[start : start + rows]
        x, uris = x[whole:], uris[whole:]
    if x is not None and len(x):
        yield x, uris
