"""The command line as a user meets it: what is printed, which exit code, and that bad input never ends in a traceback.

Commands run inside this process, since the import costs a second; one runs as users run it.
"""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextvid.command_line import EXAMPLES, app
from nextvid.config.project import Project
from nextvid.train.run import find_run
from nextvid.trainset.order import listed_draws
from storage.errors import (
    ConfigError,
    ConflictError,
    CorpusError,
    DamagedError,
    MediaError,
    NExTVidError,
    RefusedError,
    StoreError,
    TableError,
    UnwritableError,
    UpstreamError,
    exit_code,
)
from storage.schemas import Media
from storage.store import LatentStore
from storage.tables import read_table
from tests.factories import Corpus, flip, write_autoencoder, write_settings
from tests.nextvid.conftest import Command
from tests.nextvid.corpus.small_media import write_picture
from tests.nextvid.tiny_project import RECIPE, uri_of
from tests.nextvid.train.corpus import make_project
from tests.nextvid.train.tiny import tiny_recipe

FILMS = "films.000000"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Four clips wanted, two of them encoded."""
    made = Corpus(tmp_path)
    films = made.rows(FILMS, 4)
    made.clips(FILMS, films)
    made.encode(FILMS, films[:2], encode_s=0.5)
    return made


def write_yaml(folder: Path, **changes: Any) -> str:
    """corpus.yaml over the folder `stills` beside it."""
    settings: dict[str, Any] = {
        "datasets": {"stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]}},
        "encoding": {"autoencoder": "autoencoder", "resolution": 16},
    }
    return str(write_settings(folder, **settings | changes))


def broken_pictures(folder: Path, count: int = 2) -> None:
    (folder / "stills").mkdir()
    for number in range(count):
        (folder / "stills" / f"{number}.jpg").write_bytes(b"no picture at all" * number)


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ConfigError(""), 2), (CorpusError(""), 2), (UpstreamError(""), 3), (DamagedError(""), 4),
            (TableError(""), 4), (RefusedError(""), 1), (ConflictError(""), 1), (OSError(errno.ENOSPC, ""), 5),
            (UnwritableError(""), 5), (StoreError(""), 1), (MediaError("", ""), 1), (NExTVidError(""), 1),
        ],
    )  # fmt: skip
    def test_each_kind_of_error_has_one(self, error: Any, code: int) -> None:
        assert exit_code(error) == code

    def test_as_users_run_it(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "nextvid", "plan", "--corpus", str(tmp_path / "none.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("config: ")
        assert "none.yaml: there is no corpus.yaml" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_a_reader_that_closes_early_is_no_error(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)  # as `nextvid --help | head -0` does
        done = subprocess.run(
            [sys.executable, "-m", "nextvid", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")

    @pytest.mark.parametrize(
        "wrong", [["plann"], ["make", "nothing"], ["make", "media", "--batches", "x"], ["withdraw"]]
    )
    def test_a_wrong_command_is_2(self, nextvid: Command, wrong: list[str]) -> None:
        assert nextvid(*wrong)[0] == 2


class TestPlan:
    def test_rows_bytes_and_seconds(self, nextvid: Command, corpus: Corpus) -> None:
        code, said, _ = nextvid("plan", "--corpus", str(corpus.project.path))
        assert code == 0
        assert "films.000000: 2 rows (2 new file), 2 kept, 0 orphaned" in said
        assert "1.0 device-s" in said

    def test_another_encoding_is_used_once_it_is_accepted(self, nextvid: Command, corpus: Corpus) -> None:
        where = ("--corpus", str(corpus.project.path))
        assert nextvid("plan", "--accept", *where)[0] == 0
        corpus.configure(encoding={"autoencoder": str(corpus.autoencoder), "resolution": 32})
        assert json.loads(nextvid("plan", "--json", *where)[1])["outdated"] == ["encoding"]
        assert "outdated" in nextvid("plan", *where)[1]
        found = json.loads(nextvid("plan", "--accept", "--json", *where)[1])
        assert (found["outdated"], found["now"][0]["rows"], found["now"][0]["encode_s"]) == ([], 4, None)
        (path,) = Path(corpus.project.root.notices()).iterdir()
        notice = json.loads(path.read_text())
        assert (notice["what"], notice["rows"]["latents"]) == ("accepted: encoding", 4)

    def test_making_says_what_waits(self, nextvid: Command, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nextvid.commands.make", lambda project, request: iter(()))
        where = ("--corpus", str(corpus.project.path))
        assert nextvid("plan", "--accept", *where)[0] == 0
        assert nextvid("make", "clips", *where) == (0, "", "")
        corpus.configure(encoding={"autoencoder": str(corpus.autoencoder), "resolution": 32})
        code, _, said = nextvid("make", "clips", *where)
        assert code == 0
        assert "differs from the accepted encoding; the accepted one was used" in said

    def test_a_batch_that_is_not_there_is_3(self, nextvid: Command, corpus: Corpus) -> None:
        code, _, said = nextvid("plan", "--batch", "films.000009", "--corpus", str(corpus.project.path))
        assert code == 3
        assert "films.000009" in said


class TestStores:
    def test_a_sound_store_a_damaged_one_and_none(self, nextvid: Command, corpus: Corpus) -> None:
        where = ("--corpus", str(corpus.project.path))
        assert nextvid("verify", *where)[0] == 0
        (store,) = LatentStore.every(corpus.project.root)
        path = Path(store.part(FILMS, 4, 0).shard_path(0))
        flip(path, 0)
        code, said, _ = nextvid("verify", *where)
        assert code == 4
        assert f"{path}, row " in said
        for found in Path(corpus.project.root.folder("latents")).iterdir():
            (found / "spec.json").write_text("{}")
        assert nextvid("verify", *where)[0] == 4

    def test_no_store_is_3(self, nextvid: Command, tmp_path: Path) -> None:
        code, _, said = nextvid("verify", "--corpus", write_yaml(tmp_path))
        assert code == 3
        assert "nextvid make latents" in said

    def test_a_sweep_is_a_plan_until_yes(self, nextvid: Command, corpus: Corpus) -> None:
        where = ("--corpus", str(corpus.project.path))
        corpus.clips(FILMS, [corpus.row(FILMS, i) for i in (2, 3)])
        (store,) = LatentStore.every(corpus.project.root)
        path = Path(store.part(FILMS, 4, 0).shard_path(0))
        code, said, _ = nextvid("sweep", *where)
        assert (code, path.exists()) == (0, True)
        assert f"would be deleted  {path}" in said
        found = json.loads(nextvid("sweep", "--yes", "--json", *where)[1])
        assert (found["done"], [shard["path"] for shard in found["deleted"]], path.exists()) == (
            True,
            [str(path)],
            False,
        )


class TestRuns:
    def test_a_withdrawal_is_a_plan_until_yes(self, nextvid: Command, own_copy: Project) -> None:
        where = ("--corpus", str(own_copy.path))
        code, said, _ = nextvid("withdraw", uri_of(3), *where)
        assert (code, Path(own_copy.root.withdrawn()).exists()) == (0, False)
        assert "would be withdrawn" in said
        assert json.loads(nextvid("withdraw", uri_of(3), "--yes", "--json", *where)[1])["done"]
        assert nextvid("verify", *where)[0] == 0
        code, _, said = nextvid("withdraw", "/nowhere/else.mp4", "--yes", *where)
        assert (code, "is no run, checkpoint" in said) == (2, True)

    def test_reading_what_was_made(self, nextvid: Command, evaluated: Project, tmp_path: Path) -> None:
        where, run = ("--corpus", str(evaluated.path)), find_run(evaluated, RECIPE).id
        assert "0 fields differ" in nextvid("compare", run, run, *where)[1]
        assert json.loads(nextvid("lineage", run, "--json", *where)[1])["kind"] == "run"
        assert nextvid("compare", run, "none", *where)[0] == 2
        assert nextvid("export", run, str(tmp_path / "out"), *where)[0] == 0
        assert (tmp_path / "out" / "config.json").is_file()
        code, _, said = nextvid("export", run, str(tmp_path / "out"), *where)
        assert (code, "exists already" in said) == (1, True)

    def test_no_trainset_is_3(self, nextvid: Command, tmp_path: Path) -> None:
        code, _, said = nextvid("draws", "--corpus", write_yaml(tmp_path))
        assert code == 3
        assert "make 'trainset' first" in said

    def test_draws(self, nextvid: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made, where = make_project(tmp_path), ("--recipe", "tiny", "--corpus", str(tmp_path / "corpus.yaml"))
        monkeypatch.setattr(
            "nextvid.config.project.recipe_by_name", lambda name, _: tiny_recipe(name, steps=(240, 3, 3, 20))
        )
        code, out, said = nextvid("draws", "--first", "1000", "--json", *where)
        assert (code, said) == (0, "")
        found = [json.loads(line) for line in out.splitlines()]
        assert [one["draw"] for one in found] == list(range(1000))
        assert found == list(listed_draws(made, "tiny", range(1000)))
        code, out, said = nextvid("draws", "--start", "1020", *where)
        assert out.splitlines()[0].startswith("draw=1020  dataset=")
        assert (code, len(out.splitlines()), said) == (0, 4, "training makes 1024 draws, the last is number 1023\n")

    def test_draws_whose_masks_hang_on_the_step(
        self, nextvid: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_project(tmp_path)
        monkeypatch.setattr("nextvid.config.project.recipe_by_name", lambda name, _: tiny_recipe(name, keep="bucket"))
        code, out, said = nextvid("draws", "--recipe", "tiny", "--corpus", str(tmp_path / "corpus.yaml"))
        assert (code, "mask" in out) == (0, False)
        assert said == "masks depend on the step too (masks.keep: bucket) and are not shown\n"

    @pytest.mark.parametrize("wrong", [("--first", "0"), ("--first", "-5"), ("--start", "-1")])
    def test_draws_that_cannot_be(self, nextvid: Command, tmp_path: Path, wrong: tuple[str, str]) -> None:
        code, _, said = nextvid("draws", *wrong, "--corpus", write_yaml(tmp_path))
        assert code == 2
        assert "ask for one draw or more, counted from 0" in said

    def test_a_batch_that_nobody_knows_is_2(self, nextvid: Command, corpus: Corpus) -> None:
        code, out, said = nextvid("verify", "--batch", "typo.000000", "--corpus", str(corpus.project.path))
        assert (code, out) == (2, "")
        assert "typo.000000" in said

    def test_a_file_that_is_no_checkpoint_is_2(self, nextvid: Command, tmp_path: Path) -> None:
        (tmp_path / "a.pt").write_bytes(b"no checkpoint")
        code, _, said = nextvid("import-vavae", str(tmp_path / "a.pt"), str(tmp_path / "out"))
        assert code == 2
        assert "not readable as a checkpoint: torch.save writes zip archives, and this is none" in said
        assert nextvid("import-vavae", str(tmp_path / "none.pt"), str(tmp_path / "out"))[0] == 2
        assert not (tmp_path / "out").exists()


class TestBadInput:
    def test_a_misspelt_key_names_the_nearest(self, nextvid: Command, tmp_path: Path) -> None:
        encoding = {"autoencoder": "autoencoder", "resolutoin": 16}
        code, _, said = nextvid("make", "media", "--corpus", write_yaml(tmp_path, encoding=encoding))
        assert code == 2
        assert "unknown key 'encoding.resolutoin'; did you mean 'resolution'?" in said

    def test_a_missing_folder_is_named(self, nextvid: Command, tmp_path: Path) -> None:
        code, _, said = nextvid("make", "media", "--corpus", write_yaml(tmp_path))
        assert code == 2
        assert f"dataset stills: {tmp_path / 'stills'} is not a folder" in said

    def test_a_missing_autoencoder_is_named(self, nextvid: Command, tmp_path: Path) -> None:
        code, _, said = nextvid("plan", "--corpus", write_yaml(tmp_path))
        assert code == 2
        assert str(tmp_path / "autoencoder") in said

    def test_an_empty_folder_is_an_error_where_something_is_to_be_made(self, nextvid: Command, tmp_path: Path) -> None:
        (tmp_path / "stills").mkdir()
        code, said, error = nextvid("make", "media", "--corpus", write_yaml(tmp_path))
        assert code == 2
        assert "no dataset holds a video or image" in error
        assert "sources" in said  # the listing itself went well

    def test_only_broken_files_are_rows_and_a_failed_check(self, nextvid: Command, tmp_path: Path) -> None:
        broken_pictures(tmp_path)
        code, said, error = nextvid("make", "clips", "--corpus", write_yaml(tmp_path))
        assert code == 3
        assert "2 quarantined" in said
        assert "quarantined_within_budget (share=1.0, quarantined=2, budget=0.05)" in error
        rows = read_table(str(tmp_path / "root" / "media" / "stills.000000.parquet"), Media)
        assert rows["status"].to_list() == ["quarantined"] * 2
        assert rows["reason"].null_count() == 0

    @pytest.mark.parametrize(
        "how",
        [
            pytest.param("mode", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads it whatever its mode")),
            "loop",
        ],
    )
    def test_an_unreadable_file_is_a_row(self, nextvid: Command, tmp_path: Path, how: str) -> None:
        path = tmp_path / "stills" / "a.jpg"
        write_picture(path, "a")
        if how == "mode":
            path.chmod(0)
        else:
            path.unlink()
            path.symlink_to("a.jpg")  # to itself: opening it is an error, for root too
        assert nextvid("make", "media", "--corpus", write_yaml(tmp_path))[0] == 3
        rows = read_table(str(tmp_path / "root" / "media" / "stills.000000.parquet"), Media)
        assert rows.select("status", "reason").rows() == [("quarantined", "unreadable")]

    def test_a_trainset_of_nothing_is_3_and_says_why(self, nextvid: Command, tmp_path: Path) -> None:
        """Every file is broken and the budget allows it: all steps pass, and nothing is left to train on."""
        broken_pictures(tmp_path)
        write_autoencoder(tmp_path / "autoencoder")
        stills = {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}], "quarantine_budget": 1.0}
        code, _, said = nextvid("make", "trainset", "--corpus", write_yaml(tmp_path, datasets={"stills": stills}))
        assert code == 3
        assert said.startswith("upstream: no row of stills.000000 is encoded: no clip was cut")

    def test_a_full_disk_is_5_and_leaves_what_stood(
        self, nextvid: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_picture(tmp_path / "stills" / "a.jpg", "a")
        where = ("--corpus", write_yaml(tmp_path))
        assert nextvid("make", "media", *where)[0] == 0
        write_picture(tmp_path / "stills" / "b.jpg", "b")
        before = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}

        def full(path: Path, data: bytes) -> None:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with monkeypatch.context() as patched:
            patched.setattr("storage.atomic._write", full)
            code, _, said = nextvid("make", "media", *where)
        assert code == 5
        assert re.match(r"unwritable: \S+ cannot be written: its disk is full \(.*Make room there", said)
        assert {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()} == before
        assert nextvid("make", "media", *where)[0] == 0
        assert read_table(str(tmp_path / "root" / "media" / "stills.000000.parquet"), Media).height == 2


def test_every_command_s_help_ends_with_an_example(nextvid: Command) -> None:
    assert set(EXAMPLES) == set(app._subcommands)
    for name, example in EXAMPLES.items():
        assert example.split()[:2] == ["nextvid", name]
        assert nextvid(name, "--help")[1].rstrip().endswith(f"example:\n  {example}")
    assert "example" not in nextvid("--help")[1]
