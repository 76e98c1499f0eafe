"""Write `locked/`, what the Makefile installs with the hash of each file, and its licences: `python deploy/lock.py`.

Versions are those of constraints.txt; requirements, hashes and licences are those of PyPI. Each list holds what its
extras need and the lists before it do not. Torch is in none, nor what its CUDA builds add: builds differ by platform,
so it is pinned by version alone.
"""

import email
import importlib.metadata
import io
import json
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

INDEX = "https://pypi.org/simple"
JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}
ROOT = Path(__file__).parent.parent
LICENCES = ROOT / "docs" / "licences.md"
HEAD = """# Licences of what is installed

Made by `python deploy/lock.py`: each package that `make` installs with the licence that it names. What each direct
dependency is for is said in [pyproject.toml](../pyproject.toml).

| package | version | licence |
|---|---|---|"""
LISTS = {
    "ui": ("ui",),
    "test": ("ui", "test"),
    "services": ("ui", "test", "ray", "postgres", "kubernetes", "services"),
}
BUILD = ("hatchling", "editables")  # what builds the project itself: pip would fetch the newest
WITH_TORCH = ("nvidia-", "cuda-", "triton")
PYTHONS = ("3.11", "3.12", "3.13")  # README.md
PLATFORMS = ("any", "manylinux", "macosx")
INTERPRETERS = {"py3", *(f"cp{python.replace('.', '')}" for python in PYTHONS)}


class Release(NamedTuple):
    """A package in one version."""

    version: str
    hashes: list[str]  # SHA-256 of each wheel
    requires: list[Requirement]
    licence: str  # as the package says it


def main() -> None:
    """Write a file for each list."""
    pins = read_pins()
    releases: dict[str, Release] = {}
    (ROOT / "locked").mkdir(exist_ok=True)
    before: set[str] = {"torch"}
    for name, extras in LISTS.items():
        wanted = [Requirement(text) for extra in extras for text in own_requirements(extra)]
        needed = closure([*wanted, *map(Requirement, BUILD)], pins, releases)
        markers = {str(canonicalize_name(one.name)): one.marker for one in wanted}
        lines = [locked(package, releases[package], markers.get(package)) for package in sorted(needed - before)]
        (ROOT / "locked" / f"{name}.txt").write_text("\n".join(["# python deploy/lock.py", *lines, ""]))
        before |= needed
    rows = [f"| {name} | {release.version} | {release.licence} |" for name, release in sorted(releases.items())]
    LICENCES.write_text("\n".join([HEAD, *rows, ""]))


def read_pins() -> dict[str, str]:
    """Version by name, of constraints.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): version for name, _, version in pairs}


def own_requirements(extra: str) -> list[str]:
    """What pyproject.toml asks for, with this extra and those that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *project["optional-dependencies"][extra]]
    for text in project["optional-dependencies"][extra]:
        if (requirement := Requirement(text)).name == project["name"]:
            found.remove(text)
            found += [text for other in requirement.extras for text in own_requirements(other)]
    return found


def closure(wanted: Iterable[Requirement], pins: Mapping[str, str], releases: dict[str, Release]) -> set[str]:
    """Names of all that these need on any of PYTHONS; their documents on PyPI are added to `releases`."""
    found: set[tuple[str, str]] = set()
    waiting = list(wanted)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            raise SystemExit(f"constraints.txt has no version of {name}")
        if name not in releases:
            if name == "torch":  # as installed: its wheels are large, and other builds need the same
                releases[name] = release(pins[name], importlib.metadata.distribution(name).metadata, [])
            else:
                releases[name] = fetch_release(name, pins[name])
        for extra in {"", *requirement.extras} - {known for package, known in found if package == name}:
            found.add((name, extra))
            for needed in releases[name].requires:
                pythons = ({"python_version": python, "extra": extra} for python in PYTHONS)
                applies = needed.marker is None or any(map(needed.marker.evaluate, pythons))
                if applies and not needed.name.startswith(WITH_TORCH):
                    waiting.append(needed)
    return {name for name, _ in found}


def fetch_release(package: str, version: str) -> Release:
    """The release of a package that constraints.txt names, as the index documents it."""
    page = json.loads(read(f"{INDEX}/{package}/", JSON))
    wheels = [one for one in page["files"] if fits(one["filename"], version)]
    if not wheels:
        raise SystemExit(f"{package}=={version} has no wheel that fits")
    with zipfile.ZipFile(io.BytesIO(read(min(wheels, key=lambda one: one["size"])["url"]))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    return release(version, metadata, sorted(one["hashes"]["sha256"] for one in wheels))


def release(version: str, metadata: Message | importlib.metadata.PackageMetadata, hashes: list[str]) -> Release:
    """A release by its metadata (packaging.python.org, core metadata)."""
    classes = [
        one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier") or () if one.startswith("License ::")
    ]
    licence = metadata["License-Expression"] or ", ".join(classes) or (metadata["License"] or "unknown").splitlines()[0]
    return Release(version, hashes, [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()], licence)


def read(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    """The content of a page of the index."""
    request = urllib.request.Request(url, headers=dict(headers or {}))  # noqa: S310 - addresses of the index
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def locked(package: str, release: Release, marker: Marker | None) -> str:
    """The lines of one package: its version and the hashes of its wheels for PYTHONS and PLATFORMS."""
    where = f" ; {marker}" if marker else ""
    return " \\\n".join(
        [f"{package}=={release.version}{where}", *(f"    --hash=sha256:{one}" for one in release.hashes)]
    )


def fits(filename: str, version: str) -> bool:
    """Whether a file is a wheel of this version that one of PYTHONS on one of PLATFORMS may take."""
    if not filename.endswith(".whl") or filename.split("-")[1] != version:
        return False
    _, _, _, tags = parse_wheel_filename(filename)
    return any(
        tag.platform.startswith(PLATFORMS)
        and (tag.interpreter in INTERPRETERS or (tag.abi == "abi3" and tag.interpreter.startswith("cp3")))
        for tag in tags
    )


if __name__ == "__main__":
    main()
