"""Objects on a real S3 server, through a proxy that breaks requests: complete, or an error that says why."""

import pytest
import s3

from selective_ray import objects
from selective_ray.errors import UserError
from selective_ray.objects import Access, Changed, Request, Unreachable, read

BODIES = {f"im/{i:02d} é#%41.jpg": bytes([i]) * 1000 * (i + 1) for i in range(12)}
KEY = "im/03 é#%41.jpg"
URI = f"s3://objects-test/{KEY}"


@pytest.fixture(scope="module")
def store(s3_endpoint):
    """A proxy before a bucket with BODIES."""
    s3.fill(s3_endpoint, "objects-test", BODIES)
    with pytest.MonkeyPatch.context() as patch, s3.FaultProxy(s3_endpoint) as proxy:
        for name, value in s3.credentials().items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture
def proxy(store):
    store.clear()
    yield store
    store.rule = s3.never


def access(proxy, silence=1.0, attempts=2):
    return Access(proxy.endpoint, silence, attempts)


def etag(proxy):
    return objects.version(URI, access(proxy))[1]


def test_keys_are_listed_in_order_with_size_and_version(proxy):
    (keys, sizes, versions), *rest = objects.list_keys("s3://objects-test", "im/", access(proxy))
    assert not rest and keys == sorted(BODIES) and sizes == [len(BODIES[key]) for key in keys]
    assert versions[keys.index(KEY)] == etag(proxy)
    (keys, *_), *rest = objects.list_keys("s3://objects-test", "im/", access(proxy), after=KEY)
    assert keys == sorted(BODIES)[4:]


def test_an_object_is_read_whole_or_in_part_under_its_version(proxy):
    version = etag(proxy)
    assert read(Request(URI, version), access(proxy)) == BODIES[KEY]
    assert read(Request(URI, version, 10, 30), access(proxy)) == BODIES[KEY][10:30]
    for request in (
        Request(URI, '"another"'),
        Request(URI, version, 10, 10_000_000),
        Request(URI, version, 10_000_000, 10_000_010),
    ):
        with pytest.raises(Changed):
            read(request, access(proxy))
    with pytest.raises(FileNotFoundError):
        read(Request("s3://objects-test/im/none.jpg"), access(proxy))
    with pytest.raises(UserError, match="there is no bucket s3://no-such-bucket"):
        read(Request("s3://no-such-bucket/x"), access(proxy))


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (s3.SLOW_DOWN, 4),
        (s3.INTERNAL_ERROR, 1),
        (s3.Reset(0.5), 4),
        (s3.Reset(None), 2),
        (s3.Truncate(0.5), 4),
        (s3.Stall(4.0), 1),
    ],
    ids=str,
)
def test_passing_faults_are_ridden_out(proxy, fault, times):
    request = Request(URI, etag(proxy))
    proxy.clear()
    proxy.rule = s3.first(times, fault)
    assert read(request, access(proxy)) == BODIES[KEY]
    assert proxy.requests[KEY] == times + 1


@pytest.mark.parametrize("fault", [s3.SLOW_DOWN, s3.Truncate(0.5)], ids=str)
def test_lasting_faults_end_with_their_name(proxy, fault):
    proxy.rule = s3.always(fault)
    with pytest.raises(Unreachable, match=r"in 9 attempts \((SlowDown|the connection broke off)\)"):
        read(Request(URI), access(proxy))
    assert proxy.requests[KEY] == 9


def test_words_and_numbers_of_a_key_are_not_taken_for_the_store_s(proxy):
    """An error quotes the key and the milliseconds; a busy store must not make an image a changed one."""
    key = "im/416 status InvalidRange ExpiredToken NoSuchBucket 416.jpg"
    s3.fill(f"http://{proxy.upstream}", "objects-test", {key: b"body"})
    uri = f"s3://objects-test/{key}"
    assert read(Request(uri), access(proxy)) == b"body"
    proxy.rule = s3.always(s3.SLOW_DOWN)
    with pytest.raises(Unreachable, match="SlowDown"):
        read(Request(uri), access(proxy))
    proxy.rule = s3.always(s3.NO_SUCH_KEY)
    with pytest.raises(FileNotFoundError):
        read(Request(uri), access(proxy))


def test_refused_credentials_end_the_run_and_denied_access_the_image(proxy):
    proxy.rule = s3.always(s3.EXPIRED_TOKEN)
    with pytest.raises(
        UserError, match=r"does not accept the credentials \(ExpiredToken\); renew them"
    ) as caught:
        read(Request(URI), access(proxy))
    # Asked twice, the second time with what the chain holds by then.
    assert proxy.requests[KEY] == 2
    for secret in (s3.ACCESS_KEY, s3.SECRET_KEY):
        assert f" {secret}" not in str(caught.value)
    proxy.rule = s3.always(s3.ACCESS_DENIED)
    with pytest.raises(PermissionError):
        read(Request(URI), access(proxy))


def test_a_listing_that_breaks_off_goes_on_after_its_last_key(proxy, monkeypatch):
    many = {f"many/{i:04d}": b"" for i in range(25)}
    s3.fill(f"http://{proxy.upstream}", "objects-test", many)
    monkeypatch.setattr(objects, "PAGE", 10)
    proxy.rule = s3.some(0.5, s3.Truncate(0.3), seed=3)
    found = [
        key for keys, *_ in objects.list_keys("s3://objects-test", "many/", access(proxy)) for key in keys
    ]
    assert found == sorted(many)


def test_what_a_run_does_with_its_own_objects(proxy):
    how, folder = access(proxy), "s3://objects-test/run"
    objects.write(f"{folder}/a/1", b"one", how)
    objects.write(f"{folder}/a/1", b"late", how, replace=False)
    assert read(Request(f"{folder}/a/1"), how) == b"one"
    objects.write(f"{folder}/a/1", b"new", how)
    assert read(Request(f"{folder}/a/1"), how) == b"new"
    objects.write(f"{folder}/a/b/2", b"two", how)
    assert objects.names(f"{folder}/a", how) == ["1"] and objects.names(f"{folder}/none", how) == []
    assert objects.exists(f"{folder}/a/1", how) and not objects.exists(f"{folder}/a/b", how)
    objects.delete(f"{folder}/none", how)
    objects.delete_folder(folder, how)
    assert objects.names(f"{folder}/a", how) == objects.names(f"{folder}/a/b", how) == []


def test_an_object_is_read_at_any_place(proxy):
    with objects.open_seekable(URI, access(proxy), buffer_size=512) as file:
        assert file.seek(5) == 5 and file.read(3) == BODIES[KEY][5:8]
        assert file.seek(-2, 2) == len(BODIES[KEY]) - 2 and file.read() == BODIES[KEY][-2:]


def test_keys_that_urls_bend_are_listed_and_read_as_they_are(proxy, monkeypatch):
    """Empty and dotted parts, and control characters; of them, a moto server refuses to store the last."""
    keys = ["a//b.jpg", "a/./c.jpg", "a/b.jpg", "a/é +%2F.jpg", "a/z//.jpg", "b/../d.jpg", "plain.jpg"]
    bodies = {f"odd/{key}": key.encode() for key in keys} | {f"odd/n/{i}.jpg": b"" for i in range(7)}
    s3.fill(f"http://{proxy.upstream}", "objects-test", bodies)
    for size in (1000, 3):
        monkeypatch.setattr(objects, "PAGE", size)
        pages = list(objects.list_keys("s3://objects-test", "odd", access(proxy)))
        assert [key for names, *_ in pages for key in names] == sorted(bodies, key=str.encode)
    for names, _, versions in pages:
        for key, version in zip(names, versions, strict=True):
            request = Request(f"s3://objects-test/{key}", version)
            assert read(request, access(proxy)) == bodies[key]
            if len(bodies[key]) > 3:
                part = Request(f"s3://objects-test/{key}", version, 1, 3)
                assert read(part, access(proxy)) == bodies[key][1:3]
            with pytest.raises(Changed):
                read(Request(f"s3://objects-test/{key}", '"other"'), access(proxy))
    with pytest.raises(FileNotFoundError):
        read(Request("s3://objects-test/odd//none.jpg"), access(proxy))


def test_a_key_that_begins_with_a_slash_is_not_the_one_without(proxy):
    bodies = {"/lead.jpg": b"slash", "lead.jpg": b"plain", "x/y.jpg": b"other"}
    s3.fill(f"http://{proxy.upstream}", "lead-test", bodies)
    found = [key for names, *_ in objects.list_keys("s3://lead-test", "", access(proxy)) for key in names]
    assert found == sorted(bodies)
    for key, body in bodies.items():
        assert read(Request(f"s3://lead-test/{key}"), access(proxy)) == body
