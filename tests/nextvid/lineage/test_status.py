"""The state of a project in a terminal: what it shows at each stage on the way from a folder to a score."""

from pathlib import Path

import pytest

from nextvid.config.project import Project, open_project
from nextvid.corpus.media import make_media
from nextvid.corpus.sources import make_sources
from nextvid.lineage.status import read_status
from nextvid.planning.acceptance import accept_asked
from nextvid.train.run import find_run, run_lock
from tests.factories import edit_project, write_autoencoder, write_project
from tests.nextvid.corpus.small_media import write_picture
from tests.nextvid.tiny_project import RECIPE, probe, write_evaluated


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a complete run."""
    return write_evaluated(tmp_path_factory.mktemp("status"))


@pytest.fixture
def stills(tmp_path: Path) -> Project:
    """Three pictures, one of them broken, that nothing was made of."""
    for name in ("one", "two"):
        write_picture(tmp_path / "stills" / f"{name}.jpg", name)
    (tmp_path / "stills" / "three.jpg").write_bytes(b"no picture")
    weights = write_autoencoder(tmp_path / "weights")
    dataset = {"uri": str(tmp_path / "stills"), "weight": 1.0, "clips": [{"frames": 1}], "quarantine_budget": 0.1}
    encoding = {"autoencoder": str(weights), "resolution": 16}
    return write_project(tmp_path, {"stills": dataset}, encoding=encoding)


def test_a_project_is_followed_from_nothing_to_a_failed_check(stills: Project) -> None:
    before = read_status(stills)
    assert (before.next, before.broken, before.trainset) == ("nextvid make latents", (), None)
    assert "stills: 0 of 0 batches complete" in before.text()
    make_sources(stills)
    listed = read_status(stills)
    [dataset] = listed.datasets
    assert (dataset.batches, dataset.complete) == (1, 0)
    assert sum(dataset.waiting.values()) == 1, "the one batch, with its reason"
    make_media(stills, "stills.000000")
    read = read_status(stills)
    assert dict(read.datasets[0].files) == {"ok": 2, "quarantined": 1}
    assert any(line.startswith("media stills.000000: check ") for line in read.broken), "over the budget"
    assert "2 files (1 quarantined)" in read.text()


def test_a_dataset_whose_label_file_is_away_is_not_complete(stills: Project) -> None:
    make_sources(stills)
    labels = {"layout": "csv", "file": "away.csv", "targets": {"class": "class"}}
    away = edit_project(stills.path, lambda values: values["datasets"]["stills"].update(labels=labels))
    status = read_status(away)
    assert status.datasets[0].complete == 0
    assert dict(status.datasets[0].waiting) == {"its label files cannot be read": 1}
    assert any(line.startswith("dataset stills: label file") for line in status.broken)


def test_a_missing_autoencoder_is_named_and_the_rest_is_shown(stills: Project) -> None:
    make_sources(stills)
    broken = edit_project(stills.path, lambda values: values["encoding"].update(autoencoder="nowhere"))
    status = read_status(broken)
    assert status.next == "correct what is broken first"
    assert any("nowhere" in line for line in status.broken)
    assert status.datasets[0].batches == 1


def test_a_trained_project_asks_for_scores_and_shows_them_once_made(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    before = read_status(evaluated)
    [found] = before.runs
    assert (found.run, found.state, found.step, found.scores) == (run.id, "complete", run.recipe.steps, {})
    assert before.rows > 0
    outcome = probe(evaluated, RECIPE)
    after = read_status(evaluated)
    accuracy = after.runs[0].scores["species"]
    assert accuracy == outcome.numbers["species_ema_accuracy"]
    assert f"species {accuracy:.3f}" in after.text()


def test_a_run_that_trains_is_told_from_one_that_stopped(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    exported = run.folder / "encoder" / "config.json"
    hidden = exported.with_name("config.away")
    exported.rename(hidden)
    try:
        assert read_status(evaluated).runs[0].state == "stopped"
        with run_lock(run.folder):
            assert read_status(evaluated).runs[0].state == "training"
    finally:
        hidden.rename(exported)


def test_a_change_of_corpus_yaml_asks_for_a_plan(stills: Project) -> None:
    make_sources(stills)
    accept_asked(stills)
    edit_project(stills.path, lambda values: values.update(curation={"filters": {"luma_min": 1.0}}))
    status = read_status(open_project(stills.path))
    assert status.next.startswith("nextvid plan")
    assert "curation" in status.next
