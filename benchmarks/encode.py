"""The encode pipeline against the autoencoder alone on the same frames: `python -m benchmarks.encode [--quick]`.

Alone: `Autoencoder.load`, then `start` and `result` over frames in memory, on one thread. Pipeline: all of
`make_latents` on the same rows: plan, decode from video files in one process, encode on one thread, round trip and
writing behind it. The encoder has one core in both arms; what the pipeline does beside it, the round trip's forwards
too, has the other one. Arms run in turns. Weights are random, since time does not depend on them. A second workload
with the demo's autoencoder, 100 times cheaper, says what the pipeline costs where decoding is what limits.

Memory: rows are views of few files, so that ten times the input is ten times the rows and nothing else; what is
compared is the largest resident size of the encoding process while the pipeline runs.
"""

import json as json_module
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import polars as pl
import torch
import tyro
import yaml
from av.video.stream import VideoStream

from benchmarks.measure import machine, median_ratio, show, write
from nextvid.config.project import Project, open_project
from nextvid.encode.autoencoders import Autoencoder
from nextvid.encode.frames import Decoding
from nextvid.encode.latents import make_latents
from nextvid.encode.pipeline import shares
from nextvid.encode.plan import plan_encode, wanted_clips
from nextvid.encode.vavae import CONFIG
from nextvid.making.outcome import Outcome
from storage.digest import digest, digest_file
from storage.schemas import Clips
from storage.store import LatentStore
from storage.tables import publish_checks, write_table

TARGET = 0.95  # of the autoencoder's own rate, our aim
GROWTH = 1.1  # our choice of "constant": allocators round, and the first run is short
SOURCE, FPS, FILM_FRAMES = 256, 8, 64  # pixels a side as in Kinetics copies of 256p; 8 s a file
BATCH = "films.000000"
CONTRAST = 10.0  # of the noise: far below the difference between any picture and a random decoder's
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "autoencoder"


@dataclass(frozen=True)
class Load:
    """One workload: `rows` clips of `frames` frames at `side` pixels, in batches of `at_once` frames."""

    name: str
    autoencoder: Path
    side: int
    frames: int
    rows: int
    at_once: int
    turns: int


def main(
    quick: bool = False, json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None, side: int | None = None
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: frames of 64 pixels instead of 256 for the VA-VAE shape, in under a minute.
        json: file for the results.
        side: pixels of the VA-VAE shape's frames; default 256, or 64 with --quick.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nextvid-encode-") as top:
        films = films_of_noise(Path(top, "films"), 2 if quick else 8)
        weights = write_vavae(Path(top, "vavae"))
        pixels, rows_of_two, turns = (64, 64, 1) if quick else (256, 48, 2)
        vavae = Load("VA-VAE shape", weights, side or pixels, 2, rows_of_two, 8, turns)
        demo = Load("demo autoencoder", DEMO, 64, 8, 64 if quick else 512, 64, turns)
        rows = [_compared(load, films, Path(top)) for load in (vavae, demo)]
        memory = _memory(Load("memory", DEMO, 64, 1 if quick else 4, 300, 64, 1), films, Path(top))
    reached, growth = rows[0]["pipeline_over_alone"], memory["growth"]
    found = {
        "benchmark": "encode",
        "quick": quick,
        "machine": machine() | {"torch": torch.__version__},
        "rows": rows,
        "memory": memory,
        "targets": {
            "pipeline_over_alone": {"measured": reached, "at_least": TARGET, "met": reached >= TARGET},
            "memory_growth": {"measured": growth, "at_most": GROWTH, "met": growth <= GROWTH},
        },
    }
    keys = ("side", "frames", "rows", "alone_s", "pipeline_s", "pipeline_over_alone", "decode_s", "busy_share")
    columns = ("", "px", "frames", "rows", "alone s", "pipeline s", "rate over alone", "decode s", "encoder busy")
    show("encode pipeline against the autoencoder alone", columns, [[r["name"], *(r[k] for k in keys)] for r in rows])
    print(f"pipeline_over_alone: {reached:.3f}, wanted >= {TARGET}: {'met' if reached >= TARGET else 'MISSED'}")
    print(
        f"memory_growth: {growth:.3f} ({memory['few_bytes'] / 1e6:.0f} MB at {memory['few_rows']} rows, "
        f"{memory['many_bytes'] / 1e6:.0f} MB at {memory['many_rows']}), wanted <= {GROWTH}: "
        f"{'met' if growth <= GROWTH else 'MISSED'}"
    )
    write(json, found)


def _compared(load: Load, films: Sequence[Path], top: Path) -> dict[str, Any]:
    """Both arms in turns."""
    alone: list[float] = []
    piped: list[float] = []
    outcomes: list[Outcome] = []
    views = _views(_project(top / f"{load.name} views", load, films), load)
    for turn in range(load.turns):
        project = _project(top / f"{load.name} {turn}", load, films)
        for arm in ("alone", "pipeline") if turn % 2 == 0 else ("pipeline", "alone"):
            if arm == "alone":
                alone.append(_alone(load, views))
            else:
                piped.append(_pipeline(project, outcomes))
    numbers = [outcome.numbers for outcome in outcomes]
    encode_s = [float(said["encode_s"]) for said in numbers]
    return {
        "name": load.name,
        "side": load.side,
        "frames": load.frames,
        "rows": load.rows,
        "turns": load.turns,
        "alone_s": float(np.median(alone)),
        "pipeline_s": float(np.median(piped)),
        "pipeline_over_alone": median_ratio(alone, piped),
        "decode_s": float(np.median([float(said["decode_s"]) for said in numbers])),
        "busy_share": median_ratio(encode_s, piped),
    }


def _alone(load: Load, views: Sequence[np.ndarray]) -> float:
    """Seconds of the autoencoder over the same batches, one gathered while another runs as the pipeline does it."""
    began = time.perf_counter()
    model = Autoencoder.load(load.autoencoder, "cpu", frames_at_once=load.at_once)
    at_once = load.at_once // load.frames
    for first in range(0, len(views), at_once):
        model.start(views[first : first + at_once]).result()
    return time.perf_counter() - began


def _pipeline(project: Project, outcomes: list[Outcome]) -> float:
    """Seconds of all of `make_latents`."""
    began = time.perf_counter()
    outcome = make_latents(project, BATCH)
    seconds = time.perf_counter() - began
    assert outcome.passed, outcome.checks
    outcomes.append(outcome)
    return seconds


def _views(project: Project, load: Load) -> list[np.ndarray]:
    """The frames of every row, in the order of their slots."""
    rows = plan_encode(project, BATCH).rows
    with Decoding(1) as decoding:
        seen = decoding.start(rows.select(Clips.column_names()), load.side).collect()
    views = [seen[row].frames for row in rows["row_id"]]
    return [view for view in views if view is not None]


def _memory(load: Load, films: Sequence[Path], top: Path) -> dict[str, Any]:
    """Largest resident bytes of this process while the pipeline encodes `load.rows` rows, and ten times as many."""
    peaks = []
    counts = (load.rows, 10 * load.rows)
    for rows in counts:
        many = Load(load.name, load.autoencoder, load.side, load.frames, rows, load.at_once, 1)
        project = _project(top / f"memory {rows}", many, films)
        with _peak() as peak:
            _pipeline(project, [])
        peaks.append(peak[0])
    return {
        "few_rows": counts[0],
        "many_rows": counts[1],
        "few_bytes": peaks[0],
        "many_bytes": peaks[1],
        "growth": peaks[1] / peaks[0],
    }


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Gives a list whose one number is, after the block, the largest resident size seen meanwhile."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        over.set()
        watching.join()


def _project(folder: Path, load: Load, films: Sequence[Path]) -> Project:
    """A corpus.yaml and a clips table: rows of the films in turn, at different times and crops."""
    assert shares("cpu", 1)[1] == 1 or len(os.sched_getaffinity(0)) > 2, "one thread encodes on two cores"
    folder.mkdir()
    said = {
        "root": "root",
        "encoding": {
            "autoencoder": str(load.autoencoder),
            "resolution": load.side,
        },
        "execution": {"batch_frames": load.at_once, "device": "cpu"},
        "datasets": {
            "films": {"uri": str(films[0].parent), "weight": 1.0, "clips": [{"frames": load.frames, "fps": 4}]}
        },
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(said))
    project = open_project(folder / "corpus.yaml")
    media = [bytes.fromhex(digest_file(film)) for film in films]
    rows = [_row(number, films, media, load.frames) for number in range(load.rows)]
    table = pl.DataFrame(rows, schema=Clips.create_empty().schema).sort("row_id")
    write_table(project.root.table("clips", BATCH), table, Clips)
    publish_checks(project.root.checks("clips", BATCH), "clips", [{"name": "by hand", "passed": True}])
    assert wanted_clips(project, BATCH).height == load.rows
    LatentStore(project.root, plan_encode(project, BATCH).spec).create()
    return project


def _row(number: int, films: Sequence[Path], media: Sequence[bytes], frames: int) -> dict[str, Any]:
    """Row of Clips: films by turns, every view at its own time and crop."""
    film, nth = number % len(films), number // len(films)
    start = nth % (FILM_FRAMES - 2 * frames)
    times = [round(1e6 * (start + 2 * i) / FPS) for i in range(frames)]
    x, y = (7 * nth) % 64, (13 * nth) % 64
    name = bytes.fromhex(digest([media[film].hex(), times, x, y, nth]))
    return {
        "status": "ok",
        "row_id": name,
        "clip_id": name,
        "shot_id": media[film],
        "media_id": media[film],
        "dataset": "films",
        "batch": BATCH,
        "uri": str(films[film]),
        "kind": "video",
        "decoder": "pyav",
        "frames": frames,
        "times_us": times,
        "view_index": nth,
        "crop_x": x,
        "crop_y": y,
        "crop_w": SOURCE - 64,
        "crop_h": SOURCE - 64,
        "flip": False,
        "uses": ["pretrain"],
        "split": "train",
    }


def films_of_noise(folder: Path, count: int) -> tuple[Path, ...]:
    """Videos of drifting noise, H.264 as x264 writes it by default.

    Noise, since random weights decode to pictures that resemble nothing: a shift or a flip of it is no likelier than
    the truth, so that the round trip does all its work and finds every row undecidable.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        texture = rng.normal(128, CONTRAST, (SOURCE, SOURCE + 3 * FILM_FRAMES, 3)).clip(0, 255).astype(np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            assert isinstance(stream, VideoStream)
            stream.width = stream.height = SOURCE
            stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
            for frame in range(FILM_FRAMES):
                picture = np.ascontiguousarray(texture[:, 3 * frame : 3 * frame + SOURCE])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        paths.append(path)
    return tuple(paths)


def write_vavae(folder: Path) -> Path:
    """A folder of the exact VA-VAE shape with random weights."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(**CONFIG).save_pretrained(folder)
    (folder / "nextvid.json").write_text(json_module.dumps({"kind": "autoencoder_kl", "patch": 1}))
    return folder


if __name__ == "__main__":
    tyro.cli(main)
