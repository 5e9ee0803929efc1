"""Objects of a store, by uri: S3, GCS and Azure through obstore, and local files; listed, opened and read.

Credentials come from the standard chain of each store and stay in this process: nothing here puts them into
a message, a uri or a table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import pyarrow as pa

from selective_ray.errors import UsageError, UserError

if TYPE_CHECKING:  # takes a tenth of a second, and local files never need it
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
# What a store answers when the one who asks is the problem, not the object.
_CREDENTIALS = re.compile(
    r"<Code>(ExpiredToken|TokenRefreshRequired|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|"
    r"RequestTimeTooSkewed|RequestExpired|UnauthorizedAccess|AuthenticationFailed)</Code>|"
    # The answer to HEAD has no body to say more.
    r"performing HEAD .* 400 Bad Request"
)
# The library's own attempts are repeated so often: it does not try again where a body breaks off.
ROUNDS = 3
# obstore drops or refuses empty and dotted parts of a key, and refuses control characters.
_ODD = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
# Keys of one answer of a store.
PAGE = 1000
# Errors also quote keys and times, so that a bare number or word may be of those.
_TOO_SHORT = re.compile(r"status code: 416|<Code>InvalidRange</Code>")


@dataclass(frozen=True)
class Access:
    """How stores are reached: an S3-compatible endpoint, seconds of silence that end an attempt, attempts."""

    endpoint_url: str | None = None
    silence_seconds: float = 20.0
    attempts: int = 6


# The stores themselves, with patience for a busy one.
DIRECT = Access()


@dataclass(frozen=True)
class Request:
    """Bytes [start, stop) of an object as it was listed; stop None: to its end; version "": any."""

    uri: str
    version: str = ""
    start: int = 0
    stop: int | None = None


class Changed(OSError):
    """The object is not the one that was listed."""


class Unreachable(OSError):
    """The store did not deliver the object in any attempt."""


def is_local(uri: str) -> bool:
    """Whether a uri is a path on this machine; an absolute path begins with a slash, so it is no URI."""
    return "://" not in uri or uri[:7].lower() == "file://"


def local_path(uri: str) -> str:
    """Return the path of a local uri; the inverse of `local_uri`."""
    if uri[:7].lower() == "file://":
        return os.fsdecode(unquote_to_bytes(uri[7:].removeprefix("localhost")))
    return uri


def local_uri(path: str) -> str:
    """Name an absolute path in valid UTF-8: itself, else a percent-encoded `file://` URI."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def local_version(status: os.stat_result) -> str:
    """Return the version of a local file: `<mtime_ns>-<size>`."""
    return f"{status.st_mtime_ns}-{status.st_size}"


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/some/key` into `s3://bucket` and `some/key`; raises UsageError.

    A URI with credentials in it is refused: it would be written into tables and messages.
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/?(.*)", uri, re.DOTALL)
    scheme, place, key = (found[1].lower(), found[2], found[3]) if found else ("", "", "")
    if scheme not in SCHEMES:
        raise UsageError(
            f"{uri!r} cannot be opened: give a local path, or a URI that begins with one of "
            f"{', '.join(f'{name}://' for name in SCHEMES)}; check --images, --run and --checkpoint"
        )
    if ":" in place or ("@" in place and not scheme.startswith("abfs")):
        raise UsageError(
            f"leave credentials and ports out of the URI of {scheme}://{place.rpartition('@')[2]}; give "
            "credentials by the environment, a profile or a role, and an endpoint by --endpoint-url"
        )
    if not place:
        raise UsageError(f"{uri!r} names no bucket; the form is {scheme}://bucket/prefix/")
    return f"{scheme}://{place}", key


@functools.lru_cache(maxsize=16)
def _store(base: str, access: Access) -> ObjectStore:
    """Open a bucket or container, once a process."""
    from obstore import store as stores

    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=min(10.0, access.silence_seconds)),
            "read_timeout": timedelta(seconds=access.silence_seconds),
            # A slow body is not a dead one: only silence ends a request.
            "timeout": timedelta(hours=1),
        },
        # Jitter is added by the library.
        "retry_config": {
            "max_retries": access.attempts,
            "retry_timeout": timedelta(seconds=access.attempts * (access.silence_seconds + 15)),
            "backoff": {
                "init_backoff": timedelta(milliseconds=200),
                "max_backoff": timedelta(seconds=15),
                "base": 2,
            },
        },
    }
    if not base.startswith("s3://"):
        return stores.from_url(base, **options)
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = boto3.Session()
    endpoint = (
        access.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
        options["endpoint"] = endpoint
    bucket = base.removeprefix("s3://")
    options["region"] = session.region_name or ("us-east-1" if endpoint else _region(bucket))
    if session.get_credentials() is None:
        # A public bucket; any other answers that access is denied.
        options["skip_signature"] = True
    else:
        # Short, so that what the chain has renewed is soon used.
        options["credential_provider"] = Boto3CredentialProvider(session, ttl=timedelta(minutes=5))
    return stores.S3Store(bucket, **options)


def _region(bucket: str) -> str:
    from pyarrow.fs import resolve_s3_region

    try:
        return resolve_s3_region(bucket)
    except (OSError, pa.ArrowException):
        return "us-east-1"


def read(request: Request, access: Access = DIRECT) -> bytes:
    """Read the bytes of a request.

    Raises FileNotFoundError, PermissionError, `Changed` where the object is not the listed one, `Unreachable`
    where the store delivers it in no attempt, and UserError where the credentials are not accepted.
    """
    if is_local(request.uri):
        with open(local_path(request.uri), "rb") as file:  # noqa: PTH123
            if request.version and request.version != local_version(os.fstat(file.fileno())):
                raise Changed("changed since it was listed")
            file.seek(request.start)
            return _whole(file.read(-1 if request.stop is None else request.stop - request.start), request)
    base, key = split_uri(request.uri)
    options: dict[str, Any] = {"if_match": request.version} if request.version else {}
    if request.start or request.stop is not None:
        options["range"] = (
            {"offset": request.start} if request.stop is None else (request.start, request.stop)
        )

    def get(store: ObjectStore) -> bytes:
        if _ODD.search(key):
            return _get_odd(base, key, request, access)
        import obstore

        return obstore.get(store, key, options=options).bytes().to_bytes()

    return _whole(_attempt(get, base, request.uri, access), request)


def _whole(data: bytes, request: Request) -> bytes:
    if request.stop is not None and len(data) != request.stop - request.start:
        raise Changed("changed since it was listed")
    return data


def _attempt(action: Any, base: str, uri: str, access: Access) -> Any:
    """Try until the store answers, also where a body breaks off; sort out the library's errors."""
    from obstore import exceptions

    renewed = False
    for attempt in range(ROUNDS):
        if attempt:
            time.sleep(random.uniform(0, min(15.0, 0.2 * 2**attempt)))
        try:
            return action(_store(base, access))
        except FileNotFoundError as error:
            if "<Code>NoSuchBucket</Code>" in str(error):
                raise UserError(f"there is no bucket {base}; check the URI and --endpoint-url") from None
            raise FileNotFoundError(2, "file not found", uri) from None
        except exceptions.PreconditionError:
            raise Changed("changed since it was listed") from None
        except (Changed, PermissionError, exceptions.InvalidPathError):
            raise
        except (exceptions.BaseError, ValueError, OSError, AssertionError) as error:
            # Not chained below: the library's messages may quote headers.
            text = str(error)
            denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
            last = _code(text)
        if _CREDENTIALS.search(text):
            if renewed:
                raise UserError(
                    f"{base} does not accept the credentials ({last}); renew them (environment, profile or "
                    "role) and run the same command again to continue"
                )
            # The chain may hold newer ones than this process has.
            renewed = True
            _store.cache_clear()
        elif denied:
            raise PermissionError(f"access to {uri} is denied")
        elif _TOO_SHORT.search(text):
            raise Changed("changed since it was listed")
    attempts = ROUNDS * (access.attempts + 1)
    raise Unreachable(f"the store did not deliver it in {attempts} attempts ({last})")


def _code(text: str) -> str:
    """Return the store's own word for what went wrong, else how the connection failed, in a few words."""
    found = re.search(r"<Code>(\w+)</Code>", text) or re.search(r"status code: (\d{3}[^:\n]{0,40})", text)
    if found:
        return found[1].strip()
    for sign, words in (
        (r"timed out", "no answer in time"),
        (r"reset|broken pipe|closed|incomplete|end of file|unexpected eof|body", "the connection broke off"),
        (r"refused|connect|dns", "no connection"),
    ):
        if re.search(sign, text, re.IGNORECASE):
            return words
    return text.strip().splitlines()[0][:100] if text.strip() else "no reason given"


def list_keys(
    base: str, prefix: str, access: Access = DIRECT, after: str = ""
) -> Iterator[tuple[list[str], list[int], list[str]]]:
    """List the objects below a prefix in order of their keys, those after a key; a page at a time.

    Yields keys, sizes in bytes, and versions: the etag, where there is none `<mtime_ns>-<size>`. A page that
    fails is asked for again, after the last key that came.
    """
    import obstore
    from obstore.exceptions import BaseError, InvalidPathError

    # "/key" would come as "key".
    odd = base.startswith("s3://") and not prefix and bool(_list_odd(base, "/", access, "")[0])
    while True:
        if odd or (after and _ODD.search(after)):
            page, more = _list_odd(base, prefix and prefix.rstrip("/") + "/", access, after)
            if page:
                keys, sizes, versions = map(list, zip(*page, strict=True))
                yield keys, sizes, versions
                after = page[-1][0]
            if not more:
                return
            odd = odd and not prefix
            continue

        def first(store: ObjectStore, after: str = after) -> Any:
            stream = obstore.list(store, prefix or None, offset=after or None, chunk_size=PAGE)
            return stream, next(iter(stream), None)

        try:
            stream, batch = _attempt(first, base, f"{base}/{prefix}", access)
            while batch:
                keys = [meta["path"] for meta in batch]
                versions = [meta["e_tag"] or _dated(meta) for meta in batch]
                yield keys, [meta["size"] for meta in batch], versions
                after = keys[-1]
                batch = next(stream, None)
            return
        except InvalidPathError:
            # The next page holds such a key.
            odd = True
        except BaseError:
            # The page broke off.
            continue


@functools.lru_cache(maxsize=4)
def _boto(access: Access) -> Any:
    """Return botocore's client, ten times the work of obstore, for the keys that only it can name."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": access.attempts + 1, "mode": "standard"},
        read_timeout=access.silence_seconds,
        s3={"addressing_style": "path"} if access.endpoint_url else {},
    )
    return boto3.client("s3", endpoint_url=access.endpoint_url, config=config)


@contextlib.contextmanager
def _boto_errors() -> Iterator[None]:
    """Raise botocore's errors as those that `_attempt` sorts out."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("NoSuchKey", "NoSuchBucket", "404"):
            raise FileNotFoundError(2, f"<Code>{code}</Code>") from None
        if code in ("PreconditionFailed", "412"):
            raise Changed("changed since it was listed") from None
        if code in ("AccessDenied", "403"):
            raise PermissionError(13, code) from None
        raise OSError(f"<Code>{code}</Code>") from None
    except (BotoCoreError, HTTPClientError) as error:
        raise OSError(str(error)) from None


def _get_odd(base: str, key: str, request: Request, access: Access) -> bytes:
    if not base.startswith("s3://"):
        raise PermissionError(13, "a name that cannot be asked for")
    options = {"IfMatch": request.version} if request.version else {}
    if request.start or request.stop is not None:
        options["Range"] = f"bytes={request.start}-{'' if request.stop is None else request.stop - 1}"
    with _boto_errors():
        return _boto(access).get_object(Bucket=base[5:], Key=key, **options)["Body"].read()


def _list_odd(base: str, prefix: str, access: Access, after: str) -> tuple[list[tuple[str, int, str]], bool]:
    """List a page by botocore: keys, sizes, versions; and whether there are more."""
    if not base.startswith("s3://"):
        raise UserError(f"{base} has keys with empty parts or control characters, as {after!r}; rename them")

    def page(_: ObjectStore) -> Any:
        with _boto_errors():
            return _boto(access).list_objects_v2(
                Bucket=base[5:], Prefix=prefix, StartAfter=after, MaxKeys=PAGE
            )

    answer = _attempt(page, base, f"{base}/{prefix}", access)
    rows = [(row["Key"], row["Size"], row["ETag"]) for row in answer.get("Contents", [])]
    return rows, answer["IsTruncated"]


def _dated(meta: Any) -> str:
    return f"{int(meta['last_modified'].timestamp() * 1e9)}-{meta['size']}"


def version(uri: str, access: Access = DIRECT) -> tuple[int, str]:
    """Return size in bytes and version of one object; raises what `read` raises."""
    if is_local(uri):
        status = os.stat(local_path(uri))  # noqa: PTH116
        return status.st_size, local_version(status)
    base, key = split_uri(uri)

    def head(store: ObjectStore) -> Any:
        import obstore

        return obstore.head(store, key)

    meta = _attempt(head, base, uri, access)
    return meta["size"], meta["e_tag"] or _dated(meta)


def open_seekable(uri: str, access: Access = DIRECT, buffer_size: int = 1 << 20) -> BinaryIO:
    """Open an object for reads at any place, each of at least buffer_size bytes."""
    if is_local(uri):
        return open(local_path(uri), "rb")  # noqa: PTH123
    size, listed = version(uri, access)
    return io.BufferedReader(_Ranges(uri, listed, size, access), buffer_size)


class _Ranges(io.RawIOBase):
    """One version of an object, read in ranges."""

    def __init__(self, uri: str, version: str, size: int, access: Access) -> None:
        self.uri, self.version, self.size, self.access = uri, version, size, access
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        stop = min(self.size, self.position + len(buffer))
        if stop <= self.position:
            return 0
        data = read(Request(self.uri, self.version, self.position, stop), self.access)
        buffer[: len(data)] = data
        self.position = stop
        return len(data)


# What a run does with its own objects


def exists(uri: str, access: Access = DIRECT) -> bool:
    """Whether there is an object."""
    if is_local(uri):
        return Path(local_path(uri)).is_file()
    try:
        version(uri, access)
    except FileNotFoundError:
        return False
    return True


def write(uri: str, data: bytes, access: Access = DIRECT, *, replace: bool = True) -> None:
    """Write an object whole or not at all; without replace, one that is there stays, where the store can.

    Raises OSError and its kinds, and UserError where the credentials are not accepted.
    """
    if is_local(uri):
        path = Path(local_path(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return
    base, key = split_uri(uri)

    def put(store: ObjectStore, replace: bool = replace) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with contextlib.suppress(AlreadyExistsError):
            obstore.put(store, key, data, mode="overwrite" if replace else "create", use_multipart=False)

    try:
        _attempt(put, base, uri, access)
    except Unreachable as error:
        if replace or "NotImplemented" not in str(error):
            raise
        # The store has no If-None-Match.
        _attempt(functools.partial(put, replace=True), base, uri, access)


def delete(uri: str, access: Access = DIRECT) -> None:
    """Remove an object, if it is there."""
    if is_local(uri):
        Path(local_path(uri)).unlink(missing_ok=True)
        return
    base, key = split_uri(uri)

    def remove(store: ObjectStore) -> None:
        import obstore

        obstore.delete(store, key)

    with contextlib.suppress(FileNotFoundError):
        _attempt(remove, base, uri, access)


def names(folder: str, access: Access = DIRECT) -> list[str]:
    """Return the names of the objects directly in a folder, sorted; none where there is no folder."""
    return _level(folder, access)[0]


def folders(folder: str, access: Access = DIRECT) -> list[str]:
    """Return the names of the folders directly in a folder, sorted; none where there is no folder."""
    return _level(folder, access)[1]


def _level(folder: str, access: Access) -> tuple[list[str], list[str]]:
    if is_local(folder):
        try:
            with os.scandir(local_path(folder)) as scanned:
                entries = list(scanned)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        files = (entry.name for entry in entries if entry.is_file())
        return sorted(files), sorted(entry.name for entry in entries if entry.is_dir())
    base, prefix = split_uri(folder)

    def level(store: ObjectStore) -> tuple[list[str], list[str]]:
        import obstore

        found = obstore.list_with_delimiter(store, prefix)
        return [meta["path"] for meta in found["objects"]], found["common_prefixes"]

    files, inner = (
        sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        for paths in _attempt(level, base, folder, access)
    )
    return files, inner


def delete_folder(folder: str, access: Access = DIRECT) -> None:
    """Remove a folder with everything in it, if it is there."""
    if is_local(folder):
        shutil.rmtree(local_path(folder), ignore_errors=True)
        return
    base, prefix = split_uri(folder)
    for keys, _, _ in list_keys(base, prefix, access):
        for key in keys:
            delete(f"{base}/{key}", access)
