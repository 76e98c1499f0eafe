"""Object stores through fsspec: which client, how often it is asked again, and what its errors mean to a person.

Credentials, endpoint and region come from the environment or fsspec's own configuration (decision 0012), never from
corpus.yaml or a URL. A question that fails for a passing reason is asked again a bounded number of times; whatever is
left is one error of ours. Listings are not remembered, since other processes write.
"""

import errno
import itertools
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec import AbstractFileSystem

from storage.errors import ConfigError, ConflictError, DamagedError, NExTVidError, StoreError
from storage.limits import limit_met

EXCLUSIVE = "exclusive"  # the name of an object below a root that no writer may replace
_creates_exclusively: set[str] = set()  # roots whose store was asked

Answer = TypeVar("Answer")
Item = TypeVar("Item")

WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)  # our choice: six tries in 8 s and the client's own timeouts (s3fs: 15 s a read)
BUSY_WAITS_S = (*WAITS_S, *(8.0,) * 30)  # our choice: four minutes for a store that answers 503 or 429
_BUSY = ("429", "503")  # HTTP status: too many requests; slow down
CONNECTIONS = 32  # of a process to a store at most; s3fs alone opens 10: docs/performance.md, "A bucket"
# Our choice: of a larger object so many bytes at a time, and so many times that at once.
PIECE_BYTES, PIECES = 1 << 26, 4
SMALL_AT_ONCE = 16  # our choice: batches looked at, or tables read, at a time
# What URLs may have unless corpus.yaml says otherwise: object stores, the Hub, web servers.
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "http", "https")
BUCKETED = ("s3", "s3a", "gs", "gcs", "az", "abfs")  # protocols of fsspec whose first path segment is a bucket
# by name, since the client that raises them may not be installed
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_OURS = (errno.EINVAL, errno.EPERM, errno.ENOSYS)  # what s3fs makes of a request that no repetition mends
S3_PLACE = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")  # where, not who: for jobs on other machines
_ONE_PUT_BYTES = 5 * 2**30  # Amazon S3's limit of one PUT; s3fs cuts what is larger than two of its chunks, 100 MiB
_SET = "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where it is not Amazon's, AWS_ENDPOINT_URL"


def at_once(path: str, function: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """`function` of each item, in their order: where `path` is on an object store many at a time, since each waits."""
    if is_local(path):
        return [function(item) for item in items]
    with ThreadPoolExecutor(SMALL_AT_ONCE) as pool:
        return list(pool.map(function, items))


def is_local(path: str) -> bool:
    """Whether a path of ours is on a local file system."""
    return "://" not in path or path.startswith("file://")


def refuse_credentials(url: str, where: str) -> None:
    """ConfigError where a URL carries credentials, which end in logs; `where` says which key of which file."""
    if is_local(url):
        return
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{where}: not a URL: {error}") from None
    if "@" in parts.netloc or parts.query:
        raise ConfigError(f"{where}: the URL carries credentials or a query. Write it without them, and {_SET}")


def refuse_protocol(url: str, where: str, allowed: Sequence[str] = PROTOCOLS) -> None:
    """ConfigError for a URL of a protocol that is not `allowed`, and for a local file of another machine.

    fsspec knows protocols that read what nobody meant, such as `github://`, or wrap others, as `simplecache::` does.
    """
    protocol, mark, rest = url.partition("://")
    if not mark or protocol == "memory":  # which is within this process
        return
    if protocol == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"{where}: {url} names a file of a machine '{rest.partition('/')[0]}': write file:///...")
    elif protocol not in allowed:
        raise ConfigError(
            f"{where}: protocol '{protocol}' is not among {', '.join(allowed)}: copy the files to a folder or bucket, "
            "or name the protocol under 'protocols' in corpus.yaml"
        )


def connect(path: str) -> tuple[AbstractFileSystem, str]:
    """Client and key of a path. ConfigError where the package of its protocol is missing.

    `::` is a part of the name, not a chain of file systems, as it is for fsspec's own functions.
    """
    protocol = "file" if is_local(path) else path.partition("://")[0]
    refuse_credentials(path, f"a path of protocol '{protocol}'")
    options: dict[str, Any] = {} if is_local(path) else {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # we repeat, and know then that an answer may have been lost
        once = {"retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **configured, **once}
        options["max_concurrency"] = 1  # an object is read by one GET; s3fs would ask for its size first
    try:
        client = fsspec.get_filesystem_class(protocol)
        fs = client(**client._get_kwargs_from_urls(path), **options)
        key = client._strip_protocol(path)
    except (ImportError, TypeError, ValueError) as error:  # TypeError: a client that needs more options
        extra = "pip install 'nextvid[s3]'" if protocol in ("s3", "s3a") else "install the package that it names"
        raise ConfigError(f"{path}: {error}; {extra}") from error
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, str(key)


def ask(path: str, question: Callable[[AbstractFileSystem, str], Answer]) -> Answer:
    """Answer of an object store; asked again after a passing failure: for minutes where it says that it is busy.

    FileNotFoundError and FileExistsError pass through. ConfigError where credentials, permission or the bucket are
    missing, StoreError where it does not answer.
    """
    fs, key = connect(path)
    patience = _Patience()
    for tries in itertools.count(1):
        try:
            return question(fs, key)
        except FileNotFoundError:
            refuse_missing_bucket(path)
            raise
        except (FileExistsError, NotADirectoryError, IsADirectoryError, NExTVidError):
            raise
        except Exception as error:  # each client raises classes of its own
            if isinstance(error, (OSError, MemoryError)) and (met := limit_met(error)) is not None:
                raise met from error  # of this machine, such as a disk that is full of copies
            if not _passing(error):
                raise _explained(path, error) from error
            wait_s = patience.wait_s(error)
            if wait_s is None:
                failed = f"{tries} tries failed, the last with {_message(error)}"
                raise StoreError(f"{path}: {failed}. Check network and endpoint, then run again") from error
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def put(path: str, source: bytes | Path, *, exclusive: bool = False) -> None:
    """Put bytes, or those of a local file of any size, under `path` in one request; with `exclusive` under a new name.

    ConflictError where the name is taken. A client below us that repeats a request whose answer was lost may take our
    own bytes for another writer's: whoever creates exclusively goes on with what is there.
    """
    lost_answers = 0

    def question(fs: AbstractFileSystem, key: str) -> None:
        nonlocal lost_answers
        # in one request: a writer killed between several leaves parts that no listing shows
        options: dict[str, Any] = {"chunksize": _ONE_PUT_BYTES // 2} if "s3" in fs.protocol else {}
        options["mode"] = "create" if exclusive else "overwrite"
        try:
            if isinstance(source, bytes):
                fs.pipe_file(key, source, **options)
            else:
                fs.put_file(str(source), key, **options)
        except FileExistsError:
            raise
        except Exception as error:
            code = None
            with suppress(AttributeError, KeyError, TypeError):
                code = error.__cause__.response["Error"]["Code"]  # type: ignore[union-attr]
            if exclusive and code == "PreconditionFailed":  # s3fs knows Amazon's wording only
                raise FileExistsError(path) from error
            lost_answers += 1
            raise

    try:
        ask(path, question)
    except FileExistsError as error:
        if lost_answers and read(path) == (source if isinstance(source, bytes) else source.read_bytes()):
            return  # an earlier try arrived, and its answer did not
        raise ConflictError(f"{path} exists already: somebody else was first") from error
    except FileNotFoundError as error:
        raise StoreError(f"{path} cannot be written ({error}). Check the bucket, then run again") from error


def refuse_overwriting(url: str) -> None:
    """ConfigError where the store of a data root creates a name that is taken: two writers of a shard would both win.

    Asked once in a process, by an object that stays. Where this user may write nothing, nobody asks.
    """
    if url in _creates_exclusively or is_local(url):
        return
    try:
        for _ in range(2):  # the first ever makes it
            put(f"{url}/{EXCLUSIVE}", secrets.token_bytes(16), exclusive=True)
    except ConflictError:
        _creates_exclusively.add(url)
    except ConfigError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
    else:
        raise ConfigError(
            f"{url}: this object store replaces an object that is not to be replaced (it ignores the header "
            "If-None-Match), so two writers would both commit a shard. Update it, use another such as Amazon S3, "
            "or put the root on a file system"
        )


def get_file(path: str, local: str) -> None:
    """Copy an object to a local file. FileNotFoundError where there is none."""
    # in a bucket's keys `?` is a letter, where elsewhere it begins a query, which is refused
    place = path.partition("?")[0] if path.partition("://")[0] in BUCKETED else path
    ask(place, lambda fs, _: fs.get_file(fs._strip_protocol(path), local))


def read(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of an object, or those from `start` to before `end`; an answer may still be short."""
    return bytes(ask(path, lambda fs, key: fs.cat_file(key, start=start, end=end)))


def read_exactly(
    path: str, size_bytes: int, *, start: int | None = None, fault: Callable[[bytes], str | None] | None = None
) -> bytes:
    """`size_bytes` bytes of an object, from `start` or all of it; asked again while they are short or `fault` says so.

    DamagedError where every answer is, FileNotFoundError where there is no such object.
    """
    patience = _Patience()
    for tries in itertools.count(1):
        data = read(path, start, None if start is None else start + size_bytes)
        wrong = f"{len(data)} bytes came where {size_bytes} are stored" if len(data) != size_bytes else None
        wrong = wrong or (fault(data) if fault else None)
        if wrong is None:
            return data
        wait_s = patience.wait_s()
        if wait_s is None:
            raise DamagedError(f"{path}: {wrong}, in {tries} tries")
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def read_pieces(path: str, size_bytes: int, start: int = 0) -> Iterator[bytes]:
    """Bytes of a large object from `start` on, in order, some pieces at a time. Raises as `read_exactly`."""
    with ThreadPoolExecutor(PIECES) as pool:
        for first in range(start, size_bytes, PIECES * PIECE_BYTES):
            starts = range(first, min(first + PIECES * PIECE_BYTES, size_bytes), PIECE_BYTES)
            yield from pool.map(
                lambda place: read_exactly(path, min(PIECE_BYTES, size_bytes - place), start=place), starts
            )


def read_ranges(ranges: Sequence[tuple[str, int, int]], closing: threading.Event) -> list[bytes | None]:
    """Ranges (path, start, size in bytes) of objects of one store, each requested once, all at once; None if it failed.

    Those that a busy store refused are requested again, for minutes, until `closing` is set. An answer may still be
    short.
    """
    fs, _ = connect(ranges[0][0])
    found: list[bytes | None] = [None] * len(ranges)
    asked, patience = list(enumerate(ranges)), _Patience()
    while asked:
        keys, starts = [fs._strip_protocol(path) for _, (path, _, _) in asked], [start for _, (_, start, _) in asked]
        ends = [start + size_bytes for _, (_, start, size_bytes) in asked]
        busy: list[tuple[tuple[int, tuple[str, int, int]], Exception]] = []
        for one, piece in zip(asked, fs.cat_ranges(keys, starts, ends, on_error="return"), strict=True):
            if not isinstance(piece, Exception):
                found[one[0]] = bytes(piece)
            elif _busy(piece):
                busy.append((one, piece))
        wait_s = patience.wait_s(busy[0][1]) if busy else None
        if wait_s is None or closing.wait(wait_s):
            break
        asked = [one for one, _ in busy]
    return found


def refuse_missing_bucket(path: str) -> None:
    """ConfigError where the bucket of a path does not exist: an empty answer then says nothing of what is in it."""
    protocol, _, rest = path.partition("://")
    if protocol not in BUCKETED:
        return
    fs, _ = connect(path)
    bucket = rest.split("/")[0]
    try:
        fs.info(bucket)
    except FileNotFoundError as error:
        message = f"{protocol}://{bucket}: there is no such bucket at this endpoint. Create it, or correct the name"
        raise ConfigError(message) from error
    except Exception as error:  # as above
        raise _explained(path, error) from error


class _Patience:
    """The waits between the tries of one question."""

    def __init__(self) -> None:
        self._waits = {True: iter(BUSY_WAITS_S), False: iter(WAITS_S)}  # by whether the store was busy

    def wait_s(self, error: Exception | None = None) -> float | None:
        """Seconds to wait after this failure, spread so that many processes do not return at once; None: give up."""
        wait_s = next(self._waits[error is not None and _busy(error)], None)
        return None if wait_s is None else wait_s * random.uniform(0.5, 1.5)


def _busy(error: Exception) -> bool:
    """Whether the store asked for patience."""
    response = getattr(error.__cause__, "response", None)  # of botocore, which s3fs translates
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    found = status, getattr(error, "code", None), getattr(error, "status_code", None)  # the latter of gcsfs and adlfs
    return getattr(error, "errno", None) == errno.EBUSY or any(str(one) in _BUSY for one in found)


def _passing(error: Exception) -> bool:
    """Whether the same question may have an answer a moment later."""
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return False
    if isinstance(error, OSError):
        return error.errno not in _OURS
    return not isinstance(error, (TypeError, ValueError, AttributeError, KeyError))


def _explained(path: str, error: Exception) -> NExTVidError:
    if type(error).__name__ in _NO_CREDENTIALS:
        return ConfigError(f"{path}: there are no credentials for it; {_SET}, or AWS_PROFILE")
    if isinstance(error, PermissionError):
        return ConfigError(f"{path}: access was denied ({error}). Check the credentials and the bucket's policy")
    return StoreError(f"{path}: the object store refused the request ({_message(error)})")


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
