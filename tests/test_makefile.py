"""What `make` says in one line, before it installs anything, where a copy of the checkout lacks something."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def copied(tmp_path: Path, repository: Path) -> Path:
    """What make reads before it installs, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "locked/ui.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(repository / name, tmp_path / name)
    return tmp_path


def refused(folder: Path, *variables: str, within: tuple[str, ...] = ()) -> str:
    """What `make demo` says where it ends with an error; it has installed nothing."""
    words = [*within, "make", "demo", "VENV=env", f"PYTHON={sys.executable}", *variables]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not (folder / "env").exists()
    assert "Traceback" not in done.stderr
    return done.stdout


def test_a_python_without_venv_names_its_package(copied: Path) -> None:
    assert "false with venv is needed here: apt install python3-venv\n" in refused(copied, "PYTHON=false")


def test_a_full_disk_is_told_before_the_install(copied: Path) -> None:
    said = refused(copied, f"INSTALLED_KB={10**12}")
    assert "MB free, and the install takes 1000000000: make room there, or copy the checkout elsewhere\n" in said


def test_two_at_once_do_not_install_into_one_folder(copied: Path) -> None:
    with (copied / "env.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another make installs in {copied}: wait until it has ended, then make again\n" in refused(copied)


def test_a_read_only_copy(copied: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces to mount in")
    mounted = f"mount --bind {copied} {copied} && mount -o remount,bind,ro {copied} && cd {copied} && exec"
    within = (unshare, "-Urm", "sh", "-c", f'{mounted} "$@"', "sh")
    said = refused(copied, within=within)
    assert f"{copied} cannot be written by this user: copy the checkout to a folder that can\n" in said


def test_an_audit_covers_all_pins_and_fails_where_the_database_lacks_one(copied: Path) -> None:
    tool = copied / "pip-audit"
    tool.write_text("#!/bin/sh\n" + 'for word; do test "$word" = --strict && cat constraints.txt && exit 1; done\n')
    tool.chmod(0o755)
    searched = {"PATH": f"{copied}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "audit"], cwd=copied, env=searched, capture_output=True, text=True, check=False)
    assert "\ntorch==" in done.stdout
    assert done.returncode
