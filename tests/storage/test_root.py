"""storage/root.py: every path stays under its root, and hostile names never leave it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import atomic
from storage.errors import ConfigError
from storage.remote import is_local
from storage.root import DataRoot

HEX = "0123456789abcdef0123456789abcdef"


def every_path(root: DataRoot) -> list[str]:
    return [
        root.accepted(),
        root.table("media", "k400.000001"),
        root.checks("shots", "k400.000001"),
        root.preview("clips", "k400.000001"),
        root.latents_checks(HEX, "k400.000001"),
        root.part(HEX, "k400.000001", 16, 3),
        root.pointed("trainset", HEX),
        root.latest("duplicates"),
        root.withdrawn(),
        root.run("nextvid_l", HEX[:12]),
        root.launch("nextvid_l", "0b6f2c9e-1111-2222-3333-444455556666"),
        root.latest_run("demo"),
        root.probe("demo", HEX[:12], 5, "ucf", HEX),
        root.probe("demo", HEX[:12], None, "ucf", HEX),
        root.samples("demo", HEX[:12]),
        root.report("demo", HEX[:12], HEX),
    ]


def test_paths_stand_under_their_roots(tmp_path: Path) -> None:
    root = DataRoot.open(str(tmp_path / "data"), str(tmp_path / "runs"))
    paths = every_path(root)
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.startswith((f"{tmp_path}/data/", f"{tmp_path}/runs/"))
    assert root.part(HEX, "a.000000", 16, 3) == f"{tmp_path}/data/latents/{HEX}/a.000000/f16/0003"


def test_runs_follow_a_local_root_and_must_be_named_for_a_bucket(tmp_path: Path) -> None:
    assert DataRoot.open(str(tmp_path)).runs_url == str(tmp_path)
    assert DataRoot.open(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(ConfigError, match="runs_root"):
        DataRoot.open("s3://bucket/corpus")
    assert (
        DataRoot.open("s3://bucket/corpus/", str(tmp_path))
        .table("media", "a.000000")
        .startswith("s3://bucket/corpus/m")
    )


def test_relative_roots_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataRoot.open("data").url == f"{tmp_path}/data"


@pytest.mark.parametrize("name", ["..", "a/b", "../x", "", "A", "a.1", "a.0000001", "a b", "a\n", "a.000000/..", "é"])
def test_hostile_names_are_refused(data_root: DataRoot, name: str) -> None:
    builders: list[Callable[[], str]] = [
        lambda: data_root.table("media", name),
        lambda: data_root.recipe_folder(name),
        lambda: data_root.probe("demo", HEX, 5, name, HEX),
        lambda: data_root.stored_batch(HEX, name),
    ]
    for build in builders:
        with pytest.raises(ConfigError, match="is not a name"):
            build()


@pytest.mark.parametrize("digest", ["..", "", "ABCDEFABCDEF", "abc", HEX + "0", HEX[:11] + "/", HEX[:12] + "\n"])
def test_hostile_digests_are_refused(data_root: DataRoot, digest: str) -> None:
    builders: list[Callable[[], str]] = [
        lambda: data_root.spec_folder(digest),
        lambda: data_root.run("demo", digest),
    ]
    for build in builders:
        with pytest.raises(ConfigError, match="is not a digest"):
            build()


@given(st.text())
def test_no_text_leaves_the_root(text: str) -> None:
    root = DataRoot("/data", "/data")
    try:
        path = root.table("media", text)
    except ConfigError:
        return
    assert Path(path).resolve() == Path(path)
    assert Path(path).parent == Path("/data/media")


@pytest.mark.parametrize("local", [True, False])
def test_batches_lists_tables_only(tmp_path: Path, local: bool) -> None:
    root = DataRoot.open(str(tmp_path) if local else f"memory://{tmp_path.name}", str(tmp_path))
    assert root.batches() == []
    for name in ("b.000000.parquet", "a.000001.parquet", "a.000001.json"):
        atomic.publish_bytes(f"{root.folder('sources')}/{name}", b"")
    assert root.batches() == ["a.000001", "b.000000"]
    assert root.batches("media") == []


def test_is_local() -> None:
    assert is_local("/data")
    assert is_local("file:///data")
    assert not is_local("s3://bucket")
