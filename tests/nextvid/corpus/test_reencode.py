"""What a changed setting encodes again: every field of the encoding, the clip policies and the curation, one at a time.

A field that no case changes is named by the first test; the first word of a case is the field that it changes.

The corpus is real and small (conftest.py); its rows stand in the store as random numbers, since nothing here decodes.
Each case names the rows of the new clips table that are to be encoded, by an expression; all others must be kept.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextvid.config.corpus import EncodingConfig, MachineConfig
from nextvid.config.datasets import ClipPolicy, CurationConfig, DuplicateConfig, FilterConfig, ShotConfig
from nextvid.config.project import Project, open_project
from nextvid.corpus.assignment import latest
from nextvid.corpus.clips import make_clips
from nextvid.corpus.media import make_media
from nextvid.corpus.shots import make_shots
from nextvid.corpus.sources import update_sources
from nextvid.encode.plan import BatchPlan, encoding_spec, plan_encode, wanted_clips
from nextvid.graph import GRAPH, Asset
from nextvid.making.batches import VERSIONED, batch_state
from storage.schemas import Media, Shots, Sources
from storage.spec import EncodingSpec
from storage.store import LatentStore
from storage.tables import read_table, write_table
from tests.factories import edit_project, make_corpus, put_latents, write_autoencoder
from tests.nextvid.corpus.conftest import Made

FILMS, STILLS = "films.000000", "stills.000000"
AUTOENCODER = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "latent_channels": 4}

NONE, ALL = pl.lit(False), pl.lit(True)
PRETRAIN = pl.col("uses").list.contains("pretrain")
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def encoded(small_corpus: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus.yaml over the small corpus with an autoencoder, all of whose rows are committed."""
    folder = tmp_path_factory.mktemp("encoded")
    shutil.copytree(small_corpus.project.root.url, folder / "root")
    write_autoencoder(folder / "autoencoder", channels=4)
    shutil.copy(small_corpus.project.path, folder)
    settings = {"autoencoder": "autoencoder", "resolution": 64}
    project = edit_project(folder / "corpus.yaml", lambda said: said.update(encoding=settings))
    for batch in (FILMS, STILLS):
        commit(project, batch)
        assert plan_encode(project, batch).rows.is_empty()
    return folder


def commit(project: Project, batch: str) -> None:
    """Put random latents of every wanted row into the store."""
    plan = plan_encode(project, batch)
    store, rng = LatentStore(project.root, plan.spec), np.random.default_rng(0)
    for frames, rows in plan.by_frames.items():
        latents = {row: rng.standard_normal(plan.spec.row_shape(frames)).astype(np.float32) for row in rows["row_id"]}
        put_latents(store, batch, frames, latents, decode_s=0.25, encode_s=0.5)


@pytest.fixture
def changed(encoded: Path, tmp_path: Path) -> Callable[..., Project]:
    """A function that copies the encoded corpus and changes its settings, then makes clips anew, and shots of films."""

    def change(how: Change, shots: bool = False) -> Project:
        shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
        project = edit_project(tmp_path / "corpus.yaml", how)
        if shots:
            make_shots(project, FILMS)
        for batch in (FILMS, STILLS):
            make_clips(project, batch)
        return project

    return change


def policy(**fields: Any) -> Change:
    """Change the films' only clip policy; None removes a field."""

    def change(said: dict[str, Any]) -> None:
        (known,) = said["datasets"]["films"]["clips"]
        known |= fields
        for name in [name for name, value in known.items() if value is None]:
            del known[name]

    return change


def put(path: str, value: Any) -> Change:
    """Set one key of corpus.yaml, made where it is missing."""

    def change(said: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            said = said.setdefault(name, {})
        said[last] = value

    return change


def whole_files(said: dict[str, Any]) -> None:
    """Cut the benchmark's segments from whole files."""
    said["benchmarks"]["actions"] |= {"judged": "file"}
    said["benchmarks"]["actions"]["policy"] |= {"cut_from": "file"}


def refuse_others(project: Project, batch: str, wanted: pl.Expr) -> BatchPlan[EncodingSpec]:
    """The plan encodes exactly the wanted rows of the new clips table and keeps every other one."""
    plan, clips = plan_encode(project, batch, encoding_spec(project)), wanted_clips(project, batch)
    expected = clips.filter(wanted)
    assert set(plan.rows["row_id"]) == set(expected["row_id"])
    assert plan.kept == clips.height - expected.height
    return plan


def test_no_field_is_without_a_case() -> None:
    """Whoever adds a field says here what it encodes again."""

    def changed_by(cases: Iterable[str]) -> set[str]:
        return {re.split(r"[ ,]", name)[0] for name in cases}

    assert changed_by(ENCODING) | {"autoencoder"} == set(EncodingConfig.model_fields)
    assert set(EXECUTION) == set(MachineConfig.model_fields)
    assert changed_by(CLIPS) | {"flip"} >= set(ClipPolicy.model_fields)
    assert set(CurationConfig.model_fields) == {"shots", "filters", "duplicates"}
    assert set(SHOTS) == set(ShotConfig.model_fields)
    assert set(FILTERS) == set(FilterConfig.model_fields)
    assert set(DUPLICATES) == set(DuplicateConfig.model_fields)


ENCODING: dict[str, tuple[Change, pl.Expr]] = {
    "resolution": (put("encoding.resolution", 32), ALL),
    "precision": (put("encoding.precision", "bf16"), ALL),
    "posterior": (put("encoding.posterior", "sample"), ALL),
    "storage int8": (put("encoding.storage", "int8"), ALL),
    "pixels": (put("encoding.pixels", {"quality": 80}), NONE),  # a store of their own
}


EXECUTION = {"batch_frames": 1, "cores": 1, "device": "cpu", "devices": 2}


@pytest.mark.parametrize("name", EXECUTION)
def test_execution(changed: Callable[..., Project], name: str) -> None:
    project = changed(put(f"execution.{name}", EXECUTION[name]))
    for batch in (FILMS, STILLS):
        refuse_others(project, batch, NONE)


@pytest.mark.parametrize("name", ENCODING)
def test_encoding(changed: Callable[..., Project], name: str) -> None:
    how, wanted = ENCODING[name]
    project = changed(how)
    for batch in (FILMS, STILLS):
        plan = refuse_others(project, batch, wanted)
        assert plan.reasons == ({"new encoding": plan.rows.height} if wanted is ALL else {})
        assert plan.orphaned == ()


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("diffusion_pytorch_model.safetensors", b"weights, never loaded herE", ALL),
        ("config.json", json.dumps(AUTOENCODER | {"layers_per_block": 3}).encode(), ALL),
        ("nextvid.json", b'{"patch": 2}', ALL),
        ("config.json", json.dumps(AUTOENCODER | {"_diffusers_version": "99"}, indent=7).encode(), NONE),
        ("nextvid.json", b'{"kind": "autoencoder_kl", "patch": 1}', NONE),
        ("README.md", b"a comment", NONE),
    ],
)
def test_autoencoder(
    changed: Callable[..., Project], tmp_path: Path, file: str, content: bytes, wanted: pl.Expr
) -> None:
    project = changed(lambda said: None)
    (tmp_path / "autoencoder" / file).write_bytes(content)
    for batch in (FILMS, STILLS):
        refuse_others(project, batch, wanted)


# The films' policy is 4 frames at 4 Hz, one clip a shot, two random crops, the second one flipped; the benchmark's
# clips have the same times, whole. So the first view and the whole one are never flipped, and both share their clip.
CLIPS: dict[str, tuple[Change, pl.Expr]] = {
    "frames": (policy(frames=2), pl.col("frames") == 2),
    "fps": (policy(fps=2), PRETRAIN),
    "stride that gives the same times": (policy(fps=None, stride=2), NONE),
    "stride that gives others": (policy(fps=None, stride=1), PRETRAIN),
    "clips_per_shot": (policy(clips_per_shot=2), PRETRAIN),  # neither lies in the middle
    "starts": (policy(starts="random"), PRETRAIN),
    "views, more": (policy(views=3), PRETRAIN & (pl.col("view_index") == 2)),
    "views, fewer": (policy(views=1), NONE),
    "crop, whole": (policy(crop="whole", views=1), NONE),
    "crop, one in the centre": (policy(crop="centre", views=1), NONE),
    "crop, three in the centre": (policy(crop="centre", views=3), PRETRAIN & (pl.col("view_index") > 0)),
    "pad that leaves out": (policy(pad="skip"), NONE),
    "pad that repeats": (policy(pad="repeat_last"), NONE),
    "clips_per_media": (put("datasets.films.clips_per_media", 1), NONE),
    "another policy beside it": (
        lambda said: said["datasets"]["films"]["clips"].append({"frames": 8, "fps": 8, "crop": "whole"}),
        pl.col("frames") == 8,
    ),
    "split": (put("datasets.films.split", {"test": 0.5}), NONE),
    "weight": (put("datasets.films.weight", 7.0), NONE),
    "licence": (put("datasets.films.licence", "CC0"), NONE),
    "quarantine_budget": (put("datasets.films.quarantine_budget", 0.9), NONE),
    "benchmark's frames": (put("benchmarks.actions.policy.frames", 2), pl.col("uses").list.contains("actions")),
    "cut_from": (whole_files, NONE),  # files of one shot have the same clips; labels of the other end at its cut
    "benchmark's epochs": (put("benchmarks.actions.epochs", 3), NONE),
    "no benchmark": (put("benchmarks", {}), NONE),
    "reencode": (put("reencode", "auto"), NONE),
    "min_complete": (put("min_complete", 0.5), NONE),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips(changed: Callable[..., Project], name: str) -> None:
    how, wanted = CLIPS[name]
    project = changed(how)
    plan = refuse_others(project, FILMS, wanted)
    assert set(plan.reasons) <= {"new view", "new file"}  # a film of the test split has the benchmark's clips alone
    refuse_others(project, STILLS, NONE)


def test_flip(changed: Callable[..., Project], encoded: Path) -> None:
    """Half of the views were flipped, by their ids; those alone are new."""
    flipped = wanted_clips(open_project(encoded / "corpus.yaml"), FILMS).filter("flip")
    were = pl.struct("clip_id", "view_index").is_in(
        flipped.select(pl.struct("clip_id", "view_index")).to_series().implode()
    )
    assert flipped.height
    refuse_others(changed(policy(flip=False)), FILMS, PRETRAIN & were)


FILTERS = {
    "trim_s": (0.5, None),
    "motion_min": (50.0, "all go"),
    "motion_max": (0.0, "all go"),
    "freeze_max": (0.4, None),
    "luma_min": (250.0, "all go"),
    "luma_max": (1.0, "all go"),
    "blur_min": (1e9, "all go"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(changed: Callable[..., Project], name: str) -> None:
    """A stricter filter encodes nothing: rows that it rejects are orphaned. trim_s moves the times at cuts only."""
    value, effect = FILTERS[name]
    project = changed(put(f"curation.filters.{name}", value))
    plan = plan_encode(project, FILMS)
    if effect == "all go":
        assert plan.rows.is_empty()
        assert plan.orphaned
    elif name == "trim_s":
        moved = set(plan.rows["uri"].str.split("/").list.last())
        assert moved == {"one.mp4"}  # the only film with a cut
    else:
        assert plan.rows.is_empty()


DUPLICATES = {"distance": 5, "quality_min": 90}


@pytest.mark.parametrize("name", DUPLICATES)
def test_duplicates(changed: Callable[..., Project], name: str) -> None:
    project = changed(put(f"curation.duplicates.{name}", DUPLICATES[name]))
    refuse_others(project, FILMS, NONE)


# Ids derive from times, not from the detector: what finds the same shots decodes again and encodes nothing again. Two
# values let the only cut go by; the film with the cut is then one shot, with its clip elsewhere.
WITH_A_CUT = pl.col("uri").str.ends_with("/one.mp4")
SHOTS: dict[str, tuple[float, pl.Expr]] = {
    "thumb_width": (96, NONE),
    "thumb_height": (54, NONE),
    "cut_change": (1000.0, WITH_A_CUT),
    "cut_ratio": (1000.0, WITH_A_CUT),
    "min_shot_s": (0.5, NONE),
    "dissolve_lag_s": (0.5, NONE),
    "dissolve_change": (40.0, NONE),
    "dissolve_residual": (0.4, NONE),
    "dissolve_dip": (0.5, NONE),
    "fade_luma": (20.0, NONE),
    "sample_hz": (8.0, NONE),
    "hash_hz": (2.0, NONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOTS)
def test_first_pass(changed: Callable[..., Project], name: str) -> None:
    value, wanted = SHOTS[name]
    project = changed(put(f"curation.shots.{name}", value), shots=True)
    refuse_others(project, FILMS, wanted)
    refuse_others(project, STILLS, NONE)


def test_moved_folders_and_comments(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / "corpus.yaml"
    shutil.move(tmp_path / "elsewhere" / "autoencoder", tmp_path / "weights")
    text = file.read_text().replace("autoencoder: autoencoder", "autoencoder: ../weights  # moved")
    file.write_text("# a comment\n" + text)
    project = open_project(file)
    for batch in (FILMS, STILLS):
        make_clips(project, batch)
        refuse_others(project, batch, NONE)


@pytest.mark.parametrize("with_times", [True, False], ids=["cp -a", "cp -r"])
def test_a_project_that_is_copied_with_its_files(
    encoded: Path, small_corpus: Made, tmp_path: Path, with_times: bool
) -> None:
    """Its files are known by their paths below the dataset: same batches, same rows, nothing is encoded again."""
    base, copy = str(small_corpus.folder), tmp_path / "copy"
    shutil.copytree(encoded, copy)
    shutil.copytree(
        base,
        copy,
        copy_function=shutil.copy2 if with_times else shutil.copyfile,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("root", "corpus.yaml"),
    )
    file = copy / "corpus.yaml"
    file.write_text(file.read_text().replace(base, str(copy)))
    project, old = open_project(file), open_project(encoded / "corpus.yaml")
    outcomes = make_corpus(project)
    assert project.root.batches() == old.root.batches() == [FILMS, STILLS]
    assert update_sources(project) == []
    for batch in (FILMS, STILLS):
        assert outcomes[f"media {batch}"].passed
        listed = latest(read_table(project.root.table("sources", batch), Sources))
        before = latest(read_table(old.root.table("sources", batch), Sources))
        assert listed["uri"].to_list() == [uri.replace(base, str(copy)) for uri in before["uri"]]
        assert listed["gone_at"].null_count() == listed.height
        made = outcomes[f"media {batch}"]
        assert made.rows_made == (made.quarantined if with_times else listed.height)  # what failed is tried again
        assert outcomes[f"shots {batch}"].rows_made == 0
        refuse_others(project, batch, NONE)


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Callable[[Asset], None]:
    """A function that raises the version of an asset's maker."""
    return lambda asset: monkeypatch.setitem(GRAPH, asset, replace(GRAPH[asset], version=GRAPH[asset].version + 1))


def state(project: Project) -> dict[str, int]:
    found = batch_state(project.root, FILMS, *VERSIONED)
    return {asset: found.version(asset) for asset in VERSIONED}


def test_a_new_maker_of_shots_decodes_again_and_encodes_what_comes_out_different(
    encoded: Path, tmp_path: Path, raised: Callable[[Asset], None]
) -> None:
    """Here the old maker found another first shot in one film."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    project = open_project(tmp_path / "corpus.yaml")
    path = project.root.table("shots", FILMS)
    shots = read_table(path, Shots)
    other = pl.col("uri").str.ends_with("/two.mp4") & (pl.col("shot_index") == 0)
    write_table(path, shots.with_columns(end_us=pl.when(other).then(1_000_000).otherwise("end_us")), Shots)
    old = make_clips(project, FILMS)
    assert (make_shots(project, FILMS).numbers["viewed"], make_media(project, FILMS).numbers["read"]) == (0, 1), (
        "nothing but the broken film is tried again while no version is raised"
    )
    raised("shots")
    assert make_media(project, FILMS).numbers["read"] == 1, "nor for a raised version of what reads it"
    assert make_shots(project, FILMS).numbers["viewed"] == read_table(path, Shots)["media_id"].n_unique()
    assert read_table(path, Shots).equals(shots)
    assert make_clips(project, FILMS).digest != old.digest
    assert state(project) == {asset: GRAPH[asset].version for asset in VERSIONED}
    refuse_others(project, FILMS, NONE)
    assert make_shots(project, FILMS).numbers["viewed"] == 0, "once"


def test_a_new_maker_of_media_reads_and_decodes_every_file_again(
    encoded: Path, tmp_path: Path, raised: Callable[[Asset], None]
) -> None:
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    project = open_project(tmp_path / "corpus.yaml")
    before = {noun: Path(project.root.table(noun, FILMS)).read_bytes() for noun in VERSIONED}
    raised("media")
    media = make_media(project, FILMS)
    assert media.numbers["read"] == media.rows
    assert make_shots(project, FILMS).numbers["viewed"] != 0
    make_clips(project, FILMS)
    assert {noun: Path(project.root.table(noun, FILMS)).read_bytes() for noun in VERSIONED} == before
    assert state(project) == {asset: GRAPH[asset].version for asset in VERSIONED}
    refuse_others(project, FILMS, NONE)


def test_a_file_that_older_versions_read_wrongly_is_encoded_again_alone(encoded: Path, tmp_path: Path) -> None:
    """At the same times and crops: it has rows of other ids, and what is stored of it is orphaned."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    project = open_project(tmp_path / "corpus.yaml")
    two = pl.col("uri").str.ends_with("/two.mp4")
    before = wanted_clips(project, FILMS)
    path = project.root.table("media", FILMS)
    hazards = pl.when(two).then(pl.lit(["decord_index"])).otherwise("hazards")
    write_table(path, read_table(path, Media).with_columns(hazards=hazards), Media)
    made = make_clips(project, FILMS)
    assert all(check.passed for check in made.checks)
    plan = refuse_others(project, FILMS, two)
    assert plan.rows.height
    assert set(plan.orphaned) == set(before.filter(two)["row_id"])
    now = wanted_clips(project, FILMS).filter(two)
    assert (
        now.drop("row_id").sort("clip_id", "crop_w").equals(before.filter(two).drop("row_id").sort("clip_id", "crop_w"))
    )


def test_what_nobody_accepted_is_kept_with_its_version(
    encoded: Path, tmp_path: Path, raised: Callable[[Asset], None]
) -> None:
    """A batch that runs for another reason, such as a new file, keeps its old rows and so its old version."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    project = open_project(tmp_path / "corpus.yaml")
    project = replace(project, versions={asset: GRAPH[asset].version for asset in VERSIONED})
    before = state(project)
    raised("media")
    raised("shots")
    assert (make_media(project, FILMS).numbers["read"], make_shots(project, FILMS).numbers["viewed"]) == (1, 0)
    assert state(project) == before
