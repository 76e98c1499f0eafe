"""Real broken files through the sandbox: no crash, no hang, and every file ends as facts or as a reason."""

from pathlib import Path

import pytest

from nextvid.config.datasets import ShotConfig
from nextvid.video.probe import MediaFacts, probe
from nextvid.video.sandbox import Sandbox
from nextvid.video.shots import first_pass
from storage.errors import MediaError


@pytest.mark.realdata
def test_broken_files_neither_crash_nor_hang(real_media: Path) -> None:
    reasons: dict[str, str] = {}
    with Sandbox(1) as sandbox:
        for path in sorted(p for p in (real_media / "broken").rglob("*") if p.is_file()):
            try:
                facts: MediaFacts = sandbox.call(probe, path, timeout_s=20)
                shots = sandbox.call(first_pass, path, facts, ShotConfig(), timeout_s=20)
                assert shots or facts.frames is not None
                reasons[path.name] = "ok"
            except MediaError as error:
                reasons[path.name] = error.reason
    assert len(reasons) >= 40
    assert not {"crashed", "timeout", "memory", "failed"} & set(reasons.values()), reasons
    assert reasons["hole.mp4"] == "corrupt"
    assert reasons["truncated_half.jpg"] == "corrupt"
    assert reasons["jpeg_named.mp4"] == reasons["random.mp4"] == reasons["empty.mp4"] == "unknown_format"
    assert reasons["sample_audio_only_15s.mp4"] == "no_video"
