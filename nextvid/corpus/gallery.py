"""Small pictures of the shots that thresholds reject first, kept by the first pass, and the sheet that `clips` makes of
them.

New thresholds decode nothing, so their pictures must be there before anybody sets them: of each score that a filter
judges, the first pass keeps the shots at its ends. Holds no thresholds and no drawing (nextvid/corpus/sheets.py).
"""

import io
from collections.abc import Mapping

import numpy as np
import polars as pl
from PIL import Image

from nextvid.corpus.sheets import SheetRow, Tile, contact_sheet
from nextvid.video.shots import ShotFacts
from storage import atomic, tables
from storage.root import DataRoot
from storage.schemas import Pictures

# Of the scores that nextvid/corpus/cutting.py judges: which end is rejected (True: low values).
ENDS = {
    "motion_low": ("motion_mean", True),
    "motion_high": ("motion_mean", False),
    "freeze_high": ("freeze_share", False),
    "luma_low": ("luma_mean", True),
    "luma_high": ("luma_mean", False),
    "blur_low": ("blur", True),
    "short": ("length_us", True),
}
KEPT = 16  # ours: shots an end; all ends of a batch are then at most 112 pictures of about 4 kB
SHOWN = 8  # a reason: one line of the sheet
JPEG_QUALITY = 80
REASONS = ("static", "unsteady", "frozen", "dark", "bright", "blurred", "too_short")


class KeptPictures:
    """Pictures of the shots at the ends of each score; bounded while any number of shots goes by."""

    def __init__(self) -> None:
        self._shots: dict[bytes, tuple[Mapping[str, float], bytes]] = {}

    def add(self, shot_id: bytes, shot: ShotFacts) -> None:
        """Take a shot into account."""
        values = scores_of(shot.__dict__)
        if len(self._shots) > 8 * KEPT * len(ENDS):
            self._shots = {key: self._shots[key] for key in extreme({k: v for k, (v, _) in self._shots.items()})}
        self._shots[shot_id] = (values, _jpeg(shot.preview))

    def table(self, before: pl.DataFrame, shots: pl.DataFrame) -> pl.DataFrame:
        """Rows of Pictures: of those kept now or before, whose shots still are in the table, the ends of each score."""
        jpegs = dict(before.select("shot_id", "jpeg").iter_rows()) | {
            key: jpeg for key, (_, jpeg) in self._shots.items()
        }
        known = shots.filter(pl.col("shot_id").is_in(pl.Series(list(jpegs), dtype=pl.Binary).implode()))
        chosen = extreme({row["shot_id"]: scores_of(row) for row in known.iter_rows(named=True)})
        rows = [(key, jpegs[key]) for key in sorted(chosen)]
        return pl.DataFrame(rows, Pictures.create_empty().schema, orient="row")


def scores_of(shot: Mapping[str, object]) -> dict[str, float]:
    """What ENDS compares, of a row of `shots` or the fields of ShotFacts."""
    length_us = int(shot["end_us"]) - int(shot["start_us"])  # type: ignore[call-overload]  # integers in both
    names = {name for name, _ in ENDS.values()} - {"length_us"}
    return {name: float(shot[name]) for name in names} | {"length_us": length_us}  # type: ignore[arg-type]


def extreme(scores: Mapping[bytes, Mapping[str, float]]) -> set[bytes]:
    """The shots at the ends of each score."""
    chosen: set[bytes] = set()
    for name, low in ENDS.values():
        ordered = sorted(scores, key=lambda key: (scores[key][name] if low else -scores[key][name], key))
        chosen.update(ordered[:KEPT])
    return chosen


def publish_pictures(root: DataRoot, batch: str, kept: KeptPictures, shots: pl.DataFrame) -> None:
    """Write the batch's kept pictures, if they are others than before."""
    before = read_pictures(root, batch)
    after = kept.table(before, shots)
    if not after.equals(before):
        tables.write_table(root.pictures(batch), after, Pictures)


def read_pictures(root: DataRoot, batch: str) -> pl.DataFrame:
    """The batch's kept pictures; none where no first pass left any."""
    path = root.pictures(batch)
    return tables.read_table(path, Pictures) if atomic.exists(path) else Pictures.create_empty()


def rejected_sheet(clips: pl.DataFrame, shots: pl.DataFrame, pictures: pl.DataFrame) -> bytes:
    """PNG: for each reason for which pretraining left shots out, how many, and up to SHOWN that have a picture."""
    rejected = clips.filter((pl.col("status") == "rejected") & pl.col("reason").is_in(REASONS))
    scores = shots.select("shot_id", "start_us", "end_us", "motion_mean", "freeze_share", "luma_mean", "blur")
    shown = rejected.select("shot_id", "reason", "uri").unique(maintain_order=True).join(scores, on="shot_id")
    counts = dict(shown.group_by("reason").len().iter_rows())
    pictured = shown.join(pictures, on="shot_id").sort("reason", "shot_id")
    rows = []
    for reason in (reason for reason in REASONS if reason in counts):
        some = pictured.filter(pl.col("reason") == reason)
        header = f"{reason}: {counts[reason]} shots" + ("" if some.height else ", none of them at hand")
        rows.append(SheetRow(header, [_tile(row) for row in some.head(SHOWN).iter_rows(named=True)]))
    return contact_sheet(rows or [SheetRow("no shot was left out for its scores", [])])


def _tile(row: Mapping[str, object]) -> Tile:
    name = str(row["uri"]).rsplit("/", 1)[-1]
    said = f"motion {row['motion_mean']:.2f} frozen {row['freeze_share']:.2f}"
    light = f"luma {row['luma_mean']:.0f} blur {row['blur']:.0f} {name[-10:]}"
    assert isinstance(row["jpeg"], bytes)
    with Image.open(io.BytesIO(row["jpeg"])) as picture:
        return Tile(np.asarray(picture.convert("RGB")), f"{said}\n{light}")


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
