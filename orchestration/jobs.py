"""The jobs that sensors and schedules request, and that people find in the UI.

One run per batch makes all four assets up to the latents: assets that share a run share its start-up.
"""

import dagster as dg

from nextvid.graph import BY_BATCH, assets

ingest = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.assets(*BY_BATCH),
    description="Media, shots, clips and latents of one batch of files. Makes only what is missing.",
)

freeze = dg.define_asset_job(
    "freeze",
    selection=dg.AssetSelection.assets(*assets("none")),
    description="Statistics, duplicates and the trainset, over all batches. The sensor `follow` requests them too.",
)

experiment = dg.define_asset_job(
    "experiment",
    selection=dg.AssetSelection.assets(*assets("recipe")),
    description="Mask plan, training run, probes on every benchmark, samples and report of one recipe. All of them "
    "are about the run that `pretrain` makes.",
)

JOBS = [ingest, freeze, experiment]
