"""A fresh Debian 12 with git, make, python3 and python3-venv alone, an ordinary user and a path with a space.

`make fresh` runs `make demo` and `make test` there, or the targets in FRESH (`make fresh FRESH=.venv/ui`), and prints
packages, megabytes and minutes. Needs root, debootstrap and a Debian mirror (MIRROR, else debootstrap's own). How pip
reaches its index is taken from here: its variables, its configuration and the certificates and folders they name.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("git", "make", "python3", "python3-venv", "ca-certificates")  # the last is of whoever has pip's index
USER, HOME = "reader", "home/reader"
CHECKOUT = f"/{HOME}/a folder/nextvid"
PASSED = ("PIP_", "SSL_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
CONFIGURED = ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf")
PLACE = re.compile(r"(?:file://)?(/[\w./+-]+)")
# What is mounted is unmounted with the namespace, and what is started ends with it.
ENTER = """
set -eu
root=$1; shift
mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp"
chmod 1777 "$root/tmp"
while [ "$1" != -- ]; do mkdir -p "$root$1"; mount --bind "$1" "$root$1"; shift; done; shift
exec chroot "$root" "$@"
"""

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif("FRESH" not in os.environ, reason="half an hour: make fresh"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may enter another root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="no debootstrap here"),
]


@pytest.fixture
def fresh(tmp_path: Path, repository: Path) -> Iterator[Path]:
    """The root, with the repository cloned as its user would."""
    root = Path(os.environ.get("FRESH_ROOT", tmp_path / "root"))
    if not (root / "etc").exists():
        mirror = [os.environ["MIRROR"]] if "MIRROR" in os.environ else []
        include = f"--include={','.join(PACKAGES)}"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", include, "bookworm", str(root), *mirror],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"debootstrap made no Debian here: {made.stdout.splitlines()[-1:]}")
        subprocess.run(["chroot", str(root), "useradd", "--create-home", USER], check=True)
    for file in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(file).exists():
            shutil.copy(file, f"{root}{file}")
    settings = [found for name in CONFIGURED if (found := Path(name).expanduser()).exists()]
    (root / "etc" / "pip.conf").write_text("\n".join(found.read_text() for found in settings[:1]))
    if len(settings) > 1:
        (root / HOME / ".config" / "pip").mkdir(parents=True, exist_ok=True)
        shutil.copy(settings[1], root / HOME / ".config" / "pip" / "pip.conf")
    if not Path(f"{root}{CHECKOUT}").exists():
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", repository, f"{root}{CHECKOUT}"], check=True)
    subprocess.run(["chroot", str(root), "chown", "-R", f"{USER}:", f"/{HOME}"], check=True)
    yield root
    if "FRESH_ROOT" not in os.environ:
        shutil.rmtree(root)


def entered(root: Path, command: str) -> tuple[int, float]:
    """Exit code and seconds of a shell command of the user in the checkout; what it prints is shown."""
    words = " ".join(value for name, value in os.environ.items() if name.startswith(PASSED))
    words += " ".join(path.read_text() for name in CONFIGURED if (path := Path(name).expanduser()).exists())
    places = {Path(place) for place in PLACE.findall(words) if Path(place).is_dir()}
    # an index in a folder names files beside it
    folders = sorted(str(place.parent if len(place.parts) > 3 else place) for place in places)
    tops = [place for place in folders if not any(place.startswith(f"{other}/") for other in folders)]
    tops = [place for place in tops if not place.startswith("/etc")]
    known = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(PASSED)]
    within = ["env", "-i", "PATH=/usr/bin:/bin", f"HOME=/{HOME}", "LANG=C.UTF-8", *known, "sh", "-c"]
    setpriv = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
    began = time.monotonic()
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh", str(root), *tops, "--",
         *setpriv, *within, f"cd '{CHECKOUT}' && {command}"],
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return done.returncode, time.monotonic() - began


def megabytes(path: str) -> int:
    found = subprocess.run(["du", "-sm", path], capture_output=True, text=True, check=False).stdout.split()
    return int(found[0]) if found else 0


def test_the_readme_s_commands_on_a_fresh_machine(fresh: Path) -> None:
    report = [f"packages: {' '.join(PACKAGES)}, {megabytes(str(fresh / 'usr'))} MB with Debian's base"]
    for target in (".venv/ui", *os.environ["FRESH"].split()):
        code, seconds = entered(fresh, f"make {target}")
        report.append(f"make {target}: exit code {code}, {seconds / 60:.1f} minutes")
        assert code == 0, "\n".join(report)
    report += [f"{name}: {megabytes(f'{fresh}{CHECKOUT}/{name}')} MB" for name in (".venv", "data")]
    sys.stderr.write("\n".join(["", *report, ""]))
