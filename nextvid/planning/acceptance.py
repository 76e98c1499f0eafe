"""When corpus.yaml becomes the accepted configuration: at first use, when a person accepts, or at once with `auto`."""

from nextvid.config.accepted import Accepted, accept, accepted, as_accepted, keep_new
from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec
from storage.store import LatentStore


def ensure_accepted(project: Project) -> Accepted:
    """The accepted configuration; accepts corpus.yaml where nothing is accepted yet, or with `reencode: auto`.

    Datasets that corpus.yaml names for the first time are accepted as they are: nothing of theirs has to be rebuilt.
    """
    known = accepted(project.root)
    if known is None or (project.asked.reencode == "auto" and outdated(project)):
        return _accept(project)
    return keep_new(project.root, project.asked, known)


def accept_asked(project: Project) -> Project:
    """Accept what corpus.yaml asks for. Returns the project that works by it."""
    _accept(project)
    return project.as_asked()


def _accept(project: Project) -> Accepted:
    """Write the spec before its digest is accepted, so that the spec can be read when corpus.yaml asks for another."""
    spec = encoding_spec(project)
    LatentStore(project.root, spec).create()
    return accept(project.root, project.asked, spec.digest())


def outdated(project: Project) -> tuple[str, ...]:
    """Which of `encoding`, `curation` and `pixels` corpus.yaml asks for differently from what is accepted."""
    known = accepted(project.root)
    if known is None:
        return ()
    corpus = as_accepted(project.asked, known, project.root.accepted())
    differs = {
        "encoding": known.encoding != encoding_spec(project).digest(),
        "curation": corpus.curation_digest() != project.asked.curation_digest(),
        "pixels": corpus.encoding.pixels != project.asked.encoding.pixels,
    }
    return tuple(name for name, different in differs.items() if different)
