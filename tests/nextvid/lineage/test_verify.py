"""`nextvid verify` finds damage of every kind of file that the project writes, and no kind of damage is a traceback."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.lineage.verify import damaged_records
from tests.factories import copy_project, flip
from tests.nextvid.conftest import Command
from tests.nextvid.tiny_project import RECIPE, probe

SEED = 23
KINDS = (
    "media/*.parquet", "labels/*.parquet", "clips/*.parquet", "clips/*.json", "latents/*/*.000000.json",
    "duplicates/*/*.parquet", "duplicates/latest.json", "mask_plan/*/plan.json", "mask_plan/*/*.npy",
    "mask_plan/*/checks.json", "trainset/*/trainset.json", "trainset/*/*.npy", "trainset/*/lineage.parquet",
    "pretrain/*/*/config.json", "pretrain/*/*/events.jsonl", "pretrain/*/*/checkpoints/*/*",
    "pretrain/*/*/encoder/*.*", "pretrain/*/*/encoder/autoencoder/*.*", "probes/*/*/*/*/*/score.json",
    "probes/*/*/*/*/*/rows.parquet", "probes/*/*/*/*/*/features.npz",
)  # fmt: skip
SUMMED = (".parquet", ".npy", ".safetensors", ".npz")  # files of which each byte is under a checksum


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def other_type(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def list_of_nothing(path: Path) -> None:
    path.write_text("[]")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


DAMAGE: tuple[Callable[[Path], None], ...] = (cut, zeroed, other_type, list_of_nothing, folder, flipped)


@pytest.fixture(scope="module")
def whole(evaluated: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With a score."""
    project = copy_project(evaluated, tmp_path_factory.mktemp("verified") / "copy")
    probe(project, RECIPE)
    return project


def restored(path: Path, damage: Callable[[Path], object], project: Project) -> list[str]:
    """What is found while a file is damaged."""
    kept = path.read_bytes()
    damage(path)
    try:
        return damaged_records(project.root)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(kept)


def test_a_sound_project_has_no_problems(whole: Project) -> None:
    assert damaged_records(whole.root) == []


def cases(project: Project, kinds: int) -> list[tuple[Path, Callable[[Path], None]]]:
    chosen, found = random.Random(SEED), []
    for pattern in KINDS:
        path = chosen.choice(sorted(Path(project.root.url).glob(pattern)))
        fitting = [one for one in DAMAGE if one is not flipped or path.suffix in SUMMED]
        found += [(path, damage) for damage in chosen.sample(fitting, min(kinds, len(fitting)))]
    return found


def check(project: Project, kinds: int) -> None:
    for path, damage in cases(project, kinds):
        said = restored(path, damage, project)
        assert said, f"{damage.__name__} of {path} is not found"
        named = [str(path), str(path.parent)]
        assert any(place in line for line in said for place in named), (damage.__name__, path, said)
    assert damaged_records(project.root) == []


def test_damage_is_found_and_named(whole: Project) -> None:
    check(whole, kinds=1)


@pytest.mark.faults
def test_every_damage_of_every_kind_is_found_and_named(whole: Project) -> None:
    check(whole, kinds=len(DAMAGE))


def test_a_file_of_another_in_its_place_is_found(whole: Project, nextvid: Command) -> None:
    root = Path(whole.root.url)
    clips, encoder = root / "clips", next(root.glob("pretrain/*/*/encoder"))
    swapped = [
        (clips / "pets.000000.parquet", clips / "stills.000000.parquet"),
        (encoder / "model.safetensors", encoder.with_name("encoder_online") / "model.safetensors"),
        *[tuple(sorted(root.glob("pretrain/*/*/checkpoints/*/model.safetensors"))[:2])],
    ]
    for one, other in swapped:
        found = restored(one, partial(shutil.copy, other), whole)
        assert any(one.name in line for line in found), one
    flip(encoder / "model.safetensors")
    code, said, _ = nextvid("verify", "--corpus", str(whole.path))
    flip(encoder / "model.safetensors")
    assert code == 4
    assert "model.safetensors" in said
    code, said, _ = nextvid("verify", "--corpus", str(whole.path))
    assert (code, said.splitlines()) == (0, ["every committed row, table, record and weight is as it was written"])
