"""A limit of the machine, in the words of whichever library met it, is one line with place and remedy."""

import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage import atomic
from storage.errors import ConfigError, MachineError, MediaError, NExTVidError, UnwritableError, exit_code
from storage.limits import code_of, explained, limit_met


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "", "/tmp/a/b"), errno.ENOSPC, "/tmp/a/b cannot be written: its disk is full .*TMPDIR"),
        (OSError(errno.EDQUOT, "x", "/etc/a"), errno.EDQUOT, r"/etc/a cannot be written: the disk quota .*MB are free"),
        (OSError(errno.EFBIG, "x", "/etc/a"), errno.EFBIG, "ulimit -f"),
        (OSError(errno.EROFS, "x", "/etc/a"), errno.EROFS, "/etc/a cannot be written: it is on a read-only"),
        (OSError(errno.EMFILE, "x", "/etc/a"), errno.EMFILE, r"to open /etc/a: .* 'ulimit -n \d+'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC, "disk is full"),  # safetensors
        (RuntimeError("Error: Disk quota exceeded (os error 122)"), errno.EDQUOT, "quota"),
        (sqlite3.OperationalError("database or disk is full"), errno.ENOSPC, "disk is full"),
        (sqlite3.OperationalError("attempt to write a readonly database"), errno.EROFS, "read-only"),
        (MemoryError(), errno.ENOMEM, "memory is used up.*NEXTVID_CORES=1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), errno.ENOMEM, "memory is used up"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), errno.ENOMEM, "memory of the GPU.*micro_batch"),
        (RuntimeError("can't start new thread"), errno.EAGAIN, "ulimit -u"),
        (RuntimeError("PytorchStreamWriter failed writing file x: file write failed"), errno.ENOSPC, "disk is full"),
        (RuntimeError("shapes differ"), None, None),
        (ValueError("no room for 28"), None, None),
    ],
)  # fmt: skip
def test_each_library_s_words(error: Exception, code: int | None, said: str | None) -> None:
    assert code_of(error) == code
    met = limit_met(error)
    assert (met is None) is (said is None)
    if said is not None:
        assert isinstance(met, (UnwritableError, MachineError))
        assert exit_code(met) == 5
        with pytest.raises(NExTVidError, match=said):
            raise met


def test_a_limit_is_told_whatever_was_made_of_it() -> None:
    """Who reads a file and takes any failure for damage does not hide that no more files could be opened."""
    taken = raised(ConfigError("not readable as a checkpoint"), OSError(errno.EMFILE, "Too many open files"))
    assert isinstance(explained(taken), MachineError)
    hidden = MediaError("unreadable", "x")
    hidden.__context__, hidden.__suppress_context__ = OSError(errno.ENOSPC, "No space", "/tmp/a"), True
    assert isinstance(explained(hidden), UnwritableError)
    own = UnwritableError("cache.folder /x keeps no copies")
    assert explained(raised(own, OSError(errno.ENOSPC, "x"))) is own  # it says more
    other = ConfigError("a key")
    assert explained(raised(other, OSError(errno.EROFS, "x"))) is other
    circle = RuntimeError("a")
    circle.__context__ = raised(RuntimeError("b"), circle)
    assert explained(circle) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO])
def test_other_answers_of_the_system(code: int) -> None:
    said = explained(OSError(code, os.strerror(code), "/x/y"))
    assert isinstance(said, MachineError)
    assert "/x/y" in str(said)
    assert ("let this user read and write it" in str(said)) is (code != errno.EIO)


def write_with_each_library(folder: str) -> None:
    """Files of two MB where one fits; a line each: the error's class, whether it names the file, what is left."""
    import polars
    import zarr
    from safetensors.numpy import save_file

    data = np.random.default_rng(0).integers(0, 255, 2 << 20, np.uint8)
    frame = polars.DataFrame({"a": data})

    def sqlite(path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.execute("create table t (a blob)")
            db.execute("insert into t values (?)", (data.tobytes(),))

    writers = {
        "bytes": lambda path: path.write_bytes(data.tobytes()),
        "numpy": lambda path: np.savez(path.open("wb"), a=data),
        "safetensors": lambda path: save_file({"a": data}, path),
        "polars": lambda path: frame.write_parquet(path),
        "polars sink": lambda path: frame.lazy().sink_parquet(path),
        "sqlite": sqlite,
    }
    for name, write in writers.items():
        path = f"{folder}/{name}"
        try:
            with atomic.staged_file(path) as temporary:
                write(temporary)
            sys.stdout.write(f"{name}: written\n")
        except Exception as error:
            named = f"{path} cannot be written: its disk is full (" in str(error)
            left = [found.name for found in Path(folder).iterdir() if not found.name.endswith("-journal")]
            sys.stdout.write(f"{name}: {type(error).__name__} {named} {left}\n")
    try:
        with atomic.staged_folder(f"{folder}/zarr") as staged:
            zarr.create_array(staged / "a", data=data, compressors=None)
    except Exception as error:
        named = f"{folder}/zarr cannot be written: its disk is full (" in str(error)
        sys.stdout.write(f"zarr: {type(error).__name__} {named} {[p.name for p in Path(folder).iterdir()]}\n")


def test_a_full_disk_of_each_library(tmp_path: Path, repository: Path) -> None:
    """The kernel itself: a file system of 1 MB in a namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces to mount in")
    code = f"from tests.storage.test_limits import write_with_each_library as w; w({str(tmp_path)!r})"
    mounted = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    command = [unshare, "-Urm", "sh", "-c", mounted, "sh", sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.endswith(": UnwritableError True []") for line in lines), done.stdout


def test_open_files_used_up(tmp_path: Path) -> None:
    """The kernel itself: no more descriptors; what was published stays, and the remedy names limit and value."""
    atomic.publish_bytes(str(tmp_path / "table"), b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(MachineError, match=rf"too many files are open .*may have {lowest}\. .*ulimit -n 1024"):
            atomic.publish_bytes(str(tmp_path / "table"), b"new")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "table").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
