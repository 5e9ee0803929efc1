"""True labels of many images, for judging only: of a file, of folders' names, or those brought into a run.

They are known to no stage, and are not written to the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import label_files, labeling, labels
from selective_ray.errors import UserError, named
from selective_ray.export import selected
from selective_ray.store import Run

FOLDERS = "folders"
# The last folder of a uri; of a member of an archive, that inside, or else the one the archive is in.
_FOLDER = r"(?P<folder>[^/#]+)/[^/]*$"


@dataclass(frozen=True)
class Truth:
    """The true labels of a run's embedded images: source in words, and the names of the classes, sorted.

    image_ids int64 [l] ascending and codes int64 [l] of those that have one; or image_ids is None, and the
    label of every image is the name of its folder. digest tells one truth from another.
    """

    source: str
    digest: str
    classes: list[str]
    image_ids: np.ndarray | None
    codes: np.ndarray

    def of(self, run: Run, image_ids: np.ndarray) -> np.ndarray:
        """Return the codes of some images, int64, -1 where there is none."""
        if self.image_ids is None:
            return pc.index_in(folders(run.listed(image_ids)["uri"]), pa.array(self.classes)).to_numpy()
        if not len(self.image_ids):
            return np.full(len(image_ids), -1)
        place = np.searchsorted(self.image_ids, image_ids).clip(max=len(self.image_ids) - 1)
        return np.where(self.image_ids[place] == image_ids, self.codes[place], -1)


def read(runs: Sequence[Run], source: str | None) -> Truth:
    """Read the truth about the images of runs that share their embeddings.

    source is a file of labels, or `folders`, or None: what `selective-ray labels` brought into the runs.
    Raises UserError where it is no truth about them.
    """
    if source == FOLDERS:
        return _by_folder(runs[0])
    if source is None:
        return _by_image(runs[0], _brought(runs), "selective-ray labels")
    _, found = label_files.parse(labeling.read_file(source, runs[0].access), source)
    image_ids = labeling.identified(runs[0], found, selected(runs[0]), source)
    return _by_image(runs[0], labels.gather(image_ids, found, source).labels, source)


def rejected(run: Run) -> np.ndarray:
    """Return the ids of the images that have no embedding, int64; none where nothing is embedded yet."""
    manifest = run.manifest("rejected")
    if manifest is None:
        return np.empty(0, np.int64)
    parts = [run.read_shard("rejected", shard.index, ["image_id"]) for shard in manifest.shards]
    return pa.concat_tables(parts)["image_id"].to_numpy()


def _brought(runs: Sequence[Run]) -> dict[int, str]:
    said: dict[int, str] = {}
    for run in runs:
        more = labeling.read_labels(run).labels
        if differing := [i for i in more if said.get(i, more[i]) != more[i]]:
            words = [f"image {i} is {said[i]!r} and {more[i]!r}" for i in differing]
            raise UserError(
                f"{run.uri} labels {len(differing):,} images otherwise than the runs before it: "
                f"{named(words)}; correct one with `selective-ray labels --replace`"
            )
        said |= more
    return said


def _by_image(run: Run, said: Mapping[int, str], source: str) -> Truth:
    image_ids = np.setdiff1d(np.fromiter(said, np.int64, len(said)), rejected(run))
    names = [said[image] for image in image_ids.tolist()]
    classes = sorted(set(names))
    digest = hashlib.sha256(repr((image_ids.tolist(), names)).encode()).hexdigest()[:16]
    code = {name: place for place, name in enumerate(classes)}
    return Truth(source, digest, classes, image_ids, np.array([code[name] for name in names], np.int64))


def _by_folder(run: Run) -> Truth:
    """Read the names of all folders, shard by shard."""
    out = pa.array(rejected(run))
    counts: Counter[str | None] = Counter()
    for shard in run.manifest("images").shards:
        rows = run.read_shard("images", shard.index, ["image_id", "uri"])
        rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], out)))
        for one in pc.value_counts(folders(rows["uri"])).to_pylist():
            counts[one["values"]] += one["counts"]
    missing = counts.pop(None, 0)
    if len(counts) < 2 or missing:
        where = f"in one folder, {next(iter(counts))!r}" if counts and not missing else "not all in a folder"
        raise UserError(
            f"the images of {run.uri} are {where}: their folders do not tell classes apart; give a file "
            "with the columns uri and label"
        )
    return Truth("the names of folders", FOLDERS, sorted(counts), None, np.empty(0, np.int64))


def folders(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the names of the folders that images are in; null for one in none."""
    return pc.struct_field(pc.extract_regex(uris, _FOLDER), "folder")
