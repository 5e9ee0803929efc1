"""What clients of S3 cost: CPU time of a GET, and keys listed in a second, against `s3_server.py`.

    python benchmarks/s3_clients.py --keys 1000000 --gets 10000

The server runs in a process of its own; its CPU time is given too, since where it comes near the time on the
clock, the server was the limit. Needs boto3, obstore and, for Arrow listings, arro3-core.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3
import obstore
from botocore.config import Config
from obstore.store import S3Store

BUCKET = "images"
CREDENTIALS = {"aws_access_key_id": "access", "aws_secret_access_key": "secret"}


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, int]]:
    """Run s3_server.py; yields its endpoint and process id."""
    command = [sys.executable, Path(__file__).with_name("s3_server.py"), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.kill()


def boto(endpoint: str, connections: int = 16):
    config = Config(max_pool_connections=connections, s3={"addressing_style": "path"})
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config, **CREDENTIALS)


def store(endpoint: str) -> S3Store:
    options = {"allow_http": True}
    return S3Store(BUCKET, endpoint=endpoint, region="us-east-1", client_options=options, **CREDENTIALS)


# GET


def get_boto3(endpoint: str, keys: list[str], threads: int) -> int:
    client = boto(endpoint, threads)

    def get(key: str) -> int:
        return len(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(get, keys))


def get_obstore(endpoint: str, keys: list[str], threads: int) -> int:
    bucket = store(endpoint)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda key: len(obstore.get(bucket, key).bytes()), keys))


def get_obstore_async(endpoint: str, keys: list[str], in_flight: int) -> int:
    bucket, rest = store(endpoint), iter(keys)

    async def worker() -> int:
        n = 0
        for key in rest:
            n += len(await (await obstore.get_async(bucket, key)).bytes_async())
        return n

    async def main() -> int:
        return sum(await asyncio.gather(*(worker() for _ in range(in_flight))))

    return asyncio.run(main())


# List


def list_boto3(endpoint: str) -> int:
    pages = boto(endpoint).get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return sum(len([item["Key"] for item in page["Contents"]]) for page in pages)


def list_obstore(endpoint: str) -> int:
    chunks = obstore.list(store(endpoint), chunk_size=10_000)
    return sum(len([item["path"] for item in chunk]) for chunk in chunks)


def list_obstore_arrow(endpoint: str) -> int:
    return sum(
        batch.num_rows for batch in obstore.list(store(endpoint), chunk_size=10_000, return_arrow=True)
    )


def measured(name: str, n: int, unit: str, pid: int, call: Callable[[], int]) -> None:
    """Print rate and CPU time of a call, which returns how many keys or bytes it got."""
    before, served, started = _cpu(), _cpu_of(pid), time.monotonic()
    got = call()
    seconds, cpu, served = time.monotonic() - started, _cpu() - before, _cpu_of(pid) - served
    print(
        f"{name:34} {n / seconds:9,.0f} {unit}/s   CPU per {1 if unit == 'GET' else 1000} {unit}: client "
        f"{cpu / n * (1000 if unit == 'GET' else 1e6):.3f} ms, server "
        f"{served / n * (1000 if unit == 'GET' else 1e6):.3f} ms   ({got:,} in {seconds:.1f} s)",
        flush=True,
    )


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--gets", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with server("--keys", str(options.keys)) as (endpoint, pid):
        pages = boto(endpoint).get_paginator("list_objects_v2")
        first = pages.paginate(Bucket=BUCKET, PaginationConfig={"MaxItems": options.gets})
        keys = [item["Key"] for page in first for item in page["Contents"]]
        for _ in range(options.repeats):
            for name, get, together in (
                ("boto3, 1 thread", get_boto3, 1),
                ("boto3, 16 threads", get_boto3, 16),
                ("obstore, 1 thread", get_obstore, 1),
                ("obstore, 16 threads", get_obstore, 16),
                ("obstore async, 32 in flight", get_obstore_async, 32),
            ):
                measured(name, len(keys), "GET", pid, lambda get=get, n=together: get(endpoint, keys, n))
            for name, listed in (
                ("boto3 paginator", list_boto3),
                ("obstore.list, dicts", list_obstore),
                ("obstore.list, Arrow", list_obstore_arrow),
            ):
                if listed is list_obstore_arrow and importlib.util.find_spec("arro3") is None:
                    continue
                measured(name, options.keys, "keys", pid, lambda listed=listed: listed(endpoint))


if __name__ == "__main__":
    main()
