"""Both ways through the files of a tiny run: from a score down to files, from a file up to runs and scores."""

from pathlib import Path

import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.lineage.trace import licences_of, trace
from nextvid.train.run import find_run
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError
from storage.schemas import Media
from storage.tables import read_table, write_table
from tests.factories import edit_project
from tests.nextvid.tiny_project import CLIPS_A_VIDEO, IMAGES, RECIPE, probe, uri_of


def test_a_run_leads_to_its_files_with_counts(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    found = trace(evaluated, run.id)
    assert found.kind == "run"
    assert found.trainsets[0].digest == run.trainset
    assert [(s.name, s.files, s.clips, s.rows) for s in found.datasets] == [
        ("pets", 20, 20 * CLIPS_A_VIDEO, 20 * CLIPS_A_VIDEO),
        ("stills", IMAGES, IMAGES, IMAGES),
    ]
    assert [s.name for s in found.batches] == ["pets.000000", "stills.000000"]
    assert found.every_file is not None
    assert Path(found.every_file).is_file()


@pytest.mark.parametrize("inside", ["", "checkpoints/step_000000005", "encoder"])
def test_folders_of_a_run_are_the_run(evaluated: Project, inside: str) -> None:
    run = find_run(evaluated, RECIPE)
    found = trace(evaluated, str(run.folder / inside))
    assert found.kind == ("checkpoint" if inside else "run")
    assert [facts.run for facts in found.runs] == [run.id]


def test_a_score_leads_to_run_and_trainset(evaluated: Project) -> None:
    outcome = probe(evaluated, RECIPE)
    run = find_run(evaluated, RECIPE)
    path = Path(str(outcome.numbers["species_score"]))
    found = trace(evaluated, str(path))
    assert found.kind == "score"
    assert found.scores[0].benchmark == "species"
    assert found.runs[0].run == run.id
    assert found.trainsets[0].digest == run.trainset


def test_a_training_file_leads_to_every_use_of_it(evaluated: Project) -> None:
    probe(evaluated, RECIPE)
    run = find_run(evaluated, RECIPE)
    found = trace(evaluated, uri_of(3))
    assert found.kind == "file"
    assert (found.media[0].clips, found.media[0].rows, found.media[0].split) == (3, 3, "train")
    assert [(t.digest, t.rows) for t in found.trainsets] == [(run.trainset, 3)]
    assert [facts.run for facts in found.runs] == [run.id]
    assert [score.clips for score in found.scores] == [{"train": 3}]
    assert found.media[0].media_id is not None
    assert trace(evaluated, found.media[0].media_id).media == found.media


def test_a_test_file_was_seen_by_scores_only(evaluated: Project) -> None:
    probe(evaluated, RECIPE)
    found = trace(evaluated, uri_of(21))
    assert (len(found.trainsets), len(found.runs)) == (0, 0)
    assert [score.clips for score in found.scores] == [{"test": 3}]


def test_a_trainset_by_its_digest(evaluated: Project) -> None:
    digest = find_run(evaluated, RECIPE).trainset
    found = trace(evaluated, digest)
    assert found.kind == "trainset"
    assert found.trainsets[0].rows == 20 * CLIPS_A_VIDEO + IMAGES


def test_upwards_a_trainset_leads_to_its_runs_and_a_run_to_its_scores(evaluated: Project) -> None:
    probe(evaluated, RECIPE)
    run = find_run(evaluated, RECIPE)
    (score,) = trace(evaluated, run.id).scores
    assert (score.run, score.benchmark) == (run.id, "species")
    above = trace(evaluated, run.trainset)
    assert [facts.run for facts in above.runs] == [run.id]
    assert above.scores == (score,)


def test_markdown_says_what_the_text_says(evaluated: Project) -> None:
    run = find_run(evaluated, RECIPE)
    said = trace(evaluated, run.id).markdown()
    assert f"run `{run.id}` of recipe {RECIPE}" in said
    assert f"trainset `{run.trainset}`" in said
    assert "| pets | " in said
    assert "pets.000000" not in said
    assert "lineage.parquet" in said


def test_text_names_what_was_found(evaluated: Project) -> None:
    text = trace(evaluated, uri_of(3)).text()
    assert text.startswith(f"file {uri_of(3)}")
    assert find_run(evaluated, RECIPE).id in text
    assert "clips=train:3" in text or "score" not in text


def test_the_unknown_says_what_would_be_known(evaluated: Project) -> None:
    with pytest.raises(ConfigError, match="is no run, checkpoint"):
        trace(evaluated, "/nowhere/else.mp4")


def test_licences_of_files_are_counted_where_a_column_names_them(own_copy: Project) -> None:
    (own_copy.path.parent / "list.csv").write_text("path,terms")
    labels = {"layout": "csv", "file": "list.csv", "licence_column": "terms"}
    lineage = Trainset.open(own_copy.root).lineage()
    assert licences_of(own_copy, lineage) == {"pets": "CC0-1.0", "stills": "unknown"}
    project = edit_project(own_copy.path, lambda said: said["datasets"]["pets"].update(labels=labels))
    files = lineage.filter(dataset="pets")["media_id"].unique().sort()
    path = project.root.table("media", "pets.000000")
    media = read_table(path, Media)
    other = pl.when(pl.col("media_id") == files[0]).then(pl.lit("CC-BY-4.0")).otherwise("licence")
    write_table(path, media.with_columns(licence=other), Media)
    found = licences_of(project, lineage)["pets"]
    assert found == f"CC0-1.0 ({len(files) - 1} files), CC-BY-4.0 (1 file)"
    named = edit_project(own_copy.path, lambda said: said["datasets"].pop("stills"))
    assert licences_of(named, lineage)["stills"] == "no longer configured"
