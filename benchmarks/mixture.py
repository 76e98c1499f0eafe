"""`python -m benchmarks.mixture`: the paper's mixture on paper: sizes from corpus.yaml, hours from rates measured here.

Reads examples/paper/corpus.yaml for what is cut and stored, benchmarks/rates.json for rates, and prints the tables of
docs/scale.md; `--write` puts them there, and a test holds the page to them. `--rates BATCHES.json CURATION.json` makes
rates.json of two full runs. Nothing here is measured, and what rests on arithmetic alone says so.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvid.config.corpus import load_corpus
from nextvid.config.datasets import ClipPolicy, DatasetConfig
from nextvid.config.recipes import recipe
from nextvid.encode.cap import MARGIN
from nextvid.model.cost import cost
from storage.atomic import publish_bytes, publish_json
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec

TOP = Path(__file__).resolve().parents[1]
RATES, PAGE = TOP / "benchmarks" / "rates.json", TOP / "docs" / "scale.md"
# Files, hours and weights of Tab. 6 (docs/method.md 8). The self-collected source is not in corpus.yaml; here it is cut
# as InternVid.
MIXTURE = {
    "imagenet1k": (1_280_000, 0.0, 0.25),
    "something_something_v2": (169_000, 168.0, 0.05),
    "kinetics400": (241_000, 669.0, 0.18),
    "internvid": (234_000_000, 760_000.0, 0.20),
    "ttvideo": (115_000_000, 958_000.0, 0.32),
}
HOUR_GB = 0.24  # of a video-hour: our measurement, the median of seven real videos of 360 to 1080 lines
CORES = (1, 64, 1000)
STEP_CPU_S = 7.0  # CPU seconds that a step on Ray takes beside its work: our measurement (docs/scale.md)
ROW_S = 16.5e-6  # CPU seconds of `trainset` (15 us) and `latent_stats` (1.5) for a row (docs/performance.md, manifests)
RECIPE = "nextvid_l"  # all three of the paper's draw as much
CUT_AS = {"ttvideo": "internvid"}
# VA-VAE at 256 pixels: 32 channels of 16 x 16 cells (docs/method.md 1).
VAVAE = EncodingSpec("0" * 32, 256, "bicubic", "bf16", "sample", "float16", 32, 16, 16)
ENCODE_FLOP_PER_FRAME = 137.5e9  # counted by torch's FlopCounterMode at 256 pixels
H200_FLOPS = 989e12  # dense bf16, the vendor's figure
UTILISATION = {
    "latents": 0.40,
    "pretrain": 0.35,
}  # an extrapolation and our aim: neither was measured
UI = "UI, from start"  # a row of benchmarks.batches that does not grow by the batch alone
MARKS = "<!-- made by benchmarks/mixture.py: begin -->", "<!-- made by benchmarks/mixture.py: end -->"


@dataclass(frozen=True)
class Size:
    """What one dataset becomes."""

    name: str
    files: int
    hours: float
    batches: int
    clips: int
    rows: int
    frames: int  # stored, over all rows
    size_bytes: int
    longest_bytes: int  # of the longest clips, which the cool-down alone reads
    shards: int


def clips_of(policy: ClipPolicy, mean_s: float) -> int:
    """Clips that one file gives: files of these datasets are cut already, so each is one shot."""
    if policy.frames == 1 or policy.starts == "random":
        return policy.clips_per_shot
    assert policy.fps is not None
    return max(1, min(policy.clips_per_shot, math.floor(mean_s / (policy.frames / policy.fps))))


def drawn() -> dict[tuple[str, int], int]:
    """Rows that training draws by dataset and clip length; of a dataset of images all have length 1."""
    found: dict[tuple[str, int], int] = {}
    for stage in recipe(RECIPE).stages:
        for name, (_, hours, weight) in MIXTURE.items():
            key = name, stage.frames if hours else 1
            found[key] = found.get(key, 0) + round(weight * stage.steps * stage.batch)
    return found


def size(name: str, config: DatasetConfig, *, capped: bool = False) -> Size:
    """Clips, rows, bytes and objects of one dataset; `capped`: with `cap: auto`, which leaves clips as they are."""
    files, hours, _ = MIXTURE[name]
    capacity = config.max_batch_videos if hours else config.max_batch_images
    batches = max(math.ceil(files / capacity), math.ceil(hours * HOUR_GB / config.max_batch_gb))
    clips = rows = frames = size_bytes = longest_bytes = shards = 0
    longest = max(policy.frames for policy in config.clips)
    for policy in config.clips:
        found = files * clips_of(policy, 3600 * hours / files)
        kept = found * policy.views
        if capped:
            kept = min(kept, math.ceil(MARGIN * drawn()[name, policy.frames]))
        clips += found
        rows += kept
        frames += kept * policy.frames
        stored_bytes = kept * VAVAE.row_bytes(policy.frames)
        size_bytes += stored_bytes
        longest_bytes += stored_bytes if policy.frames == longest > 1 else 0
        shards += batches * math.ceil(kept / batches / ROWS_PER_SHARD)
    return Size(name, files, hours, batches, clips, rows, frames, size_bytes, longest_bytes, shards)


def sizes(*, capped: bool = False) -> list[Size]:
    """Every dataset of the mixture."""
    datasets = load_corpus(TOP / "examples" / "paper" / "corpus.yaml").datasets
    return [size(name, datasets[CUT_AS.get(name, name)], capped=capped) for name in MIXTURE]


def caps(every: Sequence[Size], capped: Sequence[Size]) -> Iterator[tuple[str, ...]]:
    """(dataset, rows drawn, rows, drawn over stored, TB, GPU-hours; the same four with `cap: auto`)."""
    counts: dict[str, int] = {}
    for (name, _), count in drawn().items():
        counts[name] = counts.get(name, 0) + count
    counts["together"] = sum(counts.values())
    for one, other in zip([*every, total(every)], [*capped, total(capped)], strict=True):
        sides = (
            (number(each.rows), f"{counts[each.name] / each.rows:.2g}", f"{each.size_bytes / 1e12:.3g}", encode_h(each))
            for each in (one, other)
        )
        yield one.name, number(counts[one.name]), *itertools.chain(*sides)


def encode_h(of: Size) -> str:
    """GPU-hours of encoding."""
    return number(of.frames * ENCODE_FLOP_PER_FRAME / (H200_FLOPS * UTILISATION["latents"]) / 3600)


def total(of: Sequence[Size]) -> Size:
    """All of them as one."""
    names = [field for field in Size.__dataclass_fields__ if field != "name"]
    return Size("together", *(sum(getattr(each, name) for each in of) for name in names))


def objects(of: Size) -> int:
    """Files or objects: five tables and four verdicts a batch, a shard and its commit, and four of each part."""
    parts = of.batches * (1 if not of.hours else 2)
    return 9 * of.batches + 2 * of.shards + 4 * parts


def training_flop() -> float:
    """Of the recipe, all four stages, forward and backward (nextvid/model/cost.py)."""
    found = recipe(RECIPE)
    computed = cost(found)
    return sum(stage.step_flops * each.steps for stage, each in zip(computed.stages, found.stages, strict=True))


def hours(of: Size, rates: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(asset, CPU-hours, GPU-hours, from what)."""
    first, decode = (rates[name] * of.hours / 3600 for name in ("first_pass_cpu_s_per_hour", "decode_cpu_s_per_hour"))
    yield "shots", number(first), "-", "first pass: measured, a video-hour of 360p"
    yield "latents, decoding", number(decode), "-", "every frame once: measured, 360p"
    yield "latents, encoding", "-", encode_h(of), "137.5 GFLOP a frame at 40 % of an H200: arithmetic"
    train = training_flop() / (H200_FLOPS * UTILISATION["pretrain"]) / 3600
    yield "pretrain, nextvid_l", "-", number(train), "nextvid inspect's FLOP at 35 % of an H200: arithmetic"
    for asset, name in (("duplicates", "duplicates"), ("trainset", "trainset, made"), ("plan", "plan")):
        seconds = rates["ms_per_batch"][name] * of.batches / 1000
        yield f"{asset}, tables alone", number(seconds / 3600), "-", "ms a batch of ten files: measured"


def walls(of: Size, rates: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """(work, the time it takes on each of CORES, what bends it); only what the rates are of, GPUs aside."""
    first, decode = (rates[name] * of.hours for name in ("first_pass_cpu_s_per_hour", "decode_cpu_s_per_hour"))
    terabytes = of.hours * HOUR_GB / 1000
    for work, cpu_s in (("shots", first), ("latents, decoding", decode)):
        gb_per_s = terabytes * 1000 / (cpu_s / CORES[-1])
        bends = f"reading {number(terabytes)} TB: {gb_per_s:.1f} GB/s at {CORES[-1]:,} cores"
        yield work, *(duration(cpu_s / cores) for cores in CORES), bends
    steps_s = 4 * of.batches * STEP_CPU_S
    bends = f"{STEP_CPU_S:.0f} CPU-s a step, four steps a batch"
    yield "starting steps", *(duration(steps_s / cores) for cores in CORES), bends
    alone = ("listing", "plan", "latent_stats", "trainset, made")
    serial_s = sum(rates["ms_per_batch"][name] for name in alone) * of.batches / 1000 + of.rows * ROW_S
    bends = f"one process each, {number(of.rows)} rows: " + ", ".join(alone).replace(", made", "")
    yield "tables of all batches", *([duration(serial_s)] * len(CORES)), bends
    together = first + decode + steps_s
    yield "together", *(duration(together / cores + serial_s) for cores in CORES), ""


def machinery(of: Size, rates: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(piece of work, ms a batch as measured, how long at the mixture's batches)."""
    for name, ms in rates["ms_per_batch"].items():
        yield name, f"{ms:.1f}", duration(ms * of.batches / 1000)


def number(value: float) -> str:
    """Three digits that count, with thousands apart."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours, days or years, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    days = seconds / 86400
    return f"{seconds / 3600:.1f} h" if days < 3 else f"{days:.0f} days" if days < 700 else f"{days / 365:.1f} years"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables(rates: dict[str, Any]) -> str:
    """The tables between the marks of docs/scale.md."""
    found = sizes()
    whole = total(found)
    columns = ("rows", "drawn over stored", "TB", "GPU-hours")
    by_dataset = [
        (
            each.name, number(each.files), number(each.hours), number(each.batches), number(each.clips),
            number(each.rows), f"{each.size_bytes / 1e12:.3g}", number(each.shards), number(objects(each)),
        )
        for each in [*found, whole]
    ]  # fmt: skip
    return "\n\n".join(
        [
            table(
                ("dataset", "files", "hours", "batches", "clips", "rows", "latents, TB", "shards", "objects"),
                by_dataset,
            ),
            table(
                ("dataset", "drawn", *(f"{what}{cap}" for cap in ("", ", `cap: auto`") for what in columns)),
                list(caps(found, sizes(capped=True))),
            ),
            table(("asset", "CPU-hours", "GPU-hours (H200)", "from"), list(hours(whole, rates))),
            table(("work", "ms a batch", f"at {number(whole.batches)} batches"), list(machinery(whole, rates))),
            table(
                ("curation", *(f"{n:,} core{'s' * (n > 1)}" for n in CORES), "what bends"), list(walls(whole, rates))
            ),
            f"{whole.longest_bytes / whole.size_bytes:.0%} of the bytes are the cool-down's longest clips.",
            _provenance(rates),
        ]
    )


def _provenance(rates: dict[str, Any]) -> str:
    said = rates["machine"]
    return (
        f"Rates: {said['cpus']} shared cores, {said['date']}, load {said['load_1min']}, {rates['batches']} batches of "
        f"{rates['files_per_batch']} files, whose UI answers {rates['ui_start_s']} s after its start."
    )


def page(text: str, made: str) -> str:
    """The page with the tables between its marks."""
    begin, end = map(re.escape, MARKS)
    assert re.search(f"{begin}.*{end}", text, re.DOTALL), f"{PAGE} has lost its marks"
    return re.sub(f"{begin}.*{end}", lambda _: f"{MARKS[0]}\n\n{made}\n\n{MARKS[1]}", text, flags=re.DOTALL)


def rates_of(batches: dict[str, Any], curation: dict[str, Any]) -> dict[str, Any]:
    """rates.json of two full runs. Videos of 360 lines stand for the mixture's; a median, since codecs differ."""
    rows = sorted((row for row in curation["rows"] if row["size"].endswith("x360")), key=lambda r: r["video_s"])
    assert rows, "curation was not run on videos of 360 lines"

    def median(name: str) -> float:
        values = sorted(row[name] for row in rows)
        return float(round(values[len(values) // 2], 1))

    return {
        "machine": batches["machine"],
        "batches": batches["batches"],
        "files_per_batch": batches["files_per_batch"],
        "ms_per_batch": {
            row["name"]: round(row["ms_per_batch"], 2)
            for row in batches["rows"]
            if not row["name"].startswith(("register", UI))
        },
        "ui_start_s": next(round(row["seconds"], 1) for row in batches["rows"] if row["name"].startswith(UI)),
        "first_pass_cpu_s_per_hour": median("first_pass_cpu_s_per_hour"),
        "decode_cpu_s_per_hour": median("decode_cpu_s_per_hour"),
    }


def main() -> None:
    """Print the tables; write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs=2, type=Path, metavar=("BATCHES", "CURATION"))
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    arguments = parser.parse_args()
    if arguments.rates:
        publish_json(str(RATES), rates_of(*(json.loads(path.read_text()) for path in arguments.rates)))
    made = tables(json.loads(RATES.read_text()))
    print(made)
    if arguments.write:
        publish_bytes(str(PAGE), page(PAGE.read_text(), made).encode())


if __name__ == "__main__":
    main()
