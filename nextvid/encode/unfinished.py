"""Why a batch asks for a run: what is missing, outdated, failed or quarantined, read from files alone.

Used by the nightly schedule and by scripts. Holds no listing and makes nothing. The makers record what they were made
from in the numbers of their checks: `listing` for media, `curation` for clips.
"""

from typing import Any

import polars as pl

from nextvid.corpus.discover import batch_fingerprint
from nextvid.corpus.project import Project
from nextvid.encode.pixel_plan import pixel_spec, plan_pixels
from nextvid.encode.plan import plan_encode, spec_in_force
from storage.root import Table
from storage.schemas import Media, Shots
from storage.tables import read_checks, read_table

TABLES: tuple[Table, ...] = ("media", "shots", "clips")


def unfinished(project: Project, batch: str) -> tuple[str, ...]:
    """Reasons to run the batch again; none means that a run would change nothing."""
    root = project.root
    verdicts: dict[str, dict[str, Any] | None] = {noun: read_checks(root.checks(noun, batch)) for noun in TABLES}
    verdicts["latents"] = read_checks(root.latents_checks(spec_in_force(project).digest(), batch))
    reasons = [f"{noun} was never made" for noun, found in verdicts.items() if found is None]
    if reasons:
        return tuple(reasons)
    reasons += [f"{noun} failed its checks" for noun, found in verdicts.items() if found and not found["passed"]]
    if _recorded(verdicts["media"], "listing") != batch_fingerprint(project, batch):
        reasons.append("the listing or a label file changed")
    if curation_of(project, batch) != project.corpus.curation_digest():
        reasons.append("the curation changed")
    reasons += _quarantined(project, batch)
    if not reasons and (missing := plan_encode(project, batch).rows.height):
        reasons.append(f"{missing} rows are not encoded")
    pixels = pixel_spec(project, spec_in_force(project))
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


def _quarantined(project: Project, batch: str) -> list[str]:
    found = []
    media = read_table(project.root.table("media", batch), Media)
    shots = read_table(project.root.table("shots", batch), Shots)
    for noun, table in (("files", media), ("first passes", shots)):
        if rows := table.filter(pl.col("status") == "quarantined").height:
            found.append(f"{rows} {noun} are quarantined")
    return found
