"""One row, shot or file as a picture, and its facts in words: what was read, cut, stored and masked.

The picture has up to ROWS rows, and of each the source frames, the stored pixels, what the autoencoder makes of the
stored latents, and the cells that the first draw of the row leaves visible; where asked for, also what a run's encoder
makes of each place, beside the random one that it started from.

Axes: F frames, T tubelets, R pixels a side, n visible cells.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from einops import rearrange, repeat
from jaxtyping import Int, UInt8

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.stages import draws_before
from nextvid.corpus.gallery import TILE_HEIGHT, SheetRow, Tile, contact_sheet
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.decode_task import Frames
from nextvid.encode.frames import Decoding
from nextvid.encode.plan import encoding_spec, pixel_spec
from nextvid.features.dense import PrincipalColours, over_frames
from nextvid.features.encoder import load_encoder, repeated
from nextvid.lineage.trace import runs_of, trainsets_of
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import existing
from nextvid.plain_text import printable
from nextvid.train.run import Run, find_run
from nextvid.train.step import build_model
from nextvid.trainset.mask_plan import open_mask_plan
from nextvid.trainset.order import Masks, Order, pieces
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import ConfigError, NExTVidError
from storage.reader import PixelReader, addresses, open_reader, pixel_addresses
from storage.schemas import Clips, Media, Shots
from storage.store import LatentStore, PixelStore
from storage.tables import read_table

ROWS = 4  # our choice: rows of a file that are shown
FRAMES = 8  # tiles of a line: frames spread evenly over the clip
DRAWS = 2_000_000  # our choice: of a recipe that are searched for the row, a second's work
MASKED = 0.25  # brightness of masked cells; our choice


@dataclass(frozen=True)
class Shown:
    """Facts of a row, shot or file, a line each, and the path of its picture; None where it has no row."""

    what: str
    kind: str  # row, clip, shot or file
    facts: tuple[str, ...]
    picture: str | None

    def text(self) -> str:
        """The facts and the picture's path, for people."""
        lines = [f"{self.kind} {self.what}", *self.facts, *([f"picture: {self.picture}"] if self.picture else [])]
        return "\n".join(map(printable, lines))


@dataclass(frozen=True)
class _Found:
    """The rows of the tables of one batch that are about what was asked for."""

    kind: str
    media: pl.DataFrame
    shots: pl.DataFrame
    clips: pl.DataFrame


def show(
    project: Project,
    what: str,
    out: str = "shown.png",
    recipe: str | None = None,
    on_progress: OnProgress = silent,
    features: bool = False,
) -> Shown:
    """Facts and picture of a row, clip, shot or media id, or of a file by path or URI; the picture is written to `out`.

    Draws and masks are those of `recipe`, by default of the last run's by recipe and id; `features` adds dense features
    of its newest complete run. Raises ConfigError for an unknown name, UpstreamError where there is no such run.
    """
    found = _find(project, what, on_progress)
    rows = found.clips.filter(pl.col("status") == "ok").head(ROWS)
    names = [facts.recipe for facts in runs_of(project.root)]
    config = project.recipe(recipe or (names[-1] if names else "demo"))
    run = find_run(project, config.name) if features else None
    facts, lines = [*_file_facts(found.media), *_shot_facts(found.shots)], list[SheetRow]()
    refused = found.clips.filter(pl.col("status") != "ok")
    for reason, count in refused.group_by("reason").len().sort("reason").iter_rows():
        facts.append(f"{count} shots give no clip: {reason}")
    if rows.is_empty():
        return Shown(what, found.kind, tuple(facts), None)
    with Decoding(1) as decoding:
        decoded = decoding.start(rows, project.corpus.encoding.resolution).collect()
    spec, ids = encoding_spec(project), rows["row_id"].to_list()
    stores: dict[str, LatentStore | PixelStore] = {"latents": LatentStore(project.root, spec)}
    if pixels := pixel_spec(project, spec):
        stores["pixels"] = PixelStore(project.root, pixels)
    encoding = project.corpus.encoding
    autoencoder = Autoencoder.load(encoding.autoencoder, "cpu", encoding.precision)
    decoder = autoencoder if autoencoder.digest == spec.autoencoder and autoencoder.about.decoder else None
    dense = (
        {}
        if run is None
        else features_over_frames(run, {row: one.frames for row, one in decoded.items() if one.frames is not None})
    )
    held: dict[bytes, list[str]] = {row: [] for row in ids}
    for digest in trainsets_of(project.root):
        lineage = Trainset.open(project.root, digest).lineage()
        for held_row in lineage.filter(pl.col("row_id").is_in(ids))["row_id"].unique():
            held[held_row].append(digest)
    draws, searched = _draws(project, config, ids)
    for row in rows.iter_rows(named=True):
        numbers = draws[row["row_id"]]
        facts += _row_facts(row, stores)
        facts.append(f"  trainsets: {', '.join(held[row['row_id']]) or 'none'}")
        listed = ", ".join(map(str, numbers[:FRAMES])) + (", ..." if len(numbers) > FRAMES else "")
        facts.append(f"  recipe {config.name}: {len(numbers)} {searched}" + (f" ({listed})" if numbers else ""))
        lines += _lines(project, config, row, decoded[row["row_id"]].frames, stores, decoder, numbers[:1])
        lines += [_line(header, frames) for header, frames in dense.get(row["row_id"], ())]
    left = found.clips.filter(pl.col("status") == "ok").height - rows.height
    facts += [f"and {left} rows more"] if left > 0 else []
    path = str(Path(out).absolute())
    atomic.publish_bytes(path, contact_sheet(lines, FRAMES))
    return Shown(what, found.kind, tuple(facts), path)


def _find(project: Project, what: str, on_progress: OnProgress) -> _Found:
    """Search the batches' tables, one after the other, until one knows the name."""
    root = project.root
    named = pl.col("uri").is_in([what, str(Path(what).absolute())])
    batches = root.batches("media")
    for done, batch in enumerate(batches):
        on_progress(Progress("show", done, len(batches)))
        media = read_table(root.table("media", batch), Media)
        clips, shots = existing(root, "clips", batch, Clips), existing(root, "shots", batch, Shots)
        for kind, column in (("row", "row_id"), ("clip", "clip_id"), ("shot", "shot_id")):
            if (own := clips.filter(pl.col(column).bin.encode("hex") == what)).height:
                ids = own["shot_id"].unique().implode()
                of_file = media.filter(pl.col("media_id").is_in(own["media_id"].unique().implode()))
                return _Found(kind, of_file, shots.filter(pl.col("shot_id").is_in(ids)), own)
        if (own := media.filter(named | (pl.col("media_id").bin.encode("hex") == what))).height:
            ids = own["media_id"].drop_nulls().unique().implode()
            same = pl.col("media_id").is_in(ids)
            return _Found("file", own, shots.filter(same), clips.filter(same))
    raise ConfigError(
        f"'{what}' is no row, clip, shot or media id and no file that {project.path} knows; a file is known once "
        "'media' has been made for its batch"
    )


def _file_facts(media: pl.DataFrame) -> Iterator[str]:
    for row in media.iter_rows(named=True):
        verdict = row["status"] if row["reason"] is None else f"{row['status']}, {row['reason']}: {row['error']}"
        yield f"file {row['uri']} (batch {row['batch']}): {verdict}"
        if row["codec"] is None:
            continue
        shape = f"{row['width']} x {row['height']}, {row['container']} {row['codec']} {row['pix_fmt']}"
        if row["kind"] == "video":
            shape += f", {row['duration_us'] / 1e6:.3f} s at {row['fps_hz']:.5g} fps"
        hazards = ", ".join(row["hazards"]) or "none"
        yield f"  {row['size_bytes']:,} bytes, {shape}; hazards {hazards}; read by {row['decoder']}; {row['licence']}"


def _shot_facts(shots: pl.DataFrame) -> Iterator[str]:
    for row in shots.filter(pl.col("shot_id").is_not_null()).head(ROWS).iter_rows(named=True):
        scores = {"motion": "motion_mean", "freeze": "freeze_share", "luma": "luma_mean", "blur": "blur"}
        shown = ", ".join(f"{name} {row[column]:.3g}" for name, column in scores.items() if row[column] is not None)
        span = f"{row['start_us'] / 1e6:.3f} to {row['end_us'] / 1e6:.3f} s"
        yield f"shot {row['shot_id'].hex()}: {span}, {row['cut_in']} to {row['cut_out']}; {shown}"


def _row_facts(row: dict[str, Any], stores: Mapping[str, LatentStore | PixelStore]) -> Iterator[str]:
    times = [time / 1e6 for time in row["times_us"]]
    crop = f"crop {row['crop_w']} x {row['crop_h']} at {row['crop_x']}, {row['crop_y']}"
    yield (
        f"row {row['row_id'].hex()}: {row['frames']} frames, {times[0]:.3f} to {times[-1]:.3f} s, {crop}"
        f"{', mirrored' if row['flip'] else ''}; split {row['split']}, for {', '.join(row['uses']) or 'nothing'}"
    )
    for noun, store in stores.items():
        commits = store.commits(row["batch"], row["frames"]).filter(pl.col("row_id") == row["row_id"])
        for commit in commits.iter_rows(named=True):
            where = f"part {commit['part']}, shard {commit['shard']}, slot {commit['slot']}"
            yield f"  {noun} {store.digest}: {where}, {commit['status']}" + (
                f" ({commit['reason']})" if commit["reason"] else ""
            )
        if commits.is_empty():
            yield f"  {noun} {store.digest}: not stored"


def _draws(project: Project, recipe: RecipeConfig, ids: Sequence[bytes]) -> tuple[dict[bytes, list[int]], str]:
    """Numbers of the draws of a recipe on the newest trainset that see each row, and how many draws were searched."""
    numbers: dict[bytes, list[int]] = {row: [] for row in ids}
    total = min(draws_before(recipe.stages, recipe.steps), DRAWS)
    try:
        order = Order(Trainset.open(project.root), recipe)
    except NExTVidError as error:  # no trainset yet, or one that this recipe cannot read
        return numbers, f"draws: {error}"
    for frames, piece in pieces(recipe, range(total)):
        drawn = order.drawn(frames, piece.start, len(piece)).addresses["row_id"]
        for row, found in numbers.items():
            found += (piece.start + np.flatnonzero((drawn == np.frombuffer(row, ">u8")).all(axis=1))).tolist()
    return numbers, f"of its first {total:,} draws"


def _lines(
    project: Project,
    recipe: RecipeConfig,
    row: dict[str, Any],
    source: Frames | None,
    stores: Mapping[str, LatentStore | PixelStore],
    autoencoder: Autoencoder | None,
    draws: Sequence[int],
) -> Iterator[SheetRow]:
    """The lines of the picture about one row; its masks are those of `draws`."""
    name = f"row {row['row_id'].hex()}"
    if source is None:
        yield SheetRow(f"{name}: its file cannot be decoded now", [])
    else:
        header = f"{name}: source frames, cropped to {project.corpus.encoding.resolution} pixels"
        yield _line(header, source, [f"{time / 1e6:.3f} s" for time in row["times_us"]])
    for noun, store in stores.items():
        if (stored := _stored(project, store, row, autoencoder)) is not None:
            yield _line("stored pixels" if noun == "pixels" else "what the stored latents decode to", stored)
    for draw in draws:
        if source is None:
            break
        for strategy, visible in _visible(project, recipe, draw).items():
            grid = (recipe.model.grid_height, recipe.model.grid_width)
            yield _line(f"visible to draw {draw}, strategy {strategy}", _masked(source, visible, grid))


def _line(header: str, frames: UInt8[np.ndarray, "F R R 3"], captions: Sequence[str] = ()) -> SheetRow:
    """At most FRAMES of some frames, evenly spread, with their captions."""
    larger = max(1, TILE_HEIGHT // frames.shape[1])
    large = repeat(frames, "f h w c -> f (h y) (w x) c", y=larger, x=larger)
    shown = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    return SheetRow(header, [Tile(large[n], captions[n] if captions else "") for n in shown])


def features_over_frames(
    run: Run, clips: Mapping[bytes, Frames]
) -> dict[bytes, list[tuple[str, UInt8[np.ndarray, "T R R 3"]]]]:
    """Colours of each clip's dense features over its frames: of a run's averaged encoder, and of the one at its start.

    The directions of an encoder's colours are those of all these clips together (nextvid/features/dense.py).
    """
    ema, random = (load_encoder(run.folder / "encoder") for _ in range(2))
    random.encoder.load_state_dict(build_model(run.recipe).encoder.state_dict())
    found: dict[bytes, list[tuple[str, UInt8[np.ndarray, "T R R 3"]]]] = {row: [] for row in clips}
    for name, encoder in (("averaged (EMA)", ema), ("randomly initialised", random)):
        tokens = {
            row: encoder(torch.from_numpy(repeated(frames, run.recipe.clip_lengths[0]))[None])[0].numpy()
            for row, frames in clips.items()
        }
        if tokens:
            colours = PrincipalColours(np.concatenate(list(tokens.values())))
        for row, frames in clips.items():
            h, w = encoder.grid
            over = over_frames(frames, rearrange(colours.of(tokens[row]), "(t h w) c -> t h w c", h=h, w=w))
            found[row].append((f"features of run {run.id}'s {name} encoder: principal components as colours", over))
    return found


def _stored(
    project: Project, store: LatentStore | PixelStore, row: dict[str, Any], autoencoder: Autoencoder | None
) -> UInt8[np.ndarray, "F R R 3"] | None:
    """A row as the store has it, as frames; None where it is not stored, or its latents cannot be decoded."""
    commits = store.commits(row["batch"], row["frames"])
    own = commits.filter((pl.col("row_id") == row["row_id"]) & (pl.col("status") == "ok"))
    if own.is_empty():
        return None
    if isinstance(store, PixelStore):
        pixels, places = PixelReader(project.root, store.spec, [row["batch"]]), pixel_addresses(own, [row["batch"]])
        out = np.empty(store.spec.row_shape(row["frames"]), np.uint8)
        pixels.read_into(row["frames"], places[0], out)
        pixels.close()
        return out
    if autoencoder is None:
        return None
    reader = open_reader(project.root, store.spec, [row["batch"]])
    [latents] = reader.rows(row["frames"], addresses(own, [row["batch"]]))
    frames = autoencoder.decode(latents.astype(np.float32), row["frames"])
    reader.close()
    return frames


def _visible(project: Project, recipe: RecipeConfig, draw: int) -> dict[str, Int[np.ndarray, " n"]]:
    """Cells of the first tubelet that a draw leaves visible, by strategy; only where no step decides them."""
    if recipe.masks.keep != "fixed":
        return {}
    grid = (recipe.model.grid_height, recipe.model.grid_width)
    try:
        masks = Masks(recipe, open_mask_plan(project.root, recipe.masks, grid))
    except NExTVidError:  # the recipe has no mask plan yet
        return {}
    visible = masks.visible(0, range(draw, draw + 1))
    names = [strategy.name for strategy in recipe.masks.strategies]
    return {name: ids[0][ids[0] < grid[0] * grid[1]] for name, ids in zip(names, visible, strict=True)}


def _masked(
    source: UInt8[np.ndarray, "F R R 3"], visible: Int[np.ndarray, " n"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "F R R 3"]:
    """Source frames with masked cells darkened."""
    cells = np.full(grid[0] * grid[1], MASKED, np.float32)
    cells[visible] = 1.0
    side = source.shape[1]
    rows, columns = (np.minimum(np.arange(side) * size // side, size - 1) for size in grid)
    light = cells.reshape(grid)[rows[:, None], columns[None, :]]
    return (source * repeat(light, "h w -> 1 h w 1")).astype(np.uint8)
