"""--since: what an earlier run has already is copied from it, with its ids, and left out of a new listing."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import ray

from selective_ray import listing
from selective_ray.actors.session import in_order_of_arrival
from selective_ray.errors import UserError
from selective_ray.store import Run, Shard


def check(earlier: Run, what: dict) -> None:
    """Raise UserError unless the earlier run has finished embeddings of the same kind."""
    embedded = earlier.manifest("embeddings")
    if embedded is None or earlier.manifest("images") is None:
        raise UserError(f"{earlier.uri} has no finished embeddings; complete that run, or leave out --since")
    if embedded.what != what:
        raise UserError(
            f"{earlier.uri} was embedded differently ({embedded.what}, here {what}); use the same encoder "
            "and settings, or leave out --since"
        )


def spans(earlier: Run) -> list[tuple[int, str, str]]:
    """Return of each shard of the earlier listing its number, and its first and last uri."""
    shards = [shard.index for shard in earlier.manifest("images").shards]
    return sorted(in_order_of_arrival(_span, [(earlier, shard) for shard in shards]))


@ray.remote(num_cpus=0.5, max_retries=2)
def _span(earlier: Run, shard: int) -> tuple[int, str, str]:
    uris = earlier.read_shard("images", shard, ["uri"])["uri"]
    return shard, uris[0].as_py(), uris[-1].as_py()


def not_in(rows: pa.Table, earlier: Run, shards: list[int]) -> tuple[pa.Table, int]:
    """Return the rows whose uri is in none of some shards of the earlier listing, and how many have changed.

    A changed image, one of another version under an earlier uri, keeps its earlier id and embedding.
    """
    changed = 0
    for shard in shards:
        theirs = earlier.read_shard("images", shard, ["uri", "version"])
        places = pc.index_in(rows["uri"], theirs["uri"].combine_chunks())
        known = pc.is_valid(places)
        version = theirs["version"].take(places.filter(known))
        changed += pc.sum(pc.not_equal(version, rows["version"].filter(known))).as_py() or 0
        rows = rows.filter(pc.invert(known))
    return rows, changed


def copied(run: Run, earlier: Run, table: str, shards: list[int]) -> list[tuple[Shard, int]]:
    """Copy shards of a table of the earlier run, as they are; also the sum of the digests of their rows."""
    home = earlier.home(table)
    return list(in_order_of_arrival(_copy, [(run, home, table, shard) for shard in shards]))


@ray.remote(num_cpus=0.5, max_retries=2)
def _copy(run: Run, home: Run, table: str, shard: int) -> tuple[Shard, int]:
    content = home.read_shard(table, shard)
    device = (content.schema.metadata or {}).get(b"device", b"cpu").decode()
    digest = listing.digest(content) if table == "images" else 0
    return run.write_shard(table, shard, content, device), digest
