"""NExT-Vid: video representation learning by masked next-frame prediction.

    corpus/   which files and rows there are            train/    rows -> weights
    video/    files -> frames and facts                 probe/    frozen features -> accuracies
    encode/   frames -> latents                         sample/   generated next frames
    model/    the paper, one file per box of Fig. 2     lineage/  which data made what
    config.py, recipes.py   every configuration         report/   what people look at

`nextvid.load_encoder(path)` opens an exported encoder.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextvid.train.export import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Resolve `load_encoder` when it is asked for, so that importing the package costs no torch."""
    if name == "load_encoder":
        from nextvid.train.export import load_encoder

        return load_encoder
    raise AttributeError(f"module 'nextvid' has no attribute '{name}'")
