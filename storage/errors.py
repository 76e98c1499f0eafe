"""Every error that a user can meet, in one tree; each class has a stable `kind` for scripts.

    NExTVidError (ValueError)
    +-- ConfigError      config      corpus.yaml, a recipe or an override is wrong
    +-- CorpusError      corpus      a folder, listing or label file cannot be read or contradicts itself
    +-- MediaError       media       one file cannot be decoded within the contract; becomes a row, never a crash
    +-- TableError       table       a parquet table breaks its schema
    +-- StoreError       store       a latent store is not what its metadata says
    |   +-- DamagedError damaged     bytes differ from their checksum, or a committed shard is missing or short
    |   +-- ConflictError conflict   somebody else created this name first (also FileExistsError)
    +-- UnwritableError  unwritable  the system allows no writing there: no permission, no room (also OSError)
    +-- MachineError     system      memory, open files or processes are used up, or a file's disk fails
    +-- UpstreamError    upstream    what this step reads is missing or failed its checks
    +-- RefusedError     refused     a run, checkpoint or trainset does not fit what was asked
    +-- LostError        lost        a process or machine of the same work is gone: starting again resumes

Messages say what is wrong, where, and what to do. Programmers' mistakes are `assert`, never these. What is reported as
damage, whose remedy removes files, is decided here alone (`is_damage`).
"""

import errno


class NExTVidError(ValueError):
    """Root of the tree; a `ValueError`, so that callers who do not know this tree can catch it too."""

    kind = "error"


class ConfigError(NExTVidError):
    """A configuration is wrong: unknown key, impossible value, missing file."""

    kind = "config"


class CorpusError(NExTVidError):
    """A dataset's folder, listing or label file cannot be read, or contradicts itself."""

    kind = "corpus"


class LabelError(CorpusError):
    """A label file cannot be read, or a line of it cannot be used."""


class MediaError(NExTVidError):
    """One media file cannot be used. `reason` is the short word that goes to the table's `reason` column."""

    kind = "media"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TableError(NExTVidError):
    """A table on disk breaks its schema."""

    kind = "table"


class StoreError(NExTVidError):
    """A latent store is not what its metadata says."""

    kind = "store"


class DamagedError(StoreError):
    """Committed bytes are missing, short or differ from their checksum."""

    kind = "damaged"


class ConflictError(StoreError, FileExistsError):
    """Somebody else created this name first; the bytes of the first stay."""

    kind = "conflict"


class UnwritableError(NExTVidError, OSError):
    """A read-only disk, no permission to write, or no room; what was there before is as it was."""

    kind = "unwritable"


class MachineError(NExTVidError):
    """The system gives no more memory, open files or processes, or refuses a file; running again goes on."""

    kind = "system"


class UpstreamError(NExTVidError):
    """What this step reads does not exist yet, or failed its checks."""

    kind = "upstream"


class RefusedError(NExTVidError):
    """A run, checkpoint or trainset does not fit what was asked of it."""

    kind = "refused"


class LostError(NExTVidError):
    """A process or machine of the same work was killed or does not answer; starting again resumes."""

    kind = "lost"


LOST = 75  # EX_TEMPFAIL of sysexits.h


def exit_code(error: NExTVidError | OSError) -> int:
    """The exit code of a command that ends with this error; `nextvid --help` lists the codes."""
    match error:
        case ConfigError() | CorpusError():
            return 2
        case UpstreamError():
            return 3
        case DamagedError() | TableError():
            return 4
        case UnwritableError() | MachineError():
            return 5
        case LostError():
            return LOST
        case NExTVidError():  # before OSError: a ConflictError is one too
            return 1
        case OSError():
            return 5


def is_damage(error: Exception) -> bool:
    """Whether reading a file failed for what the file is: gone, unreadable on its disk, or of other bytes.

    A network, credentials, a mode, a full disk or too many open files say nothing of the file. Removing the file for
    such an error would lose sound bytes, so these errors pass through as they are.
    """
    if isinstance(error, NExTVidError):
        return isinstance(error, (DamagedError, TableError, UpstreamError))
    if isinstance(error, OSError):  # fsspec's have no errno
        return isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) or error.errno == errno.EIO
    return isinstance(error, (ValueError, EOFError))  # what a parser says of bytes
