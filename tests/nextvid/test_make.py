"""Making without Dagster: the order is the asset graph's, one stopped batch stops no other, nothing is no success."""

import itertools
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest

from nextvid import make as module
from nextvid.config.project import Project
from nextvid.encode.plan import accepted_spec
from nextvid.graph import BY_BATCH, Asset
from nextvid.make import Request, make
from nextvid.making.outcome import Check, Outcome
from nextvid.making.progress import Progress
from storage.errors import ConfigError, CorpusError, UpstreamError
from tests.factories import edit_project, save_autoencoder, write_autoencoder, write_project
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture
from tests.nextvid.tiny_project import CHANNELS, FRAMES, OVERRIDES, RECIPE, SIDE

Maker = Callable[[Project, Asset, str | None, Request], Outcome]
FIRST, SECOND = "stills.000000", "stills.000001"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Three pictures in two batches."""
    for number in range(3):
        write_picture(tmp_path / "stills" / f"{number}.jpg", f"{number}")
    stills = {"uri": str(tmp_path / "stills"), "weight": 1.0, "clips": [{"frames": 1}], "max_batch_images": 2}
    return write_project(tmp_path, {"stills": stills}, benchmarks={})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Makers after `sources` only note that they were called; `broken` below changes what they say."""
    noted: list[tuple[str, str | None]] = []
    real = module.make_one

    def noting(project: Project, asset: Asset, partition: str | None, request: Request) -> Outcome:
        if asset == "sources":
            return real(project, asset, partition, request)
        noted.append((asset, partition))
        run = "r" * 32 if asset == "pretrain" else None
        return Outcome(asset, partition, made=True, rows=1, size_bytes=1, seconds=0.0, run=run)

    monkeypatch.setattr(module, "make_one", noting)
    return noted


def breaking(monkeypatch: pytest.MonkeyPatch, where: tuple[str, str | None], how: str) -> None:
    """One maker of one partition raises, or reports a failed check."""
    before: Maker = module.make_one

    def broken(project: Project, asset: Asset, partition: str | None, request: Request) -> Outcome:
        outcome = before(project, asset, partition, request)
        if (asset, partition) != where:
            return outcome
        if how == "raises":
            raise UpstreamError("it failed before")
        checks = (Check("budget" if how == "blocking" else "pixels", False, {"share": 0.5}),)
        return Outcome(asset, partition, made=True, rows=1, size_bytes=1, seconds=0.0, checks=checks)

    monkeypatch.setattr(module, "make_one", broken)


def test_every_batch_goes_through_every_maker_in_order(project: Project, calls: list[tuple[str, str | None]]) -> None:
    outcomes = list(make(project, Request("latents")))
    assert outcomes[0].asset == "sources"
    assert [asset for asset, _ in calls] == [asset for asset in BY_BATCH for _ in range(2)]
    assert sorted(calls) == sorted((asset, batch) for asset in BY_BATCH for batch in (FIRST, SECOND))


def test_batches_are_made_at_once_where_there_are_cores_and_stop_together(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both meet at the barrier; when the caller goes, the other one stops at its next file."""
    before: Maker = module.make_one
    together, left, stopped = threading.Barrier(2), threading.Event(), list[str | None]()

    def meeting(project: Project, asset: Asset, partition: str | None, request: Request) -> Outcome:
        if asset in ("media", "shots"):
            together.wait(60)
        if asset == "shots" and partition == SECOND:
            assert left.wait(60)
            try:
                while True:
                    request.on_progress(Progress("shots", 1, 2))
            except CancelledError:
                stopped.append(partition)
                raise
        return before(project, asset, partition, request)

    monkeypatch.setattr(module, "make_one", meeting)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    made = make(project, Request("clips"))
    while next(made).asset != "shots":
        pass
    left.set()
    assert isinstance(made, Generator)
    made.close()
    assert stopped == [SECOND]


def test_one_batch_leaves_the_others_alone(project: Project, calls: list[tuple[str, str | None]]) -> None:
    list(make(project, Request("clips", batch=SECOND)))
    assert calls == [(asset, SECOND) for asset in ("media", "shots", "clips")]


@pytest.mark.parametrize("how", ["raises", "blocking"])
def test_a_stopped_batch_stops_no_other_and_is_told_at_the_end(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    breaking(monkeypatch, ("shots", FIRST), how)
    with pytest.raises(UpstreamError, match=rf"latents was not made for 1 batches: {FIRST}: ") as caught:
        list(make(project, Request("latents")))
    assert ("latents", SECOND) in calls
    assert not {("clips", FIRST), ("latents", FIRST)} & set(calls)
    assert ("it failed before" if how == "raises" else "budget (share=0.5)") in str(caught.value)


def test_what_reads_all_batches_decides_without_the_stopped(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, ("media", FIRST), "blocking")
    list(make(project, Request("trainset")))
    assert calls[-1] == ("trainset", None)
    assert ("latents", FIRST) not in calls


def test_the_batch_asked_for_stops_at_once(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, ("media", FIRST), "blocking")
    with pytest.raises(UpstreamError, match=FIRST):
        list(make(project, Request("trainset", batch=FIRST)))
    assert calls == [("media", FIRST)]


@pytest.mark.parametrize("how", ["raises", "blocking"])
def test_a_failure_of_what_reads_all_batches_stops(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    breaking(monkeypatch, ("latent_stats", None), how)
    with pytest.raises(UpstreamError):
        list(make(project, Request("trainset")))
    assert ("trainset", None) not in calls


def test_a_warning_stops_nothing(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, ("media", FIRST), "warning")
    list(make(project, Request("clips")))
    assert ("clips", FIRST) in calls


@pytest.mark.parametrize("asset", ["mask_plan", "pretrain", "probes", "samples", "report"])
def test_a_missing_or_unknown_recipe_is_told_before_any_work(
    project: Project, calls: list[tuple[str, str | None]], asset: Asset
) -> None:
    with pytest.raises(ConfigError, match="--recipe"):
        next(make(project, Request(asset)))
    with pytest.raises(ConfigError, match="nothing_like_it"):
        next(make(project, Request(asset, recipe="nothing_like_it")))
    assert calls == []


def test_an_unknown_benchmark_is_told_before_any_work(project: Project, calls: list[tuple[str, str | None]]) -> None:
    with pytest.raises(ConfigError, match="no benchmark 'none_such'"):
        next(make(project, Request("probes", recipe="demo", benchmark="none_such")))
    assert calls == []


def test_an_unknown_batch_names_the_nearest(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"no batch 'stils\.000001'; did you mean 'stills\.000001'"):
        list(make(project, Request("media", batch="stils.000001")))


def test_folders_without_media_are_an_error_beyond_sources(project: Project, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "stills")
    (tmp_path / "stills").mkdir()
    (tmp_path / "stills" / "notes.txt").write_text("no media")
    (outcome,) = make(project, Request("sources"))
    assert outcome.rows == 0
    with pytest.raises(CorpusError, match=r"no dataset holds a video or image .*stills"):
        list(make(project, Request("media")))


def test_real_makers_find_done_what_they_made(project: Project) -> None:
    first = list(make(project, Request("clips")))
    rows = {(outcome.asset, outcome.partition): outcome.rows for outcome in first}
    assert rows.keys() == {("sources", None)} | set(itertools.product(("media", "shots", "clips"), (FIRST, SECOND)))
    assert all(outcome.made for outcome in first)
    again = list(make(project, Request("clips")))
    assert {(outcome.asset, outcome.partition): outcome.rows for outcome in again} == rows
    assert not any(outcome.made for outcome in again)


def test_who_waits_is_told_how_far_each_maker_of_curation_is(project: Project) -> None:
    told: list[Progress] = []
    list(make(project, Request("duplicates", on_progress=told.append)))
    assert sorted((one.name, one.done, one.total) for one in told) == [
        *[(f"clips {FIRST}", done, 2) for done in (1, 2)],
        (f"clips {SECOND}", 1, 1),
        *[("duplicates", done, 2) for done in (1, 2)],
        *[("duplicates hashes", done, 16) for done in range(1, 17)],
        *[(f"media {FIRST}", done, 2) for done in (1, 2)],
        (f"media {SECOND}", 1, 1),
        *[(f"shots {FIRST}", done, 2) for done in (1, 2)],
        (f"shots {SECOND}", 1, 1),
    ]


@pytest.mark.parametrize(("reencode", "follows"), [("ask", False), ("auto", True)])
def test_a_changed_encoding_waits_for_a_person_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reencode: str, follows: bool
) -> None:
    """As in the graph: the first encoding is taken, a later one is accepted by hand or follows corpus.yaml."""
    folder, specs = write_autoencoder(tmp_path / "autoencoder"), []

    def noting(project: Project, batch: str, on_progress: object) -> Outcome:
        specs.append(accepted_spec(project).resolution)
        return Outcome("latents", batch, made=True, rows=1, size_bytes=1, seconds=0.0)

    monkeypatch.setattr("nextvid.encode.latents.make_latents", noting)
    for resolution in (16, 32):
        encoding = {"autoencoder": str(folder), "resolution": resolution}
        project = write_project(tmp_path, {"stills": {"uri": "stills"}}, encoding=encoding, reencode=reencode)
        module.make_one(project, "latents", FIRST, Request("latents"))
    assert specs == [16, 32 if follows else 16]


def test_what_reads_a_run_takes_the_one_that_was_trained(
    project: Project, calls: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever run is the recipe's latest."""
    before: Maker = module.make_one
    seen: list[tuple[str, str | None]] = []

    def trained(project: Project, asset: Asset, partition: str | None, request: Request) -> Outcome:
        seen.append((asset, request.run))
        return before(project, asset, partition, request)

    monkeypatch.setattr(module, "make_one", trained)
    list(make(project, Request("report", recipe="demo", overrides=("seed=1",))))
    assert {asset: run for asset, run in seen if run} == dict.fromkeys(("probes", "samples", "report"), "r" * 32)
    assert ("pretrain", None) in seen


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (Request("report", recipe="demo", run="r" * 12), ["probes", "samples", "report"]),
        (Request("samples", recipe="demo", trainset="f" * 32), ["mask_plan", "pretrain", "samples"]),
    ],
    ids=["--run", "--trainset"],
)
def test_nothing_is_made_of_what_leads_to_a_named_run_or_trainset(
    project: Project, calls: list[tuple[str, str | None]], asked: Request, made: list[str]
) -> None:
    list(make(project, asked))
    assert calls == [(asset, "demo") for asset in made]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Request("trainset", overrides=("seed=1",)), "are for training, and nothing is trained here"),
        (Request("latents", ranks=2), "are for training and probes, and neither is made here"),
        (Request("samples", recipe="demo", run="r" * 12, how=("device=cpu",)), "are for training and probes"),
        (Request("probes", recipe="demo", checkpoint=5), "name the run with --run"),
        (Request("pretrain", recipe="demo", run="r" * 12), "--run is for probes, samples and report"),
    ],
    ids=["--set", "--ranks", "--how", "--checkpoint", "--run"],
)
def test_options_that_nothing_reads_are_refused(project: Project, asked: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(make(project, asked))


def test_an_encoder_of_corpus_yaml_is_probed_without_a_run(
    project: Project, calls: list[tuple[str, str | None]]
) -> None:
    named = edit_project(project.path, lambda said: said.update(encoders={"colours": {"family": "pixels"}}))
    list(make(named, Request("probes", recipe="colours")))
    made = [asset for asset, _ in calls]
    assert made[-2:] == ["duplicates", "probes"]
    assert {"mask_plan", "trainset", "pretrain"}.isdisjoint(made)
    for asked in (Request("pretrain", recipe="colours"), Request("report", recipe="colours")):
        with pytest.raises(ConfigError, match="'colours' is no recipe but an encoder"):
            list(make(named, asked))
    for options in ({"run": "r" * 12}, {"overrides": ("seed=1",)}):
        with pytest.raises(ConfigError, match=r"leave (it|them) out"):
            list(make(named, Request("probes", recipe="colours", **options)))
    with pytest.raises(ConfigError, match="encoder 'demo' has the name of a recipe"):
        edit_project(project.path, lambda said: said.update(encoders={"demo": {"family": "pixels"}}))


def test_training_and_evaluation_need_no_media_files(tmp_path: Path) -> None:
    """On a machine that has the root and not the files, a whole chain is made of what the root holds."""
    for number in range(16):
        write_film(tmp_path / "films" / f"{number % 2}" / f"{number}.mp4", [scene(f"{number}", 3 * FPS)])
    save_autoencoder(tmp_path / "autoencoder", CHANNELS)
    policy = {"frames": FRAMES, "fps": 4, "crop": "whole"}
    films = {"uri": "films", "weight": 1.0, "clips": [policy], "labels": {"layout": "folders"}, "split": {"test": 0.4}}
    kinds = {"datasets": ["films"], "target": "class", "policy": policy, "epochs": 1, "batch": 4, "seeds": 1}
    encoding = {"autoencoder": str(tmp_path / "autoencoder"), "resolution": 8 * SIDE}
    settings = {"encoding": encoding, "execution": {"device": "cpu"}, "benchmarks": {"kinds": kinds}}
    project = write_project(tmp_path, {"films": films}, **settings)
    held = list(make(project, Request("trainset")))[-1].digest
    shutil.rmtree(tmp_path / "films")
    told: list[Progress] = []
    asked = Request("report", recipe=RECIPE, overrides=OVERRIDES, on_progress=told.append)
    outcomes = {one.asset: one for one in make(project, asked)}
    assert list(outcomes) == [
        "sources",
        "latent_stats",
        "duplicates",
        "mask_plan",
        "trainset",
        "pretrain",
        "probes",
        "samples",
        "report",
    ]
    assert (outcomes["trainset"].digest, outcomes["trainset"].made) == (held, False)
    assert {"latent_stats", f"mask_plan {RECIPE}", "trainset clips", "trainset rows"} <= {one.name for one in told}
    (note,) = (one.note for one in told if one.name == "sources")
    assert note.startswith(f"dataset films: {tmp_path}/films is not a folder; correct its 'uri' or mount it. Going on")


def test_what_is_made_of_media_files_needs_them(project: Project, calls: list[tuple[str, str | None]]) -> None:
    """And so does everything, of a dataset that the root holds nothing of."""
    shutil.rmtree(project.path.parent / "stills")
    with pytest.raises(CorpusError, match="stills is not a folder"):
        list(make(project, Request("trainset")))
    write_picture(project.path.parent / "stills" / "0.jpg", "0")
    list(make(project, Request("clips")))
    shutil.rmtree(project.path.parent / "stills")
    with pytest.raises(CorpusError, match="stills is not a folder"):
        list(make(project, Request("latents")))
    list(make(project, Request("trainset")))
    assert calls[-1] == ("trainset", None)
    assert ("latents", FIRST) not in calls


def test_a_label_file_that_is_away_stops_no_trainset(project: Project, calls: list[tuple[str, str | None]]) -> None:
    """Its batches are used as the root holds them; those of a dataset that corpus.yaml no longer names are left."""
    labels = project.path.parent / "labels.csv"
    labels.write_text("path,class\n0.jpg,cat\n")
    described = {"layout": "csv", "file": str(labels), "targets": {"class": "class"}}
    edit_project(project.path, lambda said: said["datasets"]["stills"].update(labels=described))
    write_picture(project.path.parent / "others" / "a.jpg", "a")
    others = {"uri": str(project.path.parent / "others"), "weight": 1.0, "clips": [{"frames": 1}]}
    both = edit_project(project.path, lambda said: said["datasets"].update(others=others))
    list(make(both, Request("sources")))
    labels.unlink()
    told: list[Progress] = []
    list(make(both, Request("trainset", on_progress=told.append)))
    assert {batch for asset, batch in calls if asset in BY_BATCH} == {"others.000000"}
    assert calls[-1] == ("trainset", None)
    (note,) = (one.note for one in told if one.note)
    assert note.startswith(f"dataset stills: label file {labels} cannot be read: ")
    assert note.endswith(f"Going on with what {both.corpus.root} holds of stills")
    with pytest.raises(CorpusError, match="dataset stills: label file"):
        list(make(both, Request("clips", batch=FIRST)))
    calls.clear()
    list(make(both, Request("media", batch="others.000000")))
    alone = edit_project(project.path, lambda said: said["datasets"].pop("stills"))
    list(make(alone, Request("media")))
    assert calls == [("media", "others.000000")] * 2


def test_a_platform_without_decord_is_told_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, str | None]]
) -> None:
    monkeypatch.setattr("nextvid.video.probe.decord_installed", lambda: False)
    told: list[Progress] = []
    list(make(project, Request("clips", on_progress=told.append)))
    assert [progress.note for progress in told if "PyAV reads all videos" in (progress.note or "")] == [
        "decord is not installed, as on platforms that it has no wheel for: PyAV reads all videos"
    ]
    assert calls


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"how": ("sinks=mlflow",)}, r"sinks\.0"),
        ({"how": ("micro_batch=few",)}, "micro_batch"),
        ({"overrides": ("init.run=nosuch",)}, r"init\.run"),
        ({"overrides": ("stages.warm.steps=1",)}, "did you mean 'warmup'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_before_anything_is_made(
    project: Project, calls: list[tuple[str, str | None]], given: dict[str, tuple[str, ...]], said: str
) -> None:
    request = replace(Request("pretrain", recipe=RECIPE), **given)  # type: ignore[arg-type]  # fields by name
    with pytest.raises(ConfigError, match=said):
        list(make(project, request))
    assert calls == []
