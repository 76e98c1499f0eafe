"""`make` says in one line what a copy of the checkout lacks, before it installs, and works where a path has a space."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def copied(tmp_path: Path, repository: Path) -> Path:
    """What make reads before it installs, in a folder whose name has a space."""
    folder = tmp_path / "a folder"
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "locked/ui.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, folder / name)
    return folder


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
    mounted = f"mount --bind '{copied}' '{copied}' && mount -o remount,bind,ro '{copied}' && cd '{copied}'"
    within = (unshare, "-Urm", "sh", "-c", f'{mounted} && exec "$@"', "sh")
    said = refused(copied, within=within)
    assert f"{copied} cannot be written by this user: copy the checkout to a folder that can\n" in said


@pytest.mark.parametrize(("target", "told"), [("demo", "-m examples.demo"), ("ui", "dev")])
def test_the_demo_is_configured_in_a_folder_with_a_space(copied: Path, target: str, told: str) -> None:
    for name in ("python", "dagster"):
        program = copied / "env" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/bin/sh\necho "$DAGSTER_HOME|$NEXTVID_CORPUS|$*"\n')
        program.chmod(0o755)
    (copied / "env" / "ui").touch()
    done = subprocess.run(["make", target, "VENV=env"], cwd=copied, capture_output=True, text=True, check=True)
    assert f"{copied}|{copied}/examples/demo/corpus.yaml|{told}\n" in done.stdout


def test_an_audit_covers_all_pins_and_fails_where_the_database_lacks_one(copied: Path) -> None:
    tool = copied / "pip-audit"
    tool.write_text("#!/bin/sh\n" + 'for word; do test "$word" = --strict && cat constraints.txt && exit 1; done\n')
    tool.chmod(0o755)
    searched = os.environ | {"PATH": f"{copied}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "audit"], cwd=copied, env=searched, capture_output=True, text=True, check=False)
    assert "\ntorch==" in done.stdout
    assert done.returncode
