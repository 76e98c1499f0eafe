"""`nextvid features`: rows equal what the encoder says of each clip, bad files are rows, and nothing is done twice."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open

from nextvid.encode.frames import DecodedRow
from nextvid.features import extract
from nextvid.features.encoder import load_encoder
from nextvid.features.output import Output
from tests.nextvid.conftest import Command
from tests.nextvid.corpus.small_media import write_picture
from tests.nextvid.features.exported import export_of_pixels, export_with_autoencoder
from tests.nextvid.train.corpus import make_project
from tests.nextvid.video.film import X264_FAST, barcode, write_film


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(export_of_pixels(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films of 2 s, one of 0.5 s, a picture, and a file that is none."""
    folder = tmp_path_factory.mktemp("media")
    for name, first, count in (("a", 0, 16), ("b", 30, 16), ("short", 0, 4)):
        write_film(folder / f"{name}.mp4", [barcode(first + n) for n in range(count)], fps=8, options=X264_FAST)
    write_picture(folder / "c.jpg", "c")
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("ignored")
    return folder


@pytest.fixture
def own(media: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(media, tmp_path / "own"))


def rows_of(out: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(out).filter(pl.col("path").str.ends_with(name)).sort("start_us")


def test_rows_are_the_features_of_each_clip_and_bad_files_are_rows(
    nextvid: Command, encoder: str, media: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    code, said, _ = nextvid("features", str(media), "--encoder", encoder, "--out", str(out), "--every", "0.5")
    assert code == 3
    assert said.startswith("7 clips of 5 files, 2 failed; 0 files were there before\n")
    assert said.count("\nfailed: ") == 2, "each with its reason"
    loaded = load_encoder(encoder)
    for name in ("a.mp4", "b.mp4", "c.jpg"):
        with torch.no_grad():
            wanted = loaded(loaded.clips(media / name, every_s=0.5)).mean(dim=1)
        found = rows_of(out, name)
        np.testing.assert_allclose(found["vector"].to_numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)
    times = rows_of(out, "a.mp4").select("start_us", "end_us").rows()
    assert times == [(first, first + 750_000) for first in (0, 500_000, 1_000_000)]
    table = pl.read_parquet(out)
    assert table.columns[:3] == ["path", "start_us", "end_us"]
    bad = table.filter(pl.col("status") != "ok").sort("path")
    assert bad.select("status", "reason", "vector", "start_us").rows() == [
        ("quarantined", "unknown_format", None, None),
        ("quarantined", "too_short", None, None),
    ]
    assert "0.50 s are shorter than a clip of 4 frames" in bad["error"][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


def test_run_again_it_does_what_is_missing(nextvid: Command, encoder: str, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    command = ("features", str(own), "--encoder", encoder, "--out", str(out), "--pool", "tubelet", "--json")
    for name in ("b.mp4", "short.mp4"):
        (own / name).rename(tmp_path / name)
    assert nextvid(*command)[0] == 3
    before = rows_of(out, "a.mp4")
    (tmp_path / "b.mp4").rename(own / "b.mp4")
    shutil.copy(own / "a.mp4", own / "bad.mp4")
    code, said, _ = nextvid(*command)
    assert code == 0
    counts = json.loads(said)
    assert (counts["counts"]["files"], counts["counts"]["failed"], counts["present"]) == (2, 0, 2)
    assert rows_of(out, "a.mp4").equals(before)
    assert rows_of(out, "bad.mp4")["vector"].equals(before["vector"])
    assert pl.read_parquet(out).height == 4
    assert json.loads(nextvid(*command)[1])["counts"]["files"] == 0
    code, _, said = nextvid(*command, "--fps", "8")
    assert code == 1
    assert said.startswith("refused: ")
    assert "was made with other settings (fps 4.0)" in said
    assert len(said.splitlines()) == 1


def test_what_was_done_before_a_crash_is_not_done_again(
    nextvid: Command, encoder: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npz"
    command = ("features", str(media), "--encoder", encoder, "--out", str(out), "--batch", "1", "--json")
    add = Output.add
    added: list[str] = []

    def crash_at_the_second(*arguments: Any) -> None:
        if added:
            raise OSError(28, "No space left on device")
        add(*arguments)
        added.append("one")

    with monkeypatch.context() as patched:
        patched.setattr(extract, "KEPT_S", 0.0)
        patched.setattr(Output, "add", crash_at_the_second)
        assert nextvid(*command)[0] == 5
    assert not out.exists()
    code, _, said = nextvid(*command, "--fps", "8")
    assert code == 1
    assert "out.npz.parts was made with other settings" in said
    found = json.loads(nextvid(*command)[1])
    assert (found["counts"]["files"], found["present"]) == (4, 1)
    with np.load(out, allow_pickle=False) as file:
        assert sorted(name.rpartition("/")[2] for name in file["path"]) == [
            "a.mp4",
            "b.mp4",
            "bad.mp4",
            "c.jpg",
            "short.mp4",
        ]
        ok = file["status"] == "ok"
        assert file["vector"].shape == (5, 24)
        assert np.isnan(file["vector"][~ok]).all()
        assert np.isfinite(file["vector"][ok]).all()
        assert set(file["reason"][~ok]) == {"unknown_format", "too_short"}


def test_urls_latents_safetensors_and_every_token(nextvid: Command, media: Path, tmp_path: Path) -> None:
    folder, out = export_with_autoencoder(tmp_path), tmp_path / "out.safetensors"
    fsspec.filesystem("memory").pipe_file("/features/b.mp4", (media / "b.mp4").read_bytes())
    url, here = "memory://features/b.mp4", str(media / "c.jpg")
    command = ("features", url, here, "--encoder", str(folder), "--out", str(out), "--pool", "none")
    code, _, said = nextvid(*command)
    assert code == 0, said
    assert nextvid(*command)[1].startswith("0 clips of 0 files, 0 failed; 2 files were there before")
    with safe_open(out, "np") as file:
        vectors, paths = file.get_tensor("vector"), json.loads(file.metadata()["columns"])["path"]
    loaded = load_encoder(folder)
    for source, vector in zip(paths, vectors, strict=True):
        wanted = loaded(loaded.clips(source)).reshape(2, 16, 24)
        np.testing.assert_allclose(vector, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ({"--encoder": "nowhere"}, 3, "upstream: nowhere is no folder; 'nextvid export RUN FOLDER' writes one"),
        ({"--encoder": "empty"}, 3, "upstream: empty has no exported encoder: config.json is missing; 'nextvid export"),
        ({"--out": "out.csv"}, 2, "the ending must be one of .parquet, .npz, .safetensors"),
        ({"--out": "notes.npz"}, 2, "is not a file that 'nextvid features' wrote"),
        ({"--out": "notes.parquet"}, 2, "is not a file that 'nextvid features' wrote"),
        ({"--fps": "4", "--stride": "2"}, 2, "give one of them"),
        ({"--frames": "3"}, 1, "whole tubelets of 2"),
        ({"--layer": "7"}, 1, "layers 0 to 1"),
        ({"--batch": "0"}, 2, "must be at least 1"),
        ({"PATH": "gone"}, 2, "gone: there is no such file or folder"),
        ({"PATH": "empty"}, 2, "no video or image is there"),
    ],
    ids=str,
)
def test_bad_requests_are_one_line(
    nextvid: Command, encoder: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    more: dict[str, str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("notes.npz", "notes.parquet"):
        (tmp_path / name).write_text("notes")
    options = {"PATH": str(media), "--encoder": encoder, "--out": "out.parquet"} | more
    path = options.pop("PATH")
    found, _, said = nextvid("features", path, *(word for option in options.items() for word in option))
    assert (found, len(said.splitlines())) == (code, 1), said
    assert message in said


def test_a_newer_format_and_no_permission_are_one_line(
    nextvid: Command, encoder: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Path(shutil.copytree(encoder, tmp_path / "newer"))
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format": 2}))
    picture = str(media / "c.jpg")
    code, _, said = nextvid("features", picture, "--encoder", str(newer), "--out", str(tmp_path / "out.npz"))
    assert (code, len(said.splitlines())) == (2, 1)
    assert "format 2, and this version reads 1" in said
    code, _, said = nextvid("features", picture, "--encoder", encoder, "--out", "/proc/out.npz")
    assert (code, len(said.splitlines())) == (5, 1), said


def test_an_image_has_no_stride(nextvid: Command, encoder: str, media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    command = ("features", str(media / "c.jpg"), "--encoder", encoder, "--out", str(out), "--stride", "2")
    assert nextvid(*command)[0] == 3
    assert rows_of(out, "c.jpg")["reason"].to_list() == ["no_rate"]


def test_an_encoder_of_latents_without_autoencoder_is_refused(nextvid: Command, media: Path, tmp_path: Path) -> None:
    from tests.nextvid.features.exported import export

    folder = export(make_project(tmp_path), tmp_path / "encoder")
    code, _, said = nextvid("features", str(media), "--encoder", str(folder), "--out", str(tmp_path / "out.npz"))
    assert (code, len(said.splitlines())) == (1, 1)
    assert "reads latents and has no autoencoder" in said


@pytest.mark.faults
def test_a_kill_costs_no_row_that_was_kept(nextvid: Command, encoder: str, media: Path, tmp_path: Path) -> None:
    """Killed (SIGKILL) as soon as there is a part: the next call finishes, with the rows of an undisturbed one."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        shutil.copy(media / "a.mp4", folder / f"{number:02d}.mp4")
    out = tmp_path / "out.parquet"
    words = ["features", str(folder), "--encoder", encoder, "--out", str(out), "--batch", "1"]
    code = (
        "import sys; from nextvid.features import extract; from nextvid.commands import main; extract.KEPT_S = 0.0; "
        f"sys.argv = ['nextvid', *{words!r}]; main()"
    )
    running = subprocess.Popen([sys.executable, "-c", code])
    parts = out.with_name("out.parquet.parts")
    while not list(parts.glob("*.parquet")):
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    kept = pl.concat(pl.read_parquet(part) for part in parts.glob("*.parquet"))
    code_, said, _ = nextvid(*words, "--json")
    assert code_ == 0
    assert json.loads(said)["counts"]["files"] == 40 - kept.height > 0
    found = pl.read_parquet(out).sort("path")
    assert found["path"].n_unique() == found.height == 40
    vectors = found["vector"].to_numpy()
    np.testing.assert_allclose(vectors, vectors[:1].repeat(40, axis=0), rtol=1e-5)


@pytest.mark.faults
def test_two_processes_give_the_same_rows(nextvid: Command, encoder: str, media: Path, tmp_path: Path) -> None:
    command = ("features", str(media), "--encoder", encoder, "--every", "0.5", "--out")
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert nextvid(*command, str(one))[0] == nextvid(*command, str(two), "--ranks", "2", "--device", "cpu")[0] == 3
    first, second = (pl.read_parquet(path).sort("path", "start_us") for path in (one, two))
    assert first.drop("vector").equals(second.drop("vector"))
    ok = first["status"] == "ok"
    np.testing.assert_allclose(
        first.filter(ok)["vector"].to_numpy(), second.filter(ok)["vector"].to_numpy(), rtol=1e-4, atol=1e-5
    )


def test_help_ends_with_an_example_that_runs(
    nextvid: Command, encoder: str, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder, "encoder")
    Path("videos").mkdir()
    shutil.copy(media / "c.jpg", "videos")
    words = nextvid("features", "--help")[1].splitlines()[-1].split()
    assert words[0] == "nextvid"
    assert nextvid(*words[1:])[0] == 0
    assert Path("features.parquet").is_file()


class SlowProbes:
    """Decoding whose probes end one by one, and which notes what it was asked to decode."""

    workers = 1

    def __init__(self) -> None:
        self.probes: list[Future[str]] = []
        self.begun: list[str] = []

    def inspect(self, uri: str) -> Future[str]:
        self.probes.append(Future())
        if len(self.probes) == 1:
            self.probes[0].set_result(uri)
        return self.probes[-1]

    def start(self, rows: pl.DataFrame, resolution: int) -> "SlowProbes":
        self.begun.append(rows["uri"][0])
        return self

    def take(self, rows: list[bytes]) -> dict[bytes, DecodedRow]:
        return {row: DecodedRow(np.zeros((1, 1, 1, 3), np.uint8), 0.0) for row in rows}


class TwoClips:
    def rows(self, uri: str, found: str) -> pl.DataFrame:
        return pl.DataFrame({"uri": [uri, uri], "row_id": [b"1", b"2"], "times_us": [[0], [1]]})


def test_the_next_file_is_begun_as_soon_as_it_is_probed() -> None:
    """Else the decoders would wait while an encoder is busy with the clips of a long film."""
    slow: Any = SlowProbes()
    windows: Any = TwoClips()
    clips = extract.shown(slow, [extract.SourceFile(name, "") for name in "ab"], windows, 1)
    assert (next(clips).last, slow.begun) == (False, ["a"])
    slow.probes[1].set_result("b")
    assert (next(clips).last, slow.begun) == (True, ["a", "b"])
    assert [(clip.file.uri, clip.last) for clip in clips] == [("b", False), ("b", True)]
