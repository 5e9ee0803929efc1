"""Embeddings that a person brings: read, checked, and made unit length."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selective_ray.errors import UserError

# A row whose length is this near to 1 is left as it is, to the bit.
UNIT_TOLERANCE = 1e-5
ROWS_AT_A_TIME = 65_536


def unit_rows(x: np.ndarray, first_row: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows at unit length, float32 [n, d], and the rows that are not finite and that are zero.

    The row numbers, int64 [p] and [q], count from first_row; those rows of the result are meaningless.
    """
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        # Scaled by the largest coordinate first, so that squares neither overflow nor vanish.
        largest = np.abs(wide).max(axis=1, initial=0.0)
        scaled = wide / largest[:, None]
        lengths = np.sqrt((scaled**2).sum(axis=1))
        unit = (scaled / lengths[:, None]).astype(np.float32)
        # Judged as float32, which is what stays: else a row at the very tolerance would be changed next time.
        narrow = x.astype(np.float32)
        keep = np.abs(np.sqrt((narrow.astype(np.float64) ** 2).sum(axis=1)) - 1) <= UNIT_TOLERANCE
    unit[keep] = narrow[keep]
    return (
        unit,
        np.flatnonzero(~np.isfinite(wide).all(axis=1)) + first_row,
        np.flatnonzero(largest == 0) + first_row,
    )


def check_shape(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    """Raise UserError unless these are n > 0 rows of d > 0 numbers."""
    if len(shape) != 2:
        raise UserError(f"{name} has shape {list(shape)}; embeddings are an array [n, d], one row an image")
    if not shape[0] or not shape[1]:
        raise UserError(
            f"{name} has shape {list(shape)}: no embeddings; give at least one row and one column"
        )
    if dtype.kind not in "fiu":
        raise UserError(f"{name} holds {dtype}, not numbers; save it as float32")


def complain(not_finite: np.ndarray, zero: np.ndarray, name: str) -> None:
    """Raise UserError that counts the unusable rows and names the first of each kind."""
    for rows, what in (
        (not_finite, "not finite (NaN or infinity)"),
        (zero, "zero vectors, without direction"),
    ):
        if len(rows):
            first = ", ".join(str(row) for row in rows[:5]) + (", …" if len(rows) > 5 else "")
            raise UserError(
                f"{len(rows)} of the rows of {name} are {what}: rows {first}; "
                "remove or mend them and try again"
            )


def read(path: str) -> tuple[int, int, Iterator[tuple[np.ndarray, list[str]]]]:
    """Open a `.npy` array [n, d] or Parquet with an `embedding` column (and perhaps `uri`, and `image_id`).

    Returns n, d, and an iterator of blocks: the rows as they are stored [b, d], and their uris. Raises
    UserError for what cannot be read or has another shape, and where image ids are not row numbers.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{path} does not exist; --embeddings takes a .npy file, a Parquet file or a run folder"
        )
    if not path.endswith((".npy", ".parquet")):
        raise UserError(
            f"{path} is neither .npy nor .parquet; --embeddings takes one of these or a run folder"
        )
    with _reading(path):
        n, d, blocks = _read_npy(path) if path.endswith(".npy") else _read_parquet(path)
    return n, d, _guarded(path, blocks)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _guarded(
    path: str, blocks: Iterator[tuple[np.ndarray, list[str]]]
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pass blocks on; damage inside a file shows only when its pages are decoded."""
    with _reading(path):
        yield from blocks


def _read_npy(path: str) -> tuple[int, int, Iterator[tuple[np.ndarray, list[str]]]]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    check_shape(array.shape, array.dtype, path)

    def rows() -> Iterator[tuple[np.ndarray, list[str]]]:
        for start in range(0, len(array), ROWS_AT_A_TIME):
            block = np.asarray(array[start : start + ROWS_AT_A_TIME])
            yield block, [f"{os.path.abspath(path)}#{row}" for row in range(start, start + len(block))]  # noqa: PTH100

    return len(array), array.shape[1], rows()


def _read_parquet(path: str) -> tuple[int, int, Iterator[tuple[np.ndarray, list[str]]]]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if "embedding" not in names:
        raise UserError(f"{path} has no column `embedding`; its columns are {', '.join(names)}")
    n = file.metadata.num_rows
    if not n:
        raise UserError(f"{path} has no rows: no embeddings; give at least one row")
    first = next(file.iter_batches(1, columns=["embedding"]))["embedding"]
    if (
        not pa.types.is_list(first.type)
        and not pa.types.is_large_list(first.type)
        and not (pa.types.is_fixed_size_list(first.type))
    ):
        raise UserError(f"the column `embedding` of {path} holds {first.type}, not lists of numbers")
    if not first[0].is_valid:
        raise UserError(f"row 0 of {path} has no embedding (null); remove or mend it and try again")
    d = len(first[0])
    check_shape((n, d), np.dtype(first.type.value_type.to_pandas_dtype()), path)

    def rows() -> Iterator[tuple[np.ndarray, list[str]]]:
        start = 0
        for batch in file.iter_batches(
            ROWS_AT_A_TIME, columns=[c for c in ("embedding", "uri", "image_id") if c in names]
        ):
            if "image_id" in names:
                ids = batch["image_id"].to_numpy(zero_copy_only=False)
                if len(other := np.flatnonzero(ids != np.arange(start, start + len(batch)))):
                    raise UserError(
                        f"row {start + other[0]} of {path} has the image_id {batch['image_id'][other[0]]}, "
                        "and image ids are row numbers, each once and in order: number the rows from 0, or "
                        "leave the column out (a column `uri` tells whose they are)"
                    )
            lists = batch["embedding"]
            lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
            odd = np.flatnonzero(~(lengths == d))
            if len(odd):
                raise UserError(
                    f"{path} has rows of different lengths: row 0 has {d} numbers, "
                    f"row {start + odd[0]} does not"
                )
            # Nulls among the values become NaN here, and are refused as that.
            values = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, d)
            uris = [f"{os.path.abspath(path)}#{row}" for row in range(start, start + len(batch))]  # noqa: PTH100
            if "uri" in names:
                uris = [
                    own if uri is None else str(uri)
                    for uri, own in zip(batch["uri"].to_pylist(), uris, strict=True)
                ]
            yield values, uris
            start += len(batch)

    return n, d, rows()
