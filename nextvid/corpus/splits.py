"""Which split a file belongs to: decided once, the same for every clip of it, for ever.

Holds the rule of design 4: the official split, else by hash of the group, else of the media id. The hash alone
decides, so adding files moves nothing. Holds no labels (labels.py) and no fractions (corpus.yaml).
"""

from typing import Literal, cast

from nextvid.corpus.project import SplitConfig
from storage.digest import digest
from storage.schemas import SPLITS

Split = Literal["train", "val", "test"]

PARTS = 1 << 32  # a share is compared with 32 bits of the hash: finer than one file in 10^9


def split_of(config: SplitConfig, official: str | None, group: str | None, media_id: bytes) -> Split:
    """The split of a file, from its labels `split` and `group` and its id."""
    if official is not None:
        assert official in SPLITS, official
        return cast("Split", official)
    key = ["group", group] if group is not None else ["media", media_id.hex()]
    drawn = int(digest(["split", *key])[:8], 16)
    if drawn < round(config.test * PARTS):
        return "test"
    return "val" if drawn < round((config.test + config.val) * PARTS) else "train"
