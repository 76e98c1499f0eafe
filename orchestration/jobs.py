"""The jobs that sensors and schedules request, and that a person finds in the UI.

One run a batch for the four steps up to the latents: steps that share a run share its ticks and start-ups.
"""

import dagster as dg

ingest = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.assets("media", "shots", "clips", "latents"),
    description="One batch of files: probe, shots, clips, latents. Only what is missing is made.",
)

freeze = dg.define_asset_job(
    "freeze",
    selection=dg.AssetSelection.assets("latent_stats", "duplicates", "trainset"),
    description="Statistics, duplicates and the trainset, for those who do not leave it to automation.",
)

experiment = dg.define_asset_job(
    "experiment",
    selection=dg.AssetSelection.assets("mask_plan", "pretrain", "samples", "report"),
    description="One recipe: mask plan, training, samples and the report. Probes run by recipe and benchmark.",
)

JOBS = [ingest, freeze, experiment]
