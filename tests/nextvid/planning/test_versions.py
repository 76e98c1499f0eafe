"""A raised version of a maker: who waits and why, what `nextvid plan` says of it, and what is rebuilt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.registered import register
from nextvid.config.accepted import accepted
from nextvid.config.project import Project, open_project
from nextvid.encode.plan import encoding_spec
from nextvid.graph import GRAPH, Asset
from nextvid.making.batches import VERSIONED, batch_state
from nextvid.planning.acceptance import accept_asked, ensure_accepted, outdated
from nextvid.planning.costs import forecast
from nextvid.planning.waiting import standard, unfinished, waiting
from storage.records import publish_record, read_record

BATCHES = ["pictures.000000", "pictures.000001"]
Raise = Callable[[Asset], int]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two batches of three files, done by today's makers."""
    return open_project(register(tmp_path / "data", 2, 3).path)


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """A function that raises the version of an asset's maker by one; returns the version before."""

    def raise_one(asset: Asset) -> int:
        before = GRAPH[asset].version
        monkeypatch.setitem(GRAPH, asset, replace(GRAPH[asset], version=before + 1))
        return before

    return raise_one


def automatic(project: Project) -> Project:
    project.path.write_text("reencode: auto\n" + project.path.read_text())
    return open_project(project.path)


@pytest.mark.parametrize("asset", VERSIONED)
def test_a_raised_version_waits_until_it_is_accepted(project: Project, raised: Raise, asset: Asset) -> None:
    before = raised(asset)
    ensure_accepted(project)
    assert waiting(standard(project)).keys == {}, "nobody accepted the new version"
    assert outdated(project) == (f"{asset} version {before}",)
    accept_asked(project)
    on = open_project(project.path)
    assert list(waiting(standard(on)).keys) == BATCHES
    reason = f"made by {asset} version {before}"
    others = (f"made from media version {before}",) if asset == "media" else ()
    assert unfinished(standard(on), BATCHES[0]) == (reason, *others)
    assert outdated(on) == ()


def test_a_raised_version_is_accepted_at_once_with_auto(project: Project, raised: Raise) -> None:
    on = automatic(project)
    ensure_accepted(on)
    assert waiting(standard(on)).keys == {}
    raised("shots")
    ensure_accepted(on)
    assert list(waiting(standard(on)).keys) == BATCHES
    known = accepted(on.root)
    assert known is not None
    assert known.versions["shots"] == GRAPH["shots"].version


@pytest.mark.parametrize("asset", ["latent_stats", "duplicates", "trainset", "pretrain", "probes", "report"])
def test_what_reads_all_batches_makes_none_wait(project: Project, raised: Raise, asset: Asset) -> None:
    raised(asset)
    assert waiting(standard(accept_asked(project))).keys == {}


def test_a_raised_version_of_latents_is_another_encoding(project: Project, raised: Raise) -> None:
    digest = encoding_spec(project).digest()
    before = raised("latents")
    assert encoding_spec(project).digest() != digest
    assert outdated(project) == (f"latents version {before}",)
    assert waiting(standard(project)).keys == {}
    assert [cost.rows for cost in forecast(project).if_accepted] == [3, 3]
    accept_asked(project)
    on = open_project(project.path)
    assert unfinished(standard(on), BATCHES[0]) == (f"made by latents version {before}",)


def test_the_key_of_a_run_follows_the_versions(project: Project, raised: Raise) -> None:
    before = standard(project).key(BATCHES[0])
    raised("shots")
    assert standard(project).key(BATCHES[0]) != before


def test_plan_names_version_and_files(project: Project, raised: Raise) -> None:
    before = raised("shots")
    found = forecast(project)
    assert [cost.rebuilt for cost in found.now] == [(), ()]
    assert [(cost.rebuilt, cost.first_passes) for cost in found.if_accepted] == [
        ((f"made by shots version {before}",), 3)
    ] * 2
    text = found.text()
    assert f"this version of nextvid differs from the accepted shots version {before}: 2 batches are outdated" in text
    assert f"{BATCHES[0]}: 0 rows (nothing to do), 3 kept, 0 orphaned; made by shots version {before}: 3 files" in text
    assert "only files that come out different or were read wrongly are encoded again" in text
    summary = found.summary()
    assert summary is not None
    assert "2 batches are outdated, 0 rows, 0 bytes" in summary
    assert "6 files need a new first pass" in summary


def test_tables_without_a_version_wait_like_those_of_an_older_one(project: Project) -> None:
    """What a release wrote that recorded no versions."""
    for asset in VERSIONED:
        for batch in BATCHES:
            path = project.root.checks(asset, batch)
            value = read_record(path)
            del value["made_from"]["version"]
            value["made_from"].pop("media", None)
            publish_record(path, value)
    value = read_record(project.root.accepted())
    del value["versions"]
    publish_record(project.root.accepted(), value)
    on = open_project(project.path)
    assert waiting(standard(on)).keys == {}, "until a person accepts"
    assert outdated(on) == ("media version 0", "shots version 0", "clips version 0")
    accept_asked(on)
    assert unfinished(standard(open_project(project.path)), BATCHES[0])[0] == "made by media of an unrecorded version"
    assert list(waiting(standard(open_project(project.path))).keys) == BATCHES


def test_an_older_release_asks_for_nothing(project: Project, raised: Raise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes back to an older release keeps what the newer one made."""
    accept_asked(project)
    monkeypatch.setitem(GRAPH, "shots", replace(GRAPH["shots"], version=1))
    on = open_project(project.path)
    assert (waiting(standard(on)).keys, outdated(on)) == ({}, ())
    assert batch_state(on.root, BATCHES[0], "shots").version_now("shots", kept=True) == "1"
