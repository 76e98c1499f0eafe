"""Which batches need a run, and why: tables that are missing, outdated or failed, rows not encoded, files quarantined.

The sensor and the nightly schedule ask. Everything is read from tables and checks; nothing is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import polars as pl

from nextvid.config.accepted import accepted, pixels_digest
from nextvid.config.project import Project
from nextvid.corpus.labels import label_digests
from nextvid.corpus.sources import batch_fingerprint, known_sources
from nextvid.encode.plan import encoding_spec, pixel_spec, plan_batch
from nextvid.graph import GRAPH
from nextvid.making.batches import VERSIONED, batch_state, dataset_of, made_by_older
from storage.remote import at_once
from storage.schemas import Media, Shots
from storage.spec import UNRECORDED, EncodingSpec, PixelSpec
from storage.store import LatentStore, PixelStore, Store
from storage.tables import read_table, seal

T = TypeVar("T")


@dataclass(frozen=True)
class Standard:
    """What every batch is compared with, read once: the accepted configuration, and the current label files."""

    project: Project
    spec: EncodingSpec
    pixels: PixelSpec | None
    curation: Mapping[str, str]  # digest by dataset
    labels: Mapping[str, Sequence[str]]  # digests of label files by dataset

    def listing(self, batch: str) -> str:
        """The fingerprint of a batch's listing and label files."""
        labels = self.labels[dataset_of(batch)]
        table = self.project.root.table("sources", batch)
        return _remembered([table], ("listing", *labels), lambda: batch_fingerprint(self.project, batch, labels))

    def not_encoded(self, batch: str) -> int:
        """How many of the batch's clips have no latents."""
        return self._missing(batch, LatentStore(self.project.root, self.spec))

    def without_pixels(self, batch: str) -> int:
        """How many of them have no pixels; 0 where none are kept."""
        return 0 if self.pixels is None else self._missing(batch, PixelStore(self.project.root, self.pixels))

    def _missing(self, batch: str, store: Store[Any]) -> int:
        tables = [self.project.root.table("clips", batch), *store.table_paths(batch)]
        return _remembered(
            tables, (store.noun, store.digest), lambda: plan_batch(self.project, batch, store).rows.height
        )

    def latents_before(self, batch: str) -> str | None:
        """Which older version of the maker of `latents` made the batch in this encoding, if one did."""
        for version in range(self.spec.version - 1, UNRECORDED - 1, -1):
            older = replace(self.spec, version=version).digest()
            if batch_state(self.project.root, batch, "latents", encoding=older).checks["latents"] is not None:
                return f"made by latents version {version}"
        return None

    def key(self, batch: str) -> str:
        """The run key: the same for the same batch, listing, curation, encoding and pixels."""
        made_by = (
            self.curation[dataset_of(batch)],
            self.spec.digest(),
            pixels_digest(self.project.corpus.encoding.pixels),
            ".".join(str(GRAPH[asset].version) for asset in VERSIONED),
        )
        return ":".join(filter(None, [batch, self.listing(batch), *made_by]))


def standard(project: Project) -> Standard:
    """What batches are compared with now. The accepted autoencoder need not be at hand."""
    known = accepted(project.root)
    spec = LatentStore.open(project.root, known.encoding).spec if known else encoding_spec(project)
    datasets = project.corpus.datasets
    return Standard(
        project,
        spec,
        pixel_spec(project, spec),
        {name: project.corpus.curation_digest(name) for name in datasets},
        {name: label_digests(dataset.labels) for name, dataset in datasets.items()},
    )


def waiting(project: Project, *, retry: bool = False) -> dict[str, str]:
    """Batches that need a run, each with its run key.

    With `retry`, those with quarantined files too. Batches of datasets that corpus.yaml no longer names need none: see
    `left_behind`.
    """
    against = standard(project)
    named = [batch for batch in project.root.batches() if dataset_of(batch) in project.corpus.datasets]
    found = at_once(
        project.root.url,
        lambda batch: bool(unfinished(against, batch) or (retry and quarantined(project, batch))),
        named,
    )
    return {batch: against.key(batch) for batch, asks in zip(named, found, strict=True) if asks}


def left_behind(project: Project) -> list[str]:
    """One line for each dataset that has batches and is not in corpus.yaml any more."""
    batches = [dataset_of(batch) for batch in project.root.batches()]
    lines = []
    for name in sorted(set(batches) - set(project.corpus.datasets)):
        line = f"dataset {name} is not in {project.path} any more: its {batches.count(name)} batches stay as they are, "
        line += "join no new trainset and are not listed; runs that used them can still be traced"
        uri = known_sources(project, name)["uri"][0]
        if heirs := [new for new, d in project.corpus.datasets.items() if uri.startswith(d.uri.rstrip("/") + "/")]:
            line += f". Its files are listed as {heirs[0]} now: call that {name} again, or all of it is rebuilt"
        lines.append(line)
    return lines


def unfinished(against: Standard, batch: str) -> tuple[str, ...]:
    """Reasons to run the batch again; with none, a run would change nothing but what is quarantined."""
    root, encoding = against.project.root, against.spec.digest()
    state = batch_state(root, batch, "media", "shots", "clips", "latents", encoding=encoding)
    if state.not_made:
        older = against.latents_before(batch) if state.not_made == ("latents",) else None
        return (older,) if older else tuple(f"{asset} was never made" for asset in state.not_made)
    reasons = [f"{asset} failed its checks" for asset in state.failed]
    if state.made_from("media", "listing") != against.listing(batch):
        reasons.append("the listing or a label file changed")
    if state.made_from("clips", "curation") != against.curation[dataset_of(batch)]:
        reasons.append("the curation changed")
    reasons += made_by_older(against.project, state).values()
    if not reasons and (missing := against.not_encoded(batch)):
        reasons.append(f"{missing} rows are not encoded")
    if not reasons and (missing := against.without_pixels(batch)):
        reasons.append(f"{missing} rows have no pixels")
    return tuple(reasons)


_KNOWN: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}


def _remembered(tables: list[str], what: tuple[str, ...], compute: Callable[[], T]) -> T:
    """The result of `compute`, kept while the seals of the tables that it was computed from are unchanged.

    Between two ticks of the sensor next to nothing changes, and reading a table costs many times what checking its seal
    does. One number or digest a batch is kept, and no table.
    """
    about = (*what, tables[0])  # the first is the batch's own
    seals = tuple(hash((path, seal(path))) for path in tables)
    known = _KNOWN.get(about)
    if known is None or known[0] != seals:
        known = _KNOWN[about] = (seals, compute())
    found: T = known[1]
    return found


def quarantined(project: Project, batch: str) -> tuple[str, ...]:
    """What could not be read when the batch was made, which the nightly schedule tries again."""
    found = []
    if batch_state(project.root, batch, "shots").not_made:
        return ()
    media = read_table(project.root.table("media", batch), Media)
    shots = read_table(project.root.table("shots", batch), Shots)
    for noun, table in (("files", media), ("first passes", shots)):
        if rows := table.filter(pl.col("status") == "quarantined").height:
            found.append(f"{rows} {noun} are quarantined")
    return tuple(found)
