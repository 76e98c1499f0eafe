"""What is installed is what `locked/` lists, and that is what constraints.txt and pyproject.toml ask for."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock import BUILD, PYTHONS, WITH_TORCH

ROOT = Path(__file__).parent.parent
LAYERS = ("storage", "nextvid", "assets", "orchestration", "examples")
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


def test_what_is_listed_is_what_the_project_needs() -> None:
    """Followed through the installed packages, on any Python, it is the list: nothing is missing, nothing is unused."""
    waiting = [("nextvid", extra) for extra in ("", "ui", "test")] + [(name, "") for name in BUILD]
    needed = set[tuple[str, str]]()
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in needed or package.startswith(WITH_TORCH):
            continue
        needed.add((package, extra))
        try:
            requirements = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:  # of another Python, or a tool of the build
            continue
        for one in map(Requirement, requirements):
            environments = ({"python_version": python, "extra": extra} for python in PYTHONS)
            if one.marker is None or any(map(one.marker.evaluate, environments)):
                waiting += [(canonicalize_name(one.name), of) for of in ("", *one.extras)]
    assert {package for package, _ in needed} - {"nextvid", "torch"} == set(listed("ui")) | set(listed("test"))


def test_each_dependency_is_imported_and_says_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lines = text.partition("\ndependencies = [\n")[2].partition("\n]")[0].splitlines()
    asked = [line for line in lines if not line.startswith("  #")]
    assert [line for line in asked if " # " not in line] == []
    sources = (path.read_text() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
    imported = {name for source in sources for name in re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)}
    modules = importlib.metadata.packages_distributions()
    provided = {canonicalize_name(one) for name in imported for one in modules.get(name, ())}
    names = {canonicalize_name(Requirement(line.split('"')[1]).name) for line in asked}
    assert names - provided == {"tensorboard"}  # which torch.utils.tensorboard imports


def test_every_licence_is_named() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "licences.md").read_text().splitlines() if "==" not in line]
    found = {row[0].removeprefix("| "): row[2].removesuffix(" |") for row in rows if len(row) == 3}
    assert set(listed("ui")) | set(listed("test")) | set(listed("services")) <= set(found)
    assert all(licence.strip() for licence in found.values())
