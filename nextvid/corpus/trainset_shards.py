"""Which shards frozen rows stand in, and which of these are not there: a copy that was interrupted, a part removed.

Asks listings only, one a part: what the shards hold, `verify` of the store reads. Writes nothing.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from storage import listing
from storage.latents import RowStore
from storage.part import PlannedPart
from storage.reader import shards_of
from storage.remote_reader import AT_ONCE


def gone_shards(
    store: RowStore[Any, Any], batches: Sequence[str], rows: Mapping[int, np.ndarray], whose: str, then: str
) -> list[str]:
    """A line for each part that lacks shards which rows (by frames) cite: which, and what to do.

    `whose` are the rows, `then` is to be done once the shards are there again.
    """
    cited = [
        (store.part(batches[batch], frames, part), shards)
        for frames, addresses in rows.items()
        for (batch, part), shards in shards_of(addresses).items()
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lines = pool.map(lambda one: _gone(one[0], one[1], whose, then), cited)
    return [line for line in lines if line]


def _gone(part: PlannedPart, shards: Sequence[int], whose: str, then: str) -> str:
    files = listing.files_below(part.path)
    gone = [number for number in shards if not {part.shard_path(number), part.commit_path(number)} <= files.keys()]
    if not gone:
        return ""
    torn = [part.commit_path(number) for number in gone if part.commit_path(number) in files]
    first = f"remove {', '.join(torn)}, " if torn else ""
    numbers = ", ".join(map(str, gone))
    return (
        f"{part.path}: {whose} cites its shards {numbers}, which are not there. Remedy: put them back, or {first}make "
        f"the latents of batch {part.batch} again, then {then}"
    )
