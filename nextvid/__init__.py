"""NExT-Vid: video representation learning by masked next-frame prediction.

    config/    corpus.yaml and recipes                 trainset/  clips -> frozen training set, mask plans
    video/     files -> frames and facts               train/     trainset -> weights
    corpus/    files -> clips table                    evaluate/  weights -> scores and generated frames
    encode/    clips table -> latents                  report/    the model card
    model/     the paper, one file per box of Fig. 2   lineage/   which data made what
    planning/  what is missing and what it costs       making/    what all makers share

`nextvid.load_encoder(path)` opens an exported encoder, `nextvid.NExTVidEncoder.from_pretrained` one of the Hub too;
`nextvid.open_latents(root)` is a torch data set of stored latents, `nextvid.training_batches` gives the trainer's own.
"""

import os
from typing import TYPE_CHECKING

# Before torch loads OpenMP: how often a thread that waits for others looks before it sleeps. Without a bound it looks
# for as long as another program keeps the others' core: 12 steps of `demo` on two threads took over 100 s beside 25
# busy processes on two cores, 29 s with a bound (docs/decisions/0052).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from nextvid.features.encoder import NExTVidEncoder as NExTVidEncoder
    from nextvid.features.encoder import load_encoder as load_encoder
    from nextvid.train.batches import training_batches as training_batches
    from nextvid.trainset.dataset import open_latents as open_latents

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Resolve the public names when they are asked for, so that importing the package costs no torch."""
    match name:
        case "load_encoder" | "NExTVidEncoder":
            from nextvid.features import encoder

            return getattr(encoder, name)
        case "open_latents":
            from nextvid.trainset.dataset import open_latents

            return open_latents
        case "training_batches":
            from nextvid.train.batches import training_batches

            return training_batches
    raise AttributeError(f"module 'nextvid' has no attribute '{name}'")
