"""The images of a run, listed once.

Tasks expand the source in parallel and write sorted pieces; the pieces are put in order of their uris and cut
into the shards of `images/`. The driver holds names of pieces, never rows.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from selective_ray import listing
from selective_ray.actors import since
from selective_ray.actors.session import Session, cpus, in_order_of_arrival, peak_memory, unwrapped
from selective_ray.config import Config
from selective_ray.listing import Source, Task, shard_rows
from selective_ray.objects import Access
from selective_ray.progress import Reporter
from selective_ray.schema import IMAGES, LISTED
from selective_ray.store import Manifest, Run, Shard, Stopwatch

# Inside `images/` while it is being listed.
PIECES = "listing"
JOURNAL = "journal.json"
# Rows of a piece between two of the uris by which pieces are put in order.
MARK_ROWS = 2_000
JOURNAL_SECONDS = 5.0


@dataclass(frozen=True)
class Piece:
    """A file of listed rows, sorted by uri; marks are every MARK_ROWS-th uri and the last."""

    name: str
    rows: int
    marks: tuple[str, ...]


@dataclass
class _Progress:
    """How far a listing has come, as the journal keeps it."""

    pieces: list[Piece] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    others: int = 0
    repeated: int = 0

    @staticmethod
    def read(run: Run) -> _Progress | None:
        found = run.read_json("images", PIECES, JOURNAL)
        if found is None:
            return None
        pieces = [Piece(piece["name"], piece["rows"], tuple(piece["marks"])) for piece in found["pieces"]]
        tasks = [Task(**task) for task in found["tasks"]]
        return _Progress(pieces, tasks, found["others"], found["repeated"])

    def write(self, run: Run, running: Iterable[Task]) -> None:
        content = {**asdict(self), "tasks": [asdict(task) for task in (*self.tasks, *running)]}
        run.write_json(content, "images", PIECES, JOURNAL)


def list_source(
    run: Run,
    source: Source,
    config: Config,
    session: Session,
    reporter: Reporter,
    earlier: Run | None = None,
) -> Manifest:
    """List the images of a source into `images/`; a listing that is there is the truth of the run.

    With an earlier run, its images come first, with their ids, and of the source only what it has not.

    Killed and begun again, it continues with what was not yet listed. Raises UserError where the source
    cannot be listed or holds no image.
    """
    access = config.resources.access()
    # A relative path is another folder elsewhere.
    uri = str(Path(source.uri).absolute()) if source.uri and "://" not in source.uri else source.uri
    what: dict[str, Any] = {"source": uri, "images": config.images.model_dump(mode="json")}
    if earlier:
        what["since"] = earlier.fingerprints("images")["images"]
    if there := run.manifest("images"):
        run.begin("images", {**what, "content": there.what["content"]}, {})
        return there
    first = listing.first_task(source, access)
    if first.kind == "folder":
        _check_any(first, source, access)
    run.begin("images", what, {})
    stopwatch = Stopwatch(run, "images")
    session.start()
    with reporter.stage("list", None, "images") as bar:
        progress = _Progress.read(run) or _Progress(tasks=[first])
        memory = _expand_all(run, source, access, progress, bar.advance)
        if not progress.pieces:
            raise listing.nothing_found(source, progress.others)
        if progress.repeated:
            reporter.warn(
                f"{progress.repeated:,} lines of {source.uri} name an image again; each counts once"
            )
        pieces = _in_order(run, progress.pieces)
        # An attempt that was cut short may have cut shards of another length.
        run.clear("images")
        shards: list[Shard] = []
        digest, summary = 0, {"repeated": progress.repeated, "others": progress.others}
        if earlier:
            pieces, summary["changed"] = _new_pieces(run, pieces, earlier)
            theirs = [shard.index for shard in earlier.manifest("images").shards]
            copies = since.copied(run, earlier, "images", theirs)
            shards = sorted((shard for shard, _ in copies), key=lambda shard: shard.index)
            digest = sum(part for _, part in copies)
            summary["new"] = sum(piece.rows for piece in pieces)
        before, n = sum(shard.rows for shard in shards), sum(piece.rows for piece in pieces)
        for shard, part, peak in _cut(
            run, pieces, shard_rows(n, config.resources.shard_rows), len(shards), before
        ):
            shards.append(shard)
            digest += part
            memory = max(memory, peak)
    if summary.get("changed"):
        reporter.warn(
            f"{summary['changed']:,} images have changed since {earlier.uri} and keep their earlier "
            "embeddings; run without --since to embed them anew"
        )
    done = run.finish(
        "images",
        shards,
        seconds=stopwatch.seconds(),
        peak_memory_bytes={"driver": peak_memory(), "largest_worker": memory},
        summary={"images": before + n, **{key: count for key, count in summary.items() if count}},
        # A sum does not depend on the cut into shards.
        found={"content": f"{digest % 2**128:032x}"},
    )
    run.delete_folder("images", PIECES)
    return done


def _check_any(first: Task, source: Source, access: Access) -> None:
    """Raise UserError where a folder holds no image; stops at the first."""
    others = 0
    for found in listing.expand(first, source, access):
        if found.rows or found.tasks:
            return
        others += found.others
    raise listing.nothing_found(source, others)


def _expand_all(
    run: Run, source: Source, access: Access, progress: _Progress, advance: Callable[[float], None]
) -> int:
    """Expand tasks until none is left; returns the peak memory of the workers."""
    running: dict[ray.ObjectRef, Task] = {}
    noted, memory = time.monotonic(), 0
    advance(sum(piece.rows for piece in progress.pieces))
    while progress.tasks or running:
        while progress.tasks and len(running) < 8 * cpus():
            task = progress.tasks.pop()
            running[_expand.remote(run, task, source, access)] = task
        ready, _ = ray.wait(list(running))
        for call in ready:
            with unwrapped():
                pieces, tasks, others, repeated, peak = ray.get(call)
            del running[call]
            progress.pieces += pieces
            progress.tasks += reversed(tasks)
            progress.others += others
            progress.repeated += repeated
            memory = max(memory, peak)
            advance(sum(piece.rows for piece in pieces))
        if time.monotonic() - noted > JOURNAL_SECONDS:
            progress.write(run, running.values())
            noted = time.monotonic()
    progress.write(run, ())
    return memory


# Waiting for answers takes little of a CPU.
@ray.remote(num_cpus=0.25, max_retries=2)
def _expand(
    run: Run, task: Task, source: Source, access: Access
) -> tuple[list[Piece], list[Task], int, int, int]:
    """List what a task holds into pieces; also further tasks, files passed over, repeated lines, memory."""
    # The same task writes the same pieces, should it be tried again.
    stem = hashlib.sha256(repr(task).encode()).hexdigest()[:16]
    pieces: list[Piece] = []
    tasks: list[Task] = []
    others = repeated = 0
    for found in listing.expand(task, source, access):
        if found.rows:
            pieces.append(_write_piece(run, f"{stem}-{len(pieces)}", found.rows))
        tasks += found.tasks
        others += found.others
        repeated += found.repeated
    return pieces, tasks, others, repeated, peak_memory()


def _write_piece(run: Run, name: str, rows: pa.Table) -> Piece:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    run.write_bytes(buffer.getvalue(), "images", PIECES, name)
    marks = [*range(0, len(rows), MARK_ROWS), len(rows) - 1]
    return Piece(name, len(rows), tuple(rows["uri"].take(pa.array(marks)).to_pylist()))


def _read_piece(run: Run, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(run.read_bytes("images", PIECES, name)))


def _in_order(run: Run, pieces: list[Piece]) -> list[Piece]:
    """Return pieces of which each begins after the one before it ends, in order.

    Ranges of keys are so by themselves. Archives and lists lie across each other: then all rows are sorted
    anew, in ranges of uris of about a piece each.
    """
    pieces = sorted(pieces, key=lambda piece: piece.marks)
    if all(a.marks[-1] < b.marks[0] for a, b in itertools.pairwise(pieces)):
        return pieces
    marks = sorted(mark for piece in pieces for mark in piece.marks)
    step = listing.PIECE_ROWS // MARK_ROWS
    bounds = [None, *sorted(set(marks[step:-step:step])), None]
    calls = []
    for after, upto in itertools.pairwise(bounds):
        names = [
            piece.name
            for piece in pieces
            if (upto is None or piece.marks[0] <= upto) and (after is None or piece.marks[-1] > after)
        ]
        calls.append((run, names, after, upto))
    merged = [piece for piece in in_order_of_arrival(_merge, calls) if piece]
    return sorted(merged, key=lambda piece: piece.marks)


@ray.remote(num_cpus=1, max_retries=2)
def _merge(run: Run, names: list[str], after: str | None, upto: str | None) -> Piece | None:
    """Sort the rows of some pieces that lie in a range of uris (after, upto] into a new piece."""
    parts = []
    for name in names:
        part = _read_piece(run, name)
        if after is not None:
            part = part.filter(pc.greater(part["uri"], after))
        if upto is not None:
            part = part.filter(pc.less_equal(part["uri"], upto))
        parts.append(part)
    rows = pa.concat_tables(parts).sort_by("uri")
    stem = hashlib.sha256(repr((names, after, upto)).encode()).hexdigest()[:16]
    return _write_piece(run, f"{stem}-sorted", rows) if len(rows) else None


def _new_pieces(run: Run, pieces: list[Piece], earlier: Run) -> tuple[list[Piece], int]:
    """Return pieces without what an earlier run has, and how many of its images have changed."""
    spans = since.spans(earlier)
    calls = []
    for piece in pieces:
        near = [shard for shard, first, last in spans if first <= piece.marks[-1] and last >= piece.marks[0]]
        calls.append((run, piece, earlier, near))
    answers = list(in_order_of_arrival(_subtract, calls))
    left = sorted((piece for piece, _ in answers if piece), key=lambda piece: piece.marks)
    return left, sum(changed for _, changed in answers)


@ray.remote(num_cpus=1, max_retries=2)
def _subtract(run: Run, piece: Piece, earlier: Run, shards: list[int]) -> tuple[Piece | None, int]:
    rows, changed = since.not_in(_read_piece(run, piece.name), earlier, shards)
    return (_write_piece(run, f"{piece.name}-new", rows) if len(rows) else None), changed


def _cut(
    run: Run, pieces: list[Piece], rows: int, first_shard: int, first_id: int
) -> Iterator[tuple[Shard, int, int]]:
    """Cut ordered pieces into shards of `images/`; yields each with the digest of its rows, and memory."""
    ends = np.cumsum([piece.rows for piece in pieces], dtype=np.int64)
    n = int(ends[-1]) if pieces else 0
    calls = []
    for index, start in enumerate(range(0, n, rows)):
        stop = min(start + rows, n)
        slices = []
        for i in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop)) + 1):
            first = int(ends[i]) - pieces[i].rows
            slices.append((pieces[i].name, max(start - first, 0), min(stop - first, pieces[i].rows)))
        calls.append((run, first_shard + index, first_id + start, slices))
    yield from in_order_of_arrival(_write_listed, calls)


@ray.remote(num_cpus=1, max_retries=2)
def _write_listed(
    run: Run, index: int, first_id: int, slices: list[tuple[str, int, int]]
) -> tuple[Shard, int, int]:
    """Write one shard of `images/` from slices of pieces; also the sum of the digests of rows, and memory."""
    rows = pa.concat_tables(
        [_read_piece(run, name).slice(start, stop - start) for name, start, stop in slices]
    ).combine_chunks()
    assert rows.schema.equals(LISTED)
    ids = pa.array(np.arange(first_id, first_id + len(rows)), pa.int64())
    rows = rows.add_column(0, "image_id", ids).cast(IMAGES)
    return run.write_shard("images", index, rows), listing.digest(rows), peak_memory()
