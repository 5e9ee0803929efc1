"""The file of labeled images: what it may hold, and what a run makes of it."""

import numpy as np
import pyarrow as pa
import pytest

from selective_ray import labeled
from selective_ray.errors import UserError
from selective_ray.schema import IMAGES
from selective_ray.store import Run

NAMES = ["a.jpg", "b,c.jpg", "d e.jpg", "ünï.jpg", "f.jpg"]


@pytest.fixture
def run(tmp_path):
    """A run that lists five images in two shards."""
    where = Run(str(tmp_path / "run"))
    where.begin("images", {}, {})
    shards = []
    for index, rows in enumerate((slice(0, 3), slice(3, 5))):
        names = NAMES[rows]
        count = [None] * len(names)
        columns = [list(range(5))[rows], names, count, count, count, names]
        shards.append(where.write_shard("images", index, pa.table(columns, schema=IMAGES)))
    where.finish("images", shards, seconds=0, peak_memory_bytes={}, summary={})
    return where


def ids(run, tmp_path, text: str) -> list[int]:
    file = tmp_path / "labeled.csv"
    file.write_bytes(text.encode())
    return labeled.find(run, labeled.read(str(file))).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "image_id\n3\n1\n",
        "image_id,label\r\n1,cat\r\n3,dog\r\n",
        "label,image_id\ncat,003\n\ndog,1",
        'uri\nünï.jpg\n"b,c.jpg"\n',
        '\ufeffuri,label\n"b,c.jpg",cat\nünï.jpg,dog\n',
        # Of another run: its ids mean nothing here.
        'image_id,uri\n7,ünï.jpg\n9,"b,c.jpg"\n',
    ],
)
def test_ids_or_uris_in_any_order_and_dress(run, tmp_path, text):
    assert ids(run, tmp_path, text) == [1, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column uri or image_id"),
        ("name\na.jpg\n", "no column uri or image_id"),
        ("image_id\n", "names no image"),
        ("image_id\n1\n2\n01\n", "image_id 1 twice, in lines 2 and 4"),
        ("uri\na.jpg\nf.jpg\na.jpg\n", "uri a.jpg twice, in lines 2 and 4"),
        ("image_id\n1\n-2\n", "line 3"),
        ("image_id\n1.5\n", "1.5"),
        ("label,image_id\ncat\n", "line 2"),
        ("image_id\n4\n5\n6\n", "image_id 5 and 1 more, and"),
        ("uri\na.jpg\nz.jpg\n", "names z.jpg, which"),
    ],
)
def test_mistakes_are_told_with_their_place(run, tmp_path, text, said):
    with pytest.raises(UserError, match=r"labeled\.csv") as error:
        ids(run, tmp_path, text)
    assert said in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        labeled.read(str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(np.arange(300).astype(np.uint8).tobytes())
    with pytest.raises(UserError, match="cannot be read"):
        labeled.read(str(tmp_path / "binary.csv"))
    with pytest.raises(UserError, match="cannot be read"):
        labeled.read(str(tmp_path))
