"""An S3 server on this machine, and a proxy before it that counts requests and injects faults.

    with s3.server() as endpoint, s3.FaultProxy(endpoint) as proxy:
        s3.fill(endpoint, "bucket", {"a.jpg": b"..."})
        proxy.rule = s3.first(2, s3.SLOW_DOWN)
        s3.client(proxy.endpoint).get_object(Bucket="bucket", Key="a.jpg")
        assert proxy.requests["a.jpg"] == 3

A rule takes a request and returns the fault it meets, or None. Rules here depend on nothing but the request,
so what a test meets does not depend on the order in which threads run.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

import boto3
from botocore.config import Config

ACCESS_KEY, SECRET_KEY, REGION = "access", "secret", "us-east-1"

# The server ends when its standard input does, so none outlives a test run that was killed.
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def server() -> Iterator[str]:
    """Run moto's S3 in a process of its own; yields its endpoint once it answers."""
    command = [sys.executable, "-c", SERVE]
    quiet = {"stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quiet) as process:
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("moto's server did not start; is moto[server] installed?")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def client(endpoint: str, *, attempts: int = 4, timeout: float = 10, **options: Any):
    """A boto3 client with made-up credentials, which makes `attempts` attempts in all."""
    config = Config(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=timeout,
        read_timeout=timeout,
        s3={"addressing_style": "path"},
        **options,
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name=REGION,
        config=config,
    )


def credentials() -> dict[str, str]:
    """The variables by which clients find credentials for the server."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def environment(endpoint: str) -> dict[str, str]:
    """The same with the server itself, also as obstore's own variables have it."""
    return credentials() | {"AWS_REGION": REGION, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}


def fill(endpoint: str, bucket: str, objects: dict[str, bytes]) -> dict[str, str]:
    """Make a bucket, or take it as it is, and put objects into it; returns their etags by key."""
    store = client(endpoint)
    store.create_bucket(Bucket=bucket)
    return {
        key: store.put_object(Bucket=bucket, Key=key, Body=body)["ETag"].strip('"')
        for key, body in objects.items()
    }


# What is asked, and what goes wrong


@dataclass(frozen=True)
class Request:
    """A request as rules see it; key is "" for requests about a bucket, such as listings.

    nth counts the requests with this method and key from 1, total those of all methods and keys.
    """

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str] = field(repr=False)  # names in lower case
    nth: int = 1
    total: int = 1


@dataclass(frozen=True)
class Status:
    """An error of the store; the request does not reach the server."""

    status: int
    code: str


@dataclass(frozen=True)
class Reset:
    """The connection is reset after a share of the body; before the answer where share is None."""

    share: float | None = 0.5


@dataclass(frozen=True)
class Truncate:
    """The connection is closed in order after a share of the body, with fewer bytes than announced."""

    share: float = 0.5


@dataclass(frozen=True)
class Stall:
    """Nothing comes for some seconds after a share of the body, then the rest does."""

    seconds: float
    share: float = 0.5


Fault = Status | Reset | Truncate | Stall
Rule = Callable[[Request], Fault | None]

SLOW_DOWN = Status(503, "SlowDown")
INTERNAL_ERROR = Status(500, "InternalError")
NO_SUCH_KEY = Status(404, "NoSuchKey")
ACCESS_DENIED = Status(403, "AccessDenied")
EXPIRED_TOKEN = Status(400, "ExpiredToken")


def never(request: Request) -> None:
    """The rule of a proxy that only forwards and counts."""


def always(fault: Fault) -> Rule:
    return lambda request: fault


def first(n: int, fault: Fault) -> Rule:
    """The first n requests of each method and key fail."""
    return lambda request: fault if request.nth <= n else None


def after(n: int, fault: Fault) -> Rule:
    """All requests but the first n of all fail."""
    return lambda request: fault if request.total > n else None


def some(share: float, fault: Fault, *, seed: int = 0) -> Rule:
    """A share of the requests fails; which ones depends on seed, method, key and nth only."""

    def rule(request: Request) -> Fault | None:
        draw = random.Random(f"{seed} {request.method} {request.key} {request.nth}").random()
        return fault if draw < share else None

    return rule


def only(where: Callable[[Request], bool], rule: Rule) -> Rule:
    """A rule for the requests of which `where` is true."""
    return lambda request: rule(request) if where(request) else None


def either(*rules: Rule) -> Rule:
    """The first fault that one of the rules gives."""
    return lambda request: next((fault for rule in rules if (fault := rule(request)) is not None), None)


# The proxy


class FaultProxy:
    """An HTTP proxy before a server; a context manager, and safe to change and read while requests run.

    rule: which requests fail, and how. Changing it is what switches faults on and off during a test.
    requests: how many requests each key got; "" counts those about buckets.
    sent: how many bytes of bodies were sent to clients, by key.
    seen: all requests in the order they came; peak: the most that were in flight at once.
    """

    def __init__(self, upstream: str, rule: Rule = never) -> None:
        self.rule = rule
        self.upstream = urlsplit(upstream).netloc
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        with self._lock:
            self.requests: Counter[str] = Counter()
            self.sent: Counter[str] = Counter()
            self.seen: list[Request] = []
            self.peak = 0
            self._nth: Counter[tuple[str, str, str]] = Counter()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def enter(self, method: str, path: str, headers: dict[str, str]) -> Request:
        """Count a request that came in."""
        parts = urlsplit(path)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        with self._lock:
            self._nth[method, bucket, key] += 1
            nth, total = self._nth[method, bucket, key], len(self.seen) + 1
            request = Request(method, bucket, key, query, headers, nth, total)
            self.seen.append(request)
            self.requests[key] += 1
            self._in_flight += 1
            self.peak = max(self.peak, self._in_flight)
        return request

    def leave(self) -> None:
        """Count a request that was answered, or not."""
        with self._lock:
            self._in_flight -= 1

    def count(self, request: Request, n: int) -> None:
        """Count bytes of a body."""
        with self._lock:
            self.sent[request.key] += n


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: socket.socket, address: Any) -> None:
        self._open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):  # kept alive by clients, who would be served on
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: socket.socket, address: Any) -> None:
        # Clients that hang up are what many tests are about.
        if not isinstance(sys.exception(), OSError | http.client.HTTPException):
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def answer(self) -> None:
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = self.proxy.enter(self.command, self.path, headers)
        try:
            fault = self.proxy.rule(request)
            if isinstance(fault, Status):
                self._refuse(request, fault)
            elif fault == Reset(None):
                self._reset()
            else:
                self._forward(request, body, fault)
        finally:
            self.proxy.leave()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _refuse(self, request: Request, fault: Status) -> None:
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code><Message>injected'
            f"</Message><Key>{escape(request.key)}</Key><RequestId>0</RequestId></Error>"
        ).encode()
        self._head(fault.status, [("Content-Type", "application/xml")], len(body))
        self._send(request, body)

    def _forward(self, request: Request, body: bytes, fault: Fault | None) -> None:
        # A connection for each request: the server may close one that is idle whenever it likes.
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "content-length", "expect", "transfer-encoding"):
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            response = upstream.getresponse()
            answer = response.read()
        finally:
            upstream.close()
        own = ("connection", "content-length", "keep-alive", "transfer-encoding")
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in own]
        length = len(answer)
        if self.command == "HEAD":
            length = int(response.getheader("Content-Length", 0))
        self._head(response.status, headers, None if response.status in (204, 304) else length)
        part = len(answer) if fault is None else int(len(answer) * fault.share)
        self._send(request, answer[:part])
        match fault:
            case Reset():
                self._reset()
            case Truncate():
                self.close_connection = True
            case Stall():
                self.proxy.closing.wait(fault.seconds)
                self._send(request, answer[part:])

    def _head(self, status: int, headers: list[tuple[str, str]], length: int | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, request: Request, body: bytes) -> None:
        if self.command != "HEAD":
            self.proxy.count(request, len(body))
            self.wfile.write(body)

    def _reset(self) -> None:
        # Closing a socket that lingers for no time sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True
