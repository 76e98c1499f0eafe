"""The clips that benchmarks read: random latents, by default of the VA-VAE's shape, in our store with a trainset.

Other formats are in sources.py and peers.py. The values are standard normal numbers from a seed, since lossless
compression takes only 7 to 10 % off real latents.

Axes: n clips, F frames, C channels, h w cells.
"""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float16
from torch import Tensor

from nextvid.config.overrides import apply_overrides
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.train.distributed import Ranks
from nextvid.train.loader import READ_AHEAD, Loader, placed
from nextvid.train.rows import Buffer, Latents, Pixels, Rows, Staged
from nextvid.trainset.files import write_trainset
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan
from nextvid.trainset.order import Drawn, Masks, Order
from nextvid.trainset.pixels import TrainsetPixels
from nextvid.trainset.trainset import Trainset
from storage.digest import digest
from storage.reader import PixelReader, RowReader, addresses
from storage.root import DataRoot
from storage.schemas import Commits
from storage.spec import EncodingSpec
from storage.store import LatentStore

FRAMES, CHANNELS, SIDE = 16, 32, 16  # VA-VAE f16d32 at 256 pixels, the paper's clip length
STRIDE = 16  # pixels a cell of it
SHAPE = (FRAMES, CHANNELS, SIDE, SIDE)
CLIP_BYTES = 2 * FRAMES * CHANNELS * SIDE * SIDE
BATCH = 32  # clips a step: the paper's batch of one GPU, 3072 / 96
BATCH_KEY = "random.000000"
TRAINSET = "0" * 32  # the digest it goes by; nothing compares it
PIXELS_ALONE = ("model.encoder.input=pixels", "losses.target=pixels", f"model.frame_channels={3 * 16**2}")
MASK_ENTRIES = 1 << 13  # of the mask plan: enough for its checks; how many there are does not change a draw's cost

Clips = Float16[np.ndarray, "n F C h w"]


def random_clips(count: int, shape: tuple[int, int, int, int] = SHAPE) -> Clips:
    """Standard normal numbers in float16; the same for the same count."""
    rng = np.random.default_rng(0)
    out = np.empty((count, *shape), np.float16)
    for clip in out:
        clip[:] = rng.standard_normal(shape, dtype=np.float32)
    return out


def write_store(clips: Clips, folder: Path, stride: int = STRIDE, storage: str = "float16") -> None:
    """Our store, one part of all clips, and a trainset of it; `stride`: pixels a cell."""
    _, frames, channels, height, width = clips.shape
    root = DataRoot.open(str(folder))
    spec = EncodingSpec("0" * 32, stride * height, "bicubic", "fp32", "mean", storage, channels, height, width)
    store = LatentStore(root, spec)
    store.create()
    part = store.plan_part(BATCH_KEY, frames, [bytes.fromhex(digest(["clip", n])) for n in range(len(clips))])
    for shard in range(part.shards):
        rows = part.rows_of(shard)
        defaults = {
            name: pl.lit([] if isinstance(kind, pl.List) else None, kind)
            for name, kind in Commits.create_empty().schema.items()
            if name not in rows.columns
        }
        defaults |= {"status": pl.lit("ok"), "decode_s": pl.lit(0.0, pl.Float32), "encode_s": pl.lit(0.0, pl.Float32)}
        first = int(rows["slot"][0])
        commits = rows.with_columns(**defaults).select(Commits.column_names())
        part.write_shard(shard, clips[first : first + rows.height], commits)
    # one part, so that clip n is row n: the trainset need not be sorted by id for anything that is measured here
    found = addresses(store.commits(BATCH_KEY, frames), [BATCH_KEY])
    said = {
        "digest": TRAINSET,
        "spec": spec.to_json(),
        "weights": {"random": 1.0},
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "batches": [BATCH_KEY],
        "offsets": {f"f{frames}": {"random": [0, len(found)]}},
    }
    write_trainset(root.pointed("trainset", TRAINSET), said, {frames: found}, [])


class Store:
    """Our store, opened: rows by number, and the loader of the trainer."""

    def __init__(self, folder: Path) -> None:
        self._root = DataRoot.open(str(folder))
        self._trainset = Trainset.open(self._root, TRAINSET)
        self.rows = np.array(self._trainset.rows(FRAMES))
        self.reader = RowReader(self._root, self._trainset.spec, self._trainset.batches)
        self.array_path = LatentStore(self._root, self._trainset.spec).part(BATCH_KEY, FRAMES, 0).path + "/latent"

    def read_into(self, clip: int, out: np.ndarray) -> None:
        """One clip by its number, as the trainer's threads read it."""
        self.reader.read_into(FRAMES, self.rows[clip], out)

    def loader(
        self,
        steps: int,
        latents: type[Staged] | None = None,
        overrides: tuple[str, ...] = (),
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    ) -> Loader:
        """The trainer's loader for so many steps of one rank, masks included; `latents`: another way to the device."""
        config = apply_overrides(training_recipe(steps), overrides)
        make_plan(self._root, config)
        plan = open_mask_plan(self._root, config.masks, grid_of(config.model))
        order = Order(self._trainset, config)
        ranks = Ranks(0, 1, device)
        kind = Latents(self.reader, self._trainset, 1, ranks.device)
        rows: Rows = placed(kind, BATCH * FRAMES, ranks.device)
        if latents is not None:
            rows = latents(kind, BATCH * FRAMES, READ_AHEAD + 1, ranks.device)
        return Loader(config, order, Masks(config, plan), {"latents": rows}, ranks)

    def pixel_loader(self, steps: int, pixels: TrainsetPixels) -> Loader:
        """The same with pixels alone, as a recipe that neither reads nor predicts latents has it."""
        config = apply_overrides(training_recipe(steps), PIXELS_ALONE)
        make_plan(self._root, config)
        plan = open_mask_plan(self._root, config.masks, grid_of(config.model))
        ranks = Ranks(0, 1, torch.device("cpu"))
        addresses = {FRAMES: pixels.rows(FRAMES)}
        kind = Pixels(PixelReader(self._root, pixels.spec, self._trainset.batches), pixels.spec, addresses)
        rows = placed(kind, BATCH * FRAMES, ranks.device)
        return Loader(config, Order(self._trainset, config), Masks(config, plan), {"pixels": rows}, ranks)

    def order(self, steps: int) -> list[int]:
        """The numbers of the clips that the loader draws, in its order."""
        drawn = Order(self._trainset, training_recipe(steps)).drawn(FRAMES, 0, steps * BATCH)
        found: list[int] = drawn.rows.tolist()
        return found


class InHostMemory(Staged):
    """The way to a device up to the copy: its batches are the float16 buffers of the ring."""

    _held: Buffer | None = None  # what the consumer has

    def deliver(self, drawn: Drawn, memory: tuple[Buffer, Float16[Tensor, "B F C H W"]]) -> Tensor:
        """The buffer as it is; it goes back into the ring when the next one is delivered."""
        if self._held is not None:
            self._ring.give(self._held, copied=None)
        self._held = memory[0]
        return memory[1]


def training_recipe(steps: int) -> RecipeConfig:
    """The paper's ViT-L on latents with one stage of this batch and length."""
    paper = recipe("nextvid_l_latent")
    stage = paper.stages[0].model_copy(update={"steps": steps, "frames": FRAMES, "batch": BATCH})
    masks = paper.masks.model_copy(update={"entries": MASK_ENTRIES})
    return paper.model_copy(update={"stages": (stage,), "masks": masks})
