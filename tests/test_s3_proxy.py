"""The proxy forwards what it should, fails as it is told to, and counts both."""

import http.client
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlsplit

import obstore
import pyarrow.fs
import pytest
import s3
from botocore.exceptions import ClientError, HTTPClientError
from obstore.store import S3Store

BUCKET = "proxied"
BODY = bytes(range(256)) * 40
KEYS = ["a/1.jpg", "a/2.jpg", "b c/ä+&%41.jpg", "empty"]


@pytest.fixture(scope="module")
def filled(s3_endpoint):
    etags = s3.fill(s3_endpoint, BUCKET, {key: b"" if key == "empty" else BODY for key in KEYS})
    return s3_endpoint, etags


@pytest.fixture
def proxy(filled):
    with s3.FaultProxy(filled[0]) as proxy:
        yield proxy


def get(proxy: s3.FaultProxy, key: str, **options) -> bytes:
    return s3.client(proxy.endpoint, **options).get_object(Bucket=BUCKET, Key=key)["Body"].read()


# moto turns away what is not signed, but does not check by whom.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=access/20260101/us-east-1/s3/aws4_request"}


def raw(proxy: s3.FaultProxy, key: str, timeout: float = 10) -> http.client.HTTPResponse:
    """An answer of the proxy, its body not yet read, by a client that retries nothing."""
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=timeout)
    connection.request("GET", f"/{BUCKET}/{quote(key)}", headers=SIGNED)
    return connection.getresponse()


def code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return error.value.response["Error"]["Code"]


# Forwarding


def test_boto3_sees_the_server(proxy, filled):
    etags, client = filled[1], s3.client(proxy.endpoint)
    for key in KEYS:
        assert get(proxy, key) == (b"" if key == "empty" else BODY)
    head = client.head_object(Bucket=BUCKET, Key="a/1.jpg")
    assert (head["ContentLength"], head["ETag"].strip('"')) == (len(BODY), etags["a/1.jpg"])
    part = client.get_object(Bucket=BUCKET, Key="a/1.jpg", Range="bytes=5-9", IfMatch=etags["a/1.jpg"])
    assert part["Body"].read() == BODY[5:10] and part["ResponseMetadata"]["HTTPStatusCode"] == 206
    with pytest.raises(ClientError) as error:
        client.get_object(Bucket=BUCKET, Key="a/1.jpg", IfMatch='"other"')
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    with pytest.raises(ClientError) as error:
        client.get_object(Bucket=BUCKET, Key="gone")
    assert code(error) == "NoSuchKey"


def test_listings_come_in_pages(proxy):
    pages = s3.client(proxy.endpoint).get_paginator("list_objects_v2")
    listed = list(pages.paginate(Bucket=BUCKET, Prefix="a/", PaginationConfig={"PageSize": 1}))
    assert [item["Key"] for page in listed for item in page["Contents"]] == ["a/1.jpg", "a/2.jpg"]
    assert proxy.requests[""] == len(listed) == 2
    assert [request.query["prefix"] for request in proxy.seen] == ["a/", "a/"]


def test_objects_are_written_and_removed(proxy, filled):
    client = s3.client(proxy.endpoint)
    client.put_object(Bucket=BUCKET, Key="new/1", Body=BODY)
    client.put_object(Bucket=BUCKET, Key="new/2", Body=b"")
    assert s3.client(filled[0]).get_object(Bucket=BUCKET, Key="new/1")["Body"].read() == BODY
    gone = [{"Key": "new/1"}, {"Key": "new/2"}]
    assert len(client.delete_objects(Bucket=BUCKET, Delete={"Objects": gone})["Deleted"]) == 2
    assert {request.method for request in proxy.seen} == {"PUT", "POST"}


def test_chunked_bodies_arrive_whole(proxy, filled):
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=10)
    for key in ("chunked/1", "chunked/2"):  # the second on the same connection
        chunks = iter([BODY[:1000], BODY[1000:]])
        connection.request("PUT", f"/{BUCKET}/{key}", chunks, SIGNED, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 200 and response.read() is not None
        body = s3.client(filled[0]).get_object(Bucket=BUCKET, Key=key)["Body"].read()
        assert body == BODY
        s3.client(filled[0]).delete_object(Bucket=BUCKET, Key=key)


def test_pyarrow_sees_the_server(proxy):
    files = pyarrow.fs.S3FileSystem(
        access_key=s3.ACCESS_KEY,
        secret_key=s3.SECRET_KEY,
        region=s3.REGION,
        endpoint_override=urlsplit(proxy.endpoint).netloc,
        scheme="http",
    )
    listed = files.get_file_info(pyarrow.fs.FileSelector(f"{BUCKET}/a"))
    assert sorted(info.path for info in listed) == [f"{BUCKET}/a/1.jpg", f"{BUCKET}/a/2.jpg"]
    with files.open_input_file(f"{BUCKET}/a/1.jpg") as file:
        assert file.read_at(7, 300) == BODY[300:307] and file.read() == BODY
    with files.open_output_stream(f"{BUCKET}/arrow") as file:
        file.write(BODY)
    assert get(proxy, "arrow") == BODY
    files.delete_file(f"{BUCKET}/arrow")


def store(proxy: s3.FaultProxy, **options) -> S3Store:
    return S3Store(
        BUCKET,
        endpoint=proxy.endpoint,
        access_key_id=s3.ACCESS_KEY,
        secret_access_key=s3.SECRET_KEY,
        region=s3.REGION,
        client_options={"allow_http": True, "timeout": "5s"},
        **options,
    )


def test_obstore_sees_the_server(proxy, filled):
    etag = filled[1]["a/1.jpg"]
    listed = [item["path"] for chunk in obstore.list(store(proxy), prefix="a") for item in chunk]
    assert listed == ["a/1.jpg", "a/2.jpg"]
    assert bytes(obstore.get_range(store(proxy), "a/1.jpg", start=5, end=9)) == BODY[5:9]
    got = obstore.get(store(proxy), "a/1.jpg", options={"if_match": f'"{etag}"'})
    assert bytes(got.bytes()) == BODY
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.get(store(proxy), "a/1.jpg", options={"if_match": '"other"'})


# Faults


def test_bursts_are_over_after_n_requests_of_each_key(proxy):
    proxy.rule = s3.first(2, s3.SLOW_DOWN)
    for key in ("a/1.jpg", "a/2.jpg"):
        assert get(proxy, key) == BODY
        assert proxy.requests[key] == 3
    assert proxy.sent["a/1.jpg"] == proxy.sent["a/2.jpg"] > len(BODY)
    proxy.clear()
    with pytest.raises(ClientError) as error:
        get(proxy, "a/1.jpg", attempts=2)
    assert code(error) == "SlowDown" and proxy.requests["a/1.jpg"] == 2


def test_a_share_fails_whatever_the_order():
    rule = s3.some(0.3, s3.INTERNAL_ERROR, seed=4)
    requests = [s3.Request("GET", BUCKET, str(i), {}, {}, nth) for i in range(500) for nth in (1, 2)]
    failed = [rule(request) is not None for request in requests]
    assert failed == [rule(request) is not None for request in reversed(requests)][::-1]
    assert 240 <= sum(failed) <= 360
    assert failed[::2] != failed[1::2]  # a second attempt draws again
    other = s3.some(0.3, s3.INTERNAL_ERROR, seed=5)
    assert failed != [other(request) is not None for request in requests]


def test_resets_break_the_body_or_come_before_it(proxy):
    proxy.rule = s3.always(s3.Reset(0.25))
    response = raw(proxy, "a/1.jpg")
    assert response.getheader("Content-Length") == str(len(BODY))
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        response.read()
    assert proxy.sent["a/1.jpg"] == len(BODY) // 4
    with pytest.raises(HTTPClientError):
        get(proxy, "a/1.jpg")
    proxy.rule = s3.always(s3.Reset(None))
    with pytest.raises(ConnectionError):
        raw(proxy, "a/1.jpg")
    proxy.rule = s3.first(1, s3.Reset(None))
    proxy.clear()
    assert get(proxy, "a/2.jpg") == BODY and proxy.requests["a/2.jpg"] == 2


def test_truncated_bodies_end_in_order(proxy):
    proxy.rule = s3.always(s3.Truncate(0.5))
    with pytest.raises(http.client.IncompleteRead) as error:
        raw(proxy, "a/1.jpg").read()
    assert error.value.partial == BODY[: len(BODY) // 2]
    with pytest.raises(HTTPClientError):
        get(proxy, "a/1.jpg")


def test_stalls_pass_or_outlast_the_client(proxy):
    proxy.rule = s3.always(s3.Stall(0.3))
    assert raw(proxy, "a/1.jpg").read() == BODY
    proxy.rule = s3.always(s3.Stall(60))
    response = raw(proxy, "a/1.jpg", timeout=0.2)
    assert response.read(100) == BODY[:100]
    with pytest.raises(TimeoutError):
        response.read()  # and leaving the proxy does not wait for the minute to pass


def test_listed_keys_may_be_gone_and_tokens_expire(proxy):
    proxy.rule = s3.only(lambda request: request.key == "a/2.jpg", s3.always(s3.NO_SUCH_KEY))
    assert get(proxy, "a/1.jpg") == BODY
    with pytest.raises(ClientError) as error:
        get(proxy, "a/2.jpg")
    assert code(error) == "NoSuchKey" and proxy.requests["a/2.jpg"] == 1
    proxy.clear()
    proxy.rule = s3.after(2, s3.EXPIRED_TOKEN)
    assert get(proxy, "a/1.jpg") == get(proxy, "a/2.jpg") == BODY
    with pytest.raises(ClientError) as error:
        get(proxy, "a/1.jpg", attempts=1)
    assert code(error) == "ExpiredToken"
    proxy.rule = s3.never
    assert get(proxy, "a/1.jpg") == BODY


def test_the_first_of_several_rules_wins():
    request = s3.Request("GET", BUCKET, "a", {}, {}, nth=1, total=9)
    stall = s3.Stall(1)
    assert s3.either(s3.after(9, stall), s3.first(1, s3.SLOW_DOWN))(request) == s3.SLOW_DOWN
    assert s3.either(s3.after(8, stall), s3.first(1, s3.SLOW_DOWN))(request) == stall
    assert s3.either(s3.never)(request) is None


def test_counts_are_exact_from_many_threads(proxy):
    client = s3.client(proxy.endpoint, max_pool_connections=8)
    proxy.rule = s3.first(1, s3.SLOW_DOWN)

    def fetch(i: int) -> int:
        return len(client.get_object(Bucket=BUCKET, Key=KEYS[i % 2])["Body"].read())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, range(40))) == [len(BODY)] * 40
    assert sum(proxy.requests.values()) == len(proxy.seen) == 42
    assert sorted(request.total for request in proxy.seen) == list(range(1, 43))
    assert 2 <= proxy.peak <= 8


def test_a_closed_proxy_serves_nobody(filled):
    with s3.FaultProxy(filled[0]) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=5)
        connection.request("GET", f"/{BUCKET}/{KEYS[0]}", headers=SIGNED)
        assert connection.getresponse().read() == BODY
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.request("GET", f"/{BUCKET}/{KEYS[0]}", headers=SIGNED)
        connection.getresponse().read()
