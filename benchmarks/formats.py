"""What number formats of stored latents cost and save: `python -m benchmarks.formats [--quick]`.

Latents of two autoencoders on the demo's films: the demo's, and one of VA-VAE's topology an eighth as wide, which is
trained here for a minute. Errors are of posterior means, over the width of the posterior and over the deviation of
latents; PSNR is of decoded frames against those of exact latents, and against the films. Read times are CPU time a row
of the paper's shape, with warm pages, in one thread; rates are of the loader with two threads, over float16's in the
same turn. trained_formats.py then trains a small model on each format.

Axes: n films, F frames, C channels, h w cells, H W pixels.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from einops import rearrange
from jaxtyping import UInt8
from numcodecs import Blosc, Zstd
from torch.nn import functional

from benchmarks.clips import (
    BATCH,
    FRAMES,
    SHAPE,
    TRAINSET,
    InHostMemory,
    Store,
    random_clips,
    training_recipe,
    write_store,
)
from benchmarks.measure import evict, machine, median_ratio, show, timed, write
from benchmarks.trained_formats import CPU, Frames, compare, differences, films
from examples.demo.train_autoencoder import KL_WEIGHT, L1_WEIGHT, PEAK_LR
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.vavae import CONFIG
from nextvid.train.rows import Hosted, Latents, Staged
from nextvid.trainset.order import Drawn, Order
from nextvid.trainset.trainset import Trainset
from storage.root import DataRoot
from storage.shard import packed, stored_values
from storage.spec import STORED

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "autoencoder"
TRAINED_AT_ONCE = 16  # frames: docs/demo.md
TURNS = 5
CODECS = {"zstd": Zstd(level=3), "blosc, zstd": Blosc("zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)}


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Measure, print tables, and with --json write what README.md documents.

    Args:
        quick: fewer films, rows and steps, in two minutes.
        json: file for the results.
    """
    torch.set_num_threads(1)
    count, steps, rows, seeds = (16, 20, 64, 2) if quick else (1024, 600, 256, 3)
    errors_found = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="nextvid-formats-") as name:
        for title, model, frames in _autoencoders(Path(name), films(min(count, 64)).frames, steps):
            errors_found += [{"autoencoder": title, **row} for row in errors(model, frames)]
        show("latents", list(errors_found[0]), [list(row.values()) for row in errors_found])
        read = list(reading(Path(name), rows))
    show("a row of 16 x 32 x 16 x 16", list(read[0]), [list(row.values()) for row in read])
    trained = list(compare(Autoencoder.load(DEMO), count, steps, seeds))
    over = list(differences(trained))
    for title, found in (("trained on each format", trained), ("and over float16", over)):
        show(title, list(found[0]), [list(row.values()) for row in found])
    results = {"machine": machine(), "quick": quick, "latents": errors_found, "reading": read, "trained": trained}
    write(json, {"benchmark": "formats", **results, "differences": over})


def _autoencoders(folder: Path, footage: Frames, steps: int) -> Iterator[tuple[str, Autoencoder, Frames]]:
    yield "demo", Autoencoder.load(DEMO), footage
    torch.manual_seed(0)
    narrow = tuple(width // 8 for width in CONFIG["block_out_channels"])
    model = AutoencoderKL(**CONFIG | {"block_out_channels": narrow, "norm_num_groups": 4})
    _train(model, rearrange(films(len(footage), seed=2).frames, "n f h w c -> (n f) h w c"), steps)
    model.save_pretrained(folder / "narrow")
    yield "VA-VAE's topology, narrow", Autoencoder.load(folder / "narrow"), footage


def _train(model: AutoencoderKL, frames: UInt8[np.ndarray, "n H W 3"], steps: int) -> None:
    """The demo's losses (examples/demo/train_autoencoder.py) on films that are not measured, without its average."""
    optimiser, rng = torch.optim.AdamW(model.parameters(), lr=PEAK_LR), np.random.default_rng(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = PEAK_LR * min((step + 1) / 20, (steps - step) / steps)
        wanted = torch.from_numpy(frames[rng.integers(len(frames), size=TRAINED_AT_ONCE)]).float() / 127.5 - 1
        wanted = rearrange(wanted, "n h w c -> n c h w")
        posterior = model.encode(wanted).latent_dist
        made = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = functional.mse_loss(made, wanted) + L1_WEIGHT * functional.l1_loss(made, wanted) + KL_WEIGHT * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


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
    rates: dict[str, list[float]] = {f"{storage} {state}": [] for storage in STORED for state in ("cold", "warm")}
    for _ in range(TURNS):
        for storage in STORED:
            evict(folder / storage)
            store = Store(folder / storage)
            for state in ("cold", "warm"):
                took = timed(partial(_load, store, count // BATCH))
                rates[f"{storage} {state}"].append(count / took.wall_s)
            del store  # its maps would keep pages in the cache
    for storage in STORED:
        over = {
            f"loader, {state}": median_ratio(rates[f"{storage} {state}"], rates[f"{STORED[0]} {state}"])
            for state in ("warm", "cold")
        }
        yield {"format": storage, **_read_us(folder / storage, count), **over}


def _load(store: Store, steps: int) -> None:
    """Batches as a device gets them, by two threads."""
    for batch in store.loader(steps, InHostMemory).batches(0, 2):
        assert batch.latents is not None


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


if __name__ == "__main__":
    tyro.cli(main)
