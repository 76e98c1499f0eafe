"""The round trip: sampled rows, decoded again from their files, must agree with what is about to be committed.

The frames must be the same, byte for byte; where they are not, the file gives no rows. Of the same frames, two rules
judge the encoder. Encoded again, the frames give the stored latents: swapped rows, permuted channels and wrong times
fail here, also for targets without a decoder. Decoded to pixels, the latents resemble the true frames at least as much
as frames of another time, a flip or another crop. Where such an alternative resembles the truth too much to tell (a
still, a symmetric frame), the row is undecidable for it.

Axes: F frames, R pixels a side, C channels, h w cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.decode_task import Frames
from nextvid.encode.frames import OF_THE_FILE, OF_THE_MACHINE, DecodedRow
from nextvid.encode.plan import UNSTABLE
from nextvid.encode.preview import Shown
from nextvid.encode.shard import row_noise
from storage.digest import crc32c
from storage.shard import stored_values
from storage.spec import EncodingSpec

# Our choice. VA-VAE decodes 1.8 times as long as it encodes (our measurement), so that f frames of k rows, out of F of
# 256 rows, take 2.8 k f / (256 F) of the device's time: 2.2 % with these, for images and for clips of 16 frames.
ROWS_PER_SHARD, IMAGES_PER_SHARD = 4, 2
FRAMES_PER_ROW = 8
LOSS_DB = 0.1  # our choice: the truth never loses by more
APART_DB = 6.0  # our choice: an alternative this much below the reconstruction is distinguished for certain
PSNR_CEILING_DB = 100.0  # for equal frames; 8-bit frames that differ in one value of 10^5 have 98 dB

Stored = Float[np.ndarray, "F C h w"]


@dataclass(frozen=True)
class Trip:
    """The verdict on one row. `error` is the RMS difference of both encodings in standard deviations of the stored one.

    `psnr_db` is NaN where there is no decoder.
    """

    psnr_db: float
    error: float
    faults: tuple[str, ...]
    undecidable: tuple[str, ...]


class Difference(NamedTuple):
    """Why a row was not the same twice: the first word of its reason, and what differs."""

    reason: str
    what: str


def checksums(frames: Frames) -> list[int]:
    """The crc32c of each frame."""
    return [crc32c(frame) for frame in frames]


def unlike(first: Sequence[int], again: DecodedRow) -> Difference | None:
    """How a row that was decoded again differs from the frames of these checksums; None where it does not.

    `unstable` rows are not tried again. Where the file is gone or the machine was at its limit, the reason is that.
    """
    if again.frames is None:
        assert again.reason is not None, "a row without frames has a reason"
        passing = again.reason in OF_THE_FILE | OF_THE_MACHINE
        return Difference(again.reason if passing else UNSTABLE, f"decoded once and not again ({again.reason})")
    other = [
        number for number, pair in enumerate(zip(first, checksums(again.frames), strict=True)) if pair[0] != pair[1]
    ]
    if not other:
        return None
    return Difference(UNSTABLE, f"decoded again, {len(other)} of {len(first)} frames differ, the first is {other[0]}")


def round_trip(
    model: Autoencoder, spec: EncodingSpec, row: bytes, latents: Float32[np.ndarray, "F C h w"], truth: Frames
) -> tuple[Trip, Shown]:
    """Judge a row by what the store will hold of its latents, against its frames decoded again; and its picture."""
    about = model.about
    checked = window(row, len(truth)) if about.time_map == "frame" else slice(None)
    stored = stored_values(latents[None], np.array([True]), spec.storage)[0, checked]
    noise = row_noise(row, len(truth), spec)[checked] if spec.posterior == "sample" else None
    truth = truth[checked]
    rebuilt = model.decode(stored.astype(np.float32), len(truth)) if about.decoder else None
    trip = judge(stored, model.encode(truth, noise).latents, rebuilt, truth, error_bound(spec.storage, spec.precision))
    return trip, Shown(truth, rebuilt, stored)


def error_bound(storage: str, precision: str) -> float:
    """Largest RMS difference, in standard deviations, between a row and itself encoded again in another batch.

    The sum of what storage and batch composition cost by our measurement, each with a factor of 3 to 5 of room; one
    frame's shift of a moving clip, a flip or other channels cost 0.1 and more.
    """
    match storage:
        case "float16":
            stored = 0.001  # measured 2.1e-4
        case "int8":
            stored = 0.04  # measured 9.0e-3; a channel's steps are 1/127 of its largest value, so outliers cost more
        case _:
            raise AssertionError(f"storage option {storage} has no measured error")
    match precision:
        case "fp32":
            computed = 0.005  # measured 1e-5 of std; TF32 has 10 bits of mantissa, so 1e-3 at worst a layer
        case "bf16":
            computed = 0.03  # measured 6e-3
        case _:
            raise AssertionError(f"precision {precision} has no measured error")
    return stored + computed


def judge(
    stored: Stored,
    encoded_again: Float32[np.ndarray, "F C h w"],
    reconstruction: Frames | None,
    truth: Frames,
    bound: float,
) -> Trip:
    """Verdict on one row: its stored latents, and their reconstruction if any, against the frames decoded again."""
    faults = []
    held = stored.astype(np.float64)
    error = float(np.sqrt(np.mean((encoded_again - held) ** 2)) / max(float(held.std()), 1e-12))
    if not error <= bound:  # also where it is NaN
        faults.append(f"encoded again it differs by {error:.4f} standard deviations; {bound:.4f} are allowed")
    if reconstruction is None:
        return Trip(float("nan"), error, tuple(faults), ())
    undecidable = []
    for name, rebuilt, true, other in alternatives(reconstruction, truth):
        true_db, other_db, apart_db = psnr_db(rebuilt, true), psnr_db(rebuilt, other), psnr_db(other, true)
        must_win = apart_db <= true_db - APART_DB
        # in a fade a decoder that pales its pictures comes nearer to the paler neighbour: a nearer one proves nothing
        can_lose = apart_db < max(true_db, other_db)
        if (can_lose and other_db - true_db > LOSS_DB) or (must_win and not true_db > other_db):
            faults.append(f"it looks like {name} ({other_db:.1f} dB), not like its own frames ({true_db:.1f} dB)")
        elif not must_win:
            undecidable.append(name)
    return Trip(psnr_db(reconstruction, truth), error, tuple(faults), tuple(undecidable))


def alternatives(reconstruction: Frames, truth: Frames) -> Iterator[tuple[str, Frames, Frames, Frames]]:
    """(name, reconstruction, truth, alternative), each cut to the frames and pixels that all three have."""
    if len(truth) > 1:
        yield "frames one later", reconstruction[:-1], truth[:-1], truth[1:]
        yield "frames one earlier", reconstruction[1:], truth[1:], truth[:-1]
    yield "flipped frames", reconstruction, truth, truth[:, :, ::-1]
    step = max(1, truth.shape[1] // 8)  # a crop moved by an eighth of its side, each way along each axis
    whole, first, last = slice(None), slice(None, -step), slice(step, None)
    for name, near, far in (
        ("a crop moved vertically", (whole, first), (whole, last)),
        ("a crop moved horizontally", (whole, whole, first), (whole, whole, last)),
    ):
        yield name, reconstruction[near], truth[near], truth[far]
        yield name, reconstruction[far], truth[far], truth[near]


def psnr_db(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal to noise ratio of bytes in dB over all values at once, at most PSNR_CEILING_DB."""
    squared = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64))
    return min(PSNR_CEILING_DB, 10 * np.log10(255**2 / squared)) if squared > 0 else PSNR_CEILING_DB


def sampled(row_ids: Sequence[bytes], frames: int) -> list[bytes]:
    """Rows of a shard to check: the lowest ids, which are hashes and so know nothing of content or order."""
    return sorted(row_ids)[: ROWS_PER_SHARD if frames > 1 else IMAGES_PER_SHARD]


def window(row_id: bytes, frames: int) -> slice:
    """Which of a row's frames are checked: FRAMES_PER_ROW in a row, from a place that its id decides."""
    spare = max(0, frames - FRAMES_PER_ROW)
    first = int.from_bytes(row_id[:8], "little") % (spare + 1)
    return slice(first, first + min(frames, FRAMES_PER_ROW))
