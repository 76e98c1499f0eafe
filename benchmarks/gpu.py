"""What only a GPU can show, in under ten minutes: `make gpu`, or `python -m benchmarks.gpu [--quick] [--json FILE]`.

It prints as it goes, so that a session that ends early leaves what it measured: frame attention's backends against each
other in bf16, fifty compiled steps through two clip lengths, the pinned ring against a slow consumer, the step of ViT-L
with its MFU and wait for data, as written and compiled, and the rate of an autoencoder of the VA-VAE's shape. On a
machine without a GPU it says so and ends. `--quick` runs every part, on a CPU too, at sizes that it can bear: what
works there will not waste the minutes of a GPU.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.clips import BATCH, Store, random_clips, write_store
from benchmarks.encode import DEMO, write_vavae
from benchmarks.measure import machine, show, write
from benchmarks.step import one_stage, trained, write_project
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.config.stages import stage_at
from nextvid.encode.autoencoders import Autoencoder
from nextvid.model.attention import Backend, flash_kernel, frame_attention
from nextvid.model.tokens import tube_ids
from nextvid.train import step as steps
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch
from nextvid.train.loop import speeds
from nextvid.train.rows import Staged
from storage.errors import ConfigError

LIMIT_S = 540.0  # of the ten minutes: a part that would begin later is left out
BF16_ERROR = 2e-2  # of the largest value, as in tests/nextvid/model/test_attention.py
MODEL = "nextvid_l_latent"
STAGES = {"k = 4": 0, "k = 1": 2, "cool-down": 3}
COOL_DOWN_CLIPS = 8  # of 64 frames: as many tokens as BATCH clips of 16
Row = dict[str, Any]
Part = Callable[[], Row | list[Row]]


@dataclass(frozen=True)
class Shape:
    """Frame attention: blocks, queries and keys of each, heads and their width."""

    name: str
    frames: int
    queries: int
    keys: int
    heads: int
    width: int
    clips: int


SHAPES = (
    Shape("reference, ViT-L", 8, 256, 256, 16, 64, 16),
    Shape("online, ViT-H", 7, 60, 60, 16, 80, 32),
    Shape("predictor", 7, 256, 60, 12, 32, 32),
    Shape("reference, 64 frames", 32, 256, 256, 16, 64, 2),
)


def main(quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Run all parts, print as they end, and with --json write their rows.

    Args:
        quick: every part at a small size, on a CPU where there is no GPU.
        json: file for the results.
    """
    known = torch.cuda.is_available()
    if not known and not quick:
        print("gpu: this machine has no GPU that torch can use, so nothing was run; --quick tries its parts on the CPU")
        return
    device, began = torch.device("cuda", 0) if known else torch.device("cpu"), time.perf_counter()
    print(torch.cuda.get_device_name(device) if known else "CPU", torch.__version__, flush=True)
    found: dict[str, list[Row]] = {}
    failed = []
    for name, part in (small_parts(device) if quick else whole_parts(device)).items():
        if time.perf_counter() - began > LIMIT_S:
            print(f"{name}: left out, {LIMIT_S:.0f} s are over", flush=True)
            continue
        try:
            rows = part()
            found[name] = rows if isinstance(rows, list) else [rows]
        except Exception as error:
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
            failed.append(name)
            continue
        show(
            f"{name}, at {time.perf_counter() - began:.0f} s",
            [*found[name][0]],
            [[*row.values()] for row in found[name]],
        )
        sys.stdout.flush()
    about = machine() | {"torch": torch.__version__, "device": str(device)}
    write(json, {"benchmark": "gpu", "quick": quick, "machine": about, "rows": found, "failed": failed})
    sys.exit(1 if failed else 0)


def whole_parts(device: torch.device) -> dict[str, Part]:
    """By name, in the order in which they run."""
    parts: dict[str, Part] = {
        "attention": partial(attention, device, SHAPES),
        "two lengths": partial(two_lengths, device, recipe_by_name("nextvid_s_latent"), 50, {16: 32, 64: 8}),
        "ring": partial(ring, device, 40),
        "encode": partial(encode_rate, str(device), None, 256, 256),
    }
    for compiled in (False, True):
        for stage, number in STAGES.items():
            name = f"step, {stage}, {'compiled' if compiled else 'as written'}"
            parts[name] = partial(step_of, MODEL, number, COOL_DOWN_CLIPS if number == 3 else BATCH, 30, compiled)
    return parts


def small_parts(device: torch.device) -> dict[str, Part]:
    """The same parts with the demo's models, compiled on a GPU alone: a CPU needs a compiler for that."""
    compiled = device.type == "cuda"
    return {
        "attention": partial(attention, device, (Shape("small", 3, 5, 4, 2, 16, 2),), torch.float32, 1e-5),
        "two lengths": partial(two_lengths, device, recipe_by_name("demo"), 4, {4: 2, 8: 1}, compiled),
        "ring": partial(ring, device, 3, clips=96),
        "encode": partial(encode_rate, str(device), DEMO, 64, 16, at_once=8),
        **{f"step, {stage}": partial(step_of, "demo", number, 4, 20, compiled) for stage, number in STAGES.items()},
    }


def attention(
    device: torch.device, shapes: tuple[Shape, ...], dtype: torch.dtype = torch.bfloat16, most: float = BF16_ERROR
) -> list[Row]:
    """Errors of each backend against float64, of values and gradients, and its time; AssertionError if one is wrong."""
    backends: list[Backend] = ["loop", "dense", "block"]
    try:
        flash_kernel()
        backends.append("flash")
    except ConfigError:
        print("flash-attn is not installed: without it")
    rows = []
    for shape in shapes:
        q, k, v = (
            torch.randn(shape.clips, shape.heads, shape.frames * n, shape.width, device=device, dtype=dtype)
            for n in (shape.queries, shape.keys, shape.keys)
        )
        weights = torch.randn_like(q)
        wanted = _with_gradients(
            exact, q[:1].double(), k[:1].double(), v[:1].double(), weights[:1].double(), shape.frames
        )
        for backend in backends:

            def attend(q: Tensor, k: Tensor, v: Tensor, frames: int, backend: Backend = backend) -> Tensor:
                return frame_attention(q, k, v, frames, backend)

            found = _with_gradients(attend, q[:1], k[:1], v[:1], weights[:1], shape.frames)
            pairs = zip(found, wanted, strict=True)
            error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
            seconds = _seconds(device, lambda: _with_gradients(attend, q, k, v, weights, shape.frames))  # noqa: B023
            rows.append({"name": shape.name, "backend": backend, "error": error, "forward_backward_ms": 1e3 * seconds})
            assert error < most, f"{shape.name}, {backend}: {error}"
    return rows


def exact(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """Softmax attention written out, every pair in memory."""
    row, column = (torch.arange(x.shape[2], device=q.device) // (x.shape[2] // frames) for x in (q, k))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(column[None] > row[:, None], -torch.inf).softmax(dim=-1) @ v


def two_lengths(
    device: torch.device, recipe: RecipeConfig, count: int, batches: dict[int, int], compiled: bool = True
) -> Row:
    """Steps of random clips, half of each length; AssertionError if a loss is not finite or a graph came late."""
    half = count // len(batches)
    stages = [
        recipe.stages[0].model_copy(update={"frames": frames, "batch": batch, "steps": half})
        for frames, batch in batches.items()
    ]
    recipe = recipe.model_copy(update={"stages": tuple(stages)})
    trained = steps.build(recipe, Ranks(0, 1, device), ExecutionConfig(compile=compiled))
    graphs, late, losses, took = counters["stats"], 0, [], 0.0
    for number in range(recipe.steps):
        before, began = graphs["unique_graphs"], time.perf_counter()
        found = steps.take_step(trained, random_batch(recipe, number, device), number, 0)
        losses.append(sum(value.item() for value in found.losses.values()))
        late += graphs["unique_graphs"] - before if stage_at(recipe.stages, number)[1] else 0
        took += 0 if stage_at(recipe.stages, number)[1] else time.perf_counter() - began
    assert all(np.isfinite(losses)), losses
    assert late == 0, f"{late} graphs after the first step of a length"
    return {"name": "steps", "first_loss": losses[0], "last_loss": losses[-1], "late": late, "first_steps_s": took}


def random_batch(recipe: RecipeConfig, number: int, device: torch.device) -> Batch:
    """Clips of noise with random tubes, for a recipe that reads latents."""
    generator, model = torch.Generator(device).manual_seed(number), recipe.model
    stage = recipe.stages[stage_at(recipe.stages, number)[0]]
    shape = (stage.batch, stage.frames, model.frame_channels, model.grid_height, model.grid_width)
    order = torch.rand(stage.batch, model.cells, generator=generator, device=device).argsort(dim=1)
    visible = [
        tube_ids(order[:, : each.budget].sort().values, stage.frames // model.tubelet, model.cells)
        for each in recipe.masks.strategies
    ]
    draws = tuple(range(number * stage.batch, (number + 1) * stage.batch))
    return Batch(number, draws, torch.randn(shape, generator=generator, device=device), visible)


def ring(device: torch.device, count: int, clips: int = 256) -> Row:
    """Batches through the ring while the device is busy with earlier ones, bit for bit those of host memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(random_clips(clips), Path(folder))
        store = Store(Path(folder))
        plain = store.loader(count).batches(0, threads=0)
        staged = store.loader(count, Staged, device=device).batches(0, threads=2)
        for wanted, found in zip(plain, staged, strict=True):
            if device.type == "cuda":
                torch.cuda._sleep(20_000_000)  # about 10 ms of the stream that computes
            assert wanted.latents is not None
            assert found.latents is not None
            assert torch.equal(found.latents.cpu(), wanted.latents), f"step {found.step}"
    return {"name": "ring", "batches": count, "clips": BATCH}


def step_of(name: str, stage: int, batch: int, count: int, compiled: bool) -> Row:
    """The trainer's own loop over a store on disk: a step's time, its share of waiting, and MFU."""
    config = one_stage(recipe_by_name(name), count, batch, stage)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = trained(write_project(Path(folder), config), config, 0, cold=False, compiled=compiled)
    speed = speeds(config, config.stages[0], batch / found.step_s, 1, device)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    row = {"name": name, "stage": config.stages[0].name, "clips": batch, "compiled": compiled, "peak_gb": memory}
    return row | {"step_ms": 1e3 * found.step_s, "waiting": found.wait_share, "mfu": speed.get("mfu")}


def encode_rate(device: str, folder: Path | None, side: int, frames: int, at_once: int = 32) -> Row:
    """Frames a second of an autoencoder, by default of the VA-VAE's shape with random weights."""
    with tempfile.TemporaryDirectory() as top:
        model = Autoencoder.load(folder or write_vavae(Path(top, "vavae")), device, frames_at_once=at_once)
    views = np.random.default_rng(0).integers(0, 256, (at_once, side, side, 3), np.uint8)
    model.start([views]).result()
    began = time.perf_counter()
    for _ in range(frames // at_once):
        model.start([views]).result()
    return {"name": "encode", "side": side, "frames_per_s": frames / (time.perf_counter() - began)}


def _with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    frames: int,
) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(inputs[0], inputs[1], inputs[2], frames)
    return out.detach(), *torch.autograd.grad(out, inputs, weights)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Median of five calls."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    tyro.cli(main)
