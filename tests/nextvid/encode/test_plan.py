"""Planning: the spec says what decides bytes and nothing else; rows wanted are the ok rows with a use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvid.config.accepted import accept
from nextvid.config.project import Project
from nextvid.encode.plan import accepted_spec, encoding_spec, open_parts, plan_encode, wanted_clips
from storage.errors import ConfigError, RefusedError, UpstreamError
from storage.part import LatentPart
from storage.store import LatentStore, Store
from tests.factories import clip_row, commits, publish_clips, put_latents
from tests.nextvid.encode.small_corpus import F, write_corpus

FILMS = "films.000000"


@pytest.fixture
def project(tmp_path: Path, random_autoencoder: Path) -> Project:
    return write_corpus(tmp_path, random_autoencoder)


def rows_of(folder: Path, count: int) -> list[dict[str, object]]:
    """Clips of files that need not exist: planning opens none."""
    return [clip_row(folder / "films" / f"{i // 2}.mp4", i, media_id=bytes([i // 2] * 16)) for i in range(count)]


def commit(project: Project, batch: str, rows: list[bytes], failed: int = 0) -> None:
    """A finished part; its last `failed` rows have failed."""
    spec = encoding_spec(project)
    latents = dict.fromkeys(rows, np.ones(spec.row_shape(F), np.float32))
    put_latents(LatentStore(project.root, spec), batch, F, latents, rows[len(rows) - failed :])


class TestSpec:
    def test_shape_follows_from_the_autoencoder(self, project: Project) -> None:
        spec = encoding_spec(project)
        assert (spec.channels, spec.height, spec.width, spec.resolution) == (8, 8, 8, 64)
        assert spec.resize == "bicubic"

    @pytest.mark.parametrize("change", [{"precision": "bf16"}, {"posterior": "sample"}, {"storage": "int8"}])
    def test_what_decides_bytes_is_in_it(
        self, tmp_path: Path, random_autoencoder: Path, change: dict[str, str]
    ) -> None:
        one = encoding_spec(write_corpus(tmp_path / "a", random_autoencoder))
        other = encoding_spec(write_corpus(tmp_path / "b", random_autoencoder, **change))
        assert one.digest() != other.digest()

    def test_how_it_is_computed_is_not(self, tmp_path: Path, random_autoencoder: Path) -> None:
        one = encoding_spec(write_corpus(tmp_path / "a", random_autoencoder))
        other = encoding_spec(write_corpus(tmp_path / "b", random_autoencoder, batch_frames=3, device="auto"))
        assert one == other

    def test_resolution_that_no_cell_divides_is_refused(self, tmp_path: Path, random_autoencoder: Path) -> None:
        with pytest.raises(ConfigError, match="no multiple of 8"):
            encoding_spec(write_corpus(tmp_path, random_autoencoder, resolution=60))

    def test_accepted_spec_stays_until_another_is_accepted(
        self, project: Project, tmp_path: Path, random_autoencoder: Path
    ) -> None:
        old = encoding_spec(project)
        LatentStore(project.root, old).create()
        accept(project.root, project.asked, old.digest(), {})
        asked = write_corpus(tmp_path, random_autoencoder, resolution=128)
        assert encoding_spec(asked) != old
        assert accepted_spec(asked) == old

    def test_accepted_spec_of_other_weights_is_refused(
        self, project: Project, tmp_path: Path, cosine_autoencoder: Path
    ) -> None:
        old = encoding_spec(project)
        LatentStore(project.root, old).create()
        accept(project.root, project.asked, old.digest(), {})
        with pytest.raises(RefusedError, match="put the old weights back, or accept"):
            accepted_spec(write_corpus(tmp_path, cosine_autoencoder))


class TestPlan:
    def test_only_ok_rows_with_a_use_are_wanted(self, project: Project, tmp_path: Path) -> None:
        rows = rows_of(tmp_path, 4)
        rows[1] |= {"status": "rejected", "reason": "still"}
        rows[2] |= {"uses": []}
        publish_clips(project, FILMS, rows)
        assert set(wanted_clips(project, FILMS)["row_id"]) == {rows[0]["row_id"], rows[3]["row_id"]}
        assert plan_encode(project, FILMS).rows.height == 2

    def test_reasons_kept_and_orphans_add_up(self, project: Project, tmp_path: Path) -> None:
        rows = rows_of(tmp_path, 8)
        ids = [row["row_id"] for row in rows]
        publish_clips(project, FILMS, rows)
        assert plan_encode(project, FILMS).reasons == {"new encoding": 8}
        commit(project, FILMS, [b"o" * 16, *ids[:3], ids[4]], failed=1)  # type: ignore[list-item]
        plan = plan_encode(project, FILMS)
        assert plan.kept == 3
        assert plan.orphaned == (b"o" * 16,)
        # row 3 shares its file with row 2, row 4 failed, rows 5 to 7 are of files that have no row yet
        assert plan.reasons == {"new view": 1, "failed before": 1, "new file": 3}
        assert plan.rows.height + plan.kept == 8

    def test_rows_of_a_file_stand_side_by_side(self, project: Project, tmp_path: Path) -> None:
        publish_clips(project, FILMS, rows_of(tmp_path, 9))
        uris = plan_encode(project, FILMS).rows["uri"].to_list()
        assert uris == sorted(uris)

    def test_groups_by_frames(self, project: Project, tmp_path: Path) -> None:
        rows = rows_of(tmp_path, 3)
        rows[2] |= {"frames": 2, "times_us": [0, 1]}
        publish_clips(project, FILMS, rows)
        assert {frames: found.height for frames, found in plan_encode(project, FILMS).by_frames.items()} == {2: 1, F: 2}

    def test_missing_clips_are_named(self, project: Project) -> None:
        with pytest.raises(UpstreamError, match="clips"):
            plan_encode(project, FILMS)


def write(part: LatentPart, failed: list[bytes]) -> None:
    """Commit what a part lacks."""
    for number in (number for number in range(part.shards) if not part.committed(number)):
        planned = part.rows_of(number)
        part.write_shard(
            number, np.ones((planned.height, *part.spec.row_shape(F)), np.float32), commits(planned, failed)
        )


class TestTwoPlanners:
    @pytest.mark.parametrize("moment", range(8))
    @pytest.mark.parametrize("ends", [True, False], ids=["which ends its part", "which has only planned its part"])
    def test_a_row_is_planned_once_whenever_the_other_one_plans(
        self, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, ends: bool
    ) -> None:
        """The other one takes its turn at the n-th question that the first asks its store; later ones are not asked."""
        rows = rows_of(tmp_path, 4)
        publish_clips(project, FILMS, rows)
        failed, asked, inside = [rows[1]["row_id"]], 0, False
        store = LatentStore(project.root, encoding_spec(project))
        store.create()

        def the_other() -> None:
            other = LatentStore(project.root, store.spec)
            if ends:
                for part in open_parts(project, FILMS, other):
                    write(part, failed)  # type: ignore[arg-type]
            else:
                next(open_parts(project, FILMS, other))

        def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: LatentStore, *given: Any, **named: Any) -> Any:
                nonlocal asked, inside
                if self is store and not inside and (asked := asked + 1) == moment + 1:
                    inside = True
                    the_other()
                return real(self, *given, **named)

            return call

        for name in ("frames_of", "parts", "unfinished", "commits", "plan_part"):
            monkeypatch.setattr(Store, name, interrupted(getattr(Store, name)))
        for part in open_parts(project, FILMS, store):
            write(part, failed)  # type: ignore[arg-type]
        planned = [row for part in store.parts_of(FILMS) for row in part.plan["row_id"].to_list()]
        good = [row for row in planned if row not in failed]
        assert sorted(good) == sorted(row["row_id"] for row in rows if row["row_id"] not in failed)  # type: ignore[type-var]
        assert 1 <= planned.count(failed[0]) <= 2  # a planner that begins later tries it again
        assert plan_encode(project, FILMS).rows["row_id"].to_list() == failed
