"""Reading images as listed: slots, archives, Parquet and versions, in files of every kind."""

import numpy as np
import paint
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from hypothesis import given, settings
from hypothesis import strategies as st
from test_listing import listed, tar

from selective_ray import listing, objects, reading
from selective_ray.errors import UserError
from selective_ray.images import decode
from selective_ray.objects import Access
from selective_ray.reading import NO_DIGEST, decoded, fetch


def rows_of(uris) -> pa.Table:
    """Rows of a listing that knows nothing but the uris."""
    return listing.table([str(uri) for uri in uris], [None] * len(uris), [""] * len(uris))


def test_images_keep_their_places_and_say_why_not(tmp_path):
    sound = sorted(paint.kinds(tmp_path / "kinds").values())[:2]
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    uris = [
        sound[0],
        tmp_path / "empty.jpg",
        tmp_path / "gone.jpg",
        sound[1],
        tmp_path,
        tmp_path / "text.jpg",
    ]
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    found = list(decoded(rows_of(uris), size=16, crop=0.875))
    assert [reason for _, _, reason in found] == [
        *("", "empty file", "file not found", "", "cannot be read: Is a directory", "not an image"),
    ]
    for (pixels, digest, reason), uri in zip(found, uris, strict=True):
        if not reason:
            assert np.array_equal(pixels, decode(uri.read_bytes(), size=16, crop=0.875))
        assert (pixels is None) == bool(reason)
        assert (digest == NO_DIGEST) == (reason in ("file not found", "cannot be read: Is a directory"))
    assert before == {path: path.read_bytes() for path in before}


def test_a_file_that_changed_since_the_listing_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    rows = listed(str(tmp_path))
    assert list(fetch(rows)) == [b"one"]
    (tmp_path / "a.jpg").write_bytes(b"other")
    assert [str(reason) for reason in fetch(rows)] == ["changed since it was listed"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    st.sampled_from([0, 100, 1000, 10**6]),
    st.sampled_from([10, 4000, 10**9]),
    st.randoms(use_true_random=False),
)
def test_members_come_out_whole_however_requests_are_joined(tmp_path_factory, sizes, gap, span, rng):
    bodies = {f"{i:03d}.jpg": bytes([i]) * size for i, size in enumerate(sizes)}
    path = tar(tmp_path_factory.mktemp("tar") / "a.tar", bodies)
    rows = listed(str(path))
    order = rng.sample(range(len(rows)), len(rows)) if rng.random() < 0.5 else range(len(rows))
    rows = rows.take(pa.array(order))
    requests = []

    def counting(request, access):
        requests.append(request)
        return objects.read(request, access)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "GAP_BYTES", gap)
        patch.setattr(reading, "SPAN_BYTES", span)
        assert list(fetch(rows, read=counting)) == [list(bodies.values())[i] for i in order]
    if gap == 10**6 and span == 10**9 and list(order) == sorted(order):
        assert len(requests) == 1


@pytest.mark.parametrize("kept_bytes", [1, 1 << 30])
def test_rows_of_parquet_come_out_in_any_order(tmp_path, monkeypatch, kept_bytes):
    monkeypatch.setattr(reading, "ROW_GROUP_BYTES", kept_bytes)
    reading._row_group.cache_clear()
    bodies = [bytes([i % 256]) * (i + 1) for i in range(300)]
    values = [{"bytes": body, "path": None} for body in bodies]
    values[7] = {"bytes": None, "path": "elsewhere.jpg"}
    table = pa.table({"image": values, "label": range(300)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=128)
    pq.write_table(pa.table({"picture": bodies}), tmp_path / "b.parquet", row_group_size=1000)
    rows = listed(str(tmp_path))
    order = np.random.default_rng(0).permutation(len(rows))
    for some in (np.arange(600), np.array([299, 300, 5]), order):
        for got, place in zip(fetch(rows.take(pa.array(some))), some, strict=True):
            if place == 7:
                assert str(got) == "no image bytes in its row"
            else:
                assert got == bodies[place % 300]
    pq.write_table(table.slice(1), tmp_path / "a.parquet")
    assert {str(reason) for reason in fetch(rows.slice(0, 300))} == {"changed since it was listed"}


def test_reading_runs_ahead_within_bounds(tmp_path, monkeypatch):
    """No more bytes are read ahead than allowed, and no fewer requests than there is room for."""
    monkeypatch.setattr(reading, "AHEAD_BYTES", 5000)
    for i in range(40):
        (tmp_path / f"{i:02d}.jpg").write_bytes(bytes(1000))
    asked, taken, most = [], 0, 0

    def counting(request, access):
        asked.append(request)
        return objects.read(request, access)

    for taken, data in enumerate(fetch(listed(str(tmp_path)), read=counting)):
        assert len(data) == 1000
        most = max(most, len(asked) - taken)
    assert taken == 39 and 2 <= most <= 6


def test_an_image_that_stays_out_of_reach_is_rejected_unless_the_whole_store_is(s3_endpoint, monkeypatch):
    s3.fill(s3_endpoint, "reading-test", {"a.jpg": b"a", "b.jpg": b"b"})
    with s3.FaultProxy(s3_endpoint) as proxy:
        for name, value in s3.environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        access = Access(None, 1.0, 0)
        rows = rows_of(["s3://reading-test/a.jpg", "s3://reading-test/b.jpg"])
        proxy.rule = s3.only(lambda request: request.key == "a.jpg", s3.always(s3.SLOW_DOWN))
        bad, good = fetch(rows, access)
        assert good == b"b" and "did not deliver it in 3 attempts (SlowDown)" in str(bad)
        proxy.rule = s3.always(s3.SLOW_DOWN)
        with pytest.raises(UserError, match=r"cannot be reached: .*run the same command again"):
            list(fetch(rows, access))


def test_a_damaged_member_spoils_no_neighbor(tmp_path):
    good = paint.png(paint.picture())
    path = tar(tmp_path / "a.tar", {"1.png": good, "2.png": b"bad", "3.png": good})
    found = list(decoded(listed(str(path)), size=8, crop=1.0))
    assert [reason for *_, reason in found] == ["", "not an image", ""]
    assert np.array_equal(found[0][0], found[2][0]) and found[0][1] == found[2][1] != found[1][1]
