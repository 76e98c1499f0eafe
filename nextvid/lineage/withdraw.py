"""Withdraw a file: record its rows in withdrawn/<media>.json, zero them in every store, list what has used them.

The record comes first: from then on loaders refuse trainsets with such a row, and `media` rejects the file and copies
of its bytes, even if the process dies before the bytes are zeroed. Rows are those of every clips table, trainset and
score; a row that none of them names any more cannot be assigned to a file, hence `unexplained`. The file itself,
tables and runs are left as they are.
"""

from dataclasses import dataclass

import polars as pl

from nextvid.config.project import Project
from nextvid.graph import Asset
from nextvid.lineage.trace import Trace, scores_of, trace, trainsets_of
from nextvid.making.publishing import publish_notice
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError
from storage.root import DataRoot
from storage.schemas import Clips, Media, ProbeRows
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore, every_store
from storage.tables import read_table, read_tables
from storage.withdrawn import record_withdrawal


@dataclass(frozen=True)
class Withdrawal:
    """What is or would be withdrawn, and what has used it."""

    done: bool
    media: tuple[str, ...]  # ids in hex; several where the name had other bytes before
    rows: int  # rows known by id
    stored: int  # places in stores where they are
    size_bytes: int  # of these places
    unexplained: int  # committed rows of the same batches that no clip, trainset or score names any more
    affected: Trace

    def text(self) -> str:
        """As text."""
        state = "withdrawn" if self.done else "would be withdrawn (nothing is changed without --yes)"
        found = self.affected
        runs = len(found.runs) + len(found.started)
        users = f"{len(found.trainsets)} trainsets, {runs} runs and {len(found.scores)} scores"
        lines = [
            f"{state}: {', '.join(self.media)}",
            f"  {self.rows} rows, {self.stored} places in stores, {self.size_bytes:,} bytes overwritten with zeros",
            f"  used by {users}, which are left as they are:",
            *("  " + line for line in self.affected.text().splitlines()[1:]),
        ]
        if self.unexplained:
            lines.append(
                f"  {self.unexplained} stored rows of its batches belong to clips of an earlier curation and may be of "
                "this file: 'nextvid sweep --yes' deletes shards that hold such rows alone"
            )
        lines.append("  remove the file, checkpoints and pictures made of it yourself; then 'nextvid make trainset'")
        return "\n".join(lines)


def withdraw(project: Project, what: str, *, yes: bool = False) -> Withdrawal:
    """Withdraw a file by URI, path or media id (32 hex digits); only a plan of it unless `yes`. Repeating it is safe.

    Raises ConfigError for an unknown file, and for one whose bytes could never be read and so have no id.
    """
    root = project.root
    affected = trace(project, what)
    if affected.kind != "file":
        raise ConfigError(f"'{what}' is a {affected.kind}: files are withdrawn, by URI, path or media id")
    media = sorted({facts.media_id for facts in affected.media if facts.media_id is not None})
    if not media:
        raise ConfigError(f"'{what}' could not be read and has no id, so nothing was made of it: remove the file")
    ids = pl.Series([bytes.fromhex(media_id) for media_id in media], dtype=pl.Binary)
    named = _named_rows(root)
    rows = named.filter(pl.col("media_id").is_in(ids.implode())).select("media_id", "row_id").unique()
    if yes:
        for media_id in media:  # one without rows is recorded too
            own = rows.filter(pl.col("media_id") == bytes.fromhex(media_id))["row_id"]
            record_withdrawal(root, media_id, set(own.to_list()))
    places = []
    for part in (part for store in every_store(root) for batch in store.batches() for part in store.parts_of(batch)):
        planned = part.plan.filter(pl.col("row_id").is_in(rows["row_id"].implode()))["slot"].to_list()
        if slots := [slot for slot in planned if part.is_stored(slot // ROWS_PER_SHARD)]:
            places.append((part, slots))
    stored = sum(len(slots) for _, slots in places)
    if yes:
        for part, slots in places:
            part.erase(slots)
        frozen = sum(facts.rows for facts in affected.trainsets)
        users: dict[Asset, int] = {
            "pretrain": len(affected.runs) + len(affected.started),
            "probes": len(affected.scores),
        }
        publish_notice(root, f"withdrew {what}", {"media": len(media), "latents": stored, "trainset": frozen, **users})
    files = read_tables(root, "media", None, Media).filter(pl.col("media_id").is_in(ids.implode()))
    unexplained = sum(
        store.commits(batch).filter(pl.col("status") == "ok").join(named, on="row_id", how="anti").height
        for store in LatentStore.every(root)
        for batch in files["batch"].unique()
    )
    return Withdrawal(
        done=yes,
        media=tuple(media),
        rows=rows["row_id"].n_unique(),
        stored=stored,
        size_bytes=sum(
            size for part, slots in places for extents in part.extents(slots).values() for _, size in extents
        ),
        unexplained=unexplained,
        affected=affected,
    )


def _named_rows(root: DataRoot) -> pl.DataFrame:
    """Columns media_id, row_id of everything that names rows of files: clips, trainsets, scores."""
    return pl.concat(
        table.select("media_id", "row_id").drop_nulls("row_id")
        for table in (
            read_tables(root, "clips", None, Clips),
            *(Trainset.open(root, digest).lineage() for digest in trainsets_of(root)),
            *(read_table(str(path.with_name("rows.parquet")), ProbeRows) for path in scores_of(root)),
        )
    ).unique()
