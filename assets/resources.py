"""What steps are told besides their partition: which corpus.yaml, where to train, and which run.

The corpus.yaml is opened anew by each step, so that an edit takes effect without a reload.
"""

from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from nextvid.config.project import Project, open_project

if TYPE_CHECKING:
    from nextvid.train.pretrain import PreparedRun


class ProjectResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A project by the path of its corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml."""

    corpus: str = ""

    def open(self) -> Project:
        """Read and check corpus.yaml. Raises ConfigError."""
        return open_project(self.corpus or None)


class TrainerResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where torchrun runs: beside the step, or as a job of the Ray cluster at this address."""

    ray_address: str = ""

    def train(self, context: dg.AssetExecutionContext, run: "PreparedRun") -> None:
        """Train a prepared run to its end. Raises dg.Failure."""
        if self.ray_address:
            from assets.ray_launcher import run_job

            run_job(context, run, self.ray_address)
        else:
            from assets.launcher import run_group

            run_group(context, run)


class WhichRun(dg.Config):
    """What the launchpad of an asset that looks at a run offers."""

    run_id: str = Field(default="", description="empty: the recipe's last complete run without overrides")
