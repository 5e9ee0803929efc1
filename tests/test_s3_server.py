"""The server that benchmarks read from answers as S3 does: against moto, by hand, and by its clients."""

import importlib.util
import io
import random
from pathlib import Path

import obstore
import pytest
import s3
from botocore.exceptions import ClientError
from obstore.store import S3Store
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s3_server, s3_clients = _load("s3_server"), _load("s3_clients")


@pytest.fixture(scope="module")
def endpoint():
    with s3_clients.server("--keys", "2500") as (endpoint, _):
        yield endpoint


def listed(client, bucket: str, page: int = 1000, **options) -> tuple[list, list]:
    """Keys and common prefixes of all pages."""
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, PaginationConfig={"PageSize": page}, **options
    )
    keys, folders = [], []
    for answer in pages:
        contents, common = answer.get("Contents", []), answer.get("CommonPrefixes", [])
        assert len(contents) + len(common) == answer["KeyCount"] <= page
        keys += [(item["Key"], item["Size"], item["ETag"]) for item in contents]
        folders += [item["Prefix"] for item in common]
    return keys, folders


def test_listings_equal_motos(endpoint, s3_endpoint):
    rng = random.Random(0)
    names = ["a", "b", "ab", "é", " ", "%", "+", "&", "😀", "", "z", "|"]
    keys = {"/".join(rng.choices(names, k=rng.randint(1, 4))) for _ in range(80)} - {""}
    keys |= {"1/x", "1/y", "10"}
    etags = [s3.fill(url, "mirrored", {key: key.encode() for key in keys}) for url in (endpoint, s3_endpoint)]
    assert etags[0] == etags[1]
    ours, motos = s3.client(endpoint), s3.client(s3_endpoint)
    cases = [
        {},
        {"Prefix": "a"},
        {"Prefix": "1/"},
        {"Prefix": "none"},
        {"Delimiter": "/"},
        {"Prefix": "a/", "Delimiter": "/"},
        {"StartAfter": "a/b"},
        {"StartAfter": "😀"},
        {"Prefix": "b", "StartAfter": "a/b"},
    ]
    for case in cases:
        expected = listed(motos, "mirrored", **case)
        for page in (1, 3, 1000):
            assert listed(ours, "mirrored", page, **case) == expected, (case, page)


def test_made_up_keys_are_in_order_and_found():
    for n in (1, 99, 100, 101, 12_345, 50_000_000):
        made = s3_server.Generated(n)
        numbers = sorted({0, n - 1, *(random.Random(n).randrange(n) for _ in range(50))})
        keys = [made.key(i) for i in numbers]
        assert keys == sorted(set(keys)) and [s3_server.find(made, key) for key in keys] == numbers
        assert s3_server.find(made, keys[-1] + "x") is None


def test_made_up_images_are_served(endpoint):
    client = s3.client(endpoint)
    keys, folders = listed(client, "images")
    assert len(keys) == 2500 and folders == []
    assert [key for key, _, _ in keys] == sorted(key for key, _, _ in keys)
    assert len(listed(client, "images", Prefix="images/", Delimiter="/")[1]) == 100
    key, size, etag = keys[1234]
    answer = client.get_object(Bucket="images", Key=key)
    body = answer["Body"].read()
    assert (len(body), answer["ETag"]) == (size, etag)
    image = Image.open(io.BytesIO(body))
    image.load()
    assert (
        image.size == (32, 32) and body != client.get_object(Bucket="images", Key=keys[0][0])["Body"].read()
    )
    head = client.head_object(Bucket="images", Key=key)
    assert (head["ContentLength"], head["ETag"]) == (size, etag)


@pytest.mark.parametrize("server", ["ours", "moto"])
def test_ranges_and_matches(server, endpoint, s3_endpoint):
    endpoint = {"ours": endpoint, "moto": s3_endpoint}[server]
    body = bytes(range(100))
    (etag,) = s3.fill(endpoint, "ranges", {"a b/é.jpg": body}).values()
    client, key = s3.client(endpoint, attempts=1), {"Bucket": "ranges", "Key": "a b/é.jpg"}
    for text, part in (("5-9", body[5:10]), ("90-", body[90:]), ("-3", body[97:]), ("95-200", body[95:])):
        answer = client.get_object(**key, Range=f"bytes={text}", IfMatch=etag)
        assert answer["Body"].read() == part and answer["ContentLength"] == len(part)
        assert answer["ContentRange"].endswith("/100")
    errors = [({"Range": "bytes=100-"}, 416), ({"IfMatch": '"x"'}, 412), ({"Key": "gone"}, 404)]
    for options, status in errors:
        with pytest.raises(ClientError) as error:
            client.get_object(**{**key, **options})
        assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    with pytest.raises(ClientError):
        client.head_object(Bucket="ranges", Key="gone")
    store = S3Store(
        "ranges",
        endpoint=endpoint,
        access_key_id=s3.ACCESS_KEY,
        secret_access_key=s3.SECRET_KEY,
        client_options={"allow_http": True},
    )
    options = {"range": (5, 10), "if_match": etag}
    assert bytes(obstore.get(store, key["Key"], options=options).bytes()) == body[5:10]
    assert [item["path"] for chunk in obstore.list(store, offset="a") for item in chunk] == [key["Key"]]
    assert list(obstore.list(store, offset=key["Key"])) in ([], [[]])
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.get(store, key["Key"], options={"if_match": '"x"'})


def test_folders_are_served(tmp_path):
    large = random.Random(1).randbytes(3 << 20)  # sent without being read whole
    for name, body in {"in/a b.jpg": b"small", "in/é.tar": large, "top": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    with s3_clients.server("--folder", str(tmp_path)) as (endpoint, _):
        client = s3.client(endpoint)
        keys = [(key, size) for key, size, _ in listed(client, "images")[0]]
        assert keys == [("in/a b.jpg", 5), ("in/é.tar", len(large)), ("top", 0)]
        for _ in range(2):
            assert client.get_object(Bucket="images", Key="in/é.tar")["Body"].read() == large
            assert client.get_object(Bucket="images", Key="in/a b.jpg")["Body"].read() == b"small"
        part = client.get_object(Bucket="images", Key="in/é.tar", Range=f"bytes=7-{2 << 20}")
        assert part["Body"].read() == large[7 : (2 << 20) + 1]
        with pytest.raises(ClientError):
            client.put_object(Bucket="images", Key="new", Body=b"x")


def test_conditional_puts_and_deletes_of_many(endpoint):
    client = s3.client(endpoint)
    client.create_bucket(Bucket="conditional")
    client.put_object(Bucket="conditional", Key="a", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="conditional", Key="a", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket="conditional", Key="a")["Body"].read() == b"first"
    for key in ("b", "c&d", "e"):
        client.put_object(Bucket="conditional", Key=key, Body=b"x")
    gone = {"Objects": [{"Key": "a"}, {"Key": "c&d"}, {"Key": "never"}]}
    answer = client.delete_objects(Bucket="conditional", Delete=gone)
    assert {one["Key"] for one in answer["Deleted"]} >= {"a", "c&d"}
    assert [key for key, *_ in listed(client, "conditional")[0]] == ["b", "e"]


def test_it_tells_what_it_has_sent():
    import json
    import os
    import signal
    import subprocess
    import sys

    words = [sys.executable, str(BENCHMARKS / "s3_server.py"), "--port", "0", "--keys", "3"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            client = s3.client(server.stdout.readline().strip())
            keys = [key for key, *_ in listed(client, "images")[0]]
            for key in (*keys, keys[0]):
                client.get_object(Bucket="images", Key=key)["Body"].read()
            os.kill(server.pid, signal.SIGUSR1)
            assert json.loads(server.stdout.readline()) == {"images": 4}
        finally:
            server.kill()
