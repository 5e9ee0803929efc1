"""The images of a run: listed once, or taken from embeddings that a person brings, or from an earlier run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from selective_ray import embeddings, images
from selective_ray.actors.session import peak_memory
from selective_ray.config import Config
from selective_ray.errors import UserError
from selective_ray.progress import Reporter
from selective_ray.schema import IMAGES, REJECTED, embeddings_schema
from selective_ray.store import Manifest, Run, Shard, Stopwatch


def shard_rows(n: int, asked: int | None) -> int:
    """Rows of a shard: about 64 shards, none so small that its overhead shows or too large to redo."""
    return asked or min(65_536, max(256, -(-n // 64)))


def list_folder(run: Run, source: str, config: Config, reporter: Reporter) -> Manifest:
    """List the images of a folder into `images/`; a listing that is there is the truth of the run."""
    source = source if "://" in source else str(Path(source).absolute())
    if there := run.manifest("images"):
        run.begin("images", {"source": source, "content": there.what["content"]}, {})
        return there
    # Listed before it is begun: a mistyped folder must not claim the run.
    started = time.monotonic()
    with reporter.stage("list", 1, "folders") as bar:
        listing = images.list_images(source)
        bar.advance(1)
    run.begin("images", {"source": source}, {})
    run.clear("images")
    rows = shard_rows(len(listing), config.resources.shard_rows)
    digests = {column: hashlib.sha256() for column in ("uri", "size", "version")}
    shards = []
    for index, start in enumerate(range(0, len(listing), rows)):
        part = listing.slice(start, rows)
        ids = pa.array(np.arange(start, start + len(part)), pa.int64())
        shards.append(run.write_shard("images", index, part.add_column(0, "image_id", ids).cast(IMAGES)))
        for column, digest in digests.items():
            digest.update("".join(f"{value}\0" for value in part[column].to_pylist()).encode())
    return run.finish(
        "images",
        shards,
        seconds=time.monotonic() - started,
        peak_memory_bytes={"driver": peak_memory()},
        summary={"images": len(listing)},
        found={"content": _joined(digests.values())},
    )


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
            table = pa.table(
                {"image_id": ids, "uri": uris, "size": np.full(len(x), d), "version": [""] * len(x)}, IMAGES
            )
            listed.append(run.write_shard("images", len(listed), table))
            embedded.append(run.write_shard("embeddings", len(embedded), table_of(ids, unit, schema)))
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


def table_of(image_ids: np.ndarray, x: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Return a shard of `embeddings/`: image_ids int64 [n], x [n, d] in the type of the schema."""
    value = schema.field("embedding").type.value_type
    flat = np.ascontiguousarray(x.reshape(-1), value.to_pandas_dtype())
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat), x.shape[1])
    return pa.table({"image_id": image_ids, "embedding": lists}, schema)


def refer_to_run(run: Run, other: Run) -> None:
    """Use images, embeddings and rejected of an earlier run, ids and uris kept."""
    tables = ("images", "rejected", "embeddings")
    for table in tables:
        theirs = other.manifest(table)
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
        if run.manifest(table) is None:
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
