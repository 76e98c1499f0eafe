"""What may be deleted: whole shards that no trainset cites and whose rows no clip wants, and writers' old litter.

Decides from tables and addresses, reads no latent, rewrites no shard (design 4). A row is wanted where a clips table
that passed its checks names it and its encoding is in force, asked for by corpus.yaml or a trainset's, whose probes
read rows beside it; pixels where they are in force or asked for beside such an encoding, or runs read them. A batch
whose clips are not known, or did not pass, loses nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nextvid.config.accepted import accepted
from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec, pixel_spec, wanted_clips
from nextvid.lineage.trace import scores_of, trainsets_of
from nextvid.making.batches import batch_state
from nextvid.trainset.pixels import frozen_pixels
from nextvid.trainset.trainset import Trainset
from storage.atomic import leftovers, remove_tree
from storage.latents import LatentStore
from storage.listing import size_bytes
from storage.part import Part
from storage.pixels import every_store
from storage.remote import is_local
from storage.root import DataRoot
from storage.schemas import ProbeRows
from storage.shard_files import shards_of
from storage.tables import read_table

LITTER_AGE_S = 86_400  # a day: our choice, longer than any writer holds a temporary name
Place = tuple[str, str, int, int, int]  # spec digest, batch, frames, part, shard


@dataclass(frozen=True)
class Shard:
    """One committed shard, and why it goes or stays."""

    path: str
    rows: int
    size_bytes: int
    trainsets: tuple[str, ...]  # that cite it
    wanted: int  # rows that clips want, or all of them where that is not known
    asked: int  # rows that scores asked about; they keep nothing, since a score is a record

    @property
    def goes(self) -> bool:
        """Whether nothing keeps it."""
        return not self.trainsets and not self.wanted


@dataclass(frozen=True)
class Sweep:
    """What goes or went, and what nearly did: shards that no clip wants in part or whole and something still holds."""

    done: bool
    gone: tuple[Shard, ...]
    kept: tuple[Shard, ...]
    litter: tuple[str, ...]
    litter_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes freed or to be freed."""
        return sum(shard.size_bytes for shard in self.gone) + self.litter_bytes

    def text(self) -> str:
        """For people."""
        state = "removed" if self.done else "would go"
        lines = [f"{state}  {s.path}  {s.size_bytes:,} bytes{_said(s)}" for s in self.gone]
        lines += [f"{state}  {path}  (litter)" for path in self.litter]
        lines += [f"stays  {s.path}  {s.rows - s.wanted} of {s.rows} rows unwanted{_said(s)}" for s in self.kept]
        tail = "" if self.done or not (self.gone or self.litter) else "; nothing is changed without --yes"
        lines.append(
            f"{len(self.gone)} shards and {len(self.litter)} pieces of litter, {self.size_bytes:,} bytes {state}{tail}"
        )
        return "\n".join(lines)


def sweep(project: Project, *, yes: bool = False) -> Sweep:
    """Find what nothing refers to; delete it where `yes`. Doing it again finishes what a killed sweep began."""
    root = project.root
    shards = list(_shards(project))
    if yes:
        for part, number, shard in shards:
            if shard.goes:
                part.discard(number)
    found = [shard for _, _, shard in shards]
    folders = sorted({folder for folder in (root.url, root.runs_url) if is_local(folder)})
    old = sorted({path for folder in folders for path in leftovers(folder, LITTER_AGE_S)})
    litter_bytes = sum(_size_bytes(Path(path)) for path in old)
    if yes:
        for path in old:
            remove_tree(path)
    return Sweep(
        done=yes,
        gone=tuple(shard for shard in found if shard.goes),
        kept=tuple(shard for shard in found if not shard.goes and shard.wanted < shard.rows),
        litter=tuple(old),
        litter_bytes=litter_bytes,
    )


def _shards(project: Project) -> Iterator[tuple[Part[Any], int, Shard]]:
    """Every shard that stands, judged."""
    root = project.root
    cited, asked = _cited(root), _asked(root)
    specs = _specs(project)
    for store in every_store(root):
        for batch in store.batches():
            wanted = _wanted(project, batch) if store.digest in specs else _NOTHING
            for part in store.parts_of(batch):
                for number in (number for number in range(part.shards) if part.is_stored(number)):
                    ids = part.rows_of(number)["row_id"]
                    place = (store.digest, batch, part.frames, part.number, number)
                    yield (
                        part,
                        number,
                        Shard(
                            path=part.shard_path(number),
                            rows=len(ids),
                            size_bytes=size_bytes(part.shard_path(number)) or 0,
                            trainsets=tuple(sorted(cited.get(place, ()))),
                            wanted=len(ids) if wanted is None else int(ids.is_in(wanted.implode()).sum()),
                            asked=int(ids.is_in(asked.implode()).sum()),
                        ),
                    )


_NOTHING = pl.Series("row_id", [], dtype=pl.Binary)


def _wanted(project: Project, batch: str) -> pl.Series | None:
    """Row ids that the batch's clips want; None where that is not known."""
    usable = batch_state(project.root, batch, "clips").usable
    return wanted_clips(project, batch)["row_id"] if usable else None


def _specs(project: Project) -> set[str]:
    """Digests of the encodings, and of the pixels, in which rows may still be wanted."""
    root, stands = project.root, accepted(project.root)
    trainsets = [Trainset.open(root, digest) for digest in trainsets_of(root)]
    encodings = {encoding_spec(project), *(trainset.spec for trainset in trainsets)}
    if stands is not None and stands.encoding not in {spec.digest() for spec in encodings}:
        encodings.add(LatentStore.open(root, stands.encoding).spec)
    read = {pixels.spec for trainset in trainsets for pixels in frozen_pixels(root, trainset)}
    asked = {pixel_spec(one, encoding) for encoding in encodings for one in (project, project.as_asked())}
    return {spec.digest() for spec in (*encodings, *read, *asked) if spec is not None}


def _cited(root: DataRoot) -> dict[Place, set[str]]:
    """Digests of the trainsets that cite a shard, by its place."""
    found: dict[Place, set[str]] = {}
    for digest in trainsets_of(root):
        trainset = Trainset.open(root, digest)
        addressed = [(trainset.spec.digest(), trainset.rows)]
        addressed += [(pixels.spec.digest(), pixels.rows) for pixels in frozen_pixels(root, trainset)]
        for spec, rows_of in addressed:
            for frames in trainset.lengths:
                for (batch, part), shards in shards_of(rows_of(frames)).items():
                    for shard in shards:
                        found.setdefault((spec, trainset.batches[batch], frames, part, shard), set()).add(digest)
    return found


def _asked(root: DataRoot) -> pl.Series:
    """Rows that any score asked about."""
    tables = [read_table(str(path.with_name("rows.parquet")), ProbeRows)["row_id"] for path in scores_of(root)]
    return pl.concat([_NOTHING, *tables]).unique()


def _said(shard: Shard) -> str:
    """What refers to a shard."""
    said = [f"trainset {digest}" for digest in shard.trainsets]
    said += [f"{shard.asked} rows that scores asked about"] if shard.asked else []
    return f"; referred to by {', '.join(said)}" if said else ""


def _size_bytes(path: Path) -> int:
    return sum(found.lstat().st_size for found in [path, *path.rglob("*")] if found.is_file())
