"""The store on S3: exclusive creation, two writers, failing and lying answers, and what a person is told."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from storage import atomic, listing, remote
from storage.errors import ConfigError, ConflictError, DamagedError, NExTVidError, StoreError
from storage.jpeg import decode_clip
from storage.reader import (
    ADDRESS,
    PIXEL_ADDRESS,
    PixelReader,
    RowReader,
    addresses,
    open_reader,
    pixel_addresses,
    read_row,
    row_id,
)
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from tests.services.s3.proxy import Asked, Fault, Proxy
from tests.storage.pixel_stores import SIDE, chunks, pixel_spec, pixel_store
from tests.storage.stores import (
    BATCH,
    FRAMES,
    copies,
    full_store,
    ids,
    in_threads,
    new_store,
    read_each,
    spec,
    values,
    write,
)

pytestmark = pytest.mark.services

ROW_BYTES = FRAMES * 2 * 2 * 3 * 2
READ_TIMEOUT_S = 0.5  # of impatient clients; s3fs's own is 15
WRITER = """
import sys
from storage.errors import ConflictError
from storage.root import DataRoot
from tests.storage.pixel_stores import SIDE, chunks, pixel_spec, pixel_store
from tests.storage.stores import BATCH, FRAMES, new_store, write
part = new_store(DataRoot.open(sys.argv[1], "/nowhere")).part(BATCH, FRAMES, 0)
part.shards
print("ready", flush=True)
sys.stdin.readline()
for shard in range(part.shards):
    try:
        write(part, shard)
        print("wrote", shard, flush=True)
    except ConflictError:
        print("lost", shard, flush=True)
"""


def gets(asked: Asked) -> bool:
    """A ranged or whole read of a shard."""
    return asked.method == "GET" and "/c." in asked.path


def puts(asked: Asked) -> bool:
    return asked.method == "PUT"


def anything(asked: Asked) -> bool:
    return True


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of tries, sooner."""
    monkeypatch.setattr(remote, "WAITS_S", (0.01,) * len(remote.WAITS_S))
    monkeypatch.setattr(remote, "BUSY_WAITS_S", (0.01,) * len(remote.BUSY_WAITS_S))


@pytest.fixture
def impatient(environment: dict[str, str]) -> Iterator[None]:
    """Clients that give up an answer soon, as fsspec's own configuration says it (docs/operations.md)."""
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = {"config_kwargs": {"read_timeout": READ_TIMEOUT_S}}
    forget_clients()
    yield
    del fsspec.config.conf["s3"]
    if before is not None:
        fsspec.config.conf["s3"] = before
    forget_clients()


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_written_verified_read(root: DataRoot, tmp_path: Path, storage: str) -> None:
    """Any Zarr reader opens it; both readers give what the same store on a file system gives, bit for bit."""
    failed = [ids(300)[2]]
    store, part = full_store(root, ROWS_PER_SHARD + 5, failed, storage=storage)
    assert store.verify() == []
    assert LatentStore.open(root, store.digest).commits(BATCH).height == ROWS_PER_SHARD + 5
    local, beside = full_store(DataRoot.open(str(tmp_path / "local")), ROWS_PER_SHARD + 5, failed, storage=storage)
    found = addresses(store.commits(BATCH), [BATCH])
    np.testing.assert_array_equal(found, addresses(local.commits(BATCH), [BATCH]))
    for number in range(part.shards):
        assert atomic.read_bytes(part.shard_path(number)) == atomic.read_bytes(beside.shard_path(number))
    wanted = read_each(RowReader(local.root, local.spec, [BATCH]), found[:40])
    if storage == "float16":
        exact = values([row_id(address) for address in found[:40]]).astype(np.float16)
        np.testing.assert_array_equal(wanted, exact)
    np.testing.assert_array_equal(read_row(store, BATCH, FRAMES, 0, 3), wanted[2])  # one before it failed
    for stored in ({FRAMES: found}, None):
        reader = open_reader(root, store.spec, [BATCH], stored)
        reader.will_need(FRAMES, found[:40])
        assert bool(copies(Path(root.cache_folder))) or stored is None
        np.testing.assert_array_equal(read_each(reader, found[:40]), wanted)
        reader.close()


def test_a_ranged_row_is_one_request(root: DataRoot, proxy: Proxy) -> None:
    store, _ = full_store(root, 40)
    found = addresses(store.commits(BATCH), [BATCH])
    reader = RowReader(root, store.spec, [BATCH])
    reader.rows(FRAMES, found[:1])  # the first of a part reads how its chunks are named
    proxy.clear()
    reader.will_need(FRAMES, found[1:])
    for address in found[1:]:
        reader.read_into(FRAMES, address, np.empty((FRAMES, 2, 2, 3), np.float16))
    reader.close()
    assert proxy.seen == {"GET": 39}
    ranges = {asked.range for asked in proxy.asked}
    assert f"bytes={ROW_BYTES}-{2 * ROW_BYTES - 1}" in ranges
    assert len(ranges) == 39


def test_a_store_that_replaces_what_is_there_is_refused(root: DataRoot, proxy: Proxy) -> None:
    """Asked once a process, before anything is written."""
    proxy.faults.append(Fault(puts, ignores="If-None-Match"))
    with pytest.raises(ConfigError, match=r"ignores the header If-None-Match.*put the root on a file system"):
        new_store(root)
    assert listing.files_below(root.folder("latents")) == {}
    proxy.clear()
    new_store(root)
    assert proxy.seen["PUT"] == 2
    new_store(root)
    assert proxy.seen["PUT"] == 2


def test_requests_of_an_epoch(root: DataRoot, proxy: Proxy) -> None:
    """Copies: a shard and its commit are one GET each, once; a second reader asks for neither."""
    store, part = full_store(root, ROWS_PER_SHARD + 40)
    found = addresses(store.commits(BATCH), [BATCH])

    def epoch() -> list[str]:
        proxy.clear()
        reader = open_reader(root, store.spec, [BATCH], {FRAMES: found})
        reader.will_need(FRAMES, found)
        reader.rows(FRAMES, found)
        reader.close()
        return sorted(f"{asked.method} {asked.path.rpartition('/')[2].partition('?')[0]}" for asked in proxy.asked)

    shards = [path.rpartition("/")[2] for path in map(part.shard_path, range(2))]
    names = ["000000.parquet", "000001.parquet", *shards, "plan.parquet", "spec.json"]
    listed = ["GET " + root.url.split("/")[2]]
    assert epoch() == sorted(listed + [f"GET {name}" for name in names])
    assert epoch() == sorted([*listed, "GET spec.json"])


def test_a_storm_of_503_is_survived(root: DataRoot, proxy: Proxy) -> None:
    """Longer than a store that does not answer at all is asked."""
    store, _ = full_store(root, 12)
    found, count = addresses(store.commits(BATCH), [BATCH]), len(remote.WAITS_S) + 9
    for stored in ({FRAMES: found}, None):
        reader = open_reader(root, store.spec, [BATCH], stored)
        proxy.clear()
        proxy.faults.append(Fault(gets, count, status=503, code="SlowDown"))
        reader.will_need(FRAMES, found[:1])
        np.testing.assert_array_equal(read_each(reader, found), values(ids(12)).astype(np.float16))
        reader.close()
        assert proxy.used.total() == count


def test_two_processes_on_one_part(root: DataRoot, environment: dict[str, str], repository: Path) -> None:
    """Released together, each shard has one winner, and the bytes are those of a single writer."""
    store = new_store(root)
    rows = 4 * ROWS_PER_SHARD + 9
    part = store.plan_part(BATCH, FRAMES, ids(rows))
    command = [sys.executable, "-c", WRITER, root.url]
    writers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    said: list[str] = []
    in_threads(lambda number: said.append(writers[number].communicate("\n", 60)[0]), 2)
    assert [writer.returncode for writer in writers] == [0, 0]
    for shard in range(part.shards):
        assert sorted(line.split()[0] for text in said for line in text.splitlines() if line.endswith(f" {shard}")) == [
            "lost",
            "wrote",
        ]
    assert store.verify() == []
    assert store.commits(BATCH).height == rows


def test_exclusive_among_many(bucket: str) -> None:
    """Of 16 writers released by a barrier one wins, 20 times over."""
    for turn in range(20):
        won: list[int] = []

        def create(name: int, turn: int = turn, won: list[int] = won) -> None:
            with suppress(ConflictError):
                atomic.create_exclusively(f"{bucket}/turn{turn}", bytes([name]))
                won.append(name)

        in_threads(create, 16)
        assert len(won) == 1
        assert atomic.read_bytes(f"{bucket}/turn{turn}") == bytes(won)


FAULTS: dict[str, Callable[[Callable[[Asked], bool]], Fault]] = {
    "500": lambda hits: Fault(hits, 3, status=500),
    "503 slow down": lambda hits: Fault(hits, 3, status=503, code="SlowDown"),
    "reset": lambda hits: Fault(hits, 3, reset=True),
    "slow": lambda hits: Fault(hits, 3, wait_s=2 * READ_TIMEOUT_S),
}
LIES: dict[str, Callable[[Callable[[Asked], bool]], Fault]] = {
    "cut": lambda hits: Fault(hits, 3, cut=50),
    "short": lambda hits: Fault(hits, 3, change=lambda data: data[:-1]),
    "altered": lambda hits: Fault(hits, 3, change=lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:]),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [*FAULTS.values(), *LIES.values()], ids=[*FAULTS, *LIES])
@pytest.mark.parametrize("cached", [True, False])
def test_reading_through_trouble(
    root: DataRoot, proxy: Proxy, fault: Callable[[Callable[[Asked], bool]], Fault], cached: bool
) -> None:
    store, _ = full_store(root, 12)
    found = addresses(store.commits(BATCH), [BATCH])
    reader = open_reader(root, store.spec, [BATCH], {FRAMES: found} if cached else None)
    proxy.faults.append(fault(gets))
    out = np.empty((FRAMES, 2, 2, 3), np.float16)
    reader.will_need(FRAMES, found)
    for address in found:
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(out, values([row_id(address)])[0].astype(np.float16))
    reader.close()
    assert proxy.used.total() == 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [*FAULTS.values(), *LIES.values()], ids=[*FAULTS, *LIES])
@pytest.mark.parametrize("cached", [True, False])
def test_reading_pixels_through_trouble(
    root: DataRoot, proxy: Proxy, fault: Callable[[Callable[[Asked], bool]], Fault], cached: bool, tmp_path: Path
) -> None:
    """Rows that differ in size, by the same rules."""
    store, _ = pixel_store(root, 12)
    assert store.verify() == []
    found = pixel_addresses(store.commits(BATCH), [BATCH])
    reader = PixelReader(root, store.spec, [BATCH], {FRAMES: found} if cached else None)
    proxy.faults.append(fault(gets))
    out, wanted = np.empty((2, FRAMES, SIDE, SIDE, 3), np.uint8)
    reader.will_need(FRAMES, found)
    for address, chunk in zip(found, chunks(ids(12)), strict=True):
        assert chunk is not None
        decode_clip(chunk, wanted)
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(out, wanted)
    reader.close()
    assert proxy.used.total() == 3
    copies = [path for path in tmp_path.glob("cache/**/*") if path.is_file() and path.suffix != ".lock"]
    assert bool(copies) == cached


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("after", [False, True])
def test_writing_through_trouble(
    root: DataRoot, proxy: Proxy, fault: Callable[[Callable[[Asked], bool]], Fault], after: bool
) -> None:
    """Also where the server acted and its answer was lost: our own bytes are no conflict."""
    store = new_store(root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    told = fault(puts)
    proxy.faults.append(Fault(told.hits, 3, told.status, told.code, told.wait_s, reset=told.reset, after=after))
    write(part, 0)
    assert proxy.used.total() == 3
    proxy.clear()
    assert store.verify() == []
    with pytest.raises(ConflictError):
        write(part, 0)


def test_a_server_that_never_answers_is_told_in_time(root: DataRoot, proxy: Proxy) -> None:
    proxy.faults.append(Fault(anything, reset=True))
    with pytest.raises(StoreError, match="6 tries failed") as caught:
        new_store(root)
    assert "not-a-secret" not in str(caught.value)
    assert 6 <= proxy.seen.total() <= 12  # aiohttp repeats a request of its own where a kept connection broke


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("write_it", [True, False], ids=["write", "read"])
def test_a_connection_that_hangs_is_told_in_time(root: DataRoot, proxy: Proxy, write_it: bool) -> None:
    proxy.faults.append(Fault(anything, wait_s=20 * READ_TIMEOUT_S))
    began = time.monotonic()
    with pytest.raises(StoreError, match="6 tries failed"):
        remote.put(f"{root.url}/x", b"x", exclusive=True) if write_it else remote.read(f"{root.url}/x")
    assert time.monotonic() - began < 6 * 3 * READ_TIMEOUT_S + 2


@pytest.mark.parametrize("from_file", [True, False])
def test_a_large_shard_is_one_put(root: DataRoot, proxy: Proxy, tmp_path: Path, from_file: bool) -> None:
    """64 frames of VA-VAE's shape make shards of 268 MB; parts of one whose writer died would stay, unlisted."""
    data, path, local = b"s" * (110 << 20), f"{root.url}/shard", tmp_path / "shard"
    local.write_bytes(data)

    def put() -> None:
        remote.put(path, local if from_file else data, exclusive=True)

    proxy.faults.append(Fault(puts, 1, status=500, after=True))  # it arrived, and the answer did not
    put()
    assert {asked.method for asked in proxy.asked if "/shard" in asked.path} <= {"PUT", "GET", "HEAD"}
    assert not [asked for asked in proxy.asked if "uploadId" in asked.path or "uploads" in asked.path]
    assert listing.size_bytes(path) == len(data)
    local.write_bytes(b"t" + data[1:])
    data = b"t" + data[1:]
    with pytest.raises(ConflictError):
        put()


def test_nothing_half_written_when_puts_fail(root: DataRoot, proxy: Proxy) -> None:
    store = new_store(root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    proxy.faults.append(Fault(lambda asked: puts(asked) and "/c." in asked.path, status=500))
    with pytest.raises(StoreError):
        write(part, 0)
    proxy.clear()
    assert store.verify() == []
    assert store.commits(BATCH).height == 0
    assert not atomic.exists(part.shard_path(0))


def forget_clients() -> None:
    """s3fs keeps its clients by their arguments, whatever the environment says since."""
    from s3fs import S3FileSystem  # here, since `make test` collects this file and does without

    S3FileSystem.clear_instance_cache()


def without_credentials(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    forget_clients()
    return "there are no credentials for it; set AWS_ACCESS_KEY_ID"


def wrong_credentials(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    proxy.faults.append(Fault(anything, status=403, code="InvalidAccessKeyId"))
    return "access was denied"


def wrong_bucket(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    proxy.faults.append(Fault(anything, status=404, code="NoSuchBucket"))
    return "there is no such bucket"


def no_endpoint(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_clients()
    return "6 tries failed.*Check network and endpoint"


CALLS: dict[str, Callable[[DataRoot], object]] = {
    "open": lambda root: LatentStore.open(root, spec().digest()),
    "create": lambda root: new_store(root),
    "list": lambda root: LatentStore.every(root),
    "batches": lambda root: root.batches(),
    "exists": lambda root: atomic.exists(f"{root.url}/accepted.json"),
    "find": lambda root: listing.files_below(root.url),
    "pixels": lambda root: PixelReader(root, pixel_spec(), [BATCH]).read_into(
        FRAMES, np.array([(0, 0, 0, 0, 9, 0)], PIXEL_ADDRESS)[0], np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    ),
    "rows": lambda root: open_reader(root, spec(), [BATCH]).read_into(
        FRAMES, np.zeros(1, ADDRESS)[0], np.empty((4, 2, 2, 3), "<f2")
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("trouble", [without_credentials, wrong_credentials, wrong_bucket, no_endpoint])
def test_one_clear_error(
    root: DataRoot,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[DataRoot], object],
    trouble: Callable[[Proxy, pytest.MonkeyPatch], str],
) -> None:
    """Never an empty listing, never "does not exist yet", never a stack trace of the client's."""
    full_store(root, 3)
    proxy.clear()
    said = trouble(proxy, monkeypatch)
    with pytest.raises(NExTVidError, match=said) as caught:
        call(root)
    assert isinstance(caught.value, (ConfigError, StoreError))
    assert "not-a-secret" not in str(caught.value)


def test_damage_in_the_bucket_is_named(root: DataRoot) -> None:
    store, part = full_store(root, 5)
    data = bytearray(atomic.read_bytes(part.shard_path(0)))
    data[ROW_BYTES + 1] ^= 1
    atomic.publish_bytes(part.shard_path(0), bytes(data))
    (problem,) = store.verify()
    assert problem.file == part.shard_path(0)
    assert problem.row == ids(5)[1].hex()
    found = addresses(store.commits(BATCH), [BATCH])
    for stored in ({FRAMES: found}, None):
        reader = open_reader(root, store.spec, [BATCH], stored)
        with pytest.raises(DamagedError, match=ids(5)[1].hex()):
            reader.read_into(FRAMES, found[1], np.empty((FRAMES, 2, 2, 3), np.float16))
        reader.close()


def test_damaged_pixels_in_the_bucket_are_named(root: DataRoot) -> None:
    store, part = pixel_store(root, 5)
    data = bytearray(atomic.read_bytes(part.shard_path(0)))
    data[int(store.commits(BATCH)["offset"][1]) + 40] ^= 1
    atomic.publish_bytes(part.shard_path(0), bytes(data))
    (problem,) = store.verify()
    assert (problem.file, problem.row) == (part.shard_path(0), ids(5)[1].hex())
    found = pixel_addresses(store.commits(BATCH), [BATCH])
    for stored in ({FRAMES: found}, None):
        reader = PixelReader(root, store.spec, [BATCH], stored)
        with pytest.raises(DamagedError, match=ids(5)[1].hex()):
            reader.read_into(FRAMES, found[1], np.empty((FRAMES, SIDE, SIDE, 3), np.uint8))
        reader.close()


def test_credentials_by_fsspec_configuration(bucket: str, environment: dict[str, str], repository: Path) -> None:
    """FSSPEC_S3_* instead of AWS_*: read when the process starts."""
    code = (
        f"from storage import atomic; atomic.publish_bytes('{bucket}/x', b'1'); print(atomic.read_bytes('{bucket}/x'))"
    )
    names = {
        "FSSPEC_S3_KEY": "test",
        "FSSPEC_S3_SECRET": "x",
        "FSSPEC_S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"],
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | names
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.stdout == "b'1'\n", done.stderr
