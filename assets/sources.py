"""The asset `sources`, which is observed and not made: the sensor `new_sources` lists the datasets."""

import warnings

import dagster as dg

from assets.declare import described
from assets.resources import ProjectResource
from storage import schemas

with warnings.catch_warnings():
    # The one beta feature used: an observation that downstream automation counts.
    warnings.simplefilter("ignore", dg.BetaWarning)

    # An observable takes no owners and no dependencies, and its kinds are tags.
    @dg.observable_source_asset(
        **{key: value for key, value in described("sources", schemas.Sources).items() if key != "deps"},
        tags={"dagster/kind/parquet": ""},
    )
    def sources(project: ProjectResource) -> dg.DataVersionsByPartition:
        """Observe every batch on request; the sensor does the same by itself."""
        from nextvid.corpus.sources import batch_fingerprint

        opened = project.open()
        return dg.DataVersionsByPartition({batch: batch_fingerprint(opened, batch) for batch in opened.root.batches()})
