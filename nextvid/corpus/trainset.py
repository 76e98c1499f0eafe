"""The maker of `trainset`: the frozen snapshot of rows that pretraining reads, under one digest; and how it is opened.

The one gate between a corpus that grows and runs that must not (design, 4): it compares digests itself, lists what it
leaves out, and moves nothing. Which batches and rows it takes is decided in selection.py; this module freezes and
opens.

Axes: C channels.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import polars as pl
from jaxtyping import Float32

from nextvid.corpus.pointers import publish_latest, read_latest
from nextvid.corpus.project import Project
from nextvid.corpus.publishing import publish_verdict
from nextvid.corpus.selection import Selection, rows_of, select
from nextvid.encode.stats import mixed
from nextvid.outcome import Check, Number, Outcome
from nextvid.recipes import recipe
from storage.atomic import exists, publish_json, read_bytes, read_json, staged_folder
from storage.cache import open_rows
from storage.digest import ID_BYTES, crc32c, digest_bytes, digest_config
from storage.errors import ConflictError, DamagedError, RefusedError, UpstreamError
from storage.latents import EncodingSpec
from storage.reader import ADDRESS
from storage.root import DataRoot
from storage.schemas import Duplicates, Lineage
from storage.tables import read_table, write_tables

ASSET = "trainset"
NAMED = 20  # our choice: batches that a message or an event names one by one


def make_trainset(project: Project, recipe_names: Sequence[str] | None = None) -> Outcome:
    """Freeze the rows of every batch that passed, is complete and is known to the latest `duplicates`.

    With `recipe_names`, their clip lengths must be there. Raises UpstreamError where too few batches are ready or no
    row is left, RefusedError where a recipe lacks a clip length.
    """
    began = time.perf_counter()
    chosen = select(project)
    _refuse_missing_lengths(chosen, recipe_names or ())
    weights = _weights(project, chosen)
    digest = _digest(chosen, weights)
    folder = project.root.pointed("trainset", digest)
    made = not exists(f"{folder}/trainset.json")
    if made:
        _freeze(project, chosen, weights, digest, folder)
    checks = _checks(chosen, weights)
    publish_verdict(f"{folder}/checks.json", ASSET, checks)
    if all(check.passed for check in checks) and read_latest(project.root, "trainset") != digest:
        publish_latest(project.root, "trainset", digest)
    numbers: dict[str, Number] = {f"rows_f{frames}": len(rows) for frames, rows in chosen.addresses.items()}
    numbers |= {f"weight_{name}": weight for name, weight in weights.items()}
    numbers |= {"batches": len(chosen.batches), "batches_left_out": len(chosen.left_out), "spec": chosen.spec.digest()}
    numbers |= {"left_out": _named(chosen.left_out)} if chosen.left_out else {}
    numbers |= {f"dropped_{reason}": count for reason, count in chosen.dropped.items()}
    size_bytes = sum(rows.nbytes for rows in chosen.addresses.values())
    seconds = time.perf_counter() - began
    return Outcome(ASSET, None, made, chosen.height, size_bytes, seconds, digest=digest, numbers=numbers, checks=checks)


def _named(left_out: Mapping[str, str]) -> str:
    """The first batches that were left out and why; all stand in trainset.json."""
    first = "; ".join(f"{batch}: {reason}" for batch, reason in itertools.islice(sorted(left_out.items()), NAMED))
    return first + (f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else "")


class Trainset:
    """A frozen trainset, opened for reading: rows are memory-mapped, so opening costs the same at any size."""

    def __init__(self, root: DataRoot, folder: str, said: Mapping[str, Any]) -> None:
        self._root, self._folder, self._said = root, folder, said
        self.digest: str = said["digest"]
        self.spec = EncodingSpec.from_json(said["spec"])
        self.parent: str | None = said.get("parent")  # the trainset that was the latest before
        self.weights: dict[str, float] = said["weights"]
        self.batches: tuple[str, ...] = tuple(said["batches"])  # an address's `batch` is an index into these
        self.mean: Float32[np.ndarray, " C"] = np.array(said["mean"], np.float32)
        self.std: Float32[np.ndarray, " C"] = np.array(said["std"], np.float32)

    @classmethod
    def open(cls, root: DataRoot, digest: str | None = None) -> Self:
        """The trainset of a digest, else the latest. Raises UpstreamError where there is none."""
        found = digest or read_latest(root, "trainset")
        if found is None:
            raise UpstreamError("there is no trainset yet: make 'trainset' first")
        folder = root.pointed("trainset", found)
        said = read_json(f"{folder}/trainset.json")
        seal = said.pop("seal", None) if isinstance(said, dict) else ""
        if seal is not None and digest_config(said) != seal:
            raise DamagedError(f"{folder}/trainset.json was changed; restore it, or remove {folder} and make it again")
        return cls(root, folder, said)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Clip lengths in frames that it holds, ascending; 1 are images."""
        return tuple(sorted(int(name[1:]) for name in self._said["offsets"]))

    def rows(self, frames: int) -> np.ndarray:
        """Addresses of all rows of a clip length, memory-mapped; sorted by dataset, then row id.

        Raises RefusedError for a length it has not, DamagedError where the file is not what was frozen.
        """
        wanted = sum(count for _, count in self.offsets(frames).values())
        path = f"{self._folder}/rows.f{frames}.npy"
        try:
            rows = open_rows(self._root, path, self._said.get("files", {}).get(f"rows.f{frames}.npy"))
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; {self._remedy}") from None
        if rows.dtype != ADDRESS or rows.shape != (wanted,):
            raise DamagedError(f"{path}: {rows.shape} rows of {rows.dtype}, {wanted} addresses were frozen")
        return rows

    def offsets(self, frames: int) -> dict[str, tuple[int, int]]:
        """(first row, count) of each dataset that has rows of this length."""
        found = self._said["offsets"].get(f"f{frames}")
        if found is None:
            held = ", ".join(str(length) for length in self.lengths)
            raise RefusedError(f"trainset {self.digest} has no clips of {frames} frames; it has {held}")
        return {name: (int(first), int(count)) for name, (first, count) in found.items()}

    def check(self) -> None:
        """Read every row file; DamagedError where one is not what was frozen. Costs what reading them costs."""
        for name, crc in self._said.get("files", {}).items():
            path = f"{self._folder}/{name}"
            try:
                found = crc32c(read_bytes(path))
            except (OSError, UpstreamError) as error:
                raise DamagedError(f"{path} cannot be read ({error}); {self._remedy}") from None
            if found != crc:
                raise DamagedError(f"{path}: its bytes differ from their checksum; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"remove {self._folder} and make 'trainset' again"

    def lineage(self) -> pl.DataFrame:
        """One line a row, back to its file (schema Lineage); sorted by batch, then row id."""
        return read_table(f"{self._folder}/lineage.parquet", Lineage)


def _refuse_missing_lengths(chosen: Selection, names: Sequence[str]) -> None:
    held = set(chosen.addresses)
    for name in names:
        if missing := sorted(set(recipe(name).clip_lengths) - held):
            raise RefusedError(
                f"recipe {name} needs clips of {missing} frames, and the rows have {sorted(held)}: add a clip policy"
            )


def _weights(project: Project, chosen: Selection) -> dict[str, float]:
    """Mixture weights over the datasets that have rows; they sum to one."""
    held = chosen.datasets
    written = {name: weight for name, weight in sorted(project.corpus.weights().items()) if name in held and weight > 0}
    total = sum(written.values())
    return {name: weight / total for name, weight in written.items()}


def _digest(chosen: Selection, weights: Mapping[str, float]) -> str:
    """Of the spec, the weights and (dataset, row id, crc) in order: a row that moved is the same row."""
    rows: dict[str, dict[str, str]] = {}
    for frames, addresses in chosen.addresses.items():
        for name, (first, count) in chosen.offsets[frames].items():
            some = addresses[first : first + count]
            content = some["row_id"].astype(">u8").tobytes() + some["crc"].astype("<u4").tobytes()
            rows.setdefault(f"f{frames}", {})[name] = digest_bytes(content)
    return digest_config({"spec": chosen.spec.digest(), "weights": dict(weights), "rows": rows})


def statistics(chosen: Selection, weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel [C], float64: images and clips of the base length, weighted as the mixture.

    Within a dataset every row weighs the same.
    """
    base = min((frames for frames in chosen.addresses if frames > 1), default=1)
    parts = []
    for name, weight in weights.items():
        found = [part for frames in sorted({1, base}) for part in chosen.moments.get((name, frames), ())]
        rows = sum(part.rows for part in found)
        parts += [(weight * part.rows / rows, part) for part in found]
    return mixed(parts)


def _freeze(project: Project, chosen: Selection, weights: Mapping[str, float], digest: str, folder: str) -> None:
    mean, std = statistics(chosen, weights)
    said = {
        "digest": digest,
        "parent": read_latest(project.root, "trainset"),
        "spec": chosen.spec.to_json(),
        "weights": dict(weights),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "batches": list(chosen.batches),
        "offsets": {f"f{frames}": dict(offsets) for frames, offsets in chosen.offsets.items()},
        "duplicates": chosen.duplicates,
        "left_out": dict(chosen.left_out),
        "dropped": dict(chosen.dropped),
    }
    with staged_folder(folder, last="trainset.json") as temporary:
        for frames, rows in chosen.addresses.items():
            np.save(temporary / f"rows.f{frames}.npy", rows, allow_pickle=False)
        files = sorted(temporary.glob("*.npy"))
        said["files"] = {path.name: crc32c(np.memmap(path, np.uint8, "r")) for path in files}
        write_tables(str(temporary / "lineage.parquet"), _lineage(project, chosen), Lineage)
        publish_json(str(temporary / "trainset.json"), said | {"seal": digest_config(said)})


def _lineage(project: Project, chosen: Selection) -> Iterator[pl.DataFrame]:
    """Lineage of the chosen rows, a batch at a time, sorted by row id; read again, since a row's line is long.

    Raises ConflictError where a batch has other rows by now than were chosen.
    """
    table = read_table(f"{project.root.pointed('duplicates', chosen.duplicates)}/duplicates.parquet", Duplicates)
    order = {frames: np.argsort(rows["batch"], kind="stable") for frames, rows in chosen.addresses.items()}
    for number, batch in enumerate(chosen.batches):
        kept, _ = rows_of(project, chosen.spec, batch, table)
        ids: list[bytes] = []
        for frames, rows in chosen.addresses.items():
            first, last = np.searchsorted(rows["batch"], (number, number + 1), sorter=order[frames])
            data = rows["row_id"][order[frames][first:last]].astype(">u8").tobytes()
            ids += [data[start : start + ID_BYTES] for start in range(0, len(data), ID_BYTES)]
        lines = kept.sort("row_id")
        if lines["row_id"].to_list() != sorted(ids):
            raise ConflictError(f"batch {batch} changed while its rows were frozen: make 'trainset' again")
        yield lines.select(Lineage.column_names())


def _checks(chosen: Selection, weights: Mapping[str, float]) -> tuple[Check, ...]:
    total = sum(weights.values())
    return (
        Check("no_test_duplicate", chosen.leaked == 0, {"rows": chosen.height, "leaked": chosen.leaked}),
        Check("weights_sum_to_one", abs(total - 1) < 1e-9, {"sum": total}),
    )
