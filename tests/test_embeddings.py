"""Embeddings that a person brings: every form is read, every flaw is a sentence, length 1 costs nothing."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import unit
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from selective_ray import embeddings, in_memory
from selective_ray.embeddings import complain, read, unit_rows
from selective_ray.errors import UserError

X = np.random.default_rng(3).normal(size=(6, 4))


def said(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def whole(path: object) -> tuple[np.ndarray, list[str]]:
    """All rows and uris; n and d are as announced."""
    n, d, blocks = read(str(path))
    parts = list(blocks)
    x = np.concatenate([block for block, _ in parts])
    assert x.shape == (n, d)
    return x, [uri for _, uris in parts for uri in uris]


@pytest.fixture
def npy(tmp_path):
    def write(array: object, **options: object) -> Path:
        path = tmp_path / "x.npy"
        np.save(path, array, **options)
        return path

    return write


@pytest.fixture
def parquet(tmp_path):
    def write(column: object, row_group_size: int | None = None, **others: object) -> Path:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"embedding": column, **others}), path, row_group_size=row_group_size)
        return path

    return write


def lists(x: np.ndarray, kind: str) -> pa.Array:
    rows = list(x)
    value = pa.from_numpy_dtype(x.dtype)
    if kind == "list":
        return pa.array(rows, pa.list_(value))
    if kind == "large_list":
        return pa.array(rows, pa.large_list(value))
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


# Forms


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint16", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read_as_it_is_stored(npy, dtype, order):
    x = np.asarray(10 * X if "int" in dtype else X, order=order).astype(dtype, order=order)
    path = npy(x)
    found, uris = whole(path)
    assert (found == x).all()
    assert uris == [f"{path}#{row}" for row in range(6)]


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
@pytest.mark.parametrize("named", [False, True])
def test_parquet_is_read_as_it_is_stored(parquet, kind, dtype, named):
    x = (10 * X).astype(dtype)
    names = [f"s3://bucket/{row} é.jpg" for row in range(6)]
    path = parquet(lists(x, kind), **({"uri": names} if named else {}), label=["cat"] * 6)
    found, uris = whole(path)
    assert found.dtype == x.dtype and (found == x).all()
    assert uris == (names if named else [f"{path}#{row}" for row in range(6)])


def test_rows_and_uris_keep_their_order_over_blocks_and_row_groups(npy, parquet, monkeypatch):
    monkeypatch.setattr(embeddings, "ROWS_AT_A_TIME", 7)
    x = np.arange(75.0).reshape(25, 3)
    for path in (npy(x), parquet(lists(x, "list"), row_group_size=4)):
        found, uris = whole(path)
        assert (found == x).all() and uris == [f"{path}#{row}" for row in range(25)]
        assert max(len(block) for block, _ in read(str(path))[2]) <= 7


def test_relative_paths_give_absolute_uris(npy, monkeypatch):
    path = npy(X)
    monkeypatch.chdir(path.parent)
    assert whole("x.npy")[1][5] == f"{path}#5"


def test_an_image_without_a_uri_gets_that_of_its_row(parquet):
    path = parquet(lists(X, "list"), uri=["a", None, "c", "d", "e", "f"])
    assert whole(path)[1] == ["a", f"{path}#1", "c", "d", "e", "f"]


# Flaws of the form


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(3), "shape [3]"),
        (np.zeros((2, 3, 4)), "shape [2, 3, 4]"),
        (np.float32(1), "shape []"),
        (np.zeros((0, 8)), "shape [0, 8]"),
        (np.zeros((8, 0)), "shape [8, 0]"),
        (np.zeros(3, [("a", "f4")]), "shape [3]"),
        (np.array([["1.0", "2.0"]]), "not numbers"),
        (np.ones((2, 2), bool), "bool, not numbers"),
        (np.ones((2, 2), complex), "complex128, not numbers"),
        (np.zeros((2, 2), "datetime64[s]"), "not numbers"),
    ],
)
def test_npy_of_another_shape_or_type_is_refused(npy, array, words):
    path = npy(array)
    message = said(read, str(path))
    assert str(path) in message and words in message


class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_object_arrays_are_refused_without_being_unpickled(npy, tmp_path):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    path = npy(np.array([[Trap(sprung)]], object), allow_pickle=True)
    assert str(path) in said(read, str(path))
    path.write_bytes(pickle.dumps(Trap(sprung)))
    assert str(path) in said(read, str(path))
    assert not sprung.exists()


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_null_values_and_null_rows_never_slip_through(parquet, kind, dtype):
    """A null has no bytes of its own: what lies in its place must not be taken for a number."""
    value = pa.from_numpy_dtype(np.dtype(dtype))
    of = {"list": pa.list_, "large_list": pa.large_list}.get(kind, lambda value: pa.list_(value, 2))(value)
    one, two = (np.dtype(dtype).type(v) for v in (1, 2))
    x, _ = whole(parquet(pa.array([[one, two], [one, None], [None, None]], of)))
    _, not_finite, _ = unit_rows(x)
    assert not_finite.tolist() == [1, 2] and (x[0] == [1, 2]).all()
    message = said(whole, parquet(pa.array([[one, two], [two, one], None], of)))
    assert "row 2" in message
    assert "row 0" in said(whole, parquet(pa.array([None, [one, two]], of)))


def test_a_null_row_further_on_is_named_by_its_number_in_the_file(parquet, monkeypatch):
    monkeypatch.setattr(embeddings, "ROWS_AT_A_TIME", 4)
    rows: list = [[1.0, 2.0]] * 11
    rows[9] = None
    assert "row 9 " in said(whole, parquet(pa.array(rows), row_group_size=3))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([[1.0, 2.0], [1.0]]), "row 1"),
        (pa.array([[1.0], [1.0, 2.0]]), "row 1"),
        # The numbers would fill the array if only their count were looked at.
        (pa.array([[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]]), "row 1"),
        (pa.array([[1.0, 2.0], []]), "row 1"),
        (pa.array([[], []], pa.list_(pa.float32())), "[2, 0]"),
        (pa.array([], pa.list_(pa.float32())), "no rows"),
        (pa.array([["a"], ["b"]]), "not numbers"),
        (pa.array([[True], [False]]), "not numbers"),
        (pa.array([[[1.0]], [[1.0]]]), "not numbers"),
        (pa.array([[None], [None]]), "not numbers"),
        (pa.array([1.0, 2.0]), "holds double"),
        (pa.array(["[1, 2]", "[3, 4]"]), "holds string"),
        (pa.array([{"a": 1.0}]), "not lists"),
    ],
)
def test_parquet_that_is_no_array_of_numbers_is_refused(parquet, column, words):
    path = parquet(column)
    message = said(whole, path)
    assert str(path) in message and words in message


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 1, 2, 3, 3, 5], "row 4 of {path} has the image_id 3, and image ids are row numbers"),
        ([0, 1, 2, 3, 5, 4], "row 4 of {path} has the image_id 5"),
        ([0, 1, 2, 3, 4, None], "row 5 of {path} has the image_id None"),
        (list("abcdef"), "row 0 of {path} has the image_id a"),
    ],
)
def test_image_ids_that_are_not_row_numbers_are_refused(ids, words, tmp_path, monkeypatch):
    """Else picks would name other images than the ids of the file do, or one image twice."""
    monkeypatch.setattr(embeddings, "ROWS_AT_A_TIME", 4)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"embedding": X.tolist(), "image_id": range(6)}), path)
    assert np.array_equal(whole(path)[0], X)
    pq.write_table(pa.table({"embedding": X.tolist(), "image_id": ids}), path)
    assert words.format(path=path) in said(whole, path)


def test_a_missing_column_is_refused_naming_those_there(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"embeddings": [[1.0]], "uri": ["a"]}), path)
    message = said(read, str(path))
    assert "no column `embedding`" in message and "embeddings, uri" in message


# Flaws of the file


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "x.txt", "folder.npy", "run"])
def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "folder.npy":
        path.mkdir()
    assert str(path) in said(read, str(path)) and "--embeddings" in said(read, str(path))


@pytest.mark.parametrize("name", ["x.npz", "x.csv", "x", "npy", "x.parquet.gz"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"1,2,3")
    message = said(read, str(tmp_path / name))
    assert name in message and ".npy" in message and ".parquet" in message


@pytest.mark.parametrize("write", ["npy", "parquet"])
@pytest.mark.parametrize("length", [0, 4, 60, -1, -40])
def test_a_truncated_file_is_refused(npy, parquet, write, length):
    path = npy(X) if write == "npy" else parquet(lists(X, "list"))
    path.write_bytes(path.read_bytes()[:length])
    message = said(whole, path)
    assert str(path) in message and "cannot be read" in message


def test_damage_within_a_parquet_file_is_refused_wherever_it_is(parquet):
    """The footer is sound; only decoding the last row group shows it."""
    path = parquet(lists(np.random.default_rng(0).normal(size=(400, 16)), "list"), row_group_size=100)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 600] = bytes(600)
    path.write_bytes(data)
    assert str(path) in said(whole, path)


# Rows


def test_unusable_rows_are_counted_from_the_first_row():
    x = X.copy()
    x[1, 2], x[2, 0], x[4] = np.nan, -np.inf, 0
    unit_x, not_finite, zero = unit_rows(x, first_row=100)
    assert not_finite.tolist() == [101, 102] and zero.tolist() == [104]
    assert unit_x.dtype == np.float32 and unit_x.shape == x.shape
    assert np.allclose(np.linalg.norm(unit_x[[0, 3, 5]], axis=1), 1)


def test_the_complaint_counts_and_names_the_first():
    rows = np.arange(7, 19)
    message = said(complain, rows, np.array([3]), "x.npy")
    assert message.startswith("12 of the rows of x.npy") and "NaN" in message
    assert "7, 8, 9, 10, 11, …" in message and "12, " not in message
    message = said(complain, np.array([], int), np.array([3]), "x.npy")
    assert message.startswith("1 of the rows of x.npy") and "zero" in message and "3" in message
    assert complain(np.array([], int), np.array([], int), "x.npy") is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_rows_of_length_one_are_kept_to_the_bit(dtype):
    x = unit(np.random.default_rng(1).normal(size=(500, 33)))
    if dtype == "float16":
        x = np.eye(33)[np.arange(500) % 33]
    x = x.astype(dtype)
    found, not_finite, zero = unit_rows(x)
    assert found.tobytes() == x.astype(np.float32).tobytes()
    assert not len(not_finite) and not len(zero)
    near = (x.astype(np.float32) * np.float32(1 + 4e-6)).astype(np.float32)
    assert unit_rows(near)[0].tobytes() == near.tobytes()  # within the tolerance: left alone
    far = (x.astype(np.float32) * np.float32(1 + 4e-5)).astype(np.float32)
    assert unit_rows(far)[0].tobytes() != far.tobytes()  # beyond it: scaled
    assert np.allclose(unit_rows(far)[0], x, atol=1e-6)


def test_by_hand():
    found, _, _ = unit_rows(np.array([[3, 4], [0, -2], [1, 0]]))
    assert (found == np.array([[0.6, 0.8], [0, -1], [1, 0]], np.float32)).all()


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e38, 1e-44])
def test_huge_and_tiny_float32_rows_neither_overflow_nor_vanish(scale):
    x = np.full((2, 4), scale, np.float32)
    x[1, :2] *= -1
    found, not_finite, zero = unit_rows(x)
    assert (found == [[0.5] * 4, [-0.5, -0.5, 0.5, 0.5]]).all()
    assert not len(not_finite) and not len(zero)


@pytest.mark.parametrize("scale", [1.7e308, 1e300, 1e-300, 5e-324])
def test_nor_do_those_of_float64(scale):
    found, not_finite, zero = unit_rows(np.full((1, 4), scale))
    assert (found == 0.5).all() and not len(not_finite) and not len(zero)


ARRAYS = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
)


@given(ARRAYS)
@example(np.array([[0.99999]]))
def test_every_row_is_unit_length_or_named(x):
    found, not_finite, zero = unit_rows(x)
    assert found.dtype == np.float32 and found.shape == x.shape
    wide = x.astype(np.float64)
    assert not_finite.tolist() == [i for i, row in enumerate(wide) if not np.isfinite(row).all()]
    assert zero.tolist() == [i for i, row in enumerate(wide) if not row.any()]
    usable = np.setdiff1d(np.arange(len(x)), np.concatenate([not_finite, zero]))
    lengths = np.linalg.norm(found[usable].astype(np.float64), axis=1)
    assert (np.abs(lengths - 1) < 1.1e-5).all()
    # The direction stays.
    largest = np.abs(wide[usable]).max(axis=1, keepdims=True, initial=0)
    cosines = (wide[usable] / largest * found[usable]).sum(1) / np.linalg.norm(wide[usable] / largest, axis=1)
    assert (cosines > 1 - 2e-5).all()
    # And what is unit length stays to the bit.
    assert unit_rows(found[usable])[0].tobytes() == found[usable].tobytes()


@given(ARRAYS, st.integers(0, 6))
def test_rows_do_not_depend_on_the_block_they_are_in(x, cut):
    together = unit_rows(x)
    parts = [unit_rows(x[:cut]), unit_rows(x[cut:], first_row=min(cut, len(x)))]
    for whole_result, *of_parts in zip(together, *parts, strict=True):
        assert np.array_equal(np.concatenate(of_parts), whole_result, equal_nan=True)


# The same checks in memory


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros(8), "[n, d]"),
        (np.zeros((2, 2, 2)), "[n, d]"),
        (np.zeros((0, 3)), "no embeddings"),
        (np.zeros((3, 0)), "no embeddings"),
        ([["a", "b"]], "not numbers"),
        (np.array([[object()]]), "not numbers"),
        ([[1.0, np.nan], [1.0, 2.0]], "1 of the rows"),
        ([[1.0, 2.0], [np.inf, 2.0]], "rows 1"),
        ([[1.0, 2.0], [0.0, 0.0]], "zero"),
    ],
)
def test_select_in_memory_refuses_bad_arrays(x, words):
    assert words in said(in_memory.select, x, 1)


def test_select_in_memory_refuses_a_budget_that_the_array_has_not():
    x = unit(np.random.default_rng(0).normal(size=(30, 4)))
    assert "30" in said(in_memory.select, x, 31)
    assert "selection.budget" in said(in_memory.select, x, 0)
    assert len(in_memory.select(x, 3).rows) == 3
