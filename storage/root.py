"""DataRoot: every path or URL of the project is built here, and stays under its root.

A path is a plain string that fsspec understands: an absolute local path or a URL. Names that come from data (datasets,
batches, recipes, digests) are checked, so that no `..` or slash leaves the root. The tree: storage/__init__.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage import listing
from storage.errors import ConfigError
from storage.remote import is_local, refuse_credentials

RUN_CONFIG = "config.json"  # in the folder of a run: what it is
CACHE_FOLDER = "~/.cache/nextvid"  # where the XDG base directory specification puts what can be made again
Table = Literal["sources", "media", "labels", "shots", "clips"]
Stored = Literal["latents", "pixels"]
Pointed = Literal["latent_stats", "duplicates", "mask_plan", "trainset"]

_NAME = re.compile(r"[a-z0-9_]+(\.[0-9]{6})?")  # dataset, recipe, benchmark; or batch <dataset>.<nnnnnn>
_HEX = re.compile(r"[0-9a-f]{12,32}")


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"'{name}' is not a name: lower-case letters, digits, underscores, and .nnnnnn for a batch")
    return name


def _hex(digest: str) -> str:
    if not _HEX.fullmatch(digest):
        raise ConfigError(f"'{digest}' is not a digest: 12 to 32 hex digits were expected")
    return digest


@dataclass(frozen=True)
class DataRoot:
    """Two roots: `url` holds tables, stores, plans and trainsets; `runs_url` runs, scores, samples and reports.

    Copies of files of a `url` on an object store are in `cache_folder`, at most `cache_bytes` of them (0: none).
    """

    url: str
    runs_url: str
    cache_folder: str = ""
    cache_bytes: int = 0

    @staticmethod
    def open(
        root: str, runs_root: str | None = None, cache_folder: str | None = None, cache_bytes: int = 0
    ) -> "DataRoot":
        """Roots from a corpus.yaml. A bucket as `root` needs a `runs_root` on a file system."""
        refuse_credentials(root, "root")
        url = root.rstrip("/") if not is_local(root) else str(Path(root.removeprefix("file://")).absolute())
        if runs_root is None and not is_local(url):
            raise ConfigError(f"root {url} is an object store: name a local or network folder as 'runs_root'")
        runs = url if runs_root is None else str(Path(runs_root).absolute())
        return DataRoot(url, runs, str(Path(cache_folder or CACHE_FOLDER).expanduser().absolute()), cache_bytes)

    # tables and their checks
    def accepted(self) -> str:
        """The accepted encoding, curation and pixels (JSON)."""
        return f"{self.url}/accepted.json"

    def forecast(self) -> str:
        """What accepting corpus.yaml would cost, as the job `forecast` computed it (JSON)."""
        return f"{self.url}/forecast.json"

    def cap(self, dataset: str) -> str:
        """Which rows a dataset's `cap` takes: the largest id by clip length (JSON)."""
        return f"{self.url}/caps/{_name(dataset)}.json"

    def folder(self, noun: Table | Stored) -> str:
        """The folder of one kind of table, or of all stores of latents or pixels."""
        return f"{self.url}/{noun}"

    def table(self, noun: Table, batch: str) -> str:
        """The table of a batch (parquet)."""
        return f"{self.folder(noun)}/{_name(batch)}.parquet"

    def checks(self, noun: Table, batch: str) -> str:
        """The outcome of the checks of a batch's table (JSON)."""
        return f"{self.url}/{noun}/{_name(batch)}.json"

    def preview(self, noun: Literal["shots", "clips", "latents"], batch: str, what: Literal["", "scores"] = "") -> str:
        """A picture of a batch: contact sheet, or histograms of its scores (PNG)."""
        return f"{self.url}/{noun}/{_name(batch)}{'.' + what if what else ''}.png"

    def pictures(self, batch: str) -> str:
        """Small pictures of a batch's shots near a threshold (table Pictures)."""
        return f"{self.url}/shots/pictures/{_name(batch)}.parquet"

    # latent and pixel stores
    def spec_folder(self, spec: str, noun: Stored = "latents") -> str:
        """The store of a spec, by the spec's digest."""
        return f"{self.folder(noun)}/{_hex(spec)}"

    def latents_checks(self, spec: str, batch: str) -> str:
        """The outcome of the checks of a batch's latents (JSON)."""
        return f"{self.spec_folder(spec)}/{_name(batch)}.json"

    def stored_batch(self, spec: str, batch: str, noun: Stored = "latents") -> str:
        """All parts of a batch in a store."""
        return f"{self.spec_folder(spec, noun)}/{_name(batch)}"

    def parts(self, spec: str, batch: str, frames: int, noun: Stored = "latents") -> str:
        """The parts of one clip length, in frames, of a batch."""
        return f"{self.stored_batch(spec, batch, noun)}/f{frames}"

    def part(self, spec: str, batch: str, frames: int, part: int, noun: Stored = "latents") -> str:
        """One part, by its number."""
        return f"{self.parts(spec, batch, frames, noun)}/{part:04d}"

    # things with a digest and a pointer
    def pointed(self, noun: Pointed, digest: str) -> str:
        """What is kept under a digest, such as one trainset."""
        return f"{self.url}/{noun}/{_hex(digest)}"

    def latest(self, noun: Pointed) -> str:
        """The pointer to the newest complete one (JSON)."""
        return f"{self.url}/{noun}/latest.json"

    def withdrawn(self) -> str:
        """The records of withdrawn media files."""
        return f"{self.url}/withdrawn"

    def notices(self) -> str:
        """What people accepted or withdrew, for Dagster to report (JSON files, by time)."""
        return f"{self.url}/notices"

    # what training and evaluation write
    def recipe_folder(self, recipe: str) -> str:
        """All runs of a recipe."""
        return f"{self.runs_url}/pretrain/{_name(recipe)}"

    def run(self, recipe: str, run: str) -> str:
        """One run, by its id."""
        return f"{self.recipe_folder(recipe)}/{_hex(run)}"

    def launch(self, recipe: str, dagster_run: str) -> str:
        """What a Dagster run (its uuid) hands to the trainer it launches (JSON)."""
        assert re.fullmatch(r"[0-9a-f-]{36}", dagster_run), dagster_run
        return f"{self.recipe_folder(recipe)}/launches/{dagster_run}.json"

    def latest_run(self, recipe: str) -> str:
        """The pointer to a recipe's newest complete run (JSON)."""
        return f"{self.recipe_folder(recipe)}/latest.json"

    def probe(self, recipe: str, run: str, step: int | None, benchmark: str, digest: str) -> str:
        """One score: of a run's checkpoint on a benchmark, by the digest of rows, labels, protocol and seed.

        Without a step the folder is one less deep: encoders without a run, and older scores of last checkpoints.
        """
        steps = "" if step is None else f"/step_{step:09d}"
        return f"{self.probes(recipe, run)}{steps}/{_name(benchmark)}/{_hex(digest)}"

    def probes(self, recipe: str, run: str) -> str:
        """All scores of a run."""
        return f"{self.runs_url}/probes/{_name(recipe)}/{_hex(run)}"

    def encoder_probes(self, encoder: str) -> str:
        """All scores of an encoder that corpus.yaml names, by the digest of its weights."""
        return f"{self.runs_url}/probes/{_name(encoder)}"

    def encoder_probe(self, encoder: str, weights: str, benchmark: str, digest: str) -> str:
        """One of these scores, by the digest of rows, labels, protocol and seed."""
        return f"{self.encoder_probes(encoder)}/{_hex(weights)}/{_name(benchmark)}/{_hex(digest)}"

    def samples(self, recipe: str, run: str) -> str:
        """The pictures generated by a run."""
        return f"{self.runs_url}/samples/{_name(recipe)}/{_hex(run)}"

    def report(self, recipe: str, run: str, digest: str) -> str:
        """One report of a run, by the digest of what it shows."""
        return f"{self.runs_url}/report/{_name(recipe)}/{_hex(run)}/{_hex(digest)}"

    def batches(self, noun: Table = "sources") -> list[str]:
        """Keys of the batches that have this table, sorted."""
        names = listing.files(self.folder(noun))
        return sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
