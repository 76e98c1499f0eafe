"""One shard's rows: frames to latents, and the table of their commit.

Holds what is computed between decoding and writing; it decodes nothing and writes nothing. Forwards are cut from rows
in slot order and a failed row is a row of zeros there, so the composition of every batch follows from the part's plan
alone and a shard encoded again after a crash has the same bits.

Axes: n rows, F frames, R pixels a side, C channels, h w cells.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from einops import rearrange
from jaxtyping import Bool, Float, Float32

from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import Seen
from storage.latents import EncodingSpec
from storage.schemas import Commits

NOT_WANTED = "not_wanted"  # planned, but the clips table changed before it was encoded

Latents = Float32[np.ndarray, "n F C h w"]


@dataclass(frozen=True)
class EncodedShard:
    """Rows in slot order. Failed rows are NaN and have a reason; `posterior_std` is None without a posterior."""

    row_ids: list[bytes]
    latents: Latents
    posterior_std: Float32[np.ndarray, " n"] | None
    reasons: list[str | None]
    decode_s: list[float]
    encode_s: float  # per row

    @property
    def ok(self) -> Bool[np.ndarray, " n"]:
        """Which rows did not fail."""
        return np.array([reason is None for reason in self.reasons])

    @property
    def good(self) -> list[bytes]:
        """Ids of the rows that did not fail."""
        return [row for row, reason in zip(self.row_ids, self.reasons, strict=True) if reason is None]


def encode_shard(
    autoencoder: Autoencoder, spec: EncodingSpec, frames: int, row_ids: list[bytes], seen: Mapping[bytes, Seen]
) -> EncodedShard:
    """Encode the rows of a shard, given in slot order. A row without frames, or whose latents are no signal, fails."""
    began = time.perf_counter()
    at_once = max(1, autoencoder.frames_at_once // frames)
    blank = np.zeros((frames, spec.resolution, spec.resolution, 3), np.uint8)
    pieces: list[Latents] = []
    widths: list[Float32[np.ndarray, " n"]] = []
    for first in range(0, len(row_ids), at_once):
        some = row_ids[first : first + at_once]
        views = [blank if (got := seen[row].frames) is None else got for row in some]
        noise = np.concatenate([row_noise(row, frames, spec) for row in some]) if spec.posterior == "sample" else None
        encoded = autoencoder.encode(np.concatenate(views), noise)
        pieces.append(rearrange(encoded.latents, "(n F) C h w -> n F C h w", F=frames))
        if encoded.posterior_std is not None:
            widths.append(rearrange(encoded.posterior_std, "(n F) -> n F", F=frames).mean(1))
    latents = np.concatenate(pieces)
    reasons = [seen[row].reason or fault(row_latents) for row, row_latents in zip(row_ids, latents, strict=True)]
    latents[[reason is not None for reason in reasons]] = np.nan
    decode_s = [seen[row].decode_s for row in row_ids]
    encode_s = (time.perf_counter() - began) / len(row_ids)
    return EncodedShard(row_ids, latents, np.concatenate(widths) if widths else None, reasons, decode_s, encode_s)


def row_noise(row_id: bytes, frames: int, spec: EncodingSpec) -> Float32[np.ndarray, "F C h w"]:
    """Standard normal noise of a row, keyed by its id: the same on every machine and in any batch (design 5)."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(row_id, "little")))
    return generator.standard_normal((frames, spec.channels, spec.height, spec.width), np.float32)


def fault(latents: Float[np.ndarray, "F C h w"]) -> str | None:
    """Why these latents cannot be stored: they overflow float16, or every channel holds one value only."""
    with np.errstate(over="ignore"):
        if not np.isfinite(latents.astype(np.float16)).all():
            return "not_finite"
    if (latents.max(axis=(0, 2, 3)) == latents.min(axis=(0, 2, 3))).all():
        return "constant"
    return None


def commit_table(shard: EncodedShard, slots: list[int], psnr_db: Mapping[bytes, float]) -> pl.DataFrame:
    """Rows of schema Commits; checksums and sums are the store's, which measures what it writes."""
    lost = [reason is not None for reason in shard.reasons]
    widths = shard.posterior_std
    return pl.DataFrame(
        {
            "row_id": shard.row_ids,
            "slot": slots,
            "status": [_status(reason) for reason in shard.reasons],
            "reason": shard.reasons,
            "crc32c": [None] * len(lost),
            "sums": [[]] * len(lost),
            "sums_squared": [[]] * len(lost),
            "posterior_std": [None if gone or widths is None else float(widths[i]) for i, gone in enumerate(lost)],
            "psnr_db": [psnr_db.get(row) for row in shard.row_ids],
            "decode_s": shard.decode_s,
            "encode_s": [shard.encode_s] * len(lost),
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
