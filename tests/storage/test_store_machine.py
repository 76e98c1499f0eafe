"""The store against a dictionary: any order of plans, writes, crashes and looks gives what the dictionary says."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.digest import digest
from storage.errors import ConflictError, DamagedError
from storage.part import LatentPart
from storage.reader import RowReader, addresses, row_id
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.storage.stores import commit_of, full_store, ids, new_store, spec, values, write

BATCHES = ["demo.000000", "images.000001"]
LENGTHS = {"demo.000000": [4, 8], "images.000001": [1]}


class StoreMachine(RuleBasedStateMachine):
    """`model`: row id -> (batch, frames, part, shard, ok); `open`: shards planned and not committed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.root = DataRoot.open(self.folder)
        self.model: dict[bytes, tuple[str, int, int, int, bool]] = {}
        self.open: list[tuple[str, int, int, int]] = []
        self.litter: set[tuple[str, int, int, int]] = set()
        self.swept: set[tuple[str, int, int, int]] = set()
        self.withdrawn: set[bytes] = set()
        self.made = 0

    @initialize()
    def create(self) -> None:
        self.store = new_store(self.root)

    @rule(batch=st.sampled_from(BATCHES), pick=st.integers(0, 1), rows=st.sampled_from([1, 3, ROWS_PER_SHARD + 2]))
    def plan(self, batch: str, pick: int, rows: int) -> None:
        frames = LENGTHS[batch][pick % len(LENGTHS[batch])]
        part = self.store.plan_part(batch, frames, ids(rows, self.made))
        self.made += rows
        self.open += [(batch, frames, part.number, shard) for shard in range(part.shards)]

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0), failing=st.integers(0, 5))
    def write(self, pick: int, failing: int) -> None:
        key = self.open.pop(pick % len(self.open))
        part, shard = self.found(key), key[3]
        row_ids = part.rows_of(shard)["row_id"].to_list()
        failed = row_ids[failing : failing + 1]
        write(part, shard, failed)
        self.litter.discard(key)
        self.model |= {found: (*key, found not in failed) for found in row_ids}

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0), whole=st.booleans())
    def crash_before_the_commit(self, pick: int, whole: bool) -> None:
        key = self.open[pick % len(self.open)]
        path = Path(self.found(key).shard_path(key[3]))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self.found(key)
        latents = values(part.rows_of(key[3])["row_id"].to_list(), key[1]).astype("<f2")
        path.write_bytes(latents.tobytes() if whole else b"half")
        self.litter.add(key)

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0))
    def write_again(self, pick: int) -> None:
        batch, frames, number, shard, _ = list(self.model.values())[pick % len(self.model)]
        part = self.store.part(batch, frames, number)
        with pytest.raises(ConflictError):
            part.write_shard(shard, values(part.rows_of(shard)["row_id"].to_list(), frames) + 1, commit_of(part, shard))

    @precondition(lambda self: self.standing())
    @rule(pick=st.integers(0), where=st.floats(0, 1, exclude_max=True))
    def rot_and_drop(self, pick: int, where: float) -> None:
        """A byte of a committed shard flips: verify names it; without its commit the shard is open again."""
        standing = self.standing()
        key = standing[pick % len(standing)]
        part, shard = self.found(key), key[3]
        path = Path(part.shard_path(shard))
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 4
        path.write_bytes(data)
        problems = [problem for problem in self.store.verify() if problem.file == str(path)]
        assert problems
        assert problems[0].remedy.startswith(f"remove {part.commit_path(shard)} ")
        Path(part.commit_path(shard)).unlink()
        self.model = {row: where for row, where in self.model.items() if where[:4] != key}
        self.open.append(key)
        self.litter.add(key)

    @precondition(lambda self: self.standing())
    @rule(pick=st.integers(0))
    def sweep(self, pick: int) -> None:
        """A shard that nothing needs is freed: its rows are no longer ok, and nothing else changes."""
        standing = self.standing()
        key = standing[pick % len(standing)]
        assert self.found(key).discard(key[3]) > 0
        assert self.found(key).discard(key[3]) == 0
        self.model |= {row: (*key, False) for row, where in self.model.items() if where[:4] == key}
        self.swept.add(key)

    @precondition(lambda self: self.standing())
    @rule(pick=st.integers(0), row=st.integers(0))
    def withdraw(self, pick: int, row: int) -> None:
        """A row's bytes become zeros; it stays committed, and verify expects the zeros."""
        standing = self.standing()
        key = standing[pick % len(standing)]
        rows = [name for name, where in self.model.items() if where[:4] == key]
        name = rows[row % len(rows)]
        part = self.found(key)
        record_withdrawal(self.root, digest([name.hex()]), [name])
        part.erase(part.plan.filter(row_id=name)["slot"].to_list())
        self.withdrawn.add(name)

    @rule(batch=st.sampled_from(BATCHES))
    def seal(self, batch: str) -> None:
        """Whatever happens to a part afterwards, the model tells what it holds."""
        self.store.seal(batch)

    @rule()
    def reopen(self) -> None:
        self.store = LatentStore.open(DataRoot.open(self.folder), spec().digest())

    @rule()
    def verify(self) -> None:
        found = {problem.file for problem in self.store.verify()}
        assert found == {self.found(key).shard_path(key[3]) for key in self.litter}

    @rule(seed=st.integers(0, 2**32))
    def read(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        reader = RowReader(self.root, self.store.spec, BATCHES, ahead_rows=2)
        for batch in BATCHES:
            for frames in self.store.frames_of(batch):
                known = addresses(self.store.commits(batch, frames), BATCHES)
                out = np.empty(self.store.spec.row_shape(frames), np.float16)
                for address in random.choice(known, min(len(known), 8), replace=False):
                    if row_id(address) in self.withdrawn:
                        with pytest.raises(DamagedError, match="withdrawn"):
                            reader.read_into(frames, address, out)
                        continue
                    reader.read_into(frames, address, out)
                    np.testing.assert_array_equal(out, values([row_id(address)], frames)[0].astype(np.float16))

    @invariant()
    def commits_are_the_model(self) -> None:
        for batch in BATCHES:
            found = {
                row["row_id"]: (batch, row["frames"], row["part"], row["shard"], row["status"] == "ok")
                for row in self.store.commits(batch).iter_rows(named=True)
            }
            assert found == {row: where for row, where in self.model.items() if where[0] == batch}

    @invariant()
    def unfinished_is_the_first_open(self) -> None:
        for batch in BATCHES:
            for frames in LENGTHS[batch]:
                numbers = [key[2] for key in self.open if key[:2] == (batch, frames)]
                part = self.store.unfinished(batch, frames)
                assert (None if part is None else part.number) == min(numbers, default=None)

    def standing(self) -> list[tuple[str, int, int, int]]:
        """Committed shards whose bytes are there, and whose rows are all as they were written."""
        held = {where[:4] for row, where in self.model.items()}
        touched = {self.model[row][:4] for row in self.withdrawn if row in self.model}
        return sorted(held - self.swept - touched)

    def found(self, key: tuple[str, int, int, int]) -> LatentPart:
        return self.store.part(key[0], key[1], key[2])

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=10, stateful_step_count=14)


def test_the_machine_can_fail(data_root: DataRoot) -> None:
    """A store that forgets a commit breaks the machine's invariant."""
    store, part = full_store(data_root, 3)
    machine = StoreMachine()
    machine.store, machine.root = store, data_root
    machine.model = dict.fromkeys(ids(3), ("demo.000000", 4, 0, 0, True))
    machine.commits_are_the_model()
    Path(part.commit_path(0)).unlink()
    with pytest.raises(AssertionError):
        machine.commits_are_the_model()
    machine.teardown()
