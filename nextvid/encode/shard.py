"""The rows of one shard: frames to latents, one forward of the autoencoder after another, and their table of commits.

Forwards are cut from the shard's rows in slot order, and a row that failed takes part as black frames. So what one
forward computes follows from the part's plan alone, and a shard that is encoded again after a crash has the same bits.

Axes: n rows, F frames, R pixels a side, C channels, h w cells.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import polars as pl
from jaxtyping import Float32

from nextvid.encode.autoencoders import Autoencoder, Running
from nextvid.encode.frames import DecodedRow
from nextvid.encode.plan import UNSTABLE
from storage.errors import StoreError
from storage.schemas import Commits
from storage.spec import EncodingSpec

NOT_WANTED = "not_wanted"  # planned, but the clips table changed before the row was encoded
WITHDRAWN = "withdrawn"  # its file was, before the row was committed


class RefusedShardError(StoreError):
    """A shard is not committed because of its content; other errors of a store say nothing of its rows."""


class UnstorableError(RefusedShardError):
    """Latents that are not finite, or constant though their frames are not."""


class RoundTripError(RefusedShardError):
    """A row whose latents do not come back as the frames that they were made of."""


class EncodedRows(NamedTuple):
    """What one forward gave, in slot order. A failed row has NaN latents and a reason."""

    row_ids: list[bytes]
    latents: Float32[np.ndarray, "n F C h w"]
    posterior_std: list[float | None]
    reasons: list[str | None]
    decode_s: list[float]
    encode_s: float  # of the device, for all rows together


@dataclass
class EncodedShard:
    """Rows in slot order, filled forward by forward into an array that was allocated once."""

    row_ids: list[bytes]
    latents: Float32[np.ndarray, "n F C h w"]
    posterior_std: list[float | None] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, spec: EncodingSpec, frames: int, row_ids: list[bytes]) -> Self:
        """A shard of these rows before the first forward."""
        return cls(row_ids, np.empty((len(row_ids), *spec.row_shape(frames)), np.float32))

    @property
    def good(self) -> list[bytes]:
        """Ids of the rows that did not fail."""
        return [row for row, reason in zip(self.row_ids, self.reasons, strict=True) if reason is None]

    def reject(self, rows: Collection[bytes], reason: str) -> None:
        """Give rows that did not fail a reason in place of their latents."""
        for place in (place for place, row in enumerate(self.row_ids) if row in rows and self.reasons[place] is None):
            self.reasons[place], self.posterior_std[place] = reason, None
            self.latents[place] = np.nan

    def of(self, row: bytes) -> Float32[np.ndarray, "F C h w"]:
        """The latents of one row."""
        return self.latents[self.row_ids.index(row)]

    def add(self, rows: EncodedRows) -> list[bytes]:
        """Append the rows of the next forward; the ids of those that did not fail."""
        count, first = len(rows.row_ids), len(self.reasons)
        self.latents[first : first + count] = rows.latents
        self.posterior_std += rows.posterior_std
        self.reasons += rows.reasons
        self.decode_s += rows.decode_s
        self.encode_s += [rows.encode_s / count] * count
        return [row for row, reason in zip(rows.row_ids, rows.reasons, strict=True) if reason is None]


def encode_rows(
    autoencoder: Autoencoder, spec: EncodingSpec, frames: int, forwards: Iterable[Mapping[bytes, DecodedRow]]
) -> Iterator[EncodedRows]:
    """Encode the rows of each forward, given by row id in slot order; the next one is gathered while one runs.

    Raises UnstorableError where the autoencoder gives what cannot be latents.
    """
    black = np.zeros((frames, spec.resolution, spec.resolution, 3), np.uint8)
    before: tuple[Mapping[bytes, DecodedRow], Running] | None = None
    for seen in forwards:
        views = [black if one.frames is None else one.frames for one in seen.values()]
        noise = np.stack([row_noise(row, frames, spec) for row in seen]) if spec.posterior == "sample" else None
        running = autoencoder.start(views, noise)
        if before:
            yield _finished(*before)
        before = seen, running
    if before:
        yield _finished(*before)


def _finished(seen: Mapping[bytes, DecodedRow], running: Running) -> EncodedRows:
    """Wait for a forward; NaN in place of the latents of failed rows."""
    latents, widths = running.result()
    reasons = [one.reason or unstorable(row, one, z) for (row, one), z in zip(seen.items(), latents, strict=True)]
    std: list[float | None] = [None] * len(seen)
    for place, reason in enumerate(reasons):
        if reason is not None:
            latents[place] = np.nan
        elif widths is not None:
            std[place] = float(widths[place].mean())
    return EncodedRows(list(seen), latents, std, reasons, [one.decode_s for one in seen.values()], running.seconds())


def row_noise(row_id: bytes, frames: int, spec: EncodingSpec) -> Float32[np.ndarray, "F C h w"]:
    """Standard normal noise of a row, keyed by its id: the same on every machine and in any forward."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(row_id, "little")))
    return generator.standard_normal(spec.row_shape(frames), np.float32)


def unstorable(row_id: bytes, seen: DecodedRow, latents: Float32[np.ndarray, "F C h w"]) -> str | None:
    """Reason `constant` where frames of a single colour gave constant latents; None for latents that can be stored.

    Raises UnstorableError where other frames gave constant latents, or any gave latents that are NaN, infinite or
    beyond float16: then the autoencoder is at fault, and no row of the shard can be trusted.
    """
    where = f"row {row_id.hex()}: its latents"
    with np.errstate(over="ignore"):
        if not np.isfinite(latents.astype(np.float16)).all():
            raise UnstorableError(
                f"{where} are not finite as float16: nothing of its shard is stored. Check the autoencoder's weights, "
                "and set encoding.precision to 'fp32'"
            )
    if (latents.max(axis=(0, 2, 3)) != latents.min(axis=(0, 2, 3))).any():
        return None
    if seen.frames is not None and (seen.frames == seen.frames[0, 0, 0]).all():
        return "constant"
    raise UnstorableError(
        f"{where} are constant in every channel though its frames are not: nothing of its shard is stored. Check the "
        "autoencoder's weights"
    )


def commit_table(shard: EncodedShard, slots: list[int], psnr_db: Mapping[bytes, float]) -> pl.DataFrame:
    """Rows of schema Commits; checksums and sums are added by the store, which measures what it writes."""
    rows = len(shard.row_ids)
    return pl.DataFrame(
        {
            "row_id": shard.row_ids,
            "slot": slots,
            "status": [status(reason) for reason in shard.reasons],
            "reason": shard.reasons,
            "crc32c": [None] * rows,
            "sums": [[]] * rows,
            "sums_squared": [[]] * rows,
            "posterior_std": shard.posterior_std,
            "psnr_db": [psnr_db.get(row) for row in shard.row_ids],
            "decode_s": shard.decode_s,
            "encode_s": shard.encode_s,
        },
        schema_overrides=Commits.create_empty().schema,
    )


def status(reason: str | None) -> str:
    """Status of a committed row by the first word of its reason. Quarantined rows are tried again by the next call."""
    if reason is None:
        return "ok"
    return "rejected" if reason.split(":")[0] in (NOT_WANTED, UNSTABLE, WITHDRAWN) else "quarantined"
