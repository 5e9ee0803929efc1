"""Listing: folders by hand, archives, Parquet, lists, and buckets cut at any place."""

import io
import os
import tarfile
from bisect import bisect_right
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import listing, objects
from selective_ray.errors import UsageError, UserError
from selective_ray.listing import Source, Task, expand, first_task, nothing_found
from selective_ray.objects import Request, read


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(uri: str, **options) -> pa.Table:
    """Expand a source in this process, in the order of uris."""
    source = Source(uri, **options)
    tasks, parts, others = [first_task(source)], [], 0
    while tasks:
        for found in expand(tasks.pop(), source):
            tasks += found.tasks
            others += found.others
            if found.rows is not None:
                assert found.rows["uri"].to_pylist() == sorted(found.rows["uri"].to_pylist())
                parts.append(found.rows)
    if not parts:
        raise nothing_found(source, others)
    return pa.concat_tables(parts).sort_by("uri")


def uris(uri: str, **options) -> list[str]:
    return listed(uri, **options)["uri"].to_pylist()


def tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# Folders


def test_listing_is_sorted_recursive_and_blind_to_hidden_and_other_files(tmp_path):
    names = ("b.jpg", "a/z.PNG", "a/é.Jpeg", "B.gif", "notes.txt", "a/.hidden.jpg", ".git/x.jpg", "a.jpg")
    touch(tmp_path, *names)
    table = listed(str(tmp_path))
    assert table.schema.names == ["uri", "offset", "length", "size", "version"]
    expected = [str(tmp_path / name) for name in ("B.gif", "a.jpg", "a/z.PNG", "a/é.Jpeg", "b.jpg")]
    assert table["uri"].to_pylist() == expected
    status = (tmp_path / "B.gif").stat()
    assert table["size"].to_pylist() == [1] * 5
    assert table["offset"].null_count == table["length"].null_count == 5
    assert table["version"][0].as_py() == f"{status.st_mtime_ns}-1"


NAMES = [
    "a b.jpg",
    "quote'\".jpg",
    "new\nline.jpg",
    "<script>.jpg",
    "naïve-漢字.jpg",
    "100%41.jpg",
    "file:.jpg",
    "#1.jpg",
]


def test_any_name_is_listed_and_read_back(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes([i]))
    found = uris(str(tmp_path))
    assert found == sorted(str(tmp_path / name) for name in NAMES)
    assert [read(Request(uri))[0] for uri in found] == [NAMES.index(Path(uri).name) for uri in found]


def test_names_that_are_not_utf8_become_percent_encoded_uris(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xff %41.jpg")).write_bytes(b"raw")
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    (uri,) = uris(str(tmp_path))
    assert uri == f"file://{tmp_path}/caf%FF%20%2541.jpg"
    assert read(Request(uri)) == b"raw"


def test_sources_may_be_file_uris_and_relative_paths(tmp_path, monkeypatch):
    touch(tmp_path, "my images/a.jpg")
    expected = [str(tmp_path / "my images/a.jpg")]
    monkeypatch.chdir(tmp_path)
    for source in (
        f"file://{tmp_path}/my%20images",
        f"file://localhost{tmp_path}/my%20images",
        "x/../my images/",
    ):
        assert uris(source) == expected


@pytest.mark.parametrize(
    "source", ["https://host/x", "file://host/x", "", "s3://", "s3://key:secret@bucket/x"]
)
def test_sources_that_cannot_be_are_wrong_usage(source):
    with pytest.raises(UsageError) as caught:
        first_task(Source(source))
    assert "secret" not in str(caught.value)


def test_what_cannot_be_listed_gets_a_sentence_with_the_remedy(tmp_path, monkeypatch):
    touch(tmp_path, "texts/a.txt", "texts/b.csv", "texts/in/README", "one.jpg", "all.tar.gz", "in/a.tgz")
    (tmp_path / "empty/in").mkdir(parents=True)
    cases = {
        "missing": r"there is no folder .*missing; check the path",
        "one.jpg": "one.jpg is a file, not a folder; give the folder",
        "one.jpg/x": "there is no folder",
        "empty": "empty is empty; give a folder or prefix that holds images",
        "texts": r"none of the 3 files in .*texts is an image; .*\.jpg \.jpeg .*: rename them, or",
        "all.tar.gz": "is compressed.*unpack it",
        "in": r"a.tgz is compressed.*--exclude '\*.tgz'",
    }
    for name, sentence in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            listed(str(tmp_path / name))
        assert not isinstance(caught.value, UsageError)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot list .*texts: permission denied; make it readable"):
        listed(str(tmp_path / "texts"))


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "elsewhere/3.jpg", "elsewhere/in/4.jpg", "data/.h/5.jpg")
    data = tmp_path / "data"
    (data / "a/again").symlink_to(data)  # up
    (data / "above").symlink_to(tmp_path)
    (data / "aa").symlink_to(data / "b")  # sideways: the folder keeps its own name
    (data / "hidden").symlink_to(data / ".h")  # the only way to it
    (data / "n").symlink_to(tmp_path / "elsewhere")
    (data / "m").symlink_to(tmp_path / "elsewhere")
    (data / "link.jpg").symlink_to(tmp_path / "elsewhere/3.jpg")
    (data / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    expected = ["a/1.jpg", "b/2.jpg", "broken.jpg", "hidden/5.jpg", "link.jpg", "m/3.jpg", "m/in/4.jpg"]
    assert uris(str(data)) == [str(data / name) for name in expected]


def test_patterns_choose_by_the_path_below_the_source(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.png", "val/cat/3.jpg", "4.jpg")
    tar(tmp_path / "train/more.tar", {"5.jpg": b"x", "6.png": b"x"})

    def below(**options):
        return [uri.removeprefix(f"{tmp_path}/") for uri in uris(str(tmp_path), **options)]

    assert below(include=("train/*",)) == [
        *("train/cat/1.jpg", "train/dog/2.png", "train/more.tar#5.jpg", "train/more.tar#6.png"),
    ]
    assert below(include=("*.jpg",), exclude=("val/*",)) == [
        "4.jpg",
        "train/cat/1.jpg",
        "train/more.tar#5.jpg",
    ]
    assert below(exclude=("*.tar", "*/cat/*")) == ["4.jpg", "train/dog/2.png"]
    with pytest.raises(UserError, match="passes --include and --exclude"):
        below(include=("*.gif",))


# Archives


def test_members_of_an_archive_are_found_at_their_offsets(tmp_path):
    long = "x" * 150 + "/ü.jpg"  # GNU and pax headers before the member
    members = {
        "b.jpg": b"bb",
        "a.png": b"a",
        long: b"long",
        "a.json": b"{}",
        "./._b.jpg": b"mac",
        "e.jpg": b"",
    }
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar(tmp_path / f"{kind}.tar", members, format=kind)
        table = listed(str(path))
        version = objects.local_version(path.stat())
        assert table["uri"].to_pylist() == [
            f"{path}#{name}" for name in sorted(("a.png", "b.jpg", "e.jpg", long))
        ]
        assert set(table["version"].to_pylist()) == {version}
        for row in table.to_pylist():
            request = Request(str(path), version, row["offset"], row["offset"] + row["length"])
            assert read(request) == members[row["uri"].split("#")[1]] and row["size"] == row["length"]


def test_the_last_member_of_a_name_counts_and_hostile_names_stay_data(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("1.jpg", b"old"),
            ("../../etc/x.jpg", b"up"),
            ("/root.jpg", b"abs"),
            ("1.jpg", b"new"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows = {row["uri"].split("#")[1]: row for row in listed(str(path)).to_pylist()}
    # Hidden parts are passed over, and ".." is one.
    assert sorted(rows) == ["/root.jpg", "1.jpg"]
    first = rows["1.jpg"]
    assert read(Request(str(path), "", first["offset"], first["offset"] + 3)) == b"new"


def test_a_damaged_archive_is_named(tmp_path):
    whole = tar(tmp_path / "a.tar", {f"{i}.jpg": bytes(3000) for i in range(5)}).read_bytes()
    for cut in (10_000, 512 * 8 + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut.tar is damaged after \d members"):
            listed(str(tmp_path / "cut.tar"))
    (tmp_path / "no.tar").write_bytes(b"not an archive" * 100)
    with pytest.raises(UserError, match=r"no.tar is damaged"):
        listed(str(tmp_path / "no.tar"))
    touch(tmp_path, "a#b.tar")
    with pytest.raises(UserError, match="rename it"):
        listed(str(tmp_path / "a#b.tar"))


# Parquet and lists


def test_rows_of_a_parquet_file_are_images(tmp_path):
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    struct = pa.array([{"bytes": b"1", "path": "x.jpg"}] * 12)
    pq.write_table(pa.table({"label": range(12), "picture": struct}), path)
    pq.write_table(pa.table({"file_name": ["x.jpg"]}), tmp_path / "in" / "metadata.parquet")
    table = listed(str(tmp_path / "in"))
    assert table["uri"].to_pylist() == [f"{path}#{row:010d}" for row in range(12)]
    assert table["offset"].to_pylist() == list(range(12)) and table["length"].null_count == 12


def test_the_column_of_images_is_found_or_asked_for(tmp_path):
    schema = pa.schema([("image", pa.binary()), ("thumbnail", pa.large_binary()), ("label", pa.int64())])
    assert listing.image_column(schema, None) == "image"
    assert listing.image_column(schema, "thumbnail") == "thumbnail"
    assert listing.image_column(schema, "label") is None
    with pytest.raises(UserError, match="say which are images with --column"):
        listing.image_column(pa.schema([("left", pa.binary()), ("right", pa.binary())]), None)
    with pytest.raises(UserError, match="no column 'x'; the columns are image, thumbnail, label"):
        listing.image_column(schema, "x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad.parquet is not a Parquet file or is damaged"):
        listed(str(tmp_path / "bad.parquet"))
    pq.write_table(pa.table({"label": [1]}), tmp_path / "labels.parquet")
    with pytest.raises(UserError, match="name one with --column"):
        listed(str(tmp_path / "labels.parquet"))


def test_lists_of_uris_are_sorted_and_counted_once(tmp_path):
    names = ["/abs/b.jpg", "s3://bucket/k.jpg", "rel/a.png", "/abs/b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    pq.write_table(pa.table({"url": names, "label": range(4)}), tmp_path / "list.parquet")
    expected = sorted(["/abs/b.jpg", "s3://bucket/k.jpg", f"{tmp_path}/rel/a.png"])
    for name in ("list.txt", "list.parquet"):
        source = Source(str(tmp_path / name))
        found = list(expand(first_task(source), source))
        assert found[0].rows["uri"].to_pylist() == expected
        assert sum(part.repeated for part in found) == 1
        assert found[0].rows["size"].null_count == 3 and set(found[0].rows["version"].to_pylist()) == {""}
    assert uris(str(tmp_path / "list.parquet"), column="url") == expected


# Buckets


class Bucket:
    """Keys in memory that list as S3 does, and count the requests."""

    def __init__(self, keys):
        self.keys = sorted(keys, key=str.encode)
        self.requests = 0

    def list_keys(self, base, prefix, access=None, after=""):
        folder = prefix.rstrip("/") + "/" if prefix else ""
        keys = [key for key in self.keys if key.startswith(folder)]
        start = bisect_right(keys, after.encode(), key=str.encode)
        while True:
            self.requests += 1
            page = keys[start : start + 10]
            if page:
                yield page, [1] * len(page), ["etag"] * len(page)
            start += 10
            if start >= len(keys):
                return


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.text("019afz/é-", min_size=1, max_size=8), max_size=300),
    st.sampled_from(["", "a/", "0"]),
    st.sampled_from([10, 40]),
)
def test_any_bucket_is_listed_whole_and_once(names, prefix, piece_rows):
    folder = prefix.rstrip("/") + "/" if prefix else ""
    keys = {f"{folder}{name.strip('/') or 'x'}.jpg" for name in names} | {"other.jpg", "zz.jpg"}
    bucket = Bucket(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "list_keys", bucket.list_keys)
        patch.setattr(listing, "PIECE_ROWS", piece_rows)
        source = Source(f"s3://bucket/{prefix}")
        tasks, found = [Task("keys", source.uri)], []
        while tasks:
            for part in expand(tasks.pop(), source):
                tasks += part.tasks
                found += part.rows["uri"].to_pylist() if part.rows else []
    assert sorted(found) == sorted(f"s3://bucket/{key}" for key in keys if key.startswith(folder))


def test_a_large_prefix_is_cut_into_ranges_that_each_hold_something(monkeypatch):
    bucket = Bucket(f"train/n{i // 50:04d}/img_{i % 50:05d}.jpg" for i in range(5000))
    monkeypatch.setattr(objects, "list_keys", bucket.list_keys)
    monkeypatch.setattr(listing, "PIECE_ROWS", 200)
    source = Source("s3://bucket/train/")
    waves, tasks, found = 0, [Task("keys", source.uri)], 0
    while tasks:
        waves, parts = waves + 1, [part for task in tasks for part in expand(task, source)]
        tasks = [task for part in parts for task in part.tasks]
        found += sum(len(part.rows) for part in parts if part.rows)
    assert found == 5000
    # One after the other it would be 25 pieces; empty ranges cost a request each.
    assert waves <= 12 and bucket.requests < 3 * 500
