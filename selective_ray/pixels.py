"""Decoded images on the local disk: each is read and decoded once a machine, and from then on mapped.

    folder/part-00000.rows     the listing of a shard, so that it is not read for every image
    folder/part-00000.pixels   its images, uint8 [rows, size, size, 3], sparse
    folder/part-00000.there    which of them are there, uint8 [rows]

Many processes share it without locks: what two of them write at the same place is the same, and an image is
marked only when it is written. The folder is named for the boot of the machine, as what is marked and what is
written may reach the disk in another order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from selective_ray import objects, reading
from selective_ray.errors import UserError
from selective_ray.objects import DIRECT, Access
from selective_ray.reading import Read
from selective_ray.store import Run, shard_name

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def folder_of(*identity: object) -> Path:
    """Return the folder of this machine for images of an identity, as a run, its listing and a size.

    What machines left that were booted before is removed.
    """
    boot = _BOOT.read_text().strip()[:8] if _BOOT.exists() else "unknown"
    base = Path(tempfile.gettempdir()) / f"selective-ray-{os.getuid()}"
    for folder in base.glob("pixels-*"):
        if not folder.name.startswith(f"pixels-{boot}-"):
            shutil.rmtree(folder, ignore_errors=True)
    return base / f"pixels-{boot}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


class Pixels:
    """The images of a listing by their place in it, uint8 [size, size, 3].

    rows: images in each shard; shard_of: a shard's rows of the listing (schema LISTED). Shards beyond `limit`
    bytes in all are never kept and always read.
    """

    def __init__(
        self,
        folder: Path,
        rows: np.ndarray,
        shard_of: Callable[[int], pa.Table],
        *,
        size: int,
        limit: float,
        crop: float = 1.0,
        interpolation: str = "bilinear",
        access: Access = DIRECT,
        column: str | None = None,
        read: Read = objects.read,
    ) -> None:
        self.folder, self.rows, self.shard_of, self.size = folder, rows, shard_of, size
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.kept = int(np.searchsorted(self.ends * size * size * 3, limit, side="right"))
        self.how = {"size": size, "crop": crop, "interpolation": interpolation}
        self.how |= {"access": access, "column": column, "read": read}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @staticmethod
    def of_run(
        run: Run,
        *,
        size: int,
        limit: float,
        column: str | None = None,
        crop: float = 1.0,
        interpolation: str = "bilinear",
    ) -> Pixels:
        """Return the images of a run by image id; limit in bytes, crop the share of the shorter side kept."""
        images = run.manifest("images")
        assert images is not None
        rows = np.array([shard.rows for shard in images.shards], np.int64)
        indices = [shard.index for shard in images.shards]
        folder = folder_of(run.uri, images.fingerprint, size, crop, interpolation)
        home = functools.partial(run.read_shard, "images")
        return Pixels(
            folder,
            rows,
            lambda shard: home(indices[shard]),
            size=size,
            limit=limit,
            crop=crop,
            interpolation=interpolation,
            access=run.access,
            column=column,
        )

    def get(self, places: np.ndarray) -> np.ndarray:
        """Return images by their places, int64 [b]: uint8 [b, size, size, 3].

        Raises UserError where one cannot be read.
        """
        out, unread = self.tried(places)
        for row, reason in unread.items():
            shard = int(np.searchsorted(self.ends, places[row], side="right"))
            within = int(places[row] - (self.ends[shard] - self.rows[shard]))
            uri = self._listed(shard)["uri"][within].as_py()
            raise UserError(
                f"{uri} cannot be read any more: {reason}; restore it, or make a new run of the images that "
                "are left"
            )
        return out

    def tried(self, places: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Return images as `get`, and why the rows cannot be read that are left as they are."""
        out = np.empty((len(places), self.size, self.size, 3), np.uint8)
        unread: dict[int, str] = {}
        shards = np.searchsorted(self.ends, places, side="right")
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            within = places[here] - (self.ends[shard] - self.rows[shard])
            unread |= self._fill(int(shard), within, here, out)
        return out, unread

    def _fill(self, shard: int, within: np.ndarray, here: np.ndarray, out: np.ndarray) -> dict[int, str]:
        if shard >= self.kept:
            return self._decode(shard, within, here, out)
        pixels, there = self._mapped(shard)
        known = there[within] == 1
        out[here[known]] = pixels[within[known]]
        if known.all():
            return {}
        within, here = within[~known], here[~known]
        unread = self._decode(shard, within, here, out)
        whole = ~np.isin(here, list(unread))
        pixels[within[whole]] = out[here[whole]]
        there[within[whole]] = 1
        return unread

    def _mapped(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        rows = int(self.rows[shard])
        return (
            self._file(shard, "pixels", (rows, self.size, self.size, 3)),
            self._file(shard, "there", (rows,)),
        )

    def _file(self, shard: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / f"{Path(shard_name(shard)).stem}.{kind}"
        with path.open("ab") as file:
            file.truncate(int(np.prod(shape)))
        return np.memmap(path, np.uint8, "r+", shape=shape)

    def _decode(self, shard: int, within: np.ndarray, here: np.ndarray, out: np.ndarray) -> dict[int, str]:
        # In the order of the listing, so that neighbors in an archive come by one request.
        wanted, back = np.unique(within, return_inverse=True)
        listed = self._listed(shard).take(pa.array(wanted))
        decoded = np.zeros((len(wanted), self.size, self.size, 3), np.uint8)
        reasons = {}
        for i, (image, _, reason) in enumerate(reading.decoded(listed, **self.how)):
            if image is None:
                reasons[i] = reason
            else:
                decoded[i] = image
        out[here] = decoded[back]
        return {row: reasons[i] for row, i in zip(here.tolist(), back.tolist(), strict=True) if i in reasons}

    def _listed(self, shard: int) -> pa.Table:
        path = self.folder / f"{Path(shard_name(shard)).stem}.rows"
        if not path.exists():
            rows = self.shard_of(shard)
            beside = path.with_suffix(f".{os.getpid()}")
            with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
                writer.write_table(rows)
            beside.replace(path)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
