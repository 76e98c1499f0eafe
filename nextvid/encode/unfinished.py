"""Why a batch asks for a run: what is missing, outdated, failed or quarantined, read from files alone.

Used by the sensor, the nightly schedule and scripts. Holds no listing and makes nothing. The makers record what they
were made from in the numbers of their checks: `listing` for media, `curation` for clips.
"""

from typing import Any

import polars as pl

from nextvid.corpus.batches import dataset_of
from nextvid.corpus.discover import accepted, batch_fingerprint, known_sources
from nextvid.corpus.project import Project
from nextvid.encode.pixel_plan import pixel_spec, plan_pixels
from nextvid.encode.plan import encoding_spec, plan_encode
from storage.latents import EncodingSpec, LatentStore
from storage.root import Table
from storage.schemas import Media, Shots
from storage.tables import read_checks, read_table

TABLES: tuple[Table, ...] = ("media", "shots", "clips")


def waiting(project: Project, *, retry: bool = False) -> list[str]:
    """Batches that ask for a run; with `retry` those too that hold quarantined files, whose state may have changed.

    A batch whose dataset corpus.yaml names no longer asks for nothing: see `left_behind`.
    """
    named = [batch for batch in project.root.batches() if dataset_of(batch) in project.corpus.datasets]
    return [batch for batch in named if unfinished(project, batch) or (retry and quarantined(project, batch))]


def left_behind(project: Project) -> list[str]:
    """One line for each dataset that has batches and is not in corpus.yaml any more."""
    batches = [dataset_of(batch) for batch in project.root.batches()]
    lines = []
    for name in sorted(set(batches) - set(project.corpus.datasets)):
        line = f"dataset {name} is not in {project.path} any more: its {batches.count(name)} batches stay as they are, "
        line += "join no new trainset and are not listed; runs that used them can still be traced"
        uri = known_sources(project, name)["uri"][0]
        if heirs := [new for new, d in project.corpus.datasets.items() if uri.startswith(d.uri.rstrip("/") + "/")]:
            line += f". Its files are listed as {heirs[0]} now: call that {name} again, or all of it is made anew"
        lines.append(line)
    return lines


def unfinished(project: Project, batch: str) -> tuple[str, ...]:
    """Reasons to run the batch again; none means that a run would change nothing, but perhaps what is quarantined."""
    root = project.root
    verdicts: dict[str, dict[str, Any] | None] = {noun: read_checks(root.checks(noun, batch)) for noun in TABLES}
    spec = _spec(project)
    verdicts["latents"] = read_checks(root.latents_checks(spec.digest(), batch))
    reasons = [f"{noun} was never made" for noun, found in verdicts.items() if found is None]
    if reasons:
        return tuple(reasons)
    reasons += [f"{noun} failed its checks" for noun, found in verdicts.items() if found and not found["passed"]]
    if _recorded(verdicts["media"], "listing") != batch_fingerprint(project, batch):
        reasons.append("the listing or a label file changed")
    if _cut_otherwise(project, batch):
        reasons.append("the curation changed")
    if not reasons and (missing := plan_encode(project, batch, spec).rows.height):
        reasons.append(f"{missing} rows are not encoded")
    pixels = pixel_spec(project, spec)
    if not reasons and pixels and (missing := plan_pixels(project, batch, pixels).rows.height):
        reasons.append(f"{missing} rows have no pixels")
    return tuple(reasons)


def curation_of(project: Project, batch: str) -> str | None:
    """Digest of the curation that the batch's clips were cut by; None where they were not made."""
    found: str | None = _recorded(read_checks(project.root.checks("clips", batch)), "curation")
    return found


def _recorded(verdict: dict[str, Any] | None, name: str) -> Any:  # noqa: ANN401 - JSON is Any
    """A number of any of the checks in a verdict; None where none holds it."""
    checks = verdict["checks"] if verdict else []
    return next((check["numbers"][name] for check in checks if name in check.get("numbers", {})), None)


def quarantined(project: Project, batch: str) -> tuple[str, ...]:
    """What could not be read when the batch was made, and is tried again every night."""
    found = []
    if read_checks(project.root.checks("shots", batch)) is None:
        return ()
    media = read_table(project.root.table("media", batch), Media)
    shots = read_table(project.root.table("shots", batch), Shots)
    for noun, table in (("files", media), ("first passes", shots)):
        if rows := table.filter(pl.col("status") == "quarantined").height:
            found.append(f"{rows} {noun} are quarantined")
    return tuple(found)


def _spec(project: Project) -> EncodingSpec:
    """The encoding in force, whether or not its autoencoder is still at hand: what is missing can be said without."""
    stands = accepted(project)
    return LatentStore.open(project.root, stands.encoding).spec if stands else encoding_spec(project)


def _cut_otherwise(project: Project, batch: str) -> bool:
    """Whether the batch's clips were cut by another curation than corpus.yaml's, and that one is in force."""
    stands = accepted(project)
    if stands is not None and stands.curation != project.corpus.curation_digest():
        return False  # a person decides: `reencode: ask`
    return curation_of(project, batch) != project.corpus.curation_digest(dataset_of(batch))
