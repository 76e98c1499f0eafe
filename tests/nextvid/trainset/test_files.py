"""What was frozen: any byte that changed is found and named, and the remedies that are printed lead to training."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.encode.plan import encoding_spec
from nextvid.lineage.trace import damaged_trainsets
from nextvid.making.outcome import Outcome
from nextvid.trainset.files import new_array, write_array
from nextvid.trainset.trainset import Trainset, make_trainset
from storage import atomic
from storage.errors import ConfigError, DamagedError, UpstreamError
from storage.reader import ADDRESS, RowReader, row_id
from storage.shard_files import shards_of
from storage.store import LatentStore
from storage.tables import write_tables
from storage.verify import Problem
from tests.factories import FRAMES, Corpus, flip
from tests.nextvid.train.corpus import make_project
from tests.storage.stores import in_threads

FILMS, STILLS = "films.000000", "stills.000000"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Two parts of films and one of stills, frozen."""
    made = Corpus(tmp_path)
    films, stills = made.rows(FILMS, 10), made.rows(STILLS, 6)
    made.clips(FILMS, films)
    made.clips(STILLS, stills)
    made.encode(FILMS, films[:5])
    made.encode(FILMS, films[5:])
    made.encode(STILLS, stills)
    made.duplicates()
    assert make_trainset(made.project).made
    return made


def store_of(corpus: Corpus) -> LatentStore:
    return LatentStore(corpus.project.root, encoding_spec(corpus.project))


def folder_of(corpus: Corpus) -> Path:
    return Path(corpus.project.root.pointed("trainset", Trainset.open(corpus.project.root).digest))


def encode_again(corpus: Corpus, missing: list[int]) -> None:
    """What `make latents` does: the same rows have the same bits, in a part of their own."""
    corpus.encode(FILMS, [corpus.row(FILMS, i) for i in missing])


def reads(corpus: Corpus) -> None:
    """Every row of the trainset is there and what it was."""
    opened = Trainset.open(corpus.project.root)
    reader = RowReader(corpus.project.root, opened.spec, opened.batches)
    for frames in opened.lengths:
        for address in opened.rows(frames):
            out = np.empty(opened.spec.row_shape(frames), np.float16)
            reader.read_into(frames, address, out)
            np.testing.assert_array_equal(out, corpus.latents[row_id(address)])


class TestRowsThatMoved:
    def test_a_part_that_was_removed_and_encoded_again(self, corpus: Corpus) -> None:
        """The remedy of a damaged plan: the same trainset, whose addresses are new."""
        before, said = Trainset.open(corpus.project.root), json.loads((folder_of(corpus) / "trainset.json").read_text())
        store = store_of(corpus)
        flip(Path(store.part(FILMS, FRAMES, 0).plan_path), -9)
        (problem,) = store.verify()
        assert isinstance(problem, Problem)
        place = re.search(r"remove (\S+) and make the latents again", problem.remedy)
        assert place is not None
        shutil.rmtree(place.group(1))
        (gone,) = damaged_trainsets(corpus.project.root)
        assert f"{place.group(1)}: trainset {before.digest} cites its shards 0, which are not there" in gone
        encode_again(corpus, list(range(5)))
        assert damaged_trainsets(corpus.project.root) == [gone]  # no trainset was made again yet
        outcome = make_trainset(corpus.project)
        assert (outcome.made, outcome.digest) == (True, before.digest)
        assert outcome.numbers["written because"] == "its rows moved within the store"
        assert damaged_trainsets(corpus.project.root) == []
        reads(corpus)
        now = json.loads((folder_of(corpus) / "trainset.json").read_text())
        assert {name: now[name] for name in ("parent", "mean", "std")} == {
            name: said[name] for name in ("parent", "mean", "std")
        }
        assert not make_trainset(corpus.project).made

    def test_a_damaged_file_is_not_taken_for_rows_that_moved(self, corpus: Corpus) -> None:
        flip(folder_of(corpus) / f"rows.f{FRAMES}.npy", -9)
        with pytest.raises(DamagedError, match=r"rows\.f4\.npy: its bytes differ"):
            make_trainset(corpus.project)
        shutil.rmtree(folder_of(corpus))
        assert make_trainset(corpus.project).made
        reads(corpus)


class TestShards:
    @pytest.mark.parametrize("gone", ["shard and commit", "shard", "part", "batch"])
    def test_what_is_cited_and_not_there_is_named(self, corpus: Corpus, gone: str) -> None:
        part = store_of(corpus).part(FILMS, FRAMES, 1)
        match gone:
            case "part":
                shutil.rmtree(part.path)
            case "batch":
                shutil.rmtree(Path(part.path).parents[1])
            case _:
                Path(part.shard_path(0)).unlink()
        if gone == "shard and commit":
            Path(part.commit_path(0)).unlink()
        said = damaged_trainsets(corpus.project.root)
        assert len(said) == (2 if gone == "batch" else 1)
        assert f"{part.path}: trainset" in said[-1]
        assert "make the latents of batch films.000000 again, then make 'trainset' again" in said[-1]
        assert (f"remove {part.commit_path(0)}" in said[-1]) == (gone == "shard")

    @given(st.lists(st.tuples(*[st.integers(0, top) for top in (2**32 - 1, 2**16 - 1, 2**32 - 1)]), max_size=20))
    def test_each_is_listed_once(self, places: list[tuple[int, int, int]]) -> None:
        rows = np.zeros(2 * len(places), ADDRESS)
        for name, column in zip(("batch", "part", "shard"), zip(*places, strict=True), strict=False):
            rows[name] = [*column, *column]
        found = [(*place, shard) for place, shards in shards_of(rows).items() for shard in shards]
        assert found == sorted(set(places))


class TestHalfThere:
    @pytest.mark.parametrize("name", ["trainset.json", f"rows.f{FRAMES}.npy", "lineage.parquet"])
    def test_what_is_missing_is_written_again(self, corpus: Corpus, name: str) -> None:
        (folder_of(corpus) / name).unlink()
        (said,) = damaged_trainsets(corpus.project.root)
        assert name in said
        assert "make 'trainset' again" in said
        outcome = make_trainset(corpus.project)
        assert outcome.numbers["written because"] == f"{name} were missing"
        assert damaged_trainsets(corpus.project.root) == []
        reads(corpus)
        assert not make_trainset(corpus.project).made

    def test_of_two_at_once_one_writes_and_both_have_it(self, corpus: Corpus) -> None:
        shutil.rmtree(folder_of(corpus))
        outcomes: list[Outcome] = []
        in_threads(lambda _: outcomes.append(make_trainset(corpus.project)), 3)
        assert sorted(outcome.made for outcome in outcomes) == [False, False, True]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("plain"))


class TestSeal:
    @pytest.mark.parametrize(
        "text", ["{}", "[]", '{"seal": null}', '{"seal": "0"}', '{"digest": "\\ud800", "seal": 1}']
    )
    def test_json_that_is_none_of_ours(self, corpus: Corpus, text: str) -> None:
        path = folder_of(corpus) / "trainset.json"
        path.write_text(text)
        with pytest.raises(DamagedError, match=r"trainset\.json .*remove .* and make 'trainset' again"):
            Trainset.open(corpus.project.root)

    def test_another_trainsets(self, corpus: Corpus) -> None:
        root, other = corpus.project.root, "f" * 32
        shutil.copytree(folder_of(corpus), root.pointed("trainset", other))
        with pytest.raises(DamagedError, match="not that of its folder"):
            Trainset.open(root, other)

    def test_nothing_there(self, corpus: Corpus) -> None:
        with pytest.raises(UpstreamError, match="is not whole"):
            Trainset.open(corpus.project.root, "e" * 32)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_bit_of_any_file(self, plain: Project, data: st.DataObject) -> None:
        """Also of those that the tests of training write, by the same function."""
        folder = Path(plain.root.pointed("trainset", Trainset.open(plain.root).digest))
        names = ["trainset.json", "lineage.parquet", *(f"rows.f{frames}.npy" for frames in (1, 4, 8))]
        path = folder / data.draw(st.sampled_from(names))
        good = path.read_bytes()
        bad = bytearray(good)
        bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assume(path.suffix != ".json" or _says(bad) != _says(good))  # 1e0 and 1E0
        path.write_bytes(bad)
        try:
            (said,) = damaged_trainsets(plain.root)
        finally:
            path.write_bytes(good)
        assert str(path) in said
        assert damaged_trainsets(plain.root) == []


def _says(data: bytes | bytearray) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_what_does_not_answer_is_no_damage(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> np.ndarray:
        raise ConfigError("there are no credentials for it")

    monkeypatch.setattr("nextvid.trainset.files.open_rows", refused)
    with pytest.raises(ConfigError, match="credentials"):
        Trainset.open(corpus.project.root).rows(FRAMES)


def test_arrays_are_numpys_own(tmp_path: Path) -> None:
    rows = np.arange(5).astype("<u4").view(np.dtype([("a", "<u2"), ("b", "<u2")]))
    write_array(tmp_path / "ours.npy", rows)
    np.save(tmp_path / "theirs.npy", rows)
    new_array(tmp_path / "mapped.npy", rows.dtype, len(rows))[:] = rows
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def _table(folder: str) -> None:
    import polars as pl

    from storage.schemas import Plan

    ids = [number.to_bytes(16, "big") for number in np.random.default_rng(0).permutation(20_000).tolist()]
    frame = pl.DataFrame({"row_id": ids, "slot": range(20_000)}, schema=Plan.create_empty().schema)
    write_tables(f"{folder}/table.parquet", (frame for _ in range(30)), Plan)


WRITES: dict[str, Callable[[str], object]] = {
    "array": lambda folder: write_array(Path(folder, "a.npy"), np.zeros(1_000_000, ADDRESS)),
    "mapped": lambda folder: new_array(Path(folder, "a.npy"), ADDRESS, 1_000_000),
    "table": _table,
}


def write_here(folder: str) -> None:
    """In a process of its own; says of each write the reason of the system and whether it names a file."""
    for name, write in WRITES.items():
        try:
            with atomic.staged_folder(f"{folder}/staged") as staged:
                write(str(staged))
        except OSError as error:
            left = [path.name for path in Path(folder).iterdir()]
            sys.stdout.write(f"{name} {error.errno} {folder in str(error)} {left}\n")


def test_a_full_disk(tmp_path: Path, repository: Path) -> None:
    """The kernel itself: a file system of 3 MB in a namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces to mount in")
    code = f"from tests.nextvid.trainset.test_files import write_here; write_here({str(tmp_path)!r})"
    mounted = f'mount -t tmpfs -o size=3m tmpfs {tmp_path} && exec "$@"'
    command = [unshare, "-Urm", "sh", "-c", mounted, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    expected = [f"{name} {errno.ENOSPC} True []" for name in WRITES]
    assert (done.returncode, done.stdout.splitlines()[-len(WRITES) :]) == (0, expected), done.stderr
