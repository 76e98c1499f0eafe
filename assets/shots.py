"""Cut-free runs of frames with times, crop box and scores: motion, freeze, luma, blur, perceptual hashes.

Scores, not decisions: thresholds stand in the curation configuration.
"""

import dagster as dg

from assets import checks, reporting
from assets.columns import columns
from assets.partitions import BATCHES
from assets.resources import ProjectResource
from storage import schemas


@dg.asset(
    partitions_def=BATCHES,
    group_name="corpus",
    deps=["media"],
    kinds={"polars", "parquet"},
    owners=reporting.OWNERS,
    code_version="2",
    retry_policy=reporting.CRASHES,
    pool="decode",
    check_specs=checks.specs("shots"),
    metadata=columns(schemas.Shots),
    description=__doc__,
)
def shots(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Make the batch's shots."""
    from nextvid.corpus.shots import make_shots

    return reporting.batch_table(project, "shots", context.partition_key, make_shots, schemas.Shots)
