"""Assignment of files to batches, against a slow reference in plain dictionaries."""

from collections import defaultdict
from datetime import UTC, datetime

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from nextvid.config.datasets import DatasetConfig
from nextvid.corpus.assignment import assign, merge
from nextvid.making.batches import batch_key
from storage.schemas import Sources

CONFIG = DatasetConfig(uri="/nowhere", max_batch_gb=9e-9, max_batch_videos=3, max_batch_images=4)  # 9 bytes
FILES = st.dictionaries(
    st.builds(lambda n, kind: f"f{n:02d}.{kind}", st.integers(0, 30), st.sampled_from(["mp4", "jpg"])),
    st.tuples(st.integers(0, 5), st.sampled_from(["a", "b"])),
    max_size=25,
)


def listed(files: dict[str, tuple[int, str]]) -> pl.DataFrame:
    rows = [
        (f"/d/{name}", name, "video" if name.endswith("mp4") else "image", size, mark)
        for name, (size, mark) in files.items()
    ]
    schema = {
        name: Sources.create_empty().schema[name] for name in ("uri", "path", "kind", "size_bytes", "fingerprint")
    }
    return pl.DataFrame(rows, schema, orient="row").sort("uri")


def reference(listings: list[dict[str, tuple[int, str]]]) -> dict[str, str]:
    """URI -> batch by the rule: keep, else fill the last batch of the kind while it has room, sorted, else the next."""
    batch_of: dict[str, int] = {}
    kind_of: dict[int, str] = {}
    bytes_of: dict[str, int] = {}  # by file, as the listing before has it
    for listing in listings:
        for kind in ("jpg", "mp4"):
            limit = {"mp4": CONFIG.max_batch_videos, "jpg": CONFIG.max_batch_images}[kind]
            for name in sorted(n for n in listing if n.endswith(kind) and n not in batch_of):
                mine = [number for number, of in kind_of.items() if of == kind]
                last = max(mine, default=None)
                inside = [other for other, batch in batch_of.items() if batch == last]
                size = sum(bytes_of[other] for other in inside) + listing[name][0]
                if last is None or len(inside) >= limit or (inside and size > 9):
                    last = max(kind_of, default=-1) + 1
                    kind_of[last] = kind
                batch_of[name], bytes_of[name] = last, listing[name][0]
        bytes_of |= {name: size for name, (size, _) in listing.items()}
    return {f"/d/{name}": batch_key("d", number) for name, number in batch_of.items()}


@given(st.lists(FILES, min_size=1, max_size=5))
def test_assignment_agrees_with_the_reference_and_never_moves_a_file(
    listings: list[dict[str, tuple[int, str]]],
) -> None:
    known: pl.DataFrame = Sources.create_empty()
    before: dict[str, str] = {}
    for listing in listings:
        known, _ = merge(known, listed(listing), [], "d", CONFIG, datetime.now(UTC))
        Sources.validate(known)
        batches = dict(known.select("uri", "batch").iter_rows())
        assert before.items() <= batches.items()
        assert known.group_by("uri").agg(pl.col("batch").n_unique())["batch"].to_list() == [1] * len(batches)
        before = batches
    assert before == reference(listings)
    kinds = known.group_by("batch").agg(pl.col("kind").n_unique(), pl.col("uri").n_unique())
    assert all(number == 1 for number in kinds["kind"])
    assert all(files <= 4 for files in kinds["uri"])


@given(st.lists(FILES, min_size=2, max_size=5))
def test_revisions_and_gone_files_follow_the_last_listing(listings: list[dict[str, tuple[int, str]]]) -> None:
    known: pl.DataFrame = Sources.create_empty()
    seen: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for listing in listings:
        known, _ = merge(known, listed(listing), [], "d", CONFIG, datetime.now(UTC))
        for name, mark in listing.items():
            if not seen[name] or seen[name][-1] != mark:
                seen[name].append(mark)
    for name, marks in seen.items():
        rows = known.filter(pl.col("uri") == f"/d/{name}").sort("revision")
        assert list(rows.select("size_bytes", "fingerprint").iter_rows()) == marks
        assert rows["revision"].to_list() == list(range(len(marks)))
        assert rows["gone_at"].is_null()[-1] == (name in listings[-1])


def test_changes_say_what_happened() -> None:
    now = datetime.now(UTC)
    first, changes = merge(Sources.create_empty(), listed({"a.mp4": (1, "a"), "b.mp4": (1, "a")}), [], "d", CONFIG, now)
    assert [(c.batch, c.added, c.changed, c.gone) for c in changes] == [("d.000000", 2, 0, 0)]
    second, changes = merge(first, listed({"a.mp4": (2, "a"), "c.jpg": (1, "a")}), [], "d", CONFIG, now)
    assert [(c.batch, c.added, c.changed, c.gone) for c in changes] == [("d.000000", 0, 1, 1), ("d.000001", 1, 0, 0)]
    third, changes = merge(
        second, listed({"a.mp4": (2, "a"), "b.mp4": (1, "a"), "c.jpg": (1, "a")}), [], "d", CONFIG, now
    )
    assert [(c.batch, c.returned) for c in changes] == [("d.000000", 1)]
    _, changes = merge(third, listed({"a.mp4": (2, "a"), "c.jpg": (1, "a")}), ["/d/b.mp4"], "d", CONFIG, now)
    assert changes == [], "a file that is still being written is neither new nor gone"


def test_a_batch_keeps_its_number_when_a_kind_has_room() -> None:
    known, _ = merge(
        Sources.create_empty(), listed({"a.mp4": (1, "a"), "b.jpg": (1, "a")}), [], "d", CONFIG, datetime.now(UTC)
    )
    assert assign(dict.fromkeys(("/d/x", "/d/y", "/d/z"), 1), "video", "d", known, CONFIG) == {
        "/d/x": "d.000001",
        "/d/y": "d.000001",
        "/d/z": "d.000002",
    }


def test_a_file_above_the_most_bytes_is_one_alone() -> None:
    sizes = {"/d/a": 1, "/d/b": 50, "/d/c": 9, "/d/d": 0}
    found = assign(sizes, "video", "d", Sources.create_empty(), CONFIG)
    assert [int(batch[-1]) for batch in found.values()] == [0, 1, 2, 2]


def test_batches_that_were_full_by_files_alone_stay_as_they_are() -> None:
    """By default; who writes a capacity gets that."""
    files = {f"{number:04d}.mp4": (1, "a") for number in range(1000)}
    known, _ = merge(Sources.create_empty(), listed(files), [], "d", DatasetConfig(uri="/d"), datetime.now(UTC))
    assert set(known["batch"]) == {"d.000000"}
    written = DatasetConfig(uri="/d", max_batch_videos=2000)
    assert assign({"/d/x": 1}, "video", "d", known, DatasetConfig(uri="/d")) == {"/d/x": "d.000001"}
    assert assign({"/d/x": 1}, "video", "d", known, written) == {"/d/x": "d.000000"}
    assert assign({"/d/x": 1}, "video", "d", known[:999], DatasetConfig(uri="/d")) == {"/d/x": "d.000000"}
