"""The asset `samples`: generated next frames of a run as pictures, with their PSNR beside that of copying.

Written are masked.png, autoregressive.png and, last, samples.json; where that exists, nothing is generated again.

Axes: B clips, F frames, R pixels a side, S cells, n visible cells.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nextvid.config.project import Project
from nextvid.encode.frames import Decoding
from nextvid.evaluate.features import load_networks
from nextvid.evaluate.generate import generate_masked, generate_onward, random_tube, reading_back
from nextvid.evaluate.scene import Generated, Scene, compared, open_scene
from nextvid.machine import leased_devices
from nextvid.making.outcome import Number, Outcome
from nextvid.making.progress import OnProgress, Progress, noting, silent
from nextvid.model.flow import ODE_STEPS
from nextvid.model.nextvid import NExTVid
from nextvid.pictures import SHEET_BACKGROUND, SHEET_INK, sheet_png
from nextvid.train.run import Run, find_run
from nextvid.trainset.mask_plan import grid_of, open_mask_plan
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.digest import digest, digest_bytes
from storage.errors import RefusedError
from storage.records import publish_record, read_record
from storage.schemas import Clips

SHOWN = 3  # clips in a picture
FADE = 4  # the given tubelet is drawn with a quarter of its contrast
SEED = 0  # of the noise that generation starts from
QUARTER = 0.25  # of the cells, at random: nearer to training than all of them (docs/method.md 11)
MASK_ENTRY = 0  # whose visible cells are shown: the plan's first
SIDE = 84  # pixels of a tile: 8 of them and the labels fit 860, the width of the report's column
LABELS = 116  # pixels of the column of labels
GAP = 2
CLIP_GAP = 18
FONT_SIZE = 11
MOST_FRAMES = 8
HIDDEN = (28, 30, 36)  # cells that are not visible

Frames = UInt8[np.ndarray, "F R R 3"]


@dataclass(frozen=True)
class Strip:
    """One row of frames with its label; where `frames` is None the row is empty and the label says why."""

    label: str
    frames: Frames | None


def make_samples(project: Project, recipe: str, run: str | None = None, on_progress: OnProgress = silent) -> Outcome:
    """Generate next frames of test clips (of any, where none is encoded), unless samples.json exists.

    A recipe that trains no decoder has no samples. The data version is of samples.json, which names its run.
    Raises UpstreamError where no clip is encoded, RefusedError for another autoencoder.
    """
    started = time.perf_counter()
    found = find_run(project, recipe, run)
    if found.recipe.losses.flow <= 0:
        why: dict[str, Number] = {"none because": "the recipe trains no decoder (flow weight 0)"}
        return Outcome("samples", recipe, False, 0, 0, 0.0, digest=digest({"run": found.id}), run=found.id, numbers=why)
    folder = project.root.samples(recipe, found.id)
    made = not atomic.exists(f"{folder}/samples.json")
    if made:
        name = f"samples {recipe}"
        with leased_devices(1, project.corpus.execution.device, name, noting(on_progress, name)) as (device,):
            _make(project, found, folder, device, lambda done, total: on_progress(Progress(name, done, total)))
    record = read_record(f"{folder}/samples.json", f"remove the folder {folder} and make 'samples' again")
    numbers = {
        f"{kind}_{name}_psnr_db": v["psnr_db"]
        for kind in ("masked", "autoregressive")
        for name, v in record[kind].items()
    }
    pictures = {name: f"{folder}/{name}.png" for name in ("masked", "autoregressive")}
    return Outcome(
        asset="samples",
        partition=recipe,
        made=made,
        rows=len(record["clips"]),
        size_bytes=sum(len(atomic.read_bytes(path)) for path in pictures.values()),
        seconds=time.perf_counter() - started,
        digest=digest_bytes(atomic.read_bytes(f"{folder}/samples.json")),
        run=found.id,
        numbers=numbers,
        pictures=pictures,
    )


def _make(project: Project, run: Run, folder: str, device: str, tell: Callable[[int, int], None]) -> None:
    trainset = Trainset.open(project.root, run.trainset)
    scene = open_scene(project, run, trainset, device)
    model = load_networks(run, device).model
    visible = _visible(project, run)
    clips, count = len(scene.truth), scene.recipe.model.cells
    # cells that the encoder sees of every tubelet in autoregressive generation, [B, n] each (docs/method.md 11)
    seen_cells = {"all_cells": _cells(np.ones(count, bool), clips, device)}
    seen_cells["quarter_of_cells"] = random_tube(count, QUARTER, clips, _noise(device))
    if scene.recipe.masks.keep != "all":
        seen_cells["training_cells"] = _cells(next(iter(visible.values())), clips, device)
    tubelet = scene.recipe.model.tubelet
    before = (np.arange(scene.truth.shape[1]) // tubelet * tubelet - 1).clip(0)  # copying repeats the last true frame
    masked, onward = dict[str, Generated](), dict[str, Generated]()
    for name, bits in visible.items():
        cells = _cells(bits, clips, device)
        generated, mean = (
            generate_masked(model, scene.tokens(), cells, _noise(device), steps) for steps in (ODE_STEPS, 1)
        )
        masked[name] = compared(scene, generated, mean, before)
        tell(len(masked), len(visible) + len(seen_cells))
    for name, cells in seen_cells.items():
        onward[name] = _onward(model, scene, cells, device)
        tell(len(masked) + len(onward), len(visible) + len(seen_cells))
    rows = scene.rows.head(SHOWN)
    with Decoding(1) as decoding:
        decoded = decoding.start(rows.select(Clips.column_names()), trainset.spec.resolution).collect()
    sources = []
    for row in rows["row_id"]:  # an empty strip with the reason where a file cannot be read
        seen = decoded[row]
        sources.append(Strip("source" if seen.frames is not None else f"source:\n{seen.reason}", seen.frames))
    atomic.publish_bytes(f"{folder}/masked.png", _picture(scene, sources, masked, visible, run))
    atomic.publish_bytes(f"{folder}/autoregressive.png", _picture(scene, sources, onward, {}, run))
    publish_record(
        f"{folder}/samples.json",
        {
            "recipe": run.recipe.name,
            "run": run.id,
            "trainset": run.trainset,
            "mask_plan": run.mask_plan,
            "autoencoder": trainset.spec.autoencoder,
            "ode_steps": ODE_STEPS,
            "seed": SEED,
            "clips": [
                {"row": row["row_id"].hex(), "media": row["media_id"].hex(), "uri": row["uri"], "split": row["split"]}
                for row in scene.rows.iter_rows(named=True)
            ],
            "masked": {name: found.numbers for name, found in masked.items()},
            "autoregressive": {name: found.numbers for name, found in onward.items()},
        },
    )
    scene.source.close()


def _visible(project: Project, run: Run) -> dict[str, np.ndarray]:
    """Visible cells of one entry of each strategy, [S] bool; all cells for a recipe without masks."""
    masks, grid = run.recipe.masks, grid_of(run.recipe.model)
    if masks.keep == "all":
        return {"all": np.ones(run.recipe.model.cells, bool)}
    plan = open_mask_plan(project.root, masks, grid)
    bits = plan.kept or plan.raw
    if not bits:
        raise RefusedError(f"masks of kind '{masks.keep}' have no drawn entries to show")
    return {name: found[MASK_ENTRY] for name, found in bits.items()}


def _onward(model: NExTVid, scene: Scene, cells: Tensor, device: str) -> Generated:
    """From the first tubelet on; copying repeats the seed's last frame to the end."""
    config, frames = model.recipe.model, scene.truth.shape[1]
    seed, count = scene.tokens()[:, : config.cells], frames // config.tubelet
    read_back = reading_back(config, scene.decode)
    generated, mean = (
        generate_onward(model, seed, count, cells, _noise(device), read_back, steps) for steps in (ODE_STEPS, 1)
    )
    return compared(scene, generated, mean, np.full(frames, config.tubelet - 1))


def _picture(
    scene: Scene,
    sources: list[Strip],
    generated: Mapping[str, Generated],
    visible: Mapping[str, np.ndarray],
    run: Run,
) -> bytes:
    """Source, reconstruction, and for each way to generate its input (where cells are hidden) and its frames.

    The first tubelet is given, not generated: it is faded.
    """
    given = run.recipe.model.tubelet
    clips = []
    for index, source in enumerate(sources):
        strips = [source, Strip("reconstruction", scene.truth[index])]
        for name, found in generated.items():
            if name in visible:
                hidden = hide(scene.truth[index], visible[name], grid_of(run.recipe.model))
                strips.append(Strip(f"input,\n{name} mask", hidden))
            label = "generated" if name in visible else f"from tubelet 0,\n{name.replace('_', ' ')}"
            faded = found.frames[index].copy()
            faded[:given] = 255 - (255 - faded[:given]) // FADE
            strips.append(Strip(label, faded))
        clips.append(strips)
    return filmstrips(clips)


def filmstrips(clips: Sequence[Sequence[Strip]]) -> bytes:
    """PNG of clips under each other, each as labelled rows of at most 8 frames, spread evenly."""
    assert clips, "nothing to show"
    longest = max((len(s.frames) for strips in clips for s in strips if s.frames is not None), default=1)
    shown = np.unique(np.linspace(0, longest - 1, min(MOST_FRAMES, longest)).round().astype(int))
    width = LABELS + len(shown) * (SIDE + GAP)
    heights = [len(strips) * (SIDE + GAP) + CLIP_GAP for strips in clips]
    sheet = Image.new("RGB", (width, sum(heights) - CLIP_GAP), SHEET_BACKGROUND)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    top = 0
    for strips, height in zip(clips, heights, strict=True):
        for row, strip in enumerate(strips):
            y = top + row * (SIDE + GAP)
            ink.multiline_text((4, y + SIDE // 2 - 8), strip.label, SHEET_INK, font)
            if strip.frames is not None:
                for column, frame in enumerate(strip.frames[shown[shown < len(strip.frames)]]):
                    tile = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    sheet.paste(tile, (LABELS + column * (SIDE + GAP), y))
        top += height
    return sheet_png(sheet)


def hide(frames: Frames, visible: Bool[np.ndarray, " S"], grid: tuple[int, int]) -> Frames:
    """Frames with the cells that are not visible painted dark."""
    rows, columns = (np.arange(frames.shape[axis]) * grid[axis - 1] // frames.shape[axis] for axis in (1, 2))
    shown = visible.reshape(grid)[np.ix_(rows, columns)]
    masked: np.ndarray = np.where(shown[None, :, :, None], frames, np.array(HIDDEN, np.uint8))
    return masked


def _cells(visible: np.ndarray, clips: int, device: str) -> Tensor:
    return torch.from_numpy(np.flatnonzero(visible)).to(device).expand(clips, -1)


def _noise(device: str) -> torch.Generator:
    """A generator whose noise is the same for all that is compared."""
    return torch.Generator(device).manual_seed(SEED)
