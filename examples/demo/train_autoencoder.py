"""Train the demo's autoencoder, whiten its latents (whitening.py) and save it with its provenance.

The training corpus has another seed than the demo's, so the demo's scenes are new to the model; held-out frames show
digits of the test images. docs/demo.md measured the recipe. It is a small autoencoder, not VA-VAE.

    python examples/demo/train_autoencoder.py CORPUS OUT [--steps N] [--threads N] [--photos FOLDER --photos-name NAME]
"""

import argparse
import copy
import csv
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import cv2
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from examples.demo import files, plan, reconstruction
from examples.demo.scenes import SIZE, Frames
from examples.demo.whitening import fold_whitening, moments
from examples.demo.write_corpus import write_corpus

CORPUS_SEED, CORPUS_VIDEOS = 1, 1000  # not the demo's seed 0; our choice: 4000 training scenes
STEPS = 5_000  # our choice: six minutes of one thread; 3600 gave the study 33.2 dB (docs/demo.md)
BATCH = 16  # docs/demo.md
PEAK_LR = 2e-3  # docs/demo.md
WARM_UP = 0.05  # our choice: share of the steps
L1_WEIGHT = 0.2  # docs/demo.md
KL_WEIGHT = 1e-6  # docs/demo.md; on the mean over latents: on a frame's sum, 10 of 16 channels died (our measurement)
EMA = 0.999  # our choice: a horizon of 1000 steps, reached by (1 + n) / (10 + n)
STRIDE = 4  # source frames: neighbours differ by a pixel, so every fourth is kept
WHITENING_FRAMES = 4000  # docs/demo.md: the covariance of 500 clips of 8 frames
HELD_OUT = 256  # docs/demo.md: frames of the measured PSNR
NOTE = (
    "This is not VA-VAE. It is a small autoencoder of the same family (diffusers' AutoencoderKL), trained from scratch "
    "on frames of this demo's generator at 64 x 64 pixels, with no alignment to a vision foundation model."
)


@dataclass(frozen=True)
class Trained:
    """A trained model, its losses and its training time."""

    model: AutoencoderKL  # averaged weights, not yet whitened
    losses: list[float]  # one a step
    seconds: float


def read_frames(corpus: Path, split: str, stride: int = STRIDE) -> Frames:
    """Every `stride`-th decoded frame [n, h, w, c] of a demo corpus's own videos of a split, by name."""
    with (corpus / "videos.csv").open(encoding="utf-8", newline="") as file:
        names = sorted({row["path"] for row in csv.DictReader(file) if row["split"] == split})
    own = [name for name in names if name.startswith("scene_")]
    return np.concatenate([files.read_video(corpus / "videos" / name)[::stride].copy() for name in own])


def train(frames: Frames, steps: int, seed: int, log_every: int = 0, start: AutoencoderKL | None = None) -> Trained:
    """Train a new autoencoder, or `start` in place, on frames [n, h, w, c]; bf16 autocast over fp32 weights."""
    torch.manual_seed(seed)
    model = (start or reconstruction.build()).train().requires_grad_(True).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    batches = _batches(frames, seed)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * _schedule(step, steps)
        wanted = reconstruction.to_patches(next(batches)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(wanted).latent_dist
            made = model.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()  # kl() sums over a frame
        loss = functional.mse_loss(made, wanted) + L1_WEIGHT * functional.l1_loss(made, wanted) + KL_WEIGHT * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        _average(average, model, step)
        losses.append(float(loss.detach()))
        if log_every and (step + 1) % log_every == 0:
            recent = sum(losses[-log_every:]) / log_every
            print(f"step {step + 1} loss {recent:.5f} {time.monotonic() - started:.0f} s", flush=True)
    return Trained(average.to(memory_format=torch.contiguous_format).eval(), losses, time.monotonic() - started)


@torch.inference_mode()
def whiten(model: AutoencoderKL, frames: Frames, batch: int = 64) -> None:
    """Fold the whitening of these frames' latents into the model, in place."""
    latents, variances = [], []
    for start in range(0, len(frames), batch):
        part = reconstruction.to_patches(torch.from_numpy(frames[start : start + batch]).float())
        posterior = model.encode(part).latent_dist
        latents.append(posterior.mean)
        variances.append(posterior.var.mean(dim=(0, 2, 3)))
    mean, covariance = moments(torch.cat(latents))
    fold_whitening(model, mean, covariance, torch.stack(variances).mean(dim=0))


def save(model: AutoencoderKL, folder: Path, provenance: dict[str, object]) -> None:
    """Write weights (fp16 safetensors), configuration, nextvid.json for the adapter, and the provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = copy.deepcopy(model).half()
    shipped.register_to_config(_name_or_path="")  # a folder of the machine that trained it
    shipped.save_pretrained(folder)
    adapter = {"kind": "autoencoder_kl", "patch": reconstruction.PATCH}
    for name, value in (("nextvid.json", adapter), ("provenance.json", provenance)):
        partial = folder / f".{name}.partial"
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / name)  # noqa: PTH105, TID251


def photos(folder: Path) -> Frames:
    """All JPEG photos under a folder as frames [n, h, w, c]: the middle square, resized to SIZE."""
    frames = []
    for path in sorted(folder.rglob("*.jpg")):
        picture = files.read_image(path)
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = picture[top : top + side, left : left + side]
        frames.append(np.asarray(cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8))
    return np.stack(frames)


def quality(model: AutoencoderKL, frames: Frames) -> dict[str, object]:
    """PSNR over frames [n, h, w, c], for the provenance."""
    found = reconstruction.psnr_db(frames, reconstruction.reconstruct(model, frames))
    return {
        "frames": len(frames),
        "mean_psnr_db": round(float(found.mean()), 2),
        "psnr_db_5th_percentile": round(float(np.percentile(found, 5)), 2),
    }


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then linear decay to zero."""
    warm_up = max(1, round(steps * WARM_UP))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def _batches(frames: Frames, seed: int) -> Iterator[torch.Tensor]:
    """Batches [n, h, w, c] in 0..255 without end, each pass in an order of its own; half of the frames mirrored."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(frames))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = frames[order[start : start + BATCH]]
            if rng.uniform() < 0.5:
                batch = batch[:, :, ::-1]
            yield torch.from_numpy(np.ascontiguousarray(batch)).float()


@torch.no_grad()
def _average(average: AutoencoderKL, model: AutoencoderKL, step: int) -> None:
    keep = min(EMA, (1 + step) / (10 + step))
    for mean, new in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(new, 1 - keep)


def _spread(frames: Frames, count: int) -> Frames:
    """`count` frames at even distances."""
    return np.asarray(frames[np.linspace(0, len(frames) - 1, count).round().astype(int)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's autoencoder and save it with its provenance.")
    parser.add_argument("corpus", type=Path, help="folder for the training corpus, written if it is missing")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="folder of an autoencoder to train further, with its provenance")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos for one more measurement")
    parser.add_argument("--photos-name", default="photos", help="what the provenance calls them")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    write_corpus(asked.corpus, CORPUS_SEED, CORPUS_VIDEOS)
    frames, held_out = read_frames(asked.corpus, "train"), _spread(read_frames(asked.corpus, "test"), HELD_OUT)
    start = reconstruction.load(asked.start) if asked.start else None
    trained = train(frames, asked.steps, asked.seed, log_every=200, start=start)
    before = quality(trained.model, held_out)
    whiten(trained.model, _spread(frames, WHITENING_FRAMES))
    save(trained.model, asked.out, {})
    shipped = reconstruction.load(asked.out)  # measured as shipped: whitened, rounded to fp16
    provenance: dict[str, object] = {
        "note": NOTE,
        "made_by": "examples/demo/train_autoencoder.py",
        "date": datetime.now(UTC).date().isoformat(),
        "seed": asked.seed,
        "steps": asked.steps,
        "batch": BATCH,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "data": {
            "generator_version": plan.VERSION,
            "seed": CORPUS_SEED,
            "videos": CORPUS_VIDEOS,
            "frames": len(frames),
        },
        "training_seconds": round(trained.seconds),
        "threads": asked.threads,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "before_whitening": before,
        "held_out_demo_frames": quality(shipped, held_out),
    }
    if asked.start:
        earlier = json.loads((asked.start / "provenance.json").read_text(encoding="utf-8"))
        provenance["continued_from"] = {name: value for name, value in earlier.items() if name != "note"}
    if asked.photos:
        provenance["real_photos"] = {"set": asked.photos_name, **quality(shipped, photos(asked.photos))}
    save(trained.model, asked.out, provenance)
    print(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    main()
