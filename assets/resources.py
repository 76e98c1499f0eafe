"""What steps are told besides their partition: which corpus.yaml, and which run.

The corpus.yaml is opened anew by each step, so that an edit takes effect without a reload.
"""

import dagster as dg
from pydantic import Field

from nextvid.corpus.project import Project, open_project


class ProjectResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A project by the path of its corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml."""

    corpus: str = ""

    def open(self) -> Project:
        """Read and check corpus.yaml. Raises ConfigError."""
        return open_project(self.corpus or None)


class WhichRun(dg.Config):
    """What the launchpad of an asset that looks at a run offers."""

    run_id: str = Field(default="", description="empty: the recipe's last complete run without overrides")
