"""The report's sections on data: what each dataset gave, what was left out, overlap with test sets, previews, digests.

Counts are taken over the tables of the trainset's batches; previews are the pictures that earlier assets stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from nextvid.config.project import Project
from nextvid.lineage.trace import DatasetShare, licences_of, shares
from nextvid.making.batches import dataset_of
from nextvid.report.page import Block, Picture, Section, Table, Text
from nextvid.train.run import Run
from nextvid.trainset.pixels import TrainsetPixels, open_pixels
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.records import read_record
from storage.schemas import Clips, Media, Shots
from storage.tables import read_tables

PREVIEWS: tuple[tuple[Literal["shots", "clips", "latents"], Literal["", "scores"], str], ...] = (
    ("shots", "", "shots, with what started each and by how many grey levels"),
    ("clips", "", "shots left out of pretraining, by reason"),
    ("clips", "scores", "scores and lengths of all shots; dashed lines are thresholds"),
    ("latents", "", "source, what the autoencoder makes of the stored latents, and their difference"),
)


@dataclass(frozen=True)
class DataFacts:
    """A run's trainset, its trainset.json and its datasets, read once for all sections."""

    project: Project
    run: Run
    trainset: Trainset
    record: Mapping[str, Any]  # trainset.json
    shares: tuple[DatasetShare, ...]
    licences: Mapping[str, str]  # of the files of each dataset

    @property
    def pixels(self) -> TrainsetPixels | None:
        """The pixels that the run reads beside latents, None where it reads none."""
        digest = self.run.pixels
        return None if digest is None else open_pixels(self.project.root, self.trainset, digest)

    @property
    def folder(self) -> str:
        """The trainset's folder."""
        return self.project.root.pointed("trainset", self.trainset.digest)


def read_facts(project: Project, run: Run) -> DataFacts:
    """Facts of a run's trainset."""
    trainset = Trainset.open(project.root, run.trainset)
    record = read_record(f"{project.root.pointed('trainset', run.trainset)}/trainset.json")
    lineage = trainset.lineage()
    found = shares(lineage, "dataset", trainset.weights)
    return DataFacts(project, run, trainset, record, found, licences_of(project, lineage))


def data_section(facts: DataFacts) -> Section:
    """Datasets from file to row, batches left out, and the overlap with test sets."""
    blocks: list[Block] = [_datasets(facts)]
    if facts.record["left_out"]:
        listed = ", ".join(f"{batch} ({why})" for batch, why in sorted(facts.record["left_out"].items()))
        blocks.append(
            Text(f"Batches left out of the trainset: {listed}.", "caveat", (f"{facts.folder}/trainset.json",))
        )
    if facts.record["dropped"]:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(facts.record["dropped"].items()))
        blocks.append(Text(f"Rows dropped from pretraining: {listed}.", sources=(f"{facts.folder}/trainset.json",)))
    blocks.append(_contamination(facts))
    return Section("Data", tuple(blocks))


def previews_section(facts: DataFacts) -> Section | None:
    """Pictures of one batch of each dataset, and of the mask plan. None where no picture was stored."""
    root, trainset = facts.project.root, facts.trainset
    blocks: list[Block] = []
    for dataset in trainset.weights:
        batch = next(name for name in trainset.batches if dataset_of(name) == dataset)
        for table, kind, caption in PREVIEWS:
            path = root.preview(table, batch, kind)
            if atomic.exists(path):
                name = "_".join(part for part in (table, kind, dataset) if part)
                blocks.append(Picture(name, atomic.read_bytes(path), f"{batch}: {caption}", (path,)))
    gallery = f"{root.pointed('mask_plan', facts.run.mask_plan)}/gallery.png"
    if atomic.exists(gallery):
        caption = (
            "Mask plan, its first entries: bright cells are kept, grey ones were thinned out, dark ones are masked."
        )
        blocks.append(Picture("mask_plan", atomic.read_bytes(gallery), caption, (gallery,)))
    return Section("What it looks like", tuple(blocks)) if blocks else None


def lineage_section(facts: DataFacts, config: Mapping[str, Any]) -> Section:
    """Digests from checkpoint to files, and how to walk them."""
    run, pixels = facts.run, facts.pixels
    rows = (
        ("run", run.id),
        ("recipe", f"{run.recipe.name}, digest {config['recipe_digest']}"),
        ("overrides", ", ".join(run.overrides) or "none"),
        ("weights start from", "random numbers" if run.source is None else run.source.text()),
        ("trainset", facts.trainset.digest),
        ("parent trainset", facts.record["parent"] or "none"),
        ("mask plan", run.mask_plan),
        ("encoding spec", facts.trainset.spec.digest()),
        ("autoencoder", facts.trainset.spec.autoencoder),
        ("pixels", "not read" if pixels is None else f"{pixels.digest}, {pixels.words}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())),
    )
    table = Table(
        ("", "digest"),
        rows,
        "ll",
        "What this run was made from.",
        (f"{run.folder}/config.json", f"{facts.folder}/trainset.json", *([pixels.path] if pixels else [])),
    )
    walk = (
        f"Every row of the trainset, with its file, is in {facts.folder}/lineage.parquet. "
        f"'nextvid lineage {run.id}' leads from this run to files, 'nextvid lineage FILE' from a file to the runs and "
        "scores that used it."
    )
    return Section("Lineage", (table, Text(walk, sources=(f"{facts.folder}/lineage.parquet",))))


def _datasets(facts: DataFacts) -> Table:
    """From files to rows, one line for each dataset; counts are over the trainset's batches."""
    root, batches = facts.project.root, list(facts.trainset.batches)
    media = read_tables(root, "media", [b for b in batches if b in root.batches("media")], Media)
    shots = read_tables(root, "shots", [b for b in batches if b in root.batches("shots")], Shots)
    clips = read_tables(root, "clips", [b for b in batches if b in root.batches("clips")], Clips)
    rows = []
    for share in facts.shares:
        own = [frame.filter(pl.col("dataset") == share.name) for frame in (media, shots, clips)]
        good = [frame.filter(pl.col("status") == "ok").height for frame in own]
        bad = own[0].filter(pl.col("status") != "ok").height
        rows.append(
            (
                share.name,
                "" if share.weight is None else f"{share.weight:.3g}",
                f"{own[0].height:,}",
                f"{bad:,}",
                f"{good[1]:,}",
                f"{good[2]:,}",
                f"{share.files:,}",
                f"{share.clips:,}",
                f"{share.rows:,}",
                facts.licences[share.name],
            )
        )
    return Table(
        head=(
            "dataset",
            "weight",
            "files",
            "unusable",
            "shots",
            "clips",
            "files used",
            "clips used",
            "rows",
            "licence",
        ),
        rows=tuple(rows),
        align="lrrrrrrrrl",
        caption=(
            "From files to rows of the trainset. Unusable files are quarantined or rejected, with a reason in the "
            "media table; 'used' is what pretraining reads: training splits without copies of test clips."
        ),
        sources=(root.folder("media"), root.folder("shots"), root.folder("clips"), f"{facts.folder}/lineage.parquet"),
    )


def _contamination(facts: DataFacts) -> Table:
    """Overlap of training files with those that probes are tested on, before anything was dropped."""
    path = f"{facts.project.root.pointed('duplicates', facts.record['duplicates'])}/duplicates.json"
    entries = read_record(path)["contamination"]
    rows = tuple(
        (
            entry["benchmark"],
            f"{entry['test_files']:,}",
            f"{entry['test_files_seen_in_pretraining']:,}",
            f"{sum(entry['dropped_from_pretrain_shots'].values()):,}",
            f"{entry['dropped_from_probe_train_shots']:,}",
            f"{part:,} ({100 * part / whole:.0f} %)" if whole else "0",
        )
        for entry in entries
        for part, whole in [(entry["train_files_in_pretraining"], entry["train_files"])]
    )
    return Table(
        head=(
            "benchmark",
            "test files",
            "with a copy in pretraining",
            "shots dropped: pretraining",
            "probe-train",
            "probe-train files also pretrained on",
        ),
        rows=rows,
        align="lrrrrr",
        caption=(
            "Contamination, by file bytes and perceptual hashes. Copies of test clips were dropped from pretraining "
            "and probe training; probe-train clips may be in pretraining, labels unseen."
        ),
        sources=(path,),
    )
