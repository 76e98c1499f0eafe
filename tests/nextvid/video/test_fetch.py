"""What is said of a copy of a remote file names the file itself."""

from pathlib import Path

import pytest

from nextvid.video.fetch import by_uri

COPY, URI = Path("/tmp/copies/1f.mp4"), "s3://bucket/a//b.mp4"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"{COPY}: no frame", f"{URI}: no frame"),
        (f"file:{COPY}: damaged", f"{URI}: damaged"),
        ("its display matrix is no quarter turn", f"{URI}: its display matrix is no quarter turn"),
    ],
)
def test_every_message_names_the_uri_and_no_copy(message: str, said: str) -> None:
    assert by_uri(message, COPY, URI) == said
