"""The Definitions, built by a function, so that tests build their own; loading them imports no torch.

`dagster dev` finds `defs` here. The project's corpus.yaml is read by each step, sensor and schedule tick, not at load.
"""

import dagster as dg

from assets import (
    clips,
    duplicates,
    latent_stats,
    latents,
    mask_plan,
    media,
    pretrain,
    probes,
    report,
    samples,
    shots,
    sources,
    trainset,
)
from assets.resources import ProjectResource
from orchestration.jobs import JOBS
from orchestration.schedules import SCHEDULES
from orchestration.sensors import SENSORS

# In pipeline order, as the UI's groups read: corpus, latents, trainset, training, evaluation.
MODULES = (
    sources, media, shots, clips, latents, latent_stats, duplicates, mask_plan, trainset, pretrain, probes, samples,
    report,
)  # fmt: skip


def build_defs(corpus: str = "") -> dg.Definitions:
    """All definitions over one corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml."""
    return dg.Definitions(
        assets=dg.load_assets_from_modules(MODULES),
        jobs=JOBS,
        schedules=SCHEDULES,
        sensors=SENSORS,
        resources={"project": ProjectResource(corpus=corpus)},
    )


defs = build_defs()
