"""When corpus.yaml and makers become the accepted ones: at first use, when a person accepts, or at once with `auto`."""

from collections.abc import Sequence
from dataclasses import replace

from nextvid.config.accepted import Accepted, accept, accepted, as_accepted, keep_new
from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec
from nextvid.graph import GRAPH
from nextvid.making.batches import VERSIONED
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
    return accept(project.root, project.asked, spec.digest(), {asset: GRAPH[asset].version for asset in VERSIONED})


def outdated(project: Project) -> tuple[str, ...]:
    """Which of `encoding`, `curation` and `pixels` corpus.yaml asks for differently from what is accepted.

    And which accepted versions of makers are older than this code's, such as `shots version 2`.
    """
    known = accepted(project.root)
    if known is None:
        return ()
    corpus, spec = as_accepted(project.asked, known, project.root.accepted()), encoding_spec(project)
    names = []
    if known.encoding != spec.digest():
        before = LatentStore.open(project.root, known.encoding).spec
        same = replace(before, version=spec.version) == spec
        names.append(f"latents version {before.version}" if same else "encoding")
    if corpus.curation_digest() != project.asked.curation_digest():
        names.append("curation")
    if corpus.encoding.pixels != project.asked.encoding.pixels:
        names.append("pixels")
    older = [(asset, known.versions.get(asset, 0)) for asset in VERSIONED]
    return (*names, *(f"{asset} version {version}" for asset, version in older if version < GRAPH[asset].version))


def difference(names: Sequence[str]) -> str:
    """What `outdated` found, as the beginning of a sentence."""
    makers = sum(" version " in name for name in names)
    what = [*(["corpus.yaml"] if makers < len(names) else []), *(["this version of nextvid"] if makers else [])]
    return f"{' and '.join(what)} {'differs' if len(what) == 1 else 'differ'} from the accepted {' and '.join(names)}"
