"""What the copies in a cache folder take, and which processes need them: an SQLite file beside them.

Adding up and choosing what to remove cost the same at any number of copies. A set of copies is leased by a process that
reads it again and again: no process of the machine removes one of them, and sets are leased as long as all of them fit
together. The lease is a lock on a file, so it ends with its process, however that dies.

The files are the truth: a copy is there if its file is. A folder without an index, such as one of release 0.1, is
counted once.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from storage import atomic
from storage.digest import digest
from storage.errors import ConfigError, UnwritableError
from storage.limits import limit_met
from storage.locks import is_locked

NAME = "index.sqlite"
VERSION = 1
WAIT_S = 120.0  # our choice: for another process's transaction, which takes milliseconds
LEFTOVER_AGE_S = 3600.0  # our choice: a download of a shard (67 MB) that took longer has died
# `state` of a copy: missing (leased, not made yet), making, there. `sums`: bytes of all but the missing; of leased ones
_TABLES = """
CREATE TABLE copies (path TEXT PRIMARY KEY, size_bytes INTEGER, state TEXT, used_ns INTEGER, leases INTEGER)
WITHOUT ROWID

CREATE INDEX removable ON copies (used_ns) WHERE state = 'there' AND leases = 0

CREATE INDEX missing ON copies (path) WHERE state = 'missing' AND leases = 0

CREATE INDEX in_the_making ON copies (path) WHERE state = 'making'

CREATE TABLE members (lease TEXT, path TEXT, PRIMARY KEY (lease, path)) WITHOUT ROWID

CREATE TABLE holders (holder TEXT PRIMARY KEY, lease TEXT)

CREATE TABLE sums (there INTEGER, leased INTEGER)

INSERT INTO sums VALUES (0, 0)

CREATE TRIGGER added AFTER INSERT ON copies BEGIN UPDATE sums SET
there = there + new.size_bytes * (new.state <> 'missing'),
leased = leased + new.size_bytes * (new.leases > 0); END

CREATE TRIGGER removed AFTER DELETE ON copies BEGIN UPDATE sums SET
there = there - old.size_bytes * (old.state <> 'missing'),
leased = leased - old.size_bytes * (old.leases > 0); END

CREATE TRIGGER changed AFTER UPDATE ON copies BEGIN UPDATE sums SET
there = there + new.size_bytes * (new.state <> 'missing') - old.size_bytes * (old.state <> 'missing'),
leased = leased + new.size_bytes * (new.leases > 0) - old.size_bytes * (old.leases > 0); END
"""
_OLDEST = "SELECT path, used_ns FROM copies WHERE state = 'there' AND leases = 0 ORDER BY used_ns LIMIT 1"


class Index:
    """The index of one cache folder; paths are relative to it. Threads and processes may share the folder.

    Every method raises ConfigError where the file is no index of ours, UnwritableError where the folder takes none.
    `lock_of` names the lock that whoever makes a copy holds.
    """

    def __init__(self, folder: Path, bound_bytes: int, lock_of: Callable[[str], Path]) -> None:
        self._top, self._bound_bytes, self._lock_of = folder, bound_bytes, lock_of

    def lease(self, holder: str, sizes: Mapping[str, int]) -> bool:
        """Keep copies (path: size in bytes), made or not, for a holder; False where they do not fit beside others.

        The holder has locked the file of its name.
        """
        lease = digest(dict(sizes))
        with self._transaction() as db:
            is_known = db.execute("SELECT 1 FROM holders WHERE lease = ?", [lease]).fetchone()
            db.execute("INSERT INTO holders VALUES (?, ?)", [holder, lease])
            if not is_known:
                db.executemany("INSERT INTO members VALUES (?, ?)", ((lease, path) for path in sizes))
                db.executemany(
                    "INSERT INTO copies VALUES (?, ?, 'missing', 0, 1) "
                    "ON CONFLICT (path) DO UPDATE SET leases = leases + 1",
                    sizes.items(),
                )
            leased = "SELECT leased <= ? FROM sums"
            if not db.execute(leased, [self._bound_bytes]).fetchone()[0]:
                self._forget_dead(db)
            if db.execute(leased, [self._bound_bytes]).fetchone()[0]:
                return True
            db.execute("ROLLBACK")
            return False

    def release(self, holder: str) -> None:
        """End a lease; nothing to do for one that is not known."""
        with self._transaction() as db:
            _forget(db, holder)

    def reserve(self, path: str, size_bytes: int) -> tuple[bool, bool]:
        """Count a copy that is going to be made, and remove others for it; whether it fits, and whether some end soon.

        Removed are copies that nobody leases, least recently used first.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT INTO copies VALUES (?, ?, 'making', 0, 0) ON CONFLICT (path) DO UPDATE SET "
                "size_bytes = excluded.size_bytes, state = excluded.state",
                [path, size_bytes],
            )
            if self._make_room(db):
                return True, False
            self._forget_dead(db)
            if self._make_room(db):
                return True, False
            self._not_there(db, path)
            return False, db.execute("SELECT 1 FROM copies WHERE state = 'making'").fetchone() is not None

    def made(self, path: str) -> None:
        """A reserved copy has its name now."""
        with self._transaction() as db:
            db.execute("UPDATE copies SET state = 'there', used_ns = ? WHERE path = ?", [time.time_ns(), path])

    def gone(self, path: str) -> None:
        """A copy was removed, or was not made."""
        with self._transaction() as db:
            self._not_there(db, path)

    def _make_room(self, db: sqlite3.Connection) -> bool:
        while db.execute("SELECT there > ? FROM sums", [self._bound_bytes]).fetchone()[0]:
            oldest = db.execute(_OLDEST).fetchone()
            if oldest is None:
                return False
            file, used_ns = self._top / oldest[0], 0
            with suppress(FileNotFoundError):
                used_ns = file.stat().st_mtime_ns  # set by whoever opens it, without asking the index
            if used_ns > oldest[1]:
                db.execute("UPDATE copies SET used_ns = ? WHERE path = ?", [used_ns, oldest[0]])
                continue
            file.unlink(missing_ok=True)  # a process that has it mapped keeps the bytes
            self._not_there(db, oldest[0])
        return True

    def _not_there(self, db: sqlite3.Connection, path: str) -> None:
        db.execute("UPDATE copies SET state = 'missing' WHERE path = ?", [path])
        db.execute("DELETE FROM copies WHERE path = ? AND leases = 0", [path])

    def _forget_dead(self, db: sqlite3.Connection) -> None:
        """Leases of processes that have ended, and copies that they were making."""
        for (holder,) in db.execute("SELECT holder FROM holders").fetchall():
            if not is_locked(str(self._top / holder)):
                _forget(db, holder)
                (self._top / holder).unlink(missing_ok=True)
        for (path,) in db.execute("SELECT path FROM copies WHERE state = 'making'").fetchall():
            file = self._top / path
            if is_locked(str(self._lock_of(path))):
                continue
            if file.exists():
                db.execute("UPDATE copies SET state = 'there' WHERE path = ?", [path])
                continue
            self._not_there(db, path)
            for left in file.parent.glob(f".{file.name}.*{atomic.SUFFIX}"):
                left.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        path = self._top / NAME
        try:
            atomic.make_folder(self._top)
            with closing(sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                self._create(db)
                yield db
                if db.in_transaction:
                    db.execute("COMMIT")  # left out by an error, SQLite rolls back
        except sqlite3.OperationalError as error:
            raise limit_met(error, str(path)) or UnwritableError(
                f"{path}: {error}. Let this user write there, or name another cache.folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{path} is damaged or no index of copies ({error}): remove it, it is made again"
            ) from error

    def _create(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        if version or db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ConfigError(
                f"{self._top / NAME} is of another program or of a newer version of nextvid: name another cache.folder"
            )
        for statement in _TABLES.split("\n\n"):
            db.execute(statement)
        for folder in self._top.glob("[0-9a-f]" * 32):  # of roots, named by digests
            atomic.remove_leftovers(str(folder), LEFTOVER_AGE_S)
            for file in folder.rglob("*"):
                if file.is_file() and not atomic.is_temporary(str(file)):
                    found, path = file.stat(), str(file.relative_to(self._top))
                    row = [path, found.st_size, found.st_mtime_ns]
                    db.execute("INSERT INTO copies VALUES (?, ?, 'there', ?, 0)", row)
        db.execute(f"PRAGMA user_version = {VERSION}")


def _forget(db: sqlite3.Connection, holder: str) -> None:
    found = db.execute("DELETE FROM holders WHERE holder = ? RETURNING lease", [holder]).fetchall()
    if not found or db.execute("SELECT 1 FROM holders WHERE lease = ?", found[0]).fetchone():
        return
    db.execute(
        "UPDATE copies SET leases = leases - 1 WHERE path IN (SELECT path FROM members WHERE lease = ?)", found[0]
    )
    db.execute("DELETE FROM members WHERE lease = ?", found[0])
    db.execute("DELETE FROM copies WHERE state = 'missing' AND leases = 0")
