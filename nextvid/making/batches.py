"""Batches: the parts of a key, and a batch's state: which of its assets were made, from what, and whether they passed.

A maker records beside its checks what its result depends on other than upstream tables (`made_from`: a digest by
name, and its own version), so that planning can compare it with what is asked for now.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nextvid.config.datasets import DatasetConfig
from nextvid.config.project import Project
from nextvid.graph import GRAPH
from storage.errors import CorpusError
from storage.root import DataRoot
from storage.tables import read_checks

BatchAsset = Literal["media", "shots", "clips", "latents"]
# Tables that record their maker's version. That of `latents` is part of the encoding spec, so that rows of two versions
# never share a store.
VERSIONED: tuple[Literal["media", "shots", "clips"], ...] = ("media", "shots", "clips")


def batch_key(dataset: str, number: int) -> str:
    """`<dataset>.<nnnnnn>`: the partition key."""
    return f"{dataset}.{number:06d}"


def batch_number(batch: str) -> int:
    """The number in a partition key."""
    return int(batch.rsplit(".", 1)[1])


def dataset_of(batch: str) -> str:
    """The dataset in a partition key."""
    return batch.rsplit(".", 1)[0]


def config_of(project: Project, batch: str) -> DatasetConfig:
    """The configuration of a batch's dataset. Raises CorpusError where corpus.yaml names it no longer."""
    name = dataset_of(batch)
    if name not in project.corpus.datasets:
        raise CorpusError(f"batch {batch}: {project.path} names no dataset '{name}'; add it again or leave the batch")
    return project.corpus.datasets[name]


@dataclass(frozen=True)
class BatchState:
    """The checks of the assets that were asked about, as the files are now; None for one that was never made."""

    checks: Mapping[BatchAsset, Mapping[str, Any] | None]

    @property
    def not_made(self) -> tuple[BatchAsset, ...]:
        """Assets that were never made, in the order of the graph."""
        return tuple(asset for asset, found in self.checks.items() if found is None)

    @property
    def failed(self) -> tuple[BatchAsset, ...]:
        """Assets that have a failed blocking check, in the order of the graph."""
        return tuple(asset for asset, found in self.checks.items() if found is not None and not found["passed"])

    @property
    def usable(self) -> bool:
        """Whether each asset was made and passed."""
        return not self.not_made and not self.failed

    def made_from(self, asset: BatchAsset, name: str) -> str | None:
        """The digest of `name` that an asset was made from; None where it was never made or does not depend on it."""
        found = self.checks[asset]
        return None if found is None else found["made_from"].get(name)

    def version(self, asset: BatchAsset) -> int:
        """The version of the maker that made an asset; 0 where none was recorded."""
        return int(self.made_from(asset, "version") or 0)

    def version_now(self, asset: BatchAsset, *, kept: bool) -> str:
        """What a maker records as the version of its table: where rows of the old table are `kept`, no newer one."""
        current = GRAPH[asset].version
        return str(min(self.version(asset), current) if kept else current)


def batch_state(root: DataRoot, batch: str, *assets: BatchAsset, encoding: str | None = None) -> BatchState:
    """The state of a batch's assets; of `latents`, in the encoding spec of this digest. Reads one file for each.

    Raises TableError where a file is damaged.
    """
    checks: dict[BatchAsset, Mapping[str, Any] | None] = {}
    for asset in assets:
        if asset == "latents":
            assert encoding is not None, "latents are kept by encoding"
            checks[asset] = read_checks(root.latents_checks(encoding, batch))
        else:
            checks[asset] = read_checks(root.checks(asset, batch))
    return BatchState(checks)


def made_by_older(project: Project, state: BatchState) -> dict[BatchAsset, str]:
    """Which of the state's tables are to be rebuilt since an older version of a maker made them, and the reason.

    A newer `media` rebuilds `shots` too, since a first pass depends on the facts of its file.
    """
    found: dict[BatchAsset, str] = {}
    for asset in [asset for asset in VERSIONED if state.checks.get(asset) is not None]:
        current = GRAPH[asset].version
        oldest = current if project.versions is None else min(current, project.versions.get(asset, 0))
        if (version := state.version(asset)) < oldest:
            found[asset] = f"made by {asset} {f'version {version}' if version else 'of an unrecorded version'}"
    if state.checks.get("shots") is not None and state.checks.get("media") is not None and "shots" not in found:
        version = int(state.made_from("shots", "media") or 0)
        if "media" in found or version < state.version("media"):
            found["shots"] = f"made from media version {version}"
    return found
