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
    def sources(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.DataVersionsByPartition:
        """Observe every batch on request, but for those whose label files cannot be read; so does the sensor."""
        from nextvid.corpus.labels import readable_labels
        from nextvid.corpus.sources import batch_fingerprint
        from nextvid.making.batches import dataset_of

        opened = project.open()
        labels, unreadable = readable_labels(opened.corpus.datasets)
        for why in unreadable.values():
            context.log.error(why)
        datasets = {batch: dataset_of(batch) for batch in opened.root.batches()}
        return dg.DataVersionsByPartition(
            {
                batch: batch_fingerprint(opened, batch, labels.get(dataset))
                for batch, dataset in datasets.items()
                if dataset not in unreadable
            }
        )
