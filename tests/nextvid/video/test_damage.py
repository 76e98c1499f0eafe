"""Forty damaged copies of clean films through the sandbox: no crash, no hang, and hardly any silent garbage."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nextvid.config.datasets import ShotConfig
from nextvid.video.probe import MediaFacts, probe
from nextvid.video.sandbox import Sandbox
from nextvid.video.shots import first_pass
from storage.errors import MediaError
from tests.nextvid.video.film import barcode, clips_at, numbers, write_barcodes

FRAMES = 60
SEED = 7  # fixed, so that a red test is red for everybody
GARBAGE_ALLOWED = 2  # our requirement: of 40
GARBAGE_LEVELS = 12.0  # mean difference to the picture that was coded; the clean films differ by at most 7
CODECS: dict[str, dict[str, object]] = {
    "h264.mp4": {},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}},
    # not in real time, where libvpx does what the load of the machine leaves it time for
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "good", "cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
}
# Damage of four kinds: flips of single bits, truncation, a hole, and damage to the index in the container's head.
DAMAGE = ("8 flips", "200 flips", "5000 flips", "cut at 30 %", "cut at 70 %", "cut at 95 %", "hole", "late hole")


@dataclass(frozen=True)
class Seen:
    """What became of a damaged file: a reason, or frames of which some may be other than they claim."""

    name: str
    reason: str | None
    wrong: int = 0


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Bytes with one kind of damage, anywhere behind the first 32 bytes, by which a file is known."""
    out = np.frombuffer(data, np.uint8).copy()
    if kind.endswith("flips"):
        for at in rng.integers(8 * 32, 8 * len(out), int(kind.split()[0])):
            out[at // 8] ^= 1 << (at % 8)
    elif kind.startswith("cut"):
        out = out[: len(out) * int(kind.split()[2]) // 100]
    elif kind.startswith("head"):
        first, size = data.index(b"stbl") if b"stbl" in data else 64, 256
        for at in rng.integers(8 * first, 8 * min(len(out), first + size), 12):
            out[at // 8] ^= 1 << (at % 8)
    else:
        first = int(rng.integers(len(out) // 2, len(out) - 500)) if kind == "late hole" else len(out) // 3
        out[first : first + len(out) // 20] = 0
    return out.tobytes()


@pytest.fixture(scope="module")
def damaged_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten damaged copies of each of four films."""
    folder, rng = tmp_path_factory.mktemp("damaged"), np.random.default_rng(SEED)
    paths = []
    for name, how in CODECS.items():
        clean = write_barcodes(folder / name, FRAMES, (160, 96), **how).read_bytes()
        for number, kind in enumerate((*DAMAGE, "head 1", "head 2")):
            path = folder / f"{number}_{name}"
            path.write_bytes(damaged(clean, kind, rng))
            paths.append(path)
    return paths


def seen(sandbox: Sandbox, path: Path) -> Seen:
    """The way every file goes: probe, first pass, frames of a clip by the decoder that the probe chose."""
    try:
        facts: MediaFacts = sandbox.call(probe, path, timeout_s=20)
        shots = sandbox.call(first_pass, path, facts, ShotConfig(), timeout_s=20)
        times = [facts.start_us + round(n * 1e6 / 24) for n in range(facts.frames or FRAMES)]
        times = [t for t in times if any(s.start_us <= t < s.end_us for s in shots)]
        if not times:
            return Seen(path.name, "no_shot")
        ((frames, found_us),) = sandbox.call(clips_at, path, [times], facts.decoder, timeout_s=20)
    except MediaError as error:
        return Seen(path.name, error.reason)
    expected = [round((int(t) - facts.start_us) * 24 / 1e6) for t in found_us]
    off = [np.abs(frame.astype(int) - barcode(n, 160, 96)).mean() for frame, n in zip(frames, expected, strict=True)]
    read = zip(numbers(frames), expected, off, strict=True)
    return Seen(path.name, None, sum(a != b or far > GARBAGE_LEVELS for a, b, far in read))


def test_forty_damaged_files_crash_nothing_and_hardly_lie(damaged_files: list[Path]) -> None:
    with Sandbox(1) as sandbox:
        results = [seen(sandbox, path) for path in damaged_files]
    assert len(results) == 40
    reasons = {result.name: result.reason for result in results}
    assert not {"crashed", "timeout", "memory", "failed"} & set(reasons.values()), reasons
    lies = [result for result in results if result.reason is None and result.wrong]
    refused = sum(result.reason is not None for result in results)
    assert refused >= 20, "the damage should bite"
    assert len(lies) <= GARBAGE_ALLOWED, lies


def test_clean_films_of_the_same_codecs_pass(tmp_path: Path) -> None:
    with Sandbox(1) as sandbox:
        for name, how in CODECS.items():
            result = seen(sandbox, write_barcodes(tmp_path / name, FRAMES, (160, 96), **how))
            assert result == Seen(name, None, 0)
