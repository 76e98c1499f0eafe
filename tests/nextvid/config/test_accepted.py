"""The accepted configuration in the place of what corpus.yaml asks for, dataset by dataset."""

import json
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.accepted import accept, accepted, keep_new
from nextvid.config.project import Project, open_project
from storage.errors import ConfigError, CorpusError
from tests.factories import write_project

ENCODING = "ab" * 16
FILMS: dict[str, Any] = {"uri": "films", "weight": 1.0, "clips": [{"frames": 8, "fps": 4}]}
STILLS: dict[str, Any] = {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}], "labels": {"layout": "folders"}}
SHORT: dict[str, Any] = {**FILMS, "clips": [{"frames": 4, "fps": 4}]}
ACTION: dict[str, Any] = {"datasets": ["films"], "target": "action", "policy": {"frames": 8, "fps": 4}}


def write(tmp_path: Path, datasets: dict[str, Any], **more: Any) -> Project:
    return write_project(tmp_path, datasets, **more)


def begun(tmp_path: Path, **more: Any) -> Project:
    """A project of films and stills whose corpus.yaml is accepted."""
    project = write(tmp_path, {"films": FILMS, "stills": STILLS}, benchmarks={"action": ACTION}, **more)
    return accept_asked(project)


def accept_asked(project: Project) -> Project:
    """The project after its corpus.yaml was accepted."""
    accept(project.root, project.asked, ENCODING, {})
    return open_project(project.path)


def after(project: Project) -> Project:
    """The project once the sensor has accepted its new datasets."""
    known = accepted(project.root)
    assert known is not None
    keep_new(project.root, project.asked, known)
    return open_project(project.path)


def test_nothing_accepted_is_corpus_yaml(tmp_path: Path) -> None:
    project = write(tmp_path, {"films": FILMS})
    assert project.corpus is project.asked


def test_what_was_accepted_stays_until_it_is_accepted_anew(tmp_path: Path) -> None:
    old = begun(tmp_path)
    assert old.corpus == old.asked
    new = write(
        tmp_path,
        {"films": SHORT, "stills": STILLS},
        benchmarks={"action": {**ACTION, "target": "who", "epochs": 3}},
        curation={"filters": {"motion_min": None}},
    )
    on = after(new).corpus
    assert on.curation_digest() == old.corpus.curation_digest()
    assert on.datasets["films"].clips == old.corpus.datasets["films"].clips
    assert on.curation == old.corpus.curation
    assert (on.benchmarks["action"].target, on.benchmarks["action"].epochs) == ("action", 3), "epochs decide no row"
    assert accept_asked(new).corpus == new.asked


def test_auto_is_corpus_yaml(tmp_path: Path) -> None:
    begun(tmp_path)
    new = write(tmp_path, {"films": SHORT, "stills": STILLS}, reencode="auto")
    assert new.corpus is new.asked


def test_a_new_dataset_is_taken_as_it_is_and_waits_from_then_on(tmp_path: Path) -> None:
    begun(tmp_path)
    more = write(
        tmp_path,
        {"films": SHORT, "stills": STILLS, "clips": {**SHORT, "uri": "clips"}},
        benchmarks={"action": {**ACTION, "datasets": ["films", "clips"]}},
    )
    on = after(more).corpus
    assert on.datasets["clips"].clips[0].frames == 4
    assert on.datasets["films"].clips[0].frames == 8
    assert on.benchmarks["action"].datasets == ("films", "clips")
    again = write(tmp_path, {"films": SHORT, "stills": STILLS, "clips": {**FILMS, "uri": "clips"}}, benchmarks={})
    on = after(again).corpus
    assert on.datasets["clips"].clips[0].frames == 4, "it was accepted when it was new"
    assert on.benchmarks["action"].datasets == ("films", "clips"), "so was the benchmark"


def test_a_new_benchmark_waits_where_rows_would_be_made_anew(tmp_path: Path) -> None:
    old = begun(tmp_path)
    other = {"datasets": ["stills", "more"], "target": "class", "policy": {"frames": 1}}
    new = write(
        tmp_path,
        {"films": FILMS, "stills": STILLS, "more": {**STILLS, "uri": "more"}},
        benchmarks={"action": ACTION, "what": other},
    )
    on = after(new).corpus
    assert on.benchmarks["what"].datasets == ("more",)
    assert on.curation_digest("stills") == old.corpus.curation_digest("stills")
    assert on.curation_digest() != new.asked.curation_digest(), "it is reported"
    with pytest.raises(ConfigError, match="'who' is not accepted yet"):
        write(tmp_path, {"films": FILMS}, benchmarks={"action": ACTION, "who": ACTION}).benchmark("who")


def test_a_dataset_that_comes_back_is_as_it_was(tmp_path: Path) -> None:
    old = begun(tmp_path)
    gone = write(tmp_path, {"stills": STILLS})
    after(gone)
    back = write(tmp_path, {"films": SHORT, "stills": STILLS}, benchmarks={"action": ACTION})
    assert after(back).corpus.curation_digest() == old.corpus.curation_digest()


def test_label_files_may_move_and_another_layout_waits(tmp_path: Path) -> None:
    labelled = {**FILMS, "labels": {"layout": "csv", "file": "old.csv", "targets": {"action": "action"}}}
    accept_asked(write(tmp_path, {"films": labelled}))
    moved = {**FILMS, "labels": {**labelled["labels"], "file": "new.csv", "targets": {"who": "who"}}}
    labels = after(write(tmp_path, {"films": moved})).corpus.datasets["films"].labels
    assert labels.file is not None
    assert (Path(labels.file).name, labels.targets) == ("new.csv", {"action": "action"})
    folders = {**FILMS, "labels": {"layout": "folders"}}
    labels = after(write(tmp_path, {"films": folders})).corpus.datasets["films"].labels
    assert labels.file is not None
    assert (labels.layout, Path(labels.file).name) == ("csv", "new.csv")


def test_pixels_wait_too(tmp_path: Path) -> None:
    encoding = {"autoencoder": "nowhere", "resolution": 64}
    begun(tmp_path, encoding=encoding)
    new = write(
        tmp_path,
        {"films": FILMS, "stills": STILLS},
        benchmarks={"action": ACTION},
        encoding={**encoding, "pixels": {"quality": 80}},
    )
    assert after(new).corpus.encoding.pixels is None
    assert accept_asked(new).corpus.encoding.pixels == new.asked.encoding.pixels


def test_a_damaged_file_is_named_with_its_remedy(tmp_path: Path) -> None:
    project = begun(tmp_path)
    path = Path(project.root.accepted())
    path.write_text(json.dumps({"encoding": ENCODING, "curation": project.corpus.curation_digest()}))
    with pytest.raises(CorpusError, match=r"remove it, then 'nextvid plan --accept'"):
        open_project(project.path)
