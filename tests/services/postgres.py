"""A Postgres of our own on the loopback interface: Debian's package, run by an ordinary user, gone after the test."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.services.conftest import free_port, wait_for

DEBIAN = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """Folder of Postgres' programs: the newest of Debian's, else on the path; None where it is not installed."""
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """A server with one database `dagster`; its URL. Postgres refuses to run as root: then it runs as `postgres`."""
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # its socket: paths have to be short
    if os.getuid() == 0:
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    port = free_port()

    def command(*arguments: str) -> list[str]:
        return [str(programs / arguments[0]), *arguments[1:]]

    start = command("initdb", "-D", str(folder / "data"), "-U", "dagster", "--auth=trust", "-E", "UTF8")
    subprocess.run(start, user=user, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    server = subprocess.Popen(
        command("postgres", "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)),
        user=user,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
    )
    try:
        ready = command("pg_isready", "-h", "127.0.0.1", "-p", str(port))
        wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60)
        make = command("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "dagster", "dagster")
        subprocess.run(make, check=True, cwd=folder)
        yield f"postgresql+psycopg2://dagster@127.0.0.1:{port}/dagster"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
