"""How many images a source has, and a seeded sample of them, before anything is made of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import listing, objects, reading
from selective_ray.errors import UserError
from selective_ray.listing import Source, Task
from selective_ray.objects import DIRECT, Access
from selective_ray.schema import LISTED

# Images that are sampled together: neighbors in an archive are read by one request, as in a run.
TOGETHER = 64
# Consecutive images by which the requests of a run are counted: those of a decode task.
CONSECUTIVE = 512
KEYS_PER_REQUEST = 1000
# Images of a list whose sizes are looked up.
LOOKED_AT = 32


@dataclass(frozen=True)
class Survey:
    """What is known of a source.

    images and nbytes in all; list_requests and get_requests are those of listing and of reading all of it;
    seconds that listing took in one process for `listed` images. whole: whether all was listed, or is known
    from the archives that were. parts: whether several processes can list it at once.
    """

    images: int
    nbytes: int
    list_requests: int
    get_requests: int
    listed: int
    seconds: float
    whole: bool
    parts: bool

    def scaled(self, images: int) -> Survey:
        """Return the survey of so many images of the same kind."""
        share = images / self.images
        return Survey(
            images,
            round(self.nbytes * share),
            round(self.list_requests * share),
            round(self.get_requests * share),
            self.listed,
            self.seconds,
            True,
            self.parts,
        )


def survey(
    source: Source,
    access: Access = DIRECT,
    *,
    sample: int,
    seed: int = 0,
    seconds: float = 60.0,
    watch: Callable[[int], None] = lambda images: None,
) -> tuple[Survey, pa.Table]:
    """List a source for so many seconds, and draw about `sample` of its images (schema LISTED, by uri).

    Archives that were not come to count as the mean of those that were; they are expanded in a seeded order.
    Raises UserError where the source cannot be listed or holds no image.
    """
    rng = np.random.default_rng(seed)
    began = time.monotonic()
    first = listing.first_task(source, access)
    others = [first] if first.kind in ("keys", "folder") else []
    archives: list[Task] = [] if others else [first]
    opened = 0
    images, nbytes, passed = 0, 0, 0
    # Parquet files that were counted, and rows of lists, which do not tell their sizes.
    sized: set[str] = set()
    unknown = 0
    ratios: list[float] = []
    kept: list[tuple[float, pa.Table]] = []
    inside = Counter()
    while (others or archives) and (time.monotonic() - began < seconds or not images):
        if others:
            task = others.pop()
        else:
            task = archives.pop(int(rng.integers(len(archives))))
            opened += 1
        for found in listing.expand(task, source, access):
            passed += found.others
            for more in found.tasks:
                (others if more.kind == "keys" else archives).append(more)
            if not found.rows:
                continue
            rows = found.rows
            images += len(rows)
            inside[task.kind] += len(rows)
            known = pc.sum(pc.coalesce(rows["length"], rows["size"])).as_py()
            nbytes += known or 0
            if known is None and task.kind == "parquet":
                # Read whole, and listed in several pieces.
                nbytes += objects.version(task.uri, access)[0] if task.uri not in sized else 0
                sized.add(task.uri)
            elif known is None:
                unknown += len(rows)
            if len(ratios) < 16:
                some = rows.slice(0, CONSECUTIVE)
                ratios.append(reading.requests(some) / len(some))
            runs = [rows.slice(start, TOGETHER) for start in range(0, len(rows), TOGETHER)]
            kept += zip(rng.random(len(runs)).tolist(), runs, strict=True)
            kept = sorted(kept, key=lambda one: one[0])[: -(-sample // TOGETHER)]
            watch(images)
            if time.monotonic() - began > seconds and task.kind in ("keys", "folder"):
                # What is left of it is not known.
                others.append(task)
                break
    if not images:
        raise listing.nothing_found(source, passed)
    in_archives = sum(count for kind, count in inside.items() if kind in ("archive", "parquet"))
    nbytes += _bytes_of_unknown(unknown, kept, access)
    share = 1 + len(archives) * in_archives / max(1, opened) / images
    chosen = pa.concat_tables([rows for _, rows in kept]).combine_chunks().slice(0, sample).sort_by("uri")
    assert chosen.schema.equals(LISTED)
    total = round(images * share)
    of_keys = images - in_archives + opened + len(archives)
    return (
        Survey(
            images=total,
            nbytes=round(nbytes * share),
            # A page of keys each, and the headers of an archive.
            list_requests=-(-of_keys // KEYS_PER_REQUEST) + opened + len(archives),
            get_requests=round(total * float(np.mean(ratios))),
            listed=images,
            seconds=time.monotonic() - began,
            whole=not others,
            parts=first.kind == "keys" or opened + len(archives) > 1,
        ),
        chosen,
    )


def _bytes_of_unknown(rows: int, kept: list[tuple[float, pa.Table]], access: Access) -> int:
    """Return the bytes of so many listed uris by the mean of a few."""
    uris = [name for _, some in kept for name in some["uri"].to_pylist()[:4]][:LOOKED_AT] if rows else []
    sizes = []
    for name in uris:
        with suppress(OSError, UserError):
            sizes.append(objects.version(name, access)[0])
    return round(rows * float(np.mean(sizes))) if sizes else 0
