"""Real processes: killed at any moment, racing for one shard. What is committed is whole; what is not gets written."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from storage import atomic
from storage.part import LatentPart
from storage.reader import RowReader, addresses, row_id
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from tests.forked import Forks, parent_of
from tests.storage.stores import BATCH, FRAMES, ids, new_store, spec, values, write

ROWS, SHARDS = 7 * ROWS_PER_SHARD + 9, 8
WRITTEN = dict(zip(ids(ROWS), values(ids(ROWS)).astype(np.float16), strict=True))
WRITER = """
import sys
from storage.errors import ConflictError
from storage.root import DataRoot
from tests.storage.stores import BATCH, FRAMES, new_store, write
part = new_store(DataRoot.open(sys.argv[1])).part(BATCH, FRAMES, 0)
print("ready", flush=True)
sys.stdin.readline()
for shard in range(part.shards):
    try:
        write(part, shard)
        print("wrote", shard, flush=True)
    except ConflictError:
        print("lost", shard, flush=True)
"""


def start(root: DataRoot, repository: Path) -> subprocess.Popen[str]:
    """A writer that stands ready and waits for a line."""
    command = [sys.executable, "-c", WRITER, root.url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> dict[int, str]:
    said, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0
    return {int(line.split()[1]): line.split()[0] for line in said.splitlines()}


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same rows, written without an accident."""
    store = new_store(DataRoot.open(str(tmp_path_factory.mktemp("reference"))))
    part = store.plan_part(BATCH, FRAMES, ids(ROWS))
    for shard in range(part.shards):
        write(part, shard)
    return committed_bytes(store)


def committed_bytes(store: LatentStore) -> dict[str, bytes]:
    part = store.part(BATCH, FRAMES, 0)
    return {str(n): Path(part.shard_path(n)).read_bytes() for n in range(part.shards) if part.committed(n)}


def test_two_writers_on_one_part(data_root: DataRoot, repository: Path, reference: dict[str, bytes]) -> None:
    """Each shard has one winner, the loser goes on, and the bytes are those of a single writer."""
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(ROWS))
    writers = [start(data_root, repository) for _ in range(2)]
    for writer in writers:
        go(writer)
    said = [finish(writer) for writer in writers]
    for shard in range(part.shards):
        assert sorted(each[shard] for each in said) == ["lost", "wrote"]
    assert store.verify() == []
    assert committed_bytes(store) == reference


@dataclass(frozen=True)
class Killed:
    """What a dead writer left: shards it had told of, shards committed, temporary names, shards without a commit."""

    told: int
    committed: int
    temporary: int
    uncommitted: int


def planned(folder: Path) -> tuple[LatentStore, LatentPart]:
    store = new_store(DataRoot.open(str(folder / "root")))
    return store, store.plan_part(BATCH, FRAMES, ids(ROWS))


def readable(store: LatentStore) -> int:
    """Rows that readers see, each compared with what was written into it."""
    found = addresses(store.commits(BATCH), [BATCH])
    reader, out = RowReader(store.root, store.spec, [BATCH]), np.empty(store.spec.row_shape(FRAMES), np.float16)
    for address in found:
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(out, WRITTEN[row_id(address)])
    return len(found)


def recovered(folder: Path, forks: Forks, reference: dict[str, bytes]) -> Killed:
    """Look at what stands after a kill, have another writer finish, sweep; the whole is that of a single writer."""
    store = LatentStore.open(DataRoot.open(str(folder / "root")), spec().digest())
    part, said = store.part(BATCH, FRAMES, 0), folder / "said"
    told = said.read_text().split() if said.exists() else []
    before = committed_bytes(store)
    assert set(told) <= set(before), "a writer told of a shard that is not committed"
    assert before == {shard: reference[shard] for shard in before}
    assert readable(store) == sum(part.rows_of(int(shard)).height for shard in before)
    temporary = [str(path) for path in Path(store.root.url).rglob(".*.partial")]  # too young for verify to name them
    orphans = [problem.file for problem in store.verify() if "without its commit" in problem.what]
    assert len(store.verify()) == len(orphans)
    forks.call("tests.storage.writers", "write_all", store.root.url, str(folder / "said"))
    assert atomic.remove_leftovers(store.root.url, older_than_s=0) == sorted(temporary)
    assert store.verify() == []
    assert store.unfinished(BATCH, FRAMES) is None
    assert committed_bytes(store) == reference
    assert readable(store) == ROWS
    return Killed(len(told), len(before), len(temporary), len(orphans))


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with parent_of(Path(__file__).resolve().parents[2], ["zarr", "tests.storage.writers"]) as found:
        yield found


def test_kill_in_the_middle(tmp_path: Path, forks: Forks, reference: dict[str, bytes]) -> None:
    """At a quarter to three quarters of all calls that publish: each kill finds some shards committed, not all."""
    store, _ = planned(tmp_path / "whole")
    forks.call("tests.storage.writers", "write_until", store.root.url, str(tmp_path / "said"), 0)
    calls = int((tmp_path / "said").read_text().split()[-1])
    draw, found = random.Random(0), []
    for turn in range(6):
        store, _ = planned(tmp_path / str(turn))
        nth = int(calls * (0.25 + 0.5 * (turn + draw.random()) / 6))
        forks.start("tests.storage.writers", "write_until", store.root.url, str(tmp_path / str(turn) / "said"), nth)
        assert forks.ended() == -signal.SIGKILL
        found.append(recovered(tmp_path / str(turn), forks, reference))
        assert 0 < found[-1].committed < SHARDS
    assert any(killed.temporary or killed.uncommitted for killed in found)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kill_at_many_moments(
    tmp_path: Path, forks: Forks, reference: dict[str, bytes], record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL at 200 random moments of the time that a writer takes here, which is measured again and again."""
    tries = int(os.environ.get("NEXTVID_TRIES", "200"))
    record_property("tries", tries)
    found: dict[int, Killed] = {}
    duration_s = 0.0
    for seed in range(tries):
        if seed % 20 == 0:  # others use the machine too
            whole, _ = planned(tmp_path / f"whole{seed}")
            duration_s = forks.call("tests.storage.writers", "write_slowly", whole.root.url, str(tmp_path / "said"))
        folder = tmp_path / str(seed)
        store, _ = planned(folder)
        forks.start("tests.storage.writers", "write_slowly", store.root.url, str(folder / "said"))
        time.sleep(random.Random(seed).uniform(0, duration_s))
        forks.kill()
        assert forks.ended() in (0, -signal.SIGKILL)
        try:
            found[seed] = recovered(folder, forks, reference)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {duration_s:.3f} s: {error}") from error
        shutil.rmtree(folder)
    middle = [seed for seed, killed in found.items() if 0 < killed.committed < SHARDS]
    littered = [seed for seed, killed in found.items() if killed.temporary or killed.uncommitted]
    if tries >= 100:
        assert len(middle) > tries // 2, f"{len(middle)} of {tries} died between the first commit and the last: {found}"
        assert len(littered) >= tries // 20, f"{len(littered)} of {tries} left temporary files: {found}"


DIES = """
import os, signal, sys
from storage.root import DataRoot
from tests.storage.stores import BATCH, FRAMES, new_store, write
part = new_store(DataRoot.open(sys.argv[1])).part(BATCH, FRAMES, 0)
part.plan
name, left = sys.argv[2], [int(sys.argv[3])]
real = getattr(os, name)
def dying(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, name, dying)
write(part, 0)
"""


@pytest.mark.parametrize(("call", "nth"), [("fsync", 1), ("link", 1), ("link", 2), ("link", 3)])
def test_death_at_each_step_of_a_commit(data_root: DataRoot, repository: Path, call: str, nth: int) -> None:
    """At the n-th such call of a shard's write (the shard's bytes, its name, the commit's); then another writes it."""
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    died = subprocess.run([sys.executable, "-c", DIES, data_root.url, call, str(nth)], cwd=repository, check=False)
    assert died.returncode == (0 if (call, nth) == ("link", 3) else -signal.SIGKILL)  # a commit takes two links
    assert part.committed(0) == (died.returncode == 0)
    assert store.commits(BATCH).height == (5 if part.committed(0) else 0)
    if not part.committed(0):
        write(part, 0)
    atomic.remove_leftovers(data_root.url, older_than_s=0)
    assert store.verify() == []
    assert store.commits(BATCH).height == 5


def failing_at(call: str, nth: int, code: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the n-th such call of the system fail; how often it was called."""
    real, calls = getattr(os, call), [0]

    def fails(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    return calls


@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_a_disk_that_fails_at_each_step_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Full or broken at the n-th call: an error with the cause, nothing half committed, and the next writer is well."""
    for nth in range(1, 20):
        store = new_store(DataRoot.open(str(tmp_path / f"{nth}")))
        part = store.plan_part(BATCH, FRAMES, ids(5))
        assert part.plan.height == 5
        code = errno.ENOSPC if nth % 2 else errno.EIO
        calls = failing_at(call, nth, code, monkeypatch)
        seen: list[int | None] = []
        try:
            write(part, 0)
        except OSError as error:
            seen.append(error.errno)
        monkeypatch.undo()
        assert seen == ([code] if calls[0] >= nth else [])
        assert store.commits(BATCH).height == (5 if part.committed(0) else 0)
        if not part.committed(0):
            assert seen
            write(part, 0)
        assert store.verify() == []  # and no temporary name is left
        if not seen:
            assert nth > 1, "the call is never made: the test shows nothing"
            return
    pytest.fail("a commit takes fewer calls than this")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_disk_that_fails_while_a_part_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    for call in ("fsync", "rename"):
        root = DataRoot.open(str(tmp_path / call))
        store = new_store(root)
        failing_at(call, 1, code, monkeypatch)
        with pytest.raises(OSError, match=os.strerror(code) if code == errno.EIO else "disk is full"):
            store.plan_part(BATCH, FRAMES, ids(5))
        monkeypatch.undo()
        assert store.parts(BATCH, FRAMES) == []
        assert store.plan_part(BATCH, FRAMES, ids(5)).number == 0


FULL = """
import resource, signal, sys
from storage.root import DataRoot
from tests.storage.stores import BATCH, FRAMES, new_store, write
part = new_store(DataRoot.open(sys.argv[1])).part(BATCH, FRAMES, 0)
part.plan
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    write(part, 0)
except OSError as error:
    print(error)
"""


def test_a_shard_that_the_system_cuts_in_the_middle(data_root: DataRoot, repository: Path) -> None:
    """The kernel itself refuses bytes 9001 and on of a shard of 28 KB, as it does on a full disk."""
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(ROWS_PER_SHARD))
    done = subprocess.run(
        [sys.executable, "-c", FULL, data_root.url], cwd=repository, capture_output=True, text=True, check=False
    )
    assert "cannot be written: no file may be so large there ('ulimit -f'" in done.stdout, done.stderr
    assert store.commits(BATCH).height == 0
    assert not Path(part.shard_path(0)).exists()
    assert store.verify() == []
    write(part, 0)
    assert store.verify() == []


SHARES = """
import sys
from storage.root import DataRoot
from tests.storage.stores import BATCH, FRAMES, new_store, write
part = new_store(DataRoot.open(sys.argv[1])).part(BATCH, FRAMES, 0)
part.plan
print("ready", flush=True)
sys.stdin.readline()
for shard in range(int(sys.argv[2]), part.shards, 2):
    write(part, shard)
    print("wrote", shard, flush=True)
"""


def test_two_writers_on_different_shards(data_root: DataRoot, repository: Path, reference: dict[str, bytes]) -> None:
    """Released together, nobody loses."""
    store = new_store(data_root)
    store.plan_part(BATCH, FRAMES, ids(ROWS))
    writers = []
    for first in "01":
        command = [sys.executable, "-c", SHARES, data_root.url, first]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        writers.append(process)
    for writer in writers:
        go(writer)
    said = {shard: word for writer in writers for shard, word in finish(writer).items()}
    assert said == dict.fromkeys(range(SHARDS), "wrote")
    assert store.verify() == []
    assert committed_bytes(store) == reference
