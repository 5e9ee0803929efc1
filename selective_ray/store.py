"""A run: one folder a table on any URI, shards written whole, the manifest last.

Everything is opened here. A stage that is under way has `begun.json` beside its shards, which says what is
being made; a finished one has `manifest.json`. So shards of another configuration are never taken for this
one's, whenever the process died.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selective_ray import __version__, objects
from selective_ray.errors import UsageError, UserError
from selective_ray.objects import DIRECT, Access
from selective_ray.schema import SCHEMA_VERSION

SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
MANIFEST = "manifest.json"
BEGUN = "begun.json"
# Each table with the command that makes it.
TABLES = (
    *("images", "embeddings", "rejected", "duplicates", "density", "neighbors", "clusters", "utilities"),
    "selection",
)
# Brought embeddings have no bytes to compare; neighbors and utilities are kept where that is asked for.
OPTIONAL = ("duplicates", "neighbors", "utilities")
# What people bring.
BROUGHT = ("labels", "skipped")
# What a trained network makes.
PREDICTED = ("predictions",)
# Of budgets that contain each other, the smaller ones have their tables beside: `selection-1000/`.
NESTED = re.compile(r"(clusters|utilities|selection)-(\d+)")


@dataclass(frozen=True)
class Shard:
    """One file of a table: its name, rows, the sha256 of its bytes, and the device that computed it."""

    name: str
    rows: int
    sha256: str
    device: str = "cpu"

    @property
    def index(self) -> int:
        """Number of the shard in its table."""
        return int(SHARD_NAME.fullmatch(self.name)[1])


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds and what it was made from."""

    stage: str
    what: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    shards: list[Shard]
    rows: int
    seconds: float
    peak_memory_bytes: dict[str, int]
    summary: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    code: dict[str, str | None] = field(default_factory=lambda: code_version())
    # Another run's folder that holds the shards, where this run reuses them.
    refers_to: str | None = None


def shard_name(index: int) -> str:
    """Name of the file of shard `index`."""
    return f"part-{index:05d}.parquet"


def stage_of(table: str) -> str:
    """Name of the stage that makes a table: `selection` for `selection-1000`, `training` for `training/a`."""
    nested = NESTED.fullmatch(table)
    return nested[1] if nested else table.partition("/")[0]


def nested(stage: str, budget: int) -> str:
    """Name of a stage's table for one of several budgets that is not the largest."""
    return f"{stage}-{budget}"


def fingerprint(stage: str, what: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash what a stage makes and from which inputs: sha256 of the sorted JSON, 16 characters."""
    text = json.dumps([stage, SCHEMA_VERSION, what, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_version() -> dict[str, str | None]:
    """Return version and git commit of this package, null where it does not come from a checkout."""
    here = Path(__file__).parent
    commit = None
    if (here.parent / ".git").exists():
        try:
            words = ["git", "rev-parse", "HEAD"]
            answer = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
            commit = answer.stdout.strip() or None
        except OSError:
            # There is a checkout and no git.
            commit = None
    return {"version": __version__, "commit": commit}


def differences(mine: Any, theirs: Any, prefix: str = "") -> list[str]:
    """List the keys in which two configurations differ, as `key: theirs there, mine here`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        # A selection that names no method is of USL, once the only one. Keys of two methods say no more.
        methods = [what.get("method", "usl") for what in (theirs, mine)]
        if methods[0] != methods[1]:
            return [f"{prefix}.method is {methods[0]} there and {methods[1]} here".lstrip(".")]
        keys = sorted(mine.keys() | theirs.keys())
        nested = (differences(mine.get(key), theirs.get(key), f"{prefix}.{key}".lstrip(".")) for key in keys)
        return [line for lines in nested for line in lines]
    return [] if mine == theirs else [f"{prefix} is {theirs} there and {mine} here"]


class Run:
    """A run folder; `uri` is a local path, or a URI of any store that `objects` reaches."""

    def __init__(self, uri: str, access: Access = DIRECT) -> None:
        if not uri.strip():
            raise UsageError("give --run a folder: it is empty")
        self.access = access
        self.is_local = objects.is_local(uri)
        if self.is_local:
            self.root = str(Path(objects.local_path(uri)).absolute())
            self.uri = uri.rstrip("/") if "://" in uri else self.root
        else:
            base, prefix = objects.split_uri(uri)
            if not prefix.strip("/"):
                raise UsageError(f"give --run a folder in {base}, not all of it: {base}/runs/1")
            self.uri = self.root = uri.rstrip("/")

    def __reduce__(self) -> tuple[type[Run], tuple[str, Access]]:
        return Run, (self.uri, self.access)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and (self.uri, self.access) == (other.uri, other.access)

    def __hash__(self) -> int:
        return hash((self.uri, self.access))

    def path(self, *parts: str) -> str:
        """Join parts below the run: a local path, or a URI."""
        return "/".join((self.root, *parts))

    def prepare(self) -> None:
        """Make the run folder; raise UserError where it cannot be written."""
        try:
            if self.is_local:
                Path(self.root).mkdir(parents=True, exist_ok=True)
            self.write_bytes(b"", ".writable")
            self.delete(".writable")
        except OSError as error:
            raise UserError(
                f"the run folder {self.uri} cannot be written ({error}); choose another --run"
            ) from None

    # Files

    def exists(self, *parts: str) -> bool:
        """Whether a file is there."""
        return objects.exists(self.path(*parts), self.access)

    def read_bytes(self, *parts: str) -> bytes:
        """Return the bytes of a file."""
        return objects.read(objects.Request(self.path(*parts)), self.access)

    def write_bytes(self, data: bytes, *parts: str, replace: bool = True) -> None:
        """Write a file so that it is there whole or not at all; without replace the first writer wins."""
        objects.write(self.path(*parts), data, self.access, replace=replace)

    def delete(self, *parts: str) -> None:
        """Remove a file, if it is there."""
        objects.delete(self.path(*parts), self.access)

    def delete_folder(self, *parts: str) -> None:
        """Remove a folder of the run with everything in it, if it is there."""
        objects.delete_folder(self.path(*parts), self.access)

    def read_json(self, *parts: str) -> Any:
        """Return the content of a JSON file, or None where there is none."""
        try:
            return json.loads(self.read_bytes(*parts))
        # Nothing lies below a file either; `prepare` says what is wrong with such a place.
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            raise UserError(
                f"{self.path(*parts)} is damaged; move the folder {self.path(*parts[:-1])} away and run again"
            ) from None

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file whole."""
        self.write_bytes((json.dumps(value, indent=1) + "\n").encode(), *parts)

    # Tables

    def tables(self) -> tuple[str, ...]:
        """Names of the tables that a run has, or will have, in the order in which they are made."""
        there = [name for name in objects.folders(self.root, self.access) if NESTED.fullmatch(name)]
        smaller = sorted(
            there, key=lambda name: (int(NESTED.fullmatch(name)[2]), TABLES.index(stage_of(name)))
        )
        first = TABLES.index("clusters")
        return (*TABLES[:first], *smaller, *TABLES[first:])

    def home(self, table: str) -> Run:
        """Return the run whose folder holds this table: this one, or the one it refers to."""
        return self._place(table)[0]

    def _place(self, table: str) -> tuple[Run, str]:
        """Return the run that holds this table, and the table's name there.

        A run that was extended to a larger budget has moved what others may refer to.
        """
        mine = self.manifest(table)
        if not mine or not mine.refers_to:
            return self, table
        other = Run(mine.refers_to, self.access)
        for name in other._names(table, mine.what):
            theirs = other.manifest(name)
            if theirs and theirs.fingerprint == mine.fingerprint:
                return other._place(name)
        raise UserError(
            f"{self.path(table)} refers to {other.path(table)}, which is not there any more or is another; "
            "restore it, or make this run again under a new --run"
        )

    @staticmethod
    def _names(table: str, what: dict[str, Any]) -> tuple[str, ...]:
        """Names under which a run may hold what was made with this configuration."""
        stage, budget = stage_of(table), what.get("selection", {}).get("budget")
        return (stage,) if budget is None else (stage, nested(stage, budget))

    def write_shard(self, table: str, index: int, content: pa.Table, device: str = "cpu") -> Shard:
        """Write shard `index` of a table; a shard that is already there stays, as it holds the same."""
        buffer = io.BytesIO()
        metadata = {**(content.schema.metadata or {}), b"device": device.encode()}
        content = content.replace_schema_metadata(metadata)
        # Unit vectors do not compress; ids and uris do.
        compression = "none" if "embedding" in content.column_names else "zstd"
        pq.write_table(content, buffer, compression=compression)
        data = buffer.getvalue()
        name = shard_name(index)
        if there := self.recorded_shard(table, index):
            return there
        # A late attempt made the same, and is dropped.
        self.write_bytes(data, table, name, replace=False)
        return Shard(name, len(content), hashlib.sha256(data).hexdigest(), device)

    def read_shard(self, table: str, index: int, columns: list[str] | None = None) -> pa.Table:
        """Return shard `index` of a table; raise UserError where it is missing or damaged."""
        home, name = self._place(table)
        path = home.path(name, shard_name(index))
        try:
            with objects.open_seekable(path, home.access) as file:
                if table != "embeddings":
                    # Threads gain nothing on small tables, and one of Arrow's that lets go of the file while
                    # the process ends aborts it.
                    return pq.ParquetFile(file, pre_buffer=False).read(columns, use_threads=False)
                return pq.read_table(file, columns=columns, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is missing or damaged ({error}); remove {home.path(name)} and run again"
            ) from None

    def verify_shard(self, table: str, index: int) -> None:
        """Raise UserError where shard `index` of a finished table is not what was written."""
        home, name = self._place(table)
        path = home.path(name, shard_name(index))
        recorded = next(s for s in self.manifest(table).shards if s.index == index)
        try:
            data = home.read_bytes(name, shard_name(index))
        except FileNotFoundError:
            data = None
        if data is None or hashlib.sha256(data).hexdigest() != recorded.sha256:
            what = "is missing" if data is None else "is not what was written: its checksum differs"
            raise UserError(
                f"{path} {what}; restore it from a copy, or make {home.uri} again under a new --run"
            )

    def read_embeddings(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shard `index` of the embeddings: image_ids int64 [n], x float32 [n, d]."""
        content = self.read_shard("embeddings", index).combine_chunks()
        lists = content["embedding"].combine_chunks()
        d = content.schema.field("embedding").type.list_size
        x = lists.flatten().to_numpy().reshape(-1, d).astype(np.float32, copy=False)
        return content["image_id"].to_numpy(), x

    def listed(self, image_ids: np.ndarray) -> pa.Table:
        """Return the rows of `images/` of some images, in their order; reads the shards that hold one."""
        images = self.manifest("images")
        assert images is not None
        # Image ids are dense and ascending over the shards.
        ends = np.cumsum([shard.rows for shard in images.shards])
        shards = np.searchsorted(ends, image_ids, side="right")
        parts = [self.read_shard("images", 0).slice(0, 0)]
        order = [np.empty(0, np.int64)]
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            within = image_ids[here] - (ends[shard] - images.shards[shard].rows)
            parts.append(self.read_shard("images", int(shard)).take(pa.array(within)))
            order.append(here)
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order))))

    def finished_shards(self, table: str) -> list[int]:
        """Return the indices of the shards that are there, whether or not the table is complete."""
        names = objects.names(self.path(table), self.access)
        return sorted(int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match)

    def clear(self, table: str) -> None:
        """Remove the shards of a table that is not finished."""
        assert not self.exists(table, MANIFEST)
        for index in self.finished_shards(table):
            self.remove_shard(table, index)

    def remove_shard(self, table: str, index: int) -> None:
        """Remove one shard of a table that is not finished."""
        self.delete(table, shard_name(index))

    def recorded_shard(self, table: str, index: int) -> Shard | None:
        """Describe a shard that an earlier attempt left, by reading it; None where missing or damaged."""
        if not self.exists(table, shard_name(index)):
            return None
        data = self.read_bytes(table, shard_name(index))
        try:
            file = pq.ParquetFile(io.BytesIO(data))
        except (OSError, pa.ArrowException):
            self.delete(table, shard_name(index))
            return None
        device = (file.schema_arrow.metadata or {}).get(b"device", b"cpu").decode()
        return Shard(shard_name(index), file.metadata.num_rows, hashlib.sha256(data).hexdigest(), device)

    # Manifests

    def manifest(self, table: str) -> Manifest | None:
        """Return the manifest of a finished table, else None."""
        found = self.read_json(table, MANIFEST)
        if found is None:
            return None
        if found.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{self.path(table)} was written by another version of the store "
                f"({found.get('schema_version')}, this is {SCHEMA_VERSION}); use a new --run"
            )
        return Manifest(**{**found, "shards": [Shard(**shard) for shard in found["shards"]]})

    def begin(
        self, table: str, what: dict[str, Any], inputs: dict[str, str], earlier: Run | None = None
    ) -> Manifest | None:
        """Claim a table for what is to be made: its manifest where that is complete, else None.

        Where nothing is here yet and the `earlier` run has finished just that, this run refers to it.
        Raises UserError where the folder was finished or begun with another configuration. A claim that led
        to no shard, as of a budget that turned out too large, is given up for the new one. What was made for
        the largest budget, and now is for one of the smaller, moves to its place.
        """
        wanted = fingerprint(stage_of(table), what, inputs)
        largest = self.manifest(stage_of(table)) if stage_of(table) != table else None
        if largest and largest.fingerprint == wanted:
            self._move(stage_of(table), table)
        there = self.manifest(table)
        theirs = asdict(there) if there else self.read_json(table, BEGUN)
        if theirs and not there and theirs["fingerprint"] != wanted and not self.finished_shards(table):
            self.delete_folder(table)
            theirs = None
        if theirs and theirs["fingerprint"] != wanted:
            self._refuse(table, theirs, wanted, {**what, "inputs": inputs})
        if not theirs:
            for name in self._names(table, what) if earlier else ():
                finished = earlier.manifest(name)
                if finished and finished.fingerprint == wanted:
                    return self.refer(table, earlier, name)
            begun = {
                "stage": stage_of(table),
                "what": what,
                "inputs": inputs,
                "fingerprint": wanted,
                "seconds": 0.0,
            }
            self.write_json(begun, table, BEGUN)
        return there

    def check_same(self, table: str, what: dict[str, Any]) -> None:
        """Raise UserError where a finished table was made with another configuration."""
        if (there := self.manifest(table)) and there.what != what:
            wanted = fingerprint(stage_of(table), what, there.inputs)
            self._refuse(table, asdict(there), wanted, {**what, "inputs": there.inputs})

    def _refuse(self, table: str, theirs: dict[str, Any], wanted: str, mine: dict[str, Any]) -> None:
        keys = differences(mine, {**theirs["what"], "inputs": theirs["inputs"]})
        raise UserError(
            f"{self.path(table)} was made with another configuration ({theirs['fingerprint']}, "
            f"now {wanted}): {'; '.join(keys)}. Choose another --run"
            + (
                f", with --embeddings {self.uri} to use its embeddings again"
                if self.exists("embeddings", MANIFEST)
                else ""
            )
        )

    def _move(self, table: str, to: str) -> None:
        """Move a finished table; where an earlier attempt was cut short, the rest of it."""
        if self.is_local:
            self.delete_folder(to)
            Path(self.path(table)).rename(self.path(to))
            return
        # The manifest comes last at the new place, and goes last at the old.
        names = [name for name in objects.names(self.path(table), self.access) if name != MANIFEST]
        if not self.manifest(to):
            for name in (*names, MANIFEST):
                self.write_bytes(self.read_bytes(table, name), to, name)
        for name in (*names, MANIFEST):
            self.delete(table, name)

    def finish(
        self,
        table: str,
        shards: Iterable[Shard],
        *,
        seconds: float,
        peak_memory_bytes: dict[str, int],
        summary: dict[str, Any],
        found: dict[str, Any] | None = None,
        instead_of: Iterable[int] = (),
    ) -> Manifest:
        """Write the manifest of a table that was begun; from then on it is complete.

        `found` is what only the work could tell and what belongs to `what`, as the digest of a listing.
        `instead_of` are shards of an earlier content, which go then.
        """
        begun = self.read_json(table, BEGUN)
        what = {**begun["what"], **(found or {})}
        shards = sorted(shards, key=lambda shard: shard.index)
        done = Manifest(
            stage=stage_of(table),
            what=what,
            inputs=begun["inputs"],
            fingerprint=fingerprint(stage_of(table), what, begun["inputs"]),
            shards=shards,
            rows=sum(shard.rows for shard in shards),
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes,
            summary=summary,
        )
        self.write_json(asdict(done), table, MANIFEST)
        for index in instead_of:
            self.delete(table, shard_name(index))
        self.delete(table, BEGUN)
        return done

    def replace(
        self,
        table: str,
        content: pa.Table,
        *,
        what: dict[str, Any],
        inputs: dict[str, str],
        seconds: float,
        peak_memory_bytes: dict[str, int],
        summary: dict[str, Any],
    ) -> tuple[Manifest, bool]:
        """Put one shard in the place of a table's content; returns the manifest, and whether it is new.

        For tables that change when people ask for it. The shard goes beside the earlier one, under the next
        number; the manifest that names it is the switch, and then the earlier one is removed: who reads by
        the manifest meets the one or the other. Raises UserError where there are shards that nothing here
        wrote.
        """
        there = self.manifest(table)
        kept = {shard.index for shard in there.shards} if there else set()
        left = set(self.finished_shards(table)) - kept
        if left and not self.exists(table, BEGUN):
            raise UserError(
                f"{self.path(table, shard_name(min(left)))} was not written by this command; move it away"
            )
        for index in left:
            # Of an attempt that was cut short, before or after the switch.
            self.remove_shard(table, index)
        wanted = fingerprint(table, what, inputs)
        if there and there.fingerprint == wanted:
            self.delete(table, BEGUN)
            return there, False
        begun = {"stage": table, "what": what, "inputs": inputs, "fingerprint": wanted, "seconds": 0.0}
        self.write_json(begun, table, BEGUN)
        shard = self.write_shard(table, max(kept, default=-1) + 1, content)
        done = self.finish(
            table,
            [shard],
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
            summary=summary,
            instead_of=kept,
        )
        return done, True

    def fingerprints(self, *tables: str) -> dict[str, str]:
        """Return the fingerprints of finished tables, as the inputs of what is made from them."""
        found = {table: self.manifest(table) for table in tables}
        return {table: manifest.fingerprint for table, manifest in found.items() if manifest}

    def refer(self, table: str, other: Run, name: str = "") -> Manifest:
        """Make a table of this run stand for one of another (of the same name), by its manifest."""
        theirs = other.manifest(name or table)
        assert theirs is not None
        mine = {**asdict(theirs), "refers_to": other.home(name or table).uri}
        self.write_json(mine, table, MANIFEST)
        return self.manifest(table)


class Stopwatch:
    """Counts the seconds a table takes, those of earlier attempts that were cut short included."""

    def __init__(self, run: Run, table: str) -> None:
        self.run, self.table = run, table
        begun = run.read_json(table, BEGUN)
        self.earlier = begun["seconds"] if begun else 0.0
        self.start = self.noted = time.monotonic()

    def seconds(self) -> float:
        """Seconds of all attempts so far."""
        return self.earlier + time.monotonic() - self.start

    def note(self) -> None:
        """Record the seconds so far in the folder, at most every five seconds."""
        if time.monotonic() - self.noted > 5:
            self.noted = time.monotonic()
            begun = self.run.read_json(self.table, BEGUN)
            self.run.write_json({**begun, "seconds": self.seconds()}, self.table, BEGUN)
