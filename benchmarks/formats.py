"""What number formats of stored latents cost and save: `python -m benchmarks.formats [--quick]`.

Latents of two autoencoders: the demo's, trained, on the demo's films; and one of VA-VAE's topology an eighth as wide,
with random weights, on the same films enlarged. Errors are of posterior means, over the width of the posterior and over
the deviation of latents; PSNR is of decoded frames against those of exact latents, and against the films. The flow loss
is of one small model, trained on exact latents, on other films. Read times are CPU time a row of the paper's shape,
with warm pages, in one thread.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from einops import rearrange, repeat
from jaxtyping import Float32, UInt8
from numcodecs import Blosc, Zstd

from benchmarks.clips import BATCH, FRAMES, SHAPE, TRAINSET, Store, random_clips, training_recipe, write_store
from benchmarks.gpu import random_batch
from benchmarks.measure import machine, show, timed, write
from examples.demo.scenes import MOTIONS, draw_shot, render
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import demo
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.vavae import CONFIG
from nextvid.model.flow import NoiseKey
from nextvid.model.reference import reference_features
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch
from nextvid.train.rows import Hosted, Latents, Staged
from nextvid.train.step import Trained, build, encoder_tokens, flow_targets, take_step
from nextvid.trainset.order import Drawn, Order
from nextvid.trainset.trainset import Trainset
from storage.root import DataRoot
from storage.shard import packed, stored_values
from storage.spec import STORED

TOP = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
MARGIN = 24  # pixels that a scene's texture exceeds the frame by: drift of 8 frames
CODECS = {"zstd": Zstd(level=3), "blosc, zstd": Blosc("zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)}

Latent = Float32[np.ndarray, "n F C h w"]
Frames = UInt8[np.ndarray, "n F H W 3"]


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Measure, print tables, and with --json write what README.md documents.

    Args:
        quick: fewer films, rows and steps, in two minutes.
        json: file for the results.
    """
    torch.set_num_threads(1)
    count, steps, rows = (16, 20, 64) if quick else (64, 200, 256)
    footage = films(count)
    rows_found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nextvid-formats-") as name:
        for title, model, frames in _autoencoders(Path(name), footage):
            rows_found += [{"autoencoder": title, **row} for row in errors(model, frames)]
        seconds = list(reading(Path(name), rows))
    flow = list(flow_losses(count, steps))
    for title, found in (("latents", rows_found), ("a row of 16 x 32 x 16 x 16", seconds), ("flow loss", flow)):
        show(title, list(found[0]), [list(row.values()) for row in found])
    results = {"machine": machine(), "quick": quick, "latents": rows_found, "reading": seconds, "flow": flow}
    write(json, {"benchmark": "formats", **results})


def films(count: int, seed: int = 0) -> Frames:
    """Clips of 8 frames as the demo's: a digit that moves over a drifting scene."""
    rng = np.random.default_rng(seed)
    shots = (
        draw_shot(rng, int(rng.integers(1000)), str(rng.choice(MOTIONS)), MARGIN, None, False) for _ in range(count)
    )
    return np.stack([render(shot, 0, 8, 8) for shot in shots])


def _autoencoders(folder: Path, footage: Frames) -> Iterator[tuple[str, Autoencoder, Frames]]:
    yield "demo", Autoencoder.load(TOP / "examples" / "demo" / "autoencoder"), footage
    torch.manual_seed(0)
    narrow = tuple(width // 8 for width in CONFIG["block_out_channels"])
    AutoencoderKL(**CONFIG | {"block_out_channels": narrow, "norm_num_groups": 4}).save_pretrained(folder / "narrow")
    larger = repeat(footage[: len(footage) // 4], "n f h w c -> n f (h 2) (w 2) c")
    yield "VA-VAE's topology, narrow, random", Autoencoder.load(folder / "narrow"), larger


def errors(model: Autoencoder, frames: Frames) -> Iterator[dict[str, Any]]:
    """One line a format."""
    encoded = model.start(list(frames)).result()
    exact, widths = encoded.latents, encoded.posterior_std
    assert widths is not None
    shown = model.decode(rearrange(exact, "n f c h w -> (n f) c h w"))
    truth = rearrange(frames, "n f h w c -> (n f) h w c")
    good = np.ones(len(exact), bool)
    for storage in STORED:
        raw = packed(exact, good, storage)
        stored = stored_values(exact, good, storage).astype(np.float32)
        rms = float(np.sqrt(np.mean((stored - exact) ** 2)))
        decoded = model.decode(rearrange(stored, "n f c h w -> (n f) c h w"))
        yield {
            "format": storage,
            "bytes a value": raw.nbytes / exact.size,
            **{name: len(codec.encode(raw)) / exact.size for name, codec in CODECS.items()},
            "error over deviation": rms / float(exact.std()),
            "error over posterior": rms / float(widths.mean()),
            "PSNR to exact, dB": _psnr_db(shown, decoded),
            "PSNR to film, dB": _psnr_db(truth, decoded),
        }


def _psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(np.float64) - other) ** 2), 1e-10)))


def reading(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """One line a format."""
    for storage in STORED:
        write_store(random_clips(count), folder / storage, storage=storage)
        yield {"format": storage, **_read_us(folder / storage, count)}


def _read_us(folder: Path, count: int) -> dict[str, float]:
    """CPU microseconds a row, median of 5 turns: unpacked by the reader, as a device gets it, as the CPU does."""
    reader, trainset = Store(folder).reader, Trainset.open(DataRoot.open(str(folder)), TRAINSET)
    kind, order = Latents(reader, trainset, 1, CPU), Order(trainset, training_recipe(count // BATCH))
    shares = [order.drawn(FRAMES, first, BATCH) for first in range(0, count, BATCH)]
    hosted, staged = Hosted(kind, BATCH * FRAMES), Staged(kind, BATCH * FRAMES, 2, CPU)
    host, bytes_ = hosted.memory(BATCH, FRAMES), staged.memory(BATCH, FRAMES)
    halves = torch.empty((BATCH, *SHAPE), dtype=torch.float16)

    def unpacked(drawn: Drawn) -> None:
        torch.stack([torch.from_numpy(row) for row in reader.rows(FRAMES, drawn.addresses)], out=halves)

    ways: dict[str, Callable[[Drawn], None]] = {
        "us, float16 on the CPU": unpacked,
        "us, for a device": lambda drawn: staged.fill(drawn, bytes_),
        "us, for the CPU": lambda drawn: hosted.fill(drawn, host),
    }
    found: dict[str, float] = {"bytes a row": trainset.spec.row_bytes(FRAMES)}
    for name, way in ways.items():
        took = [timed(partial(_all, way, shares)).cpu_s for _ in range(6)]
        found[name] = statistics.median(took[1:]) / count * 1e6  # the first maps files
    return found


def _all(way: Callable[[Drawn], None], shares: Sequence[Drawn]) -> None:
    for drawn in shares:
        way(drawn)


def flow_losses(count: int, steps: int) -> Iterator[dict[str, Any]]:
    """The flow loss of each format on films that were not trained on, with the same noise and masks."""
    model, config = Autoencoder.load(TOP / "examples" / "demo" / "autoencoder"), demo()
    exact = model.start(list(films(4 * count))).result().latents
    mean, std = (rearrange(v, "c -> c 1 1") for v in (exact.mean((0, 1, 3, 4)), exact.std((0, 1, 3, 4))))
    trained = build(config, Ranks(0, 1, CPU))
    for step in range(steps):
        take_step(trained, _batch(config, step, (exact - mean) / std), step, 0)
    other = model.start(list(films(count, seed=1))).result().latents
    good = np.ones(len(other), bool)
    plain = _flow(trained, (other - mean) / std)
    yield {"format": "exact", "flow loss": plain, "over exact": 1.0}
    for storage in STORED:
        found = _flow(trained, (stored_values(other, good, storage).astype(np.float32) - mean) / std)
        yield {"format": storage, "flow loss": found, "over exact": found / plain}


def _batch(config: RecipeConfig, step: int, latents: Latent) -> Batch:
    batch = random_batch(config, step, CPU)
    return replace(batch, latents=torch.from_numpy(latents[np.array(batch.draws) % len(latents)]))


@torch.no_grad()
def _flow(trained: Trained, latents: Latent) -> float:
    """Mean over strategies and all clips."""
    config, found = trained.recipe, []
    for step in range(len(latents) // config.stages[0].batch):
        batch = _batch(config, step, latents)
        tokens, targets = encoder_tokens(batch, config.model), flow_targets(batch, config)
        features = reference_features(trained.reference, tokens, config.losses.target_norm)
        key = NoiseKey(config.seed, step, batch.draws)
        for strategy in range(len(batch.visible)):
            losses = trained.model(tokens, targets, features, batch.visible, key, 1, strategy, False)
            found += [float(value) for value in losses.flow.values()]
    return statistics.mean(found)


if __name__ == "__main__":
    tyro.cli(main)
