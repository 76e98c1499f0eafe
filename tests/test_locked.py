"""What is installed is what `locked/` lists, and that is what constraints.txt and pyproject.toml ask for."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NOT_LOCKED = re.compile(r"torch$|pip$|nextvid$|nvidia-|cuda-|triton")  # torch's builds add to it: deploy/lock.py


def listed(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "locked" / f"{name}.txt").read_text().splitlines()
    found = [Requirement(line.removesuffix(" \\")) for line in lines if line[0] not in " #"]
    return {canonicalize_name(one.name): one for one in found}


@pytest.mark.parametrize("name", ["ui", "test", "services"])
def test_every_package_has_the_version_of_constraints_and_hashes(name: str) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(package): version for package, version in pins.items()}
    assert {package: str(one.specifier) for package, one in listed(name).items()} == {
        package: f"=={pins[package]}" for package in listed(name)
    }
    text = (ROOT / "locked" / f"{name}.txt").read_text()
    entries = re.split(r"\n(?=\S)", text)[1:]
    assert len(entries) == len(listed(name))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


@pytest.mark.parametrize("name", ["ui", "test"])
def test_what_is_listed_is_installed_in_that_version(name: str) -> None:
    needed = {package: one for package, one in listed(name).items() if one.marker is None or one.marker.evaluate()}
    assert needed
    for package, one in needed.items():
        assert importlib.metadata.version(package) in one.specifier, f"{package}: run make test, which installs {one}"


def test_what_the_project_asks_for_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = listed("ui") | listed("test") | listed("services")
    for extra in ("ui", "test", "ray", "postgres", "kubernetes", "s3", "services", "onnx", "heif"):
        for one in map(Requirement, [*project["dependencies"], *extras[extra]]):
            name = canonicalize_name(one.name)
            assert NOT_LOCKED.match(name) or one.specifier.contains(next(iter(lists[name].specifier)).version), name


def test_every_licence_is_named() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "licences.md").read_text().splitlines() if "==" not in line]
    found = {row[0].removeprefix("| "): row[2].removesuffix(" |") for row in rows if len(row) == 3}
    assert set(listed("ui")) | set(listed("test")) | set(listed("services")) <= set(found)
    assert all(licence.strip() for licence in found.values())
