"""Report a maker's Outcome to Dagster: metadata, data version, check results, pictures; and its errors, readably."""

import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg
import dataframely as dy
import polars as pl
from PIL import Image

from assets.resources import ProjectResource
from nextvid.config.project import Project
from nextvid.machine import available_cores, batches_at_once
from nextvid.making.batches import dataset_of
from nextvid.making.outcome import Outcome
from nextvid.making.progress import SHOWING, Lines, OnProgress, Progress
from nextvid.plain_text import in_markdown
from storage import atomic
from storage.limits import explained
from storage.root import Table
from storage.tables import read_table

OBSERVE_S = 20.0  # our choice: three points a minute in the UI; events.jsonl and the run's log have more
PREVIEW_ROWS, PREVIEW_DIGITS, PREVIEW_CHARACTERS = 5, 8, 40  # our choice: what fits a screen and 2 kB of an event
BACKFILL = "dagster/backfill"  # tag of the runs of a backfill
CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)
PREVIEW_WIDTH = 960  # pixels, our choice: an event with a picture 640 pixels wide has 5 kB


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn an exception into a step failure that shows its message, and that no retry policy retries.

    The same data would raise it again; the nightly schedule tries again. The policy CRASHES is for processes that were
    killed and could raise nothing. Dagster counts a signal as a crash, too: so it is where a node is drained, but a run
    that somebody cancels does not begin its step again.
    """
    try:
        yield
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError) as error:
        context = dg.OpExecutionContext.get()
        run = context.instance.get_run_by_id(context.run_id)
        if run is None or run.status not in CANCELLED:
            raise
        said = "cancelled; what is made is kept, and the same run launched again goes on from there"
        raise dg.Failure(description=said, allow_retries=False) from error
    except dg.Failure:
        raise
    except Exception as error:
        known = explained(error)
        said = f"{type(error).__name__}: {error}" if known is None else f"{known.kind}: {known}"
        raise dg.Failure(description=said, allow_retries=False) from error


def result(outcome: Outcome) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """What every materialisation reports."""
    rows_made = outcome.rows * outcome.made if outcome.rows_made is None else outcome.rows_made
    metadata: dict[str, Any] = {
        "dagster/row_count": outcome.rows,
        "made": outcome.made,
        "rows_made": rows_made,
        "size_bytes": outcome.size_bytes,
        "seconds": round(outcome.seconds, 3),
        "quarantined": outcome.quarantined,
    }
    if rows_made and outcome.seconds > 0:
        metadata["rows_per_s"] = round(rows_made / outcome.seconds, 2)
    if outcome.digest:
        metadata["digest"] = outcome.digest
    if outcome.run:
        metadata["run"] = outcome.run
    metadata.update(_values({**outcome.numbers, **outcome.made_from}))
    for title, path in outcome.pictures.items():
        if atomic.exists(path):
            metadata[title] = dg.MetadataValue.md(picture_markdown(atomic.read_bytes(path), title))
    return dg.MaterializeResult(
        metadata=metadata,
        data_version=dg.DataVersion(outcome.digest) if outcome.digest else None,
        check_results=[
            dg.AssetCheckResult(
                check_name=check.name,
                passed=check.passed,
                severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
                metadata=_values(check.numbers),
                description=check.description or None,
            )
            for check in outcome.checks
        ],
    )


def open_batch(context: dg.AssetExecutionContext, project: ProjectResource) -> tuple[Project, str]:
    """The project, and the batch that a step is about. A run that a person launched gets the tags that a sensor's has.

    Raises ConfigError for a batch that no listing made.
    """
    from nextvid.corpus.sources import refuse_unknown

    opened, batch = project.open(), context.partition_key
    refuse_unknown(opened, batch)
    run = context.run
    tags = {"dataset": dataset_of(batch), "reason": "backfill" if BACKFILL in run.tags else "launched by hand"}
    if missing := {name: value for name, value in tags.items() if name not in run.tags}:
        context.instance.add_run_tags(run.run_id, missing)
    return opened, batch


def watched(context: dg.AssetExecutionContext) -> OnProgress:
    """Shows a maker's progress: lines of the run's log, every OBSERVE_S an observation, and what this process shows."""
    lines, showing, observed_s = Lines(context.log.info), SHOWING.get(), time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal observed_s
        lines(progress)
        showing(progress)
        if not progress.note and time.monotonic() - observed_s >= OBSERVE_S:
            observed_s = time.monotonic()
            values = {"done": progress.done, "total": progress.total}
            partition = context.partition_key if context.has_partition_key else None
            context.log_event(dg.AssetObservation(context.asset_key, metadata=values, partition=partition))

    return tell


def batch_table(
    context: dg.AssetExecutionContext,
    project: ProjectResource,
    noun: Table,
    make: Callable[[Project, str, OnProgress], Outcome],
    schema: type[dy.Schema],
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make one table of a batch, on a share of the cores, as other batches' steps may run; report its first rows."""
    with readable_errors():
        opened, batch = open_batch(context, project)
        cores = available_cores(opened.corpus.execution.cores)
        opened = opened.on_cores(cores // batches_at_once(cores))
        reported = result(make(opened, batch, watched(context)))
        rows = preview(read_table(opened.root.table(noun, batch), schema))
        links = {"show": link} if (link := launchpad_link(context.run, "show")) else {}
        return reported._replace(metadata={**(reported.metadata or {}), "first rows": rows, **links})


def launchpad_link(run: dg.DagsterRun, job: str) -> dg.UrlMetadataValue | None:
    """The launchpad of a job of the same code location; None for a run that no UI or daemon launched."""
    if run.remote_job_origin is None:
        return None
    place = f"{run.remote_job_origin.repository_origin.repository_name}@{run.remote_job_origin.location_name}"
    return dg.MetadataValue.url(f"/locations/{place}/jobs/{job}/playground")


def traced(project: Project, outcome: Outcome) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """The result with the lineage of its run or trainset, as `nextvid lineage` prints it."""
    from nextvid.lineage.trace import trace

    reported = result(outcome)
    about = outcome.run or outcome.digest
    assert about is not None, "a run, or a trainset's digest"
    lineage = dg.MetadataValue.md(trace(project, about).markdown())
    return reported._replace(metadata={**(reported.metadata or {}), "lineage": lineage})


def preview(frame: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """The first rows of a table for the UI: ids as hex, long values shortened."""
    first = frame.head(PREVIEW_ROWS)
    lines = ["| " + " | ".join(first.columns) + " |", "|" + "---|" * first.width]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in first.iter_rows()]
    return dg.MetadataValue.md("\n".join([*lines, "", f"{frame.height} rows in all"]))


def _cell(value: object) -> str:
    match value:
        case bytes():
            return value.hex()[:PREVIEW_DIGITS]
        case float():
            return f"{value:.4g}"
        case str() if len(value) > PREVIEW_CHARACTERS:  # the end of a path tells more than its beginning
            return in_markdown("..." + value[-PREVIEW_CHARACTERS:])
        case list():
            return f"{len(value)} values" if len(value) > 3 else ", ".join(map(_cell, value))
        case _:
            return "" if value is None else in_markdown(str(value))


def picture_markdown(png: bytes, title: str) -> str:
    """A PNG inside Markdown, scaled down so that events stay small."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    if picture.width > PREVIEW_WIDTH:
        picture = picture.resize((PREVIEW_WIDTH, max(1, picture.height * PREVIEW_WIDTH // picture.width)))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return f"![{in_markdown(title)}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _values(numbers: Mapping[str, int | float | str]) -> dict[str, Any]:
    return {name: value if isinstance(value, int | float) else str(value) for name, value in numbers.items()}
