"""Which encoding, curation and pixels are in force: taken at first use, later by a person, or at once by `auto`.

Holds the rule of design section 4 ("a changed autoencoder, resolution or curation") and nothing of how it is stored
(nextvid/config/accepted.py) or what it costs (costs.py). Imports no torch.
"""

from collections.abc import Sequence

from nextvid.config.accepted import Accepted, accept, accepted, going_on, keep_new
from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec
from storage.latents import LatentStore


def in_force(project: Project) -> Accepted:
    """What is in force; accepts corpus.yaml where nothing is yet, or where it says `reencode: auto`.

    Datasets that corpus.yaml names for the first time are taken as they are: nothing of theirs is made anew.
    """
    stands = accepted(project)
    if stands is None or (project.corpus.reencode == "auto" and outdated(project)):
        return accept_asked(project)
    return keep_new(project, stands)


def accept_asked(project: Project) -> Accepted:
    """Put what corpus.yaml asks for into force; its spec is written first, so that a later one can be told from it."""
    spec = encoding_spec(project)
    LatentStore(project.root, spec).create()
    return accept(project, spec.digest())


def others(names: Sequence[str]) -> str:
    """What `outdated` names, in words."""
    return " and ".join("other pixels" if name == "pixels" else f"another {name}" for name in names)


def outdated(project: Project) -> tuple[str, ...]:
    """Which of `encoding`, `curation` and `pixels` corpus.yaml asks for differently from what is in force."""
    stands = accepted(project)
    if stands is None:
        return ()
    found = [] if stands.encoding == encoding_spec(project).digest() else ["encoding"]
    if stands.rules is None:
        return (*found, *(["curation"] if stands.curation != project.corpus.curation_digest() else []))
    on = going_on(project, stands).corpus
    found += ["curation"] if on.curation_digest() != project.corpus.curation_digest() else []
    return (*found, *(["pixels"] if on.encoding.pixels != project.corpus.encoding.pixels else []))
