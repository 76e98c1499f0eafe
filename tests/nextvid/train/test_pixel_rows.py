"""Batches of pixels are the drawn rows read by zarr, of the clips of their latents, whatever threads and device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.stages import stage_at
from nextvid.train.distributed import Ranks
from nextvid.train.loader import Batch, Loader, open_loader
from nextvid.train.rows import Pixels, Staged
from nextvid.trainset.mask_plan import make_plan, open_mask_plan
from nextvid.trainset.order import Order
from nextvid.trainset.pixels import TrainsetPixels, freeze_pixels
from nextvid.trainset.trainset import Trainset
from storage.errors import DamagedError
from storage.reader import PixelReader, read_row, row_id
from storage.store import PixelStore
from tests.nextvid.train.corpus import BATCHES, loading, make_project
from tests.nextvid.train.pixel_corpus import ask_for_pixels, write_pixels
from tests.nextvid.train.tiny import ALONE, latents_of, tiny_recipe

CPU = torch.device("cpu")
PIXELS_IN = ("model.encoder.input=pixels",)
PIXELS_OUT = (*PIXELS_IN, "losses.target=pixels", f"model.frame_channels={3 * 8**2}")


def pixel_recipe(overrides: Sequence[str] = PIXELS_IN) -> RecipeConfig:
    return apply_overrides(tiny_recipe(), overrides)


def make_pixel_project(folder: Path) -> Project:
    project = ask_for_pixels(make_project(folder))
    write_pixels(project)
    make_plan(project.root, tiny_recipe())
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_pixel_project(tmp_path_factory.mktemp("pixels"))


def frozen(project: Project, recipe: RecipeConfig) -> TrainsetPixels:
    return freeze_pixels(project, Trainset.open(project.root), recipe)


@contextmanager
def _loader(project: Project, recipe: RecipeConfig, ranks: Ranks | None = None) -> Iterator[Loader]:
    with loading(project, recipe, ranks or ALONE, frozen(project, recipe)) as loader:
        yield loader


def _batches(project: Project, recipe: RecipeConfig, first: int = 0, threads: int = 1) -> list[Batch]:
    with _loader(project, recipe) as loader:
        return list(loader.batches(first, threads))


def pixels_of(batch: Batch) -> torch.Tensor:
    assert batch.pixels is not None
    return batch.pixels


def oracle(project: Project) -> dict[bytes, np.ndarray]:
    """Every stored clip by row id, through zarr."""
    pixels = frozen(project, pixel_recipe())
    store, found = PixelStore(project.root, pixels.spec), {}
    for batch in BATCHES:
        for row in store.commits(batch).filter(pl.col("status") == "ok").iter_rows(named=True):
            found[row["row_id"]] = read_row(store, batch, row["frames"], row["part"], row["slot"])
    return found


def test_pixels_are_the_drawn_rows_read_by_zarr(project: Project) -> None:
    """Both clip lengths, each in its stages; an image in every frame."""
    recipe, trainset, stored = pixel_recipe(), Trainset.open(project.root), oracle(project)
    order, lengths, images = Order(trainset, recipe), set(), 0
    for batch in _batches(project, recipe):
        frames = recipe.stages[stage_at(recipe.stages, batch.step)[0]].frames
        drawn = order.drawn(frames, batch.draws[0], len(batch.draws))
        assert pixels_of(batch).dtype == torch.uint8
        for address, clip in zip(drawn.addresses, pixels_of(batch), strict=True):
            wanted = stored[row_id(address)]
            images += len(wanted) == 1
            assert clip.shape == (frames, 32, 32, 3)
            np.testing.assert_array_equal(clip.numpy(), np.broadcast_to(wanted, clip.shape))
        lengths.add(frames)
    assert lengths == {4, 8}
    assert images > 3


def test_trap_30_an_image_is_one_view_in_every_frame(project: Project) -> None:
    """Of pixels and of latents: an image is repeated behind its crop and flip, never varied by frame."""
    recipe, trainset = pixel_recipe(), Trainset.open(project.root)
    order, seen = Order(trainset, recipe), 0
    for batch in _batches(project, recipe):
        frames = latents_of(batch).shape[1]
        images = order.drawn(frames, batch.draws[0], len(batch.draws)).of_frames(1)
        seen += len(images)
        for clips in (pixels_of(batch)[images], latents_of(batch)[images]):
            assert torch.equal(clips, clips[:, :1].expand_as(clips))
    assert seen > 3


def test_latents_beside_pixels_are_those_of_a_recipe_without(project: Project) -> None:
    """Pixels change neither order nor latents: only what the encoder is given."""
    both, alone = _batches(project, pixel_recipe()), []
    plan = open_mask_plan(project.root, tiny_recipe().masks, (4, 4))
    with open_loader(project.root, Trainset.open(project.root), tiny_recipe(), plan, Ranks(0, 1, CPU)) as loader:
        alone = list(loader.batches(0))
    for with_pixels, without in zip(both, alone, strict=True):
        assert with_pixels.draws == without.draws
        assert without.pixels is None
        assert torch.equal(latents_of(with_pixels), latents_of(without))


def test_what_is_not_read_is_not_in_the_batch(project: Project) -> None:
    """Pixels in and pixels out: no latent is touched."""
    assert all(batch.latents is None for batch in _batches(project, pixel_recipe(PIXELS_OUT)))


@pytest.mark.parametrize("threads", [0, 2, 5])
def test_threads_and_resumption_change_nothing(project: Project, threads: int) -> None:
    recipe = pixel_recipe()
    whole = _batches(project, recipe)
    for first in (0, 5, 11):
        for batch, wanted in zip(_batches(project, recipe, first, threads), whole[first:], strict=True):
            assert batch.draws == wanted.draws
            assert torch.equal(pixels_of(batch), pixels_of(wanted))


def test_a_batch_that_is_kept_is_never_overwritten(project: Project) -> None:
    recipe = pixel_recipe()
    with _loader(project, recipe) as loader:
        kept = [(batch, pixels_of(batch).clone()) for batch in loader.batches(0, 2)]
    assert all(torch.equal(pixels_of(batch), before) for batch, before in kept)


def test_ranks_share_each_batch(project: Project) -> None:
    recipe = pixel_recipe()
    whole, shares = _batches(project, recipe), []
    for rank in range(2):
        with _loader(project, recipe, Ranks(rank, 2, CPU)) as loader:
            shares.append(list(loader.batches(0)))
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(pixels_of(batch), torch.cat([pixels_of(first), pixels_of(second)]))


@pytest.mark.parametrize("frames", [4, 8])
def test_the_way_for_a_device_gives_the_same(project: Project, frames: int) -> None:
    """The ring, its buffers used again and again, against the way for the host."""
    recipe, trainset = pixel_recipe(), Trainset.open(project.root)
    pixels = frozen(project, recipe)
    reader = PixelReader(project.root, pixels.spec, trainset.batches)
    addresses = {length: pixels.rows(length) for length in trainset.lengths}
    staged = Staged(Pixels(reader, pixels.spec, addresses), 4 * 8, 2, CPU)
    order, stored, images = Order(trainset, recipe), oracle(project), 0
    for first in range(0, 40, 4):
        drawn = order.drawn(frames, first, 4)
        staged.will_need(drawn)
        memory = staged.memory(4, frames)
        staged.fill(drawn, memory)
        for address, clip in zip(drawn.addresses, staged.deliver(drawn, memory), strict=True):
            wanted = stored[row_id(address)]
            images += len(wanted) == 1
            np.testing.assert_array_equal(clip.numpy(), np.broadcast_to(wanted, clip.shape))
    assert images > 3


def test_the_fixed_clips_of_the_diagnostics_have_pixels(project: Project) -> None:
    recipe = pixel_recipe()
    with _loader(project, recipe) as loader:
        batch = loader.clips(range(6))
    assert pixels_of(batch).shape == (6, 4, 32, 32, 3)
    assert torch.equal(pixels_of(batch)[:4], pixels_of(_batches(project, recipe)[0]))


def test_damage_is_told_before_a_batch_is_handed_out(tmp_path: Path) -> None:
    """File, row and remedy; whichever thread meets it."""
    project = make_pixel_project(tmp_path)
    recipe = pixel_recipe()
    store = PixelStore(project.root, frozen(project, recipe).spec)
    for batch, frames in (("films.000000", 4), ("films.000000", 8), ("pictures.000000", 1)):
        path = Path(store.part(batch, frames, 0).shard_path(0))
        data = bytearray(path.read_bytes())
        for commit in store.commits(batch, frames)["offset"]:
            data[commit + 200] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"c\.0\.0\.0\.0\.0, row [0-9a-f]{32}: holds other bytes.*Remedy: remove"):
        _batches(project, recipe, threads=2)
