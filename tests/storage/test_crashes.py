"""Real processes: killed at any moment, racing for one shard. What is committed is whole; what is not gets written."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage import atomic
from storage.latents import LatentStore
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from tests.storage.stores import BATCH, FRAMES, ids, new_store, write

ROWS = 4 * ROWS_PER_SHARD + 9
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
    said, _ = process.communicate("\n", timeout=60)
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


def kill_and_recover(root: DataRoot, repository: Path, reference: dict[str, bytes], seed: int) -> tuple[int, int]:
    """Kill a writer after a random while, look, let another finish; (shards committed at the kill, litter files)."""
    store = new_store(root)
    part = store.plan_part(BATCH, FRAMES, ids(ROWS))
    writer = start(root, repository)
    go(writer)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    problems = store.verify()
    litter = ("without its commit", "belongs to nothing in the plan")
    assert all(any(words in problem.what for words in litter) for problem in problems), problems
    before = committed_bytes(store)
    seen = store.commits(BATCH).height
    assert seen == sum(part.rows_of(int(shard)).height for shard in before)
    finish(start(root, repository))
    atomic.sweep_litter(root.url, older_than_s=0)
    assert store.verify() == []
    assert store.unfinished(BATCH, FRAMES) is None
    after = committed_bytes(store)
    assert {shard: after[shard] for shard in before} == before
    assert after == reference
    return len(before), len(problems)


@pytest.mark.parametrize("seed", range(2))
def test_kill_while_writing(data_root: DataRoot, repository: Path, reference: dict[str, bytes], seed: int) -> None:
    kill_and_recover(data_root, repository, reference, seed)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(100, 300))
def test_kill_while_writing_at_many_moments(
    data_root: DataRoot, repository: Path, reference: dict[str, bytes], seed: int
) -> None:
    kill_and_recover(data_root, repository, reference, seed)


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
    atomic.sweep_litter(data_root.url, older_than_s=0)
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
        with pytest.raises(OSError, match=os.strerror(code)):
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
    print(error.strerror)
"""


def test_a_shard_that_the_system_cuts_in_the_middle(data_root: DataRoot, repository: Path) -> None:
    """The kernel itself refuses bytes 9001 and on of a shard of 28 KB, as it does on a full disk."""
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(ROWS_PER_SHARD))
    done = subprocess.run(
        [sys.executable, "-c", FULL, data_root.url], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.stdout == "File too large\n", done.stderr
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
    assert said == dict.fromkeys(range(5), "wrote")
    assert store.verify() == []
    assert committed_bytes(store) == reference
