"""Groups of near-duplicate shots across batches, and how far probe test sets contaminate pretraining.

Moves no row: it says which copies the trainset leaves out, and why.
"""

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.resources import ProjectResource
from storage import schemas


@dg.asset(
    group_name="trainset",
    deps=["clips"],
    kinds={"polars", "parquet"},
    owners=reporting.OWNERS,
    code_version="1",
    retry_policy=reporting.CRASHES,
    check_specs=checks.specs("duplicates"),
    automation_condition=reporting.follows(),
    metadata=columns(schemas.Duplicates),
    description=__doc__,
)
def duplicates(project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Search all batches' hashes."""
    from nextvid.trainset.duplicates import make_duplicates

    return reporting.materialised(lambda: make_duplicates(project.open()))
