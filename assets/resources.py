"""What a step is given beside its partition: the project, and where to train.

Each step reads corpus.yaml itself, so that an edit takes effect without reloading the definitions.
"""

from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from nextvid.config.project import Project, open_project

if TYPE_CHECKING:
    from nextvid.train.node import PreparedRun


class ProjectResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A project by its corpus.yaml, whose path the UI shows; empty means NEXTVID_CORPUS, else ./corpus.yaml."""

    corpus: str = Field(default="", description="Path of the corpus.yaml that every step and tick reads")

    def open(self) -> Project:
        """Read and check corpus.yaml. Raises ConfigError."""
        return open_project(self.corpus or None)


class TrainerResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where torchrun runs: beside the step, or as a job of `slurm` or of the Ray cluster at this address."""

    on: str = ""

    def train(self, context: dg.AssetExecutionContext, run: "PreparedRun") -> None:
        """Train a prepared run to its end. Raises dg.Failure."""
        from assets.launcher import run_group, run_job

        if self.on:
            run_job(context, run, self.on)
        else:
            run_group(context, run)
