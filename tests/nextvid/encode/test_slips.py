"""Planted slips: shards made from wrong frames, orders or weights are refused; odd but sound clips pass."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.encode import latents as maker
from nextvid.encode import pipeline as piping
from nextvid.encode import shard
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import DecodedRow
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec, plan_encode
from nextvid.planning.acceptance import ensure_accepted
from storage.errors import RefusedError, StoreError
from storage.store import LatentStore
from storage.tables import read_checks
from tests.factories import clip_row, flip, publish_clips
from tests.nextvid.encode.small_corpus import FILMS, STILLS, begin, stored, texture, write_video


def _exchange(folder: Path) -> None:
    """Other weights of the same size, and the file's times set back."""
    file = folder / "diffusion_pytorch_model.safetensors"
    at = file.stat()
    flip(file, -4)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))


def _late(views: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([v[1:], v[-1:]]) for v in views]


def _crop(views: list[np.ndarray]) -> list[np.ndarray]:
    return [np.roll(v, 8, axis=2) for v in views]


Views = list[np.ndarray]
Rows = Mapping[bytes, DecodedRow]  # of one forward


def _frames_slip(slip: Callable[[Views], Views]) -> Callable[..., Any]:
    """An encoder that is given other frames than those of its rows."""

    def slipped(model: Autoencoder, spec: Any, frames: int, forwards: Iterable[Rows]) -> Any:
        def wrong() -> Iterator[Rows]:
            for seen in forwards:
                views = slip([one.frames for one in seen.values() if one.frames is not None])
                yield {row: DecodedRow(view, 0.0) for row, view in zip(seen, views, strict=True)}

        return shard.encode_rows(model, spec, frames, wrong())

    return slipped


def _channels(model: Autoencoder, spec: Any, frames: int, forwards: Iterable[Rows]) -> Any:
    """An encoder whose latents lose the order of their channels on the way to the store."""
    for rows in shard.encode_rows(model, spec, frames, forwards):
        yield rows._replace(latents=rows.latents[:, :, ::-1])


class TestRoundTrip:
    @pytest.mark.parametrize(
        "slip",
        [
            _frames_slip(_late),
            _frames_slip(_crop),
            _frames_slip(lambda views: [v[:, :, ::-1].copy() for v in views]),
            _frames_slip(lambda views: views[1:] + views[:1]),
            _channels,
        ],
        ids=["one frame late", "crop moved", "flipped", "rows swapped", "channels permuted"],
    )
    def test_shard_made_from_wrong_frames_is_refused(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, slip: Callable[..., Any]
    ) -> None:
        monkeypatch.setattr(piping, "encode_rows", slip)
        with pytest.raises(StoreError, match="round trip"):
            make_latents(project, FILMS)
        spec = accepted_spec(project)
        assert LatentStore(project.root, spec).commits(FILMS).height == 0
        checks = read_checks(project.root.latents_checks(spec.digest(), FILMS))
        assert checks is not None
        assert not checks["passed"]
        monkeypatch.undo()
        assert make_latents(project, FILMS).passed

    def test_a_store_that_does_not_answer_is_no_failed_check(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last verdict is kept: a complete batch is not dropped because of a network."""

        def silent(*_: Any) -> Any:
            raise StoreError("s3://bucket: 6 tries failed")

        monkeypatch.setattr(piping, "encode_rows", silent)
        with pytest.raises(StoreError, match="6 tries failed"):
            make_latents(project, FILMS)
        assert read_checks(project.root.latents_checks(accepted_spec(project).digest(), FILMS)) is None

    def test_two_rows_swapped_are_refused_where_one_of_them_is_sampled(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampled = min(pl.read_parquet(project.root.table("clips", FILMS))["row_id"])

        def swapped(model: Autoencoder, spec: Any, frames: int, forwards: Iterable[Rows]) -> Any:
            def wrong() -> Iterator[Rows]:
                for seen in map(dict, forwards):
                    if sampled in seen:
                        other = next(row for row in seen if row != sampled)
                        seen[sampled], seen[other] = seen[other], seen[sampled]
                    yield seen

            return shard.encode_rows(model, spec, frames, wrong())

        monkeypatch.setattr(piping, "encode_rows", swapped)
        with pytest.raises(StoreError, match=f"round trip of row {sampled.hex()}"):
            make_latents(project, FILMS)

    def test_autoencoder_exchanged_under_the_same_name_encodes_nothing(
        self, tmp_path: Path, cosine_autoencoder: Path
    ) -> None:
        """Between two calls: by the digest, though name, size and modification time are as before."""
        folder = tmp_path / "autoencoder"
        shutil.copytree(cosine_autoencoder, folder)
        project = begin(tmp_path, folder)
        ensure_accepted(project)
        make_latents(project, FILMS)
        before = stored(project, FILMS)
        _exchange(folder)
        with pytest.raises(RefusedError, match="put the old weights back"):
            make_latents(project, STILLS)
        shutil.copytree(cosine_autoencoder, folder, dirs_exist_ok=True)
        assert make_latents(project, STILLS).passed
        after = stored(project, FILMS)
        assert all(np.array_equal(after[row], values) for row, values in before.items())

    def test_autoencoder_exchanged_after_planning_encodes_nothing(
        self, tmp_path: Path, cosine_autoencoder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "autoencoder"
        shutil.copytree(cosine_autoencoder, folder)
        project = begin(tmp_path, folder)
        planned = plan_encode

        def exchanging(*args: Any) -> Any:
            found = planned(*args)
            _exchange(folder)
            return found

        monkeypatch.setattr(maker, "plan_encode", exchanging)
        with pytest.raises(RefusedError, match="changed since this was planned"):
            make_latents(project, FILMS)
        assert not list(Path(project.root.folder("latents")).rglob("commits/*.parquet"))

    def test_symmetric_and_one_frame_clips_pass(self, project: Project, tmp_path: Path) -> None:
        path = tmp_path / "films" / "mirror.mp4"
        half = texture(6)[:, :, :32]
        write_video(path, np.concatenate([half, half[:, :, ::-1]], axis=2))
        one = clip_row(path, 4, times_us=[500_000], frames=1)
        publish_clips(project, FILMS, [clip_row(path, 0), clip_row(path, 2), one])
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        assert outcome.rows == 3
        numbers = next(check for check in outcome.checks if check.name == "round_trip").numbers
        assert numbers["undecidable flipped frames"] == 3

    def test_stills_pass_and_say_that_time_is_undecidable(self, project: Project, tmp_path: Path) -> None:
        path = tmp_path / "films" / "still.mp4"
        write_video(path, texture(5, 1).repeat(24, axis=0))
        publish_clips(project, FILMS, [clip_row(path, 0), clip_row(path, 2)])
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        numbers = next(check for check in outcome.checks if check.name == "round_trip").numbers
        assert numbers["undecidable frames one later"] == 2
