"""The labels that people gave, from a file into a run."""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selective_ray import label_files, labels, objects
from selective_ray.errors import UserError, named
from selective_ray.export import copy_of, selected, stamp_of
from selective_ray.label_files import Answer
from selective_ray.labels import Labels
from selective_ray.lease import Lease
from selective_ray.memory import peak_memory
from selective_ray.objects import Access, Request
from selective_ray.progress import Reporter
from selective_ray.schema import LABELS, SKIPPED
from selective_ray.store import Run


def read_labels(run: Run) -> Labels:
    """Return the labels of a run, and what was skipped; none where there are none yet."""
    found, skipped = (_rows(run, table) for table in ("labels", "skipped"))
    of = dict(zip(found["image_id"].to_pylist(), found["label"].to_pylist(), strict=True)) if found else {}
    # An import that was cut short between the two has written the labels.
    return Labels(of, frozenset(skipped["image_id"].to_pylist() if skipped else ()) - of.keys())


def _rows(run: Run, table: str) -> pa.Table | None:
    manifest = run.manifest(table)
    return manifest and pa.concat_tables(run.read_shard(table, shard.index) for shard in manifest.shards)


def bring_labels(run: Run, file: str, *, replace: bool, reporter: Reporter) -> dict[str, Any]:
    """Take the labels of a file into a run; returns what came and what is there now, in numbers.

    Labels are added to those of earlier files. Where one image has two labels nothing is changed and
    UserError is raised, unless replace: then what this file says of an image counts. A label outweighs a
    skip, except by replace. The same file again changes nothing.
    """
    started = time.monotonic()
    if run.manifest("images") is None:
        raise UserError(
            f"{run.uri} has no finished listing of images; run `selective-ray select` on it first"
        )
    kind, found = label_files.parse(read_file(file, run.access), file)
    if not found:
        raise UserError(f"{file} names no images; export the labels again")
    selection = selected(run)
    image_ids = identified(run, found, selection, file)
    brought = labels.gather(image_ids, found, file)
    if not brought.labels and not brought.skipped:
        raise UserError(
            f"{file} ({kind}) names {len(set(image_ids)):,} images and labels none of them; label some, and "
            "export the labels again"
        )
    with Lease(run, reporter.say):
        earlier = read_labels(run)
        if not replace and (differing := earlier.differing(brought)):
            pairs = [
                f"image {i} is {earlier.labels[i]!r} there, {brought.labels[i]!r} here" for i in differing
            ]
            raise UserError(
                f"{file} labels {len(differing):,} images otherwise than {run.path('labels')}: "
                f"{named(pairs)}; correct the file, or let it count with --replace"
            )
        now = earlier.replaced_by(brought) if replace else earlier.merge(brought)
        summary = _numbers(now, selection)
        source = {"file": posixpath.basename(file), "format": kind, "labels": len(brought.labels)}
        changed = _write(run, now, summary | {"last_file": source}, time.monotonic() - started)
    _warn(run, now, selection, reporter)
    return {
        "run": run.uri,
        "format": kind,
        "in_file": {
            "images": len(set(image_ids)),
            "labels": len(brought.labels),
            "skipped": len(brought.skipped),
        },
        "changed": changed,
        **summary,
    }


def read_file(file: str, access: Access) -> bytes:
    """Return the bytes of a file of labels; raises UserError where it is not there or too large."""
    try:
        size, _ = objects.version(file, access)
        if size > label_files.MAX_BYTES:
            raise UserError(f"{file} is larger than {label_files.MAX_BYTES >> 20} MiB; split it")
        return objects.read(Request(file), access)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {file}; check the path") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the path") from None


def identified(run: Run, said: list[Answer], selection: pa.Table, file: str) -> list[int]:
    """Return the image id that each answer is about; raises UserError where that is not one image."""
    n, stamp = run.manifest("images").rows, stamp_of(run)
    names = {answer.uri for answer in said if answer.image_id is None}
    ids = {name: image for name in names if (image := copy_of(name, stamp)) is not None}
    # Where uris were brought, one may be the end of another's.
    listed = "images" in run.manifest("images").what
    found = labels.find(names - ids.keys(), [selection]) if listed else {}
    if left := names - ids.keys() - found.keys():
        shards = run.manifest("images").shards
        found |= labels.find(left, (run.read_shard("images", s.index, ["image_id", "uri"]) for s in shards))
    picked = set(selection["image_id"].to_pylist())
    for name, candidates in found.items():
        if len(candidates) > 1:
            found[name] = [one for one in candidates if one[0] in picked] or candidates
    if several := {name: candidates for name, candidates in found.items() if len(candidates) > 1}:
        name, candidates = next(iter(several.items()))
        raise UserError(
            f"{file} names {len(several):,} images in words that several fit: {name!r} is the end of "
            f"{named([uri for _, uri in candidates], ' and of ')}; give uris or image ids"
        )
    ids |= {name: candidates[0][0] for name, candidates in found.items()}
    image_ids = [ids.get(answer.uri, -1) if answer.image_id is None else answer.image_id for answer in said]
    if unknown := [
        f"{answer.where} ({(answer.uri if answer.image_id is None else answer.image_id)!r})"
        for image, answer in zip(image_ids, said, strict=True)
        if not 0 <= image < n
    ]:
        raise UserError(
            f"{file} has {len(unknown):,} of {len(said):,} lines about images that are not in {run.uri}: "
            f"{named(unknown, ', ')}; give the file of this run, or remove these lines"
        )
    _check_uris(run, image_ids, said, selection, file)
    return image_ids


def _check_uris(run: Run, image_ids: list[int], said: list[Answer], selection: pa.Table, file: str) -> None:
    """Raise UserError where an answer's image id and uri are not of one image, as from another run."""
    both = [(i, a) for i, a in zip(image_ids, said, strict=True) if a.image_id is not None and a.uri]
    uris = dict(zip(selection["image_id"].to_pylist(), selection["uri"].to_pylist(), strict=True))
    others = np.array(sorted({image for image, _ in both} - uris.keys()), np.int64)
    if len(others):
        uris |= dict(zip(others.tolist(), run.listed(others)["uri"].to_pylist(), strict=True))
    if wrong := [
        f"image {image} is {uris[image]!r} here and {answer.uri!r} there ({answer.where})"
        for image, answer in both
        if not labels.means(answer.uri, uris[image]) and copy_of(answer.uri, stamp_of(run)) != image
    ]:
        raise UserError(
            f"{file} is not of {run.uri}: {named(wrong)}; give the file of this run, or leave out image_id"
        )


def _numbers(now: Labels, selection: pa.Table) -> dict[str, Any]:
    """Count what is labeled: in all, by class, and among the picks."""
    picked = set(selection["image_id"].to_pylist())
    classes = Counter(now.labels.values())
    return {
        "labels": len(now.labels),
        "skipped": len(now.skipped),
        "picks": len(picked),
        "unlabeled_picks": len(picked - now.labels.keys() - now.skipped),
        "outside_selection": len(now.labels.keys() - picked),
        "classes": dict(sorted(classes.items())),
    }


def _write(run: Run, now: Labels, summary: dict[str, Any], seconds: float) -> bool:
    """Write `labels/`, then `skipped/`; returns whether either changed. Equal content has one fingerprint."""
    skipped = sorted(now.skipped)
    uris = run.listed(np.array(skipped, np.int64))["uri"]
    image_ids = sorted(now.labels)
    tables = {
        "labels": (
            pa.table({"image_id": image_ids, "label": [now.labels[i] for i in image_ids]}, LABELS),
            summary,
        ),
        "skipped": (pa.table({"image_id": skipped, "uri": uris}, SKIPPED), {"skipped": len(skipped)}),
    }
    changed = []
    for table, (content, counts) in tables.items():
        text = json.dumps([content[name].to_pylist() for name in content.column_names])
        _, new = run.replace(
            table,
            content,
            what={table: {"content": hashlib.sha256(text.encode()).hexdigest()[:16]}},
            inputs=run.fingerprints("images"),
            seconds=seconds,
            peak_memory_bytes={"driver": peak_memory()},
            summary=counts,
        )
        changed.append(new)
    return any(changed)


def _warn(run: Run, now: Labels, selection: pa.Table, reporter: Reporter) -> None:
    """Tell of what is possible, and mostly a mistake."""
    classes = Counter(now.labels.values())
    if pairs := labels.near_names(classes):
        words = [f"{a!r} ({classes[a]:,} images) and {b!r} ({classes[b]:,})" for a, b in pairs]
        reporter.warn(f"classes that may be one, spelled in two ways: {named(words)}; correct and --replace")
    if len(classes) == 1:
        reporter.warn(
            f"all {len(now.labels):,} labels are {next(iter(classes))!r}: training needs two classes"
        )
    picked = set(selection["image_id"].to_pylist())
    if outside := now.labels.keys() - picked:
        ids = pa.array(sorted(outside), pa.int64())
        count = 0
        for shard in run.manifest("rejected").shards if run.manifest("rejected") else []:
            rejected = run.read_shard("rejected", shard.index, ["image_id"])
            count += pc.sum(pc.is_in(rejected["image_id"], ids)).as_py() or 0
        if count:
            reporter.warn(f"{count:,} labeled images are in {run.path('rejected')}: they cannot be read")
    if copies := _differing_copies(run, now):
        words = [f"{a} ({now.labels[a]!r}) and {b} ({now.labels[b]!r})" for a, b in copies]
        reporter.warn(f"images that are equal byte for byte have two labels: {named(words)}")


def _differing_copies(run: Run, now: Labels) -> list[tuple[int, int]]:
    """Find labeled images that are equal byte for byte to a labeled one, and have another label."""
    manifest = run.manifest("duplicates")
    ids = pa.array(sorted(now.labels), pa.int64())
    first: dict[int, int] = {}
    found = []
    for shard in manifest.shards if manifest else []:
        rows = run.read_shard("duplicates", shard.index)
        rows = rows.filter(pc.is_in(rows["image_id"], ids))
        for image, equal in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            known = equal if equal in now.labels else first.setdefault(equal, image)
            if now.labels[known] != now.labels[image]:
                found.append((known, image))
    return found
