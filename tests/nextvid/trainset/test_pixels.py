"""nextvid/trainset/pixels.py: addresses that follow the trainset's rows one for one, and what refuses to be frozen."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe as recipe_by_name
from nextvid.trainset.files import read_sealed
from nextvid.trainset.pixels import TrainsetPixels, freeze_pixels, frozen_pixels, open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.errors import DamagedError, RefusedError, UpstreamError
from storage.reader import PIXEL_ADDRESS, PixelReader, row_id
from storage.records import publish_record
from storage.root import DataRoot
from storage.store import PixelStore
from tests.factories import flip, unchanged
from tests.nextvid.train.corpus import ROWS, make_project
from tests.nextvid.train.pixel_corpus import ask_for_pixels, spec_of, write_pixels
from tests.nextvid.train.tiny import tiny_recipe
from tests.storage.pixel_stores import clip

LENGTHS = (1, 4, 8)


def pixel_recipe() -> RecipeConfig:
    return apply_overrides(tiny_recipe(), ["model.encoder.input=pixels"])


@pytest.fixture
def plain(tmp_path: Path) -> Project:
    """A trainset whose project asks for no pixels."""
    return make_project(tmp_path)


@pytest.fixture
def project(plain: Project) -> Project:
    found = ask_for_pixels(plain)
    write_pixels(found)
    return found


def frozen(project: Project) -> TrainsetPixels:
    return freeze_pixels(project, Trainset.open(project.root), pixel_recipe())


def test_addresses_follow_the_rows(project: Project) -> None:
    """Every row of every length reads the clip of its own id, though the pixel store has another order."""
    pixels, trainset = frozen(project), Trainset.open(project.root)
    reader = PixelReader(project.root, pixels.spec, trainset.batches)
    for frames in LENGTHS:
        rows, found = trainset.rows(frames), pixels.rows(frames)
        assert len(rows) == len(found) == sum(lengths.get(frames, 0) for lengths in ROWS.values())
        out = np.empty(pixels.spec.row_shape(frames), np.uint8)
        for row, address in zip(rows, found, strict=True):
            reader.read_into(frames, address, out)
            assert np.abs(out.astype(int) - clip(row_id(row), frames)).mean() < 3


def test_frozen_once_and_found_again(project: Project) -> None:
    first = frozen(project)
    with unchanged(first.folder):
        again = frozen(project)
        assert again.digest == first.digest
    trainset = Trainset.open(project.root)
    assert open_pixels(project.root, trainset, first.digest).spec == spec_of(project)
    with pytest.raises(UpstreamError, match="has no pixels 0000"):
        open_pixels(project.root, trainset, "0" * 32)


def test_the_digest_says_what_is_read(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another quality, another trainset: another digest; the same rows stored elsewhere: the same."""
    first = frozen(project)
    better = ask_for_pixels(project, quality=95)
    write_pixels(better)
    other = frozen(better)
    assert other.digest != first.digest
    assert {found.digest for found in frozen_pixels(project.root, Trainset.open(project.root))} == {
        first.digest,
        other.digest,
    }
    folder = tmp_path_factory.mktemp("elsewhere")
    moved = ask_for_pixels(make_project(folder))
    write_pixels(moved, without=_rows_of(moved, 8)[:2])
    again = write_pixels(moved)  # rows that failed before stand in a later part now
    assert again.parts("films.000000", 8) == [0, 1]
    assert frozen(moved).digest == first.digest
    assert frozen(_with_pixels(make_project(tmp_path_factory.mktemp("x"), seed=1))).digest != first.digest


def test_psnr_is_that_of_the_measured_rows(project: Project) -> None:
    pixels = frozen(project)
    measured = [40.0 + n for lengths in ROWS.values() for count in lengths.values() for n in range(0, count, 2)]
    assert pixels.psnr_rows == len(measured)
    assert pixels.psnr_mean_db == pytest.approx(np.mean(measured))


def test_opening_costs_the_same_at_any_size(project: Project) -> None:
    """Rows are memory-mapped: a file of a million addresses is opened in no memory to speak of."""
    pixels = frozen(project)
    said = read_sealed(f"{pixels.folder}/trainset.json", "")
    count = 1_000_000
    said["offsets"]["f4"] = {"films": [0, count]}
    publish_record(f"{pixels.folder}/trainset.json", said)
    trainset = Trainset.open(project.root)
    np.save(f"{pixels.folder}/rows.f4.npy", np.zeros(count, trainset.rows(8).dtype))
    np.save(f"{pixels.folder}/pixels.{pixels.spec.digest()}.f4.npy", np.zeros(count, PIXEL_ADDRESS))
    tracemalloc.start()
    opened = open_pixels(project.root, Trainset.open(project.root), pixels.digest)
    assert len(opened.rows(4)) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_a_root_on_an_object_store_is_no_other_root(project: Project, cache_bytes: int) -> None:
    """The same addresses under the same digest, frozen there and opened there; made again, no old copy is read."""
    here, moved = frozen(project), on_an_object_store(project, cache_bytes)
    there = frozen(moved)
    assert there.digest == here.digest
    assert [one.digest for one in frozen_pixels(moved.root, Trainset.open(moved.root))] == [here.digest]
    opened = open_pixels(moved.root, Trainset.open(moved.root), here.digest)
    for frames in LENGTHS:
        np.testing.assert_array_equal(opened.rows(frames), here.rows(frames))
        assert isinstance(opened.rows(frames), np.memmap) == (cache_bytes > 0)
    write_pixels(moved)  # every row stands in a second part, too
    for frames in LENGTHS:
        for batch in ("films.000000", "pictures.000000"):
            store = PixelStore(moved.root, here.spec)
            if frames in store.frames_of(batch):
                store.part(batch, frames, 0).discard(0)
    atomic.remove_tree(there.path)
    again = frozen(moved)
    assert again.digest == here.digest
    assert [set(again.rows(frames)["part"].tolist()) for frames in LENGTHS] == [{1}] * 3


def on_an_object_store(project: Project, cache_bytes: int) -> Project:
    """A copy of its root in fsspec's memory, with a cache of this size."""
    root = DataRoot.open(f"memory:/{project.path.parent}", project.root.runs_url, f"{project.path}.cache", cache_bytes)
    for path in sorted(Path(project.root.url).rglob("*")):
        if path.is_file() and path.name != "lock" and not path.name.startswith("pixels."):
            atomic.publish_bytes(f"{root.url}/{path.relative_to(project.root.url)}", path.read_bytes())
    return dataclasses.replace(project, root=root)


class TestRefused:
    def test_no_pixels_asked_for(self, plain: Project) -> None:
        """The message says what to do, and which recipe does without."""
        recipe = recipe_by_name("nextvid_l")
        with pytest.raises(
            RefusedError, match=r"put 'pixels: \{quality: 90\}' under 'encoding'.*or train nextvid_l_latent"
        ):
            freeze_pixels(plain, Trainset.open(plain.root), recipe)

    def test_a_missing_row(self, plain: Project) -> None:
        project = ask_for_pixels(plain)
        gone = _rows_of(project, 4)[3]
        write_pixels(project, without=[gone])
        with pytest.raises(
            RefusedError, match=f"1 of the 9 rows with 4 frames .*{gone.hex()} of films.000000.*make 'latents'"
        ):
            frozen(project)
        assert list(frozen_pixels(project.root, Trainset.open(project.root))) == []
        assert not list(Path(project.root.url).rglob("*.partial"))

    def test_no_store_at_all(self, plain: Project) -> None:
        project = ask_for_pixels(plain)
        with pytest.raises(RefusedError, match="7 of the 7 rows with 1 frames"):
            frozen(project)

    def test_a_row_whose_shard_was_swept(self, project: Project) -> None:
        store = write_pixels(project)
        for number in store.parts("films.000000", 8):
            store.part("films.000000", 8, number).discard(0)
        with pytest.raises(RefusedError, match="5 of the 5 rows with 8 frames"):
            frozen(project)

    def test_frames_of_another_size(self, project: Project) -> None:
        recipe = apply_overrides(pixel_recipe(), ["model.patch=16"])
        with pytest.raises(RefusedError, match="reads frames of 64 x 64 pixels, and the trainset's have 32 x 32"):
            freeze_pixels(project, Trainset.open(project.root), recipe)


class TestDamaged:
    def test_a_short_file(self, project: Project) -> None:
        pixels = frozen(project)
        path = Path(pixels.folder, f"pixels.{pixels.spec.digest()}.f4.npy")
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(
            DamagedError, match=r"pixels\.[0-9a-f]{32}\.f4\.npy.*remove .*\.json and ask for the run again"
        ):
            pixels.rows(4)

    @pytest.mark.parametrize("damage", ["flipped", "gone"])
    def test_verify_reads_every_address(self, project: Project, damage: str) -> None:
        pixels = frozen(project)
        pixels.check()
        path = Path(pixels.folder, f"pixels.{pixels.spec.digest()}.f4.npy")
        flip(path, -3)
        if damage == "gone":
            path.unlink()
        with pytest.raises(DamagedError, match=r"\.f4\.npy.*remove .*\.json and ask for the run again"):
            frozen(project).check()

    def test_a_file_of_other_rows(self, project: Project) -> None:
        pixels = frozen(project)
        name = f"pixels.{pixels.spec.digest()}"
        Path(pixels.folder, f"{name}.f4.npy").write_bytes(Path(pixels.folder, f"{name}.f8.npy").read_bytes())
        with pytest.raises(DamagedError, match="9 addresses were frozen"):
            pixels.rows(4)

    @pytest.mark.parametrize("text", ["{}", "[]", '{"spec": {"quality": 90}}', '{"spec": 3}'])
    def test_a_description_that_says_nothing(self, project: Project, text: str) -> None:
        pixels = frozen(project)
        Path(pixels.folder, f"pixels.{pixels.spec.digest()}.json").write_text(text)
        with pytest.raises(
            DamagedError, match=r"(has no seal|is no record).*remove .*\.json and ask for the run again"
        ):
            frozen(project)

    def test_the_remedy_heals(self, project: Project) -> None:
        pixels = frozen(project)
        name = f"pixels.{pixels.spec.digest()}"
        Path(pixels.folder, f"{name}.f4.npy").unlink()
        with pytest.raises(DamagedError):
            pixels.rows(4)
        Path(pixels.folder, f"{name}.json").unlink()
        assert frozen(project).digest == pixels.digest
        assert len(frozen(project).rows(4)) == 9


def _rows_of(project: Project, frames: int) -> list[bytes]:
    return [row_id(row) for row in Trainset.open(project.root).rows(frames)]


def _with_pixels(project: Project) -> Project:
    found = ask_for_pixels(project)
    write_pixels(found)
    return found
