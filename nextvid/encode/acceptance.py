"""Which encoding and curation are in force: taken at first use, later by a person, or at once where `reencode: auto`.

Holds the rule of design section 4 ("a changed autoencoder, resolution or curation") and nothing of how it is stored
(nextvid/corpus/discover.py) or what it costs (plan.py). Imports no torch.
"""

from nextvid.corpus.discover import Accepted, accept, accepted
from nextvid.corpus.project import Project
from nextvid.encode.plan import encoding_spec
from storage.latents import LatentStore


def in_force(project: Project) -> Accepted:
    """The digests in force; accepts those of corpus.yaml where none are yet, or where it says `reencode: auto`."""
    stands = accepted(project)
    if stands is None or (project.corpus.reencode == "auto" and outdated(project)):
        return accept_asked(project)
    return stands


def accept_asked(project: Project) -> Accepted:
    """Put what corpus.yaml asks for into force; its spec is written first, so that a later one can be told from it."""
    spec = encoding_spec(project)
    LatentStore(project.root, spec).create()
    return accept(project, spec.digest())


def outdated(project: Project) -> tuple[str, ...]:
    """Which of `encoding` and `curation` corpus.yaml asks for differently from what is in force."""
    stands = accepted(project)
    if stands is None:
        return ()
    asked = Accepted(encoding_spec(project).digest(), project.corpus.curation_digest())
    return tuple(name for name in ("encoding", "curation") if getattr(stands, name) != getattr(asked, name))
