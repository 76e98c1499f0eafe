"""The Definitions, built by a function, so that tests build their own; loading them imports no torch.

`dagster dev` finds `defs` here. The project's corpus.yaml is read by each step, sensor and schedule tick, not at load.
"""

import os
from collections.abc import Mapping
from typing import Any

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
from assets.resources import ProjectResource, TrainerResource
from orchestration.executors import TRAIN_ON, executor
from orchestration.jobs import JOBS
from orchestration.schedules import NIGHT, nightly_at
from orchestration.sensors import TICK_S, follow, new_sources_every

# In pipeline order, as the UI's groups read: corpus, latents, trainset, training, evaluation.
MODULES = (
    sources, media, shots, clips, latents, latent_stats, duplicates, mask_plan, trainset, pretrain, probes, samples,
    report,
)  # fmt: skip


def build_defs(
    corpus: str = "",
    *,
    night: str = NIGHT,
    tick_s: int = TICK_S,
    steps: str | None = None,
    resources: Mapping[str, Any] | None = None,
) -> dg.Definitions:
    """All definitions over one corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml.

    What may be another: the nightly schedule's cron line, seconds between two listings, where steps run (executors.py)
    and resources.
    """
    return dg.Definitions(
        assets=dg.load_assets_from_modules(MODULES),
        jobs=JOBS,
        schedules=[nightly_at(night)],
        sensors=[new_sources_every(tick_s), follow],
        executor=executor(steps),
        resources={
            "project": ProjectResource(corpus=corpus),
            "trainer": TrainerResource(ray_address=os.environ.get(TRAIN_ON, "")),
            **(resources or {}),
        },
    )


defs = build_defs()
