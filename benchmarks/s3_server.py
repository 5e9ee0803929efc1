"""A fast S3 server of one process, for measuring what reads from it.

    python benchmarks/s3_server.py --port 9000 --keys 1000000
    python benchmarks/s3_server.py --port 9000 --folder DIR

Serves one bucket: a folder, or any number of made-up images, whose keys, etags and pixels follow from their
number, so that none is held in memory. Other buckets can be made and written to, and live in memory. Knows
ListObjectsV2, HEAD, GET with Range and If-Match, PUT with If-None-Match, and DELETE, of many keys at
once, too; checks no signature. On SIGUSR1 it prints how many objects of each bucket it has sent.
`s3_clients.py` measures clients on it, and thereby its own limits.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import hashlib
import json
import os
import re
import signal
import struct
import sys
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from time import gmtime, strftime, time
from typing import BinaryIO, Protocol
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree

REASONS = {
    100: "Continue",
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    411: "Length Required",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    501: "Not Implemented",
}
MAX_KEYS = 1000
WHOLE = 1 << 20  # larger parts of files are sent without reading them into memory


class Bucket(Protocol):
    """Objects by their number in the order of keys."""

    def __len__(self) -> int: ...
    def key(self, n: int) -> str: ...
    def size(self, n: int) -> int: ...
    def etag(self, n: int) -> str: ...
    def modified(self, n: int) -> float: ...
    def body(self, n: int) -> bytes | Path: ...


class Generated:
    """Made-up images under keys like images/07/001234.png, a hundredth of them in each folder."""

    # A PNG of 32 x 32 pixels, stored, not compressed: every image has the same size.
    SIDE, CELLS = 32, 4
    HEADER = b"\x89PNG\r\n\x1a\n"
    IHDR = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)

    def __init__(self, n: int, prefix: str = "images") -> None:
        self.n, self.prefix = n, prefix
        self.in_folder = max(1, -(-n // 100))
        self.started = time()
        self._size = len(self.body(0))

    def __len__(self) -> int:
        return self.n

    def key(self, n: int) -> str:
        return f"{self.prefix}/{n // self.in_folder:02d}/{n % self.in_folder:06d}.png"

    def size(self, n: int) -> int:
        return self._size

    def etag(self, n: int) -> str:
        return f"{n:032x}"

    def modified(self, n: int) -> float:
        return self.started

    def body(self, n: int) -> bytes:
        """4 x 4 squares of one color each; the colors are the digest of the number."""
        colors = hashlib.shake_128(n.to_bytes(8)).digest(3 * self.CELLS**2)
        wide = self.SIDE // self.CELLS
        cells = [colors[i : i + 3] * wide for i in range(0, len(colors), 3)]
        rows = (b"\0" + b"".join(cells[i : i + self.CELLS]) for i in range(0, len(cells), self.CELLS))
        packed = zlib.compress(b"".join(row * wide for row in rows), 0)
        chunks = ((b"IHDR", self.IHDR), (b"IDAT", packed), (b"IEND", b""))
        return self.HEADER + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
            for kind, data in chunks
        )


class Folder:
    """The files in a folder as they are at the start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = []
        for folder, _, names in os.walk(root):
            for path in (Path(folder) / name for name in names):
                with suppress(UnicodeEncodeError, OSError):
                    key, status = path.relative_to(root).as_posix(), path.stat()
                    key.encode()
                    rows.append((key, status.st_size, status.st_mtime))
        self.rows = sorted(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, n: int) -> str:
        return self.rows[n][0]

    def size(self, n: int) -> int:
        return self.rows[n][1]

    def etag(self, n: int) -> str:
        return hashlib.md5(repr(self.rows[n]).encode()).hexdigest()

    def modified(self, n: int) -> float:
        return self.rows[n][2]

    def body(self, n: int) -> Path:
        return self.root / self.key(n)


class Memory:
    """What was written to the server."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.objects: dict[str, tuple[bytes, str, float]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, n: int) -> str:
        return self.keys[n]

    def size(self, n: int) -> int:
        return len(self.objects[self.keys[n]][0])

    def etag(self, n: int) -> str:
        return self.objects[self.keys[n]][1]

    def modified(self, n: int) -> float:
        return self.objects[self.keys[n]][2]

    def body(self, n: int) -> bytes:
        return self.objects[self.keys[n]][0]

    def put(self, key: str, body: bytes) -> str:
        if key not in self.objects:
            bisect.insort(self.keys, key)
        etag = hashlib.md5(body).hexdigest()
        self.objects[key] = (body, etag, time())
        return etag

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            del self.keys[bisect.bisect_left(self.keys, key)]


def find(bucket: Bucket, key: str) -> int | None:
    """The number of a key, None where there is no such key."""
    n = bisect.bisect_left(range(len(bucket)), key, key=bucket.key)
    return n if n < len(bucket) and bucket.key(n) == key else None


class S3Error(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


# Listing


def listing(name: str, bucket: Bucket, query: Mapping[str, str]) -> bytes:
    """A page of ListObjectsV2."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    try:
        limit = min(int(query.get("max-keys") or MAX_KEYS), MAX_KEYS)
        token = query.get("continuation-token")
        following = None if token is None else urlsafe_b64decode(token).decode()
    except ValueError:
        raise S3Error(400, "InvalidArgument") from None
    written = _quoted if query.get("encoding-type") == "url" else _escaped
    numbers = range(len(bucket))
    if following is not None:
        n = bisect.bisect_left(numbers, following, key=bucket.key)
    elif "start-after" in query:
        n = bisect.bisect_right(numbers, query["start-after"], key=bucket.key)
    else:
        n = 0
    n = max(n, bisect.bisect_left(numbers, prefix, key=bucket.key))
    # Cut to the length of the prefix the keys are still in order, so the last match is found as fast.
    end = bisect.bisect_right(numbers, prefix, key=lambda n: bucket.key(n)[: len(prefix)])
    contents, folders = [], []
    while n < end and len(contents) + len(folders) < limit:
        key = bucket.key(n)
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut < 0:
            contents.append(
                f"<Contents><Key>{written(key)}</Key><LastModified>{_iso(bucket.modified(n))}</LastModified>"
                f"<ETag>&quot;{bucket.etag(n)}&quot;</ETag><Size>{bucket.size(n)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            n += 1
            continue
        folder = key[: cut + len(delimiter)]
        folders.append(f"<CommonPrefixes><Prefix>{written(folder)}</Prefix></CommonPrefixes>")
        n = bisect.bisect_right(numbers, folder, key=lambda n: bucket.key(n)[: len(folder)])
    more = n < end and limit > 0
    echoed = "".join(
        f"<{tag}>{written(query[name])}</{tag}>"
        for tag, name in (("Delimiter", "delimiter"), ("StartAfter", "start-after"))
        if name in query
    )
    if more:
        # The token names the key to go on with: right also where objects were written in between.
        token = urlsafe_b64encode(bucket.key(n).encode()).decode()
        echoed += f"<NextContinuationToken>{token}</NextContinuationToken>"
    if written is _quoted:
        echoed += "<EncodingType>url</EncodingType>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{name}</Name>'
        f"<Prefix>{written(prefix)}</Prefix><KeyCount>{len(contents) + len(folders)}</KeyCount>"
        f"<MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{echoed}"
        f"{''.join(contents)}{''.join(folders)}</ListBucketResult>"
    ).encode()


PLAIN = re.compile(r"[\w./-]*", re.ASCII).fullmatch
SPECIAL = re.compile(r"[&<>\x00-\x1f\x7f]")


def _quoted(text: str) -> str:
    return text if PLAIN(text) else quote(text, safe="/")


def _escaped(text: str) -> str:
    # A parser of XML would read a plain carriage return as a newline.
    return text if PLAIN(text) else SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)


def _iso(seconds: float, known: dict[int, str] = {}) -> str:  # noqa: B006
    whole = int(seconds)
    if whole not in known:
        if len(known) > 10_000:
            known.clear()
        known[whole] = strftime("%Y-%m-%dT%H:%M:%S.000Z", gmtime(whole))
    return known[whole]


# Objects


def span(header: str, size: int) -> tuple[int, int] | None:
    """The bytes that a Range header asks for as start and stop, None where it is not understood."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
    if start >= stop:
        raise S3Error(416, "InvalidRange")
    return start, stop


def unchunked(body: bytes) -> bytes:
    """The content of aws-chunked: each chunk after its size in hexadecimal, perhaps signed."""
    chunks, at = [], 0
    while True:
        line = body.index(b"\r\n", at)
        size = int(body[at:line].partition(b";")[0], 16)
        if not size:
            return b"".join(chunks)
        chunks.append(body[line + 2 : line + 2 + size])
        at = line + 2 + size + 2


class Connection(asyncio.Protocol):
    """One connection of a client: requests are answered one after the other, as they come."""

    def __init__(self, buckets: dict[str, Bucket], sent: Counter[str]) -> None:
        self.buckets, self.sent = buckets, sent
        self.received = bytearray()
        self.sending: asyncio.Task | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.sending is not None:
            self.sending.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        while self.sending is None and (end := self.received.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.received[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
            length = int(headers.get("content-length", 0))
            if headers.pop("expect", None):
                self._write(100, "")
                # Asked once only: the body arrives in several pieces.
                self.received[:end] = re.sub(rb"(?im)^expect:.*\r\n", b"", self.received[:end] + b"\r\n")[:-2]
                continue
            if len(self.received) < end + 4 + length:
                return
            body = bytes(self.received[end + 4 : end + 4 + length])
            del self.received[: end + 4 + length]
            method, target, _ = first.split(" ", 2)
            try:
                self._answer(method, target, headers, body)
            except S3Error as error:
                self._refuse(method, error)
            if headers.get("connection", "").lower() == "close" and self.sending is None:
                self.transport.close()

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        path, _, query = target.partition("?")
        name, _, key = unquote(path).removeprefix("/").partition("/")
        bucket = self.buckets.get(name)
        if "transfer-encoding" in headers:
            self.transport.close()
            raise S3Error(411, "MissingContentLength")
        if method == "PUT" and not key:
            self.buckets.setdefault(name, Memory())
            self._write(200, "Content-Length: 0\r\n")
        elif bucket is None:
            raise S3Error(404, "NoSuchBucket")
        elif method == "POST" and not key and query.partition("=")[0] == "delete":
            self._delete(bucket, body)
        elif method in ("PUT", "DELETE") and not query:
            self._change(bucket, method, key, headers, body)
        elif method == "HEAD" and not key:
            self._write(200, "Content-Length: 0\r\nx-amz-bucket-region: us-east-1\r\n")
        elif method == "GET" and not key:
            asked = dict(parse_qsl(query, keep_blank_values=True))
            if asked.get("list-type") != "2":
                raise S3Error(501, "NotImplemented")
            page = listing(name, bucket, asked)
            self._write(200, f"Content-Type: application/xml\r\nContent-Length: {len(page)}\r\n", page)
        elif method in ("GET", "HEAD"):
            self._object(bucket, method, key, headers)
            self.sent[name] += method == "GET"
        else:
            raise S3Error(501, "NotImplemented")

    def _change(self, bucket: Bucket, method: str, key: str, headers: dict[str, str], body: bytes) -> None:
        if not isinstance(bucket, Memory):
            raise S3Error(405, "MethodNotAllowed")
        if method == "DELETE":
            bucket.delete(key)
            return self._write(204, "")
        if headers.get("if-none-match") == "*" and find(bucket, key) is not None:
            raise S3Error(412, "PreconditionFailed")
        if "aws-chunked" in headers.get("content-encoding", ""):
            body = unchunked(body)
        self._write(200, f'ETag: "{bucket.put(key, body)}"\r\nContent-Length: 0\r\n')

    def _delete(self, bucket: Bucket, body: bytes) -> None:
        """Delete many keys by one request."""
        if not isinstance(bucket, Memory):
            raise S3Error(405, "MethodNotAllowed")
        keys = [node.text or "" for node in ElementTree.fromstring(body).iter() if node.tag.endswith("Key")]
        for key in keys:
            bucket.delete(key)
        done = "".join(f"<Deleted><Key>{_escaped(key)}</Key></Deleted>" for key in keys)
        page = f'<?xml version="1.0" encoding="UTF-8"?>\n<DeleteResult>{done}</DeleteResult>'.encode()
        self._write(200, f"Content-Type: application/xml\r\nContent-Length: {len(page)}\r\n", page)

    def _object(self, bucket: Bucket, method: str, key: str, headers: dict[str, str]) -> None:
        n = find(bucket, key)
        if n is None:
            raise S3Error(404, "NoSuchKey")
        etag, size = bucket.etag(n), bucket.size(n)
        wanted = headers.get("if-match", "*")
        if wanted != "*" and etag not in [tag.strip(' "') for tag in wanted.split(",")]:
            raise S3Error(412, "PreconditionFailed")
        part = span(headers["range"], size) if "range" in headers else None
        start, stop = part or (0, size)
        head = (
            f'ETag: "{etag}"\r\nLast-Modified: {formatdate(bucket.modified(n), usegmt=True)}\r\n'
            f"Accept-Ranges: bytes\r\nContent-Type: binary/octet-stream\r\nContent-Length: {stop - start}\r\n"
        )
        if part:
            head += f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        status = 206 if part else 200
        if method == "HEAD":
            return self._write(status, head)
        body = bucket.body(n)
        if isinstance(body, bytes):
            return self._write(status, head, body[start:stop] if part else body)
        try:
            file = body.open("rb")
        except OSError:
            raise S3Error(404, "NoSuchKey") from None
        if stop - start > WHOLE:
            self._write(status, head)
            self.sending = asyncio.get_running_loop().create_task(self._send(file, start, stop - start))
            return None
        with file:
            file.seek(start)
            self._write(status, head, file.read(stop - start))

    async def _send(self, file: BinaryIO, start: int, n: int) -> None:
        with file:
            try:
                await asyncio.get_running_loop().sendfile(self.transport, file, start, n)
            except OSError:
                self.transport.abort()
            finally:
                self.sending = None
        self.data_received(b"")  # what came in the meantime

    def _refuse(self, method: str, error: S3Error) -> None:
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{error.code}</Code>'
            f"<Message>{error.code}</Message><RequestId>0</RequestId></Error>"
        ).encode()
        head = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        self._write(error.status, head, b"" if method == "HEAD" else body)

    def _write(self, status: int, head: str, body: bytes = b"") -> None:
        self.transport.write(f"HTTP/1.1 {status} {REASONS[status]}\r\n{head}\r\n".encode() + body)


async def serve(port: int, buckets: dict[str, Bucket]) -> None:
    """Serve until cancelled; prints the endpoint once it answers."""
    loop = asyncio.get_running_loop()
    sent: Counter[str] = Counter()
    loop.add_signal_handler(signal.SIGUSR1, lambda: print(json.dumps(sent), flush=True))
    server = await loop.create_server(lambda: Connection(buckets, sent), "127.0.0.1", port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=9000, help="0: any that is free")
    parser.add_argument("--bucket", default="images", help="name of the bucket that is served")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path)
    source.add_argument("--keys", type=int)
    options = parser.parse_args()
    if options.keys is not None and not 0 < options.keys <= 10**8:
        parser.error("--keys must be from 1 to 100 million, which is where their numbers get more digits")
    bucket: Bucket = Folder(options.folder) if options.folder else Generated(options.keys)
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(options.port, {options.bucket: bucket}))


if __name__ == "__main__":
    sys.exit(main())
