"""The asset graph: what each asset is and reads, how it is partitioned, which package makes it, which checks it has.

The command line, Dagster's definitions, the order of `make demo` and the table of assets in README.md are made from
this list; `python -m nextvid.graph` prints the table. The maker of an asset is the function `make_<asset>` in the file
`<asset>.py` of the package named here.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Asset = Literal[
    "sources", "media", "shots", "clips", "latents", "latent_stats", "duplicates", "mask_plan",
    "trainset", "pretrain", "probes", "samples", "report",
]  # fmt: skip
Group = Literal["corpus", "latents", "trainset", "training", "evaluation"]
Partition = Literal["none", "batch", "recipe"]


@dataclass(frozen=True)
class Node:
    """One asset. `makes` and `details` are its description: the first for the README, both for the UI."""

    group: Group
    package: str  # of nextvid
    partition: Partition
    reads: tuple[Asset, ...]  # nearest first
    makes: str
    details: str = ""
    checks: Mapping[str, str] = field(default_factory=dict)  # name -> what holds where it passes
    # Of the maker. Raise it when the same input gives another result: batches that an older version made are then
    # rebuilt once that is accepted (docs/decisions/0036). It is kept here, and not in the maker's file, since planning
    # and Dagster's definitions need it without importing torch.
    version: int = 1

    @property
    def description(self) -> str:
        """Both parts as sentences."""
        return f"{self.makes[0].upper()}{self.makes[1:]}. {self.details}".strip()


# Every asset after what it reads: the order in which they are made.
GRAPH: dict[Asset, Node] = {
    "sources": Node(
        "corpus", "corpus", "batch", (),
        "the files that the datasets' listings show, in batches; nothing is opened yet",
        "The sensor `new_sources` lists each dataset and assigns every new file to a batch, for good. The data "
        "version of a batch is the fingerprint of its listing.",
    ),
    "media": Node(
        "corpus", "corpus", "batch", ("sources",),
        "one row per file: digest, container facts, hazards, decoder, status and reason; labels",
        "A file that cannot be read is a row with its reason, never a missing row.",
        {
            "rows_are_files_listed": "There is one row for every file of the listing, whatever its status",
            "quarantined_within_budget": "The share of files that could not be read is within the dataset's "
            "`quarantine_budget`; raise it if they are as expected",
            "labels_name_files": "Every label file names at least one file of its dataset",
            "labels_meet_files": "Of the names in label files, and of the files, no more than half lack the other",
            "spans_inside_video": "Every labelled span overlaps its video; one that does not labels nothing",
        },
        version=5,
    ),
    "shots": Node(
        "corpus", "corpus", "batch", ("media",),
        "cut-free runs with scores: motion, freeze, luma, blur, perceptual hashes",
        "Scores only: the thresholds are under `curation` in corpus.yaml.",
        {
            "intervals_inside_file": "Every shot begins and ends inside its file",
            "no_overlap": "No two shots of a file overlap",
        },
        version=4,
    ),
    "clips": Node(
        "corpus", "corpus", "batch", ("shots",),
        "the curated manifest, one row per view: times, crop, flip, uses, split, or the reason why not",
        checks={
            "no_clip_crosses_a_cut": "The times of every clip are inside its shot, or its file (`cut_from: file`)",
            "ids_derive_from_content": "Ids computed again from media, times and crops are the same, and none repeats",
            "every_shot_has_a_row": "Every shot has a row: a clip, or the reason why not",
        },
        version=3,
    ),
    "latents": Node(
        "latents", "encode", "batch", ("clips",),
        "committed shards for the accepted encoding spec; only missing rows are encoded",
        "Frame latents in Zarr, and JPEG frames beside them where corpus.yaml asks for pixels.",
        {
            "finite": "No stored value is NaN or infinite, no row is constant",
            "counts": "Every row that the clips need is committed, or failed with a reason, within the budget",
            "round_trip": "Sampled rows, decoded and encoded again, equal the stored ones",
            "same_frames": "Sampled rows, decoded again, have the same frames; a file that has not gives no rows",
            "no_orphan": "Every committed row belongs to a current clip",
            "pixels": "Every row has its pixels too, where corpus.yaml asks for them",
        },
        version=2,
    ),
    "latent_stats": Node(
        "latents", "encode", "none", ("latents",),
        "mean, standard deviation and posterior width by channel",
        "By dataset and over all of them, from the sums that every commit holds: no latents are read.",
        {"std_positive": "Every channel varies", "enough_rows": "There are enough rows for stable statistics"},
    ),
    "duplicates": Node(
        "trainset", "trainset", "none", ("clips",),
        "near-duplicates across batches; contamination of pretraining by probe test sets",
        "Moves no row: it records which copies the trainset leaves out, and why.",
        {"groups_are_small": "No group has more than 1,000 files: a title card or flat picture may join unlike shots"},
    ),
    "mask_plan": Node(
        "trainset", "trainset", "recipe", (),
        "the visible-cell sets of a recipe's mask strategies",
        "Drawn once and stored under their digest.",
        {
            "budgets_exact": "Every entry keeps exactly the budget of visible cells",
            "tubes_constant": "The visible set is the same in every tubelet",
            "thinning_uniform": "Thinning favours no visible cell",
            "raw_statistics": "On the paper's grid, the raw sampler reproduces the paper's statistics",
        },
    ),
    "trainset": Node(
        "trainset", "trainset", "none", ("latents", "latent_stats", "duplicates"),
        "the frozen snapshot: rows, weights, statistics, under one digest",
        "The gate before training. It takes the batches that passed their checks, are encoded completely under the "
        "accepted spec and are covered by the `duplicates` that it cites, and lists the batches that it left out.",
        {
            "no_test_duplicate": "No row is a near-duplicate of a probe test clip",
            "weights_sum_to_one": "The weights of the mixture sum to one",
        },
    ),
    "pretrain": Node(
        "training", "train", "recipe", ("trainset", "mask_plan"),
        "a run: checkpoints of four stages, events, curves",
        "Trains a recipe on the newest trainset, by torchrun. Asking again resumes the run, or does nothing when it is "
        "complete. The data version is the run's id; the metadata name the digests of recipe, trainset and mask plan.",
        {
            "checkpoint_loads": "The last checkpoint opens and is complete",
            "losses_finite": "Every logged loss is finite",
            "rank_above_alarm": "The effective rank stays above the alarm, relative to initialisation",
        },
    ),
    "probes": Node(
        "evaluation", "evaluate", "recipe", ("pretrain", "latents"),
        "attentive probe and k-NN beside a random-init encoder",
        "Accuracies on frozen features, on every benchmark; the random-init encoder has the same shape and input. "
        "Encoders of corpus.yaml are probed too, each as a partition beside the recipes.",
    ),
    "samples": Node(
        "evaluation", "evaluate", "recipe", ("pretrain",),
        "generated next frames, masked and autoregressive",
        "As pictures, beside the autoencoder's reconstruction and a copy of the last frame.",
    ),
    "report": Node(
        "evaluation", "report", "recipe", ("probes", "samples", "pretrain"),
        "the model card: scores, curves, t-SNE, samples, lineage",
        "Scores are beside those of random initialisation; lineage goes down to the datasets.",
        version=6,
    ),
}  # fmt: skip

# A failed check stops whatever reads the asset, except for these: the sweep frees orphans, recipes that read latents
# need no pixels, a span outside its video labels nothing, and a run that collapsed is scored like any other.
NON_BLOCKING = frozenset(
    {"same_frames", "no_orphan", "pixels", "spans_inside_video", "labels_meet_files", "rank_above_alarm"}
)


def assets(*partitions: Partition) -> list[Asset]:
    """Assets with one of these partitions, in the order of the graph."""
    return [asset for asset, node in GRAPH.items() if node.partition in partitions]


# Made batch by batch. `sources` is not among them: listing a dataset is what makes its batches.
BY_BATCH = [asset for asset in assets("batch") if asset != "sources"]


def chain(asset: Asset) -> list[Asset]:
    """The asset and everything upstream of it, in the order of the graph."""
    needed = {asset}
    for name, node in reversed(GRAPH.items()):
        if name in needed:
            needed.update(node.reads)
    return [name for name in GRAPH if name in needed]


def maker(asset: Asset) -> Callable[..., Any]:
    """The function `make_<asset>`; its module is imported now, and with it what it needs, such as torch."""
    made: Callable[..., Any] = getattr(import_module(f"nextvid.{GRAPH[asset].package}.{asset}"), f"make_{asset}")
    return made


def readme_table() -> Iterator[str]:
    """Lines of the table of assets in README.md."""
    yield "| group | asset | makes |"
    yield "|---|---|---|"
    for asset, node in GRAPH.items():
        yield f"| {node.group} | `{asset}` | {node.makes} |"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in readme_table()))
