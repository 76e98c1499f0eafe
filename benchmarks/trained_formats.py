"""Whether training on int8 latents loses anything: models of each format, from the same seeds, and their probes.

Films are the demo's: a digit moves over a drifting scene. For each seed and format the demo's model, with its schedule
shortened, trains on latents as that format stores them; its flow loss is of other films, with the same noise and masks,
and its accuracy that of the linear probe of a training (nextvid/evaluate/training_scores.py), which reads the averaged
encoder's features of labelled films and answers each quarter by the other three. All as the format stores them.

Axes: n films, F frames, C channels, h w cells, H W pixels, T times, D width.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float32, Int, UInt8

from benchmarks.gpu import random_batch
from examples.demo.scenes import MOTIONS, digits, draw_shot, render
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import demo
from nextvid.encode.autoencoders import Autoencoder
from nextvid.evaluate.features import encode
from nextvid.evaluate.stream import CLIPS_AT_ONCE
from nextvid.evaluate.training_scores import FOLDS, answered
from nextvid.model.flow import NoiseKey
from nextvid.model.reference import reference_features
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch
from nextvid.train.step import Trained, build, encoder_tokens, flow_targets, take_step
from storage.shard import stored_values
from storage.spec import STORED

CPU = torch.device("cpu")
MARGIN = 24  # pixels that a scene's texture exceeds the frame by: drift of 8 frames
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95 % interval, by the number of seeds

Latent = Float32[np.ndarray, "n F C h w"]
Frames = UInt8[np.ndarray, "n F H W 3"]


@dataclass(frozen=True)
class Films:
    """Films and what they show."""

    frames: Frames
    motions: Int[np.ndarray, " n"]  # index in MOTIONS
    shapes: Int[np.ndarray, " n"]  # which digit


def films(count: int, seed: int = 0) -> Films:
    """Clips of 8 frames as the demo's: a digit that moves over a drifting scene."""
    rng = np.random.default_rng(seed)
    frames, motions, shapes = list[np.ndarray](), list[int](), list[int]()
    for _ in range(count):
        digit, motion = int(rng.integers(1000)), int(rng.integers(len(MOTIONS)))
        frames.append(render(draw_shot(rng, digit, MOTIONS[motion], MARGIN, None, False), 0, 8, 8))
        motions.append(motion)
        shapes.append(int(digits()[1][digit]))
    return Films(np.stack(frames), np.array(motions), np.array(shapes))


def compare(model: Autoencoder, count: int, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """One line a seed and format: `count` films are asked about, as many are trained on, for a multiple of 20 steps."""
    exact = model.start(list(films(count).frames)).result().latents
    asked = films(count, seed=1)
    others = model.start(list(asked.frames)).result().latents
    mean, std = (rearrange(v, "c -> c 1 1") for v in (exact.mean((0, 1, 3, 4)), exact.std((0, 1, 3, 4))))
    for seed in range(seeds):
        for storage in STORED:
            known, held_out = (
                (stored_values(each, np.ones(len(each), bool), storage).astype(np.float32) - mean) / std
                for each in (exact, others)
            )
            trained = _trained(known[np.random.default_rng(seed).permutation(count)], steps, seed)
            found = {"seed": seed, "format": storage, "flow loss": _flow(trained, held_out)}
            vectors = _features(trained, held_out)  # [n, T, D]
            for name, labels in (("motion", asked.motions), ("shape", asked.shapes)):
                found[name] = answered(vectors, labels, np.arange(count) % FOLDS)["linear"]
            yield found


def differences(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds of each format and its differences to float16, paired by seed, with half their 95 % interval."""
    seeds = sorted({line["seed"] for line in lines})
    of = {(line["seed"], line["format"]): line for line in lines}
    for storage in STORED:
        found: dict[str, Any] = {"format": storage}
        for name in ("flow loss", "motion", "shape"):
            apart = [of[seed, storage][name] - of[seed, STORED[0]][name] for seed in seeds]
            found[name] = statistics.mean(of[seed, storage][name] for seed in seeds)
            found[f"{name}, difference"] = statistics.mean(apart)
            t = T_975.get(len(seeds))
            found[f"{name}, ±"] = None if t is None else t * statistics.stdev(apart) / len(seeds) ** 0.5
        yield found


def _trained(latents: Latent, steps: int, seed: int) -> Trained:
    """The demo's model after a schedule of its own shape over so many steps."""
    config = demo()
    whole = sum(stage.steps for stage in config.stages)
    stages = tuple(stage.model_copy(update={"steps": max(1, stage.steps * steps // whole)}) for stage in config.stages)
    trained = build(config.model_copy(update={"seed": seed, "stages": stages}), Ranks(0, 1, CPU))
    for step in range(sum(stage.steps for stage in stages)):
        take_step(trained, _batch(trained.recipe, step, latents), step, 0)
    return trained


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


@torch.no_grad()
def _features(trained: Trained, latents: Latent) -> Float32[np.ndarray, "n T D"]:
    """Mean tokens of each time, by the averaged encoder."""
    times, found = latents.shape[1] // trained.recipe.model.tubelet, list[np.ndarray]()
    for first in range(0, len(latents), CLIPS_AT_ONCE):
        tokens = encode(trained.reference, trained.recipe, torch.from_numpy(latents[first : first + CLIPS_AT_ONCE]))
        found.append(reduce(tokens.numpy(), "n (t s) d -> n t d", "mean", t=times))
    return np.concatenate(found)
