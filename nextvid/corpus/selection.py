"""Which batches and rows a trainset takes, and why the others are left out.

A batch joins when its clips and latents passed their checks, every wanted row has a commit in the spec in force, and
the `duplicates` that are cited know its tables as they are now. A row joins when it is for pretraining, of split train,
stored, no duplicate that gives way and not withdrawn. Decides only: freezing is trainset.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from nextvid.corpus.pointers import read_latest
from nextvid.corpus.project import Project
from nextvid.encode.plan import spec_in_force
from storage.atomic import read_bytes, read_json
from storage.digest import digest_bytes
from storage.errors import UpstreamError
from storage.latents import ROWS_PER_SHARD, EncodingSpec, LatentStore
from storage.root import DataRoot
from storage.schemas import Clips, Duplicates
from storage.tables import read_checks, read_table, require_checks
from storage.withdrawn import withdrawn_rows


@dataclass(frozen=True)
class Selection:
    """What a trainset is made of. `rows` are sorted by dataset, then row id; `slot` counts within the shard.

    Columns of `rows`: those of Lineage, and part, shard, slot, crc32c, sums, sums_squared, posterior_std.
    """

    spec: EncodingSpec
    duplicates: str
    batches: tuple[str, ...]
    left_out: Mapping[str, str]  # batch -> reason
    rows: pl.DataFrame
    dropped: Mapping[str, int]  # reason -> rows for pretraining that were not taken
    test_shots: pl.Series  # shots that look like a probe test clip's, or are one


def select(project: Project) -> Selection:
    """Choose. Raises UpstreamError where `duplicates` is missing or old, too few batches are ready, or no row is."""
    root, spec = project.root, spec_in_force(project)
    duplicates, known = _known_to_duplicates(root)
    verdicts = {batch: _verdict(project, spec, batch, known) for batch in _pretraining_batches(project)}
    taken = tuple(sorted(batch for batch, (_, reason) in verdicts.items() if reason is None))
    left_out = {batch: reason for batch, (_, reason) in verdicts.items() if reason is not None}
    passed = sum(counts for counts, _ in verdicts.values())
    if passed == 0 or len(taken) / passed < project.corpus.min_complete:
        listed = "; ".join(f"{batch}: {reason}" for batch, reason in sorted(left_out.items())) or "there is none"
        needed = f"{project.corpus.min_complete:.0%} of the batches must be complete"
        raise UpstreamError(f"{len(taken)} of {passed} batches are ready, {needed}. Not taken: {listed}")
    table = read_table(f"{root.pointed('duplicates', duplicates)}/duplicates.parquet", Duplicates)
    found = [_rows(project, spec, batch, table) for batch in taken]
    rows, lost = pl.concat([good for good, _ in found]), pl.concat([bad for _, bad in found])
    if rows.is_empty():
        raise UpstreamError(f"no row for pretraining is left in {', '.join(taken)}: {_reasons(lost)}")
    ordered = rows.sort("dataset", "row_id", "batch")
    return Selection(spec, duplicates, taken, left_out, ordered, _reasons(lost), _test_shots(project, table))


def _pretraining_batches(project: Project) -> list[str]:
    """Batches of datasets that have a weight, whether or not their clips were ever made."""
    weighted = {name for name, weight in project.corpus.weights().items() if weight > 0}
    known = sorted({*project.root.batches(), *project.root.batches("clips")})
    return [batch for batch in known if batch.split(".")[0] in weighted]


def _known_to_duplicates(root: DataRoot) -> tuple[str, Mapping[str, Any]]:
    """The latest `duplicates`, and the digests of each batch's tables that it searched.

    Raises UpstreamError where a batch with clips of a probe test set is not among them: what it shares with pretraining
    is not known then, and no trainset can be said to be clean.
    """
    digest = read_latest(root, "duplicates")
    if digest is None:
        raise UpstreamError("'duplicates' has not been made: make 'duplicates' first")
    folder = root.pointed("duplicates", digest)
    require_checks(f"{folder}/checks.json", "duplicates")
    known = read_json(f"{folder}/duplicates.json")["inputs"]
    for batch in root.batches("clips"):
        checks = read_checks(root.checks("clips", batch))
        if checks is None or not checks["passed"] or _is_known(root, batch, known):
            continue
        clips = read_table(root.table("clips", batch), Clips)
        if clips.filter(_tested()).height:
            raise UpstreamError(f"batch {batch} holds probe test clips that 'duplicates' has not seen: make it again")
    return digest, known


def _verdict(project: Project, spec: EncodingSpec, batch: str, known: Mapping[str, Any]) -> tuple[bool, str | None]:
    """(whether the batch counts among those that should be ready, why it is left out or None)."""
    root = project.root
    clips = read_checks(root.checks("clips", batch))
    if clips is None:
        return False, "its clips were never made: the batch waits, or its media or shots did not pass their checks"
    if not clips["passed"]:
        return False, "its clips did not pass their checks"
    latents = read_checks(root.latents_checks(spec.digest(), batch))
    if latents is not None and not latents["passed"]:
        return False, "its latents did not pass their checks"
    if latents is None:
        return True, "it has no latents in the encoding in force"
    wanted = read_table(root.table("clips", batch), Clips).filter(_stored())
    missing = wanted.join(LatentStore(root, spec).commits(batch), on="row_id", how="anti").height
    if missing:
        return True, f"{missing} of its {wanted.height} rows are not encoded yet"
    if not _is_known(root, batch, known):
        return True, "'duplicates' has not seen its clips as they are now"
    return True, None


def _is_known(root: DataRoot, batch: str, known: Mapping[str, Any]) -> bool:
    now = [digest_bytes(read_bytes(root.table(noun, batch))) for noun in ("shots", "clips")]
    return known.get(batch) == now


def _rows(
    project: Project, spec: EncodingSpec, batch: str, duplicates: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows taken, rows for pretraining that are not, with `why`) of one batch."""
    clips = read_table(project.root.table("clips", batch), Clips)
    asked = clips.filter(_stored() & pl.col("uses").list.contains("pretrain"))
    commits = (
        LatentStore(project.root, spec)
        .commits(batch)
        .select(
            "row_id",
            "part",
            "shard",
            (pl.col("slot") % ROWS_PER_SHARD).alias("slot"),
            "crc32c",
            "sums",
            "sums_squared",
            "posterior_std",
            pl.col("status").alias("committed"),
        )
    )
    given_way = duplicates.filter((pl.col("batch") == batch) & pl.col("dropped_from").list.contains("pretrain"))
    gone = pl.Series(sorted(withdrawn_rows(project.root)), dtype=pl.Binary)
    why = (
        pl.when(pl.col("split") != "train")
        .then(pl.lit("split"))
        .when(pl.col("committed") != "ok")
        .then(pl.lit("not_encoded"))
        .when(pl.col("row_id").is_in(gone.implode()))
        .then(pl.lit("withdrawn"))
        .otherwise(pl.col("why"))
    )
    judged = (
        asked.join(commits, on="row_id", how="inner")
        .join(given_way.select("shot_id", why=pl.col("reason")), on="shot_id", how="left")
        .with_columns(why=why)
    )
    kept = judged.filter(pl.col("why").is_null()).select(_COLUMNS)
    return kept, judged.filter(pl.col("why").is_not_null()).select("row_id", "why")


_COLUMNS = (
    *("row_id", "clip_id", "shot_id", "media_id", "dataset", "batch", "uri", "frames"),
    *("part", "shard", "slot", "crc32c", "sums", "sums_squared", "posterior_std"),
)


def _test_shots(project: Project, duplicates: pl.DataFrame) -> pl.Series:
    """Shots of probe test clips and all that share a group with one, found anew from clips and groups.

    Does not look at `dropped_from`, so that the check made of it can contradict the table it rests on.
    """
    tested: Sequence[pl.DataFrame] = [
        read_table(project.root.table("clips", batch), Clips).filter(_tested()).select("shot_id")
        for batch in project.root.batches("clips")
    ]
    shots = pl.concat([Clips.create_empty().select("shot_id"), *tested])["shot_id"].unique()
    touched = duplicates.filter(pl.col("shot_id").is_in(shots.implode()))["group"].unique()
    near = duplicates.filter(pl.col("group").is_in(touched.implode()))["shot_id"]
    return pl.concat([shots, near]).unique().sort()


def _stored() -> pl.Expr:
    return (pl.col("status") == "ok") & (pl.col("uses").list.len() > 0)


def _tested() -> pl.Expr:
    """Clips of a probe's test set."""
    probed = pl.col("uses").list.set_difference(pl.lit(["pretrain"], pl.List(pl.String))).list.len() > 0
    return (pl.col("status") == "ok") & (pl.col("split") == "test") & probed


def _reasons(lost: pl.DataFrame) -> dict[str, int]:
    counted = lost.group_by("why").len().sort("why")
    return {str(why): int(count) for why, count in counted.iter_rows()}
