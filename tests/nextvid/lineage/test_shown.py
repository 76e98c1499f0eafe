"""A row, shot or file as a picture: it is of what was read and stored, and the facts are those of the tables."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nextvid.config.project import Project, open_project
from nextvid.corpus.gallery import CAPTION_HEIGHT, GAP, HEADER_HEIGHT, MARK_WIDTH, TILE_HEIGHT
from nextvid.lineage.shown import MASKED, Shown, features_over_frames, show
from nextvid.make import Request, make
from nextvid.train.run import find_run
from nextvid.trainset.order import listed_draws
from storage.errors import ConfigError, UpstreamError
from storage.schemas import Clips, Media, Shots
from storage.tables import read_tables
from tests.factories import save_autoencoder, write_project
from tests.nextvid.corpus.small_media import FPS, scene, write_film

SIDE = 64
RECIPE = "few_masks"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two films and a broken one, encoded for the demo's recipe, with a trainset and a mask plan."""
    folder = tmp_path_factory.mktemp("shown")
    for name in ("dunes", "waves"):
        write_film(folder / "films" / f"{name}.mp4", [scene(name, 3 * FPS)])
    (folder / "films" / "broken.mp4").write_bytes(b"no film" * 99)
    save_autoencoder(folder / "autoencoder", 16)
    policy = {"frames": 8, "fps": 4, "crop": "centre"}
    films = {"uri": str(folder / "films"), "weight": 1.0, "clips": [policy], "quarantine_budget": 0.5}
    filters = {"motion_min": None, "motion_max": None, "blur_min": None}
    made = write_project(
        folder,
        {"films": films},
        encoding={"autoencoder": str(folder / "autoencoder"), "resolution": SIDE},
        curation={"filters": filters},
        execution={"device": "cpu"},
    )
    (folder / "recipes").mkdir()
    (folder / "recipes" / f"{RECIPE}.yaml").write_text("base: demo\noverrides: {masks.entries: 256}\n")
    list(make(made, Request("trainset")))
    list(make(made, Request("mask_plan", recipe=RECIPE)))
    return made


@pytest.fixture(scope="module")
def picture(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, Path]:
    """One of the films, by its path."""
    path = tmp_path_factory.mktemp("picture") / "p.png"
    return show(project, str(of(project, "dunes")["uri"]), str(path), RECIPE), path


def of(project: Project, name: str) -> dict[str, Any]:
    """The one row of a film."""
    clips = read_tables(project.root, "clips", None, Clips).filter(pl.col("uri").str.ends_with(f"{name}.mp4"))
    return clips.row(0, named=True)


@pytest.mark.parametrize("kind", ["row", "shot"])
def test_every_name_of_a_row_leads_to_the_same_row(
    project: Project, picture: tuple[Shown, Path], tmp_path: Path, kind: str
) -> None:
    name = of(project, "dunes")[f"{kind}_id"].hex()
    found = show(project, name, str(tmp_path / "p.png"), RECIPE)
    assert (found.kind, found.what) == (kind, name)
    assert found.facts == picture[0].facts
    assert (tmp_path / "p.png").read_bytes() == picture[1].read_bytes()


def test_the_facts_are_those_of_the_tables_and_of_the_order(project: Project, picture: tuple[Shown, Path]) -> None:
    row, text = of(project, "dunes"), picture[0].text()
    media = read_tables(project.root, "media", None, Media).filter(pl.col("uri") == row["uri"]).row(0, named=True)
    shot = (
        read_tables(project.root, "shots", None, Shots).filter(pl.col("shot_id") == row["shot_id"]).row(0, named=True)
    )
    assert f"{media['size_bytes']:,} bytes, {media['width']} x {media['height']}, {media['container']}" in text
    assert f"motion {shot['motion_mean']:.3g}" in text
    assert f"crop {row['crop_w']} x {row['crop_h']} at {row['crop_x']}, {row['crop_y']}" in text
    hex_id = row["row_id"].hex()
    draws = [drawn["draw"] for drawn in listed_draws(project, RECIPE, range(8000)) if drawn["row"] == hex_id]
    assert f"{len(draws)} of its first 8,000 draws ({draws[0]}, {draws[1]}" in text


def test_the_picture_has_source_reconstruction_and_masks(project: Project, picture: tuple[Shown, Path]) -> None:
    sheet = np.asarray(Image.open(picture[1]))
    lines = 2 + len(project.recipe(RECIPE).masks.strategies)
    step = TILE_HEIGHT + CAPTION_HEIGHT + HEADER_HEIGHT
    assert sheet.shape[0] == GAP + lines * step
    side = TILE_HEIGHT // SIDE * SIDE
    top, left = GAP + HEADER_HEIGHT, GAP + MARK_WIDTH
    source, _, *masked = (sheet[top + n * step :][:side, left : left + side].astype(int) for n in range(lines))
    for tile in masked:
        same = (tile == source).all(axis=-1).mean()
        dark = (abs(tile - source * MASKED) <= 1).all(axis=-1).mean()
        assert 0 < same < 1
        assert same + dark == pytest.approx(1.0, abs=0.01), "a cell is as it was or darkened"


def test_a_file_without_a_row_says_why(project: Project, tmp_path: Path) -> None:
    broken = next(uri for uri in read_tables(project.root, "media", None, Media)["uri"] if "broken" in uri)
    found = show(project, broken, str(tmp_path / "p.png"), RECIPE)
    assert found.picture is None
    assert not (tmp_path / "p.png").exists()
    assert "quarantined" in found.text()


def test_an_unknown_name_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no row, clip, shot or media id and no file"):
        show(open_project(project.path), "nobody", str(tmp_path / "p.png"), RECIPE)


def test_features_of_the_averaged_encoder_lie_beside_those_of_its_start(evaluated: Project) -> None:
    rng, run = np.random.default_rng(0), find_run(evaluated, "demo")
    clips = {
        b"video": rng.integers(0, 256, (8, SIDE, SIDE, 3), np.uint8),
        b"image": np.zeros((1, SIDE, SIDE, 3), np.uint8),
    }
    found = features_over_frames(run, clips)
    assert {row: [frames.shape for _, frames in lines] for row, lines in found.items()} == {
        b"video": [(4, SIDE, SIDE, 3)] * 2,
        b"image": [(1, SIDE, SIDE, 3)] * 2,
    }
    (ema, first), (random, second) = found[b"video"]
    assert ("averaged" in ema, "random" in random) == (True, True)
    assert not np.array_equal(first, second)


def test_features_need_a_run(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=f"recipe {RECIPE} has no complete run without overrides"):
        show(project, of(project, "dunes")["uri"], str(tmp_path / "p.png"), RECIPE, features=True)
