"""Files inside archives: what an index holds is what was written, and damage is said, never read past."""

import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextvid.video.archives import copy_member, index, split_uri
from storage.errors import CorpusError, MediaError
from tests.nextvid.corpus.archives import write_parquet, write_tar

MEMBERS = st.lists(
    st.tuples(st.sampled_from(["a.jpg", "b/c.mp4", "./e.gif", "label.json", "ä.webp"]), st.binary(max_size=1500)),
    max_size=6,
)
PNG = b"\x89PNG and more"


def read(uri: str, folder: Path) -> bytes:
    copy_member(uri, folder / "copy")
    return (folder / "copy").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(MEMBERS, st.floats(0, 1))
def test_a_tar_file_cut_anywhere_gives_whole_members_alone(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], share: float
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    tar = write_tar(folder / "x.tar", members)
    whole = index(tar, None)
    media = {
        name.removeprefix("./"): data for name, data in members if not name.endswith(".json")
    }  # the last of a name
    assert whole.damage is None
    assert whole.sizes_bytes == {name: len(data) for name, data in media.items()}
    names = [name.removeprefix("./") for name, _ in members if not name.endswith(".json")]
    assert whole.doubled == {name for name in names if names.count(name) > 1}
    assert {name: read(f"{tar}!/{name}", folder) for name in media} == media
    cut = folder / "cut.tar"
    data = tar.read_bytes()
    with tarfile.open(tar) as opened:
        end = max((m.offset_data + -(-m.size // 512) * 512 for m in opened), default=0)
    cut.write_bytes(data[: int(share * (end + 511))])
    found = index(cut, None)
    assert found.damage is not None
    written = {(name.removeprefix("./"), data) for name, data in members}
    assert {(name, read(f"{cut}!/{name}", folder)) for name in found.sizes_bytes} <= written


def test_links_and_devices_in_a_tar_file_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert index(tmp_path / "x.tar", None).sizes_bytes == {}


def test_cells_of_parquet_files_are_named_by_column_row_and_their_own_name(tmp_path: Path) -> None:
    cells = [("n1/cat.JPEG", b"1"), (None, PNG), ("dog.jpg", None), ("notes.txt", b"3"), ("../../owl.jpg", b"4" * 9)]
    path = write_parquet(tmp_path / "x.parquet", cells)
    found = index(path, "image")
    names = {"image/0000000/cat.JPEG": 1, "image/0000001/file.png": len(PNG), "image/0000004/owl.jpg": 9}
    assert (found.sizes_bytes, found.damage) == (names, None)
    assert sorted(found.ignored) == [".txt", "no bytes"]
    assert [read(f"{path}!/{name}", tmp_path) for name in names] == [b"1", PNG, b"4" * 9]
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    assert "parquet" in str(index(tmp_path / "cut.parquet", "image").damage)


def test_a_parquet_file_without_the_column_is_an_error_that_names_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [("cat.jpg", b"1")])
    with pytest.raises(
        CorpusError, match=r"no column 'video' of files.*; it has image, label: correct 'parquet_column'"
    ):
        index(path, "video")
    with pytest.raises(CorpusError, match=r"no column 'label' of files.*; this one holds Int64"):
        index(path, "label")


@pytest.mark.parametrize("name", ["x.tar!/b.jpg", "y.tar!/a.jpg", "x.parquet!/image/0000009/cat.jpg", "x.parquet!/i/j"])
def test_what_is_not_in_its_archive_any_more_is_missing(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1")])
    write_parquet(tmp_path / "x.parquet", [("cat.jpg", b"1")])
    with pytest.raises(MediaError, match="list the dataset again") as raised:
        copy_member(str(tmp_path / name), tmp_path / "copy")
    assert raised.value.reason == "missing"


def test_names_of_files_of_their_own_are_not_split() -> None:
    assert split_uri("/data/a.tar") is None
    assert split_uri("/data/a!/b.jpg") is None
    assert split_uri("s3://b/a.tar!/c/d.jpg") == ("s3://b/a.tar", "c/d.jpg")
    assert split_uri("s3://b/a.tar!/c.tar!/d.jpg") == ("s3://b/a.tar", "c.tar!/d.jpg")
