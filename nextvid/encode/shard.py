"""One shard's rows: frames to latents batch by batch, and the table of their commit.

Holds what is computed between decoding and writing; it decodes nothing and writes nothing. Batches are cut from rows
in slot order and a failed row is a row of black frames there, so the composition of every batch follows from the plan
of the part alone and a shard encoded again after a crash has the same bits. One batch is gathered while another runs.

Axes: n rows, F frames, R pixels a side, C channels, h w cells.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32

from nextvid.encode.autoencoders import Autoencoder, Running
from nextvid.encode.frames import Seen
from storage.errors import StoreError
from storage.latents import EncodingSpec
from storage.schemas import Commits

NOT_WANTED = "not_wanted"  # planned, but the clips table changed before it was encoded


class RefusedShardError(StoreError):
    """A shard that is not committed for what is in it; other errors of a store say nothing of its rows."""


class UnstorableError(RefusedShardError):
    """Latents that are no signal."""


class RoundTripError(RefusedShardError):
    """A row that does not come back as the frames that it was made of."""


Latents = Float32[np.ndarray, "n F C h w"]
Take = Callable[[list[bytes]], Mapping[bytes, Seen]]  # waits for rows; those that no clip wants any more are missing
OnRow = Callable[[bytes, Float32[np.ndarray, "F C h w"]], None]


@dataclass(frozen=True)
class Batch:
    """What one forward brought: rows, how many of them are good, and the seconds that the device worked."""

    rows: int
    good: int
    encode_s: float


@dataclass
class EncodedShard:
    """Rows in slot order, filled batch by batch. Failed rows are NaN and have a reason."""

    row_ids: list[bytes]
    latents: Latents
    posterior_std: list[float | None] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)

    @property
    def ok(self) -> Bool[np.ndarray, " n"]:
        """Which rows did not fail."""
        return np.array([reason is None for reason in self.reasons])

    @property
    def good(self) -> list[bytes]:
        """Ids of the rows that did not fail."""
        return [row for row, reason in zip(self.row_ids, self.reasons, strict=True) if reason is None]

    def add(self, seen: Iterable[Seen], running: Running) -> list[tuple[bytes, Float32[np.ndarray, "F C h w"]]]:
        """Wait for the next batch and take its rows; the good ones. Raises UnstorableError."""
        encoded = running.result()
        first = len(self.reasons)
        good = []
        for place, (one, latents) in enumerate(zip(seen, encoded.latents, strict=True)):
            reason = one.reason or unstorable(self.row_ids[first + place], one, latents)
            self.latents[first + place] = np.nan if reason else latents
            if not reason:
                good.append((self.row_ids[first + place], latents))
            width = None if reason or encoded.posterior_std is None else float(encoded.posterior_std[place].mean())
            self.posterior_std.append(width)
            self.reasons.append(reason)
            self.decode_s.append(one.decode_s)
        self.encode_s += [running.seconds() / len(encoded.latents)] * len(encoded.latents)
        return good


def encode_shard(
    autoencoder: Autoencoder,
    spec: EncodingSpec,
    frames: int,
    row_ids: list[bytes],
    take: Take,
    on_row: OnRow = lambda row, latents: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> EncodedShard:
    """Encode the rows of a shard, given in slot order. `on_row` is told of each good row once its latents are there."""
    shard = EncodedShard(row_ids, np.empty((len(row_ids), *spec.row_shape(frames)), np.float32))
    at_once = max(1, autoencoder.frames_at_once // frames)
    blank = Seen(np.zeros((frames, spec.resolution, spec.resolution, 3), np.uint8), 0.0, NOT_WANTED)
    before: tuple[list[Seen], Running] | None = None

    def settle(seen: list[Seen], running: Running) -> None:
        good = shard.add(seen, running)
        for row, latents in good:
            on_row(row, latents)
        on_batch(Batch(len(seen), len(good), running.seconds()))

    for first in range(0, len(row_ids), at_once):
        some = row_ids[first : first + at_once]
        found = take(some)
        seen = [found.get(row, blank) for row in some]
        views = [blank.frames if one.frames is None else one.frames for one in seen]
        noise = np.stack([row_noise(row, frames, spec) for row in some]) if spec.posterior == "sample" else None
        running = autoencoder.start([view for view in views if view is not None], noise)
        if before:
            settle(*before)
        before = seen, running
    if before:
        settle(*before)
    return shard


def row_noise(row_id: bytes, frames: int, spec: EncodingSpec) -> Float32[np.ndarray, "F C h w"]:
    """Standard normal noise of a row, keyed by its id: the same on every machine and in any batch (design 5)."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(row_id, "little")))
    return generator.standard_normal(spec.row_shape(frames), np.float32)


def unstorable(row_id: bytes, seen: Seen, latents: Float32[np.ndarray, "F C h w"]) -> str | None:
    """Reason `constant` where flat frames gave latents that say nothing; else None.

    Raises UnstorableError where frames with a picture in them gave constant, infinite or NaN latents, or some that
    leave the range of float16: then the autoencoder is at fault, and with it every row of the shard.
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
    """Rows of schema Commits; checksums and sums are the store's, which measures what it writes."""
    rows = len(shard.row_ids)
    return pl.DataFrame(
        {
            "row_id": shard.row_ids,
            "slot": slots,
            "status": [_status(reason) for reason in shard.reasons],
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


def _status(reason: str | None) -> str:
    match reason:
        case None:
            return "ok"
        case reason if reason == NOT_WANTED:
            return "rejected"  # nothing is wrong with it, and nothing retries it
        case _:
            return "quarantined"
