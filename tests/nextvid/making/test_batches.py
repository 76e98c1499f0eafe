"""The parts of a batch's key, and what the files of its checks say of it."""

from pathlib import Path

import pytest

from nextvid.making.batches import batch_key, batch_number, batch_state, config_of, dataset_of
from nextvid.making.outcome import Check
from nextvid.making.publishing import publish_verdict
from storage.atomic import publish_json
from storage.errors import CorpusError
from storage.root import DataRoot
from tests.nextvid.tiny_project import write_evaluated

BATCH, ENCODING = "films.000000", "0" * 32
GOOD, BAD = Check("rows", True), Check("rows", False)
WARNING = Check("pixels", False)


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    return DataRoot.open(str(tmp_path))


def test_keys() -> None:
    assert batch_key("kinetics400", 12) == "kinetics400.000012"
    assert (dataset_of("kinetics400.000012"), batch_number("kinetics400.000012")) == ("kinetics400", 12)


def test_a_batch_that_was_never_made_is_not_usable(root: DataRoot) -> None:
    state = batch_state(root, BATCH, "media", "shots", "clips", "latents", encoding=ENCODING)
    assert (state.usable, state.not_made, state.failed) == (False, ("media", "shots", "clips", "latents"), ())
    assert state.made_from("media", "listing") is None


def test_usable_is_made_and_passed_of_the_assets_that_were_asked_about(root: DataRoot) -> None:
    publish_verdict(root.checks("media", BATCH), "media", [GOOD, WARNING])
    publish_verdict(root.checks("shots", BATCH), "shots", [GOOD, BAD])
    publish_verdict(root.latents_checks(ENCODING, BATCH), "latents", [GOOD])
    assert batch_state(root, BATCH, "media").usable
    assert batch_state(root, BATCH, "latents", encoding=ENCODING).usable
    assert not batch_state(root, BATCH, "latents", encoding="1" * 32).usable
    state = batch_state(root, BATCH, "media", "shots", "clips")
    assert (state.usable, state.failed, state.not_made) == (False, ("shots",), ("clips",))


def test_what_an_asset_was_made_from_is_read_back_and_a_change_of_it_is_written(root: DataRoot) -> None:
    path = root.checks("clips", BATCH)
    assert publish_verdict(path, "clips", [GOOD], {"curation": "a"})
    assert not publish_verdict(path, "clips", [GOOD], {"curation": "a"})
    assert publish_verdict(path, "clips", [GOOD], {"curation": "b"})
    state = batch_state(root, BATCH, "clips")
    assert (state.made_from("clips", "curation"), state.made_from("clips", "listing")) == ("b", None)


def test_a_file_of_before_the_first_release_is_of_an_unrecorded_version(root: DataRoot) -> None:
    publish_json(root.checks("clips", BATCH), {"asset": "clips", "passed": True, "checks": []})
    state = batch_state(root, BATCH, "clips")
    assert (state.usable, state.version("clips"), state.made_from("clips", "curation")) == (True, 0, None)


def test_a_batch_of_a_dataset_that_left_the_configuration_is_named(tmp_path: Path) -> None:
    project = write_evaluated(tmp_path, run=False)
    with pytest.raises(CorpusError, match="names no dataset 'old'"):
        config_of(project, "old.000000")
