"""The maker of `latent_stats`: mean and deviation of latents by channel, dataset and clip length.

They follow in float64 from the sums of each row in its commit; no shard is read, and the commits of one batch are in
memory at a time. Training normalises by the mean and deviation of its trainset (nextvid/trainset/trainset.py), which
keeps other rows and weights them.

Axes: n rows, C channels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64

from nextvid.config.project import Project
from nextvid.encode.plan import accepted_spec
from nextvid.making.batches import batch_state, dataset_of
from nextvid.making.outcome import Check, Number, Outcome
from nextvid.making.progress import OnProgress, Progress, silent
from nextvid.making.publishing import addressed, publish_latest
from storage.digest import digest_config
from storage.errors import DamagedError, UpstreamError
from storage.records import publish_record, read_record
from storage.spec import EncodingSpec
from storage.store import LatentStore

# Our choice: a deviation of so many independent values is known to 2 %. Of all datasets together, because training
# normalises by the deviation of their mixture, where a small dataset has the share of its weight (docs/decisions/0021).
ENOUGH_VALUES = 1000

Channels = Float64[np.ndarray, " C"]


@dataclass(frozen=True)
class Moments:
    """Number of rows, and mean and variance of their values by channel; every row has the same weight."""

    rows: int
    values: int  # per channel
    mean: Channels
    variance: Channels
    posterior_std: float | None
    widths: int  # rows whose posterior width is known, of which `posterior_std` is the mean

    @property
    def std(self) -> Channels:
        """Standard deviation by channel."""
        return np.asarray(np.sqrt(self.variance))

    def to_json(self) -> dict[str, Any]:
        """As stats.json has it."""
        plain = {"mean": self.mean.tolist(), "std": self.std.tolist(), "posterior_std": self.posterior_std}
        return {"rows": self.rows, "values": self.values} | plain


def moments(commits: pl.DataFrame, spec: EncodingSpec) -> Moments:
    """Moments of committed rows (columns sums, sums_squared, frames, posterior_std), at least one.

    Each row has the same weight, whatever its frames: an image is repeated to the length of a clip when it is read.
    """
    sums = commits["sums"].explode().to_numpy().reshape(commits.height, spec.channels)
    squares = commits["sums_squared"].explode().to_numpy().reshape(commits.height, spec.channels)
    lengths = {frames: spec.latent_frames(frames) for frames in commits["frames"].unique()}
    values = commits["frames"].replace_strict(lengths).to_numpy().astype(np.float64) * spec.height * spec.width
    means = sums / values[:, None]
    mean = means.mean(0)
    # by the law of total variance: inside rows and between them; exact where the mean is far from zero
    inside = np.maximum(squares / values[:, None] - means**2, 0)
    widths = commits["posterior_std"].drop_nulls().to_numpy().astype(np.float64)
    width = float(widths.mean()) if len(widths) else None
    variance = (inside + (means - mean) ** 2).mean(0)
    return Moments(len(sums), int(values.sum()), mean, variance, width, len(widths))


def united(first: Moments, second: Moments) -> Moments:
    """Moments of the rows of both, by the law of total variance: those of all rows at once, but for rounding."""
    rows, widths = first.rows + second.rows, first.widths + second.widths
    share = second.rows / rows
    apart = second.mean - first.mean
    mean = first.mean + share * apart
    inside = first.variance + share * (second.variance - first.variance)
    known = [part.widths / widths * part.posterior_std for part in (first, second) if part.posterior_std is not None]
    width = sum(known) if known else None
    variance = inside + share * (1 - share) * apart**2
    return Moments(rows, first.values + second.values, mean, variance, width, widths)


def mixed(parts: list[tuple[float, Moments]]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of a mixture of (weight, moments); weights are positive and need not sum to one."""
    total = sum(weight for weight, _ in parts)
    mean = sum((weight / total * part.mean for weight, part in parts), np.zeros_like(parts[0][1].mean))
    variance = sum(
        (weight / total * (part.variance + (part.mean - mean) ** 2) for weight, part in parts), np.zeros_like(mean)
    )
    return mean, np.sqrt(variance)


def make_latent_stats(project: Project, on_progress: OnProgress = silent) -> Outcome:
    """Publish mean, deviation and posterior width by dataset and clip length, of all latents in the accepted encoding.

    Batches whose checks have not passed are left out. Raises UpstreamError where none has passed or no row is left,
    DamagedError where the file that was made of them before is another now.
    """
    began = time.perf_counter()
    root, spec = project.root, accepted_spec(project)
    encoding = spec.digest()
    taken = [b for b in root.batches("clips") if batch_state(root, b, "latents", encoding=encoding).usable]
    if not taken:
        raise UpstreamError(
            "no batch of 'latents' has passed its checks in the accepted encoding: make 'latents' first"
        )
    found = _by_dataset(LatentStore(root, spec), taken, on_progress)
    if not found:
        raise UpstreamError(
            f"no row of {', '.join(taken)} is encoded: no clip was cut, or every one failed; the column 'reason' of "
            "the media, shots and clips tables says why"
        )
    datasets = {name: {f"f{frames}": part.to_json() for frames, part in parts.items()} for name, parts in found.items()}
    stats = {"spec": encoding, "batches": taken, "datasets": datasets}
    digest = digest_config(stats)
    with addressed(root, "latent_stats", digest) as made:
        if made.new:
            publish_record(f"{made.path}/stats.json", stats)
            every = [part for parts in found.values() for part in parts.values()]
            lowest, values = min(float(part.std.min()) for part in every), sum(part.values for part in every)
            fewest = min(part.values for part in every)
            few = f"{values} latent values a channel, and {ENOUGH_VALUES} are needed: add files, or longer clips"
            enough = {"values": values, "fewest_of_a_dataset": fewest, "needed": ENOUGH_VALUES}
            made.checks = (
                Check("std_positive", lowest > 0, {"lowest_std": lowest}),
                Check("enough_rows", values >= ENOUGH_VALUES, enough, "" if values >= ENOUGH_VALUES else few),
            )
        else:
            path, remedy = f"{made.path}/stats.json", f"remove the folder {made.path} and make 'latent_stats' again"
            if digest_config(read_record(path, remedy)) != digest:
                raise DamagedError(f"{path} was changed after it was written; {remedy}")
    if made.passed:
        publish_latest(root, "latent_stats", digest)
    numbers: dict[str, Number] = {}
    for name, parts in found.items():
        for length, part in parts.items():
            numbers[f"{name}_f{length}_rows"] = part.rows
            if part.posterior_std is not None:  # beside the deviation: what `posterior: sample` would add
                numbers[f"{name}_f{length}_posterior_std"] = part.posterior_std
                numbers[f"{name}_f{length}_std"] = float(part.std.mean())
    rows, seconds = sum(part.rows for parts in found.values() for part in parts.values()), time.perf_counter() - began
    return Outcome("latent_stats", None, made.new, rows, 0, seconds, digest=digest, numbers=numbers, checks=made.checks)


def _by_dataset(store: LatentStore, batches: Sequence[str], on_progress: OnProgress) -> dict[str, dict[int, Moments]]:
    """Moments by dataset and frames, both ascending."""
    found: dict[tuple[str, int], Moments] = {}
    for number, batch in enumerate(batches, 1):
        rows = store.commits(batch).filter(pl.col("status") == "ok").sort("frames", "row_id")
        for group in rows.partition_by("frames", maintain_order=True):
            key = dataset_of(batch), int(group["frames"][0])
            here = moments(group, store.spec)
            found[key] = united(found[key], here) if key in found else here
        on_progress(Progress("latent_stats", number, len(batches)))
    by_dataset: dict[str, dict[int, Moments]] = {}
    for dataset, frames in sorted(found):
        by_dataset.setdefault(dataset, {})[frames] = found[dataset, frames]
    return by_dataset
