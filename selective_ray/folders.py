"""The files under a local folder: sorted, each folder once, whatever links there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from selective_ray.errors import UserError
from selective_ray.objects import local_uri


def walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files under a folder, sorted; every folder is visited once, so links make no circles.

    A link to a folder that is visited by its own name is passed over.
    """
    real_root = os.path.realpath(root)
    visited = {_identity(str(parent)) for parent in Path(root).parents}
    stack = [iter([(root, True, False)])]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        path, is_folder, is_link = entry
        if not is_folder:
            if (status := _status(path)) is not None:
                yield path, status
            continue
        if is_link and _seen_by_name(os.path.realpath(path), real_root):
            continue
        if (identity := _identity(path)) in visited:
            continue
        visited.add(identity)
        stack.append(iter(_entries(path)))


def _entries(folder: str) -> list[tuple[str, bool, bool]]:
    """Return the entries of a folder as path, whether a folder, whether a link; as their uris sort."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (entry.path, entry.is_dir(), entry.is_symlink())
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_dir() or entry.is_file() or entry.is_symlink())
            ]
    except OSError as error:
        raise unreadable(folder, error) from None
    return sorted(found, key=lambda entry: os.fsencode(entry[0]) + (b"/" if entry[1] else b""))


def _seen_by_name(target: str, root: str) -> bool:
    """Whether the walk comes to a folder by its own path: below the root and not hidden."""
    below = os.path.relpath(target, root)
    return below == "." or not any(part.startswith(".") for part in Path(below).parts)


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = Path(folder).stat()
    except OSError as error:
        raise unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _status(path: str) -> os.stat_result | None:
    """Return the status of a file, of the link itself where it is broken, None where it went away."""
    for follow in (True, False):
        try:
            return os.stat(path, follow_symlinks=follow)  # noqa: PTH116
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(path, error) from None
    return None


def unreadable(path: str, error: OSError) -> UserError:
    """Return the error for a place that cannot be listed."""
    why = (error.strerror or type(error).__name__).lower()
    return UserError(
        f"cannot list {local_uri(path)}: {why}; make it readable for this user, or give another folder"
    )
