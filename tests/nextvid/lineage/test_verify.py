"""`nextvid verify` finds damage of every kind of file that the project writes, and no kind of damage is a traceback."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nextvid.config.accepted import accept
from nextvid.config.project import Project
from nextvid.encode.latent_stats import make_latent_stats
from nextvid.lineage.verify import damaged_records
from nextvid.making.publishing import publish_notice
from storage.errors import DamagedError
from storage.records import publish_record
from storage.schemas import Pictures, Shots, Sources
from storage.store import LatentStore, every_store
from storage.tables import write_table
from storage.withdrawn import record_withdrawal
from tests.damage import DAMAGE, cut, flipped, kinds, swapped
from tests.factories import copy_project, flip
from tests.nextvid.conftest import Command
from tests.nextvid.tiny_project import RECIPE, probe

SEED = 23
FOUND = [damage for damage in DAMAGE if damage is not swapped]  # another whole file may be sound in its place
KINDS = (
    "media/*.parquet", "labels/*.parquet", "clips/*.parquet", "clips/*.json", "latents/*/*.000000.json",
    "duplicates/*/*.parquet", "duplicates/latest.json", "mask_plan/*/plan.json", "mask_plan/*/*.npy",
    "mask_plan/*/checks.json", "trainset/*/trainset.json", "trainset/*/*.npy", "trainset/*/lineage.parquet",
    "pretrain/*/*/config.json", "pretrain/*/*/events.jsonl", "pretrain/*/*/checkpoints/*/*",
    "pretrain/*/*/encoder/*.*", "pretrain/*/*/encoder/autoencoder/*.*", "probes/*/*/*/*/*/score.json",
    "probes/*/*/*/*/*/rows.parquet", "probes/*/*/*/*/*/features.npz",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(evaluated: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With a score, and every small record that people and makers leave."""
    project = copy_project(evaluated, tmp_path_factory.mktemp("verified") / "copy")
    root = project.root
    probe(project, RECIPE)
    make_latent_stats(project)
    accept(root, project.asked, LatentStore.every(root)[0].digest, {})
    publish_notice(root, "accepted", {"media": 1})
    record_withdrawal(root, "f" * 32, [])
    write_table(root.table("sources", "pets.000000"), Sources.create_empty(), Sources)
    write_table(root.table("shots", "pets.000000"), Shots.create_empty(), Shots)
    write_table(root.pictures("pets.000000"), Pictures.create_empty(), Pictures)
    publish_record(f"{root.folder('sources')}/pending.json", {"waiting": {}})
    publish_record(root.cap("pets"), {"bounds": {}, "known": None})
    publish_record(root.forecast(), {"question": "", "summary": ""})
    publish_record(root.launch(RECIPE, "0" * 8 + "-" * 28), {"run": "", "trainset": ""})
    samples = Path(root.samples(RECIPE, "0" * 12))
    publish_record(f"{samples}/samples.json", {"run": "0" * 12})
    shutil.copy(next(Path(root.url).glob("mask_plan/*/gallery.png")), samples / "masked.png")
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


def everything(project: Project) -> list[str]:
    """What `nextvid verify` prints."""
    try:
        found = [str(problem) for store in every_store(project.root) for problem in store.verify()]
    except DamagedError as error:  # of the spec of a store
        found = [str(error)]
    return [*found, *damaged_records(project.root)]


def test_a_changed_byte_of_every_kind_of_file_is_found_and_named(whole: Project) -> None:
    """All are damaged at once; what is named is restored, since it may hide others, until nothing is left."""
    left = {paths[0]: paths[0].read_bytes() for paths in kinds(Path(whole.root.url)).values()}
    assert len(left) > 50
    for path in left:
        flipped(path)
    while left:
        said = everything(whole)
        named = {path for path in left if any(str(path) in line for line in said)}
        assert named, f"not found: {sorted(map(str, left))}"
        for path in named:
            path.write_bytes(left.pop(path))
    assert everything(whole) == []


def test_quick_finds_what_is_missing_short_or_edited(whole: Project, nextvid: Command) -> None:
    root = Path(whole.root.url)
    (shard,) = root.glob("latents/*/pets.000000/f8/0000/latent/c*")
    weights, config = next(root.glob("pretrain/*/*/encoder/*.safetensors")), next(root.glob("pretrain/*/*/config.json"))
    features = next(root.glob("probes/**/features.npz"))
    for path, damage in ((shard, cut), (weights, cut), (config, flipped), (features, Path.unlink), (shard, flipped)):
        kept = path.read_bytes()
        damage(path)
        code, said, _ = nextvid("verify", "--quick", "--corpus", str(whole.path))
        path.write_bytes(kept)
        unread = (path, damage) == (shard, flipped)
        assert (code, str(path) in said) == ((0, False) if unread else (4, True)), (path, damage)


def cases(project: Project, kinds: int) -> list[tuple[Path, Callable[[Path], None]]]:
    chosen, found = random.Random(SEED), []
    for pattern in KINDS:
        path = chosen.choice(sorted(Path(project.root.url).glob(pattern)))
        found += [(path, damage) for damage in chosen.sample(FOUND, min(kinds, len(FOUND)))]
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
    check(whole, kinds=len(FOUND))


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
