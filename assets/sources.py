"""Files as the datasets' listings show them, in batches; nothing is opened yet.

Observed, never made: the sensor `new_sources` lists each dataset's URI, assigns files to batches for ever, and reports
the fingerprint of each batch's listing as its data version.
"""

import warnings

import dagster as dg

from assets.columns import columns
from assets.partitions import BATCHES
from assets.resources import ProjectResource
from storage import schemas

with warnings.catch_warnings():
    # The one beta feature used: an observation that downstream automation counts.
    warnings.simplefilter("ignore", dg.BetaWarning)

    @dg.observable_source_asset(
        partitions_def=BATCHES,
        group_name="corpus",
        description=__doc__,
        metadata={"table": "sources/<batch>.parquet", **columns(schemas.Sources)},
        tags={"dagster/kind/parquet": ""},  # kinds, as other assets say them; owners Dagster's observables have none
    )
    def sources(project: ProjectResource) -> dg.DataVersionsByPartition:
        """Observe every batch by hand; the sensor does the same on its own."""
        from nextvid.corpus.sources import batch_fingerprint

        opened = project.open()
        return dg.DataVersionsByPartition({batch: batch_fingerprint(opened, batch) for batch in opened.root.batches()})
