"""Write the demo corpus from a seed: real encoded files and their label tables.

The corpus is planned by plan.py, drawn by scenes.py and encoded by files.py. It is written to a temporary folder that
is renamed at the end, so a folder that exists is complete; a second call with the same arguments writes nothing.

    python examples/demo/write_corpus.py FOLDER [--videos N] [--images N] [--seed S]
"""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2

from examples.demo import files, plan
from nextvid.machine import available_cores
from storage.errors import CorpusError

VIDEOS, IMAGES = 1000, 250  # 4000 training and 1000 test clips as in the study (docs/demo.md); images: .05 of draws
MARKER = "corpus.json"
VIDEO_COLUMNS = ("path", "start_s", "end_s", "motion", "shape", "split")
IMAGE_COLUMNS = ("path", "start_s", "end_s", "shape", "split")
TRUTH_COLUMNS = ("path", "time_s", "kind")
MADE_COLUMNS = ("path", "kind", "of")


@dataclass(frozen=True)
class CorpusSummary:
    """The content of a corpus, as its marker file records it. Counts are files unless their line says otherwise."""

    version: int
    seed: int
    videos: int  # originals, without copies, re-encodings, leaks and broken files
    images: int
    copies: int
    recoded: int
    leaks: int  # re-encodings of test videos that the labels call training videos
    broken: int
    labelled_shots: int
    stills: int  # shots without motion
    cuts: int
    dissolves: int

    @property
    def files(self) -> int:
        """Videos and images of every kind, without label tables."""
        return self.videos + self.images + self.copies + self.recoded + self.leaks + self.broken


@dataclass(frozen=True)
class Derived:
    """A file made from another: name, kind (copy, recoded, leak, broken) and source, relative to the dataset."""

    path: str
    kind: str
    of: str


def write_corpus(folder: Path, seed: int = 0, videos: int = VIDEOS, images: int = IMAGES) -> CorpusSummary:
    """Write a corpus to `folder`, or return the summary of the same corpus if it is there already.

    Raises CorpusError when the folder holds anything else, or when fewer than 8 videos or 8 images are asked for.
    """
    if videos < 8 or images < 8:
        raise CorpusError(f"a demo corpus of {videos} videos and {images} images: at least 8 of each hold every kind")
    if folder.exists():
        return _existing(folder, seed, videos, images)
    making = folder.with_name(f".{folder.name}.{os.getpid()}.making")
    (making / "videos").mkdir(parents=True)
    (making / "images").mkdir()
    try:
        summary = _fill(making, seed, videos, images)
        (making / MARKER).write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return summary


def _existing(folder: Path, seed: int, videos: int, images: int) -> CorpusSummary:
    """The summary of the corpus in `folder`. Raises CorpusError where other arguments made it, or it is none."""
    marker = folder / MARKER
    if not marker.is_file():
        raise CorpusError(f"{folder}: exists and is no demo corpus; name another folder")
    summary = CorpusSummary(**json.loads(marker.read_text(encoding="utf-8")))
    asked = (plan.VERSION, seed, videos, images)
    if (summary.version, summary.seed, summary.videos, summary.images) != asked:
        raise CorpusError(
            f"{folder}: holds version {summary.version}, seed {summary.seed}, {summary.videos} videos, {summary.images}"
            f" images, not {asked}; remove it to write the corpus again, or name another folder"
        )
    return summary


def _fill(folder: Path, seed: int, video_count: int, image_count: int) -> CorpusSummary:
    videos, images = plan.plan_videos(seed, video_count), plan.plan_images(seed, image_count)
    with ProcessPoolExecutor(available_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_write_video, folder / "videos"), videos, chunksize=4))
        list(pool.map(partial(_write_image, folder / "images"), images, chunksize=32))
        made = _plan_derived(seed, videos)
        recoded = [d for d in made if d.kind in ("recoded", "leak")]
        list(pool.map(partial(_recode, folder / "videos"), recoded, chunksize=2))
    for derived in made:
        if derived.kind == "copy":
            shutil.copyfile(folder / "videos" / derived.of, folder / "videos" / derived.path)
    for n in range(plan.one_in(video_count, plan.BROKEN_EVERY)):
        broken = files.write_broken(folder / "videos", n, folder / "videos" / _path(videos[0]))
        made.append(Derived(broken.name, "broken", _path(videos[0])))
    made_images = _derive_images(folder / "images", images)
    _write_tables(folder, videos, images, made, made_images)
    kinds = [d.kind for d in (*made, *made_images)]
    transitions = [kind for video in videos for _, kind in _transitions(video)]
    return CorpusSummary(
        version=plan.VERSION,
        seed=seed,
        videos=video_count,
        images=image_count,
        copies=kinds.count("copy"),
        recoded=kinds.count("recoded"),
        leaks=kinds.count("leak"),
        broken=kinds.count("broken"),
        labelled_shots=sum(part.motion is not None for video in videos for part in video.parts),
        stills=transitions.count("still"),
        cuts=transitions.count("cut"),
        dissolves=transitions.count("dissolve"),
    )


def _path(item: plan.VideoPlan | plan.ImagePlan) -> str:
    return f"{item.name}.{item.ending}"


def _write_video(folder: Path, video: plan.VideoPlan) -> None:
    cv2.setNumThreads(1)  # one core a process
    b_frames = 2 if video.seed[-1] % 10 == 7 else 0  # a tenth of the files, as from an editor
    files.write_video(folder / _path(video), plan.render_video(video), b_frames=b_frames)


def _write_image(folder: Path, image: plan.ImagePlan) -> None:
    cv2.setNumThreads(1)
    files.write_image(folder / _path(image), plan.render_image(image), image.side)


def _recode(folder: Path, derived: Derived) -> None:
    cv2.setNumThreads(1)
    files.write_video(folder / derived.path, files.read_video(folder / derived.of), quality="copy")


def _plan_derived(seed: int, videos: Sequence[plan.VideoPlan]) -> list[Derived]:
    """Copies and re-encodings of training videos, and leaks of test videos."""
    train = [_path(v) for v in videos if v.split == "train"]
    test = [_path(v) for v in videos if v.split == "test"]
    copies, recoded = (plan.one_in(len(videos), every) for every in (plan.COPY_EVERY, plan.RECODE_EVERY))
    chosen = [train[i] for i in plan.generator(seed, 0).permutation(len(train))[: copies + recoded]]
    leaks = plan.one_in(len(videos), plan.LEAK_EVERY)
    leaked = [test[i] for i in plan.generator(seed, 1).permutation(len(test))[:leaks]]
    made = [Derived(f"copy_{n:02d}{Path(of).suffix}", "copy", of) for n, of in enumerate(chosen[:copies])]
    for n, of in enumerate(chosen[copies:]):
        made.append(Derived(f"recoded_{n:02d}.{'mp4' if n % 2 or of.endswith('webm') else 'webm'}", "recoded", of))
    return made + [Derived(f"leak_{n:02d}.mkv", "leak", of) for n, of in enumerate(leaked)]


def _derive_images(folder: Path, images: Sequence[plan.ImagePlan]) -> list[Derived]:
    """A copy of a PNG, a JPEG of another at lower quality, and two broken files."""
    pngs, jpeg = [_path(i) for i in images if i.ending == "png"], next(_path(i) for i in images if i.ending == "jpg")
    shutil.copyfile(folder / pngs[0], folder / "copy_00.png")
    files.write_image(folder / "recoded_00.jpg", files.read_image(folder / pngs[1]), images[7].side, quality="copy")
    broken = [files.write_broken_image(folder, n, folder / jpeg) for n in range(len(files.BROKEN_IMAGES))]
    made = [Derived("copy_00.png", "copy", pngs[0]), Derived("recoded_00.jpg", "recoded", pngs[1])]
    return made + [Derived(path.name, "broken", jpeg) for path in broken]


def _write_tables(
    folder: Path,
    videos: Sequence[plan.VideoPlan],
    images: Sequence[plan.ImagePlan],
    made: Sequence[Derived],
    made_images: Sequence[Derived],
) -> None:
    """Write the two label tables that corpus.yaml names, and two tables of truth that no pipeline reads."""
    by_path = {_path(v): v for v in videos}
    rows = [row for v in videos for row in _video_rows(_path(v), v, v.split)]
    for derived in made:
        if derived.kind != "broken":
            source = by_path[derived.of]
            rows += _video_rows(derived.path, source, "train" if derived.kind == "leak" else source.split)
    shapes = {_path(i): i.shape for i in images}
    named = list(shapes.items())
    named += [(d.path, shapes[d.of]) for d in made_images if d.kind != "broken"]
    _write_csv(folder / "videos.csv", VIDEO_COLUMNS, rows)
    _write_csv(folder / "images.csv", IMAGE_COLUMNS, [(p, "", "", f"digit_{s}", "train") for p, s in named])
    truth = [(_path(v), time_s, kind) for v in videos for time_s, kind in _transitions(v)]
    _write_csv(folder / "truth_transitions.csv", TRUTH_COLUMNS, truth)
    all_made = [("videos/", d) for d in made] + [("images/", d) for d in made_images]
    _write_csv(folder / "truth_made.csv", MADE_COLUMNS, [(at + d.path, d.kind, at + d.of) for at, d in all_made])


def _video_rows(path: str, video: plan.VideoPlan, split: str) -> list[tuple[object, ...]]:
    """One label line a shot; a still has none."""
    return [
        (path, span.start_s, span.end_s, span.part.motion, f"digit_{span.part.shape}", split)
        for span in plan.spans(video)
        if span.part.motion is not None
    ]


def _transitions(video: plan.VideoPlan) -> list[tuple[float, str]]:
    """Times of cuts (the new shot's first frame), dissolves (the first pure frame after) and stills (their start)."""
    found: list[tuple[float, str]] = []
    for n, span in enumerate(plan.spans(video)):
        if n:
            found.append((span.start_s, "dissolve" if span.part.dissolve_in else "cut"))
        if span.part.motion is None:
            found.append((span.start_s, "still"))
    return found


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the demo corpus: labelled videos and images of moving digits.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    started = time.monotonic()
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        summary = write_corpus(asked.folder, asked.seed, asked.videos, asked.images)
    except CorpusError as error:
        raise SystemExit(str(error)) from None
    print(f"{asked.folder}: {json.dumps(asdict(summary))}, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
