"""A decoder that does not give the same frames twice for one file; the sandbox's processes import it by name."""

from typing import Literal

from nextvid.encode.decode_task import Frames, Task, decode
from storage.errors import MediaError

Lie = Literal["other frames", "corrupt", "missing"]


def decode_lying(media_id: bytes, rows: int, lie: Lie, task: Task) -> tuple[list[Frames], float]:
    """As `decode`, but for less than all `rows` of one file: other frames, or an error."""
    frames, seconds = decode(task)
    if task.media_id == media_id and len(task.rows) < rows:
        if lie != "other frames":
            raise MediaError(lie, "by the test")
        for one in frames:
            one[-1] ^= 1
    return frames, seconds
