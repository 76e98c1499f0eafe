"""The one resource: which corpus.yaml. Opened anew by each step, so that an edit takes effect without a reload."""

import dagster as dg

from nextvid.corpus.project import Project, open_project


class ProjectResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A project by the path of its corpus.yaml; empty means NEXTVID_CORPUS, else ./corpus.yaml."""

    corpus: str = ""

    def open(self) -> Project:
        """Read and check corpus.yaml. Raises ConfigError."""
        return open_project(self.corpus or None)
