"""Delete what nothing refers to: shards that no trainset cites and whose rows no clip needs, and old leftover files.

Whole shards are deleted or kept, since a shard is never rewritten; tables and addresses decide, no latent is read. A
row is needed where a clips table that passed its checks names it and its encoding is the accepted one, the one that
corpus.yaml asks for, or a trainset's (probes read rows beside the trainset). Pixels are needed where they are accepted
or asked for beside such an encoding, or where runs read them. A batch whose clips are unknown, or did not pass, loses
nothing.
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
from storage.listing import size_bytes
from storage.part import Part
from storage.remote import is_local
from storage.root import DataRoot
from storage.schemas import ProbeRows
from storage.seal import seal_part
from storage.shard_files import shards_of
from storage.store import LatentStore, every_store
from storage.tables import read_table

LEFTOVER_AGE_S = 86_400  # a day: our choice, longer than any writer holds a temporary name
ShardKey = tuple[str, str, int, int, int]  # spec digest, batch, frames, part, shard


@dataclass(frozen=True)
class Shard:
    """One committed shard, and why it is deleted or kept."""

    path: str
    rows: int
    size_bytes: int
    trainsets: tuple[str, ...]  # that cite it
    needed: int  # rows that clips need, or all of them where that is unknown
    scored: int  # rows that scores were computed on; they keep no shard, since a score is a record

    @property
    def unused(self) -> bool:
        """Whether nothing keeps it."""
        return not self.trainsets and not self.needed


@dataclass(frozen=True)
class Sweep:
    """What is or would be deleted; and what is kept although clips need only a part of it, or nothing."""

    done: bool
    deleted: tuple[Shard, ...]
    kept: tuple[Shard, ...]
    leftovers: tuple[str, ...]  # paths of temporary files of writers that died
    leftover_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes freed or to be freed."""
        return sum(shard.size_bytes for shard in self.deleted) + self.leftover_bytes

    def text(self) -> str:
        """As text: one line for each shard and leftover file."""
        state = "deleted" if self.done else "would be deleted"
        lines = [f"{state}  {s.path}  {s.size_bytes:,} bytes{_users(s)}" for s in self.deleted]
        lines += [f"{state}  {path}  (leftover file)" for path in self.leftovers]
        lines += [f"kept  {s.path}  {s.rows - s.needed} of {s.rows} rows not needed{_users(s)}" for s in self.kept]
        tail = "" if self.done or not (self.deleted or self.leftovers) else "; nothing is changed without --yes"
        found = f"{len(self.deleted)} shards and {len(self.leftovers)} leftover files, {self.size_bytes:,} bytes"
        lines.append(f"{found} {state}{tail}")
        return "\n".join(lines)


def sweep(project: Project, *, yes: bool = False) -> Sweep:
    """Find what nothing refers to; delete it where `yes`. Repeating it finishes what a killed sweep began."""
    root = project.root
    shards = list(_shards(project))
    if yes:
        unused = [(part, number) for part, number, shard in shards if shard.unused]
        for part, number in unused:
            part.discard(number)
        for part in {part.path: part for part, _ in unused}.values():
            seal_part(part)
    found = [shard for _, _, shard in shards]
    folders = sorted({folder for folder in (root.url, root.runs_url) if is_local(folder)})
    old = sorted({path for folder in folders for path in leftovers(folder, LEFTOVER_AGE_S)})
    leftover_bytes = sum(
        file.lstat().st_size for path in old for file in (Path(path), *Path(path).rglob("*")) if file.is_file()
    )
    if yes:
        for path in old:
            remove_tree(path)
    return Sweep(
        done=yes,
        deleted=tuple(shard for shard in found if shard.unused),
        kept=tuple(shard for shard in found if not shard.unused and shard.needed < shard.rows),
        leftovers=tuple(old),
        leftover_bytes=leftover_bytes,
    )


def _shards(project: Project) -> Iterator[tuple[Part[Any], int, Shard]]:
    """Every stored shard, with its users."""
    root = project.root
    cited = _cited(root)
    scores = [read_table(str(path.with_name("rows.parquet")), ProbeRows)["row_id"] for path in scores_of(root)]
    scored = pl.concat([_NOTHING, *scores]).unique()
    specs = _specs(project)
    for store in every_store(root):
        for batch in store.batches():
            needed: pl.Series | None = _NOTHING
            if store.digest in specs:
                usable = batch_state(root, batch, "clips").usable
                needed = wanted_clips(project, batch)["row_id"] if usable else None  # None: not known
            for part in store.parts_of(batch):
                for number in (number for number in range(part.shards) if part.is_stored(number)):
                    ids = part.rows_of(number)["row_id"]
                    key = (store.digest, batch, part.frames, part.number, number)
                    yield (
                        part,
                        number,
                        Shard(
                            path=part.shard_path(number),
                            rows=len(ids),
                            size_bytes=size_bytes(part.shard_path(number)) or 0,
                            trainsets=tuple(sorted(cited.get(key, ()))),
                            needed=len(ids) if needed is None else int(ids.is_in(needed.implode()).sum()),
                            scored=int(ids.is_in(scored.implode()).sum()),
                        ),
                    )


_NOTHING = pl.Series("row_id", [], dtype=pl.Binary)


def _specs(project: Project) -> set[str]:
    """Digests of the encodings, and of the pixels, in which rows may still be needed."""
    root, current = project.root, accepted(project.root)
    trainsets = [Trainset.open(root, digest) for digest in trainsets_of(root)]
    encodings = {encoding_spec(project), *(trainset.spec for trainset in trainsets)}
    if current is not None and current.encoding not in {spec.digest() for spec in encodings}:
        encodings.add(LatentStore.open(root, current.encoding).spec)
    read = {pixels.spec for trainset in trainsets for pixels in frozen_pixels(root, trainset)}
    asked = {pixel_spec(one, encoding) for encoding in encodings for one in (project, project.as_asked())}
    return {spec.digest() for spec in (*encodings, *read, *asked) if spec is not None}


def _cited(root: DataRoot) -> dict[ShardKey, set[str]]:
    """Digests of the trainsets that cite a shard."""
    found: dict[ShardKey, set[str]] = {}
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


def _users(shard: Shard) -> str:
    """What refers to a shard."""
    users = [f"trainset {digest}" for digest in shard.trainsets]
    users += [f"{shard.scored} rows of scores"] if shard.scored else []
    return f"; referred to by {', '.join(users)}" if users else ""
