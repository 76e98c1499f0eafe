"""A row's frames are a function of its file and times; a file that breaks this loses its rows, and no other does."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextvid.config.project import Project
from nextvid.encode import frames as decoding_frames
from nextvid.encode.frames import Decoding
from nextvid.encode.latents import make_latents
from nextvid.encode.plan import accepted_spec, plan_encode, wanted_clips
from nextvid.making.outcome import line
from nextvid.trainset.selection import rows_of
from nextvid.video.probe import probe
from storage.schemas import Clips, Duplicates
from storage.store import LatentStore, PixelStore
from storage.tables import require_checks
from tests.factories import clip_row, publish_clips
from tests.nextvid.encode.lying import Lie, decode_lying
from tests.nextvid.encode.small_corpus import FILMS, begin, stored
from tests.nextvid.encode.small_corpus import films as films_of
from tests.nextvid.video import film

FPS, COUNT, SIDE = 24, 96, 32
WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "closed groups": ("a.mp4", lambda p: film.write_barcodes(p, COUNT, options=film.X264_CLOSED)),
    "open groups": ("b.mp4", lambda p: film.write_barcodes(p, COUNT, options=film.X264_OPEN)),
    "open groups, HEVC": ("c.mkv", lambda p: film.write_barcodes(p, COUNT, codec="libx265", options=film.X265_OPEN)),
    "transport stream": ("d.ts", lambda p: film.write_barcodes(p, COUNT, options=film.X264_OPEN)),
    "MPEG-4 in AVI": ("e.avi", lambda p: film.write_barcodes(p, COUNT, codec="mpeg4", bframes=2)),
    "cut within a group": (
        "f.mp4",
        lambda p: film.write_cut(film.write_barcodes(p.with_name("whole.mp4"), COUNT, options=film.X264_CLOSED), p, 17),
    ),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {name: write(folder / file) for name, (file, write) in WRITERS.items()}


@pytest.fixture(scope="module")
def decoding() -> Iterator[Decoding]:
    with Decoding(1) as opened:
        yield opened


def frames_of(decoding: Decoding, rows: pl.DataFrame) -> dict[bytes, tuple[str | None, bytes | None]]:
    """The reason and the bytes of each row, decoded in one pass."""
    seen = decoding.start(rows, SIDE).collect()
    return {
        row: (one.reason, None if one.frames is None else np.ascontiguousarray(one.frames).tobytes())
        for row, one in seen.items()
    }


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=8)
@given(data=st.data())
def test_rows_alone_and_in_any_company_are_the_same(
    films: dict[str, Path], decoding: Decoding, name: str, data: st.DataObject
) -> None:
    """In company one pass shows the frames of all rows; alone each row begins with a seek. Some times are beyond it."""
    facts = probe(films[name])
    starts = st.lists(st.integers(0, COUNT + 6), min_size=2, max_size=5, unique=True)
    step = data.draw(st.integers(1, 12))
    rows = [
        clip_row(
            films[name],
            0,
            row_id=first.to_bytes(16),
            decoder=facts.decoder,
            times_us=[facts.start_us + (first + step * i) * 1_000_000 // FPS for i in range(4)],
            crop_x=0,
            crop_y=0,
        )
        for first in data.draw(starts)
    ]
    table = pl.DataFrame(rows, schema=Clips.create_empty().schema)
    together = frames_of(decoding, table)
    for number in range(table.height):
        (alone,) = frames_of(decoding, table[number]).items()
        assert together[alone[0]] == alone[1], (name, rows[number]["times_us"])


class TestLyingDecoder:
    """The file of the lowest row id: some of its rows are sampled, and not all of them."""

    @pytest.fixture
    def project(self, tmp_path: Path, cosine_autoencoder: Path) -> Project:
        return begin(tmp_path, cosine_autoencoder, pixels={"quality": 90})

    @pytest.fixture
    def clips(self, project: Project) -> pl.DataFrame:
        return pl.read_parquet(project.root.table("clips", FILMS)).sort("row_id")

    def lie(self, monkeypatch: pytest.MonkeyPatch, clips: pl.DataFrame, lie: Lie, media: bytes | None = None) -> None:
        media = media or clips["media_id"][0]
        rows = clips.filter(pl.col("media_id") == media).height
        monkeypatch.setattr(decoding_frames, "decode", partial(decode_lying, media, rows, lie))

    @pytest.mark.parametrize(
        ("lie", "words"),
        [
            ("other frames", "decoded again, 1 of 4 frames differ, the first is 3"),
            ("corrupt", "decoded once and not again (corrupt)"),
        ],
    )
    def test_costs_the_rows_of_that_file_alone(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, lie: Lie, words: str
    ) -> None:
        self.lie(monkeypatch, clips, lie)
        uri = clips["uri"][0]
        lost = set(clips.filter(pl.col("uri") == uri)["row_id"])
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        assert (outcome.rows, outcome.quarantined) == (clips.height - len(lost), 0)
        spec = accepted_spec(project)
        store = LatentStore(project.root, spec)
        commits = store.commits(FILMS)
        rejected = commits.filter(pl.col("status") == "rejected")
        assert set(rejected["row_id"]) == lost
        assert set(rejected["reason"]) == {f"unstable: {uri}: {words}"}
        assert set(stored(project, FILMS)) == set(clips["row_id"]) - lost
        assert store.verify(FILMS) == []
        (pixels,) = PixelStore.every(project.root)
        assert (
            pixels.commits(FILMS)
            .select("row_id", "status", "reason")
            .sort("row_id")
            .equals(commits.select("row_id", "status", "reason").sort("row_id"))
        )
        check = next(check for check in outcome.checks if check.name == "same_frames")
        assert (check.passed, check.blocking) == (False, False)
        assert f"{uri}: {words}" in check.description
        require_checks(project.root.latents_checks(spec.digest(), FILMS), "latents")
        assert f"left out: {len(lost)} rejected (unstable {len(lost)})" in line(outcome)

    def test_is_not_asked_again(self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lie(monkeypatch, clips, "other frames")
        first = make_latents(project, FILMS)
        assert plan_encode(project, FILMS).rows.is_empty()
        second = make_latents(project, FILMS)
        assert (second.made, second.passed, second.digest) == (False, True, first.digest)
        assert "unstable" in line(second)

    def test_where_the_file_went_meanwhile_the_next_call_tries_again(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            self.lie(patched, clips, "missing")
            outcome = make_latents(project, FILMS)
        lost = clips.filter(pl.col("uri") == clips["uri"][0]).height
        assert outcome.quarantined == lost
        assert outcome.numbers["reason_missing"] == lost
        assert plan_encode(project, FILMS).reasons == {"failed before": lost}
        assert make_latents(project, FILMS).rows == clips.height

    def test_others_are_judged_in_place_of_its_rows(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All sampled rows are of the lying file: rows of the others make the round trip, or nothing would be known."""
        media = clips["media_id"][0]
        media_of = dict(clips.select("row_id", "media_id").iter_rows())
        monkeypatch.setattr(
            "nextvid.encode.pipeline.sampled",
            lambda ids, frames: sorted(ids, key=lambda row: (media_of[row] != media, row))[:3],
        )
        self.lie(monkeypatch, clips, "other frames")
        outcome = make_latents(project, FILMS)
        assert outcome.passed
        assert next(check for check in outcome.checks if check.name == "round_trip").numbers["rows"] == 3

    def test_its_rows_in_later_shards_are_left_out_too(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, small_shards: None
    ) -> None:
        """Four of its six rows are in the first shard, where it shows; in the second it gives the same twice."""
        one, other, _ = films_of(Path(project.path).parent)
        rows = [clip_row(one, index, view) for index in (0, 3, 6) for view in (0, 1)]
        publish_clips(project, FILMS, [*rows, *(clip_row(other, index) for index in (0, 3))])
        monkeypatch.setattr(decoding_frames, "decode", partial(decode_lying, rows[0]["media_id"], 3, "other frames"))
        monkeypatch.setattr("nextvid.encode.pipeline.sampled", lambda ids, frames: sorted(ids)[:2])
        outcome = make_latents(project, FILMS)
        assert (outcome.rows, outcome.numbers["reason_unstable"]) == (2, 6)

    def test_no_row_of_it_is_trained_on(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, small_shards: None
    ) -> None:
        """Those of a shard that was committed before it showed stay in the store, and the trainset leaves them out."""
        one, other, _ = films_of(Path(project.path).parent)
        rows = [clip_row(one, index, view) for index in (0, 3, 6) for view in (0, 1)]
        publish_clips(project, FILMS, rows[:4])
        make_latents(project, FILMS)
        publish_clips(project, FILMS, [*rows, clip_row(other, 0), clip_row(other, 3)])
        monkeypatch.setattr(decoding_frames, "decode", partial(decode_lying, rows[0]["media_id"], 2, "other frames"))
        last = max(rows[4:], key=lambda row: row["row_id"])
        monkeypatch.setattr(
            "nextvid.encode.pipeline.sampled", lambda ids, frames: [r for r in ids if r == last["row_id"]]
        )
        assert make_latents(project, FILMS).rows == 6
        stored = LatentStore(project.root, accepted_spec(project)).commits(FILMS)
        nothing = Duplicates.create_empty()
        kept, lost = rows_of(wanted_clips(project, FILMS), stored, nothing, pl.lit(False), pl.lit(True))
        assert set(kept["uri"]) == {str(other)}
        assert dict(lost.group_by("why").len().iter_rows()) == {"unstable": 6}

    def test_a_batch_of_nothing_else_is_empty_and_in_order(
        self, project: Project, clips: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        media = clips["media_id"][0]
        publish_clips(project, FILMS, clips.filter(pl.col("media_id") == media).to_dicts())
        monkeypatch.setattr(decoding_frames, "decode", partial(decode_lying, media, 4, "other frames"))
        monkeypatch.setattr("nextvid.encode.pipeline.sampled", lambda ids, frames: sorted(ids)[:2])
        outcome = make_latents(project, FILMS)
        assert outcome.rows == 0
        assert outcome.passed
        assert make_latents(project, FILMS).made is False
