"""Which batches need a run, and why: tables that are missing, outdated or failed, rows not encoded, files quarantined.

The sensor and the nightly schedule ask. Everything is read from tables and checks; nothing is made.
"""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import polars as pl

from nextvid.config.accepted import accepted, pixels_digest
from nextvid.config.project import Project
from nextvid.corpus.labels import readable_labels
from nextvid.corpus.sources import batch_fingerprint
from nextvid.encode.cap import bounds_of, cap_changed, caps_of
from nextvid.encode.plan import encoding_spec, pixel_spec, plan_batch
from nextvid.graph import GRAPH
from nextvid.making.batches import VERSIONED, batch_state, dataset_of, made_by_older
from storage.digest import digest
from storage.errors import NExTVidError
from storage.remote import at_once
from storage.schemas import Media, Shots, Sources
from storage.spec import UNRECORDED, EncodingSpec, PixelSpec
from storage.store import LatentStore, PixelStore, Store
from storage.tables import read_table, seal

T = TypeVar("T")
JUDGED_AT_ONCE = 64  # our choice: between two looks at the clock; on an object store 16 of them at a time


@dataclass(frozen=True)
class Standard:
    """What every batch is compared with, read once: the accepted configuration, and the current label files."""

    project: Project
    spec: EncodingSpec
    pixels: PixelSpec | None
    accepted_count: int  # how often something was accepted
    curation: Mapping[str, str]  # digest by dataset
    bounds: Mapping[str, str]  # digest of its caps and of what they take, by dataset; empty without a cap
    recapped: Collection[str]  # datasets whose cap changed; the next run of a batch finds out what it takes
    labels: Mapping[str, Sequence[str]]  # digests of label files by dataset; of those that can be read

    def listing(self, batch: str) -> str:
        """The fingerprint of a batch's listing and label files."""
        labels = self.labels[dataset_of(batch)]
        table = self.project.root.table("sources", batch)
        return _remembered(("listing", *labels), _sealed(table), lambda: batch_fingerprint(self.project, batch, labels))

    def not_encoded(self, batch: str) -> int:
        """How many of the batch's clips have no latents."""
        return self._missing(batch, LatentStore(self.project.root, self.spec))

    def without_pixels(self, batch: str) -> int:
        """How many of them have no pixels; 0 where none are kept."""
        return 0 if self.pixels is None else self._missing(batch, PixelStore(self.project.root, self.pixels))

    def _missing(self, batch: str, store: Store[Any]) -> int:
        seals = [*_sealed(self.project.root.table("clips", batch)), *store.seals(batch)]
        return _remembered(
            (store.noun, store.digest, self.bounds[dataset_of(batch)]),
            seals,
            lambda: plan_batch(self.project, batch, store).rows.height,
        )

    def latents_before(self, batch: str) -> str | None:
        """Which older version of the maker of `latents` made the batch in this encoding, if one did."""
        for version in range(self.spec.version - 1, UNRECORDED - 1, -1):
            older = replace(self.spec, version=version).digest()
            if batch_state(self.project.root, batch, "latents", encoding=older).checks["latents"] is not None:
                return f"made by latents version {version}"
        return None

    def key(self, batch: str) -> str:
        """The run key: the same for the same batch, listing, curation, encoding, pixels, versions, acceptance, cap."""
        made_by = (
            self.curation[dataset_of(batch)],
            self.spec.digest(),
            pixels_digest(self.project.corpus.encoding.pixels),
            ".".join(str(GRAPH[asset].version) for asset in VERSIONED),
            str(self.accepted_count),
            self.bounds[dataset_of(batch)],
        )
        return ":".join(filter(None, [batch, self.listing(batch), *made_by]))


def standard(project: Project, labels: Mapping[str, Sequence[str]] | None = None) -> Standard:
    """What batches are compared with now, with label files as `readable_labels` found them.

    The accepted autoencoder need not be at hand.
    """
    known = accepted(project.root)
    spec = LatentStore.open(project.root, known.encoding).spec if known else encoding_spec(project)
    return Standard(
        project,
        spec,
        pixel_spec(project, spec),
        known.count if known else 0,
        {name: project.corpus.curation_digest(name) for name in project.corpus.datasets},
        {
            name: digest([[[frames, cap.rows] for frames, cap in caps.items()], [*bounds_of(project, name).items()]])
            if (caps := caps_of(project, name))
            else ""
            for name in project.corpus.datasets
        },
        {name for name in project.corpus.datasets if cap_changed(project, name)},
        readable_labels(project.corpus.datasets)[0] if labels is None else labels,
    )


@dataclass(frozen=True)
class Waiting:
    """What was found out about the batches that were judged."""

    keys: Mapping[str, str]  # by batch that needs a run, its run key
    reasons: Mapping[str, str]  # and why it needs one
    errors: Sequence[str]  # why batches cannot be judged, such as a damaged table
    last: str  # the batch after which to go on; empty where all were judged


def waiting(
    against: Standard,
    *,
    retry: bool = False,
    first: Collection[str] = (),
    after: str = "",
    limit: int | None = None,
    within_s: float = math.inf,
) -> Waiting:
    """Judge the batches of datasets whose label files can be read: those in `first`, then the others in turn.

    Ends with `limit` batches that need a run or after `within_s` seconds; the next call goes on `after` the last one.
    With `retry`, batches with quarantined files need a run too. Batches of datasets that corpus.yaml no longer names
    need none: see `left_behind`.
    """
    began_s, root = time.monotonic(), against.project.root
    named = [batch for batch in root.batches() if dataset_of(batch) in against.labels]
    ahead, turn = set(first), bisect_right(named, after)
    order = [batch for batch in named if batch in ahead]
    order += [batch for batch in named[turn:] + named[:turn] if batch not in ahead]
    keys: dict[str, str] = {}
    reasons: dict[str, str] = {}
    errors: list[str] = []

    def judge(batch: str) -> tuple[str, str] | NExTVidError | None:
        try:
            asks = unfinished(against, batch)
            if not asks and retry and (count := quarantined(against.project, batch)):
                asks = (f"{count} quarantined rows are tried again",)
            return (against.key(batch), "; ".join(asks)) if asks else None
        except NExTVidError as error:
            return error

    for start in range(0, len(order), JUDGED_AT_ONCE):
        some = order[start : start + JUDGED_AT_ONCE]
        for batch, found in zip(some, at_once(root.url, judge, some), strict=True):
            after = after if batch in ahead else batch
            if isinstance(found, NExTVidError):
                errors.append(f"{batch}: {found}")
            elif found is not None:
                keys[batch], reasons[batch] = found
            if len(keys) == limit:
                return Waiting(keys, reasons, errors, after)
        if time.monotonic() - began_s > within_s:
            return Waiting(keys, reasons, errors, after)
    return Waiting(keys, reasons, errors, "")


def left_behind(project: Project) -> list[str]:
    """One line for each dataset that has batches and is not in corpus.yaml any more."""
    batches = project.root.batches()
    counts = Counter(dataset_of(batch) for batch in batches)
    lines = []
    for name in sorted(set(counts) - set(project.corpus.datasets)):
        line = f"dataset {name} is not in {project.path} any more: its {counts[name]} batches stay as they are, "
        line += "join no new trainset and are not listed; runs that used them can still be traced"
        first = next(batch for batch in batches if dataset_of(batch) == name)
        uri = read_table(project.root.table("sources", first), Sources)["uri"][0]
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
    if dataset_of(batch) in against.recapped:
        reasons.append("the cap changed")
    if not reasons and (missing := against.not_encoded(batch)):
        reasons.append(f"{missing} rows are not encoded")
    if not reasons and (missing := against.without_pixels(batch)):
        reasons.append(f"{missing} rows have no pixels")
    return tuple(reasons)


_KNOWN: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}


def _sealed(path: str) -> list[tuple[str, tuple[int, int]]]:
    """A table and its seal."""
    return [(path, seal(path))]


def _remembered(what: tuple[str, ...], seals: Sequence[tuple[str, tuple[int, int]]], compute: Callable[[], T]) -> T:
    """The result of `compute`, kept while the seals of the tables that it was computed from are unchanged.

    Between two ticks of the sensor next to nothing changes, and reading a table costs many times what checking its seal
    does. One number or digest a batch is kept, and no table.
    """
    about = (*what, seals[0][0])  # the first is the batch's own
    hashes = tuple(hash(one) for one in seals)
    known = _KNOWN.get(about)
    if known is None or known[0] != hashes:
        known = _KNOWN[about] = (hashes, compute())
    found: T = known[1]
    return found


def quarantined(project: Project, batch: str) -> int:
    """How many rows of the batch's files and first passes could not be read; the nightly schedule tries them again."""
    if batch_state(project.root, batch, "shots").not_made:
        return 0

    def count(noun: Literal["media", "shots"], schema: type[Media | Shots]) -> int:
        path = project.root.table(noun, batch)
        bad = pl.col("status") == "quarantined"
        return _remembered(("quarantined", noun), _sealed(path), lambda: read_table(path, schema).filter(bad).height)

    return count("media", Media) + count("shots", Shots)
